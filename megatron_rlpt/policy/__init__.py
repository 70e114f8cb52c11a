"""The policy: a Megatron-Core model with its optimizer, log-probabilities, reference weights and checkpoints.

Reading order:

    policy.py              Policy, as the training loop uses it: update, weights, save, load
    batching.py            examples -> micro-batches of padded tensors, dealt to ranks
    forward_backward.py    forward and backward passes through Megatron's pipeline schedules
    logprobs.py            vocabulary-parallel log-probabilities in chunks
    optimizer.py           Megatron's distributed AdamW, its schedule and their checkpoint state
    reference.py           reference weights that are swapped into the network

    model.py               Hugging Face architecture -> Megatron's GPTModel
    layers.py              the modules of a layer: Transformer Engine's or ours
    layout.py              parallel sizes, which layouts a model allows, where each tensor is
    precision.py           bf16 and FP8 recipes
    requirements.py        checks by sizes and settings alone, shared with ``rlpt plan``
    weights.py             Hugging Face folder -> model, model -> stream of Hugging Face tensors

    state.py               what a checkpoint of the policy holds
    sharded_checkpoint.py  Megatron's distributed format, written by threads of this process
    start_check.py         the loaded policy against ``transformers``, before the first step
    transformers_layers.py single layers as ``transformers`` computes them, for that check

    device_runtime.py      Megatron on CUDA or on a CPU over gloo; process groups
    megatron_compat.py     differences between Megatron-Core releases
"""

from megatron_rlpt.policy.megatron_compat import watch_jit

watch_jit()
