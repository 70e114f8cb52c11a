"""The policy's weights on their way to the rollout engine, and the proof that they arrive unchanged."""
