import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ffn.data.store import Sample, SkeletonSet, SkeletonSetWriter
from ffn.layouts import COCO17, NTU25

torch.set_num_threads(1)  # the suite runs in parallel processes; threads of tiny networks only get in each other's way


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real recordings: the folder that `FFN_REAL_DATA` names, else `shared` beside the repository; skips where there is none."""
    folder = Path(os.environ.get("FFN_REAL_DATA", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real recordings in {folder}")
    return folder


def recordings(space: str, count: int = 12, *, seed: int = 0) -> list[np.ndarray]:
    """Random recordings of 1 or 2 persons and 3 to 90 frames, some joints missing, as the store would hold them."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        persons, frames, joints = 1 + number % 2, int(rng.integers(3, 90)), 25 if space == "3d" else 17
        x = rng.normal(size=(persons, frames, joints, 3))
        if space == "3d":
            x[..., 2] += 3
            x[:, 1, rng.integers(0, joints)] = 0
            if persons == 2:
                x[1, frames // 2 :] = 0
        else:
            x = np.concatenate([x[..., :2] * 200 + 500, rng.uniform(size=(persons, frames, joints, 1))], -1)
        made.append(x.astype(np.float16))
    return made


def write_set(
    path: Path, arrays: list[np.ndarray], space: str, *, classes: int = 3, labels: list[int] | None = None
) -> SkeletonSet:
    """A skeleton set of `arrays` with one protocol, `p`: two thirds train."""
    with SkeletonSetWriter(
        path,
        layout=NTU25 if space == "3d" else COCO17,
        space=space,
        classes=[f"class {k}" for k in range(classes)],
        protocols=["p"],
        provenance={"source": "made for a test"},
    ) as writer:
        for number, x in enumerate(arrays):
            label = labels[number] if labels else number % classes
            part = "train" if number < len(arrays) * 2 // 3 else "test"
            writer.write(
                Sample(
                    id=f"sample {number}",
                    label=label,
                    keypoints=x,
                    splits={"p": part},
                    image_size=(1280, 720) if space == "2d" else None,
                )
            )
    return SkeletonSet.open(path)


def toy_recordings(count: int = 24, *, seed: int = 0) -> tuple[list[np.ndarray], list[int]]:
    """Learnable at once: three classes wave one of three joints."""
    rng = np.random.default_rng(seed)
    arrays, labels = [], []
    base = rng.normal(size=(25, 3)) + np.array([0, 0, 3])
    for number in range(count):
        label, frames = number % 3, int(rng.integers(10, 40))
        x = np.repeat(base[None, None], frames, 1) + rng.normal(size=(1, frames, 25, 3)) * 0.02
        x[0, :, 7 + 4 * label, 1] += np.sin(np.arange(frames) / 2 + rng.uniform(0, 6))
        arrays.append(x.astype(np.float16))
        labels.append(label)
    return arrays, labels
