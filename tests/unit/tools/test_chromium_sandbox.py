"""The script that installs the browser for the tests of pages."""

from __future__ import annotations

import sys
from pathlib import Path

from sandbox_script import call

SCRIPT = Path(__file__).resolve().parents[3] / "tools/sandbox/chromium.py"


def test_it_says_how_it_is_called_and_what_is_missing(tmp_path):
    code, _, err = call(SCRIPT)
    assert (code, err) == (1, "usage: python3 tools/sandbox/chromium.py install")
    copy = tmp_path / "chromium.py"
    copy.write_text(SCRIPT.read_text().replace('PROGRAMS = ("chromium",)', 'PROGRAMS = ("no-such-browser",)'))
    (tmp_path / "daemons.py").write_text(SCRIPT.with_name("daemons.py").read_text())
    code, _, err = call(copy, "install", path=str(Path(sys.executable).parent))
    assert code == 1
    assert err.startswith("error: Chromium is not installed here (no-such-browser not found)")
    assert len(err.splitlines()) == 1
