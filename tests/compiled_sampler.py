"""Compile what vLLM's sampler compiles in the first step of a process, for the forks of the process that imports this.

Nothing of the compiler may leave a thread behind, which forks would not inherit.
"""

import torch
import torch._inductor.config
from vllm.v1.sample.sampler import Sampler

torch._inductor.config.compile_threads = 1
with torch.inference_mode():
    Sampler.gather_logprobs(torch.zeros(2, 64), 1, torch.zeros(2, dtype=torch.int64))
