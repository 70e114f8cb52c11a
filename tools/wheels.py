"""Carry wheels to a machine that reaches no index, in loads of limited size, one after the other.

Here, collect what tests/gpu/check_gpu.py needs and the other machine lacks, and cut it:

    python tools/wheels.py collect .wheels --installed list.txt    # what "pip list --format=freeze" prints there
    python tools/wheels.py cut .wheels .loads                      # .loads/000, .loads/001, ... of 60 MiB at most

There, for every load that arrives, and once after the last:

    python3 tools/wheels.py take .loads/000 /tmp/store
    python3 tools/wheels.py join /tmp/store /tmp/wheels
    python3 -m pip install --no-index --no-deps --target /tmp/site /tmp/wheels/*.whl

Needs nothing but Python. Every command can be repeated: what is there and whole is not written again. All pieces and
wheels are checked by their SHA-256. Exit codes: 0, 1 with one line for a missing or damaged piece, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

LOCK = Path(__file__).resolve().parent / "gpu-lock.txt"
NEEDED = ("megatron-core", "omegaconf", "rich", "typer", "typing-extensions", "psutil", "xxhash")
"""What tests/gpu/check_gpu.py imports besides PyTorch and transformers."""
ASSUMED = ("torch", "transformers", "numpy", "packaging", "pyyaml", "safetensors", "typing-extensions")
"""What a machine with PyTorch and transformers has, where ``--installed`` does not say."""
_MANIFEST, _PIECE = "wheels.json", "piece"
_BLOCK = 1 << 20


class CarryError(Exception):
    """A missing or damaged piece; the message names it and what to do."""


@dataclass(frozen=True)
class Entry:
    """A wheel, or a piece of all wheels one after the other."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What travels; every load has it."""

    wheels: tuple[Entry, ...]
    pieces: tuple[Entry, ...]

    def write(self, folder: Path) -> None:
        """Write it into ``folder``."""
        content = {name: [asdict(entry) for entry in entries] for name, entries in vars(self).items()}
        (folder / _MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read that of ``folder``.

        Raises:
            CarryError: there is none, or it is damaged.
        """
        path = folder / _MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(*(tuple(Entry(**entry) for entry in content[name]) for name in ("wheels", "pieces")))
        except FileNotFoundError:
            raise CarryError(f"{path} does not exist; take a load first") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CarryError(f"{path} is damaged ({error}); carry the load again") from None


def collect(
    folder: Path,
    packages: Sequence[str],
    installed: Iterable[str],
    *,
    lock: Path = LOCK,
    python: str = "3.12",
    glibc: str = "2.39",
    machine: str = "x86_64",
) -> list[Path]:
    """Download the wheels of ``packages`` and of what they require, in the versions of ``lock``.

    Args:
        folder: for the wheels.
        packages: names.
        installed: names that the other machine has; neither they nor what they require travels.
        lock: lines ``name==version``. What a package requires there under a condition is not in a lock of that
            machine's kind, so that conditions need not be evaluated.
        python: version of Python there.
        glibc: version of the C library there.
        machine: its processor.

    Returns:
        The wheels.

    Raises:
        CarryError: a package is not in the lock, or pip finds no wheel.
    """
    pins = read_lock(lock)
    folder.mkdir(parents=True, exist_ok=True)
    done = {canonical(name) for name in installed}
    wanted = [name for name in map(canonical, packages) if name not in done]
    if absent := [name for name in wanted if name not in pins]:
        raise CarryError(f"{lock} has no {', '.join(absent)}")
    found: list[Path] = []
    while wanted:
        done.update(wanted)
        _download(folder, [f"{name}=={pins[name]}" for name in wanted], python, platforms(glibc, machine))
        wheels = [_wheel_of(folder, name, pins[name]) for name in wanted]
        found += wheels
        required = {name for wheel in wheels for name in requirements(wheel)}
        wanted = sorted(name for name in required - done if name in pins)
    return found


def read_lock(path: Path) -> dict[str, str]:
    """Return name -> version of the lines ``name==version``."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonical(name): version for name, version in pins}


def platforms(glibc: str, machine: str) -> list[str]:
    """Return the platform tags of wheels that run with this C library; pip takes each literally."""
    newest = int(glibc.split(".")[1])
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 4, -1)]
    return [*tags, *(f"manylinux{year}_{machine}" for year in ("2014", "2010", "1"))]


def requirements(wheel: Path) -> Iterator[str]:
    """Yield the names of the packages that a wheel requires, without those of its extras."""
    with zipfile.ZipFile(wheel) as file:
        (path,) = [name for name in file.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        text = file.read(path).decode("utf-8")
    for line in text.partition("\n\n")[0].splitlines():
        if line.startswith("Requires-Dist:") and not re.search(r"\bextra\s*==", line):
            yield canonical(re.match(r"Requires-Dist:\s*([\w.-]+)", line)[1])  # type: ignore[index]


def canonical(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def cut(wheels: Path, loads: Path, size: int) -> Manifest:
    """Cut all wheels of a folder, one after the other, into loads with a piece of at most ``size`` bytes.

    Raises:
        CarryError: the folder has no wheels.
    """
    paths = sorted(wheels.glob("*.whl"))
    if not paths:
        raise CarryError(f"{wheels} has no wheels; collect some first")
    entries = tuple(Entry(path.name, path.stat().st_size, sha256(path)) for path in paths)
    total = sum(entry.size for entry in entries)
    count = -(-total // size)
    pieces = []
    stream = _blocks(paths)
    rest = b""
    for number in range(count):
        folder = loads / f"{number:03}"
        folder.mkdir(parents=True, exist_ok=True)
        length, rest, digest = min(size, total - number * size), rest, hashlib.sha256()
        partial = folder / f"{_PIECE}.partial"
        with partial.open("wb") as output:
            left = length
            while left:
                block = rest or next(stream)
                part, rest = block[:left], block[left:]
                output.write(part)
                digest.update(part)
                left -= len(part)
        partial.replace(folder / _PIECE)
        pieces.append(Entry(folder.name, length, digest.hexdigest()))
    manifest = Manifest(entries, tuple(pieces))
    for piece in pieces:
        manifest.write(loads / piece.name)
    return manifest


def take(load: Path, store: Path) -> list[str]:
    """Check the piece of a load and keep it in ``store``; return the names of the pieces that are still missing.

    Raises:
        CarryError: the piece is missing or damaged, or belongs to other wheels than those in ``store``.
    """
    manifest = Manifest.read(load)
    entry = next((one for one in manifest.pieces if one.name == load.name), None)
    if entry is None:
        raise CarryError(f"{load} is not one of its loads {_span(manifest)}; keep the folder's name")
    store.mkdir(parents=True, exist_ok=True)
    if (store / _MANIFEST).exists() and Manifest.read(store) != manifest:
        raise CarryError(f"{store} has pieces of other wheels than {load}; empty it, or take another folder")
    manifest.write(store)
    kept = store / entry.name
    if not _is_whole(kept, entry):
        if not (load / _PIECE).is_file():
            raise CarryError(f"{load / _PIECE} does not exist; carry load {entry.name} again")
        _require_whole(load / _PIECE, entry)
        partial = kept.with_suffix(".partial")
        partial.write_bytes((load / _PIECE).read_bytes())
        partial.replace(kept)
    return [one.name for one in manifest.pieces if not (store / one.name).is_file()]


def join(store: Path, wheels: Path) -> list[Path]:
    """Put the wheels together from all pieces in ``store``; return them.

    Raises:
        CarryError: a piece is missing or damaged.
    """
    manifest = Manifest.read(store)
    paths = [wheels / entry.name for entry in manifest.wheels]
    if all(_is_whole(path, entry) for path, entry in zip(paths, manifest.wheels, strict=True)):
        return paths
    if missing := [one.name for one in manifest.pieces if not (store / one.name).is_file()]:
        raise CarryError(f"of the loads {_span(manifest)}, {', '.join(missing)} did not arrive in {store}; take them")
    for piece in manifest.pieces:
        _require_whole(store / piece.name, piece)
    wheels.mkdir(parents=True, exist_ok=True)
    stream, rest = _blocks(store / piece.name for piece in manifest.pieces), b""
    for path, entry in zip(paths, manifest.wheels, strict=True):
        partial = path.with_suffix(".partial")
        with partial.open("wb") as output:
            left = entry.size
            while left:
                block = rest or next(stream)
                part, rest = block[:left], block[left:]
                output.write(part)
                left -= len(part)
        _require_whole(partial, entry)
        partial.replace(path)
    return paths


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    for block in _blocks([path]):
        digest.update(block)
    return digest.hexdigest()


def _blocks(paths: Iterable[Path]) -> Iterator[bytes]:
    """Yield the bytes of files, one file after the other."""
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block


def _is_whole(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and sha256(path) == entry.sha256


def _require_whole(path: Path, entry: Entry) -> None:
    if not _is_whole(path, entry):
        raise CarryError(
            f"{path} is damaged: {path.stat().st_size:,} bytes of {entry.size:,}, or another SHA-256; carry "
            f"{entry.name} again"
        )


def _span(manifest: Manifest) -> str:
    return f"{manifest.pieces[0].name} to {manifest.pieces[-1].name}"


def _download(folder: Path, pins: Sequence[str], python: str, tags: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    command += [part for tag in tags for part in ("--platform", tag)]
    done = subprocess.run([*command, *pins], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise CarryError(f"pip downloads no wheels of {', '.join(pins)}: {reason}")


def _wheel_of(folder: Path, name: str, version: str) -> Path:
    found = [
        path
        for path in folder.glob("*.whl")
        if canonical(path.name.split("-")[0]) == name and path.name.split("-")[1] == version
    ]
    if len(found) != 1:
        raise CarryError(f"{folder} has {len(found)} wheels of {name} {version}; remove all and collect again")
    return found[0]


def _installed(path: Path | None) -> list[str]:
    """Return the names in the output of ``pip list --format=freeze``."""
    if path is None:
        return list(ASSUMED)
    names = [re.match(r"[\w.-]+", line.strip()) for line in path.read_text(encoding="utf-8").splitlines()]
    return [name[0] for name in names if name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gathering = commands.add_parser("collect", help="download the wheels to carry")
    gathering.add_argument("wheels", type=Path)
    gathering.add_argument("packages", nargs="*", help=f"besides {', '.join(NEEDED)}")
    gathering.add_argument("--installed", type=Path, metavar="FILE", help="what pip list --format=freeze prints there")
    gathering.add_argument("--lock", type=Path, default=LOCK, help="versions (default: tools/gpu-lock.txt)")
    gathering.add_argument("--python", default="3.12", help="version of Python there (default: %(default)s)")
    gathering.add_argument("--glibc", default="2.39", help="version of its C library (default: %(default)s)")
    gathering.add_argument("--machine", default="x86_64", help="its processor (default: %(default)s)")
    cutting = commands.add_parser("cut", help="cut wheels into loads")
    cutting.add_argument("wheels", type=Path)
    cutting.add_argument("loads", type=Path)
    cutting.add_argument("--size", type=float, default=60.0, metavar="MIB", help="of a load (default: %(default)g)")
    taking = commands.add_parser("take", help="keep the piece of a load that arrived")
    taking.add_argument("load", type=Path)
    taking.add_argument("store", type=Path)
    joining = commands.add_parser("join", help="put the wheels together")
    joining.add_argument("store", type=Path)
    joining.add_argument("wheels", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "cut" and given.size * 2**20 < 1:
        parser.error(f"--size is {given.size:g}; allowed: above 0 MiB")
    if given.command == "collect" and not re.fullmatch(r"2\.\d+", given.glibc):
        parser.error(f"--glibc is {given.glibc!r}; allowed: 2.17, 2.39 and the like")
    try:
        print(_run(given))
    except CarryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(given: argparse.Namespace) -> str:
    """Run the command; return what it did in one line."""
    if given.command == "collect":
        places = {"lock": given.lock, "python": given.python, "glibc": given.glibc, "machine": given.machine}
        found = collect(given.wheels, [*NEEDED, *given.packages], _installed(given.installed), **places)
        mib = sum(path.stat().st_size for path in found) / 2**20
        return f"{len(found)} wheels, {mib:.1f} MiB: {', '.join(path.name.split('-')[0] for path in found)}"
    if given.command == "cut":
        manifest = cut(given.wheels, given.loads, int(given.size * 2**20))
        return f"{len(manifest.wheels)} wheels in loads {_span(manifest)} of {given.loads}"
    if given.command == "take":
        missing = take(given.load, given.store)
        return f"load {given.load.name} is there; " + (f"missing: {', '.join(missing)}" if missing else "all are")
    return f"{len(join(given.store, given.wheels))} wheels in {given.wheels}"


if __name__ == "__main__":
    sys.exit(main())
