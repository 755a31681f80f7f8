-- name: insert_user
INSERT INTO users (id, email, password_hash, operator, created_at)
VALUES (%(id)s, %(email)s, %(password_hash)s, %(operator)s, %(now)s)
ON CONFLICT (email) DO NOTHING;

-- name: user_by_email
SELECT * FROM users WHERE email = %(email)s;

-- name: user_by_id
SELECT * FROM users WHERE id = %(id)s;

-- name: set_password_hash
UPDATE users SET password_hash = %(password_hash)s WHERE id = %(id)s AND password_hash = %(old)s;

-- name: make_operator
UPDATE users SET operator = true WHERE id = %(id)s AND NOT operator;

-- name: insert_team
INSERT INTO teams (id, name, created_at) VALUES (%(id)s, %(name)s, %(now)s);

-- name: lock_team
SELECT id FROM teams WHERE id = %(id)s FOR UPDATE;

-- name: teams_of_user
SELECT t.id, t.name, m.role, t.created_at
FROM members m JOIN teams t ON t.id = m.team_id
WHERE m.user_id = %(user_id)s
ORDER BY m.created_at, t.id;

-- name: list_teams
SELECT t.id, t.name, coalesce(m.role, '') AS role, t.created_at
FROM teams t LEFT JOIN members m ON m.team_id = t.id AND m.user_id = %(user_id)s
WHERE (%(everything)s OR m.role IS NOT NULL) AND (%(before)s::uuid IS NULL OR t.id < %(before)s)
ORDER BY t.id DESC LIMIT %(limit)s;

-- name: put_member
INSERT INTO members (team_id, user_id, role, created_at) VALUES (%(team_id)s, %(user_id)s, %(role)s, %(now)s)
ON CONFLICT (team_id, user_id) DO UPDATE SET role = EXCLUDED.role;

-- name: delete_member
DELETE FROM members WHERE team_id = %(team_id)s AND user_id = %(user_id)s;

-- name: role_of
SELECT role FROM members WHERE team_id = %(team_id)s AND user_id = %(user_id)s;

-- name: members_of_team
SELECT m.user_id, u.email, m.role FROM members m JOIN users u ON u.id = m.user_id
WHERE m.team_id = %(team_id)s ORDER BY u.email;

-- name: insert_session
INSERT INTO sessions (id, user_id, team_id, client_address, created_at, expires_at)
VALUES (%(id)s, %(user_id)s, %(team_id)s, %(client_address)s, %(now)s, %(expires_at)s);

-- name: knows_address
SELECT EXISTS (SELECT FROM sessions WHERE user_id = %(user_id)s AND client_address = %(client_address)s);

-- name: insert_refresh_token
INSERT INTO refresh_tokens (token_sha256, session_id, expires_at) VALUES (%(sha256)s, %(session_id)s, %(expires_at)s);

-- name: lock_refresh_token
SELECT s.id AS session_id, s.user_id, s.team_id, s.expires_at AS session_expires_at, s.ended_at,
    r.expires_at, r.used_at
FROM refresh_tokens r JOIN sessions s ON s.id = r.session_id
WHERE r.token_sha256 = %(sha256)s
FOR UPDATE;

-- name: refresh_token_unused
SELECT EXISTS (SELECT FROM refresh_tokens WHERE token_sha256 = %(sha256)s AND used_at IS NULL);

-- name: use_refresh_token
UPDATE refresh_tokens SET used_at = %(now)s WHERE token_sha256 = %(sha256)s;

-- name: set_session_team
UPDATE sessions SET team_id = %(team_id)s WHERE id = %(id)s;

-- name: end_session
UPDATE sessions SET ended_at = %(now)s, ended_because = %(because)s WHERE id = %(id)s AND ended_at IS NULL;

-- name: delete_expired_sessions
DELETE FROM sessions WHERE expires_at < %(before)s;

-- name: insert_api_key
INSERT INTO api_keys (id, secret_sha256, prefix, name, user_id, team_id, scopes, created_at, expires_at)
VALUES (%(id)s, %(secret_sha256)s, %(prefix)s, %(name)s, %(user_id)s, %(team_id)s, %(scopes)s, %(now)s, %(expires_at)s)
RETURNING id, prefix, name, user_id, team_id, scopes, created_at, expires_at, last_used_at, revoked_at;

-- name: count_api_keys
SELECT count(*) FROM api_keys
WHERE user_id = %(user_id)s AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > %(now)s);

-- name: list_api_keys
SELECT id, prefix, name, user_id, team_id, scopes, created_at, expires_at, last_used_at, revoked_at FROM api_keys
WHERE team_id = %(team_id)s AND (%(user_id)s::uuid IS NULL OR user_id = %(user_id)s)
  AND (%(before)s::uuid IS NULL OR id < %(before)s)
ORDER BY id DESC LIMIT %(limit)s;

-- name: lock_api_key
SELECT id, prefix, name, user_id, team_id, scopes, created_at, expires_at, last_used_at, revoked_at FROM api_keys
WHERE id = %(id)s FOR UPDATE;

-- name: revoke_api_key
UPDATE api_keys SET revoked_at = %(now)s WHERE id = %(id)s AND revoked_at IS NULL;

-- name: revoke_api_keys_of_member
UPDATE api_keys SET revoked_at = %(now)s WHERE team_id = %(team_id)s AND user_id = %(user_id)s AND revoked_at IS NULL
RETURNING id;

-- name: valid_api_keys
SELECT k.secret_sha256, k.id, k.user_id, k.team_id, m.role, u.operator, k.scopes, k.expires_at
FROM api_keys k
JOIN users u ON u.id = k.user_id
JOIN members m ON m.team_id = k.team_id AND m.user_id = k.user_id
WHERE k.secret_sha256 = ANY(%(sha256s)s) AND k.revoked_at IS NULL
  AND (k.expires_at IS NULL OR k.expires_at > %(now)s);

-- name: note_use_of_api_keys
UPDATE api_keys SET last_used_at = %(now)s
WHERE id IN (
    SELECT id FROM api_keys
    WHERE id = ANY(%(ids)s) AND (last_used_at IS NULL OR last_used_at < %(stale)s)
    FOR UPDATE SKIP LOCKED);

-- name: insert_join_token
INSERT INTO join_tokens (id, token_sha256, team_id, created_by, created_at, expires_at, max_uses)
VALUES (%(id)s, %(token_sha256)s, %(team_id)s, %(created_by)s, %(now)s, %(expires_at)s, %(max_uses)s);

-- name: lock_join_token
SELECT id, team_id, expires_at, uses, max_uses FROM join_tokens WHERE token_sha256 = %(token_sha256)s FOR UPDATE;

-- name: use_join_token
UPDATE join_tokens SET uses = uses + 1 WHERE id = %(id)s;

-- name: machine_by_key
SELECT id, team_id, public_key, join_token_id, revoked_at FROM machines
WHERE public_key = %(public_key)s AND revoked_at IS NULL;

-- name: lock_machine
SELECT id, team_id, public_key, join_token_id, revoked_at FROM machines WHERE id = %(id)s FOR UPDATE;

-- name: insert_machine
INSERT INTO machines (id, team_id, public_key, join_token_id, enrolled_at, renewed_at)
VALUES (%(id)s, %(team_id)s, %(public_key)s, %(join_token_id)s, %(now)s, %(now)s)
ON CONFLICT (public_key) WHERE revoked_at IS NULL DO NOTHING;

-- name: note_renewal
UPDATE machines SET renewed_at = %(now)s WHERE id = %(id)s;

-- name: revoke_machine
UPDATE machines SET revoked_at = %(now)s WHERE id = %(id)s AND revoked_at IS NULL;

-- name: lock_signing_keys
SELECT pg_advisory_xact_lock(hashtext('auth signing keys'));

-- name: signing_keys
SELECT kid, public_key, private_key_sealed, signs_from FROM signing_keys ORDER BY signs_from;

-- name: insert_signing_key
INSERT INTO signing_keys (kid, public_key, private_key_sealed, signs_from, created_at)
VALUES (%(kid)s, %(public_key)s, %(private_key_sealed)s, %(signs_from)s, %(now)s);

-- name: delete_signing_keys
DELETE FROM signing_keys WHERE kid = ANY(%(kids)s);

-- name: lock_audit_head
SELECT seq, mac FROM audit_head FOR UPDATE;

-- name: audit_head
SELECT seq, mac FROM audit_head;

-- name: insert_audit_row
INSERT INTO audit_log (seq, occurred_at, kind, user_id, team_id, subject, client_address, request_id, detail, mac)
VALUES (%(seq)s, %(occurred_at)s, %(kind)s, %(user_id)s, %(team_id)s, %(subject)s, %(client_address)s, %(request_id)s,
    %(detail)s, %(mac)s);

-- name: set_audit_head
UPDATE audit_head SET seq = %(seq)s, mac = %(mac)s;

-- name: audit_rows_after
SELECT seq, occurred_at, kind, user_id, team_id, subject, client_address, request_id, detail, mac FROM audit_log
WHERE seq > %(after)s ORDER BY seq LIMIT %(limit)s;
