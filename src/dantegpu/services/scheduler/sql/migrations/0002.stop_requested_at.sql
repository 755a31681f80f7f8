-- Since when an attempt is asked to end; a machine that does not end it loses the lease.
ALTER TABLE attempts ADD COLUMN stop_requested_at timestamptz;
