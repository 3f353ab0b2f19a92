"""What a step needs, tried: its network library and device, a scratch folder, MLflow and the object store where they are named."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def examine() -> list[tuple[str, bool, str]]:
    """(what, whether it works, what there is to say of it)."""
    parts = (("torch", _torch), ("scratch", _scratch), ("MLflow", _mlflow), ("store", _store))
    return [(name, *_tried(part)) for name, part in parts]


def _tried(part: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, part()
    except Exception as error:  # whatever it is, a step would meet it
        return False, (str(error).strip().splitlines() or [type(error).__name__])[0]


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


def _store() -> str:
    from components import storage

    if not storage.remote(uri := os.environ.get("FFN_CHECKPOINTS", "")):
        return "FFN_CHECKPOINTS names none"
    storage.reach(uri)
    return uri
