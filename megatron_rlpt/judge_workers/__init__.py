"""Judge workers and teacher servers: processes that judge groups out of the rollout buffer."""
