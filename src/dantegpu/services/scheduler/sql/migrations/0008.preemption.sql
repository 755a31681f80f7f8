-- Spot work gives way to other work. What it saves is there for its next attempt; what it leaves is kept for the job that
-- it gave way to.
ALTER TABLE attempts
    ADD COLUMN spot boolean NOT NULL DEFAULT false,
    ADD COLUMN saves boolean NOT NULL DEFAULT false,           -- a checkpoint, when it has to stop
    ADD COLUMN checkpoint_number bigint NOT NULL DEFAULT 0,    -- rises with each upload; 0 = none yet
    ADD COLUMN checkpoint_sha256 text,                         -- NULL: there was nothing to save
    ADD COLUMN checkpoint_size_bytes bigint,
    ADD COLUMN checkpoint_slot integer NOT NULL DEFAULT 0 CHECK (checkpoint_slot IN (0, 1)),
    ADD COLUMN checkpointed_at timestamptz,
    ADD CHECK ((checkpoint_number = 0) = (checkpointed_at IS NULL)),
    ADD CHECK (checkpoint_sha256 IS NULL OR checkpoint_number > 0);
CREATE INDEX attempts_spot ON attempts (job_id) WHERE spot AND ended_at IS NULL;

CREATE TABLE claims (
    job_id uuid NOT NULL REFERENCES jobs,
    node_rank integer NOT NULL CHECK (node_rank >= 0),
    machine_id uuid NOT NULL,
    device_ids uuid[] NOT NULL,
    claimed_at timestamptz NOT NULL,
    PRIMARY KEY (job_id, node_rank)
);
