"""Chromium without a window, for the tests of pages.

    sudo python3 tools/sandbox/chromium.py install   # Debian's packages chromium and fonts-dejavu-core, if missing

Only Python's standard library is used. Exit codes: 0 done, 1 with one line on standard error.
"""

from __future__ import annotations

import sys

from daemons import SandboxError, install_packages

PROGRAMS = ("chromium",)


def install() -> None:
    """Install the Debian packages."""
    install_packages("Chromium", PROGRAMS, ["chromium", "fonts-dejavu-core"])


def main() -> None:
    """Entry point of the script."""
    if sys.argv[1:] != ["install"]:
        sys.exit("usage: python3 tools/sandbox/chromium.py install")
    try:
        install()
    except SandboxError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
