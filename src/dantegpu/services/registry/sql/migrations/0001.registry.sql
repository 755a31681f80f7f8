-- Machines, what they have, and whether they are there.

-- Rises with each change that placement cares for, over all machines. Drawn while the machine's row is locked, so
-- that for one machine a later change has a higher number.
CREATE SEQUENCE machine_revision;

CREATE TABLE machines (
    id uuid PRIMARY KEY,
    team_id uuid NOT NULL,
    inventory bytea NOT NULL,                  -- dante.v1.Inventory, serialised deterministically, with device ids
    intent text NOT NULL DEFAULT 'active' CHECK (intent IN ('active', 'paused', 'draining', 'left')),
    liveness text NOT NULL DEFAULT 'unknown' CHECK (liveness IN ('online', 'unknown', 'offline')),
    joined_at timestamptz NOT NULL,
    last_heartbeat_at timestamptz,
    heard_at timestamptz NOT NULL,             -- the last sign of life: a heartbeat or the enrolment
    running_attempts integer NOT NULL DEFAULT 0 CHECK (running_attempts >= 0),
    cpu_utilisation double precision NOT NULL DEFAULT 0 CHECK (cpu_utilisation BETWEEN 0 AND 1),
    memory_used_bytes bigint NOT NULL DEFAULT 0 CHECK (memory_used_bytes >= 0),
    device_utilisation bytea NOT NULL DEFAULT '',  -- dante.v1.Machine with only `device_utilisation`
    revision bigint NOT NULL DEFAULT nextval('machine_revision')
) WITH (fillfactor = 50);                      -- heartbeats rewrite rows in place, without touching an index
CREATE INDEX machines_team ON machines (team_id, id);
