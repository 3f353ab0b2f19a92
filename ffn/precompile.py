"""Compiles the loops for every processor that `machine.LEVELS` knows: what an image does when it is built.

`python -m ffn.precompile` puts them beside this package, where `ffn.machine` finds them. Small trainings, evaluations and
predictions show which types the loops are called with; for the levels above the first, which the building machine need not be of,
they are compiled for those types and not run.
"""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ffn import machine

Types = dict[tuple[str, str], list[Any]]
"""Of every loop, by module and name: the types of its arguments, each time it was compiled."""


def main() -> None:
    """Compile for the lowest level by use, for the others as that one was used."""
    if machine.level() is None:
        print("no x86-64 processor of level 3: loops are compiled where they run", flush=True)
        return
    used: Types | None = None
    for level in reversed(machine.LEVELS):
        folder = machine.SHIPPED / level
        os.environ |= {"NUMBA_CPU_NAME": level, "NUMBA_CPU_FEATURES": machine.FEATURES, "NUMBA_CACHE_DIR": str(folder)}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            used = pool.apply(_compile, (used,))
        print(f"{level}: {sum(map(len, used.values()))} loops in {folder}", flush=True)


def _compile(used: Types | None) -> Types:
    import ffn.data.sampler
    import ffn.model.network  # noqa: F401  # every module with loops

    if used is None:
        _use()
    else:
        for (module, name), types in used.items():
            for each in types:
                getattr(sys.modules[module], name).compile(each)
    return _types()


def _types() -> Types:
    from numba.core.dispatcher import Dispatcher

    modules = [(name, module) for name, module in sys.modules.items() if name.startswith("ffn.")]
    loops = {
        (function.__module__, function.py_func.__name__): function
        for _, module in modules for function in vars(module).values() if isinstance(function, Dispatcher)
    }  # fmt: skip
    return {name: list(loop.signatures) for name, loop in loops.items() if loop.signatures}


def _use() -> None:
    """Train, evaluate and predict with recordings of every layout. S0 and S4 together have every loop of the other presets."""
    from ffn.config import override, preset
    from ffn.data.store import Part, Sample, SkeletonSet, SkeletonSetWriter
    from ffn.evaluation import evaluate
    from ffn.inference import FusedModel
    from ffn.layouts import LAYOUTS
    from ffn.training import train

    small = ["training.epochs=1", "model.depths=1,1", "clip.frames=8", "clip.test_clips=1"]
    rng = np.random.default_rng(0)
    for layout in LAYOUTS.values():
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            recordings = [rng.uniform(1, 2, (2, 16, len(layout.joints), 3)).astype(np.float16) for _ in range(4)]
            with SkeletonSetWriter(
                root / "set.arrow", layout=layout, space="3d", classes=["a", "b"], protocols=["p"], provenance={}
            ) as writer:
                for number, keypoints in enumerate(recordings):
                    part: Part = "test" if number == 3 else "train"
                    writer.write(Sample(id=str(number), label=number % 2, keypoints=keypoints, splits={"p": part}))
            data = SkeletonSet.open(root / "set.arrow")
            for name in ("S0", "S4"):
                made = train(
                    data, protocol="p", stream="j", config=override(preset(name), small), out=root / name, state_dir=root,
                    progress=False, device="cpu", processes=1,
                )  # fmt: skip
            evaluate(data, made, device="cpu")
            FusedModel.of([made]).predict(recordings)


if __name__ == "__main__":
    main()
