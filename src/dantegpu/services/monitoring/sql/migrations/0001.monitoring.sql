-- Logs of attempts: a head each, and the bytes in chunks until they are archived.

CREATE TABLE log_heads (
    attempt_id uuid PRIMARY KEY,
    job_id uuid NOT NULL,
    epoch bigint NOT NULL CHECK (epoch > 0),
    size_bytes bigint NOT NULL DEFAULT 0 CHECK (size_bytes >= 0),
    complete boolean NOT NULL DEFAULT false,
    truncated boolean NOT NULL DEFAULT false,
    archived boolean NOT NULL DEFAULT false CHECK (NOT archived OR complete),
    updated_at timestamptz NOT NULL,
    UNIQUE (job_id, epoch)
);
CREATE INDEX log_heads_to_archive ON log_heads (updated_at) WHERE NOT archived;

CREATE TABLE log_chunks (
    attempt_id uuid NOT NULL REFERENCES log_heads,
    start_offset bigint NOT NULL CHECK (start_offset >= 0),
    data bytea NOT NULL CHECK (length(data) > 0),
    PRIMARY KEY (attempt_id, start_offset)
);
-- Logs are bytes that rarely repeat within a chunk's page; compressing each small chunk costs more than it saves.
ALTER TABLE log_chunks ALTER COLUMN data SET STORAGE EXTERNAL;
