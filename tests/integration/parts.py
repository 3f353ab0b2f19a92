"""The parts of compose.yaml as processes of this machine: PostgreSQL, an S3 server, MLflow with accounts.

Commands and settings are read from compose.yaml and the files it names; only ports and folders are this test's.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.conftest import env_file

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
BIN = Path(sys.executable).parent
SECRETS = {
    "database.env": {"PGPASSWORD": "of the database"},
    "s3.env": {"AWS_SECRET_ACCESS_KEY": "of-the-store"},
    "accounts.env": {
        "MLFLOW_AUTH_ADMIN_PASSWORD": "of the administrator", "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the sessions",
        "MLFLOW_CLIENTS": "pipeline:of the pipeline,promoter:of who promotes,serving:of the serving pods",
    },
}  # fmt: skip
"""What an operator fills in."""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def until_open(port: int, process: "subprocess.Popen[bytes]", log: Path, seconds: float = 60) -> None:
    """Wait until something listens at the port; fail with the process's log where it ends before."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if listens(port):
            return
        time.sleep(0.05)
    pytest.fail(f"nothing listens at {port}:\n{log.read_text(errors='replace')[-3000:]}")


@dataclass(kw_only=True)
class Parts:
    """The parts, each started and stopped by its name."""

    root: Path
    postgres: Path
    """Folder with PostgreSQL's programs."""
    ports: Mapping[str, int] = field(default_factory=lambda: {name: free_port() for name in ("postgres", "s3", "mlflow")})
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def settings(self, service: str) -> dict[str, str]:
        """The environment that compose gives a service, with this machine's addresses."""
        files = COMPOSE[service]["env_file"]
        found: dict[str, str] = {}
        for name in [files] if isinstance(files, str) else files:
            path = ROOT / (name if name.endswith("mlflow.env") else f"{name}.example")
            found |= env_file(path) | SECRETS.get(Path(name).name, {})
        here = {
            "PGHOST": "127.0.0.1", "PGPORT": str(self.ports["postgres"]), "MLFLOW_HOST": "127.0.0.1",
            "MLFLOW_PORT": str(self.ports["mlflow"]), "MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "k8s/base/basic_auth.ini"),
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3']}",
        }  # fmt: skip
        return found | {name: value for name, value in here.items() if name in found}

    def environment(self, service: str, **more: str) -> dict[str, str]:
        """The same beside what a process of this machine needs to run at all."""
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
        return {"PATH": path, "HOME": str(self.root), "TMPDIR": str(self.root), **self.settings(service), **more}

    def command(self, service: str) -> list[str]:
        """What compose runs, with this machine's folders and ports."""
        said: Sequence[str] = COMPOSE[service].get("command") or COMPOSE[service]["entrypoint"]
        address = f"127.0.0.1:{self.ports['s3']}"
        places = {"/etc/mlflow": str(ROOT / "k8s/base"), "/data": str(self.root / "s3"), ":9000": address, "$$": "$"}
        for old, new in places.items():
            said = [word.replace(old, new) for word in said]
        return list(said)

    def start(self, service: str, **more: str) -> None:
        """Start a service and wait until it listens."""
        command = self._postgres() if service == "postgres" else self.command(service)
        user = {"user": "postgres", "group": "postgres"} if service == "postgres" and os.geteuid() == 0 else {}
        log = self.root / f"{service}.log"
        with log.open("ab") as out:
            self.running[service] = subprocess.Popen(
                command,
                env=self.environment(service, **more),
                cwd=self.root,
                stdout=out,
                stderr=out,
                start_new_session=True,
                **user,
            )
        until_open(self.ports[service], self.running[service], log)
        while service == "postgres" and self.run("pg_isready", check=False).returncode:  # it listens before it has recovered
            time.sleep(0.05)

    def stop(self, service: str) -> None:
        """End a service at once, as a node that fails does."""
        process = self.running.pop(service)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        while service in self.ports and listens(self.ports[service]):  # its own children take a moment longer
            time.sleep(0.05)
        if service == "postgres":
            (self.root / "postgres" / "postmaster.pid").unlink(missing_ok=True)

    def run(self, *command: str, database: str = "", check: bool = True) -> "subprocess.CompletedProcess[str]":
        """A program of PostgreSQL's, or `prepare`, with the settings of the server."""
        words = [str(self.postgres / command[0]), *command[1:]] if (self.postgres / command[0]).exists() else list(command)
        more = {"PGDATABASE": database} if database else {}
        done = subprocess.run(words, env=self.environment("mlflow", **more), cwd=self.root, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    def client(self, account: str = "pipeline") -> dict[str, str]:
        """The environment of a client with that account, which gives up soon."""
        accounts = dict(pair.split(":") for pair in SECRETS["accounts.env"]["MLFLOW_CLIENTS"].split(","))
        return {
            "MLFLOW_TRACKING_URI": self.uri, "MLFLOW_TRACKING_USERNAME": account, "MLFLOW_TRACKING_PASSWORD": accounts[account],
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
        }  # fmt: skip

    def _postgres(self) -> list[str]:
        return [
            str(self.postgres / "postgres"), "-D", str(self.root / "postgres"), "-p", str(self.ports["postgres"]),
            "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(self.root),
        ]  # fmt: skip

    def make_database(self) -> None:
        """What PostgreSQL's image does at its first start."""
        settings = self.settings("mlflow")
        password = self.root / "password"
        password.write_text(settings["PGPASSWORD"])
        user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        arguments = COMPOSE["postgres"]["environment"]["POSTGRES_INITDB_ARGS"].split()
        subprocess.run(
            [
                str(self.postgres / "initdb"), "-D", str(self.root / "postgres"), "-U", settings["PGUSER"], f"--pwfile={password}",
                "--encoding=UTF8", "--locale=C.UTF-8", *arguments,
            ],
            check=True, capture_output=True, cwd=self.root, env={"PATH": os.environ["PATH"]}, **user,
        )  # fmt: skip


@contextlib.contextmanager
def parts() -> Iterator[Parts]:
    """All parts but MLflow's server, started and prepared; skips where one is not installed."""
    pytest.importorskip("psycopg")
    pytest.importorskip("flask_wtf")
    found = [Path(path).resolve().parent for name in ("initdb", "postgres") if (path := shutil.which(name))]
    found += sorted(path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed")
    if not shutil.which("rclone", path=os.pathsep.join([str(BIN), os.environ.get("PATH", "")])):
        pytest.skip("rclone is not installed")
    # Not pytest's folder: PostgreSQL refuses to run as root, and its own user may not look into a folder of root's.
    root = Path(tempfile.mkdtemp(prefix="ffn-parts-"))
    if os.geteuid() == 0:
        shutil.chown(root, "postgres", "postgres")
    here = Parts(root=root, postgres=found[0])
    try:
        here.make_database()
        here.start("postgres")
        here.run("createdb", here.settings("mlflow")["PGDATABASE"], database="postgres")
        here.start("s3")
        yield here
    finally:
        for service in list(here.running):
            here.stop(service)
        shutil.rmtree(root, ignore_errors=True)
