"""compose.yaml says what the manifests say: one truth for the cluster, the single machine and the tests that start it."""

from typing import Any

import yaml

from tests.k8s.conftest import K8S, ROOT, containers, env_file, named, pod, render

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_services_run_what_the_pods_run() -> None:
    dev = render(K8S / "overlays" / "dev")
    pods = {
        name: pod(named(dev, kind, name))
        for kind, name in (("Deployment", "mlflow"), ("Deployment", "s3"), ("StatefulSet", "postgres"))
    }
    running = {container["name"]: container for made in pods.values() if made for container in containers(made[1])}
    for name in ("mlflow", "prepare"):
        assert COMPOSE[name]["command"] == running[name]["command"]
    assert [word.replace("$$", "$") for word in COMPOSE["s3"]["entrypoint"]] == running["s3"]["command"]
    for name in ("postgres", "s3"):
        assert COMPOSE[name]["image"] == running[name]["image"]
    assert COMPOSE["mlflow"]["image"] == "${FFN_IMAGE:-" + running["mlflow"]["image"] + "}"
    initdb = {variable["name"]: variable.get("value") for variable in running["postgres"]["env"]}
    assert {name: initdb[name] for name in COMPOSE["postgres"]["environment"]} == COMPOSE["postgres"]["environment"]


def test_services_get_the_settings_of_the_pods() -> None:
    dev = render(K8S / "overlays" / "dev")
    (settings,) = (item["data"] for item in dev if item["kind"] == "ConfigMap" and "MLFLOW_PORT" in item.get("data", {}))
    assert settings == env_file(ROOT / COMPOSE["mlflow"]["env_file"][0])
    assert all((ROOT / f"{name}.example").is_file() for name in COMPOSE["mlflow"]["env_file"][1:])


def test_services_are_hardened_and_local() -> None:
    for name, service in COMPOSE.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
