"""A cluster in a file: strict, complete in the example, enough by itself, and overridden by the environment."""

import ast
import dataclasses
import inspect
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from ffn.errors import FFNError
from pipeline import clusterfile, settings
from pipeline.cli import main
from pipeline.clusterfile import KEYS, PLACES, applied, read
from pipeline.server import Endpoint
from pipeline.settings import PASSED_ON, Settings, Toleration, named
from pipeline.submit import load
from tests.pipeline.kfp_server import FakeKFP, serving
from tests.pipeline.test_compile import ENVIRONMENT, GOLDEN, IMAGE

EXAMPLE = Path(__file__).parents[2] / "cluster" / "example.yaml"
"""Written anew by `FFN_GOLDEN=write pytest tests/pipeline/test_clusterfile.py` after a field came, went or changed."""

HEAD = """\
# A cluster: where it is, and what runs ask of it. Copy this file to cluster/<name>.yaml, put that under version control, and name
# it by `--cluster cluster/<name>.yaml` or FFN_CLUSTER to `ffn cluster` and `ffn model`.
#
# A variable that is set has the last word: FFN_<KEY>, or the one that a comment names. Nothing here is secret: who you are say
# variables (FFN_KFP_TOKEN_FILE, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD), who the steps are say Secrets of the cluster.

# --- What every cluster has its own of
"""
REST = """
# --- The rest, as it is without being said: leave out what you do not change
"""
OWN: dict[str, object] = {
    "kfp.url": "https://kubeflow.example/pipeline",
    "kfp.ui": "https://kubeflow.example",
    "mlflow.uri": "http://mlflow.ffn:5000",
    "mlflow.ui": "https://mlflow.example",
    "s3.endpoint": "http://s3.ffn:9000",
    "image": IMAGE,
    "mlflow_secret": "ffn-mlflow",
    "s3_secret": "ffn-s3",
    "checkpoints": "s3://ffn/states",
}
UNSAID = {"kfp.service_account": "ffn-pipeline", "mlflow.experiment": "ffn"}
FILE = f"""\
kfp:
  service_account: ""
mlflow:
  uri: http://mlflow.ffn:5000
image: {IMAGE}
pull_secret: registry
data_claim: recordings
mlflow_secret: ffn-mlflow
s3_secret: ffn-s3
ca: authorities
gpus: 2
node_selector:
  nvidia.com/gpu.product: NVIDIA-H200
  pool: train
tolerations:
  - nvidia.com/gpu:NoSchedule
  - {{key: dedicated, value: ffn, effect: NoExecute}}
parallelism: 2
checkpoints: s3://ffn/states
promote: true
"""
"""What `ENVIRONMENT` of the golden file says."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None of the variables that a file stands for; and what a verb sets for its process goes with the test."""
    for name in [name for name in os.environ if name.startswith(("FFN_", "MLFLOW_", "AWS_")) and name != "FFN_GOLDEN"]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(FILE)
    return path


# --- the example


def docs() -> dict[str, str]:
    """Field of `Settings` -> its docstring: there is no other place that says what it is."""
    (of,) = [node for node in ast.parse(inspect.getsource(settings)).body if getattr(node, "name", "") == "Settings"]
    assert isinstance(of, ast.ClassDef)
    said = {}
    for line, below in zip(of.body, of.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            assert isinstance(below, ast.Expr), line.target.id
            assert isinstance(below.value, ast.Constant), line.target.id
            said[line.target.id] = " ".join(str(below.value.value).split())
    return said


def example() -> str:
    said, values = docs(), {item.name: default(item) for item in named()}
    shown = values | OWN | UNSAID

    def entry(name: str) -> str:
        """A key below its comment; one that an address may do without is a comment itself."""
        section, _, key = name.rpartition(".")
        indent, text = (
            "  " * bool(section),
            KEYS[name].doc.removesuffix(".") + f" ({KEYS[name].variable})." if section else said[name],
        )
        comment = textwrap.fill(text, 130, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_long_words=False)
        written = yaml.safe_dump(shown.get(name, ""), default_flow_style=True, width=200).partition("\n")[0]
        unsaid = "# " * bool(section and name not in OWN)
        return f"{comment}\n{indent}{unsaid}{key}: {written.replace(chr(39), chr(34))}\n"

    text = HEAD
    for section in ("kfp", "mlflow", "s3"):
        text += f"{section}:\n" + "".join(entry(name) for name in PLACES if name.startswith(f"{section}."))
    text += "".join(entry(name) for name in values if name in OWN)
    return text + REST + "".join(entry(name) for name in values if name not in OWN)


def default(item: "dataclasses.Field[object]") -> object:
    value = item.default if item.default is not dataclasses.MISSING else {}
    return [] if value == () else value


def test_the_example_holds_every_key_with_what_it_is() -> None:
    if os.environ.get("FFN_GOLDEN") == "write":
        EXAMPLE.write_text(example())
    assert EXAMPLE.read_text() == example()


def test_the_example_says_what_holds_without_it() -> None:
    with applied(EXAMPLE):
        found = Settings.from_environment()
        there = Endpoint.from_environment()
    own = {name: value for name, value in OWN.items() if "." not in name}
    assert dataclasses.replace(found, environment={}) == Settings(**own)  # type: ignore[arg-type]
    assert (there.url, there.ui) == (OWN["kfp.url"], OWN["kfp.ui"])


def test_every_variable_that_is_passed_on_has_a_key() -> None:
    assert set(PASSED_ON) <= {variable for key in PLACES.values() for variable in (key.variable, *key.also)}


# --- alone


def test_the_file_alone_compiles_what_the_environment_does(file: Path, tmp_path: Path) -> None:
    """To the byte, whatever the file is called: the golden pipeline is compiled from the variables."""
    other = tmp_path / "another.yml"
    other.write_text(FILE)
    for path in (file, other):
        out = tmp_path / f"{path.stem}-pipeline.yaml"
        assert main(["cluster", "compile", "--cluster", str(path), "--protocols", "ntu60-xsub", "--out", str(out)]) == 0
        text = "".join(line for line in out.read_text().splitlines(keepends=True) if not line.startswith("sdkVersion: "))
        assert text == GOLDEN.read_text()
    versions = {load(tmp_path / f"{name}-pipeline.yaml", {"source": "/x"}).version for name in ("cluster", "another")}
    assert len(versions) == 1
    assert not {name for name in os.environ if name.startswith(("FFN_", "MLFLOW_TRACKING"))} - {"FFN_GOLDEN"}


def test_the_file_alone_submits_and_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    fake, out = FakeKFP(), tmp_path / "pipeline.yaml"
    fake.states = [{"state": "SUCCEEDED"}]  # type: ignore[assignment]
    with serving(fake) as url:
        path = tmp_path / "here.yaml"
        path.write_text(
            f"kfp:\n  url: {url}\n  ui: https://kfp.example\n  service_account: trainer\nimage: {IMAGE}\ncheckpoints: s3://a/b\n"
        )
        monkeypatch.setenv("FFN_CLUSTER", str(path))
        assert main(["cluster", "compile", "--protocols", "p", "--streams", "j", "--out", str(out)]) == 0
        assert main(["cluster", "submit", str(out), "--data", "/mnt/data/a", "--name", "once"]) == 0
        assert main(["cluster", "watch", "once"]) == 0
    (run,) = fake.runs
    assert run["service_account"] == "trainer"
    said = capsys.readouterr().err
    assert f"https://kfp.example/#/runs/details/{run['run_id']}" in said
    assert "instead from the environment" not in said


def test_models_are_looked_for_where_a_person_reaches_mlflow(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = os.environ.pop("MLFLOW_TRACKING_URI")
    store.create_registered_model("ffn-p")
    store.create_model_version("ffn-p", tmp_path.as_uri())
    path = tmp_path / "c.yaml"
    path.write_text(f"mlflow: {{uri: 'http://mlflow.ffn:5000', ui: '{uri}'}}\ns3: {{endpoint: 'http://s3.ffn:9000'}}\nretries: 1\n")
    with applied(path, from_here=True):
        assert os.environ["FFN_RETRIES"] == "1"
        assert "AWS_ENDPOINT_URL_S3" not in os.environ  # the steps' address
    assert main(["model", "list", "--cluster", str(path), "--workspace", str(tmp_path / "w")]) == 0
    assert capsys.readouterr().out.startswith("ffn-p\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'empty.db'}")
    assert main(["model", "list", "--cluster", str(path), "--workspace", str(tmp_path / "w")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("no models registered in")
    assert f"ffn: {path}, and instead from the environment: MLFLOW_TRACKING_URI" in err


# --- with the environment


def test_the_environment_overrides_field_by_field_and_that_is_said(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FFN_GPUS", "8")
    monkeypatch.setenv("FFN_PARALLELISM", "2")  # as the file has it
    monkeypatch.setenv("FFN_RETRIES", "0")  # of which the file says nothing
    monkeypatch.setenv("FFN_DATA_CLAIM", "")  # none
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # an address that is empty is none
    monkeypatch.setenv("FFN_KFP_TOKEN", "t")  # no key: nobody's to override
    with applied(file):
        found = Settings.from_environment()
    assert (found.gpus, found.parallelism, found.retries, found.data_claim) == (8, 2, 0, "")
    assert found.ca == "authorities"
    assert found.environment == {"MLFLOW_TRACKING_URI": "http://mlflow.ffn:5000"}
    assert found.tolerations == (
        Toleration(key="nvidia.com/gpu", effect="NoSchedule"),
        Toleration(key="dedicated", value="ffn", effect="NoExecute"),
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"ffn: {file}, and instead from the environment: FFN_DATA_CLAIM, FFN_GPUS, FFN_RETRIES"
    assert os.environ["MLFLOW_TRACKING_URI"] == ""


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"])
def test_any_name_of_the_stores_address_overrides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("s3: {endpoint: 'http://s3.ffn:9000', region: eu-west-1}\n")
    monkeypatch.setenv(variable, "http://127.0.0.1:9000")
    with applied(path):
        found = Settings.from_environment().environment
    assert found == {variable: "http://127.0.0.1:9000", "AWS_DEFAULT_REGION": "eu-west-1"}


# --- strict


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image: x\ngpu_s: 1", ":2: unknown key 'gpu_s': did you mean gpus"),
        ("kfp:\n  urls: x", ":2: unknown key 'kfp.urls': did you mean kfp.url"),
        ("FFN_IMAGE: x", ":1: unknown key 'FFN_IMAGE': that variable is called image here"),
        ("mlflow:\n  MLFLOW_TRACKING_URI: x", ":2: unknown key .*: that variable is called mlflow.uri here"),
        ("local: true", ":1: unknown key 'local'"),
        ("kfp:\n  token: abc", ":2: kfp.token has no place in a file under version control"),
        ("kfp:\n  token_file: abc", ":2: kfp.token_file has no place"),
        ("s3:\n  secret_access_key: abc", ":2: s3.secret_access_key has no place"),
        ("mlflow:\n  MLFLOW_TRACKING_PASSWORD: abc", ":2: mlflow.MLFLOW_TRACKING_PASSWORD has no place"),
        ("mlflow:\n  uri: http://a:b@mlflow", ":2: mlflow.uri holds a password"),
        ("gpus: two", ":1: gpus: expected a whole number"),
        ("gpus: 1.5", ":1: gpus: expected a whole number"),
        ("gpus: -1", ":1: gpus='-1': expected a whole number"),
        ("promote: 1", ":1: promote: expected true or false"),
        ("memory: 32 GB", ":1: memory='32 GB': expected a quantity"),
        ("cpu: true", ":1: cpu: expected a quantity"),
        ("data_claim: 5", ":1: data_claim: expected text"),
        ("image:", ":1: image: expected text; quote it if it reads as something else; found nothing"),
        ("image: [a]", ":1: image: expected text"),
        ("image: x\nimage: y", ":2: image stands there twice"),
        ("kfp: x", ":1: expected keys, each with a value, in kfp"),
        ("- image", ":1: expected keys"),
        ("node_selector: pool=train", ":1: node_selector: expected names, each with text"),
        ("node_selector: {a: 1}", ":1: node_selector: expected names, each with text; quote"),
        ("node_selector: {a: 'b,c=d'}", ":1: node_selector: 'b,c=d': no name or value of Kubernetes'"),
        ("tolerations: gpu", ":1: tolerations: expected a list"),
        ("tolerations:\n  - gpu:Never", ":1: tolerations: 'gpu:Never': expected KEY"),
        ("tolerations: [{key: a, operator: Exists}]", ":1: tolerations: unknown key 'operator'"),
        ("tolerations: [{value: a}]", ":1: tolerations: '=a': expected KEY"),
        ("a: [", "not YAML: .*line"),
        ("image: x\n---\nimage: y", "not YAML: .*another document"),
        ("image: !!python/object/apply:os.system [id]", ":1: image: expected text"),
        ("\0", "not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(FFNError, match=f"^{path}.*{said}") as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "compile", "--cluster", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "p.yaml")]) == 2
    assert capsys.readouterr().err == (
        f"ffn: error: {tmp_path / 'c.yaml'}: No such file or directory; cluster/example.yaml shows what it holds\n"
    )


def test_numbers_that_are_quantities_and_words_for_true(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("cpu: 4\nlight_cpu: 0.5\nmemory: 8Gi\npromote: no\n")
    assert clusterfile.read(path) == {"cpu": "4", "light_cpu": "0.5", "memory": "8Gi", "promote": "0"}
    path.write_text("# nothing\n")
    assert clusterfile.read(path) == {}


def test_the_golden_environment_is_this_file(file: Path) -> None:
    """So that the test above compares what it says it does."""
    said = read(file)
    for name, text in said.items():
        if name != "kfp.service_account":
            assert ENVIRONMENT[KEYS[name].variable].replace(", ", ",") == text
