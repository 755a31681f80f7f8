-- Arrays: one row in `jobs` for the whole, and tasks that become rows of `jobs` in chunks, as their turn comes.

-- ARRAY is the whole's state while tasks may run: nothing that looks for jobs by state takes it for one.
ALTER TABLE jobs DROP CONSTRAINT jobs_state_check;
ALTER TABLE jobs ADD CONSTRAINT jobs_state_check CHECK (state IN
    ('QUEUED', 'PLACED', 'STARTING', 'RUNNING', 'STOPPING', 'SUCCEEDED', 'FAILED', 'CANCELLED', 'ARRAY'));
ALTER TABLE jobs
    ADD COLUMN array_size integer CHECK (array_size > 0),          -- of the whole; NULL for everything else
    ADD COLUMN array_id uuid REFERENCES jobs,                      -- of a task: its array
    ADD COLUMN array_index integer CHECK (array_index >= 0),
    ADD CHECK ((array_id IS NULL) = (array_index IS NULL)),
    ADD CHECK (array_size IS NULL OR (array_id IS NULL AND attempt_id IS NULL AND epoch = 0 AND reason IS NULL)),
    ADD CHECK (state <> 'ARRAY' OR array_size IS NOT NULL);
-- A task exists once, whoever creates it and however often.
CREATE UNIQUE INDEX jobs_task ON jobs (array_id, array_index) WHERE array_id IS NOT NULL;
CREATE INDEX jobs_task_state ON jobs (array_id, state) WHERE array_id IS NOT NULL;
-- Lists show an array as one line.
DROP INDEX jobs_team;
CREATE INDEX jobs_team ON jobs (team_id, id DESC) WHERE array_id IS NULL;
CREATE INDEX jobs_listed ON jobs (id DESC) WHERE array_id IS NULL;

CREATE TABLE arrays (
    id uuid PRIMARY KEY REFERENCES jobs,
    size integer NOT NULL CHECK (size > 0),
    max_parallel integer NOT NULL CHECK (max_parallel >= 0),       -- 0: no bound of its own
    task_spec bytea NOT NULL,                                      -- dante.v1.JobSpec without what the tasks differ in
    created integer NOT NULL DEFAULT 0 CHECK (created BETWEEN 0 AND size),   -- tasks 0..created-1 have their rows
    shown_state text NOT NULL DEFAULT 'QUEUED' CHECK (shown_state IN ('QUEUED', 'RUNNING', 'STOPPING')),
    stop_reason text,                                              -- no task is created or placed any more
    stop_by text NOT NULL DEFAULT '',
    -- Of an array that has ended and is settled: nothing is left to do or to count.
    done boolean NOT NULL DEFAULT false,
    succeeded integer NOT NULL DEFAULT 0,
    failed integer NOT NULL DEFAULT 0,
    cancelled integer NOT NULL DEFAULT 0,
    CHECK (NOT done OR succeeded + failed + cancelled = size)
);
CREATE INDEX arrays_open ON arrays (id) WHERE NOT done;

-- Under whose id an attempt is paid for: that of the array, for its tasks.
ALTER TABLE attempts ADD COLUMN array_id uuid;
