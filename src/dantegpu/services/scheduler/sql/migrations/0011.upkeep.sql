-- What nobody needs any more: checkpoints that no attempt can begin with, and passwords of registries.
ALTER TABLE attempts ADD COLUMN checkpoints_deleted boolean NOT NULL DEFAULT false;
CREATE INDEX attempts_checkpoints ON attempts (ended_at) WHERE saves AND ended_at IS NOT NULL AND NOT checkpoints_deleted;
-- A JobSpec with registry_auth, field 52, has these two bytes. Others may have them too, so whoever looks reads the spec.
CREATE INDEX jobs_registry_auth ON jobs (id) WHERE settled AND position('\xa203'::bytea IN spec) > 0;
