-- The ledger. Amounts are micro-$dGPU. Facts (accounts, transfers) are only ever added; a hold is resolved once;
-- `balances` is a cache of the facts that an auditor re-sums (query `audit`).

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'table % is append-only: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'integrity_constraint_violation';
END $$;

CREATE TABLE accounts (
    id uuid PRIMARY KEY,                 -- derives from kind and team (domain.ledger.Account.id)
    kind text NOT NULL CHECK (kind IN ('team_wallet', 'team_earnings', 'platform_fees', 'issuance')),
    team_id uuid,
    created_at timestamptz NOT NULL DEFAULT now(),
    CHECK ((kind IN ('team_wallet', 'team_earnings')) = (team_id IS NOT NULL)),
    UNIQUE NULLS NOT DISTINCT (kind, team_id),
    UNIQUE (id, kind)
);

-- One movement of money. A row debits one account and credits another by the same amount, so it cannot be unbalanced.
CREATE TABLE transfers (
    id uuid PRIMARY KEY,                 -- derives from (attempt, window, kind) or (team, idempotency key)
    seq bigint GENERATED ALWAYS AS IDENTITY UNIQUE,  -- drawn under the locks of both accounts: rises within an account
    kind text NOT NULL CHECK (kind IN ('credit', 'usage', 'fee', 'payout', 'refund')),
    debit_account_id uuid NOT NULL REFERENCES accounts (id),
    credit_account_id uuid NOT NULL REFERENCES accounts (id),
    amount_udgpu bigint NOT NULL CHECK (amount_udgpu > 0),
    debit_balance_after_udgpu bigint NOT NULL,
    credit_balance_after_udgpu bigint NOT NULL,
    linked_id uuid REFERENCES transfers (id) DEFERRABLE INITIALLY DEFERRED,
    job_id uuid,
    attempt_id uuid,
    window_index bigint CHECK (window_index >= 0),
    text text NOT NULL DEFAULT '' CHECK (length(text) <= 500),
    created_at timestamptz NOT NULL,
    CHECK (debit_account_id <> credit_account_id),
    CHECK ((kind IN ('usage', 'fee')) = (attempt_id IS NOT NULL AND window_index IS NOT NULL AND job_id IS NOT NULL))
);
CREATE INDEX transfers_debit ON transfers (debit_account_id, seq DESC);
CREATE INDEX transfers_credit ON transfers (credit_account_id, seq DESC);
CREATE UNIQUE INDEX transfers_once_per_window ON transfers (attempt_id, window_index, kind) WHERE attempt_id IS NOT NULL;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON accounts
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON transfers
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE TABLE balances (
    account_id uuid PRIMARY KEY,
    kind text NOT NULL,
    balance_udgpu bigint NOT NULL DEFAULT 0,
    held_udgpu bigint NOT NULL DEFAULT 0 CHECK (held_udgpu >= 0),
    version bigint NOT NULL DEFAULT 0,
    FOREIGN KEY (account_id, kind) REFERENCES accounts (id, kind),
    -- The one rule of a wallet: what is posted and what is held never exceeds what came in.
    CONSTRAINT never_overdrawn CHECK (kind = 'issuance' OR balance_udgpu - held_udgpu >= 0),
    CHECK (kind = 'team_wallet' OR held_udgpu = 0)
) WITH (fillfactor = 70);

CREATE TABLE holds (
    id uuid PRIMARY KEY,                 -- derives from (attempt, window)
    attempt_id uuid NOT NULL,
    window_index bigint NOT NULL CHECK (window_index >= 0),
    job_id uuid NOT NULL,
    payer_team_id uuid NOT NULL,
    provider_team_id uuid NOT NULL,
    payer_account_id uuid NOT NULL REFERENCES accounts (id),
    rate_udgpu_per_hour bigint NOT NULL CHECK (rate_udgpu_per_hour >= 0),
    window_seconds bigint NOT NULL CHECK (window_seconds > 0),
    ceiling_udgpu bigint NOT NULL CHECK (ceiling_udgpu >= 0),
    fee_basis_points integer NOT NULL CHECK (fee_basis_points BETWEEN 0 AND 10000),
    simulated boolean NOT NULL DEFAULT false,
    opened_at timestamptz NOT NULL,
    state text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'posted', 'voided')),
    used_seconds bigint CHECK (used_seconds BETWEEN 0 AND window_seconds),
    charged_udgpu bigint CHECK (charged_udgpu BETWEEN 0 AND ceiling_udgpu),
    provider_udgpu bigint CHECK (provider_udgpu >= 0),
    fee_udgpu bigint CHECK (fee_udgpu >= 0),
    closed_at timestamptz,
    UNIQUE (attempt_id, window_index),
    CHECK (NOT simulated OR payer_team_id = provider_team_id),  -- simulated machines are never billable to strangers
    CHECK (
        CASE state
            WHEN 'open' THEN num_nonnulls(used_seconds, charged_udgpu, provider_udgpu, fee_udgpu, closed_at) = 0
            ELSE num_nulls(used_seconds, charged_udgpu, provider_udgpu, fee_udgpu, closed_at) = 0
                AND charged_udgpu = provider_udgpu + fee_udgpu
                AND (charged_udgpu > 0) = (state = 'posted')
        END
    )
) WITH (fillfactor = 85);
CREATE INDEX holds_open ON holds (opened_at, id) WHERE state = 'open';
CREATE INDEX holds_job ON holds (job_id, opened_at, attempt_id, window_index);

CREATE FUNCTION resolve_hold_once() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state <> 'open' OR NEW.state = 'open' THEN
        RAISE EXCEPTION 'hold % is % and cannot become %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    IF (NEW.id, NEW.attempt_id, NEW.window_index, NEW.job_id, NEW.payer_team_id, NEW.provider_team_id,
        NEW.payer_account_id, NEW.rate_udgpu_per_hour, NEW.window_seconds, NEW.ceiling_udgpu, NEW.fee_basis_points,
        NEW.simulated, NEW.opened_at)
        IS DISTINCT FROM
       (OLD.id, OLD.attempt_id, OLD.window_index, OLD.job_id, OLD.payer_team_id, OLD.provider_team_id,
        OLD.payer_account_id, OLD.rate_udgpu_per_hour, OLD.window_seconds, OLD.ceiling_udgpu, OLD.fee_basis_points,
        OLD.simulated, OLD.opened_at) THEN
        RAISE EXCEPTION 'the terms of hold % are locked', OLD.id USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER resolved_once BEFORE UPDATE ON holds FOR EACH ROW EXECUTE FUNCTION resolve_hold_once();
CREATE TRIGGER never_deleted BEFORE DELETE OR TRUNCATE ON holds FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
