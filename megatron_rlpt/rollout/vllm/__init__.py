"""Rollouts from vLLM, in the trainer's process or in a separate one.

engine.py   VllmEngine: generate, update weights, sleep; where it runs
process.py  turns the death of a separate engine process into an error for its callers
runtime.py  environment variables and process state while a vLLM engine is built
worker.py   methods that run inside vLLM's worker
"""
