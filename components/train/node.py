"""One process of a training over several nodes: `torchrun -m components.train.node FOLDER`, as a TrainJob runs it."""

import json
import os
import sys
from pathlib import Path

from components import step
from components.train.trainjob import tell
from ffn.config import from_dict
from ffn.data.store import SkeletonSet
from ffn.training import train


@step
def run(*, folder: Path) -> None:
    """Do what `folder/task.json` says, and leave the checkpoint in `folder/out`; the first process tells of its epochs."""
    task = json.loads((folder / "task.json").read_text())
    train(
        SkeletonSet.open(Path(task["data"])), protocol=task["protocol"], stream=task["stream"], config=from_dict(task["config"]),
        out=folder / "out", state_dir=Path(task["state_dir"]), progress=False,
        on_epoch=tell if os.environ.get("RANK", "0") == "0" else None,
    )  # fmt: skip


if __name__ == "__main__":
    run(folder=Path(sys.argv[1]))
