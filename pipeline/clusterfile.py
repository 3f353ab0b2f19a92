"""A cluster in a file under version control: where it is, and all that `ffn cluster compile` asks of it.

`--cluster FILE`, or the variable FFN_CLUSTER, names it. Each of its keys stands for an environment variable, which has the last
word where it is set. cluster/example.yaml has all of them. The file holds nothing that is secret.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from ffn.config import suggest
from ffn.errors import FFNError
from pipeline.settings import QUANTITIES, named, parsed


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of the file."""

    variable: str
    """What it stands for."""
    doc: str = ""
    also: tuple[str, ...] = ()
    """Variables that say the same, and override it too."""
    field: Field[Any] | None = None
    """Of `Settings`."""
    empty: bool = False
    """Whether the variable overrides it even where it is empty."""


PLACES: Mapping[str, Key] = {
    "kfp.url": Key(variable="FFN_KFP_URL", doc="KFP's API: https://host/pipeline, or http://ml-pipeline.kubeflow:8888 within."),
    "kfp.ui": Key(variable="FFN_KFP_UI", doc="Where a browser finds KFP's pages, for links; by default the same."),
    "kfp.namespace": Key(variable="FFN_KFP_NAMESPACE", doc="Profile of a multi-user installation."),
    "kfp.ca": Key(variable="FFN_KFP_CA", doc="File, where you sit, with the authorities that its certificate is to be trusted by."),
    "kfp.service_account": Key(
        variable="FFN_SERVICE_ACCOUNT", empty=True, doc='Account of a run\'s pods; "" for KFP\'s own.'
    ),
    "mlflow.uri": Key(variable="MLFLOW_TRACKING_URI", doc="MLflow, as the steps reach it."),
    "mlflow.ui": Key(
        variable="FFN_MLFLOW_UI", doc="MLflow, as you and your browser reach it: links, `ffn model`, `watch`, `cancel`, `gc`."
    ),
    "mlflow.experiment": Key(variable="MLFLOW_EXPERIMENT_NAME", doc="The experiment that runs are in."),
    "mlflow.artifacts": Key(variable="FFN_ARTIFACTS", doc="Where a new experiment keeps its files; by default the server decides."),
    "s3.endpoint": Key(
        variable="AWS_ENDPOINT_URL_S3", also=("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"),
        doc="The object store, as the steps reach it; by default Amazon's.",
    ),
    "s3.region": Key(variable="AWS_DEFAULT_REGION", doc="Its region."),
}  # fmt: skip
KEYS: Mapping[str, Key] = {
    **PLACES,
    **{item.name: Key(variable=f"FFN_{item.name.upper()}", field=item, empty=True) for item in named()},
}
SECTIONS = frozenset(name.partition(".")[0] for name in PLACES)

SECRET = re.compile(r"(.*\.)?(token|token_file|cookie|username|.*password|.*access_key(_id)?|webhook)", re.IGNORECASE)

KINDS: Mapping[object, tuple[tuple[str, ...], str]] = {
    bool: (("bool",), "true or false"),
    int: (("int",), "a whole number"),
    float: (("int", "float"), "a number"),
    str: (("str",), "text; quote it if it reads as something else"),
}
"""Type of a field -> YAML's types that it is written as, and what a person calls them."""


@contextlib.contextmanager
def applied(path: Path, *, from_here: bool = False) -> Iterator[None]:
    """Inside the block the environment says what the file does, where it said nothing; what it has said itself is told in a line.

    `from_here`: for what this process does itself MLflow is at the address that people use, and nothing is said of KFP and of the
    store, whose address is the steps' own. Raises `FFNError`.
    """
    given = read(path)
    if from_here and "mlflow.ui" in given:
        given["mlflow.uri"] = given["mlflow.ui"]
    new, overriding = {}, []
    for name, key in KEYS.items():
        if from_here and not key.field and name != "mlflow.uri":
            continue
        said = {v: os.environ[v] for v in (key.variable, *key.also) if os.environ.get(v) or (key.empty and v in os.environ)}
        overriding += [variable for variable, text in said.items() if text != given.get(name)]
        if name in given and not said:
            new[key.variable] = given[name]
    if overriding:
        print(f"ffn: {path}, and instead from the environment: {', '.join(overriding)}", file=sys.stderr)
    before = {variable: os.environ.get(variable) for variable in new}  # an empty one that does not count
    os.environ.update(new)
    try:
        yield
    finally:
        for variable, text in before.items():
            if text is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = text


def read(path: Path) -> dict[str, str]:
    """Key -> its value as its variable has it. Raises `FFNError` for a key that is none, and a value of another type or form."""
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise FFNError(f"{path}: {error.strerror}; cluster/example.yaml shows what it holds") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FFNError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return {name: _text(name, node, f"{path}:{line}") for name, node, line in _entries(root, path)} if root else {}


def _entries(node: yaml.Node, path: Path, section: str = "") -> Iterator[tuple[str, yaml.Node, int]]:
    """Every key with its value's node and the number of its line."""
    if not isinstance(node, yaml.MappingNode):
        raise FFNError(f"{path}:{node.start_mark.line + 1}: expected keys, each with a value{f', in {section}' * bool(section)}")
    seen = set()
    for key, content in node.value:
        name, line = f"{section}.{key.value}" if section else str(key.value), key.start_mark.line + 1
        if name in seen:
            raise FFNError(f"{path}:{line}: {name} stands there twice")
        seen.add(name)
        if name in SECTIONS:
            yield from _entries(content, path, name)
            continue
        if name not in KEYS:
            raise FFNError(f"{path}:{line}: {_unknown(name)}")
        yield name, content, line


def _unknown(name: str) -> str:
    if SECRET.fullmatch(name):
        return (
            f"{name} has no place in a file under version control: who you are say variables (FFN_KFP_TOKEN, "
            "MLFLOW_TRACKING_PASSWORD, ...), who the steps are the Secrets that the file names (mlflow_secret, s3_secret)"
        )
    variables = {variable: known for known, key in KEYS.items() for variable in (key.variable, *key.also)}
    if (variable := name.rpartition(".")[2]) in variables:
        return f"unknown key {name!r}: that variable is called {variables[variable]} here"
    return f"unknown key {name!r}: {suggest(name, KEYS)}"


def _text(name: str, node: yaml.Node, where: str) -> str:
    field = KEYS[name].field
    if name == "node_selector":
        text = ",".join(f"{label}={wanted}" for label, wanted in _strings(node, f"{where}: {name}").items())
    elif name == "tolerations":
        text = _tolerations(node, f"{where}: {name}")
    else:
        kinds, wanted = KINDS[field.type if field else str]
        if name in QUANTITIES:  # `cpu: 8` is a number to YAML
            kinds, wanted = ("str", "int", "float"), "a quantity such as 8, 500m, 32Gi"
        kind = node.tag.rpartition(":")[2]
        if not isinstance(node, yaml.ScalarNode) or kind not in kinds:
            raise FFNError(f"{where}: {name}: expected {wanted}{'; found nothing' if kind == 'null' else ''}")
        text = {"true": "1", "yes": "1", "on": "1"}.get(node.value.lower(), "0") if kind == "bool" else str(node.value)
    if "://" in text and urlsplit(text).password:
        raise FFNError(f"{where}: {name} holds a password; leave it out, and name a Secret of the cluster (mlflow_secret)")
    if field:
        parsed(field, f"{where}: {name}", text)
    return text


def _strings(node: yaml.Node, what: str) -> dict[str, str]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else None
    if pairs is None or any(part.tag != "tag:yaml.org,2002:str" for pair in pairs for part in pair):
        raise FFNError(f"{what}: expected names, each with text; quote what reads as a number or as true")
    if odd := [part.value for pair in pairs for part in pair if re.search(r"[,=:\s]", part.value)]:
        raise FFNError(f"{what}: {odd[0]!r}: no name or value of Kubernetes'")
    return {key.value: content.value for key, content in pairs}


def _tolerations(node: yaml.Node, what: str) -> str:
    """As FFN_TOLERATIONS has them."""
    if not isinstance(node, yaml.SequenceNode):
        raise FFNError(f"{what}: expected a list, of key=value:effect or {{key, value, effect}}")
    texts = []
    for entry in node.value:
        if isinstance(entry, yaml.ScalarNode):
            texts.append(str(entry.value))
            continue
        taint = _strings(entry, what)
        if unknown := [name for name in taint if name not in ("key", "value", "effect")]:
            raise FFNError(f"{what}: unknown key {unknown[0]!r}: {suggest(unknown[0], ('key', 'value', 'effect'))}")
        value_of, effect = taint.get("value", ""), taint.get("effect", "")
        texts.append(f"{taint.get('key', '')}{f'={value_of}' if value_of else ''}{f':{effect}' if effect else ''}")
    return ",".join(texts)
