"""A training step as a public implementation of the method takes it, for ``tools/bench/peers.py``.

Written after reading https://github.com/jbarnes850/synthetic-pretrain (``scripts/train_dpo.py``, ``scripts/train.py``),
without its code: K rollouts of every prefix by ``generate`` of transformers, left-padded; the pool is original and
rollouts; best and worst are chosen and rejected, stacked in one batch; logits of every position; a deep copy is the
reference. What that implementation does beside (an HTTP judge, logs, evaluation) is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from turns import Turns
from waiting_reward import distinct

_BETA, _CLIP = 0.1, 1.0


def rollouts(model: Any, prefixes: torch.Tensor, k: int, length: int, pad: int) -> torch.Tensor:
    """Return [prompts, k, length] sampled tokens."""
    model.eval()
    with torch.no_grad():
        out = model.generate(
            input_ids=prefixes,
            attention_mask=torch.ones_like(prefixes),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            num_return_sequences=k,
            pad_token_id=pad,
        )
    model.train()
    return out[:, prefixes.shape[1] :].reshape(len(prefixes), k, length)


def suffix_logprobs(model: Any, tokens: torch.Tensor, suffix: int) -> torch.Tensor:
    """Return the log-probability of the last ``suffix`` tokens of every row, from the logits of all positions."""
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
    found = torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return found[:, -suffix:].sum(dim=-1)


def pair_of(pool: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the indices of the best and the worst; two equal rewards are told apart by their index."""
    order = sorted(range(len(pool)), key=lambda index: (distinct(pool[index]), index))
    return order[-1], order[0]


def main() -> None:
    """Train until the parent process ends this one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads)
    settings: dict[str, Any] = parser.parse_args().settings
    turns = Turns()
    dtype = torch.bfloat16 if settings["dtype"] == "bf16" else torch.float32
    policy = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype, attn_implementation="sdpa")
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings["lr"], weight_decay=0.0)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    texts = [json.loads(line)["text"] for line in Path(settings["corpus"]).read_text().splitlines()]
    rows = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    prefix, suffix, prompts = settings["prefix"], settings["suffix"], settings["prompts"]
    torch.manual_seed(0)
    for step in range(settings["steps"]):
        batch = rows[torch.arange(step * prompts, (step + 1) * prompts) % len(rows)]
        prefixes = batch[:, :prefix]
        sampled = rollouts(policy, prefixes, settings["k"], suffix, tokenizer.eos_token_id)
        turns.wait()
        pools = torch.cat([batch[:, None, prefix : prefix + suffix], sampled], dim=1)
        chosen, rejected = zip(*(pair_of(pool) for pool in pools.tolist()), strict=True)
        index = torch.arange(prompts)
        sides = [torch.cat([prefixes, pools[index, list(side)]], dim=1) for side in (chosen, rejected)]
        stacked = torch.cat(sides)
        with torch.no_grad():
            before = suffix_logprobs(reference, stacked, suffix)
        ratios = suffix_logprobs(policy, stacked, suffix) - before
        loss = -torch.nn.functional.logsigmoid(_BETA * (ratios[:prompts] - ratios[prompts:])).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), _CLIP)
        optimizer.step()


if __name__ == "__main__":
    main()
