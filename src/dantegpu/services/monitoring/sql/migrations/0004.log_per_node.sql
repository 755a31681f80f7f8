-- Each node of a gang has a log of its own.
ALTER TABLE log_heads
    ADD COLUMN node_rank integer NOT NULL DEFAULT 0,
    DROP CONSTRAINT log_heads_job_id_epoch_key,
    ADD UNIQUE (job_id, epoch, node_rank);
