"""An exported model, run by ONNX Runtime: raw keypoints in, class probabilities out.

Needs numpy and onnxruntime, nothing else: `ffn export` puts a copy of this file beside `model.onnx`, and the folder runs on
any machine that has these two.

    python recogniser.py KEYPOINTS.npy [--every FRAMES]
"""

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


class Recogniser:
    """The model in `folder`. Recordings are (M, T, V, 3): persons, frames, joints; metres, or pixels and a score.

    A person or frame of zeros only is no person and no frame; persons after the second are left out. `threads` cores work
    on one recording together, or on one each where there are as many.
    """

    def __init__(self, folder: Path | str, *, threads: int = 1) -> None:
        self.path = Path(folder) / "model.onnx"
        self.threads = threads
        self.about: dict[str, Any] = json.loads((Path(folder) / "model.json").read_text())
        """Classes, joints, window, streams and their weights: model.json."""
        self.classes: list[str] = self.about["classes"]
        self.window: int = self.about["window"]
        """Frames of a clip. A recording of just as many is taken as it is, from any other as many are drawn."""

    def probabilities(
        self, recordings: Sequence[NDArray[np.floating[Any]]], image_size: tuple[int, int] | None = None
    ) -> NDArray[np.float32]:
        """(N, K) of N recordings; `image_size` (width, height) of 2D ones, by default the training recordings'.

        Raises `ValueError` where a recording has another shape, nobody in it, or a value that is not finite in float16.
        """
        feeds = [self._feed(number, x, image_size) for number, x in enumerate(recordings)]
        if len(feeds) < self.threads:
            return np.concatenate([self._together.run(None, feed)[0] for feed in feeds])
        with ThreadPoolExecutor(self.threads) as pool:  # a recording fits a core's cache, a batch does not
            return np.concatenate(list(pool.map(lambda feed: self._alone.run(None, feed)[0], feeds)))

    def over_time(
        self, recording: NDArray[np.floating[Any]], every: int, image_size: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, int, NDArray[np.float32] | None]]:
        """First frame, frame after the last and (K,) probabilities of every window of a clip's length; None where nobody is seen.

        A window begins `every` so many frames; a recording shorter than one is a window of its own.
        """
        for start in range(0, max(recording.shape[1] - self.window, 0) + 1, every):
            part = recording[:, start : start + self.window]
            yield start, start + part.shape[1], self.probabilities([part], image_size)[0] if part[:2].any() else None

    def _feed(
        self, number: int, x: NDArray[np.floating[Any]], image_size: tuple[int, int] | None
    ) -> dict[str, NDArray[np.float32]]:
        joints = len(self.about["joints"])
        x = np.asarray(x, np.float32)[:2]
        if x.ndim != 4 or x.shape[2:] != (joints, 3) or not x.size:
            raise ValueError(f"recording {number}: keypoints {x.shape}, expected (persons, frames, {joints}, 3)")
        if not (np.abs(x) <= np.finfo(np.float16).max).all():
            raise ValueError(f"recording {number}: NaN, infinite or too large joint")
        if not x.any():
            raise ValueError(f"recording {number}: nobody visible")
        feed = {"keypoints": x[None]}
        if self.about["space"] == "2d":
            feed["image_size"] = np.array(image_size or self.about["image_size"], np.float32)
        return feed

    @functools.cached_property
    def _alone(self) -> "InferenceSession":
        return self._session(1)

    @functools.cached_property
    def _together(self) -> "InferenceSession":
        return self._session(self.threads)

    def _session(self, threads: int) -> "InferenceSession":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Print the top classes of a recording, or the top class of every window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keypoints", type=Path, metavar="KEYPOINTS.npy", help="(persons, frames, joints, 3)")
    parser.add_argument("--every", type=int, metavar="FRAMES", help="one line per window, begun every so many frames")
    given = parser.parse_args()
    model, recording = Recogniser(Path(__file__).parent), np.load(given.keypoints)
    if given.every:
        for start, stop, p in model.over_time(recording, given.every):
            said = "    -    nobody visible" if p is None else f"{100 * p.max():5.1f} %  {model.classes[p.argmax()]}"
            print(f"{start:6d} {stop:6d}  {said}")
        return
    p = model.probabilities([recording])[0]
    for k in p.argsort()[::-1][:5]:
        print(f"{100 * p[k]:5.1f} %  {model.classes[k]}")


if __name__ == "__main__":
    main()
