-- Jobs that are submitted again and again.
CREATE TABLE schedules (
    id uuid PRIMARY KEY,
    team_id uuid NOT NULL,
    user_id uuid,
    spec bytea NOT NULL,                       -- dante.v1.JobSpec, with its schedule
    cron text NOT NULL,
    timezone text NOT NULL,
    created_at timestamptz NOT NULL,
    next_at timestamptz NOT NULL,
    stopped_at timestamptz,
    runs bigint NOT NULL DEFAULT 0,
    last_job_id uuid REFERENCES jobs
);
CREATE INDEX schedules_due ON schedules (next_at) WHERE stopped_at IS NULL;
CREATE INDEX schedules_team ON schedules (team_id, id DESC);

ALTER TABLE jobs ADD COLUMN schedule_id uuid REFERENCES schedules, ADD COLUMN due_at timestamptz;
-- One job for each time that is due, whoever submits it.
CREATE UNIQUE INDEX jobs_schedule ON jobs (schedule_id, due_at) WHERE schedule_id IS NOT NULL;
