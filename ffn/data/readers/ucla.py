"""NW-UCLA as `all_sqe`: one JSON file per recording, in a folder or a zip.

A file is called `aXX_sYY_eZZ_vWW.json` and holds `file_name`, `skeletons` (T, 20, 3) in metres, and `label`. The class and
the part come from the name; a `label` that is neither the class's position (from 0 or from 1) nor the action's number drops
the sample. One person per recording; frames go through `canonical_persons`.

Source: Wang et al., CVPR 2014; the `all_sqe` archive as the field passes it on (CTR-GCN, InfoGCN, HD-GCN).
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from ffn.data.readers.source import Source, Unusable, arrange, check_finite, each_file, file_names, stem
from ffn.data.store import Sample
from ffn.errors import FFNError
from ffn.layouts import KINECT20
from ffn.protocols import UCLA_ACTIONS, UCLA_PROTOCOLS, parse_ucla, ucla_splits

SUFFIX = ".json"

_SHAPE = (len(KINECT20.joints), 3)


def read(path: Path) -> Source:
    """The JSON files of a folder or zip, sorted by name."""
    names, content = file_names(path, SUFFIX), hashlib.sha256()
    return Source(
        reader="ucla",
        layout=KINECT20,
        space="3d",
        classes=tuple(UCLA_ACTIONS.values()),
        protocols=UCLA_PROTOCOLS,
        items=each_file(path, names, _sample, content, workers=1),
        total=len(names),
        content=content,
    )


def _sample(name: str, text: bytes) -> Sample:
    identity = stem(name)
    try:
        parsed = parse_ucla(identity)
    except FFNError as error:
        raise Unusable(name, "not an NW-UCLA name", str(error)) from None
    if not text.strip():
        raise Unusable(name, "empty file", f"{len(text)} bytes")
    try:
        recording = json.loads(text)
    except json.JSONDecodeError as error:
        raise Unusable(f"{name}:{error.lineno}", "malformed", f"not JSON, or cut short: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise Unusable(name, "malformed", f"not text: {error.reason}") from None
    try:
        frames, stated = np.asarray(recording["skeletons"], np.float32), recording.get("label")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Unusable(name, "malformed", "expected `skeletons`, a list of frames of 20 joints of 3 numbers") from None
    if frames.ndim != 3 or frames.shape[1:] != _SHAPE:
        raise Unusable(name, "malformed", f"skeletons {frames.shape}, expected (T, 20, 3)")
    label = list(UCLA_ACTIONS).index(parsed.action)
    if stated is not None and stated not in (label, label + 1, parsed.action):
        raise Unusable(name, "label disagrees with the name", f"label {stated}, expected {label + 1}")
    check_finite(frames[None], KINECT20, name)
    return Sample(id=identity, label=label, keypoints=arrange(frames[None], "3d", name), splits=ucla_splits(parsed))
