"""MMAction2 and pyskl pickles: `{"split": {name: [frame_dir]}, "annotations": [{...}]}`.

An annotation holds `frame_dir` (the sample's id), `label`, `keypoint` (M, T, V, C) and, for 2D, `keypoint_score` (M, T, V)
and `img_shape` (height, width; MMAction2's 1080, 1920 where it is absent). The layout follows from V: 17 is coco17, 25 ntu25,
20 kinect20. C = 2 with scores, or C = 3 in coco17 (x, y, score), is 2D; any other C = 3 is 3D, and goes through
`canonical_persons`. 2D values stay as they are, and 2D recordings go through `unpadded`. Of more than two persons the first
two are kept.

Splits named `<protocol>_train` and `<protocol>_val` or `<protocol>_test` become a protocol (`train` and `val` alone become
`default`); where both `_val` and `_test` exist, `_test` is held out and `_val` takes no part. If every `frame_dir` is an NTU
name, the classes are NTU's and `xsub` is `ntu60-xsub`, or `ntu120-xsub` where an action above 60 or a setup above 17
shows; `xview` and `xset` likewise; a sample whose label is not its name's action - 1 is left out. Otherwise classes are
called by their number.

The pickle is read by an unpickler that knows numpy's arrays, dtypes and scalars and nothing else: no class is looked up and
no function called that the pickle names. The whole pickle is in memory while it is read, and given back sample by sample.

Source: MMAction2 1.2.0 `PoseDataset`, `FormatGCNInput`; pyskl `data/README.md`.
"""

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffn.data.readers.source import Dropped, Source, Unusable, arrange, check_finite
from ffn.data.store import Part, Sample, Space
from ffn.errors import FFNError
from ffn.layouts import COCO17, KINECT20, NTU25, Layout
from ffn.protocols import NTU60_ACTIONS, NTU60_SETUPS, ntu_classes, parse_ntu, require_name

SUFFIXES = (".pkl", ".pickle")
IMAGE_SIZE = (1920, 1080)
"""Width and height in pixels where an annotation has no `img_shape`."""

_MOST_CLASSES = 100_000
"""Labels from here on are taken for a mistake: every class up to the largest label gets a name."""
_LAYOUTS = {len(layout.joints): layout for layout in (COCO17, KINECT20, NTU25)}
_PARTS: dict[str, Part] = {"train": "train", "val": "test", "test": "test"}


def read(path: Path) -> Source:
    """The pickle at `path`, samples in its order. Raises `FFNError` where it is no such pickle, or names anything but numpy."""
    annotations, split = _load(path)
    shape = next((k.shape for a in annotations if isinstance(k := a.get("keypoint"), np.ndarray) and k.ndim == 4), None)
    if shape is None:
        raise FFNError(f"{path}: no annotation has a `keypoint` array (M, T, V, C)")
    joints, channels = shape[2:]
    if joints not in _LAYOUTS or channels not in (2, 3):
        known = ", ".join(f"{count} ({layout.name})" for count, layout in _LAYOUTS.items())
        raise FFNError(
            f"{path}: {joints} joints of {channels} numbers; known are {known} joints of 2 or 3: bring other skeletons as a table"
        )
    layout = _LAYOUTS[joints]
    space: Space = "2d" if channels == 2 or layout is COCO17 else "3d"
    ntu = _ntu(annotations)
    labels = (int(a["label"]) for a in annotations if isinstance(a.get("label"), int | np.integer))
    largest = max((label for label in labels if label < _MOST_CLASSES), default=-1)
    parts = _parts(path, split, ntu)
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256")
    return Source(
        reader="mmaction",
        layout=layout,
        space=space,
        classes=ntu_classes() if ntu else tuple(str(label) for label in range(largest + 1)),
        protocols=tuple(parts),
        items=_items(annotations, layout, channels, space, parts, ntu),
        total=len(annotations),
        content=content,
    )


def _items(
    annotations: list[dict[str, Any]],
    layout: Layout,
    channels: int,
    space: Space,
    parts: Mapping[str, Mapping[str, Part]],
    ntu: str,
) -> Iterator[Sample | Dropped]:
    listed = {identity for members in parts.values() for identity in members}
    annotations.reverse()
    total = len(annotations)
    while annotations:
        # Taken off the list, so that memory is given back on the way.
        annotation = annotations.pop()
        listed.discard(annotation.get("frame_dir", ""))
        try:
            yield _sample(annotation, f"annotation {total - len(annotations) - 1}", layout, channels, space, parts, ntu)
        except Unusable as error:
            yield error.dropped
    for identity in sorted(listed):
        yield Dropped(where=identity, reason="listed in a split, but not annotated")


def _sample(
    annotation: Mapping[str, Any],
    where: str,
    layout: Layout,
    channels: int,
    space: Space,
    parts: Mapping[str, Mapping[str, Part]],
    ntu: str,
) -> Sample:
    def value(key: str, kind: Any, what: str) -> Any:
        if not isinstance(annotation.get(key), kind):
            raise Unusable(where, "malformed", f"expected `{key}` to be {what}, found {type(annotation.get(key)).__name__}")
        return annotation[key]

    identity: str = value("frame_dir", str, "a text")
    where = f"{where} ({identity})"
    label = int(value("label", int | np.integer, "a whole number"))
    if ntu and label != (action := parse_ntu(identity).action) - 1:
        raise Unusable(where, "malformed", f"label {label}, expected {action - 1} for action {action} of the name")
    if not 0 <= label < _MOST_CLASSES:
        raise Unusable(where, "malformed", f"label {label}, expected 0 to {_MOST_CLASSES - 1}")
    keypoints: NDArray[Any] = value("keypoint", np.ndarray, "an array (M, T, V, C)")
    if keypoints.dtype.kind not in "fiu" or keypoints.ndim != 4 or keypoints.shape[2:] != (len(layout.joints), channels):
        expected = f"numbers (M, T, {len(layout.joints)}, {channels})"
        raise Unusable(where, "malformed", f"keypoint {keypoints.dtype} {keypoints.shape}, expected {expected}")
    if channels == 2:
        score: NDArray[Any] = value("keypoint_score", np.ndarray, "an array (M, T, V)")
        if score.dtype.kind not in "fiu" or score.shape != keypoints.shape[:3]:
            raise Unusable(where, "malformed", f"keypoint_score {score.dtype} {score.shape}, expected {keypoints.shape[:3]}")
        keypoints = np.concatenate([keypoints, score[..., None]], axis=-1)
    check_finite(keypoints[:2], layout, where)
    return Sample(
        id=identity,
        label=label,
        keypoints=arrange(keypoints, space, where),
        splits={protocol: members[identity] for protocol, members in parts.items() if identity in members},
        image_size=_image_size(annotation, where) if space == "2d" else None,
    )


def _image_size(annotation: Mapping[str, Any], where: str) -> tuple[int, int]:
    shape = annotation.get("img_shape", annotation.get("original_shape"))
    if shape is None:
        return IMAGE_SIZE
    try:
        height, width = (int(side) for side in shape)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise Unusable(where, "malformed", f"img_shape {shape!r}, expected (height, width)")
    return width, height


def _ntu(annotations: Sequence[Mapping[str, Any]]) -> str:
    """`ntu60` or `ntu120` where every sample has an NTU name, else nothing."""
    try:
        names = [parse_ntu(annotation["frame_dir"]) for annotation in annotations]
    except (FFNError, KeyError, TypeError):
        return ""
    return "ntu120" if any(name.setup > NTU60_SETUPS or name.action > NTU60_ACTIONS for name in names) else "ntu60"


def _parts(path: Path, split: Mapping[str, Sequence[str]], ntu: str) -> dict[str, dict[str, Part]]:
    """Protocol -> sample -> part."""
    parts: dict[str, dict[str, Part]] = {}
    for name, members in split.items():
        prefix, _, suffix = name.rpartition("_")
        if suffix not in _PARTS:
            raise FFNError(f"{path}: split {name!r}: expected a name that ends in train, val or test")
        if suffix == "val" and name.removesuffix("val") + "test" in split:
            continue
        protocol = f"{ntu}-{prefix}" if ntu and prefix in ("xsub", "xview", "xset") else prefix or "default"
        require_name(f"{path}: split {name!r}: protocol", protocol)
        known = parts.setdefault(protocol, {})
        for identity in members:
            if known.setdefault(identity, _PARTS[suffix]) != _PARTS[suffix]:
                raise FFNError(f"{path}: sample {identity} is in both parts of {protocol}; a held-out sample must not train")
    return parts


def _load(path: Path) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    try:
        with path.open("rb") as file:
            loaded = _NumpyUnpickler(file, path).load()
    except (FFNError, MemoryError):
        raise
    except OSError as error:
        raise FFNError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # bytes that are no pickle can raise nearly anything
        raise FFNError(f"{path}: not a pickle, or cut short ({type(error).__name__}: {error}); fetch it again") from None
    annotations, split = (loaded.get(key) for key in ("annotations", "split")) if isinstance(loaded, dict) else (None, None)
    if not isinstance(annotations, list) or not all(isinstance(annotation, dict) for annotation in annotations):
        raise FFNError(f"{path}: expected a dict with `split` and `annotations`, a list of dicts")
    if not isinstance(split, dict) or not all(
        isinstance(name, str) and isinstance(members, list | tuple) and all(isinstance(member, str) for member in members)
        for name, members in split.items()
    ):
        raise FFNError(f"{path}: expected `split` to be a dict of lists of sample names, like xsub_train and xsub_val")
    if not annotations:
        raise FFNError(f"{path}: no sample: `annotations` is empty")
    return annotations, split


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as pickle protocol 2 writes them."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """No bytes, as pickle protocol 2 writes them."""
    return b""


def _globals() -> dict[tuple[str, str], Any]:
    """What a pickle of numpy arrays and scalars names, before and after numpy 2 moved its modules."""
    # Asked of numpy by pickling in small, which is public and the same in every version.
    reconstruct, scalar, frombuffer = (
        made.__reduce_ex__(protocol)[0] for made, protocol in ((np.zeros(1), 2), (np.float32(0), 2), (np.zeros(1), 5))
    )
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
        ("__builtin__", "bytes"): _no_bytes,
        ("builtins", "bytes"): _no_bytes,
    }
    for package in ("numpy.core", "numpy._core"):
        allowed[f"{package}.multiarray", "_reconstruct"] = reconstruct
        allowed[f"{package}.multiarray", "scalar"] = scalar
        allowed[f"{package}.numeric", "_frombuffer"] = frombuffer
    return allowed


class _NumpyUnpickler(pickle.Unpickler):
    """Rebuilds plain containers and numpy arrays; refuses every other global before anything is called."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path, self._globals = path, _globals()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._globals:
            raise FFNError(f"{self._path}: the pickle asks for {module}.{name}; only numpy arrays are read, nothing was executed")
        return self._globals[module, name]
