"""The way of the policy's weights to the rollout engine, and the proof that they arrive unchanged.

manifest.py        names, shapes and precision that an engine expects; checks every stream
transport.py       to vLLM: in process or through shared memory
gpu_transport.py   to vLLM on a GPU: CUDA IPC or NCCL
megatron_refit.py  to the Megatron engine: resharding from the training layout
self_check.py      start-up proof that an update reaches every weight of a vLLM engine
"""
