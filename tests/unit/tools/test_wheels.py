"""Wheels that travel in loads: what arrives is what was collected, or one line says what is missing."""

from __future__ import annotations

import importlib.util
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "tools/wheels.py"


@pytest.fixture(scope="module")
def wheels():
    spec = importlib.util.spec_from_file_location("wheels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["wheels"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def collected(tmp_path):
    """Three files of random bytes, the second larger than several loads."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    draw = random.Random(1)
    for name, size in (("a-1-py3-none-any", 1000), ("b-2-py3-none-any", 200_000), ("c-3-py3-none-any", 70_001)):
        (folder / f"{name}.whl").write_bytes(draw.randbytes(size))
    return folder


SIZE = 2**16


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def carry(wheels, loads, store, numbers=None):
    """Take loads as another machine does: one at a time, each in a folder that is gone afterwards."""
    for load in sorted(loads.iterdir()):
        if numbers is None or int(load.name) in numbers:
            arrived = store.parent / "arrived" / load.name
            shutil.copytree(load, arrived)
            wheels.take(arrived, store)
            shutil.rmtree(arrived)


def test_what_arrives_is_what_was_cut_and_no_load_is_too_large(wheels, collected, tmp_path):
    loads, store, out = tmp_path / "loads", tmp_path / "store", tmp_path / "out"
    manifest = wheels.cut(collected, loads, SIZE)
    assert len(manifest.pieces) == -(-271_001 // SIZE) == len(list(loads.iterdir()))
    assert max((load / "piece").stat().st_size for load in loads.iterdir()) == SIZE
    carry(wheels, loads, store)
    assert sorted(wheels.join(store, out)) == sorted(out.iterdir())
    assert contents(out) == contents(collected)


def test_loads_may_come_in_any_order_and_twice_and_joining_twice_does_nothing(wheels, collected, tmp_path):
    loads, store, out = tmp_path / "loads", tmp_path / "store", tmp_path / "out"
    wheels.cut(collected, loads, SIZE)
    assert wheels.take(loads / "003", store) == ["000", "001", "002", "004"]
    carry(wheels, loads, store, {0, 1, 2})
    shutil.rmtree(loads / "003")
    wheels.cut(collected, loads, SIZE)  # a second time, the same
    assert wheels.take(loads / "004", store) == wheels.take(loads / "003", store) == []
    wheels.join(store, out)
    shutil.rmtree(store / "x", ignore_errors=True)
    for piece in store.glob("00?"):
        piece.unlink()
    wheels.join(store, out)  # whole wheels need no pieces
    assert contents(out) == contents(collected)


def test_missing_and_damaged_pieces_are_named_in_one_line(wheels, collected, tmp_path, capsys):
    loads, store, out = tmp_path / "loads", tmp_path / "store", tmp_path / "out"
    wheels.cut(collected, loads, SIZE)
    carry(wheels, loads, store, {0, 2, 3})

    def error(*arguments):
        assert wheels.main([*map(str, arguments)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert error("join", store, out) == (
        f"error: of the loads 000 to 004, 001, 004 did not arrive in {store}; take them"
    )
    assert not out.exists()
    piece = loads / "001/piece"
    data = bytearray(piece.read_bytes())
    data[-1] ^= 1
    piece.write_bytes(data)
    assert error("take", loads / "001", store).startswith(f"error: {piece} is damaged")
    assert not (store / "001").exists()
    piece.unlink()
    assert "carry load 001 again" in error("take", loads / "001", store)
    (store / "002").write_bytes(b"cut off")
    wheels.cut(collected, loads, SIZE)
    carry(wheels, loads, store, {1, 4})
    assert error("join", store, out).startswith(f"error: {store / '002'} is damaged: 7 bytes of 65,536")
    assert error("join", tmp_path / "nothing", out).endswith("does not exist; take a load first")
    (collected / "a-1-py3-none-any.whl").write_bytes(b"changed")
    wheels.cut(collected, loads, SIZE)
    assert "has pieces of other wheels" in error("take", loads / "000", store)
    assert "has no wheels" in error("cut", store, loads)


def wheel(folder, name, version, *requires):
    """Write a wheel that pip takes."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {one}\n" for one in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-cp312-cp312-manylinux_2_28_x86_64.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"{metadata}\nRequires-Dist: words\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: cp312-cp312-manylinux_2_28_x86_64\n")
        file.writestr(f"{info}/RECORD", "")


def test_collects_what_is_required_and_not_there_in_the_versions_of_the_lock(wheels, tmp_path, monkeypatch):
    index = tmp_path / "index"
    wheel(index, "engine", "2.0", "torch>=2", "Helper_Lib>=1", 'testing; extra == "dev"', "absent; os_name == 'nt'")
    wheel(index, "engine", "3.0")
    wheel(index, "helper_lib", "1.5", "deep")
    wheel(index, "deep", "0.1")
    lock = tmp_path / "lock.txt"
    lock.write_text("# a comment with name==1\nengine==2.0\nhelper-lib==1.5\ndeep==0.1\ntorch==2.13.0\ntesting==1\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    found = wheels.collect(tmp_path / "out", ["engine"], ["torch"], lock=lock)
    assert [path.name.split("-")[:2] for path in found] == [["engine", "2.0"], ["helper_lib", "1.5"], ["deep", "0.1"]]
    assert wheels.collect(tmp_path / "other", ["engine"], ["Torch", "helper.lib"], lock=lock) == [
        tmp_path / "other" / found[0].name
    ]
    with pytest.raises(wheels.CarryError, match=r"lock\.txt has no nonsense"):
        wheels.collect(tmp_path / "out", ["nonsense"], [], lock=lock)
    with pytest.raises(wheels.CarryError, match=r"no wheels of testing==1: No matching distribution"):
        wheels.collect(tmp_path / "out", ["testing"], [], lock=lock)


def test_what_is_carried_by_default_is_in_the_lock_of_the_gpu_stack(wheels):
    pins = wheels.read_lock(wheels.LOCK)
    assert {*wheels.NEEDED, *wheels.ASSUMED} <= pins.keys()
    assert wheels.platforms("2.39", "x86_64")[0] == "manylinux_2_39_x86_64"


def test_it_runs_without_any_package(tmp_path, collected):
    run = [sys.executable, "-I", "-S", str(SCRIPT)]
    done = subprocess.run([*run, "cut", collected, tmp_path / "loads", "--size", "0.1"], capture_output=True, text=True)
    assert done.stdout == f"3 wheels in loads 000 to 002 of {tmp_path / 'loads'}\n", done.stderr
    refused = subprocess.run([*run, "cut", collected, tmp_path, "--size", "0"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith("--size is 0; allowed: above 0 MiB")
