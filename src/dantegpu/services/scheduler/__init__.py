"""scheduler-orchestrator-service: the job store, the queue, placement, leases and attempts."""
