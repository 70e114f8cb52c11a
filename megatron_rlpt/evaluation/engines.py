"""The engines that write the continuations of an evaluation: one per rank, for one model after the other."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_rlpt.config import Config
from megatron_rlpt.distributed.ranks import LostContactError, Ranks
from megatron_rlpt.errors import first_line
from megatron_rlpt.evaluation.generation import (
    GREEDY,
    SAMPLED,
    Block,
    GenerationCache,
    block_size,
    blocks_of,
    generation_facts,
    takes_of,
)
from megatron_rlpt.evaluation.measures import Written
from megatron_rlpt.evaluation.models import EvaluatedModel, same_architecture
from megatron_rlpt.evaluation.prompt_sets import PromptSet
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.huggingface import WeightFolder
from megatron_rlpt.observe import get_logger
from megatron_rlpt.rollout.distributed_engine import DistributedEngine
from megatron_rlpt.rollout.placement import IN_THIS_PROCESS, EngineMode, EnginePlace, Placement, place_engines
from megatron_rlpt.rollout.vllm.engine import start_policy_engine

_log = get_logger(__name__)

Tokens = tuple[tuple[int, ...], ...]


class EvaluationEngines:
    """vLLM engines that are started for the first model and take the weights of others of the same architecture."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        """
        Args:
            config: of the evaluation, precisions resolved.
            ranks: all ranks; every one makes the same calls.
        """
        # No update follows, so nothing needs a record of the experts that were used.
        self._config = replace(config, rollout=replace(config.rollout, router_replay=False))
        self._ranks = ranks
        self._placement = _place(self._config, ranks)
        self._engines: DistributedEngine | None = None
        self._folder: Path | None = None
        self._version = 0

    def generate(self, model: EvaluatedModel, blocks: Sequence[Block], cache: GenerationCache) -> dict[str, Tokens]:
        """Continue ``blocks`` with the weights of ``model``; store each block at once, and return all by key.

        Raises:
            ModelError: the engine cannot serve the model.
            EngineError: the engine failed.
        """
        started = time.monotonic()
        self._load(model)
        loaded = time.monotonic()
        found = self._ranks.all_gather(
            self._ranks.run_on_all_ranks(lambda: self._own_share(blocks, cache), "the end of generating")
        )
        _log.info(
            "generated",
            model=model.name,
            continuations=sum(len(block.prompts) for block in blocks),
            seconds=f"{time.monotonic() - loaded:.1f}",
            loading=f"{loaded - started:.1f}",
        )
        return {key: tokens for share in found for key, tokens in share.items()}

    def close(self) -> None:
        """Give up the engines and their memory."""
        self._engines = self._folder = None
        gc.collect()

    def _load(self, model: EvaluatedModel) -> None:
        if self._engines is not None and self._folder is not None and same_architecture(self._folder, model.folder):
            if self._folder != model.folder:
                self._version += 1
                weights = WeightFolder(model.folder).stream(read_architecture(model.folder))
                self._engines.update_weights(weights, self._version)
        else:
            self.close()
            own = replace(self._config, model=replace(self._config.model, path=str(model.folder)))
            place = self._placement.own
            self._engines = DistributedEngine(
                lambda: start_policy_engine(own, place or IN_THIS_PROCESS), self._placement.groups, self._ranks
            )
            self._version = 0
        self._folder = model.folder

    def _own_share(self, blocks: Sequence[Block], cache: GenerationCache) -> dict[str, Tokens]:
        """Continue the blocks of this rank's engine; the first rank of those that share an engine keeps them."""
        groups, rank = self._placement.groups, self._ranks.rank
        mine = next((number for number, group in enumerate(groups) if rank in group), None)
        own = self._engines.own if self._engines else None
        if own is None or mine is None:
            return {}
        found: dict[str, Tokens] = {}
        for block in blocks[mine :: len(groups)]:
            try:
                written = own.generate(block.prompts, self._config.data.suffix_length, self._version)
            except Exception as error:
                if len(groups[mine]) == 1:
                    raise
                # The ranks that share the engine wait inside of it, where they cannot be told: end this rank.
                raise LostContactError(
                    f"rank {rank}: {first_line(error)}; the ranks that share its engine end as well"
                ) from error
            if rank == groups[mine][0]:
                found[block.key] = tuple(one.tokens for one in written)
                cache.store(block, found[block.key])
        return found


def write_all(
    config: Config, models: Sequence[EvaluatedModel], sets: Sequence[PromptSet], cache: Path, ranks: Ranks
) -> list[Written]:
    """Return the continuations of all models on all sets, from the cache or newly generated; a collective.

    Args:
        config: of the evaluation, precisions resolved.
        models: the reference first.
        sets: those of questions are left out.
        cache: folder of the evaluation's cache.
        ranks: all ranks, which share the work.

    Raises:
        ModelError, EngineError: a model cannot be served.
        ConfigError, CheckpointError: the cache cannot be written.
    """
    samples = {GREEDY: 0} | ({SAMPLED: config.evaluation.samples} if config.evaluation.samples else {})
    size = block_size(config, torch.cuda.is_available())
    planned = {
        (one.name, decoding): blocks_of(one.episodes, count, config.run.seed, size)
        for one in sets if one.episodes
        for decoding, count in samples.items()
    }  # fmt: skip
    engines = EvaluationEngines(config, ranks)
    texts: dict[tuple[str, str], dict[str, tuple[Tokens, ...]]] = {place: {} for place in planned}
    every = [block for blocks in planned.values() for block in blocks]
    for model in models:
        tokens = _tokens(config, model, every, engines, cache, ranks)
        for (name, decoding), blocks in planned.items():
            texts[name, decoding][model.name] = takes_of(blocks, tokens, samples[decoding])
    engines.close()
    reference = next(model.name for model in models if model.reference)
    by_name = {one.name: one for one in sets}
    return [Written(by_name[name], decoding, texts[name, decoding], reference) for name, decoding in planned]


def _tokens(
    config: Config,
    model: EvaluatedModel,
    blocks: Sequence[Block],
    engines: EvaluationEngines,
    cache: Path,
    ranks: Ranks,
) -> Mapping[str, Tokens]:
    store = GenerationCache(cache, generation_facts(config, model.digest), ranks.rank)
    unique = {block.key: block for block in blocks}
    # What rank 0 has read decides, so that all ranks divide the same work.
    known = ranks.broadcast({key: found for key, block in unique.items() if (found := store.find(block)) is not None})
    missing = [block for key, block in unique.items() if key not in known]
    _log.info("continuations", model=model.name, stored=len(known), to_generate=len(missing), unit="blocks")
    return known | engines.generate(model, missing, store) if missing else known


def _place(config: Config, ranks: Ranks) -> Placement:
    """Decide where engines run: each rank has its own, unless several GPUs are needed for one."""
    if config.rollout.tensor == 1:
        if ranks.size == 1:
            return Placement(((0,),), IN_THIS_PROCESS)
        if not torch.cuda.is_available():
            everyone = tuple((rank,) for rank in range(ranks.size))
            return Placement(everyone, EnginePlace(EngineMode.OWN_PROCESS))
    return place_engines(config, ranks.rank, ranks.size)
