-- Who may do what. Of secrets only hashes are stored; private signing keys are encrypted with a key outside the database.

CREATE TABLE users (
    id uuid PRIMARY KEY,
    email text NOT NULL UNIQUE CHECK (length(email) BETWEEN 3 AND 255),  -- normalised: NFKC, lower case
    password_hash text NOT NULL CHECK (starts_with(password_hash, '$argon2id$')),
    operator boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL
);

CREATE TABLE teams (
    id uuid PRIMARY KEY,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    created_at timestamptz NOT NULL
);

CREATE TABLE members (
    team_id uuid NOT NULL REFERENCES teams (id),
    user_id uuid NOT NULL REFERENCES users (id),
    role text NOT NULL CHECK (role IN ('owner', 'member', 'viewer')),
    created_at timestamptz NOT NULL,
    PRIMARY KEY (team_id, user_id)
);
CREATE INDEX members_user ON members (user_id);

-- A log-in. All refresh tokens that follow from it are one family: each is used once, a second use ends the session.
CREATE TABLE sessions (
    id uuid PRIMARY KEY,
    user_id uuid NOT NULL REFERENCES users (id),
    team_id uuid NOT NULL REFERENCES teams (id),   -- for which it acts at the moment
    client_address text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    ended_at timestamptz,
    ended_because text CHECK (ended_because IN ('logout', 'reuse')),
    CHECK ((ended_at IS NULL) = (ended_because IS NULL))
);
CREATE INDEX sessions_user_address ON sessions (user_id, client_address);
CREATE INDEX sessions_expires_at ON sessions (expires_at);

CREATE TABLE refresh_tokens (
    token_sha256 bytea PRIMARY KEY CHECK (length(token_sha256) = 32),
    session_id uuid NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    expires_at timestamptz NOT NULL,
    used_at timestamptz
);
CREATE INDEX refresh_tokens_session ON refresh_tokens (session_id);

CREATE TABLE api_keys (
    id uuid PRIMARY KEY,
    secret_sha256 bytea NOT NULL UNIQUE CHECK (length(secret_sha256) = 32),
    prefix text NOT NULL,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    user_id uuid NOT NULL REFERENCES users (id),
    team_id uuid NOT NULL REFERENCES teams (id),
    scopes text[] NOT NULL,                        -- empty: everything that the role allows
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    last_used_at timestamptz,                      -- to the minute
    revoked_at timestamptz
);
CREATE INDEX api_keys_team ON api_keys (team_id, id DESC);
CREATE INDEX api_keys_user ON api_keys (user_id, id DESC);

CREATE TABLE join_tokens (
    id uuid PRIMARY KEY,
    token_sha256 bytea NOT NULL UNIQUE CHECK (length(token_sha256) = 32),
    team_id uuid NOT NULL REFERENCES teams (id),
    created_by uuid NOT NULL REFERENCES users (id),
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    uses integer NOT NULL DEFAULT 0,
    max_uses integer NOT NULL CHECK (max_uses >= 1),
    CHECK (uses BETWEEN 0 AND max_uses)
);

CREATE TABLE machines (
    id uuid PRIMARY KEY,
    team_id uuid NOT NULL REFERENCES teams (id),
    public_key text NOT NULL CHECK (length(public_key) = 56 AND starts_with(public_key, 'U')),
    join_token_id uuid NOT NULL REFERENCES join_tokens (id),
    enrolled_at timestamptz NOT NULL,
    renewed_at timestamptz NOT NULL,
    revoked_at timestamptz
);
-- One key is one machine, until that one is revoked; afterwards the key may join as a new machine.
CREATE UNIQUE INDEX machines_public_key ON machines (public_key) WHERE revoked_at IS NULL;

CREATE TABLE signing_keys (
    kid text PRIMARY KEY,
    public_key bytea NOT NULL CHECK (length(public_key) = 32),
    private_key_sealed bytea NOT NULL,             -- AES-256-GCM with a key from a file, bound to `kid`
    signs_from timestamptz NOT NULL UNIQUE,        -- until the next key's
    created_at timestamptz NOT NULL
);

-- Security events, only ever added. `mac` covers the row and the row before it (services/auth/audit.py).
CREATE TABLE audit_log (
    seq bigint PRIMARY KEY CHECK (seq >= 1),
    occurred_at timestamptz NOT NULL,
    kind text NOT NULL,
    user_id uuid,
    team_id uuid,
    subject text NOT NULL,
    client_address text NOT NULL,
    request_id text NOT NULL,
    detail text NOT NULL,
    mac bytea NOT NULL CHECK (length(mac) = 32)
);
CREATE INDEX audit_log_user ON audit_log (user_id, seq DESC);

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'table % is append-only: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'integrity_constraint_violation';
END $$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- The last row of the chain. Whoever appends holds its lock; rows cut off the end do not match it.
CREATE TABLE audit_head (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    seq bigint NOT NULL,
    mac bytea NOT NULL
);
INSERT INTO audit_head (seq, mac) VALUES (0, ''::bytea);
