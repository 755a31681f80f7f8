-- name: stale_checkpoints
-- What no attempt can begin with any more: the job is over, or every node of a later epoch has told what it saved (as in
-- checkpoints_before). Not of attempts that ended just now: an upload of theirs may still be on its way.
SELECT a.id, a.job_id, a.epoch, a.node_rank FROM attempts a JOIN jobs j ON j.id = a.job_id
WHERE a.saves AND a.ended_at IS NOT NULL AND NOT a.checkpoints_deleted AND a.ended_at <= %(before)s
  AND (j.ended_at <= %(before)s OR EXISTS (
    SELECT FROM attempts e WHERE e.job_id = a.job_id AND e.epoch > a.epoch GROUP BY e.epoch
    HAVING bool_and(e.checkpoint_number > 0) AND bool_or(e.checkpoint_sha256 IS NOT NULL)))
ORDER BY a.ended_at, a.id LIMIT %(limit)s;

-- name: checkpoints_deleted
UPDATE attempts SET checkpoints_deleted = true WHERE id = ANY(%(ids)s);

-- name: specs_with_auth
-- Of jobs that are over; some only look like it.
SELECT id, spec FROM jobs WHERE settled AND position('\xa203'::bytea IN spec) > 0 AND id > %(after)s
ORDER BY id LIMIT %(limit)s FOR UPDATE SKIP LOCKED;

-- name: replace_specs
UPDATE jobs SET spec = new.spec FROM unnest(%(ids)s::uuid[], %(specs)s::bytea[]) AS new (id, spec)
WHERE jobs.id = new.id AND jobs.settled;
