-- name: insert_arrays
WITH new AS (
    SELECT * FROM unnest(%(ids)s::uuid[], %(specs)s::bytea[], %(priorities)s::smallint[], %(sizes)s::integer[],
        %(max_parallels)s::integer[], %(task_specs)s::bytea[])
        AS new (id, spec, priority, size, max_parallel, task_spec)
), inserted AS (
    INSERT INTO jobs (id, team_id, user_id, spec, state, priority, submitted_at, traceparent, event_seq, array_size)
    SELECT id, %(team_id)s, %(user_id)s, spec, 'ARRAY', priority, %(submitted_at)s, %(traceparent)s, 1, size FROM new
    RETURNING *
), whole AS (
    INSERT INTO arrays (id, size, max_parallel, task_spec) SELECT id, size, max_parallel, task_spec FROM new
), told AS (
    INSERT INTO job_events (job_id, seq, state, type, message, occurred_at)
    SELECT id, 1, 'QUEUED', 'submitted', format('an array of %%s tasks', array_size), submitted_at FROM inserted
)
SELECT * FROM inserted;

-- name: create_tasks
-- The next tasks of an array, if they still are the next ones: whoever is late, or comes after a stop, creates none.
WITH whole AS (
    UPDATE arrays SET created = created + cardinality(%(ids)s::uuid[])
    WHERE id = %(array_id)s AND created = %(first)s AND stop_reason IS NULL
    RETURNING id, task_spec
), told AS (
    -- They are alike: what the last one heard, if that was never placed, they need not be told one by one.
    SELECT t.reason, t.reason_detail FROM jobs t
    WHERE t.array_id = %(array_id)s AND t.array_index = %(first)s - 1 AND t.state = 'QUEUED' AND t.epoch = 0
), inserted AS (
    INSERT INTO jobs (id, team_id, user_id, spec, state, priority, submitted_at, traceparent, reason, event_seq,
        reason_detail, deadline_at, array_id, array_index)
    SELECT new.id, j.team_id, j.user_id, whole.task_spec || new.environment, 'QUEUED', j.priority, j.submitted_at,
        j.traceparent, coalesce((SELECT reason FROM told), 'new'), 1, coalesce((SELECT reason_detail FROM told), ''),
        j.deadline_at, j.id, %(first)s + new.place - 1
    FROM whole JOIN jobs j ON j.id = whole.id
    CROSS JOIN unnest(%(ids)s::uuid[], %(environments)s::bytea[]) WITH ORDINALITY AS new (id, environment, place)
    RETURNING *
), noted AS (
    INSERT INTO job_events (job_id, seq, state, type, message, occurred_at)
    SELECT id, event_seq, state, 'submitted', '', %(now)s FROM inserted
)
SELECT * FROM inserted ORDER BY array_index;

-- name: open_arrays
SELECT a.id, a.size, a.max_parallel, a.created, a.shown_state, a.stop_reason, a.stop_by,
    j.spec, j.ended_at IS NOT NULL AS ended, tasks.waiting, tasks.live
FROM arrays a JOIN jobs j ON j.id = a.id CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE t.state = 'QUEUED') AS waiting, count(*) FILTER (WHERE t.state <> 'QUEUED') AS live
    FROM jobs t
    WHERE t.array_id = a.id AND t.state IN ('QUEUED', 'PLACED', 'STARTING', 'RUNNING', 'STOPPING')
) AS tasks
WHERE NOT a.done AND (NOT j.held OR a.stop_reason IS NOT NULL) ORDER BY a.id LIMIT %(limit)s;

-- name: array_progress
-- What is done is counted once and for all.
SELECT a.id, a.size, a.max_parallel, a.created, a.shown_state, tasks.reason, tasks.queued, tasks.placed, tasks.starting,
    tasks.running, tasks.stopping, a.succeeded + tasks.succeeded AS succeeded, a.failed + tasks.failed AS failed,
    a.cancelled + tasks.cancelled AS cancelled, tasks.cost_udgpu
FROM arrays a CROSS JOIN LATERAL (
    SELECT mode() WITHIN GROUP (ORDER BY reason) FILTER (WHERE state = 'QUEUED') AS reason,
        count(*) FILTER (WHERE state = 'QUEUED') AS queued, count(*) FILTER (WHERE state = 'PLACED') AS placed,
        count(*) FILTER (WHERE state = 'STARTING') AS starting, count(*) FILTER (WHERE state = 'RUNNING') AS running,
        count(*) FILTER (WHERE state = 'STOPPING') AS stopping,
        count(*) FILTER (WHERE state = 'SUCCEEDED') AS succeeded, count(*) FILTER (WHERE state = 'FAILED') AS failed,
        count(*) FILTER (WHERE state = 'CANCELLED') AS cancelled, coalesce(sum(cost_udgpu), 0)::bigint AS cost_udgpu
    FROM jobs t WHERE t.array_id = a.id AND NOT a.done
) AS tasks
WHERE a.id = ANY(%(ids)s);

-- name: tasks_settled
SELECT count(*) FILTER (WHERE state = 'SUCCEEDED') AS succeeded, count(*) FILTER (WHERE state = 'FAILED') AS failed,
    coalesce(sum(cost_udgpu), 0)::bigint AS cost_udgpu, coalesce(bool_and(settled), true) AS settled
FROM jobs WHERE array_id = %(array_id)s;

-- name: tasks_from
SELECT * FROM jobs
WHERE array_id = %(array_id)s AND array_index >= %(first)s
  AND (%(states)s::text[] IS NULL OR state = ANY(%(states)s))
ORDER BY array_index LIMIT %(limit)s;

-- name: tasks_by_index
SELECT * FROM jobs WHERE (array_id, array_index) IN (SELECT * FROM unnest(%(array_ids)s::uuid[], %(indexes)s::integer[]));

-- name: first_waiting_task
SELECT * FROM jobs WHERE array_id = %(array_id)s AND state = 'QUEUED' ORDER BY array_index LIMIT 1;

-- name: begin_array
WITH shown AS (
    UPDATE arrays SET shown_state = 'RUNNING' WHERE id = %(array_id)s AND shown_state = 'QUEUED' RETURNING id
), begun AS (
    UPDATE jobs SET first_running_at = %(now)s, event_seq = event_seq + 1 FROM shown
    WHERE jobs.id = shown.id AND state = 'ARRAY'
    RETURNING jobs.id, jobs.event_seq
)
INSERT INTO job_events (job_id, seq, state, type, message, occurred_at)
SELECT id, event_seq, 'RUNNING', 'running', 'the first task was placed', %(now)s FROM begun
RETURNING job_id, seq, state, type, message, attempt_id, occurred_at;

-- name: stop_array
-- From here on no task is created.
WITH stopping AS (
    UPDATE arrays SET shown_state = 'STOPPING', stop_reason = %(stop_reason)s, stop_by = %(stop_by)s
    FROM jobs WHERE arrays.id = %(array_id)s AND jobs.id = arrays.id AND jobs.state = 'ARRAY'
      AND arrays.stop_reason IS NULL
    RETURNING arrays.id
), told AS (
    UPDATE jobs SET event_seq = event_seq + 1 FROM stopping WHERE jobs.id = stopping.id
    RETURNING jobs.id, jobs.event_seq
)
INSERT INTO job_events (job_id, seq, state, type, message, occurred_at)
SELECT id, event_seq, 'STOPPING', 'stop_requested', %(message)s, %(now)s FROM told
RETURNING job_id, seq, state, type, message, attempt_id, occurred_at;

-- name: stop_tasks
-- What the transition table makes of StopRequested, for all tasks of an array at once: those that wait end, those that
-- hold devices are asked to end, and a stop that ends the job outranks a preemption under way.
WITH mine AS (
    SELECT id, state FROM jobs
    WHERE array_id = %(array_id)s
      AND (state IN ('QUEUED', 'PLACED', 'STARTING', 'RUNNING')
           OR state = 'STOPPING' AND stop_reason <> ALL(%(ending_reasons)s))
    ORDER BY id FOR UPDATE
), stopped AS (
    UPDATE jobs SET
        state = CASE mine.state WHEN 'QUEUED' THEN %(end_state)s ELSE 'STOPPING' END,
        stop_reason = %(stop_reason)s, stop_by = %(stop_by)s, reason = NULL, reason_detail = '', not_before = NULL,
        ended_at = CASE mine.state WHEN 'QUEUED' THEN %(now)s END,
        outcome = CASE mine.state WHEN 'QUEUED' THEN %(outcome)s END,
        -- Nothing was ever opened for it, so there is nothing to settle.
        settled = mine.state = 'QUEUED' AND epoch = 0,
        event_seq = event_seq + CASE mine.state WHEN 'STOPPING' THEN 0 ELSE 1 END
    FROM mine WHERE jobs.id = mine.id
    RETURNING jobs.id, jobs.state, mine.state AS before, jobs.event_seq, jobs.attempt_id
), told AS (
    INSERT INTO job_events (job_id, seq, state, type, message, attempt_id, occurred_at)
    SELECT id, event_seq, state, CASE before WHEN 'QUEUED' THEN 'ended' ELSE 'stop_requested' END,
        CASE before WHEN 'QUEUED' THEN %(outcome)s ELSE %(message)s END, attempt_id, %(now)s
    FROM stopped WHERE before <> 'STOPPING'
), asked AS (
    UPDATE attempts SET state = 'STOPPING', stop_reason = %(stop_reason)s,
        stop_requested_at = coalesce(stop_requested_at, %(now)s)
    FROM stopped WHERE attempts.job_id = stopped.id AND attempts.ended_at IS NULL AND before <> 'STOPPING'
    RETURNING machine_id
)
SELECT (SELECT count(*) FROM stopped) AS tasks, array(SELECT DISTINCT machine_id FROM asked) AS machine_ids;

-- name: end_array
WITH ended AS (
    UPDATE jobs SET state = %(state)s, outcome = %(outcome)s, message = %(message)s, ended_at = %(now)s,
        stop_reason = %(stop_reason)s, stop_by = %(stop_by)s, event_seq = event_seq + 1
    WHERE id = %(array_id)s AND state = 'ARRAY' RETURNING *
)
INSERT INTO job_events (job_id, seq, state, type, message, occurred_at)
SELECT id, event_seq, state, 'ended', outcome || ': ' || message, %(now)s FROM ended
RETURNING job_id, seq, state, type, message, attempt_id, occurred_at;

-- name: settle_array
WITH finished AS (
    UPDATE arrays SET done = true, succeeded = %(succeeded)s, failed = %(failed)s, cancelled = %(cancelled)s
    WHERE id = %(array_id)s AND NOT done RETURNING id
), settled AS (
    UPDATE jobs SET settled = true, cost_udgpu = %(cost_udgpu)s, event_seq = event_seq + 1
    FROM finished WHERE jobs.id = finished.id RETURNING jobs.*
)
INSERT INTO job_events (job_id, seq, state, type, message, occurred_at)
SELECT id, event_seq, state, 'settled', %(message)s, %(now)s FROM settled
RETURNING job_id, seq, state, type, message, attempt_id, occurred_at;
