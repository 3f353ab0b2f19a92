"""What a registered model asks for is what it takes to load it: by its imports, and in an environment made of nothing else."""

import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import grimp
import mlflow
import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from components import registry, tracking
from ffn.data.store import SkeletonSet
from tests.components.test_steps import Pipeline

PREDICT = """
import json, sys, mlflow, numpy as np
clips, *models = sys.argv[1:]
for folder in models:
    said = mlflow.pyfunc.load_model(folder).predict(np.load(clips))
    print(json.dumps([list(row.values()) for row in said["probabilities"]]))
import ffn
print(json.dumps(ffn.__file__))
"""


@pytest.fixture
def clean(tmp_path: Path) -> Iterator[Path]:
    """An empty environment, removed at once: with torch in it it has gigabytes."""
    folder = tmp_path / "clean"
    venv.create(folder, symlinks=True)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.clean
def test_a_registered_model_and_a_streams_load_in_an_environment_of_their_requirements(
    store: MlflowClient, toy: SkeletonSet, tmp_path: Path, clean: Path
) -> None:
    """One environment for both models: making it takes minutes where nothing is cached."""
    version = registry.at(Pipeline(toy.path, tmp_path / "steps").register())
    (stream,) = store.search_runs(
        [store.get_run(version.run).info.experiment_id], "tags.`ffn.step` = 'train' and tags.`ffn.stream` = 'j'"
    )
    uris = {"fused": version.uri, "stream": stream.data.tags["ffn.model"]}
    folders = [Path(mlflow.artifacts.download_artifacts(uri, dst_path=tmp_path / name)) for name, uri in uris.items()]
    wanted, others = ((folder / "requirements.txt").read_text() for folder in folders)
    assert wanted == others
    for folder in folders:
        require_truth(folder, wanted.splitlines())

    # No index but the machine's own, no constraint; modules compile when they are imported, most never.
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    pip = [sys.executable, "-m", "pip", "--python", clean / "bin/python", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--requirement", folders[0] / "requirements.txt"], env=plain, check=True)

    clips = np.stack([np.resize(toy.sample(row), (2, 30, 25, 3)) for row in (0, 1)]).astype(np.float32)
    np.save(tmp_path / "clips.npy", clips)
    home = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [clean / "bin/python", "-I", "-c", PREDICT, tmp_path / "clips.npy", *folders]
    done = subprocess.run(command, env=home, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mismatch" not in done.stderr  # MLflow's word where an installed version is not the required one
    *said, code = map(json.loads, done.stdout.splitlines())
    assert Path(code).is_relative_to(folders[0])
    for uri, there in zip(uris.values(), said, strict=True):
        here = [list(row.values()) for row in mlflow.pyfunc.load_model(uri).predict(clips)["probabilities"]]
        np.testing.assert_allclose(there, here, atol=1e-6)


def require_truth(folder: Path, requirements: list[str]) -> None:
    """What the model's other files say of Python and packages is what its requirements and this process say."""
    packages, conda, environment = (
        yaml.safe_load((folder / name).read_text()) for name in ("MLmodel", "conda.yaml", "python_env.yaml")
    )
    python = platform.python_version()
    assert packages["flavors"]["python_function"]["python_version"] == python
    assert environment["python"] == python
    assert environment["dependencies"] == ["-r requirements.txt"]
    assert f"python={python}" in conda["dependencies"]
    assert conda["dependencies"][-1] == {"pip": requirements}


def test_the_requirements_are_what_the_code_of_a_model_imports() -> None:
    imports = grimp.build_graph("ffn", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None)
    outside = {name for name in imports.find_upstream_modules("ffn.inference") if name.partition(".")[0] != "ffn"}
    of_the_code = outside - sys.stdlib_module_names - {"llvmlite"}  # which comes with numba
    assert of_the_code | {"mlflow", "pandas"} == set(tracking.SERVING_REQUIREMENTS)


def test_a_requirement_fits_every_build_of_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0+cpu")
    assert tracking.pinned("torch") == "torch==2.13.0"
