"""storage-service: inputs, results and archived logs, moved by presigned URLs."""
