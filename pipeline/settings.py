"""Where the pipeline runs: image, volumes, secrets, resources. Fixed when the pipeline is compiled.

Read from the environment, which `pipeline/clusterfile.py` fills in from a file.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self
from urllib.parse import urlsplit

from components import IMAGE
from ffn.config import Policy
from ffn.errors import FFNError

PASSED_ON = (
    "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_S3_ENDPOINT_URL", "FFN_ARTIFACTS",
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "FFN_KFP_UI", "FFN_MLFLOW_UI",
)  # fmt: skip
"""Variables a cluster's steps get as they stand in the compiling environment. Secrets are not among them."""

NAME = "ffn"
"""Of the pipeline."""

DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[EPTGMK]i?)?")


@dataclass(frozen=True, kw_only=True)
class Toleration:
    """A taint that pods put up with: `key`, `key=value`, `key:effect` or `key=value:effect`."""

    key: str
    value: str = ""
    effect: str = ""
    """Empty for every effect."""

    @classmethod
    def parse(cls, text: str, name: str = "FFN_TOLERATIONS") -> Self:
        """Raises `FFNError`, of what is called `name`, where there is no key, or the effect is none of Kubernetes'."""
        rest, _, effect = text.partition(":")
        key, _, value = rest.partition("=")
        if not key or effect not in ("", "NoSchedule", "PreferNoSchedule", "NoExecute"):
            raise FFNError(f"{name}: {text!r}: expected KEY[=VALUE][:NoSchedule|PreferNoSchedule|NoExecute]")
        return cls(key=key, value=value, effect=effect)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every field is the key of its name in a cluster's file, and the environment variable FFN_<FIELD>.

    Heavy steps are train, evaluate and gate, light ones the rest.
    """

    image: str = IMAGE
    """Image of the steps; by digest on a cluster, so that what ran can be told afterwards."""
    pull_secret: str = ""
    """Kubernetes Secret to pull the image with."""
    checkpoints: str = ""
    """`s3://BUCKET/PREFIX`, or the folder where a volume is mounted, for states, sets and scores; a cluster's has no default."""
    checkpoints_claim: str = ""
    """PersistentVolumeClaim (ReadWriteMany) mounted in that folder."""
    data: str = "/mnt/data"
    """Folder with recordings, read by ingest."""
    data_claim: str = ""
    """PersistentVolumeClaim mounted there."""
    mlflow_secret: str = ""
    """Kubernetes Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    s3_secret: str = ""
    """Kubernetes Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""
    webhook_secret: str = ""
    """Kubernetes Secret with FFN_WEBHOOK, the address that is told of a run's end and of a new champion, in Slack's JSON."""
    ca: str = ""
    """ConfigMap with ca.crt, the authorities that MLflow and S3 are to be trusted by, in place of the public ones."""
    gpu: str = "nvidia.com/gpu"
    """Kind of accelerator: the name of the resource that nodes offer."""
    gpus: int = 1
    """Accelerators of a training; an evaluation and a gate take one; 0 for none."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Labels of the nodes for heavy steps."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that heavy steps put up with, each `key=value:effect` or {key, value, effect}."""
    shm: str = "8Gi"
    """Size of /dev/shm of a heavy step, in memory; what is written there counts as the step's memory."""
    cpu: str = "8"
    """CPU of a heavy step, request and limit."""
    memory: str = "32Gi"
    """Memory of a heavy step, request and limit."""
    light_cpu: str = "2"
    """CPU limit of a light step; half a core is requested."""
    light_memory: str = "8Gi"
    """Memory limit of a light step; 2Gi are requested."""
    parallelism: int = 0
    """Streams of each protocol that train at once; 0 for all."""
    retries: int = 2
    """How often a step that died is begun again in its pod, and a lost pod made again; a training goes on after its last epoch."""
    hours: int = 72
    """Time limit of a heavy step's pod, with all the attempts in it; waiting for a node does not count."""
    light_hours: int = 6
    """Time limit of a light step's pod."""
    promote: bool = False
    """Whether a run makes what its gate lets through champion itself, where the steps' account may; else a person does."""
    floor: float = Policy.floor
    """Least top-1, a fraction, that the gate asks of a challenger, of a first version too."""
    margin: float = Policy.margin
    """What its top-1 must be above the champion's; below zero what it may lose."""
    significance: float = Policy.significance
    """A paired test that finds it worse with a p below this holds it, whatever the margin."""
    class_drop: float = Policy.class_drop
    """What the recall of a class may fall by; more, and significantly so, holds it."""
    local: bool = False
    """Compiled for this machine: no resources are asked for, and every step with an output worth keeping is cached."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of every step."""

    @classmethod
    def from_environment(cls) -> Self:
        """The settings of a cluster: text and numbers as they are, 0 or 1, `key=value` and tolerations with commas between.

        Raises `FFNError` for a value of the wrong form, and for a password in a passed-on URL.
        """
        given: dict[str, object] = {}
        for item in named():
            name = f"FFN_{item.name.upper()}"
            if (text := os.environ.get(name)) is not None:
                given[item.name] = parsed(item, name, text)
        passed = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
        for name, value in passed.items():
            if urlsplit(value).password:
                raise FFNError(f"{name} holds a password, which a compiled pipeline would show; name a Secret in FFN_MLFLOW_SECRET")
        return cls(**given, environment=passed)  # type: ignore[arg-type]  # each made by its field's type above

    def __post_init__(self) -> None:
        Policy(**self.policy)  # its checks

    @property
    def policy(self) -> dict[str, float]:
        """The fields of the gate's `Policy`."""
        return {item.name: getattr(self, item.name) for item in fields(Policy)}

    @property
    def states_claim(self) -> str:
        """The claim of the durable store; empty where that is an object store."""
        return "" if self.checkpoints.startswith("s3://") else self.checkpoints_claim

    @property
    def store(self) -> str:
        """Where steps keep what other runs may use again; nowhere on one machine, whose kfp finds it."""
        return "" if self.local else self.checkpoints

    @property
    def pinned(self) -> bool:
        """Whether the image is named by digest."""
        return bool(DIGEST.search(self.image))


def policy() -> Policy:
    """The gate's policy of this environment, for what runs on this machine."""
    given = {item.name: os.environ.get(f"FFN_{item.name.upper()}") for item in fields(Policy)}
    return Policy(**{name: number(f"FFN_{name.upper()}", text) for name, text in given.items() if text is not None})


def number(name: str, text: str) -> float:
    """Raises `FFNError` where the variable's text is no number."""
    try:
        return float(text)
    except ValueError:
        raise FFNError(f"{name}={text!r}: expected a fraction, as 0.5") from None


QUANTITIES = ("shm", "cpu", "memory", "light_cpu", "light_memory")
"""Fields that are Kubernetes' quantities."""


def named() -> list[Field[Any]]:
    """The fields that a cluster's settings consist of."""
    return [item for item in fields(Settings) if item.name not in ("local", "environment")]


def parsed(item: Field[Any], name: str, text: str) -> object:
    """The field's value of its text. Raises `FFNError`, of what is called `name`, where it has the wrong form."""
    if item.type is bool and text not in ("0", "1"):
        raise FFNError(f"{name}={text!r}: expected 0 or 1")
    if item.type is int and not text.isdigit():
        raise FFNError(f"{name}={text!r}: expected a whole number")
    if item.name in QUANTITIES and not QUANTITY.fullmatch(text):
        raise FFNError(f"{name}={text!r}: expected a quantity such as 8, 500m, 32Gi")
    if item.name == "tolerations":
        return tuple(Toleration.parse(part.strip(), name) for part in text.split(",") if part.strip())
    if item.name == "node_selector":
        return _pairs(name, text)
    if item.type is float:
        return number(name, text)
    return item.type(int(text)) if item.type in (int, bool) else text


def _pairs(name: str, text: str) -> dict[str, str]:
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise FFNError(f"{name}: {part!r}: expected KEY=VALUE")
        found[key] = value
    return found
