-- Locks: whoever moves or holds money locks the rows of `balances` first, in id order, and reads what it decides by
-- (holds, transfers) afterwards. Accounts are made before any lock is taken, also in id order.

-- name: ensure_accounts
WITH new AS (
    INSERT INTO accounts (id, kind, team_id)
    SELECT id, kind, team_id
    FROM unnest(%(ids)s::uuid[], %(kinds)s::text[], %(team_ids)s::uuid[]) AS wanted (id, kind, team_id)
    ORDER BY id
    ON CONFLICT DO NOTHING
    RETURNING id, kind
)
INSERT INTO balances (account_id, kind) SELECT id, kind FROM new;

-- name: lock_balances
SELECT account_id, balance_udgpu, held_udgpu
FROM balances
WHERE account_id = ANY(%(ids)s::uuid[])
ORDER BY account_id
FOR NO KEY UPDATE;

-- name: find_holds
SELECT id, attempt_id, window_index, job_id, payer_team_id, provider_team_id, rate_udgpu_per_hour, window_seconds,
    ceiling_udgpu, fee_basis_points, simulated, charged_udgpu
FROM holds
WHERE id = ANY(%(ids)s::uuid[]);

-- name: insert_holds
WITH new AS (
    INSERT INTO holds (id, attempt_id, window_index, job_id, payer_team_id, provider_team_id, payer_account_id,
        rate_udgpu_per_hour, window_seconds, ceiling_udgpu, fee_basis_points, simulated, opened_at)
    SELECT *, %(now)s
    FROM unnest(%(ids)s::uuid[], %(attempt_ids)s::uuid[], %(windows)s::bigint[], %(job_ids)s::uuid[],
        %(payers)s::uuid[], %(providers)s::uuid[], %(payer_accounts)s::uuid[], %(rates)s::bigint[],
        %(window_seconds)s::bigint[], %(ceilings)s::bigint[], %(fees)s::integer[], %(simulated)s::boolean[])
    RETURNING payer_account_id, ceiling_udgpu
)
UPDATE balances
SET held_udgpu = held_udgpu + added.ceiling_udgpu, version = version + 1
FROM (
    SELECT payer_account_id, sum(ceiling_udgpu)::bigint AS ceiling_udgpu FROM new GROUP BY payer_account_id
) AS added
WHERE account_id = added.payer_account_id;

-- name: resolve_holds_if_open
UPDATE holds
SET state = CASE WHEN done.charged_udgpu > 0 THEN 'posted' ELSE 'voided' END,
    used_seconds = done.used_seconds,
    charged_udgpu = done.charged_udgpu,
    provider_udgpu = done.provider_udgpu,
    fee_udgpu = done.fee_udgpu,
    closed_at = %(now)s
FROM unnest(%(ids)s::uuid[], %(used_seconds)s::bigint[], %(charged)s::bigint[], %(provider)s::bigint[],
    %(fee)s::bigint[]) AS done (id, used_seconds, charged_udgpu, provider_udgpu, fee_udgpu)
WHERE holds.id = done.id AND holds.state = 'open';

-- name: post_transfers
-- The balances must be locked. Posts the transfers in the order given and frees held money, in one step.
WITH moved AS (
    SELECT *
    FROM unnest(%(ids)s::uuid[], %(kinds)s::text[], %(debits)s::uuid[], %(credits)s::uuid[], %(amounts)s::bigint[],
        %(linked)s::uuid[], %(job_ids)s::uuid[], %(attempt_ids)s::uuid[], %(windows)s::bigint[], %(texts)s::text[])
        WITH ORDINALITY
        AS m (id, kind, debit, credit, amount, linked_id, job_id, attempt_id, window_index, text, place)
), legs AS (
    SELECT place, debit AS account_id, -amount AS delta FROM moved
    UNION ALL
    SELECT place, credit, amount FROM moved
), running AS (
    SELECT place, account_id,
        balance_udgpu + (sum(delta) OVER (PARTITION BY account_id ORDER BY place))::bigint AS after_udgpu
    FROM legs JOIN balances USING (account_id)
), posted AS (
    INSERT INTO transfers (id, kind, debit_account_id, credit_account_id, amount_udgpu, debit_balance_after_udgpu,
        credit_balance_after_udgpu, linked_id, job_id, attempt_id, window_index, text, created_at)
    SELECT m.id, m.kind, m.debit, m.credit, m.amount, d.after_udgpu, c.after_udgpu, m.linked_id, m.job_id, m.attempt_id,
        m.window_index, m.text, %(now)s
    FROM moved m
    JOIN running d ON d.place = m.place AND d.account_id = m.debit
    JOIN running c ON c.place = m.place AND c.account_id = m.credit
    ORDER BY m.place
), changes AS (
    SELECT account_id, sum(delta)::bigint AS delta, sum(freed)::bigint AS freed
    FROM (
        SELECT account_id, delta, 0::bigint AS freed FROM legs
        UNION ALL
        SELECT account_id, 0, freed
        FROM unnest(%(freed_accounts)s::uuid[], %(freed)s::bigint[]) AS f (account_id, freed)
    ) AS both_kinds
    GROUP BY account_id
)
UPDATE balances
SET balance_udgpu = balance_udgpu + changes.delta, held_udgpu = held_udgpu - changes.freed, version = version + 1
FROM changes
WHERE balances.account_id = changes.account_id;

-- name: find_transfer
SELECT id, amount_udgpu, text FROM transfers WHERE id = %(id)s;

-- name: wallet
SELECT coalesce(sum(balance_udgpu) FILTER (WHERE kind = 'team_wallet'), 0)::bigint AS balance_udgpu,
    coalesce(sum(held_udgpu), 0)::bigint AS held_udgpu,
    coalesce(sum(balance_udgpu) FILTER (WHERE kind = 'team_earnings'), 0)::bigint AS earned_udgpu
FROM balances
WHERE account_id IN (%(wallet_id)s, %(earnings_id)s);

-- name: entries_before
SELECT id, seq, kind,
    CASE debit_account_id WHEN %(account_id)s THEN -amount_udgpu ELSE amount_udgpu END AS amount_udgpu,
    CASE debit_account_id WHEN %(account_id)s THEN debit_balance_after_udgpu ELSE credit_balance_after_udgpu END
        AS balance_after_udgpu,
    job_id, attempt_id, text, created_at
FROM (
    (SELECT * FROM transfers WHERE debit_account_id = %(account_id)s AND seq < %(before)s
    ORDER BY seq DESC LIMIT %(n)s)
    UNION ALL
    (SELECT * FROM transfers WHERE credit_account_id = %(account_id)s AND seq < %(before)s
    ORDER BY seq DESC LIMIT %(n)s)
) AS own
ORDER BY seq DESC
LIMIT %(n)s;

-- name: receipt
-- Lines that `team_id` pays or earns, all of them when it is NULL; the newest `n`, with the sum over all. With
-- `attempt_ids` only theirs: a task's, of what is paid for under its array's id.
SELECT attempt_id, window_index, payer_team_id, rate_udgpu_per_hour, state, used_seconds, charged_udgpu, provider_udgpu,
    fee_udgpu, opened_at, closed_at, (sum(charged_udgpu) OVER ())::bigint AS total_udgpu
FROM holds
WHERE job_id = %(job_id)s AND (%(attempt_ids)s::uuid[] IS NULL OR attempt_id = ANY(%(attempt_ids)s))
  AND (%(team_id)s::uuid IS NULL OR payer_team_id = %(team_id)s OR provider_team_id = %(team_id)s)
ORDER BY opened_at DESC, attempt_id DESC, window_index DESC
LIMIT %(n)s;

-- name: open_holds_after
SELECT id, attempt_id, window_index, opened_at
FROM holds
WHERE state = 'open' AND opened_at <= %(until)s
  AND (%(after_id)s::uuid IS NULL OR (opened_at, id) > (%(after)s, %(after_id)s))
ORDER BY opened_at, id
LIMIT %(n)s;

-- name: audit
-- One statement, so one snapshot: everything is re-summed from the facts while others go on posting.
WITH legs AS (
    SELECT debit_account_id AS account_id, seq, -amount_udgpu AS delta, debit_balance_after_udgpu AS after_udgpu
    FROM transfers
    UNION ALL
    SELECT credit_account_id, seq, amount_udgpu, credit_balance_after_udgpu FROM transfers
), chain AS (
    SELECT account_id, seq, delta, after_udgpu,
        coalesce(lag(after_udgpu) OVER (PARTITION BY account_id ORDER BY seq), 0) AS before_udgpu
    FROM legs
), summed AS (
    SELECT account_id, sum(delta) AS balance_udgpu FROM legs GROUP BY account_id
), held AS (
    SELECT payer_account_id AS account_id, sum(ceiling_udgpu) AS held_udgpu
    FROM holds WHERE state = 'open' GROUP BY payer_account_id
), billed AS (
    SELECT attempt_id, window_index, count(*) AS parts, count(linked_id) AS links,
        coalesce(sum(amount_udgpu) FILTER (WHERE kind = 'usage'), 0) AS provider_udgpu,
        coalesce(sum(amount_udgpu) FILTER (WHERE kind = 'fee'), 0) AS fee_udgpu
    FROM transfers WHERE attempt_id IS NOT NULL GROUP BY attempt_id, window_index
), problems (problem) AS (
    SELECT format('account %%s (%%s): its balance is cached as %%s, its transfers add up to %%s',
        id, a.kind, b.balance_udgpu, coalesce(s.balance_udgpu, 0))
    FROM accounts a LEFT JOIN balances b ON b.account_id = a.id LEFT JOIN summed s ON s.account_id = a.id
    WHERE b.balance_udgpu IS DISTINCT FROM coalesce(s.balance_udgpu, 0)
    UNION ALL
    SELECT format('account %%s (%%s): %%s are cached as held, its open holds add up to %%s',
        b.account_id, b.kind, b.held_udgpu, coalesce(h.held_udgpu, 0))
    FROM balances b LEFT JOIN held h USING (account_id)
    WHERE b.held_udgpu <> coalesce(h.held_udgpu, 0)
    UNION ALL
    SELECT format('account %%s (%%s): overdrawn, %%s available', account_id, kind, balance_udgpu - held_udgpu)
    FROM balances WHERE kind <> 'issuance' AND balance_udgpu < held_udgpu
    UNION ALL
    SELECT format('account %%s: the entry of transfer number %%s says balance %%s after %%s and a change of %%s',
        account_id, seq, after_udgpu, before_udgpu, delta)
    FROM chain WHERE after_udgpu <> before_udgpu + delta
    UNION ALL
    SELECT format('window %%s of attempt %%s: the hold says provider %%s and fee %%s, its transfers %%s and %%s',
        coalesce(h.window_index, b.window_index), coalesce(h.attempt_id, b.attempt_id),
        h.provider_udgpu, h.fee_udgpu, b.provider_udgpu, b.fee_udgpu)
    FROM (SELECT * FROM holds WHERE state = 'posted') h FULL JOIN billed b USING (attempt_id, window_index)
    WHERE (h.provider_udgpu, h.fee_udgpu) IS DISTINCT FROM (b.provider_udgpu, b.fee_udgpu)
    UNION ALL
    SELECT format('window %%s of attempt %%s: its %%s transfers are not linked as a pair',
        window_index, attempt_id, parts)
    FROM billed WHERE links <> CASE parts WHEN 2 THEN 2 ELSE 0 END
    UNION ALL
    SELECT format('transfer %%s: its linked transfer %%s does not link back', t.id, t.linked_id)
    FROM transfers t LEFT JOIN transfers o ON o.id = t.linked_id
    WHERE t.linked_id IS NOT NULL AND o.linked_id IS DISTINCT FROM t.id
    UNION ALL
    SELECT format('all balances add up to %%s, not 0', total)
    FROM (SELECT sum(balance_udgpu) AS total FROM balances) AS everything WHERE total <> 0
)
SELECT (SELECT count(*) FROM accounts) AS accounts,
    (SELECT count(*) FROM transfers) AS transfers,
    (SELECT count(*) FROM holds WHERE state = 'open') AS open_holds,
    (SELECT coalesce(sum(balance_udgpu), 0)::bigint FROM balances) AS sum_udgpu,
    (SELECT coalesce(array_agg(problem), '{}') FROM (SELECT problem FROM problems LIMIT %(n)s) AS first_few)
        AS problems;
