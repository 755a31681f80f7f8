-- Jobs, their attempts, and the devices that live attempts hold.

CREATE TABLE jobs (
    id uuid PRIMARY KEY,
    team_id uuid NOT NULL,
    user_id uuid,
    spec bytea NOT NULL,                       -- dante.v1.JobSpec
    state text NOT NULL CHECK (state IN
        ('QUEUED', 'PLACED', 'STARTING', 'RUNNING', 'STOPPING', 'SUCCEEDED', 'FAILED', 'CANCELLED')),
    priority smallint NOT NULL CHECK (priority BETWEEN 0 AND 100),
    submitted_at timestamptz NOT NULL,
    traceparent text NOT NULL,
    epoch bigint NOT NULL DEFAULT 0,           -- of the latest attempt; the fencing token
    attempts_used integer NOT NULL DEFAULT 0,
    reason text,                               -- why it waits: QueueReason
    reason_detail text NOT NULL DEFAULT '',
    not_before timestamptz,
    attempt_id uuid,                           -- the live attempt
    machine_id uuid,
    report_seq bigint NOT NULL DEFAULT 0,
    placed_at timestamptz,
    running_at timestamptz,
    first_running_at timestamptz,
    stop_reason text,
    stop_by text NOT NULL DEFAULT '',
    avoided_machines uuid[] NOT NULL DEFAULT '{}',
    ended_at timestamptz,
    outcome text,
    exit_code integer,
    message text NOT NULL DEFAULT '',
    results_epoch bigint NOT NULL DEFAULT 0,   -- the fenced publication: whose results are the job's; 0 = none
    cost_udgpu bigint NOT NULL DEFAULT 0 CHECK (cost_udgpu >= 0),
    settled boolean NOT NULL DEFAULT false,
    event_seq bigint NOT NULL DEFAULT 0,
    -- Live exactly when an attempt holds devices, waiting exactly when there is a reason, over exactly with an end.
    CHECK ((state IN ('PLACED', 'STARTING', 'RUNNING', 'STOPPING')) = (attempt_id IS NOT NULL)),
    CHECK ((attempt_id IS NULL) = (machine_id IS NULL)),
    CHECK ((state = 'QUEUED') = (reason IS NOT NULL)),
    CHECK ((state IN ('SUCCEEDED', 'FAILED', 'CANCELLED')) = (ended_at IS NOT NULL))
);
CREATE INDEX jobs_queued ON jobs (submitted_at, id) WHERE state = 'QUEUED';
CREATE INDEX jobs_unsettled ON jobs (id) WHERE ended_at IS NOT NULL AND NOT settled;
CREATE INDEX jobs_team ON jobs (team_id, id DESC);

CREATE TABLE attempts (
    id uuid PRIMARY KEY,
    job_id uuid NOT NULL REFERENCES jobs,
    team_id uuid NOT NULL,
    epoch bigint NOT NULL CHECK (epoch > 0),
    machine_id uuid NOT NULL,
    provider_team_id uuid NOT NULL,
    simulated boolean NOT NULL,
    sandbox text NOT NULL,
    cpu_milli bigint NOT NULL CHECK (cpu_milli >= 0),
    memory_bytes bigint NOT NULL CHECK (memory_bytes >= 0),
    disk_bytes bigint NOT NULL CHECK (disk_bytes >= 0),
    rate_udgpu_per_hour bigint NOT NULL CHECK (rate_udgpu_per_hour >= 0),
    max_duration_seconds bigint NOT NULL CHECK (max_duration_seconds > 0),
    state text NOT NULL,
    stop_reason text,
    outcome text,
    exit_code integer,
    message text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL,
    running_at timestamptz,
    ended_at timestamptz,
    lease_renewed_at timestamptz NOT NULL,
    lease_expires_at timestamptz NOT NULL,
    results bytea NOT NULL DEFAULT '',         -- dante.v1.AttemptStatus with only `results`
    billed_seconds bigint NOT NULL DEFAULT 0 CHECK (billed_seconds >= 0),   -- as decided at its end
    windows_opened integer NOT NULL DEFAULT 1 CHECK (windows_opened > 0),
    windows_closed integer NOT NULL DEFAULT 0 CHECK (windows_closed BETWEEN 0 AND windows_opened),
    cost_udgpu bigint NOT NULL DEFAULT 0 CHECK (cost_udgpu >= 0),
    settled boolean NOT NULL DEFAULT false CHECK (NOT settled OR ended_at IS NOT NULL),
    UNIQUE (job_id, epoch)
);
-- I2: two live attempts of a job cannot exist.
CREATE UNIQUE INDEX attempts_one_live_per_job ON attempts (job_id) WHERE ended_at IS NULL;
CREATE INDEX attempts_live_by_machine ON attempts (machine_id) WHERE ended_at IS NULL;
CREATE INDEX attempts_unsettled ON attempts (ended_at) WHERE ended_at IS NOT NULL AND NOT settled;

-- What is leased of each device, in 1/1000; a device leased twice breaks the CHECK.
CREATE TABLE device_usage (
    device_id uuid PRIMARY KEY,
    leased_milli integer NOT NULL CHECK (leased_milli BETWEEN 0 AND 1000)
);
CREATE TABLE device_leases (
    attempt_id uuid NOT NULL REFERENCES attempts,
    device_id uuid NOT NULL,
    device_index integer NOT NULL,
    milli integer NOT NULL CHECK (milli BETWEEN 1 AND 1000),
    released boolean NOT NULL DEFAULT false,
    PRIMARY KEY (attempt_id, device_id)
);
CREATE INDEX device_leases_live ON device_leases (device_id) WHERE NOT released;

-- `desired_revision` rises with each change of what a machine shall run, so that an old message is known as old.
CREATE TABLE machines (
    machine_id uuid PRIMARY KEY,
    desired_revision bigint NOT NULL DEFAULT 0
);

CREATE TABLE job_events (
    job_id uuid NOT NULL REFERENCES jobs,
    seq bigint NOT NULL,
    state text NOT NULL,
    type text NOT NULL,
    message text NOT NULL,
    attempt_id uuid,
    occurred_at timestamptz NOT NULL,
    PRIMARY KEY (job_id, seq)
);
