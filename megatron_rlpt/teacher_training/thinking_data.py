"""``rlpt teacher thoughts``: from documents to prompts that ask for a thought and the text that comes next.

Experimental. The answers, for a supervised start, are thoughts with the true suffix; labels know prefix and suffix.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Config, PromptLength, SourceConfig
from megatron_rlpt.errors import DataError
from megatron_rlpt.files import new_folder
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher_training.corpus import TeacherText, cut_episodes, split_documents
from megatron_rlpt.teacher_training.labelled_prompt import LabelledPrompt, write_parts
from megatron_rlpt.teacher_training.request import HELDOUT, TRAIN, answers_beside, documents_of, options_of
from megatron_rlpt.teacher_training.thinking_examples import Piece, continued_example, pieces_of, steps_of
from megatron_rlpt.teacher_training.thoughts import thoughts_of_teacher, thoughts_of_world
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Failed, derive_seed
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.measures import measure_text

_log = get_logger(__name__)
_VERSION = 2


@dataclass(frozen=True)
class ThoughtsRequest:
    """What the command was asked for."""

    out: Path
    corpus: tuple[str, ...] = ()
    world: Path | None = None
    """Knows the facts of the documents, and writes the thoughts; without one, the teacher does."""
    plain: bool = False
    """Without thoughts, to compare with."""
    chunks: int = 1
    """Parts of a suffix, each with a thought before it."""
    prompts: int = 4000
    heldout_prompts: int = 200
    heldout_share: float = 0.1
    per_document: int = 4
    length: PromptLength = PromptLength.full
    seed: int = 1

    @property
    def answers(self) -> Path:
        """Folder beside the output in which answers of servers are kept."""
        return answers_beside(self.out)

    def sources(self) -> list[SourceConfig]:
        """Return the documents.

        Raises:
            ConfigError: none are named.
        """
        return documents_of(self.corpus, self.world, "put thoughts into")

    def as_dict(self) -> dict[str, Any]:
        """Return all but the folder, JSON-serializable."""
        return options_of(self)


def build_thoughts(config: Config, asked: ThoughtsRequest) -> str:
    """Write ``train.jsonl``, ``heldout.jsonl`` and ``card.json``.

    Args:
        config: tokenizer and lengths to cut documents by, documents to leave out (those of the run and of its
            evaluation), and the teacher that writes thoughts where no world does.
        asked: what to make.

    Returns:
        A summary in one line.

    Raises:
        ConfigError: no documents are named, or no model that could think.
        DataError: documents cannot be read or are too few, or none can be used.
        TeacherError: the teacher cannot be asked, or too many of its thoughts failed.
    """
    tokenizer = PolicyTokenizer(config.model.path)
    split = split_documents(asked.sources(), config, tokenizer, asked.heldout_share, asked.seed)
    parts: dict[str, list[LabelledPrompt]] = {}
    counts: dict[str, dict[str, int]] = {}
    for name, documents, most in (
        (TRAIN, split.train, asked.prompts),
        (HELDOUT, split.heldout, asked.heldout_prompts),
    ):
        pieces = list(islice(_pieces(documents, config, asked, tokenizer), most))
        parts[name] = _examples(pieces, config, asked)
        if not parts[name]:
            raise DataError(
                f"{len(documents)} documents give {len(pieces)} suffixes and no prompt of the {name} part; give longer "
                "documents, or lower data.min_prefix or data.suffix_length"
            )
        counts[name] = {"documents": len(documents), "suffixes": len(pieces), "prompts": len(parts[name])}
        if len(parts[name]) < most:
            _log.warning("fewer prompts than asked for", part=name, prompts=len(parts[name]), asked=most)
    with new_folder(asked.out) as folder:
        write_parts(folder, parts, _card(asked, counts, {"left_out": split.left_out, "repeated": split.repeated}))
    said = ", ".join(f"{len(examples)} {name}" for name, examples in parts.items())
    return f"wrote {asked.out}: {said} prompts of {len(split.train) + len(split.heldout)} documents"


def _pieces(
    documents: Sequence[TeacherText], config: Config, asked: ThoughtsRequest, tokenizer: PolicyTokenizer
) -> Iterator[Piece]:
    """Yield pieces in random order; of a world only those whose suffix is as it should be and can be planned.

    Those of a world are the same with thoughts and without.
    """
    pieces = pieces_of(cut_episodes(documents, config, tokenizer, asked.per_document), tokenizer)
    random.Random(derive_seed(asked.seed, "pieces")).shuffle(pieces)
    if asked.world is None:
        yield from pieces
        return
    world = World.load(asked.world)
    for one in pieces:
        if measure_text(world, one.prefix, one.suffix).good:
            thoughts = thoughts_of_world(world, steps_of(one, asked.chunks))
            if not any(isinstance(thought, Failed) for thought in thoughts):
                yield one


def _examples(pieces: Sequence[Piece], config: Config, asked: ThoughtsRequest) -> list[LabelledPrompt]:
    """Return the prompts of all pieces, except those of which a chunk has no thought."""
    if asked.plain:
        return [continued_example(one, (), (), asked.length, asked.seed) for one in pieces]
    steps = [steps_of(one, asked.chunks) for one in pieces]
    every = [step for those in steps for step in those]
    if asked.world is not None:
        thoughts = iter(thoughts_of_world(World.load(asked.world), every))
    else:
        thoughts = iter(thoughts_of_teacher(config, every, asked.length, asked.seed, asked.answers))
    examples = []
    for piece, those in zip(pieces, steps, strict=True):
        found = list(islice(thoughts, len(those)))
        written = [one for one in found if not isinstance(one, Failed)]
        if len(written) == len(those):
            examples.append(continued_example(piece, those, written, asked.length, asked.seed))
    return examples


def _card(asked: ThoughtsRequest, counts: dict[str, dict[str, int]], documents: dict[str, int]) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "role": "thinker",
        "request": asked.as_dict(),
        "sources": [source.path for source in asked.sources()],
        "documents": documents,
        "parts": counts,
    }
