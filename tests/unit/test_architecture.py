"""Rules that no type checker enforces: which folder may import which, and unique class names."""

from __future__ import annotations

import ast
import collections
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    "backoff errors plain_text",
    "distributed extensions files types",
    "objectives",
    "config",
    "tokens",
    "observe",
    "buffer data models",
    "checkpoint",
    "policy",
    "rollout",
    "teacher",
    "convert judge_workers world",
    "evaluation",
    "teacher_training trainer",
    "experiments planner",
    "reports",
    "launch",
    "cli",
    "__main__",
)
"""Folders and files of the package (and ``launch``), lowest first. Each may import those on earlier lines."""
RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}


def room(module: str) -> str:
    """``megatron_rlpt.policy.model`` -> ``policy``; ``launch.code`` -> ``launch``; the package itself -> empty."""
    package, _, rest = module.partition(".")
    return "launch" if package == "launch" else rest.partition(".")[0]


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Return every module of this repository that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in ("megatron_rlpt", "launch"))


def test_every_folder_has_its_layer():
    rooms = {room(module_of(path)) for path in sources("megatron_rlpt", "launch")} - {""}
    assert rooms <= set(RANK), "add a new folder to LAYERS, as low as its imports allow"


def test_no_folder_imports_one_of_its_own_layer_or_above():
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("megatron_rlpt", "launch")
        for name in imports(path)
        if (source := room(module_of(path))) and (target := room(name)) in RANK
        if target != source and RANK[target] >= RANK[source]
    ]
    assert not upward


def test_no_circle_among_files():
    files = {module_of(path): path for path in sources("megatron_rlpt", "launch")}
    graph = {
        module: {
            found for name in imports(path) if (found := name if name in files else name.rpartition(".")[0]) in files
        }
        for module, path in files.items()
    }
    # A package imports the modules that it re-exports, and they may import its other modules.
    graph = {module: found - {module} for module, found in graph.items() if files[module].name != "__init__.py"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("folders", [("megatron_rlpt", "launch"), ("tools",)])
def test_no_class_name_twice(folders):
    names = collections.defaultdict(list)
    for path in sources(*folders):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names[node.name].append(str(path.relative_to(ROOT)))
    assert {name: places for name, places in names.items() if len(places) > 1} == {}


def test_tests_mirror_the_package():
    mirrored = {path.name for path in (ROOT / "tests/unit").iterdir() if path.is_dir() and path.name != "__pycache__"}
    rooms = {name for name in RANK if (ROOT / "megatron_rlpt" / name).is_dir()} | {"launch", "tools", "container"}
    assert mirrored <= rooms
