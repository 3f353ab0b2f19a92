"""Where the pipeline runs: image, endpoints, resources. Read from the environment, fixed when the pipeline is compiled."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Self

from components import IMAGE
from ffn.errors import FFNError

PASSED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "FFN_ARTIFACTS")
"""Variables a cluster's steps get as they stand in the compiling environment. Secrets are not among them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every field is read from the environment variable FFN_<FIELD> by `from_environment`."""

    image: str = IMAGE
    """Image of the steps; by digest on a cluster, because KFP's cache does not see what a tag resolves to."""
    checkpoints: str = "/mnt/checkpoints"
    """Durable folder for the state of every epoch."""
    gpu: str = "nvidia.com/gpu"
    """Kind of accelerator."""
    gpus: int = 1
    """Accelerators of a training or evaluating step; 0 for none."""
    cpu: str = "8"
    """CPU limit of a training or evaluating step."""
    memory: str = "32Gi"
    """Memory limit of a training or evaluating step."""
    light_cpu: str = "2"
    """CPU limit of every other step."""
    light_memory: str = "8Gi"
    """Memory limit of every other step."""
    parallelism: int = 0
    """Streams of a protocol that train at once; 0 for all."""
    local: bool = False
    """Compiled for this machine: no resources are asked for, and every step with an output worth keeping is cached."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of every step."""

    @classmethod
    def from_environment(cls) -> Self:
        """The settings of a cluster. Raises `FFNError` for a value of the wrong type."""
        given = {}
        for item in fields(cls):
            text = os.environ.get(f"FFN_{item.name.upper()}")
            if text is None or item.name in ("local", "environment"):
                continue
            if item.type is int and not text.isdigit():
                raise FFNError(f"FFN_{item.name.upper()}={text!r}: expected a whole number")
            given[item.name] = int(text) if item.type is int else text
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        return cls(**given, environment=passed)  # type: ignore[arg-type]
