-- Where the ports that an attempt publishes are reached: dante.v1.AttemptStatus with only `ports`.
ALTER TABLE attempts ADD COLUMN ports bytea NOT NULL DEFAULT '';
