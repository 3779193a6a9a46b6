"""A PostgreSQL of the test's own: `with running_postgres() as url`."""

import glob
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from http_tools import wait_for
from redis_tools import free_ports


@contextmanager
def running_postgres() -> Iterator[str]:
    """Its URL. It refuses to run as root, so it is then another user's; pytest's folders are closed to that one."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb")) or list(filter(None, [shutil.which("initdb")]))
    if not found:
        pytest.skip("PostgreSQL is not installed (no initdb in /usr/lib/postgresql/*/bin)")
    pytest.importorskip("psycopg")
    programs = Path(found[-1]).parent
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        account = next((each for each in pwd.getpwall() if each.pw_name in ("postgres", "nobody")), None)
        if account is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user `postgres` or `nobody`")
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="soma-postgres-") as name, open(Path(name, "log"), "wb") as log:
        data = Path(name, "data")
        data.mkdir()
        if user:
            os.chown(name, account.pw_uid, account.pw_gid)
            os.chown(data, account.pw_uid, account.pw_gid)

        def start(program: str, *arguments: str) -> "subprocess.Popen[bytes]":
            return subprocess.Popen([programs / program, *arguments], stdout=log, stderr=log, cwd="/", **user)

        def words() -> str:
            return Path(name, "log").read_text()

        made = start("initdb", "-D", str(data), "-U", "soma", "-A", "trust", "--no-sync")
        assert made.wait(120) == 0, words()
        (port,) = map(str, free_ports(1))
        server = start("postgres", "-D", str(data), "-p", port, "-h", "127.0.0.1", "-k", str(data), "-c", "fsync=off")
        try:
            ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", port]
            assert wait_for(lambda: subprocess.run(ready, check=False).returncode == 0), words()
            yield f"postgresql://soma@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: nothing of it is needed
            server.wait(60)


def new_database(url: str) -> str:
    """The URL of an empty database of that server."""
    import psycopg

    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(url, autocommit=True) as link:
        link.execute(f"CREATE DATABASE {name}")
    return url.rpartition("/")[0] + "/" + name
