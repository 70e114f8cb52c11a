"""Compile the modules that trainer, engine and judge use by importing them: a tenth of all that are installed.

Python compiles the others when they are first imported.
"""

from __future__ import annotations

import importlib
import sys

MODULES = (
    "torch._inductor.compile_fx",
    "megatron_rlpt.trainer.run",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.engine.llm_engine",
    "vllm.model_executor.models.llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)

if __name__ == "__main__":
    sys.dont_write_bytecode = False
    for name in MODULES:
        importlib.import_module(name)
