"""The rollout buffer: groups on their way from the engine through the judges to the trainer."""
