-- name: set_ask
-- A price that is NULL stays as it is; on a new row it is the default.
INSERT INTO asks (machine_id, team_id, price_udgpu_per_gpu_hour, price_udgpu_per_cpu_hour, updated_at)
VALUES (
    %(machine_id)s,
    %(team_id)s,
    coalesce(%(gpu)s::bigint, %(default_gpu)s),
    coalesce(%(cpu)s::bigint, %(default_cpu)s),
    %(now)s
)
ON CONFLICT (machine_id) DO UPDATE
SET team_id = excluded.team_id,
    price_udgpu_per_gpu_hour = coalesce(%(gpu)s::bigint, asks.price_udgpu_per_gpu_hour),
    price_udgpu_per_cpu_hour = coalesce(%(cpu)s::bigint, asks.price_udgpu_per_cpu_hour),
    updated_at = excluded.updated_at
RETURNING machine_id, team_id, price_udgpu_per_gpu_hour, price_udgpu_per_cpu_hour, updated_at;

-- name: find_asks
SELECT machine_id, team_id, price_udgpu_per_gpu_hour, price_udgpu_per_cpu_hour, updated_at
FROM asks
WHERE machine_id = ANY(%(ids)s::uuid[]);

-- name: all_asks
SELECT machine_id, team_id, price_udgpu_per_gpu_hour, price_udgpu_per_cpu_hour, updated_at
FROM asks
ORDER BY machine_id
LIMIT %(n)s;
