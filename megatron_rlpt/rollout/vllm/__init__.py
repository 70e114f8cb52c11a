"""Rollouts from vLLM, in the trainer's process or in one of its own."""
