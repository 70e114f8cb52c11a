"""Online DPO with TRL, for ``tools/bench/peers.py``; runs in ``.venv-peers``.

TRL as its users would set it: generation by transformers with its cache, no gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

sys.path.insert(0, str(Path(__file__).parent))
from turns import Turns
from waiting_reward import distinct


def main() -> None:
    """Train until the parent process ends this one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads)
    settings: dict[str, Any] = parser.parse_args().settings
    turns = Turns()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        turns.wait()
        return [distinct(tokens) for tokens in completion_ids]

    bf16 = settings["dtype"] == "bf16"
    config = OnlineDPOConfig(
        output_dir=settings["folder"],
        per_device_train_batch_size=settings["prompts"],
        gradient_accumulation_steps=1,
        max_steps=settings["steps"],
        max_length=settings["prefix"] + settings["suffix"],
        max_new_tokens=settings["suffix"],
        temperature=1.0,
        beta=0.1,
        learning_rate=settings["lr"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    prompts = [json.loads(line)["prefix"] for line in Path(settings["corpus"]).read_text().splitlines()]
    trainer = OnlineDPOTrainer(
        AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16 if bf16 else torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
