"""monitoring-logging-service: the logs of jobs, while they run and after their machine is gone."""
