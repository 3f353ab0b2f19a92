"""What a step needs, tried: its network library and device, a scratch folder, MLflow, and in a pod the folders of a run.

`ffn health` tells a person. `python -m pipeline.health` is what `ffn cluster check` runs in a pod: there it also asks what the
pod's account may do, and leaves one JSON object where whoever may see the pod can read it.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

POLICY_SECONDS = 3.0
"""Network rules are enforced up to some seconds after a pod's start, whether they open a way or close it."""
PATIENCE = 15.0
"""How long what another machine answers is tried again."""

SAID = 300
"""Characters of an answer: Kubernetes keeps 4096 bytes of what a container leaves."""

Part = tuple[str, bool, str]
"""What, whether it works, what there is to say of it."""


def examine() -> list[Part]:
    """Every part that a step needs, tried once."""
    parts = (("torch", _torch), ("scratch", _scratch), ("MLflow", _mlflow), ("states", _states), ("data", _data))
    return [_tried(name, part) for name, part in parts]


def report(rights: Sequence[dict[str, str]]) -> dict[str, Any]:
    """What a pod tells: `parts` as `examine` has them, MLflow's `version`, and which of the `rights` its account has.

    A right is a `resourceAttributes` of Kubernetes' API; the answers are null where it cannot be asked.
    """
    began = time.monotonic()
    parts = [_tried("torch", _torch), _tried("scratch", _scratch)]
    time.sleep(max(0.0, began + POLICY_SECONDS - time.monotonic()))
    allowed: list[bool | None] = [None] * len(rights)

    def kubernetes() -> str:
        where, allowed[:] = _allowed(rights)
        return where

    parts.append(_patiently("Kubernetes", kubernetes))
    for name, variable, part in (
        ("MLflow", "MLFLOW_TRACKING_URI", _mlflow), ("states", "FFN_CHECKPOINTS", _states), ("data", "FFN_DATA", _data),
    ):  # fmt: skip
        if variable in os.environ:
            parts.append(_patiently(name, part))
    return {
        "parts": [(name, works, said[:SAID]) for name, works, said in parts],
        "version": _mlflow_version() if _works(parts, "MLflow") else "",
        "rights": allowed,
    }


def _works(parts: Sequence[Part], wanted: str) -> bool:
    return any(works for name, works, _ in parts if name == wanted)


def _tried(name: str, part: Callable[[], str]) -> Part:
    try:
        return name, True, part()
    except Exception as error:  # whatever it is, a step would meet it
        return name, False, _cause(error)


def _patiently(name: str, part: Callable[[], str]) -> Part:
    until = time.monotonic() + PATIENCE
    while not (found := _tried(name, part))[1] and time.monotonic() < until:
        time.sleep(1.0)
    return found


def _cause(error: Exception) -> str:
    """The first line; of what urllib3 says of its own doings the cause, which comes last."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"""^\w+\(["'](.*)["']\)+$""", r"\1", line.rpartition("(Caused by ")[2])


def _torch() -> str:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.ones(2, 2, device=device).matmul(torch.ones(2, 2, device=device)).sum().item()
    where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if device.type == "cuda" else "CPU"
    return f"{torch.__version__} on {where}"


def _scratch() -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x")
        file.flush()
        return str(Path(file.name).parent)


def _mlflow() -> str:
    if not (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        return "MLFLOW_TRACKING_URI is not set"
    # A person or a probe waits for this.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    MlflowClient().search_experiments(max_results=1)
    return uri.rpartition("@")[2]  # without a password


def _mlflow_version() -> str:
    """The server's; empty where it is no server, or one that does not tell."""
    import requests

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith("http"):
        return ""
    account = os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    try:
        answer = requests.get(f"{uri.rstrip('/')}/version", auth=account if account[0] else None, timeout=10)
    except requests.RequestException:
        return ""
    return answer.text.strip() if answer.ok and len(answer.text) < 40 else ""


def _states() -> str:
    """Where trainings keep the state of every epoch: a store that answers, or in a pod a folder that can be written to."""
    from components import cluster, storage

    uri = os.environ.get("FFN_CHECKPOINTS", "")
    if storage.remote(uri):
        storage.reach(uri)
        return uri
    if not uri or not cluster.inside():  # elsewhere the folder is not this machine's
        return "FFN_CHECKPOINTS names none"
    with _as_we_are(Path(uri)), tempfile.NamedTemporaryFile(dir=uri, prefix=".ffn-check-") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    return f"{uri}, written to as {_us()}"


def _data() -> str:
    """Where ingest finds recordings: in a pod, a folder that can be read."""
    from components import cluster

    folder = os.environ.get("FFN_DATA", "")
    if not folder or not cluster.inside():
        return "FFN_DATA names none"
    with _as_we_are(Path(folder)):
        return f"{folder}, {len(os.listdir(folder))} entries"


@contextlib.contextmanager
def _as_we_are(folder: Path) -> Iterator[None]:
    """Says of a folder that refuses us whose it is, and who we are."""
    try:
        yield
    except PermissionError:
        found = folder.stat()
        owner = f"{found.st_uid}:{found.st_gid}, mode {found.st_mode & 0o7777:o}"
        raise PermissionError(f"{folder} belongs to {owner}; steps are {_us()}") from None


def _us() -> str:
    return f"{os.getuid()}:{os.getgid()}"


def _allowed(rights: Sequence[dict[str, str]]) -> tuple[str, list[bool | None]]:
    """Where Kubernetes' API answers, and which of the rights our own account has; whoever we are may ask that."""
    from kubernetes.client import AuthorizationV1Api

    from components import kube

    api = kube.account()

    def allowed(spec: dict[str, Any]) -> bool:
        answer = kube.ask(AuthorizationV1Api(api).create_self_subject_access_review, {"spec": spec})
        return bool(answer["status"].get("allowed"))

    allowed({"nonResourceAttributes": {"path": "/version", "verb": "get"}})  # it answers, whatever it says
    return str(api.configuration.host), [allowed({"resourceAttributes": right}) for right in rights]


def main() -> None:
    """The report, on stdout and where Kubernetes takes it from."""
    from components import cluster

    told = json.dumps(report(json.loads(sys.argv[1])))
    print(told, flush=True)
    cluster.leave_word(told)


if __name__ == "__main__":
    main()
