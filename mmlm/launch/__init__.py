"""where a job runs: local ranks, Ray jobs."""
