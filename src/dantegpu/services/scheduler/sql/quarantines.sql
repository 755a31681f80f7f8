-- name: faulty_machines
-- Faults within the window, after the last success and after the last quarantine. Whatever was lost within one minute
-- is one incident: a power cut is no series of faults.
WITH faults AS (
    SELECT f.machine_id, f.team_id, CASE f.outcome
        WHEN 'lost' THEN floor(extract(epoch FROM f.ended_at) / 60)::text ELSE f.job_id::text END AS incident
    FROM attempts f LEFT JOIN quarantines q ON q.machine_id = f.machine_id
    WHERE f.outcome IN ('lost', 'provider_fault') AND f.ended_at > %(since)s
      AND f.ended_at > coalesce(q.until, '-infinity')
      AND NOT EXISTS (
          SELECT 1 FROM attempts s
          WHERE s.machine_id = f.machine_id AND s.outcome = 'succeeded' AND s.ended_at >= f.ended_at)
)
SELECT machine_id, count(DISTINCT incident) AS incidents, count(DISTINCT team_id) AS teams
FROM faults GROUP BY machine_id
-- One team alone could shut a provider out with jobs made for it: it has to fail there twice as often.
HAVING count(DISTINCT incident) >= %(faults)s * CASE WHEN count(DISTINCT team_id) > 1 THEN 1 ELSE 2 END
ORDER BY machine_id LIMIT %(limit)s;

-- name: quarantine
INSERT INTO quarantines AS q (machine_id, since, until, reason)
VALUES (%(machine_id)s, %(now)s, %(now)s + make_interval(secs => %(seconds)s), %(reason)s)
ON CONFLICT (machine_id) DO UPDATE SET since = excluded.since, reason = excluded.reason, released_by = '',
    times = CASE WHEN q.until > excluded.since - make_interval(secs => %(forget_seconds)s) AND q.released_by = ''
        THEN q.times + 1 ELSE 1 END,
    until = excluded.since + make_interval(secs => least(%(max_seconds)s, %(seconds)s * power(2,
        CASE WHEN q.until > excluded.since - make_interval(secs => %(forget_seconds)s) AND q.released_by = ''
        THEN q.times ELSE 0 END)))
RETURNING *;

-- name: in_quarantine
SELECT * FROM quarantines WHERE until > %(now)s AND (%(ids)s::uuid[] IS NULL OR machine_id = ANY(%(ids)s))
ORDER BY machine_id;

-- name: release
UPDATE quarantines SET until = %(now)s, released_by = %(by)s
WHERE machine_id = ANY(%(ids)s) AND until > %(now)s
RETURNING *;
