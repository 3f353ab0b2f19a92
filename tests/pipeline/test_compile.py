"""The compiled pipeline as a cluster reads it: the golden file, and the facts that must hold in it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, dsl

from components import wiring
from ffn.config import STREAMS, Policy
from ffn.errors import FFNError
from ffn.protocols import NTU_PROTOCOLS
from pipeline.cli import main
from pipeline.placement import HEAVY, STORES, lifetime, place, threads
from pipeline.settings import Settings, Toleration, policy
from pipeline.submit import load

GOLDEN = Path(__file__).parent / "golden" / "pipeline.yaml"
"""Written anew by `FFN_GOLDEN=write pytest tests/pipeline/test_compile.py`; read the difference before you commit it."""

IMAGE = "registry.example/ffn@sha256:" + "0123456789abcdef" * 4
ENVIRONMENT = {
    "FFN_IMAGE": IMAGE,
    "FFN_PULL_SECRET": "registry",
    "FFN_DATA_CLAIM": "recordings",
    "FFN_CHECKPOINTS": "s3://ffn/states",
    "FFN_MLFLOW_SECRET": "ffn-mlflow",
    "FFN_S3_SECRET": "ffn-s3",
    "FFN_CA": "authorities",
    "FFN_GPUS": "2",
    "FFN_NODE_SELECTOR": "nvidia.com/gpu.product=NVIDIA-H200, pool=train",
    "FFN_TOLERATIONS": "nvidia.com/gpu:NoSchedule,dedicated=ffn:NoExecute",
    "FFN_PARALLELISM": "2",
    "FFN_PROMOTE": "1",
    "MLFLOW_TRACKING_URI": "http://mlflow.ffn:5000",
    "MLFLOW_TRACKING_USERNAME": "u-s-e-r",
    "MLFLOW_TRACKING_PASSWORD": "p-a-s-s-w-o-r-d",
    "AWS_ACCESS_KEY_ID": "i-d",
    "AWS_SECRET_ACCESS_KEY": "k-e-y",
}


def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiling environment: the above and nothing else that compiling reads."""
    for name in [name for name in os.environ if name.startswith(("FFN_", "MLFLOW_", "AWS_")) and name != "FFN_GOLDEN"]:
        monkeypatch.delenv(name)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch)


class Spec:
    """Both documents of a compiled pipeline."""

    def __init__(self, path: Path) -> None:
        self.pipeline, platform = yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader)
        self.executors = self.pipeline["deploymentSpec"]["executors"]
        self.pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    def tasks(self) -> list[tuple[str, str, int, int, dict[str, Any]]]:
        """Step, executor, how many of it run, how many at once within their loop, and what the graph says: all that get a pod."""
        return list(self._walk(self.pipeline["root"]["dag"], 1, 1))

    def _walk(self, dag: dict[str, Any], count: int, at_once: int) -> Any:
        for task in dag["tasks"].values():
            component = self.pipeline["components"][task["componentRef"]["name"]]
            if "dag" not in component:
                yield task["taskInfo"]["name"], component["executorLabel"], count, at_once, task
                continue
            loop = task.get("parameterIterator")
            items = len(json.loads(loop["items"]["raw"])) if loop else 1
            limit = task.get("iteratorPolicy", {}).get("parallelismLimit", items)
            yield from self._walk(component["dag"], count * items, at_once * limit)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_up(monkeypatch)
        assert main(["cluster", "compile", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def spec(compiled: Path) -> Spec:
    return Spec(compiled)


def test_the_compiled_pipeline_is_the_golden_file(cluster: None, tmp_path: Path) -> None:
    """Of one protocol: the others differ in their name."""
    path = tmp_path / "pipeline.yaml"
    assert main(["cluster", "compile", "--protocols", "ntu60-xsub", "--out", str(path)]) == 0
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("sdkVersion: "))
    if os.environ.get("FFN_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_sixteen_trainings_ask_for_gpus_two_of_a_protocol_at_once(spec: Spec) -> None:
    asked = {
        executor: (step, count, at_once, spec.executors[executor]["container"]["resources"].get("accelerator"))
        for step, executor, count, at_once, _ in spec.tasks()
    }
    for kind, count in (("train", "2"), ("evaluate", "1")):
        gpus = {"type": "nvidia.com/gpu", "resourceType": "nvidia.com/gpu", "count": count, "resourceCount": count}
        of = [row for row in asked.values() if row[0] == kind]
        assert sum(number for _, number, _, _ in of) == len(NTU_PROTOCOLS) * len(STREAMS) == 16
        assert {at_once for _, _, at_once, _ in of} == {2}
        assert all(accelerator == gpus for *_, accelerator in of)
    assert {row[0] for row in asked.values() if row[3]} == {"train", "evaluate", "gate"}


def test_every_step_has_limits_a_deadline_and_retries_that_outlast_it(spec: Spec) -> None:
    for step, executor, _, _, task in spec.tasks():
        resources, pod, retry = spec.executors[executor]["container"]["resources"], spec.pods[executor], task["retryPolicy"]
        assert {"resourceCpuLimit", "resourceMemoryLimit", "resourceCpuRequest", "resourceMemoryRequest"} <= set(resources), step
        assert resources["memoryRequest"] <= resources["memoryLimit"]
        assert resources["cpuRequest"] <= resources["cpuLimit"]
        assert retry["maxRetryCount"] == 2
        assert int(retry["backoffMaxDuration"].rstrip("s")) > 3 * int(pod["activeDeadlineSeconds"]) > 0, step


def test_a_process_has_as_many_threads_as_its_limit_has_room_for(spec: Spec) -> None:
    for step, executor, *_ in spec.tasks():
        variables = {entry["name"]: entry["value"] for entry in spec.executors[executor]["container"]["env"]}
        assert variables["OMP_NUM_THREADS"] == ("8" if step in HEAVY else "2")
    assert [threads(cpu) for cpu in ("8", "2.5", "2500m", "500m")] == [8, 2, 2, 1]


def test_nothing_is_cached_by_kfp(spec: Spec) -> None:
    """Of what is cached the launcher tells KFP's API, which no step may reach (k8s/runs/network.yaml)."""
    assert not [step for step, *_, task in spec.tasks() if task.get("cachingOptions", {}).get("enableCache")]
    assert {step for step, *_ in spec.tasks()} == {
        "begin", "ingest", "train", "evaluate", "fuse", "register", "gate", "promote", "results",
    }  # fmt: skip


def test_images_are_named_by_digest(spec: Spec) -> None:
    assert {executor["container"]["image"] for executor in spec.executors.values()} == {IMAGE}
    assert {secret["secretName"] for pod in spec.pods.values() for secret in pod["imagePullSecret"]} == {"registry"}


def test_secrets_are_named_and_never_written(compiled: Path, spec: Spec) -> None:
    text = compiled.read_text()
    assert not [
        name for name in ENVIRONMENT if name.endswith(("USERNAME", "PASSWORD", "_ID", "_KEY")) and ENVIRONMENT[name] in text
    ]
    for pod in spec.pods.values():
        of = {entry["secretName"]: {key["envVar"] for key in entry["keyToEnv"]} for entry in pod["secretAsEnv"]}
        assert of == {
            "ffn-mlflow": {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"},
            "ffn-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
        }


def test_the_webhook_is_a_secret_of_the_steps_that_notify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without it they run all the same: a message is no reason to fail."""
    set_up(monkeypatch)
    monkeypatch.setenv("FFN_WEBHOOK", "https://hooks.example/secret")
    monkeypatch.setenv("FFN_WEBHOOK_SECRET", "ffn-webhook")
    monkeypatch.setenv("FFN_PROMOTE", "1")
    assert main(["cluster", "compile", "--protocols", "p", "--streams", "j", "--out", str(tmp_path / "pipeline.yaml")]) == 0
    assert "hooks.example" not in (tmp_path / "pipeline.yaml").read_text()
    spec = Spec(tmp_path / "pipeline.yaml")
    got = {
        step: secret.get("optional")
        for step, executor, *_ in spec.tasks()
        for secret in spec.pods[executor]["secretAsEnv"]
        if secret["secretName"] == "ffn-webhook" and secret["keyToEnv"] == [{"envVar": "FFN_WEBHOOK", "secretKey": "FFN_WEBHOOK"}]
    }
    assert got == {"results": True, "promote": True}


def test_states_and_recordings_are_volumes_where_they_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_up(monkeypatch)
    monkeypatch.setenv("FFN_CHECKPOINTS", "/mnt/checkpoints")
    monkeypatch.setenv("FFN_CHECKPOINTS_CLAIM", "ffn-checkpoints")
    assert main(["cluster", "compile", "--protocols", "ntu60-xsub", "--out", str(tmp_path / "pipeline.yaml")]) == 0
    spec = Spec(tmp_path / "pipeline.yaml")
    mounted = {
        (step, mount["mountPath"]) for step, executor, *_ in spec.tasks() for mount in spec.pods[executor].get("pvcMount", [])
    }
    assert mounted == {("ingest", "/mnt/data"), *((step, "/mnt/checkpoints") for step in STORES)}
    trained = [task["inputs"]["parameters"] for step, *_, task in spec.tasks() if step == "train"]
    given = {inputs["checkpoints"]["runtimeValue"]["constant"] for inputs in trained}
    assert given == {"/mnt/checkpoints"}


def test_states_in_an_object_store_need_no_volume(spec: Spec) -> None:
    trained = [(executor, task) for step, executor, *_, task in spec.tasks() if step == "train"]
    assert not any("pvcMount" in spec.pods[executor] for executor, _ in trained)
    given = {task["inputs"]["parameters"]["checkpoints"]["runtimeValue"]["constant"] for _, task in trained}
    assert given == {"s3://ffn/states"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"FFN_CHECKPOINTS": ""}, "FFN_CHECKPOINTS='': expected s3://BUCKET/PREFIX, or the folder of a volume"),
        ({"FFN_CHECKPOINTS": "gs://b/x"}, "FFN_CHECKPOINTS='gs://b/x': expected s3://"),
        ({"FFN_CHECKPOINTS": "/mnt/x"}, "FFN_CHECKPOINTS='/mnt/x': a folder of the pod itself, and gone with it"),
    ],
)
def test_states_that_would_not_be_kept_are_refused(
    given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(monkeypatch)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["cluster", "compile", "--protocols", "ntu60-xsub", "--out", str(tmp_path / "pipeline.yaml")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "pipeline.yaml").exists()


def test_what_argo_keeps_of_a_run_is_said_by_the_pipeline(tmp_path: Path) -> None:
    @dsl.pipeline(pipeline_config=lifetime())
    def pipeline() -> None:
        place(wiring.ingest(source="s", source_version="", space="3d", store="s3://b"), Settings(image=IMAGE))

    compiler.Compiler().compile(pipeline, str(tmp_path / "pipeline.yaml"))
    _, platform = yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text())
    # Both: Argo takes what is left out from KFP's defaults, which would go before one for either end.
    kept = platform["platforms"]["kubernetes"]["pipelineConfig"]
    assert kept == {"resourceTtlOnSuccess": 3600, "resourceTtlOnFailure": 86400}


def test_promotion_is_left_to_a_person_unless_the_steps_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_up(monkeypatch)
    for given, promotes in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FFN_PROMOTE", given)
        if not given:
            monkeypatch.delenv("FFN_PROMOTE")
        assert main(["cluster", "compile", "--protocols", "ntu60-xsub", "--out", str(tmp_path / "pipeline.yaml")]) == 0
        steps = {step for step, *_ in Spec(tmp_path / "pipeline.yaml").tasks()}
        assert "gate" in steps
        assert ("promote" in steps) == promotes


def test_the_gate_is_told_its_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_up(monkeypatch)
    monkeypatch.setenv("FFN_FLOOR", "0.8")
    monkeypatch.setenv("FFN_MARGIN", "-0.01")
    assert main(["cluster", "compile", "--protocols", "ntu60-xsub", "--out", str(tmp_path / "pipeline.yaml")]) == 0
    (gate,) = [task["inputs"]["parameters"] for step, *_, task in Spec(tmp_path / "pipeline.yaml").tasks() if step == "gate"]
    told = {name: gate[name]["runtimeValue"]["constant"] for name in ("floor", "margin", "significance", "class_drop")}
    assert told == {"floor": 0.8, "margin": -0.01, "significance": 0.05, "class_drop": 0.2}
    assert policy() == Policy(floor=0.8, margin=-0.01)


def test_heavy_steps_run_on_chosen_nodes_with_memory_to_share(spec: Spec) -> None:
    for step, executor, *_ in spec.tasks():
        pod = spec.pods[executor]
        heavy = step in HEAVY
        selector = {"nvidia.com/gpu.product": "NVIDIA-H200", "pool": "train"}
        assert pod.get("nodeSelector", {}).get("labels", {}) == (selector if heavy else {})
        assert [(t["key"], t["operator"], t.get("value"), t["effect"]) for t in pod.get("tolerations", [])] == (
            [("nvidia.com/gpu", "Exists", None, "NoSchedule"), ("dedicated", "Equal", "ffn", "NoExecute")] if heavy else []
        )
        shared = [mount["mountPath"] for mount in pod.get("emptyDirMounts", []) if mount["medium"] == "Memory"]
        assert shared == (["/dev/shm"] if heavy else [])
        component = {"results": "finish"}.get(step, step)
        assert pod["podMetadata"]["labels"] == {"app.kubernetes.io/part-of": "ffn", "app.kubernetes.io/component": component}


def test_every_pod_names_user_and_group(spec: Spec) -> None:
    """Where a pod names no group the kubelet takes root's, and the volume of the states belongs to another."""
    assert {json.dumps(pod["securityContext"], sort_keys=True) for pod in spec.pods.values()} == {
        json.dumps({"runAsGroup": "65532", "runAsNonRoot": True, "runAsUser": "65532"})
    }


def test_a_light_step_asks_for_no_more_than_its_limit(cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FFN_LIGHT_CPU", "250m")
    monkeypatch.setenv("FFN_LIGHT_MEMORY", "1Gi")
    assert main(["cluster", "compile", "--protocols", "p", "--streams", "j", "--out", str(tmp_path / "p.yaml")]) == 0
    asked = Spec(tmp_path / "p.yaml").executors["exec-begin"]["container"]["resources"]
    assert (asked["resourceCpuRequest"], asked["resourceMemoryRequest"]) == ("250m", "1Gi")
    assert (asked["resourceCpuLimit"], asked["resourceMemoryLimit"]) == ("250m", "1Gi")


def test_a_steps_attempts_are_its_own(spec: Spec) -> None:
    for step, executor, *_ in spec.tasks():
        assert {"name": "FFN_ATTEMPTS", "value": "3"} in spec.executors[executor]["container"]["env"], step


def test_the_version_names_image_and_graph_and_nothing_else(cluster: None, tmp_path: Path) -> None:
    versions = []
    for name, streams in (("a", "j"), ("b", "j"), ("c", "j,b")):
        path = tmp_path / f"{name}.yaml"
        assert main(["cluster", "compile", "--protocols", "p", "--streams", streams, "--out", str(path)]) == 0
        versions.append(load(path, {"source": "/x"}).version)
    first, again, other = versions
    assert first == again
    assert [len(part) for part in first.split("-")] == [12, 12]
    assert first.split("-")[0] == other.split("-")[0] == IMAGE.rpartition("sha256:")[2][:12]
    assert first != other


def test_a_run_of_more_boxes_than_argo_keeps_is_warned_of(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = ",".join(map(str, range(16)))
    command = ["cluster", "compile", "--protocols", "p", "--streams", "j", "--seeds", seeds, "--out", str(tmp_path / "p.yaml")]
    assert main(command) == 0
    assert "ffn: warning: 16 boxes of protocol, preset and seed" in capsys.readouterr().err


def test_a_private_authority_is_trusted_by_both_clients(spec: Spec) -> None:
    for name, pod in spec.pods.items():
        (mount,) = pod["configMapAsVolume"]
        assert (mount["configMapName"], mount["mountPath"]) == ("authorities", "/etc/ffn/ca")
        variables = {entry["name"]: entry["value"] for entry in spec.executors[name]["container"]["env"]}
        assert variables["AWS_CA_BUNDLE"] == variables["REQUESTS_CA_BUNDLE"] == "/etc/ffn/ca/ca.crt"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FFN_TOLERATIONS", "gpu:Never", r"FFN_TOLERATIONS: 'gpu:Never': expected KEY\[=VALUE\]"),
        ("FFN_TOLERATIONS", "=x", "FFN_TOLERATIONS: '=x'"),
        ("FFN_NODE_SELECTOR", "pool", "FFN_NODE_SELECTOR: 'pool': expected KEY=VALUE"),
        ("FFN_MEMORY", "32 GB", "FFN_MEMORY='32 GB': expected a quantity"),
        ("FFN_HOURS", "1.5", "FFN_HOURS='1.5': expected a whole number"),
        ("FFN_PROMOTE", "no", "FFN_PROMOTE='no': expected 0 or 1"),
        ("FFN_FLOOR", "half", "FFN_FLOOR='half': expected a fraction, as 0.5"),
        ("FFN_FLOOR", "50", "gate: floor is 50.0, expected a fraction from 0 to 1"),
        ("MLFLOW_TRACKING_URI", "http://a:b@mlflow", "MLFLOW_TRACKING_URI holds a password"),
    ],
)
def test_a_setting_of_the_wrong_form_is_named(
    cluster: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(FFNError, match=said):
        Settings.from_environment()


@pytest.mark.parametrize("value", ["", "v"])
@pytest.mark.parametrize("effect", ["", "NoExecute"])
def test_a_toleration_is_read_as_kubectl_writes_taints(value: str, effect: str) -> None:
    text = "k/y" + (f"={value}" if value else "") + (f":{effect}" if effect else "")
    assert Toleration.parse(text) == Toleration(key="k/y", value=value, effect=effect)


def test_a_tag_is_warned_of(
    cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FFN_IMAGE", "registry.example/ffn:latest")
    assert main(["cluster", "compile", "--protocols", "p", "--streams", "j", "--out", str(tmp_path / "p.yaml")]) == 0
    assert "ffn: warning: image registry.example/ffn:latest is a tag" in capsys.readouterr().err
