"""Intel's matrix unit (AMX), which a process on Linux has to ask for before it may compute with it.

vLLM's attention for bfloat16 on CPUs computes with it unasked, and the process ends with SIGILL
(vllm/v1/attention/backends/cpu_attn.py: _get_attn_isa). vLLM imports the module of an engine's ``worker_extension_cls``
in each of its processes, before anything is computed.
"""

from __future__ import annotations

import logging

import torch

_log = logging.getLogger(__name__)


class MayUseAmx:
    """A worker extension without methods, for servers, which need nothing else."""


if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
    _log.warning("this process may not use the CPU's matrix unit (AMX); vLLM computes without it")
    torch.cpu._is_amx_tile_supported = lambda: False
