-- name: insert_schedule
INSERT INTO schedules (id, team_id, user_id, spec, cron, timezone, created_at, next_at)
VALUES (%(id)s, %(team_id)s, %(user_id)s, %(spec)s, %(cron)s, %(timezone)s, %(now)s, %(next_at)s)
RETURNING *;

-- name: count_running
SELECT count(*) FROM schedules WHERE team_id = %(team_id)s AND stopped_at IS NULL;

-- name: list_schedules
SELECT * FROM schedules
WHERE team_id = %(team_id)s AND (%(before)s::uuid IS NULL OR id < %(before)s)
ORDER BY id DESC LIMIT %(limit)s;

-- name: schedules_by_id
SELECT * FROM schedules WHERE id = ANY(%(ids)s);

-- name: stop_schedules
UPDATE schedules SET stopped_at = %(now)s WHERE id = ANY(%(ids)s) AND stopped_at IS NULL;

-- name: due_schedules
SELECT * FROM schedules WHERE stopped_at IS NULL AND next_at <= %(now)s ORDER BY next_at, id LIMIT %(limit)s FOR UPDATE;

-- name: note_run
-- The job, and that its time is used up: both or neither.
WITH run AS (
    UPDATE schedules SET next_at = %(next_at)s, last_job_id = %(job_id)s, runs = runs + 1
    WHERE id = %(schedule_id)s AND next_at = %(due_at)s
    RETURNING id
)
UPDATE jobs SET schedule_id = run.id, due_at = %(due_at)s FROM run WHERE jobs.id = %(job_id)s;
