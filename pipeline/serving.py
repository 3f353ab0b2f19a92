"""Serving a champion on Kubernetes: what runs beside MLflow's own server in k8s/components/serving.

`follow` compares the alias `champion` with the version that is served and asks the cluster for the champion where they
differ; `probe` asks the server for a real prediction. Both run often, so they load the standard library and nothing else.
`download` fetches a version before the server starts: a model is code, and only what was approved may run.
"""

import base64
import json
import math
import os
import shutil
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from ffn.errors import FFNError

ANNOTATION = "ffn/model-version"
"""Of the served pods: the version they download when they start. Another value rolls them over, the old ones last."""

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = 30.0


def follow(model: str, target: str) -> str:
    """Have `target` serve the champion of `model`; returns what happened.

    `target` is the path of a Deployment in the Kubernetes API. Done twice it is done once. Raises
    `FFNError` where MLflow or the cluster refuse or do not answer; what is served then stays.
    """
    wanted = champion(model)
    if not wanted:
        return f"{model}: no champion yet; `ffn model promote {model}` makes one"
    template = (_cluster("GET", target).get("spec") or {}).get("template") or {}
    served = ((template.get("metadata") or {}).get("annotations") or {}).get(ANNOTATION)
    if served == wanted:
        return f"{model}: version {wanted} is served"
    _cluster("PATCH", target, {"spec": {"template": {"metadata": {"annotations": {ANNOTATION: wanted}}}}})
    return f"{model}: version {wanted} takes the place of {served or 'nothing'}"


def champion(model: str) -> str:
    """The number of the version that the alias `champion` names, empty where there is none.

    By a search: asked for the alias of a model that is not there, MLflow answers who is no administrator with status 403, as if
    the account were wrong.
    """
    base = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise FFNError(f"MLFLOW_TRACKING_URI={base!r}: expected the address of an MLflow server")
    query = urllib.parse.urlencode({"filter": f"name = '{model}'"})
    headers = {}
    if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        pair = f"{name}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    try:
        found = _json("GET", f"{base}/api/2.0/mlflow/registered-models/search?{query}", headers=headers)
    except urllib.error.HTTPError as error:
        said = error.read()[:200].decode(errors="replace")
        raise FFNError(f"{base}: status {error.code} for the champion of {model}: {said}") from None
    except (OSError, ValueError) as error:
        raise FFNError(f"{base}: no answer from MLflow: {error}") from None
    aliases = [alias for known in found.get("registered_models", []) for alias in known.get("aliases", [])]
    return next((str(alias["version"]) for alias in aliases if alias["alias"] == "champion"), "")


def download(model: str, version: str, folder: Path) -> str:
    """Fetch a version of `model` into `folder`, and look whether its files are those that were approved; what was fetched.

    Raises `FFNError`, and leaves nothing in the folder, where they are not, or where there is no such version.
    """
    from components import registry

    if not version:
        raise FFNError(f"no champion of {model} is served yet: promote one")
    for left in folder.iterdir():  # by an attempt before this one
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    with registry.asked_by_a_person():
        return f"{model}: version {version}, digest {registry.fetch(registry.at(f'models:/{model}/{version}'), folder)}"


def probe(folder: Path, address: str) -> None:
    """Have the server at `address` predict the example that the model in `folder` was registered with.

    Raises `FFNError` unless the answer is a class with probabilities that sum to one.
    """
    example = folder / "serving_input_example.json"
    try:
        answer = _json("POST", f"{address}/invocations", body=example.read_bytes())
        (first, *_) = answer["predictions"]
        total, known = math.fsum(first["probabilities"].values()), first["label"] in first["probabilities"]
    except urllib.error.HTTPError as error:
        raise FFNError(f"{address}: status {error.code}: {error.read()[:200].decode(errors='replace')}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FFNError(f"{address}: no prediction for {example}: {type(error).__name__} {error}") from None
    if not known or not math.isclose(total, 1, abs_tol=1e-3):
        raise FFNError(f"{address}: label {first['label']!r}, probabilities sum to {total}")


def _cluster(method: str, path: str, patch: Any = None) -> Any:
    """Ask the Kubernetes API, as the account of this pod."""
    address = os.environ.get("KUBERNETES_API", "https://kubernetes.default.svc")
    try:
        headers = {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}"}
        context = ssl.create_default_context(cafile=ACCOUNT / "ca.crt") if address.startswith("https:") else None
        body = None if patch is None else json.dumps(patch).encode()
        return _json(method, address + path, body=body, headers=headers, kind="application/merge-patch+json", context=context)
    except urllib.error.HTTPError as error:
        raise FFNError(f"{method} {path}: status {error.code}: {error.read()[:200].decode(errors='replace')}") from None
    except (OSError, ValueError) as error:
        raise FFNError(f"{method} {path}: no answer from the Kubernetes API: {error}") from None


def _json(
    method: str, url: str, *, body: bytes | None = None, headers: dict[str, str] | None = None,
    kind: str = "application/json", context: ssl.SSLContext | None = None,
) -> Any:  # fmt: skip
    request = urllib.request.Request(url, data=body, method=method, headers={**(headers or {}), "Content-Type": kind})
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as answer:
        return json.loads(answer.read())


def main(arguments: list[str]) -> int:
    """`follow MODEL TARGET`, `download MODEL VERSION FOLDER` or `probe FOLDER ADDRESS`; returns the exit status."""
    try:
        match arguments:
            case ["follow", model, target]:
                print(follow(model, target), flush=True)
            case ["download", model, version, folder]:
                print(download(model, version, Path(folder)), flush=True)
            case ["probe", folder, address]:
                probe(Path(folder), address)
            case _:
                raise FFNError("expected: follow MODEL TARGET, download MODEL VERSION FOLDER, or probe FOLDER ADDRESS")
    except FFNError as error:
        print(f"ffn: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
