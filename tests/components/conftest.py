import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ffn.data.store import SkeletonSet
from tests.conftest import toy_recordings, write_set

TINY = [
    "training.epochs=2",
    "training.batch_size=8",
    "model.width=8",
    "model.depths=1",
    "clip.frames=8",
    "clip.test_clips=1",
]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database without anything in it: making one takes seconds, copying it none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """An MLflow store of this test's own, the one that the steps use."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("FFN_ARTIFACTS", (tmp_path / "artifacts").as_uri())
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    return MlflowClient(uri)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> SkeletonSet:
    """Twenty-four recordings of three classes, one protocol, `p`."""
    arrays, labels = toy_recordings()
    return write_set(tmp_path_factory.mktemp("toy") / "set.arrow", arrays, "3d", labels=labels)
