"""Rollouts from Megatron's own inference.

engine.py    MegatronEngine: batches prompts over tensor-parallel groups, updates weights
model.py     the rollout layout and its model with a key-value cache
sampling.py  Megatron's generation loop with per-request random numbers
"""
