-- Machines that failed job after job: no new work for a while.
CREATE TABLE quarantines (
    machine_id uuid PRIMARY KEY,
    since timestamptz NOT NULL,
    until timestamptz NOT NULL,                -- or when it was released; what failed before does not count again
    reason text NOT NULL,
    times integer NOT NULL DEFAULT 1,          -- in a row: each one lasts twice as long
    released_by text NOT NULL DEFAULT '',
    CHECK (until >= since)
);
CREATE INDEX attempts_faults ON attempts (ended_at) WHERE outcome IN ('lost', 'provider_fault');
CREATE INDEX attempts_successes ON attempts (machine_id, ended_at) WHERE outcome = 'succeeded';
