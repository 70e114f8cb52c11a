"""Checkpoint conversion: Hugging Face, Megatron distributed checkpoints, and GGUF as input.

Tensors are streamed: what is in memory at once is one Megatron tensor (a projection, an expert, an embedding) with the
Hugging Face tensors it is made of and, when Hugging Face files are written, one shard. Nothing here needs Megatron
itself or a process group, except ``verify``.
"""
