-- When a job may begin, and until when it may go on.
ALTER TABLE jobs
    ADD COLUMN held boolean NOT NULL DEFAULT false,      -- waits for other jobs: nothing places it, or creates its tasks
    ADD COLUMN deadline_at timestamptz;
CREATE INDEX jobs_held ON jobs (id) WHERE held AND ended_at IS NULL;
CREATE INDEX jobs_deadline ON jobs (deadline_at) WHERE deadline_at IS NOT NULL AND ended_at IS NULL AND array_id IS NULL;

CREATE TABLE job_after (
    job_id uuid NOT NULL REFERENCES jobs,
    after_id uuid NOT NULL REFERENCES jobs CHECK (after_id <> job_id),
    PRIMARY KEY (job_id, after_id)
);
