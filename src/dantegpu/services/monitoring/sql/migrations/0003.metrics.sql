-- What attempts used, a point per interval. A long series is thinned out, so that each has a bounded number of points:
-- when there are too many, every second one goes, and from then on only every second one is taken.

CREATE TABLE metric_heads (
    attempt_id uuid PRIMARY KEY,
    job_id uuid NOT NULL,
    team_id uuid NOT NULL,
    epoch bigint NOT NULL CHECK (epoch > 0),
    node_rank integer NOT NULL DEFAULT 0,
    step integer NOT NULL DEFAULT 1 CHECK (step > 0),
    points integer NOT NULL DEFAULT 0 CHECK (points >= 0),
    updated_at timestamptz NOT NULL,
    UNIQUE (job_id, epoch, node_rank)
);
CREATE INDEX metric_heads_age ON metric_heads (updated_at);

CREATE TABLE metric_points (
    attempt_id uuid NOT NULL REFERENCES metric_heads ON DELETE CASCADE,
    number integer NOT NULL CHECK (number > 0),
    point bytea NOT NULL,                      -- dante.v1.MetricsPoint, serialised
    PRIMARY KEY (attempt_id, number)
);
