"""The teacher's prompts: our wording, one text file each, with a version that changes whenever the wording does.

Text under judgment comes from the web or from a model that is rewarded for good verdicts, so it may contain
instructions, verdicts or imitations of our markers. Every request therefore fences it with a code derived from the
request's seed: not to be guessed by the text, the same in every replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Template

from megatron_rlpt.teacher.verdicts.parsing import disarm
from megatron_rlpt.types import derive_seed

VERSIONS = {
    "quality": "quality-3",
    "safety": "safety-2",
    "factuality": "factuality-2",
    "rewrite": "rewrite-2",
}
"""Version of each prompt, written with every score; to be raised with every change of the wording."""


@dataclass(frozen=True)
class Prompt:
    """A prompt filled in for one request."""

    text: str
    version: str
    fence: str
    """Code of the markers around untrusted text."""


def build_prompt(name: str, seed: int, **texts: str) -> Prompt:
    """Fill prompt ``name`` with untrusted ``texts``, fenced by a code derived from ``seed``.

    Raises:
        KeyError: there is no such prompt, or a text it needs is missing.
    """
    version = VERSIONS[name]
    fence = f"{derive_seed(seed, 'fence') & 0xFFFFFFFF:08x}"
    # An answer of the rewriter is no verdict, and what it copies is learnt.
    quoted = {key: neutralise(text, fence, verdicts=name != "rewrite") for key, text in texts.items()}
    return Prompt(_template(name).substitute(quoted, fence=fence), version, fence)


def neutralise(text: str, fence: str, *, verdicts: bool = True) -> str:
    """``text`` without the fence's code and, with ``verdicts``, without what our parser would take for a verdict.

    The code cannot be known to the text, so removing it changes no honest text. The key of a verdict loses its colon: a
    judge that ends its answer with a quotation of the text then has given no verdict.
    """
    while fence in text:
        text = text.replace(fence, "")
    return disarm(text) if verdicts else text


@cache
def _template(name: str) -> Template:
    return Template(files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8").strip())
