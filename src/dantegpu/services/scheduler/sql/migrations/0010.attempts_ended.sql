-- A new leader asks what ended lately. Attempts lie in the table about in the order of their times, so this index costs
-- next to nothing to keep.
CREATE INDEX attempts_ended ON attempts USING brin (ended_at);
