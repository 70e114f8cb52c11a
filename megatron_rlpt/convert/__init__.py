"""Checkpoint conversion: Hugging Face and Megatron distributed checkpoints, with GGUF as input.

Reading order:

    convert.py          ``rlpt convert``: any supported input -> Hugging Face or Megatron
    formats.py          what an input path holds
    source.py           the protocol of inputs, and the Hugging Face input
    megatron_reader.py  Megatron input
    megatron_writer.py  Megatron output
    megatron_keys.py    where Megatron stores a tensor: key and index
    gguf_reader.py      GGUF input
    gguf_settings.py    GGUF metadata -> Hugging Face configuration and tokenizer
    verify.py           compare a result with its source: tensors bit for bit, then logits
    fresh.py            ``rlpt init``: a model with fresh weights

Tensors are streamed: memory holds one Megatron tensor (a projection, an expert, an embedding), the Hugging Face tensors
it is made of and, when writing Hugging Face files, one shard. Only ``verify`` needs Megatron and a process group.
"""
