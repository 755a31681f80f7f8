-- A job with several nodes is a gang: one attempt per (job, epoch, node rank), all opened by one statement.
ALTER TABLE attempts
    ADD COLUMN node_rank integer NOT NULL DEFAULT 0,
    ADD COLUMN nodes integer NOT NULL DEFAULT 1,               -- of the gang; 1 = no gang
    ADD COLUMN report_seq bigint NOT NULL DEFAULT 0,           -- of a gang's node: its last report that was folded
    ADD CHECK (node_rank >= 0 AND node_rank < nodes),
    DROP CONSTRAINT attempts_job_id_epoch_key,
    ADD UNIQUE (job_id, epoch, node_rank);

-- I2: two live attempts of a node cannot exist.
DROP INDEX attempts_one_live_per_job;
CREATE UNIQUE INDEX attempts_one_live_per_node ON attempts (job_id, node_rank) WHERE ended_at IS NULL;
-- The nodes of a gang are on machines of their own.
CREATE UNIQUE INDEX attempts_one_live_per_machine ON attempts (job_id, machine_id) WHERE ended_at IS NULL AND nodes > 1;

-- A gang is placed whole or not at all. The trigger fires after the statement, when all of its rows are there, and
-- never for a job with one node.
CREATE FUNCTION attempts_gang_is_whole() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT count(*) FROM attempts WHERE job_id = NEW.job_id AND epoch = NEW.epoch AND nodes = NEW.nodes) <> NEW.nodes
        OR EXISTS (SELECT FROM attempts WHERE job_id = NEW.job_id AND epoch <> NEW.epoch AND ended_at IS NULL)
    THEN
        RAISE EXCEPTION 'job % has % nodes; all of an epoch are placed at once, or none', NEW.job_id, NEW.nodes
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER attempts_gang_is_whole AFTER INSERT ON attempts
    FOR EACH ROW WHEN (NEW.nodes > 1) EXECUTE FUNCTION attempts_gang_is_whole();
