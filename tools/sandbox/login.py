"""A real SSH server on this machine, to try a launch that reaches its cluster through a login node.

    sudo python3 tools/sandbox/login.py install   # Debian's openssh-server and rsync, if missing
    eval "$(bash tools/slurm_sandbox.sh start /tmp/slurm)"
    python3 tools/sandbox/login.py start DIR      # prints the options for ``rlpt launch``
    python3 tools/sandbox/login.py stop DIR       # stops it

DIR (mode 0700) holds everything: generated keys, configuration, log (``log/``), process ID (``processes.json``). The
server listens on this machine only, on a free port, and admits the user who started it, with the key ``DIR/key``.
Sessions use the Slurm that ``SLURM_CONF`` names at the start. A regular SSH server of the machine is not affected.

nemo-run copies with rsync, which runs ssh, which must know the server's key: put ``DIR/bin``, which has such an ssh,
first on the PATH.

Only Python's standard library is used. Exit codes: 0 done, 1 with one line on standard error.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

from daemons import (
    SEARCH_PATH,
    SandboxError,
    command_line,
    end_daemons,
    free_ports,
    install_packages,
    launch,
    prepare,
    require_free,
    require_installed,
    require_sandbox,
    wait_for,
)

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync")
SEPARATION = Path("/run/sshd")
"""Folder that Debian's sshd requires when root starts it."""

CONFIGURATION = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
# DIR may be in a folder that others can write to, such as /tmp.
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowUsers {user}
{environment}
"""

CLIENT = """\
#!/bin/sh
exec {ssh} -o UserKnownHostsFile={folder}/known_hosts "$@"
"""


def install() -> None:
    """Install the Debian packages."""
    install_packages("An SSH server", PROGRAMS, ["openssh-server", "openssh-client", "rsync"])


def start(folder: Path) -> str:
    """Start the server in ``folder``, which is created, and wait until it answers.

    Returns:
        Overrides of a cluster file for it.

    Raises:
        SandboxError: it is not installed, ``folder`` cannot be used or is in use, or the server did not start, in
            which case it is stopped.
    """
    require_installed("An SSH server", PROGRAMS)
    if re.search(r"[\s\"'\\%]", str(folder)):
        raise SandboxError(f"{folder} has a space, a quote, a backslash or a % in its path; use another")
    require_free(folder, "sshd_config")
    prepare(folder, ("log", "bin"))
    if os.geteuid() == 0:
        SEPARATION.mkdir(exist_ok=True)
    for name in ("host_key", "key"):
        make_key(folder / name)
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    (port,) = free_ports(1)
    slurm = os.environ.get("SLURM_CONF")
    environment = f"SetEnv SLURM_CONF={slurm}" if slurm else ""
    text = CONFIGURATION.format(port=port, folder=folder, user=getpass.getuser(), environment=environment)
    (folder / "sshd_config").write_text(text)
    kind, key = (folder / "host_key.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    client = folder / "bin/ssh"
    client.write_text(CLIENT.format(ssh=shutil.which("ssh", path=SEARCH_PATH), folder=folder))
    client.chmod(0o755)
    try:
        launch(folder, "sshd", "-D", "-e", "-f", str(folder / "sshd_config"))
        wait_for(folder, "answer from sshd", lambda: answers(port))
    except BaseException:
        end_daemons(folder)
        raise
    values = {"host": "127.0.0.1", "port": port, "user": getpass.getuser(), "identity": folder / "key"}
    return " ".join(f"--set tunnel.{name}={value}" for name, value in values.items())


def stop(folder: Path) -> None:
    """Stop the server of ``folder``.

    Raises:
        SandboxError: there is no sandbox in ``folder``, or the server did not end.
    """
    require_sandbox(folder, "sshd_config")
    end_daemons(folder)


def make_key(path: Path) -> None:
    """Create a key without a passphrase, replacing an existing one.

    Raises:
        SandboxError: ssh-keygen failed.
    """
    path.unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "sandbox", "-f", str(path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise SandboxError(f"ssh-keygen failed with {done.returncode}: {done.stderr.strip()}")


def answers(port: int) -> bool:
    """Return whether the server answers connections."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def main() -> None:
    """Entry point of the script."""
    helps = (
        "install Debian's packages if missing (root)",
        "start it and wait until it answers",
        "stop it",
    )
    command_line("A real SSH server on this one machine.", helps, install, start, stop)


if __name__ == "__main__":
    main()
