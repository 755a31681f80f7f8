-- name: insert_jobs
WITH inserted AS (
    INSERT INTO jobs (id, team_id, user_id, spec, state, priority, submitted_at, traceparent, reason, event_seq)
    SELECT id, %(team_id)s, %(user_id)s, spec, 'QUEUED', priority, %(submitted_at)s, %(traceparent)s, 'new', 1
    FROM unnest(%(ids)s::uuid[], %(specs)s::bytea[], %(priorities)s::smallint[]) AS new (id, spec, priority)
    RETURNING id, state, submitted_at, event_seq
)
INSERT INTO job_events (job_id, seq, state, type, message, occurred_at)
SELECT id, event_seq, state, 'submitted', '', submitted_at FROM inserted;

-- name: jobs_by_id
SELECT * FROM jobs WHERE id = ANY(%(ids)s);

-- name: lock_jobs
SELECT * FROM jobs WHERE id = ANY(%(ids)s) ORDER BY id FOR UPDATE;

-- name: lock_job_ids
SELECT id FROM jobs WHERE id = ANY(%(ids)s) ORDER BY id FOR UPDATE;

-- name: list_jobs
-- Jobs and arrays; the tasks of an array are a list of their own.
SELECT * FROM jobs
WHERE (%(team_id)s::uuid IS NULL OR team_id = %(team_id)s) AND array_id IS NULL
  AND (%(before)s::uuid IS NULL OR id < %(before)s)
  AND (%(states)s::text[] IS NULL OR state = ANY(%(states)s)
       OR state = 'ARRAY' AND (SELECT shown_state FROM arrays a WHERE a.id = jobs.id) = ANY(%(states)s))
ORDER BY id DESC LIMIT %(limit)s;

-- name: queued_jobs
SELECT * FROM jobs WHERE state = 'QUEUED' AND (submitted_at, id) > (%(after_time)s, %(after_id)s)
ORDER BY submitted_at, id LIMIT %(limit)s;

-- name: queued_ids
SELECT id FROM jobs WHERE state = 'QUEUED' AND id > %(after_id)s ORDER BY id LIMIT %(limit)s;

-- name: save_jobs
UPDATE jobs SET
    state = new.state, epoch = new.epoch, attempts_used = new.attempts_used, reason = new.reason,
    reason_detail = new.reason_detail, not_before = new.not_before, attempt_id = new.attempt_id,
    machine_id = new.machine_id, report_seq = new.report_seq, placed_at = new.placed_at, running_at = new.running_at,
    first_running_at = new.first_running_at, stop_reason = new.stop_reason, stop_by = new.stop_by,
    avoided_machines = new.avoided_machines, ended_at = new.ended_at, outcome = new.outcome,
    exit_code = new.exit_code, message = new.message, results_epoch = new.results_epoch, event_seq = new.event_seq
FROM jsonb_to_recordset(%(rows)s) AS new (
    id uuid, state text, epoch bigint, attempts_used integer, reason text, reason_detail text, not_before timestamptz,
    attempt_id uuid, machine_id uuid, report_seq bigint, placed_at timestamptz, running_at timestamptz,
    first_running_at timestamptz, stop_reason text, stop_by text, avoided_machines uuid[], ended_at timestamptz,
    outcome text, exit_code integer, message text, results_epoch bigint, event_seq bigint)
WHERE jobs.id = new.id;

-- name: insert_events
INSERT INTO job_events (job_id, seq, state, type, message, attempt_id, occurred_at)
SELECT job_id, seq, state, type, message, attempt_id, occurred_at
FROM jsonb_to_recordset(%(rows)s) AS new (
    job_id uuid, seq bigint, state text, type text, message text, attempt_id uuid, occurred_at timestamptz);

-- name: events_after
SELECT job_id, seq, state, type, message, attempt_id, occurred_at FROM job_events
WHERE job_id = %(job_id)s AND seq > %(after)s ORDER BY seq LIMIT %(limit)s;

-- name: insert_attempts
INSERT INTO attempts (id, job_id, team_id, epoch, machine_id, provider_team_id, simulated, sandbox, cpu_milli,
    memory_bytes, disk_bytes, rate_udgpu_per_hour, max_duration_seconds, array_id, node_rank, nodes, spot, saves, state,
    created_at, lease_renewed_at, lease_expires_at)
SELECT id, job_id, team_id, epoch, machine_id, provider_team_id, simulated, sandbox, cpu_milli, memory_bytes,
    disk_bytes, rate_udgpu_per_hour, max_duration_seconds, array_id, node_rank, nodes, coalesce(spot, false),
    coalesce(saves, false), 'PLACED', %(now)s, %(now)s, %(now)s + make_interval(secs => %(lease_seconds)s)
FROM jsonb_to_recordset(%(rows)s) AS new (
    id uuid, job_id uuid, team_id uuid, epoch bigint, machine_id uuid, provider_team_id uuid, simulated boolean,
    sandbox text, cpu_milli bigint, memory_bytes bigint, disk_bytes bigint, rate_udgpu_per_hour bigint,
    max_duration_seconds bigint, array_id uuid, node_rank integer, nodes integer, spot boolean, saves boolean);

-- name: lease_devices
WITH leased AS (
    INSERT INTO device_leases (attempt_id, device_id, device_index, milli)
    SELECT attempt_id, device_id, device_index, milli FROM jsonb_to_recordset(%(rows)s)
        AS new (attempt_id uuid, device_id uuid, device_index integer, milli integer)
    RETURNING device_id, milli
)
INSERT INTO device_usage AS usage (device_id, leased_milli)
SELECT device_id, sum(milli) FROM leased GROUP BY device_id ORDER BY device_id
ON CONFLICT (device_id) DO UPDATE SET leased_milli = usage.leased_milli + excluded.leased_milli;

-- name: release_devices
WITH released AS (
    UPDATE device_leases SET released = true WHERE attempt_id = ANY(%(attempt_ids)s) AND NOT released
    RETURNING device_id, milli
), freed AS (
    SELECT device_id, sum(milli) AS milli FROM released GROUP BY device_id
), locked AS (
    -- In id order, like everybody: two releases that share devices would wait for one another.
    SELECT device_id FROM device_usage WHERE device_id IN (SELECT device_id FROM freed) ORDER BY device_id FOR UPDATE
)
UPDATE device_usage SET leased_milli = leased_milli - freed.milli FROM freed JOIN locked USING (device_id)
WHERE device_usage.device_id = freed.device_id;

-- name: save_attempts
-- NULL leaves what is there; an ended attempt never changes again.
UPDATE attempts SET
    state = new.state, stop_reason = coalesce(new.stop_reason, attempts.stop_reason), outcome = new.outcome,
    stop_requested_at = coalesce(attempts.stop_requested_at, new.stop_requested_at),
    exit_code = new.exit_code, message = coalesce(new.message, attempts.message),
    running_at = coalesce(attempts.running_at, new.running_at), ended_at = new.ended_at,
    results = coalesce(decode(new.results, 'hex'), attempts.results),
    billed_seconds = coalesce(new.billed_seconds, 0), sandbox = coalesce(new.sandbox, attempts.sandbox),
    report_seq = coalesce(new.report_seq, attempts.report_seq), silent = coalesce(new.silent, false)
FROM jsonb_to_recordset(%(rows)s) AS new (
    id uuid, state text, stop_reason text, outcome text, exit_code integer, message text, running_at timestamptz,
    ended_at timestamptz, results text, billed_seconds bigint, sandbox text, stop_requested_at timestamptz,
    report_seq bigint, silent boolean)
WHERE attempts.id = new.id AND attempts.ended_at IS NULL;

-- name: save_ports
-- Before the ends of attempts are written: an ended one changes no more.
UPDATE attempts SET ports = decode(new.ports, 'hex') FROM jsonb_to_recordset(%(rows)s) AS new (id uuid, ports text)
WHERE attempts.id = new.id AND attempts.ended_at IS NULL;

-- name: attempts_by_id
SELECT * FROM attempts WHERE id = ANY(%(ids)s);

-- name: lock_attempts
SELECT * FROM attempts WHERE id = ANY(%(ids)s) ORDER BY id FOR UPDATE;

-- name: attempts_of_jobs
SELECT * FROM attempts WHERE job_id = ANY(%(job_ids)s) ORDER BY job_id, epoch, node_rank;

-- name: gang_nodes
-- Of the live epoch, nodes that have ended included.
SELECT a.* FROM attempts a JOIN jobs j ON j.id = a.job_id AND j.epoch = a.epoch
WHERE j.id = ANY(%(job_ids)s) ORDER BY a.job_id, a.node_rank;

-- name: leases_of_attempts
SELECT attempt_id, device_id, device_index, milli FROM device_leases WHERE attempt_id = ANY(%(attempt_ids)s)
ORDER BY attempt_id, device_index;

-- name: renew_leases
-- A lease that has run out is never renewed: its attempt may already be somebody else's (I6). Neither is that of an
-- attempt that was told to end long ago: a machine that does not obey must not hold and bill it for ever.
UPDATE attempts SET lease_renewed_at = %(now)s, lease_expires_at = %(now)s + make_interval(secs => %(lease_seconds)s)
WHERE id IN (
    SELECT id FROM attempts
    WHERE machine_id = %(machine_id)s AND ended_at IS NULL AND lease_expires_at > %(now)s
      AND (stop_requested_at IS NULL
           OR stop_requested_at + make_interval(secs => %(stop_timeout_seconds)s) > %(now)s)
      AND (id, epoch) IN (SELECT * FROM unnest(%(ids)s::uuid[], %(epochs)s::bigint[]))
    ORDER BY id FOR UPDATE
);

-- name: out_of_lease
SELECT id FROM attempts WHERE id = ANY(%(ids)s) AND lease_expires_at <= %(now)s;

-- name: report_positions
SELECT attempt_id AS id, report_seq FROM jobs WHERE id = ANY(%(job_ids)s) AND machine_id = %(machine_id)s
UNION ALL
-- A gang's nodes count their reports for themselves; its job stays at 0.
SELECT id, report_seq FROM attempts
WHERE job_id = ANY(%(job_ids)s) AND machine_id = %(machine_id)s AND ended_at IS NULL AND nodes > 1;

-- name: desired_attempts
SELECT a.id, a.job_id, a.team_id, a.epoch, a.machine_id, a.stop_reason, a.lease_expires_at, j.spec, j.traceparent,
    a.node_rank, j.attempt_id AS first_attempt_id, CASE WHEN a.nodes > 1 THEN ARRAY(
        SELECT node.machine_id FROM attempts node WHERE node.job_id = a.job_id AND node.epoch = a.epoch
        ORDER BY node.node_rank) ELSE '{}' END AS node_machines
FROM attempts a JOIN jobs j ON j.id = a.job_id
WHERE a.machine_id = ANY(%(machine_ids)s) AND a.ended_at IS NULL AND a.lease_expires_at > %(now)s
ORDER BY a.id;

-- name: bump_machines
INSERT INTO machines AS m (machine_id, desired_revision)
SELECT id, 1 FROM unnest(%(machine_ids)s::uuid[]) AS ids (id) ORDER BY id
ON CONFLICT (machine_id) DO UPDATE SET desired_revision = m.desired_revision + 1
RETURNING machine_id, desired_revision;

-- name: machine_revisions
SELECT machine_id, desired_revision FROM machines WHERE machine_id = ANY(%(machine_ids)s);

-- name: live_leases
SELECT a.id AS attempt_id, a.machine_id, a.team_id, a.cpu_milli, a.memory_bytes, a.disk_bytes, a.running_at,
    a.max_duration_seconds, a.stop_requested_at IS NOT NULL AS stopping,
    coalesce(array_agg(l.device_id ORDER BY l.device_index) FILTER (WHERE l.device_id IS NOT NULL), '{}') AS device_ids,
    coalesce(array_agg(l.milli ORDER BY l.device_index) FILTER (WHERE l.device_id IS NOT NULL), '{}') AS millis
FROM attempts a LEFT JOIN device_leases l ON l.attempt_id = a.id
WHERE a.ended_at IS NULL GROUP BY a.id;

-- name: past_use
-- What each team held on average, where a half-life ago counts half: an attempt counts by the part of that average which
-- its time is. Of those that ended the latest, as the oldest count least.
WITH weighed AS (
    SELECT id, team_id, cpu_milli, memory_bytes,
        -- 0.5 ^ 1000 is as good as nothing, and what is smaller would be an error.
        power(0.5::float8, least(1000, greatest(0, extract(epoch FROM %(now)s - coalesce(ended_at, %(now)s))::float8
            / %(half_life_seconds)s)))
        - power(0.5::float8, least(1000, greatest(0, extract(epoch FROM %(now)s - created_at)::float8
            / %(half_life_seconds)s))) AS weight
    FROM attempts WHERE ended_at IS NULL OR ended_at > %(since)s
    ORDER BY ended_at DESC NULLS FIRST LIMIT %(limit)s
)
SELECT team_id, sum(gpu_milli)::float8 AS gpu_milli, sum(cpu_milli)::float8 AS cpu_milli,
    sum(memory_bytes)::float8 AS memory_bytes
FROM (
    SELECT team_id, 0 AS gpu_milli, weight * cpu_milli AS cpu_milli, weight * memory_bytes AS memory_bytes FROM weighed
    UNION ALL
    SELECT w.team_id, w.weight * l.milli, 0, 0 FROM weighed w JOIN device_leases l ON l.attempt_id = w.id
) AS parts
GROUP BY team_id;

-- name: due_attempts
-- Live attempts whose lease is over for good (lost), or that ran longer than they may and were not told to stop.
SELECT * FROM (
    SELECT job_id, id AS attempt_id, lease_renewed_at,
        lease_expires_at + make_interval(secs => %(lease_grace_seconds)s) <= %(now)s AS lost,
        stop_reason IS NULL AND coalesce(
            running_at + make_interval(secs => max_duration_seconds + %(stop_grace_seconds)s) <= %(now)s, false
        ) AS overdue
    FROM attempts WHERE ended_at IS NULL
) AS live
WHERE lost OR overdue ORDER BY job_id LIMIT %(limit)s;

-- name: unsettled_attempts
SELECT id, job_id, billed_seconds, windows_opened, windows_closed FROM attempts
WHERE ended_at IS NOT NULL AND NOT settled ORDER BY ended_at LIMIT %(limit)s;

-- name: attempts_needing_window
SELECT * FROM attempts
WHERE ended_at IS NULL AND running_at IS NOT NULL
  AND running_at + make_interval(secs => windows_opened * %(window_seconds)s - %(ahead_seconds)s) <= %(now)s
  AND windows_opened * %(window_seconds)s < max_duration_seconds
ORDER BY id LIMIT %(limit)s;

-- name: attempts_with_full_windows
-- Full by what the machine has acknowledged: when it falls silent, nothing after its last renewal is billed (I3).
SELECT * FROM attempts
WHERE ended_at IS NULL AND running_at IS NOT NULL AND windows_closed < windows_opened
  AND running_at + make_interval(secs => (windows_closed + 1) * %(window_seconds)s) <= lease_renewed_at
ORDER BY id LIMIT %(limit)s;

-- name: open_windows
UPDATE attempts SET windows_opened = new.windows_opened
FROM unnest(%(ids)s::uuid[], %(windows_opened)s::integer[]) AS new (id, windows_opened)
WHERE attempts.id = new.id AND attempts.windows_opened < new.windows_opened;

-- name: close_windows
-- Cost and closed windows move together, and only forward: the same answer folded twice changes nothing.
WITH charged AS (
    UPDATE attempts SET windows_closed = new.windows_closed, cost_udgpu = attempts.cost_udgpu + new.cost_udgpu,
        settled = new.settled
    FROM jsonb_to_recordset(%(rows)s) AS new (
        id uuid, closed_before integer, windows_closed integer, cost_udgpu bigint, settled boolean)
    WHERE attempts.id = new.id AND attempts.windows_closed = new.closed_before AND NOT attempts.settled
    RETURNING attempts.job_id, new.cost_udgpu
), per_job AS (
    SELECT job_id, sum(cost_udgpu)::bigint AS cost_udgpu FROM charged GROUP BY job_id ORDER BY job_id
)
UPDATE jobs SET cost_udgpu = jobs.cost_udgpu + per_job.cost_udgpu FROM per_job WHERE jobs.id = per_job.job_id;

-- name: jobs_to_mark_settled
SELECT j.id, j.team_id, j.state, j.event_seq, j.cost_udgpu FROM jobs j
WHERE j.ended_at IS NOT NULL AND NOT j.settled AND j.array_size IS NULL
  AND (%(ids)s::uuid[] IS NULL OR j.id = ANY(%(ids)s))
  AND NOT EXISTS (SELECT 1 FROM attempts a WHERE a.job_id = j.id AND NOT a.settled)
ORDER BY j.id LIMIT %(limit)s FOR UPDATE OF j;

-- name: mark_jobs_settled
UPDATE jobs SET settled = true, event_seq = event_seq + 1 WHERE id = ANY(%(job_ids)s);

-- name: attempts_to_settle
SELECT id FROM attempts WHERE id = ANY(%(ids)s) AND NOT settled;

-- name: resolve_attempts
SELECT id, job_id, team_id, machine_id, epoch, node_rank, ended_at IS NULL AS live FROM attempts WHERE id = ANY(%(ids)s);
