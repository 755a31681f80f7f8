-- name: make_heads
INSERT INTO log_heads (attempt_id, job_id, team_id, epoch, node_rank, updated_at)
SELECT *, %(now)s FROM unnest(%(attempt_ids)s::uuid[], %(job_ids)s::uuid[], %(team_ids)s::uuid[], %(epochs)s::bigint[],
    %(node_ranks)s::integer[]) AS new (attempt_id, job_id, team_id, epoch, node_rank)
ORDER BY attempt_id ON CONFLICT DO NOTHING;

-- name: lock_heads
SELECT * FROM log_heads WHERE attempt_id = ANY(%(attempt_ids)s) ORDER BY attempt_id FOR UPDATE;

-- name: save_heads
UPDATE log_heads SET size_bytes = new.size_bytes, tail_offset = new.tail_offset, complete = new.complete,
    truncated = new.truncated, updated_at = %(now)s
FROM unnest(%(attempt_ids)s::uuid[], %(sizes)s::bigint[], %(tails)s::bigint[], %(complete)s::boolean[],
            %(truncated)s::boolean[]) AS new (attempt_id, size_bytes, tail_offset, complete, truncated)
WHERE log_heads.attempt_id = new.attempt_id;

-- name: lengthen_chunks
UPDATE log_chunks SET data = log_chunks.data || new.data
FROM unnest(%(attempt_ids)s::uuid[], %(offsets)s::bigint[], %(data)s::bytea[]) AS new (attempt_id, start_offset, data)
WHERE log_chunks.attempt_id = new.attempt_id AND log_chunks.start_offset = new.start_offset;

-- name: insert_chunks
INSERT INTO log_chunks (attempt_id, start_offset, data)
SELECT * FROM unnest(%(attempt_ids)s::uuid[], %(offsets)s::bigint[], %(data)s::bytea[]);

-- name: head_of_job
SELECT * FROM log_heads
WHERE job_id = %(job_id)s AND node_rank = %(node_rank)s AND (%(epoch)s = 0 OR epoch = %(epoch)s)
ORDER BY epoch DESC LIMIT 1;

-- name: chunks_between
-- The chunk that `start` falls into, and those behind it that begin before `stop`.
SELECT start_offset, data FROM log_chunks
WHERE attempt_id = %(attempt_id)s AND start_offset < %(stop)s AND start_offset >= coalesce(
    (SELECT max(start_offset) FROM log_chunks WHERE attempt_id = %(attempt_id)s AND start_offset <= %(start)s), 0)
ORDER BY start_offset;

-- name: heads_to_archive
SELECT * FROM log_heads WHERE NOT archived AND complete AND updated_at <= %(before)s ORDER BY updated_at LIMIT %(limit)s;

-- name: silent_heads
SELECT * FROM log_heads WHERE NOT archived AND NOT complete AND updated_at <= %(before)s
ORDER BY updated_at LIMIT %(limit)s;

-- name: complete_heads
-- What was appended to since it was found silent is not silent.
UPDATE log_heads SET complete = true WHERE attempt_id = ANY(%(attempt_ids)s) AND updated_at <= %(before)s;

-- name: touch_heads
UPDATE log_heads SET updated_at = %(now)s WHERE attempt_id = ANY(%(attempt_ids)s);

-- name: mark_archived
UPDATE log_heads SET archived = true WHERE attempt_id = %(attempt_id)s AND NOT archived;

-- name: delete_chunks
DELETE FROM log_chunks WHERE attempt_id = %(attempt_id)s;

-- name: make_metric_heads
INSERT INTO metric_heads (attempt_id, job_id, team_id, epoch, node_rank, updated_at)
SELECT *, %(now)s FROM unnest(%(attempt_ids)s::uuid[], %(job_ids)s::uuid[], %(team_ids)s::uuid[], %(epochs)s::bigint[],
                              %(ranks)s::integer[]) AS new (attempt_id, job_id, team_id, epoch, node_rank)
ORDER BY attempt_id ON CONFLICT DO NOTHING;

-- name: lock_metric_heads
SELECT * FROM metric_heads WHERE attempt_id = ANY(%(attempt_ids)s) ORDER BY attempt_id FOR UPDATE;

-- name: add_metric_points
-- A point that came before changes nothing; the counts are of what was new.
WITH added AS (
    INSERT INTO metric_points (attempt_id, number, point)
    SELECT * FROM unnest(%(attempt_ids)s::uuid[], %(numbers)s::integer[], %(points)s::bytea[])
    ON CONFLICT DO NOTHING RETURNING attempt_id
), counted AS (
    SELECT attempt_id, count(*)::integer AS more FROM added GROUP BY attempt_id
)
UPDATE metric_heads SET points = points + more, updated_at = %(now)s FROM counted
WHERE metric_heads.attempt_id = counted.attempt_id;

-- name: thin_metrics
-- Series with too many points: twice the step, and what it does not hit goes.
WITH full_heads AS (
    SELECT attempt_id, step * 2 AS step FROM metric_heads
    WHERE attempt_id = ANY(%(attempt_ids)s) AND points > %(points_max)s
), gone AS (
    DELETE FROM metric_points USING full_heads
    WHERE metric_points.attempt_id = full_heads.attempt_id AND metric_points.number %% full_heads.step <> 0
    RETURNING metric_points.attempt_id
), counted AS (
    SELECT attempt_id, count(*)::integer AS fewer FROM gone GROUP BY attempt_id
)
UPDATE metric_heads SET step = full_heads.step, points = points - coalesce(counted.fewer, 0)
FROM full_heads LEFT JOIN counted USING (attempt_id)
WHERE metric_heads.attempt_id = full_heads.attempt_id;

-- name: metric_head_of_job
SELECT * FROM metric_heads
WHERE job_id = %(job_id)s AND node_rank = %(node_rank)s AND (%(epoch)s = 0 OR epoch = %(epoch)s)
ORDER BY epoch DESC LIMIT 1;

-- name: metric_points_after
SELECT number, point FROM metric_points WHERE attempt_id = %(attempt_id)s AND number > %(after)s ORDER BY number;

-- name: drop_old_metrics
DELETE FROM metric_heads WHERE attempt_id IN (
    SELECT attempt_id FROM metric_heads WHERE updated_at <= %(before)s ORDER BY updated_at LIMIT %(limit)s
);
