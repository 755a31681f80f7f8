-- name: hold_jobs
-- In the transaction that inserts them. A plain job waits with a reason, an array without tasks.
WITH after AS (
    INSERT INTO job_after (job_id, after_id)
    SELECT * FROM unnest(%(job_ids)s::uuid[], %(after_ids)s::uuid[]) ON CONFLICT DO NOTHING
)
UPDATE jobs SET held = true,
    reason = CASE state WHEN 'QUEUED' THEN 'waiting_for_jobs' END,
    reason_detail = CASE state WHEN 'QUEUED' THEN %(detail)s ELSE '' END,
    not_before = CASE state WHEN 'QUEUED' THEN %(never)s::timestamptz END
WHERE id = ANY(%(job_ids)s)
RETURNING *;

-- name: set_deadlines
UPDATE jobs SET deadline_at = new.deadline_at
FROM unnest(%(job_ids)s::uuid[], %(deadlines)s::timestamptz[]) AS new (id, deadline_at)
WHERE jobs.id = new.id
RETURNING jobs.*;

-- name: held_and_due
-- Jobs all of whose predecessors have succeeded, or one of which never will.
SELECT h.id, h.array_size IS NOT NULL AS is_array, bool_and(a.state = 'SUCCEEDED') AS ready,
    (array_agg(a.id ORDER BY a.ended_at, a.id) FILTER (WHERE a.state IN ('FAILED', 'CANCELLED')))[1] AS failed_id
FROM jobs h JOIN job_after d ON d.job_id = h.id JOIN jobs a ON a.id = d.after_id
WHERE h.held AND h.ended_at IS NULL
GROUP BY h.id
HAVING bool_and(a.state = 'SUCCEEDED') OR bool_or(a.state IN ('FAILED', 'CANCELLED'))
ORDER BY h.id LIMIT %(limit)s;

-- name: release_jobs
UPDATE jobs SET held = false WHERE id = ANY(%(ids)s) AND held RETURNING *;

-- name: past_deadline
-- Tasks are stopped with their array.
SELECT jobs.* FROM jobs LEFT JOIN arrays a ON a.id = jobs.id
WHERE deadline_at <= %(now)s AND ended_at IS NULL AND array_id IS NULL
  AND coalesce(a.stop_reason, jobs.stop_reason, '') <> ALL(%(ending_reasons)s)
ORDER BY deadline_at LIMIT %(limit)s;
