"""Configuration as data: frozen dataclasses, and the paper's table rows as named values.

Standard library only, so that compiling the pipeline never imports torch.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ffn.errors import FFNError

STREAMS: dict[str, str] = {"j": "joint", "b": "bone", "jm": "joint motion", "bm": "bone motion"}
"""Stream name -> what it is, in the order of the paper's fusion."""

FUSIONS: dict[str, dict[str, float]] = {
    "2s": {"j": 1.0, "b": 1.0},
    "4s": {"j": 1.0, "b": 1.0, "jm": 0.5, "bm": 0.5},
}
"""Fusion name -> stream weights. Source: section 4 of the paper (1:1 and 1:1:0.5:0.5)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: which module stands in each place of the ten basic blocks."""

    network: Literal["ffn", "st-gcn++", "2s-agcn", "aagcn", "ctr-gcn", "ms-g3d"] = "ffn"
    """`ffn`, or a rival of Table 8: of the fields below a rival knows `width` only."""
    spatial: Literal["gcn", "esf"] = "gcn"
    """`gcn`: ST-GCN's graph convolution; `esf`: ESF-GCN (section 2.1)."""
    temporal: Literal["tcn", "msf"] = "tcn"
    """`tcn`: one 9x1 convolution; `msf`: MSF-TCN (section 2.2)."""
    attention: Literal["none", "cvsta", "drop", "mscam", "aff"] = "none"
    """What follows MSF-TCN (sections 2.3 and 3.4)."""
    alpha: float = 0.2
    """Weight of the original features that the spatial shift subtracts (Eq. 2)."""
    reduction: int = 1
    """Channel compression r of MS-CAM."""
    width: int = 64
    """Channels of the first stage; doubled where the stride is 2."""
    depths: tuple[int, ...] = (4, 3, 3)
    """Blocks per stage."""
    dropout: float = 0.0
    """Dropout before the classifier."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How a recording becomes a clip."""

    frames: int = 100
    """Frames of a clip, T."""
    persons: int = 2
    """Persons of a clip, M; missing ones are zeros."""
    sampling: Literal["uniform", "random"] = "uniform"
    """Which frames make a clip: `uniform` is MMAction2's rule; `random` stretches a short recording instead of going round."""
    test_clips: int = 10
    """Clips per recording at test; their probabilities are averaged."""
    rotate: float = 0.0
    """Training: largest random rotation about each axis (3D) or in the image plane (2D), radians."""
    scale: float = 0.0
    """Training: each axis is scaled by a factor drawn from [1 - scale, 1 + scale]."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training loss (section 2.4)."""

    name: Literal["cross_entropy", "focal", "poly", "two_stage"] = "cross_entropy"
    gamma: float = 2.0
    """Exponent of the focal part, Eq. (6)."""
    gamma_hc: float = 2.0
    """Exponent of the high-confidence part, Eq. (7)."""
    cycle_factor: float = 4.0
    """f_c of Eq. (8)."""
    epsilon: float = 1.0
    """Weight of poly-1's first-order term."""
    smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The recipe (section 3.1)."""

    epochs: int = 80
    batch_size: int = 54
    lr: float = 0.048
    """Learning rate at the start of the cosine."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 0
    """Epochs over which the learning rate rises linearly before the cosine."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """All that decides the weights, besides the data, the protocol and the stream."""

    preset: str
    """The row of the paper this started from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the gate asks of a challenger (ffn/gate.py). Fractions."""

    floor: float = 0.5
    """Least top-1, of a first version too."""
    margin: float = 0.0
    """What its top-1 must be above the champion's; below zero what it may lose."""
    significance: float = 0.05
    """A paired test that finds it worse with a p below this holds it, whatever the margin."""
    class_drop: float = 0.2
    """What the recall of a class may fall by; more, and significantly so, holds it. Classes are not corrected for their number: a
    hold costs a look, and `--force` passes it."""

    def __post_init__(self) -> None:
        for name, least, most in (("floor", 0, 1), ("margin", -1, 1), ("significance", 0, 0.5), ("class_drop", 0, 1)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise FFNError(f"gate: {name} is {value}, expected a fraction from {least} to {most}")


def _row(base: Config, preset: str, *, loss: LossConfig | None = None, epochs: int | None = None, **model: Any) -> Config:
    """`base` under another name, with another loss, number of epochs, or fields of the model."""
    return replace(
        base,
        preset=preset,
        model=replace(base.model, **model),
        loss=loss or base.loss,
        training=replace(base.training, epochs=epochs or base.training.epochs),
    )


S0 = Config(preset="S0")  # Table 1, row S0: ST-GCN
S0_FOCAL = _row(S0, "S0-focal", loss=LossConfig(name="focal"))  # Table 6, row S0(Focal Loss)
S0_POLY = _row(S0, "S0-poly", loss=LossConfig(name="poly"))  # Table 6, row S0(Poly Loss)
# Table 6, rows S0(Two-stage Loss-2), -4 and -6; 110 epochs by section 3.1
S0_TWO_STAGE = tuple(
    _row(S0, f"S0-two-stage-{cycle}", loss=LossConfig(name="two_stage", cycle_factor=float(cycle)), epochs=110)
    for cycle in (2, 4, 6)
)
S1 = _row(S0, "S1", spatial="esf")  # Table 1, row S1
S1_ALPHA = tuple(  # Fig. 4, alpha from 0 to 1; 0.2 is S1
    _row(S1, f"S1-alpha{tenth / 10:.1f}", alpha=tenth / 10) for tenth in range(11) if tenth / 10 != S1.model.alpha
)
S0_2 = _row(S0, "S0-2", temporal="msf")  # Table 2, row S0-2
S2 = _row(S1, "S2", temporal="msf")  # Table 2, row S2
S3_CVSTA = _row(S2, "S3-cvsta", attention="cvsta")  # Table 3, row S3(CVSTA)
S3_DROP = _row(S2, "S3-drop", attention="drop")  # Table 3, row S3(Drop-att)
S3_MSCAM = _row(S2, "S3-mscam", attention="mscam")  # Table 3, row S3(MS-CAM)
S3_AFF1 = _row(S2, "S3-aff1", attention="aff")  # Table 3, row S3(AFF-1)
S3_AFF2 = _row(S3_AFF1, "S3-aff2", reduction=2)  # Table 3, row S3(AFF-2)
S3_AFF4 = _row(S3_AFF1, "S3-aff4", reduction=4)  # Table 3, row S3(AFF-4)
S4 = _row(S3_AFF1, "S4", loss=LossConfig(name="two_stage"), epochs=110)  # Table 7, row S4: FFN; Table 8, Proposed
STGCNPP = _row(S0, "ST-GCN++", network="st-gcn++")  # Table 8, row ST-GCN++; the rivals under the recipe of S0
AGCN = _row(S0, "2s-AGCN", network="2s-agcn")  # Table 8, row 2s-AGCN
AAGCN = _row(S0, "AAGCN", network="aagcn")  # Table 8, row AAGCN
CTRGCN = _row(S0, "CTR-GCN", network="ctr-gcn")  # Table 8, row CTR-GCN
MSG3D = _row(S0, "MS-G3D", network="ms-g3d")  # Table 8, row MS-G3D
# Not of the paper: S4 for two CPU cores, a quarter of the width, six blocks, a third of the frames; about 14 ms per clip,
# person and training step of one core. Few recordings ask for augmentation.
S4_SMALL = replace(
    S4,
    preset="S4-small",
    model=replace(S4.model, width=16, depths=(2, 2, 2)),
    clip=ClipConfig(frames=32, test_clips=2, rotate=0.3, scale=0.1),
    training=replace(S4.training, epochs=20, batch_size=16),
)

PRESETS: dict[str, Config] = {
    config.preset: config
    for config in (
        *(S0, S0_FOCAL, S0_POLY, *S0_TWO_STAGE, S0_2, S1, *S1_ALPHA, S2),
        *(S3_CVSTA, S3_DROP, S3_MSCAM, S3_AFF1, S3_AFF2, S3_AFF4, S4, S4_SMALL),
        *(STGCNPP, AGCN, AAGCN, CTRGCN, MSG3D),
    )
}
"""Name -> configuration."""


def preset(name: str) -> Config:
    """The preset called `name`; `FFNError` with the near misses where there is none."""
    if name not in PRESETS:
        raise FFNError(f"unknown preset {name!r}: {suggest(name, PRESETS)}")
    return PRESETS[name]


def override(config: Config, settings: Iterable[str]) -> Config:
    """`config` with `section.field=value` settings applied, each checked against the field's type.

    Raises `FFNError` for an unknown key (with the near misses) or a value of the wrong type.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        section_name, _, field_name = key.partition(".")
        known = [
            f"{section.name}.{item.name}"
            for section in dataclasses.fields(Config)
            if section.name != "preset"
            for item in dataclasses.fields(getattr(config, section.name))
        ]
        if not equals:
            raise FFNError(f"setting {setting!r}: expected section.field=value, for example training.lr=0.05")
        if key not in known:
            raise FFNError(f"setting {setting!r}: unknown key {key!r}: {suggest(key, known)}")
        section = getattr(config, section_name)
        value = _parse(key, text.strip(), get_type_hints(type(section))[field_name])
        config = replace(config, **{section_name: replace(section, **{field_name: value})})
    return config


def recipe(name: str, settings: Iterable[str], seed: int) -> Config:
    """The preset called `name` with `settings` applied and this seed. Raises `FFNError` where the settings name a seed too."""
    settings = list(settings)
    if any(setting.partition("=")[0].strip() == "training.seed" for setting in settings):
        raise FFNError(f"setting training.seed: the seed is an input of its own, {seed} here; leave it out of the settings")
    return override(preset(name), [*settings, f"training.seed={seed}"])


def require_trainable(config: Config) -> None:
    """Raise `FFNError` for the first setting that no training can run with."""
    model, clip, loss, recipe = config.model, config.clip, config.loss, config.training
    rules = {
        "model.width": (model.width > 0 and model.width % 8 == 0, "a multiple of 8"),
        "model.depths": (bool(model.depths) and min(model.depths) >= 1, "one block or more in every stage"),
        "model.reduction": (model.reduction >= 1 and model.width % model.reduction == 0, "a divisor of model.width"),
        "model.dropout": (0 <= model.dropout < 1, "0 or more and less than 1"),
        "clip.frames": (clip.frames >= 2, "at least 2"),
        "clip.persons": (clip.persons in (1, 2), "1 or 2"),
        "clip.test_clips": (clip.test_clips >= 1, "at least 1"),
        "clip.rotate": (clip.rotate >= 0, "0 or more radians"),
        "clip.scale": (0 <= clip.scale < 1, "0 or more and less than 1"),
        "loss.cycle_factor": (loss.name != "two_stage" or loss.cycle_factor > 1, "more than 1"),
        "loss.gamma": (loss.gamma >= 0, "0 or more"),
        "loss.gamma_hc": (loss.gamma_hc >= 0, "0 or more"),
        "loss.smoothing": (0 <= loss.smoothing < 1, "0 or more and less than 1"),
        "training.epochs": (recipe.epochs >= 1, "at least 1"),
        "training.batch_size": (recipe.batch_size >= 4, "at least 4"),
        "training.lr": (recipe.lr > 0, "a positive number"),
        "training.momentum": (0 < recipe.momentum < 1, "more than 0 and less than 1"),
        "training.weight_decay": (recipe.weight_decay >= 0, "0 or more"),
        "training.warmup_epochs": (0 <= recipe.warmup_epochs < recipe.epochs, "0 or more and less than training.epochs"),
    }
    for name, (holds, expected) in rules.items():
        if not holds:
            section, _, item = name.partition(".")
            raise FFNError(f"setting {name}={getattr(getattr(config, section), item)}: expected {expected}")


def to_dict(config: Config) -> dict[str, Any]:
    """`config` as plain JSON types."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(plain: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`; an unknown key raises `FFNError`, so no setting is ever dropped in silence."""
    try:
        return Config(
            preset=plain["preset"],
            model=ModelConfig(**{**plain["model"], "depths": tuple(plain["model"]["depths"])}),
            clip=ClipConfig(**plain["clip"]),
            loss=LossConfig(**plain["loss"]),
            training=TrainingConfig(**plain["training"]),
        )
    except (KeyError, TypeError) as error:
        raise FFNError(f"configuration does not fit this version of ffn: {error}") from error


def digest(*parts: Any) -> str:
    """Sixteen hex digits that name `parts` (JSON types): equal parts, equal digest."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code(*rooms: str) -> str:
    """Sixteen hex digits that name the code of ffn, or of its `rooms` (files and folders) alone: what was made by it may be reused
    by code of the same digits."""
    root = Path(__file__).parent
    chosen = [root / room for room in rooms] or [root]
    files = {file for path in chosen for file in ([path] if path.is_file() else path.rglob("*")) if _is_code(file)}
    return digest([(str(file.relative_to(root)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in sorted(files)])


def _is_code(file: Path) -> bool:
    return file.suffix == ".py" or file.parent.name == "resources"


def suggest(name: str, known: Iterable[str]) -> str:
    """What may have been meant by `name`, which is none of `known`: the near ones, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names)}"


def _parse(key: str, text: str, kind: Any) -> Any:
    choices = get_args(kind)
    if kind == tuple[int, ...]:
        try:
            return tuple(int(part) for part in text.strip("()[] ").split(",") if part.strip())
        except ValueError:
            raise FFNError(f"setting {key}={text!r}: expected whole numbers with commas between, like 4,3,3") from None
    if choices:
        if text not in choices:
            raise FFNError(f"setting {key}={text!r}: {suggest(text, choices)}")
        return text
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise FFNError(f"setting {key}={text!r}: expected {wanted}") from None
