"""The compiled pipeline: what a cluster is told, and what compiling may not load."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from ffn.config import STREAMS
from ffn.errors import FFNError
from ffn.protocols import NTU_PROTOCOLS
from pipeline.cli import main
from pipeline.dag import build
from pipeline.settings import Settings

ROOT = Path(__file__).parents[2]
DIGEST = "registry.example/ffn-python@sha256:" + "0" * 64
STATES = "s3://ffn/states"


def compiled(path: Path, settings: Settings) -> dict[str, Any]:
    compiler.Compiler().compile(build(NTU_PROTOCOLS, tuple(STREAMS), settings), str(path))
    return next(yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    settings = Settings(image=DIGEST, checkpoints=STATES, gpus=2, environment={"A": "b"})
    return compiled(tmp_path_factory.mktemp("spec") / "pipeline.yaml", settings)


def tasks(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Step -> its tasks, all protocols."""
    found: dict[str, list[dict[str, Any]]] = {}
    dags = [spec["root"]["dag"], *(component["dag"] for component in spec["components"].values() if "dag" in component)]
    for dag in dags:
        for task in dag["tasks"].values():
            found.setdefault(task["taskInfo"]["name"], []).append(task)
    return found


def container(spec: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    component = spec["components"][task["componentRef"]["name"]]
    return spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]


def test_every_protocol_trains_every_stream(spec: dict[str, Any]) -> None:
    found = tasks(spec)
    assert {name: len(found[name]) for name in ("begin", "ingest", "train", "fuse", "gate", "results")} == {
        "begin": 1, "ingest": 1, "train": 4, "fuse": 4, "gate": 4, "results": 1,
    }  # fmt: skip
    loops = found["streams j b jm bm"]
    assert [json.loads(loop["parameterIterator"]["items"]["raw"]) for loop in loops] == [list(STREAMS)] * 4
    protocols = {task["inputs"]["parameters"]["protocol"]["runtimeValue"]["constant"] for task in found["train"]}
    assert protocols == set(NTU_PROTOCOLS)


def test_a_cluster_is_asked_for_gpus_where_they_are_used(spec: dict[str, Any]) -> None:
    asked = {
        name: {container(spec, task)["resources"].get("accelerator", {}).get("resourceCount", "0") for task in of}
        for name, of in tasks(spec).items()
        if "executorLabel" in spec["components"][of[0]["componentRef"]["name"]]
    }
    assert asked == {name: {{"train": "2", "evaluate": "1", "gate": "1"}.get(name, "0")} for name in asked}
    assert len(asked) == 8


def test_every_step_runs_in_the_image_of_the_settings(spec: dict[str, Any]) -> None:
    for of in tasks(spec).values():
        for task in of:
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                assert container(spec, task)["image"] == DIGEST
                assert {"name": "A", "value": "b"} in container(spec, task)["env"]


def test_on_this_machine_nothing_is_asked_for_and_work_is_cached(tmp_path: Path) -> None:
    spec = compiled(tmp_path / "pipeline.yaml", Settings(local=True))
    of = tasks(spec)
    assert "resources" not in container(spec, of["train"][0])
    assert {name for name in of for task in of[name] if task.get("cachingOptions", {}).get("enableCache")} == {
        "ingest", "train", "evaluate", "fuse",
    }  # fmt: skip


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFN_IMAGE", DIGEST)
    monkeypatch.setenv("FFN_GPUS", "4")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p-a-s-s")
    settings = Settings.from_environment()
    assert (settings.image, settings.gpus, settings.local) == (DIGEST, 4, False)
    assert settings.environment["MLFLOW_TRACKING_URI"] == "http://mlflow"
    assert "p-a-s-s" not in str(settings)
    monkeypatch.setenv("FFN_GPUS", "many")
    with pytest.raises(FFNError, match="FFN_GPUS='many': expected a whole number"):
        Settings.from_environment()


def test_a_protocol_that_cannot_name_files_is_not_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "compile", "--protocols", "p,a/b", "--out", str(tmp_path / "pipeline.yaml")]) == 2
    assert "protocol 'a/b'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_compiling_loads_neither_torch_nor_mlflow(tmp_path: Path) -> None:
    code = f"""
import sys
from pipeline.cli import main
assert main(["cluster", "compile", "--out", {str(tmp_path / "pipeline.yaml")!r}]) == 0
loaded = {{"torch", "mlflow", "pandas", "matplotlib"}} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "FFN_CHECKPOINTS": STATES})
    assert (tmp_path / "pipeline.yaml").is_file()


def test_imports_go_one_way() -> None:
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_a_comparison_trains_every_preset_and_seed_and_registers_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    pipeline = build(
        ("ntu60-xsub", "ucla-xview"), ("j", "b"), Settings(checkpoints=STATES), presets=("S0", "S0-2", "ST-GCN++"), seeds=(0, 2)
    )
    compiler.Compiler().compile(pipeline, str(path))
    found = tasks(next(yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader)))
    assert not {"register", "gate", "promote"} & set(found)

    def constant(task: dict[str, Any], name: str) -> Any:
        return task["inputs"]["parameters"][name]["runtimeValue"]["constant"]

    trained = [(constant(task, "protocol"), constant(task, "preset"), constant(task, "seed")) for task in found["train"]]
    wanted = itertools.product(("ntu60-xsub", "ucla-xview"), ("S0", "S0-2", "ST-GCN++"), (0, 2))
    assert sorted(trained) == sorted(wanted)
    (begun,) = found["begin"]
    assert (constant(begun, "presets"), constant(begun, "seeds")) == (["S0", "S0-2", "ST-GCN++"], [0, 2])
