"""Models: their architecture, the mapping between Hugging Face and Megatron tensors, and Hugging Face folders.

architecture.py  config.json -> Architecture, and which settings are supported; imports no torch
rope.py          rotary settings of a config.json; imports no torch
families.py      rules: one Megatron tensor <-> the Hugging Face tensors it is made of
sharding.py      how tensor parallelism splits a tensor, and the inverse
huggingface.py   read and write Hugging Face folders
"""
