-- name: spot_attempts
-- What runs and may be told to give way, job by job.
SELECT a.id AS attempt_id, a.job_id, a.team_id, a.epoch, j.priority, a.saves,
    coalesce(a.checkpointed_at, a.running_at, a.created_at) AS saved_at, coalesce(a.running_at, a.created_at) AS began_at
FROM attempts a JOIN jobs j ON j.id = a.job_id
WHERE a.spot AND a.ended_at IS NULL AND a.stop_requested_at IS NULL
ORDER BY a.job_id, a.node_rank LIMIT %(limit)s;

-- name: claims
SELECT job_id, node_rank, machine_id, device_ids FROM claims ORDER BY claimed_at, job_id, node_rank;

-- name: insert_claims
INSERT INTO claims (job_id, node_rank, machine_id, device_ids, claimed_at)
SELECT job_id, node_rank, machine_id, device_ids, %(now)s
FROM jsonb_to_recordset(%(rows)s) AS new (job_id uuid, node_rank integer, machine_id uuid, device_ids uuid[]);

-- name: delete_claims
DELETE FROM claims WHERE job_id = ANY(%(job_ids)s);

-- name: save_checkpoints
-- Of a live attempt only, and only forward: what is told again changes nothing.
UPDATE attempts SET
    checkpoint_number = new.checkpoint_number, checkpoint_sha256 = new.checkpoint_sha256,
    checkpoint_size_bytes = new.checkpoint_size_bytes, checkpoint_slot = new.checkpoint_slot, checkpointed_at = %(now)s
FROM jsonb_to_recordset(%(rows)s) AS new (
    id uuid, checkpoint_number bigint, checkpoint_sha256 text, checkpoint_size_bytes bigint, checkpoint_slot integer)
WHERE attempts.id = new.id AND attempts.ended_at IS NULL AND attempts.checkpoint_number < new.checkpoint_number;

-- name: checkpoints_before
-- What these attempts begin with: the last epoch before them of which every node has told what it saved. A node that had
-- nothing to save gets what node 0 saved.
SELECT a.id AS attempt_id, c.job_id, c.epoch, c.node_rank, c.checkpoint_sha256 AS sha256,
    c.checkpoint_size_bytes AS size_bytes, c.checkpoint_slot AS slot
FROM attempts a
CROSS JOIN LATERAL (
    SELECT e.epoch FROM attempts e WHERE e.job_id = a.job_id AND e.epoch < a.epoch GROUP BY e.epoch
    HAVING bool_and(e.checkpoint_number > 0) AND bool_or(e.checkpoint_sha256 IS NOT NULL)
    ORDER BY e.epoch DESC LIMIT 1
) saved
CROSS JOIN LATERAL (
    SELECT * FROM attempts e
    WHERE e.job_id = a.job_id AND e.epoch = saved.epoch AND e.node_rank IN (a.node_rank, 0)
      AND e.checkpoint_sha256 IS NOT NULL
    ORDER BY e.node_rank DESC LIMIT 1
) c
WHERE a.id = ANY(%(ids)s);
