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
