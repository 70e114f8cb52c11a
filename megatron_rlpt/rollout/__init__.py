"""Rollouts: continuations sampled from the current policy, and the weights that keep the engine current."""
