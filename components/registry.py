"""Registered models in MLflow: versions, their aliases, tags and files.

Each protocol has two: steps register candidates (`ffn-<protocol>-candidates`), a promoter makes champions (`ffn-<protocol>`), which
everything that serves or predicts follows. Where MLflow has accounts (k8s/base/prepare.py) steps may write the first alone. A
champion's files stay where its candidate's are, and whoever wrote those may write them again: so every version carries the digest
of its files, and nothing is loaded that has another.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.tracking import KEY, KIND, PARENT, children, results
from ffn.config import suggest
from ffn.errors import FFNError
from ffn.report import in_order

RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"

CANDIDATES = "-candidates"
"""How the name of the model that steps may write ends."""

DIGEST, CANDIDATE, REPLACES, ROLLED_BACK = "digest", "candidate", "replaces", "rolled_back"
"""Tags of versions: the digest of the files; on a champion's also the candidate it was (`NAME/NUMBER`), whose place it took (a
number, or `none`), and since when it is no champion any more by a person's will."""

UNSEALED = frozenset({"registered_model_meta"})
"""Files that MLflow's client adds to what it downloads. Source: mlflow 3.17.2, store/artifact/models_artifact_repo.py:214."""

LONGEST_ERROR = 600
"""What of MLflow's own words is shown to a person."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of a registered model."""

    name: str
    number: str
    tags: Mapping[str, str]
    run: str = ""
    """Id of the MLflow run that registered it."""
    registered: datetime | None = None
    aliases: tuple[str, ...] = ()
    """Only where `history` or `find` read it: MLflow keeps them with the model, and says none of its versions."""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"

    @property
    def called(self) -> str:
        """As people name it: `ffn-ntu60-xsub/3`."""
        return f"{self.name}/{self.number}"

    @property
    def champions(self) -> str:
        """The model whose versions this one's protocol has had for champions."""
        return self.name.removesuffix(CANDIDATES)


def candidates(name: str) -> str:
    """The model of the candidates of `name`, which may be that one itself."""
    return name.removesuffix(CANDIDATES) + CANDIDATES


def register(name: str, model: str, *, key: str, run: str, tags: Mapping[str, str]) -> Version:
    """A version of the model `name`, made from the logged model `model`; the one made before from the same `key`, if any."""
    client = MlflowClient()
    create(name)
    found = list(client.search_model_versions(f"name = '{name}' and tag.`{KEY}` = '{key}'"))
    # A server refuses a logged model as the source unless its id is said too; a database takes it.
    model_id = model.removeprefix("models:/") if model.startswith("models:/m-") else None
    made = found[0] if found else client.create_model_version(name, model, run_id=run, tags={KEY: key, **tags}, model_id=model_id)
    return _version(made)


def versions(parent_id: str) -> list[Version]:
    """The versions that a pipeline run registered, or found registered."""
    client = MlflowClient()
    made = children(client, parent_id, also=f" and tags.`{KIND}` = 'register'")
    said = [(run.data.params.get("model"), run.data.metrics.get("version")) for run in made]
    found = [version(name, number=str(int(number))) for name, number in said if name and number]
    return [one for one in found if one]


def version(name: str, *, number: str = "", alias: str = "") -> Version | None:
    """The version of `name` with that number or alias; None where there is none.

    An alias is searched for: asked for that of a model which is not there, MLflow answers who is no administrator with status 403,
    as if the account were wrong.
    """
    client = MlflowClient()
    if not number:
        known = client.search_registered_models(f"name = '{name}'")
        number = next((str(model.aliases[alias]) for model in known if alias in model.aliases), "")
    try:
        return _version(client.get_model_version(name, number)) if number else None
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def champion(name: str) -> Version | None:
    """The version of `name` that is champion; None where none is."""
    return version(name, alias="champion")


def copies(candidate: Version) -> list[Version]:
    """The versions of the champions' model that were made of the candidate, the oldest first."""
    return _search(f"name = '{candidate.champions}' and tag.`{CANDIDATE}` = '{candidate.called}'")


def rivals(name: str, replaces: str) -> list[Version]:
    """The versions of `name` that took or are to take the place of the champion number `replaces`, the oldest first."""
    found = _search(f"name = '{name}' and tag.`{REPLACES}` = '{replaces}'")
    return [version for version in found if not version.tags.get(ROLLED_BACK)]


def copy(candidate: Version, tags: Mapping[str, str]) -> Version:
    """The candidate as a version of the champions' model, with its tags and, over them, these.

    What `MlflowClient.copy_model_version` does, but for the tags: with those of its own a copy says from its first moment what it
    is for. Source: mlflow 3.17.2, store/model_registry/abstract_store.py:435.
    """
    client, kept = MlflowClient(), {name: value for name, value in candidate.tags.items() if not name.startswith("mlflow.")}
    source = client.get_model_version(candidate.name, candidate.number)
    try:
        create(candidate.champions)
        made = client.create_model_version(
            candidate.champions, candidate.uri, run_id=source.run_id, tags={**kept, **tags}, model_id=source.model_id or None
        )
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        raise FFNError(
            f"{candidate.champions}: MLflow does not let this account make champions; the account `promoter` may"
        ) from None
    return _version(made)


def withdraw(version: Version) -> None:
    """Delete a version; its number is never given again."""
    MlflowClient().delete_model_version(version.name, version.number)


def create(name: str) -> None:
    """Make the registered model `name` unless it is there."""
    client = MlflowClient()
    if client.search_registered_models(f"name = '{name}'"):
        return
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def at(uri: str) -> Version:
    """The version that `models:/NAME/NUMBER` names. Raises `FFNError` where there is none."""
    name, _, number = uri.removeprefix("models:/").partition("/")
    found = version(name, number=number) if number.isdigit() else None
    if not found:
        raise FFNError(f"{uri}: no such model version in {mlflow.get_registry_uri()}; expected models:/NAME/NUMBER")
    return found


def find(text: str, *, alias: str = "") -> Version:
    """The version that `NAME/NUMBER` or `NAME@ALIAS` names, with or without `models:/` before it; `NAME` alone means `alias`.

    Raises `FFNError` where it reads otherwise, or where there is no such version, with the names that are near.
    """
    said = re.fullmatch(r"(?:models:/)?([^/@]+)(?:/([0-9]+)|@([^/@]+))?", text)
    name, number, alias = (said[1], said[2], said[3] or alias) if said else ("", "", "")
    if not number and not alias:
        raise FFNError(f"{text}: expected a version, as ffn-PROTOCOL/NUMBER or ffn-PROTOCOL@ALIAS")
    known = models()
    require_model(name, known)
    if not number and alias not in known[name]:
        raise FFNError(f"{name}: no alias {alias!r}: {suggest(alias, known[name]) if known[name] else 'it has none'}")
    wanted, versions = str(int(number or known[name][alias])), history(name, known[name])
    found = next((version for version in versions if version.number == wanted), None)
    if not found:
        numbers = ", ".join(version.number for version in versions)
        raise FFNError(f"{name}: no version {wanted}: {f'expected one of {numbers}' if numbers else 'it has none'}")
    return found


def require_model(name: str, known: Collection[str]) -> None:
    """Raise `FFNError` where `name` is none of the `known` models, with those that are near."""
    if name not in known:
        near = suggest(name, known) if known else "there are none; `ffn run` makes some"
        raise FFNError(f"no model {name!r} registered in {mlflow.get_registry_uri()}: {near}")


def models() -> dict[str, dict[str, str]]:
    """Registered model -> its aliases -> the number of the version that each names."""
    found = MlflowClient().search_registered_models(max_results=1000)
    return {model.name: {alias: str(number) for alias, number in model.aliases.items()} for model in found}


def history(name: str, aliases: Mapping[str, str]) -> list[Version]:
    """The versions of the model `name`, newest first, each with those of the model's `aliases` that name it."""
    made = reversed(_search(f"name = '{name}'"))
    return [replace(one, aliases=tuple(sorted(alias for alias, number in aliases.items() if number == one.number))) for one in made]


def registered() -> list[str]:
    """Names of the registered models."""
    return [model.name for model in MlflowClient().search_registered_models(max_results=1000)]


def point(version: Version, alias: str) -> None:
    """Make `alias` name this version. Of two that make one alias at the same moment MLflow fails one: it is asked once more."""
    client = MlflowClient()
    try:
        client.set_registered_model_alias(version.name, alias, version.number)
    except MlflowException:
        client.set_registered_model_alias(version.name, alias, version.number)


def mark(version: Version, tags: Mapping[str, str]) -> None:
    """Set tags of the version."""
    client = MlflowClient()
    for name, value in tags.items():
        client.set_model_version_tag(version.name, version.number, name, value)


@contextlib.contextmanager
def fused(version: Version) -> Iterator[Path]:
    """Inside the block a folder with the version's fused model: `fusion.json` and one checkpoint per stream.

    Raises `FFNError` where its files are not those of its digest.
    """
    with tempfile.TemporaryDirectory() as folder:
        fetch(version, Path(folder))
        yield Path(folder) / "artifacts" / "fused"


def fetch(version: Version, into: Path) -> str:
    """Download the version's model into the folder `into`; its digest. Raises `FFNError` where that is not the version's own.

    Nothing of the files is read but for that, and where it raises none is left.
    """
    wanted = version.tags.get(DIGEST)
    if not wanted:
        raise FFNError(f"{version.called}: it carries no digest of its files, as versions of earlier days; register it anew")
    found = sealed(version.uri, into)
    if found != wanted:
        shutil.rmtree(into, ignore_errors=True)
        since = "approved" if CANDIDATE in version.tags else "registered"
        raise FFNError(
            f"{version.called}: its files have changed since it was {since}: digest {found}, expected {wanted}; it is not loaded"
        )
    return found


def sealed(uri: str, into: Path) -> str:
    """Download the model at `uri` into the folder `into`; the digest of its files' names and contents."""
    mlflow.artifacts.download_artifacts(uri, dst_path=str(into))
    for compiled in [path for path in into.rglob("__pycache__") if path.is_dir()]:
        shutil.rmtree(compiled)  # Python leaves them where a model is loaded in place; they are code too
    total = hashlib.sha256()
    for path in sorted(path for path in into.rglob("*") if path.is_file()):
        if (name := path.relative_to(into).as_posix()) not in UNSEALED:
            with path.open("rb") as content:
                total.update(f"{hashlib.file_digest(content, 'sha256').hexdigest()} {name!r}\n".encode())
    return f"sha256:{total.hexdigest()}"


def read(version: Version, path: str) -> str:
    """The text of one file of the version's model. Raises `FFNError` where it cannot be read."""
    try:
        return str(mlflow.artifacts.load_text(f"{version.uri}/{path}"))
    except Exception as error:  # MLflow's, or that of whichever store keeps its artifacts
        raise FFNError(f"{version.uri}: {path} cannot be read: {' '.join(str(error).split())[:LONGEST_ERROR]}") from None


def measured(version: Version) -> dict[str, float]:
    """Stream or fusion -> held-out top1, as the pipeline run that made the version measured it; nothing where it is not known."""
    try:
        parent = version.tags.get("mlflow_run") or MlflowClient().get_run(version.run).data.tags.get(PARENT, "")
        found = results(parent) if parent else []
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "INVALID_PARAMETER_VALUE"):
            raise
        return {}
    wanted = (version.tags.get("protocol"), version.tags.get("preset"))
    return {result.stream: result.top1 for result in in_order(found) if (result.protocol, result.preset) == wanted}


@contextlib.contextmanager
def asked_by_a_person() -> Iterator[None]:
    """Inside the block an MLflow that refuses or does not answer is an `FFNError`, after seconds; a step waits for minutes."""
    ours = RETRIES not in os.environ
    os.environ.setdefault(RETRIES, "2")
    try:
        yield
    except MlflowException as error:
        raise FFNError(f"MLflow at {mlflow.get_tracking_uri()}: {' '.join(str(error).split())[:LONGEST_ERROR]}") from None
    finally:
        if ours:
            del os.environ[RETRIES]


def _search(wanted: str) -> list[Version]:
    """The versions that the filter `wanted` finds, by their numbers."""
    return sorted(map(_version, MlflowClient().search_model_versions(wanted)), key=lambda version: int(version.number))


def _version(found: ModelVersion) -> Version:
    return Version(
        name=str(found.name), number=str(found.version), tags=dict(found.tags), run=str(found.run_id or ""),
        registered=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
    )  # fmt: skip
