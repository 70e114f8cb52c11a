"""Rollouts from Megatron's own inference."""
