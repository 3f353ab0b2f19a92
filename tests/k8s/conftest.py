"""Manifests as `kubectl apply -k` would send them."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = tuple(sorted(path.name for path in (K8S / "overlays").iterdir()))

Objects = list[dict[str, Any]]


@functools.cache
def render(folder: Path) -> Objects:
    """The objects of a kustomization; skips where neither kubectl nor kustomize is installed."""
    tools = {"kubectl": ["kubectl", "kustomize"], "kustomize": ["kustomize", "build"]}
    command = next((command for tool, command in tools.items() if shutil.which(tool)), None)
    if not command:
        pytest.skip("neither kubectl nor kustomize is installed")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def overlay(name: str) -> Objects:
    """The objects of that overlay."""
    return render(K8S / "overlays" / name)


@functools.cache
def with_volume() -> Objects:
    """The overlay `dev` with states of trainings on a volume."""
    with tempfile.TemporaryDirectory() as folder:
        edited = changed(Path(folder), "dev", "components:\n", "components:\n  - ../../components/volume\n")
        return render(edited)


def changed(folder: Path, name: str, old: str, new: str) -> Path:
    """That overlay in a copy of all manifests, with its one `old` replaced."""
    file = shutil.copytree(K8S, folder / "k8s") / "overlays" / name / "kustomization.yaml"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    return file.parent


@pytest.fixture(params=[*OVERLAYS, "volume"])
def objects(request: pytest.FixtureRequest) -> Objects:
    """The objects of one overlay after the other."""
    return with_volume() if request.param == "volume" else overlay(request.param)


def named(objects: Objects, kind: str, name: str) -> dict[str, Any]:
    """The one object of that kind and name."""
    (found,) = (item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name)
    return found


def pod(item: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Labels and spec of the pods that an object makes; None for one that makes none."""
    spec = item.get("spec", {})
    if item["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    if "template" not in spec:
        return None
    return spec["template"]["metadata"]["labels"], spec["template"]["spec"]


def containers(spec: dict[str, Any]) -> Objects:
    """Every container of a pod, those that run before the others too."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def env_file(path: Path) -> dict[str, str]:
    """Variables of a file of `NAME=value` lines."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)
