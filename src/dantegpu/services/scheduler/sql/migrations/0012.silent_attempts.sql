-- Its machine said at its end that it wrote no log: none will come.
ALTER TABLE attempts ADD COLUMN silent boolean NOT NULL DEFAULT false;
