"""Accounting for the Slurm sandbox: slurmdbd, and a private MariaDB.

MariaDB listens on no port. slurmdbd connects through a socket in the sandbox's folder, by which MariaDB identifies the
user, so no password is needed. Records of an earlier sandbox in the same folder are deleted, as its jobs are.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import daemons
from daemons import SandboxError

CLUSTER = "sandbox"
PROGRAMS = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacct", "sacctmgr")
PACKAGES = ("slurmdbd", "mariadb-server-core", "mariadb-client-core")
"""Debian's core packages of MariaDB install its programs without a system service."""
SOCKET = "mariadb.socket"
DATABASE = "database"
TEMPORARY = "temporary"
"""Folders of MariaDB in that of a sandbox."""

# Small, and without waiting for the disk: these records are worth no more than the sandbox. slurmdbd warns in its log
# about sizes below those for a real cluster.
SIZES = ("--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0")

CONFIGURATION = """\
DbdHost=localhost
DbdPort={port}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm_acct_db
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


def configure(folder: Path, port: int) -> str:
    """Write ``slurmdbd.conf`` for ``port``, and return the lines for ``slurm.conf``."""
    text = CONFIGURATION.format(port=port, user=getpass.getuser(), folder=folder)
    daemons.write_secret(folder / "slurmdbd.conf", text.encode())
    return (
        "AccountingStorageType=accounting_storage/slurmdbd\n"
        f"AccountingStorageHost=localhost\nAccountingStoragePort={port}\n"
        f"AccountingStoragePass={folder}/munge.socket"
    )


def start(folder: Path, environment: Mapping[str, str]) -> None:
    """Start MariaDB and slurmdbd in ``folder`` and register the cluster.

    Args:
        folder: of the sandbox, whose munged must be running.
        environment: leads Slurm's programs to the sandbox.

    Raises:
        SandboxError: a daemon did not start, or the cluster could not be registered.
    """
    create_database(folder)
    files = (f"--socket={folder}/{SOCKET}", f"--pid-file={folder}/mariadbd.pid")
    daemons.launch(folder, "mariadbd", "--no-defaults", *database_options(folder), *files, "--skip-networking")
    daemons.wait_for(folder, "mariadbd", (folder / SOCKET).is_socket)
    # slurmdbd uses MariaDB's client library, which reads its socket from this variable.
    variables = {**environment, "MYSQL_UNIX_PORT": str(folder / SOCKET)}
    daemons.launch(folder, "slurmdbd", "-D", environment=variables)
    daemons.wait_for(folder, "answer from slurmdbd", lambda: administer(environment, "list", "cluster").returncode == 0)
    done = administer(environment, "add", "cluster", CLUSTER)
    if done.returncode != 0:
        raise SandboxError(f"sacctmgr add cluster failed: {daemons.last_line(done.stderr or done.stdout)}")


def create_database(folder: Path) -> None:
    """Create MariaDB's system tables anew, with this user as administrator.

    Raises:
        SandboxError: mariadb-install-db failed.
    """
    for name in (DATABASE, TEMPORARY):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / TEMPORARY).mkdir()
    (folder / SOCKET).unlink(missing_ok=True)  # left by a sandbox that did not stop cleanly
    access = ("--auth-root-authentication-method=socket", f"--auth-root-socket-user={getpass.getuser()}")
    options = (*database_options(folder), *access, "--skip-test-db", "--skip-name-resolve")
    program = shutil.which("mariadb-install-db", path=daemons.SEARCH_PATH)
    assert program is not None
    log = folder / "log/mariadb-install-db.out"
    with log.open("wb") as output:
        done = subprocess.run(
            [program, "--no-defaults", *options],
            env={**os.environ, "PATH": daemons.SEARCH_PATH},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        errors = [line for line in log.read_text(errors="replace").splitlines() if "ERROR" in line]
        reason = errors[0] if errors else "it printed no error"
        raise SandboxError(f"mariadb-install-db failed with {done.returncode}: {reason} (see {log})")


def database_options(folder: Path) -> list[str]:
    """Return the options that each program of MariaDB needs.

    MariaDB deletes all files of its kind from its temporary folder when it starts, those of others that run too, so
    this sandbox has one to itself.
    """
    # Without this option, MariaDB refuses to run as root.
    user = ["--user=root"] if os.geteuid() == 0 else []
    return [*user, f"--datadir={folder / DATABASE}", f"--tmpdir={folder / TEMPORARY}", *SIZES]


def administer(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run sacctmgr without confirmation prompts."""
    return subprocess.run(
        ["sacctmgr", "--immediate", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
