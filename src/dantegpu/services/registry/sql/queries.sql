-- name: register_machine
-- Again with the same inventory, by a machine that has not left, changes nothing. One that left joins anew.
INSERT INTO machines AS m (id, team_id, inventory, joined_at, heard_at)
VALUES (%(id)s, %(team_id)s, %(inventory)s, %(now)s, %(now)s)
ON CONFLICT (id) DO UPDATE SET
    team_id = excluded.team_id,
    inventory = excluded.inventory,
    joined_at = CASE WHEN m.intent = 'left' THEN excluded.joined_at ELSE m.joined_at END,
    heard_at = greatest(m.heard_at, excluded.heard_at),
    liveness = CASE WHEN m.intent = 'left' THEN 'unknown' ELSE m.liveness END,
    intent = CASE WHEN m.intent = 'left' THEN 'active' ELSE m.intent END,
    revision = nextval('machine_revision')
WHERE (m.team_id = excluded.team_id AND m.inventory <> excluded.inventory) OR m.intent = 'left'
RETURNING *;

-- name: machines_by_id
SELECT * FROM machines WHERE id = ANY(%(ids)s);

-- name: list_machines
SELECT * FROM machines
WHERE (%(team_id)s::uuid IS NULL OR team_id = %(team_id)s) AND intent <> 'left'
  AND (%(after)s::uuid IS NULL OR id > %(after)s)
ORDER BY id LIMIT %(limit)s;

-- name: lock_machine
SELECT * FROM machines WHERE id = %(id)s FOR UPDATE;

-- name: set_intent
UPDATE machines SET intent = %(intent)s, revision = nextval('machine_revision') WHERE id = %(id)s RETURNING *;

-- name: snapshot
SELECT * FROM machines WHERE intent <> 'left' ORDER BY id;

-- name: latest_revision
SELECT coalesce(max(revision), 0) FROM machines;

-- name: fold_heartbeats
-- Everything that heartbeats say, in one statement; returns the machines whose liveness or inventory changed by it.
WITH beat AS (
    SELECT * FROM unnest(%(ids)s::uuid[], %(running)s::integer[], %(cpu)s::double precision[], %(memory)s::bigint[],
                         %(devices)s::bytea[], %(leaving)s::boolean[], %(inventories)s::bytea[])
        AS b (id, running, cpu, memory, devices, leaving, inventory)
), known AS (
    SELECT m.id, m.liveness, m.inventory FROM machines m
    WHERE m.id = ANY(%(ids)s) AND m.intent <> 'left' ORDER BY m.id FOR UPDATE
), change AS (
    SELECT beat.*, CASE WHEN beat.leaving THEN 'offline' ELSE 'online' END AS liveness,
        known.liveness <> CASE WHEN beat.leaving THEN 'offline' ELSE 'online' END
            OR known.inventory <> coalesce(beat.inventory, known.inventory) AS matters
    FROM beat JOIN known USING (id)
), folded AS (
    UPDATE machines m SET
        last_heartbeat_at = %(now)s, heard_at = %(now)s, running_attempts = c.running, cpu_utilisation = c.cpu,
        memory_used_bytes = c.memory, device_utilisation = c.devices, liveness = c.liveness,
        inventory = CASE WHEN c.matters THEN coalesce(c.inventory, m.inventory) ELSE m.inventory END,
        revision = CASE WHEN c.matters THEN nextval('machine_revision') ELSE m.revision END
    FROM change c WHERE m.id = c.id
    RETURNING m.*, c.matters
)
SELECT id, team_id, inventory, intent, liveness, joined_at, last_heartbeat_at, heard_at, running_attempts,
    cpu_utilisation, memory_used_bytes, device_utilisation, revision
FROM folded WHERE matters ORDER BY id;

-- name: flip_liveness
-- A sign of life counts from `watching_since` at least: before, nobody was there to hear one. SKIP LOCKED: whoever
-- holds the row is folding a heartbeat into it.
WITH late AS (
    SELECT m.id, CASE WHEN greatest(m.heard_at, %(watching_since)s) <= %(offline_before)s THEN 'offline'
                      ELSE 'unknown' END AS liveness
    FROM machines m
    WHERE m.intent <> 'left' AND m.liveness <> 'offline'
      AND greatest(m.heard_at, %(watching_since)s) <= %(unknown_before)s
      AND (m.liveness = 'online' OR greatest(m.heard_at, %(watching_since)s) <= %(offline_before)s)
    ORDER BY m.id LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
UPDATE machines m SET liveness = late.liveness, revision = nextval('machine_revision')
FROM late WHERE m.id = late.id RETURNING m.*;

-- name: clamp_future
-- After the wall clock was set back: a sign of life from the future would never grow old.
UPDATE machines SET heard_at = %(now)s WHERE heard_at > %(latest)s;
