"""Kubernetes' API through its own client, for a person at hand or the account of a pod, and one class for each kind of refusal.

The client's classes for every kind of object are left out (`_preload_content=False`), so that what is judged is what the API said,
whatever its version. It takes half a second to import: steps that ask nothing of Kubernetes do not import this module.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes import client, config
from urllib3 import Retry
from urllib3.exceptions import HTTPError

from components import cluster
from ffn.errors import Fault, FFNError

Json = dict[str, Any]

NO_RIGHT = re.compile(r'User ".*?" cannot (?P<verb>\w+) (resource|path) "(?P<what>[^"]+)"')
"""How every authoriser's refusal reads; an admission's is a 403 too, and reads otherwise."""


class Denied(FFNError):
    """We have not the right; says which: `list nodes`."""


class Absent(FFNError):
    """There is no such object, or no such kind."""


class Rejected(FFNError):
    """The API does not take the object: an admission refuses it, or it is not valid."""


def connect() -> client.ApiClient:
    """The client with the person's kubeconfig, or else with the account of the pod we are in.

    Raises `FFNError` where there is neither, and for a kubeconfig that is none.
    """
    where = os.environ.get("KUBECONFIG") or "~/.kube/config"
    if any(Path(path).expanduser().exists() for path in where.split(os.pathsep)):
        return _client(f"kubeconfig {where}", config.load_kube_config, config_file=where)
    if cluster.inside():
        return account()
    raise FFNError(f"no kubeconfig: {where} is not there; KUBECONFIG names another")


def account() -> client.ApiClient:
    """The client with the account of the pod we are in. Raises `FFNError` where it has none."""
    return _client("the pod's account", config.load_incluster_config)


def _client(what: str, load: Callable[..., None], **more: str) -> client.ApiClient:
    chosen = client.Configuration()
    try:
        load(client_configuration=chosen, **more)
    except Exception as error:  # the loader lets through what YAML, base64, files and plugins raise
        raise FFNError(f"{what}: {_line(error)}") from None
    chosen.retries = Retry(connect=1, read=1, other=0, redirect=0)
    return client.ApiClient(chosen)


def ask(call: Callable[..., Any], *given: object, **more: object) -> Json:
    """What the API answers to a call of the client, `CoreV1Api(...).read_namespace`.

    Raises `Denied`, `Absent`, `Rejected`; `FFNError` where it does not know us, `Fault` where it does not answer.
    """
    where = f"Kubernetes at {call.__self__.api_client.configuration.host}"  # type: ignore[attr-defined]
    try:
        return dict(json.loads(call(*given, **more, _preload_content=False, _request_timeout=(10.0, 60.0)).data))
    except client.ApiException as error:
        raise _refusal(error, where) from None
    except (HTTPError, OSError, ValueError) as error:
        raise Fault(f"{where} does not answer: {_line(error)}") from None


def or_none(call: Callable[..., Any], *given: object) -> Json | None:
    """As `ask`; None where there is no such object."""
    try:
        return ask(call, *given)
    except Absent:
        return None


def workflows(api: client.ApiClient, namespace: str, run: str) -> list[Json]:
    """Argo's workflow of that run of KFP, if it is still there. Raises as `ask`."""
    call, label = client.CustomObjectsApi(api).list_namespaced_custom_object, f"{cluster.RUN_LABEL}={run}"
    return list(ask(call, "argoproj.io", "v1alpha1", namespace, "workflows", label_selector=label)["items"])


def warnings(api: client.ApiClient) -> list[str]:
    """What the API warned of in its last answer: the texts of `299 - "text", 299 - "text"`."""
    header = api.last_response.headers.get("Warning", "")
    return [text.replace('\\"', '"') for text in re.findall(r'299 \S+ "((?:[^"\\]|\\.)*)"', header)]


def _refusal(error: client.ApiException, where: str) -> FFNError:
    try:
        said = str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        said = str(error.reason)
    message = " ".join(said.split())
    if error.status == 401:
        return FFNError(f"{where} does not know us: {message}")
    if error.status == 403 and (refused := NO_RIGHT.search(message)):
        return Denied(f"{refused['verb']} {refused['what']}")
    if error.status == 404:
        return Absent(message)
    if error.status >= 500 or error.status == 429:
        return Fault(f"{where}: {error.status} {message}")
    return Rejected(message)


def _line(error: Exception) -> str:
    """The cause on one line: urllib3 tells it last, within what it says of its own doings."""
    text = " ".join(str(error).split()) or type(error).__name__
    before, _, cause = text.rpartition("(Caused by ")
    return (cause.removesuffix(")") if before else text)[:300]
