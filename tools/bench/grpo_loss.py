"""GRPO's loss and gradient against those of TRL's ``GRPOTrainer``, on the same tensors and with the same model.

    .venv-peers/bin/python tools/bench/grpo_loss.py [--json FILE]

``bash tools/setup_peers.sh`` installs TRL. *Tensors* are random log-probabilities in double precision: the gradient is
compared element by element. *Model* is a whole update of a small random Llama in fp32: TRL computes it with
transformers on rows padded on both sides, the policy with Megatron on packs whose answers share their prompt. In both,
answers have one to eight tokens, and the policy has moved away from its reference.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from frame import quiet, report

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    DataConfig,
    Dtype,
    LengthNorm,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from megatron_rlpt.objectives import Example, LossInputs, build_objective
from megatron_rlpt.objectives.grpo import group_advantages
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.types import Candidate, Episode, Source

VOCABULARY = 60
GROUPS, ANSWERS, LONGEST = 3, 4, 8
CLIP_LOW, CLIP_HIGH, BOUND, KL = 0.1, 0.3, 1.1, 0.2


@dataclass(frozen=True)
class Variant:
    """A variant of the loss."""

    length_norm: LengthNorm
    kl: float
    truncated: bool

    def __str__(self) -> str:
        name = "grpo" if self.length_norm is LengthNorm.sequence else "dr_grpo"
        return name + (" with KL" if self.kl else "") + (", truncated weights" if self.truncated else ", clipped")

    @property
    def ours(self) -> ObjectiveConfig:
        """The section ``objective``."""
        return ObjectiveConfig(
            name="grpo",
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            truncate_ratio=BOUND if self.truncated else 0.0,
            length_norm=self.length_norm,
            kl=self.kl,
        )

    def trl(self, model: Path) -> GRPOTrainer:
        """TRL's trainer with the same settings."""
        config = GRPOConfig(
            output_dir=str(model.parent / "trl"),
            per_device_train_batch_size=GROUPS * ANSWERS,
            num_generations=ANSWERS,
            max_completion_length=LONGEST,
            loss_type="grpo" if self.length_norm is LengthNorm.sequence else "dr_grpo",
            epsilon=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            beta=self.kl,
            use_bias_correction_kl=False,  # as arXiv 2402.03300
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        )
        trainer = GRPOTrainer(
            LlamaForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * GROUPS}),
            processing_class=_tokenizer(),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        # Set after the constructor, which would start an engine.
        trainer.use_vllm = self.truncated
        trainer.vllm_importance_sampling_correction = self.truncated
        return trainer


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"a": 0, "<pad>": 1, "<eos>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")), pad_token="<pad>", eos_token="<eos>"
    )


def _corrected(variant: Variant, logprobs: torch.Tensor, engine: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what TRL's loss reads of the engine: clipped against it, or corrected for it by a truncated weight."""
    if not variant.truncated:
        return {"old_per_token_logps": engine}
    # trl/trainer/grpo_trainer.py: _generate_and_score_completions, mode token_truncate.
    weight = (logprobs.detach() - engine).exp().clamp(max=BOUND)
    return {"importance_sampling_ratio": weight}


def on_tensors(variant: Variant, trainer: GRPOTrainer, draw: torch.Generator) -> dict[str, float]:
    """Return the largest differences of loss and gradient on random log-probabilities."""
    rows, double = GROUPS * ANSWERS, torch.float64
    lengths = torch.randint(1, LONGEST + 1, (rows,), generator=draw)
    mask = (torch.arange(LONGEST) < lengths[:, None]).to(double)
    logprobs = -5 * torch.rand(rows, LONGEST, generator=draw, dtype=double)
    engine = logprobs + 0.3 * torch.randn(rows, LONGEST, generator=draw, dtype=double)
    reference = logprobs + torch.randn(rows, LONGEST, generator=draw, dtype=double)
    advantages = torch.randn(rows, generator=draw, dtype=double)

    ours = logprobs.clone().requires_grad_()
    unknown = engine.masked_fill(mask == 0, torch.nan)
    inputs = LossInputs(ours, mask, unknown, advantages, (ANSWERS,) * GROUPS, LONGEST, reference)
    loss = build_objective(variant.ours).loss(inputs).loss.mean()
    loss.backward()

    theirs = logprobs.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (theirs, torch.zeros_like(theirs), None)
    ids = torch.zeros(rows, LONGEST, dtype=torch.int64)
    other = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": advantages,
            "ref_per_token_logps": reference,
            **_corrected(variant, theirs, engine),
        },
    )
    other.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert float(ours.grad.abs().max()) > 0.01
    return {
        "loss": float(loss),
        "loss_error": abs(float(loss - other)),
        "gradient_error": float((ours.grad - theirs.grad).abs().max()),
    }


def examples(model: LlamaForCausalLM, draw: torch.Generator) -> list[Example]:
    """Return groups of answers whose log-probabilities by the engine are about those of ``model``."""

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=draw))
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=draw).tolist())

    found = []
    for index in range(GROUPS):
        prefix, answers = tokens(1, 20), []
        for _ in range(ANSWERS):
            answer = tokens(1, LONGEST)
            with torch.no_grad():
                logits = model(torch.tensor([prefix + answer])).logits[0, len(prefix) - 1 : -1]
            own = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            said = own + 0.3 * torch.randn(len(answer), generator=draw)
            answers.append(Candidate(Source.ROLLOUT, answer, logprobs=tuple(said.tolist())))
        episode = Episode(f"e{index}", prefix, tokens(LONGEST, LONGEST), "corpus", "document", 0)
        advantages = group_advantages(torch.randn(ANSWERS, generator=draw).tolist(), normalize=True)
        found.append(Example(episode, tuple(answers), tuple(range(ANSWERS)), advantages=advantages))
    return found


def _padded(rows: Sequence[Sequence[float]], *, left: bool = False, value: float = 0) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[value] * ((width - len(row)) * left) + [*row] + [value] * ((width - len(row)) * (not left))
                         for row in rows])  # fmt: skip


def with_a_model(variant: Variant, trainer: GRPOTrainer, folder: Path, draw: torch.Generator) -> dict[str, float]:
    """Return relative differences of loss and gradient norm of an update; the policy has made one before."""
    config = Config(
        model=ModelConfig(path=str(folder), dtype=Dtype.fp32),
        data=DataConfig(max_prefix=40, suffix_length=LONGEST),
        candidates=CandidatesConfig(original=False, rollouts=ANSWERS),
        objective=variant.ours,
        optimizer=OptimizerConfig(lr=0.003, clip_grad=0.0),
        train=TrainConfig(steps=10, global_batch=GROUPS, micro_batch=2),
    )
    policy = Policy(config, build_objective(config.objective), DeviceRuntime())
    policy.update(examples(trainer.model, draw))
    weights = {name: tensor.clone() for name, tensor in policy.weights()}
    trainer.model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    batch = examples(trainer.model, draw)
    figures = policy.update(batch)

    rows = [(example.episode.prefix, answer) for example in batch for answer in example.sequences]
    prompts, answers = [list(prefix) for prefix, _ in rows], [list(answer.tokens) for _, answer in rows]
    inputs: dict[str, Any] = {
        "prompt_ids": _padded(prompts, left=True),
        "prompt_mask": _padded([[1] * len(row) for row in prompts], left=True),
        "completion_ids": _padded(answers),
        "completion_mask": _padded([[1] * len(row) for row in answers]),
        "advantages": torch.tensor([value for example in batch for value in example.advantages]),
    }
    of = {name: torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask")}
    width = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        own, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, of["ids"], of["mask"], width)
        if variant.kl:
            inputs["ref_per_token_logps"], _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.ref_model, of["ids"], of["mask"], width
            )
    engine = _padded([answer.logprobs or () for _, answer in rows])
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs | _corrected(variant, own, engine))
    loss.backward()
    norm = torch.stack([one.grad.square().sum() for one in trainer.model.parameters()]).sum().sqrt()
    return {
        "loss": figures["loss"],
        "loss_error": abs(figures["loss"] - float(loss)),
        "norm_error": abs(figures["grad_norm"] / float(norm) - 1),
        "reference_kl": figures.get("grpo/reference_kl", 0.0),
    }


def _save_llama(folder: Path) -> Path:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Compare every variant and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    quiet()
    figures = {}
    with tempfile.TemporaryDirectory() as base:
        folder = _save_llama(Path(base) / "model")
        for length_norm, kl, truncated in itertools.product(LengthNorm, (0.0, KL), (False, True)):
            variant, draw = Variant(length_norm, kl, truncated), torch.Generator().manual_seed(5)
            whole = with_a_model(variant, variant.trl(folder), folder, draw)
            figures[str(variant)] = {"tensors": on_tensors(variant, variant.trl(folder), draw), "model": whole}
    report(figures, options.json)


if __name__ == "__main__":
    main()
