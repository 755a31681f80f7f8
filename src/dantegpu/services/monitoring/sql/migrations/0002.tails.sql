-- Where an attempt's last chunk begins, so that small appends lengthen it instead of making a row each; and whose the
-- log is.
ALTER TABLE log_heads ADD COLUMN tail_offset bigint NOT NULL DEFAULT 0;
ALTER TABLE log_heads ADD COLUMN team_id uuid;
