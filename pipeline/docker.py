"""Steps in containers on this machine: each one a `docker run` of the image.

Workspace and recordings are mounted where they are and the network is the machine's, so that paths and addresses are the same
inside and outside. The root file system is read-only, the user is the one who runs the pipeline.
"""

import contextlib
import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ffn.errors import FFNError

RUN = "ffn.run"
"""Label of a container: the run, as the folder of its logs, that it belongs to."""

PASSED = re.compile(r"(AWS|FFN|MLFLOW|OMP)_\w+|(https?|no)_proxy", re.IGNORECASE)
"""Variables of the environment that a step gets."""

FILES = ("AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "MLFLOW_TRACKING_SERVER_CERT_PATH")
"""Those that name a file, which is mounted too."""


@dataclass(frozen=True, kw_only=True)
class Containers:
    """How the steps of one run become containers."""

    image: str
    id: str
    """Digest of what the image's name means now."""
    commit: str
    """The commit that the image was built from, as its label says."""
    writable: Path
    """The workspace."""
    readable: tuple[Path, ...]
    run: str
    options: tuple[str, ...]
    """What this engine needs to be told."""

    @classmethod
    def of(cls, image: str, *, workspace: Path, source: Path | None, run: str) -> Self:
        """Raises `FFNError` where no engine answers, or there is no such image."""
        engine = json.loads(_docker("info", "--format", "{{json .}}"))
        if errors := engine.get("ServerErrors"):
            raise FFNError(f"docker: {errors[0]}; start the engine, or name it in DOCKER_HOST")
        said = json.loads(_docker("image", "inspect", "--format", "{{json .}}", image, image=image))
        named = [Path(os.environ[name]) for name in FILES if os.environ.get(name)]
        return cls(
            image=image,
            id=said["Id"],
            commit=(said["Config"].get("Labels") or {}).get("org.opencontainers.image.revision", "unknown"),
            writable=workspace,
            readable=tuple(path.resolve() for path in (source, *named) if path and path.exists()),
            run=run,
            options=_options(engine),
        )

    def command(self, name: str, command: Sequence[str], variables: Iterable[str]) -> list[str]:
        """`command` as the container `name`; `variables` are names, their values stay off the command line."""
        mounts = [_mount(self.writable), *(_mount(path, "readonly") for path in self.readable)]
        return [
            "docker", "run", "--rm", "--name", name, "--label", f"{RUN}={self.run}",
            "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
            "--network", "host", "--shm-size", "1g", *self.options,
            *(part for mount in mounts for part in ("--mount", mount)),
            *(part for variable in sorted(variables) for part in ("--env", variable)),
            self.id, *command,
        ]  # fmt: skip

    def terminate(self, name: str) -> None:
        """SIGTERM to every process of the container but its first: that is KFP's shell, which would not pass it on."""
        _start("exec", name, "sh", "-c", "kill -TERM -1")

    def kill(self, name: str) -> None:
        _start("rm", "--force", name)

    def sweep(self) -> None:
        """End the containers that a killed run of this name left."""
        if left := _docker("ps", "--all", "--quiet", "--filter", f"label={RUN}={self.run}").split():
            _docker("rm", "--force", *left)


def container_name() -> str:
    """A name that no other container has."""
    return f"ffn-{uuid.uuid4().hex[:12]}"


def variables(environment: Mapping[str, str]) -> set[str]:
    """Names of the variables of this process and of `environment` that a step gets."""
    return {name for name in os.environ if PASSED.fullmatch(name)} | set(environment)


def _options(engine: Mapping[str, Any]) -> tuple[str, ...]:
    security = " ".join(engine.get("SecurityOptions") or ())
    # Who is root inside a rootless engine's container is the caller outside.
    user = "0:0" if "name=rootless" in security else f"{os.getuid()}:{os.getgid()}"
    options = ["--user", user]
    if "name=selinux" in security:
        options += ["--security-opt", "label=disable"]
    if "nvidia" in (engine.get("Runtimes") or {}):
        options += ["--gpus", "all"]
    return tuple(options)


def _mount(path: Path, *how: str) -> str:
    fields = ["type=bind", f"source={path}", f"target={path}", *how]
    return ",".join('"' + field.replace('"', '""') + '"' for field in fields)


def _docker(*arguments: str, image: str = "") -> str:
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FFNError("docker: no such command; install a container engine, or leave out --runner docker") from None
    if done.returncode == 0:
        return done.stdout
    said = (done.stderr.strip().splitlines() or ["(nothing)"])[-1]
    if image and "no such" in said.lower():
        raise FFNError(f"no image {image} on this machine; `make images` builds it, or pull it, or name another in FFN_IMAGE")
    raise FFNError(f"docker {arguments[0]}: {said}; start the engine, or name it in DOCKER_HOST")


def _start(*arguments: str) -> None:
    """Without waiting: a signal is on its way, and its container may be gone."""
    with contextlib.suppress(OSError):
        subprocess.Popen(["docker", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
