"""Kubernetes' API as the person at hand may use it: its own JSON in and out, and one class for each kind of refusal.

The `kubernetes` package says where the API is and who we are (kubeconfig with its plugins, or the account of a pod); its classes
for every kind of object are left out, so that what is judged is what the API said, whatever its version.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import urllib3
from kubernetes import client, config
from urllib3.exceptions import HTTPError

from ffn.errors import FFNError

Json = dict[str, Any]

TIMEOUT = urllib3.Timeout(connect=10.0, read=60.0)
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
NO_RIGHT = re.compile(r'User ".*?" cannot (?P<verb>\w+) (resource|path) "(?P<what>[^"]+)"')
"""How every authoriser's refusal reads; an admission's is a 403 too, and reads otherwise."""


class Denied(FFNError):
    """We have not the right; says which: `list nodes`."""


class Absent(FFNError):
    """There is no such object, or no such kind."""


class Rejected(FFNError):
    """The API does not take the object: an admission refuses it, or it is not valid."""


@dataclass(kw_only=True)
class Cluster:
    """The API, and who we are there."""

    where: str
    send: Callable[..., urllib3.BaseHTTPResponse] = field(repr=False)
    credentials: Callable[[], Mapping[str, str]] = field(repr=False)
    """Headers that say who we are; asked for every request, for a token may be renewed."""
    warnings: list[str] = field(default_factory=list)
    """What the API warned of in its last answer."""

    @classmethod
    def connect(cls) -> Self:
        """With the person's kubeconfig, or else with the account of the pod we are in.

        Raises `FFNError` where there is neither, and for a kubeconfig that is none.
        """
        chosen = client.Configuration()
        files = [Path(path).expanduser() for path in os.environ.get("KUBECONFIG", "~/.kube/config").split(os.pathsep) if path]
        try:
            if any(path.exists() for path in files):
                config.load_kube_config(config_file=os.pathsep.join(map(str, files)), client_configuration=chosen)
            elif ACCOUNT.exists():
                config.load_incluster_config(client_configuration=chosen)
            else:
                raise FFNError(f"no kubeconfig: {', '.join(map(str, files))} is not there; KUBECONFIG names another")
        except FFNError:
            raise
        except Exception as error:  # the loader lets through what YAML, base64, files and plugins raise
            raise FFNError(f"kubeconfig {', '.join(map(str, files))}: {_line(error)}") from None
        chosen.retries = urllib3.Retry(connect=1, read=1, other=0, redirect=0)
        pool = client.ApiClient(chosen).rest_client.pool_manager
        return cls(where=chosen.host, send=pool.request, credentials=lambda: _headers(chosen))

    def get(self, path: str, **query: str) -> Json:
        """The answer to a GET. Raises `Denied`, `Absent`, `Rejected`; `FFNError` for an API that does not answer."""
        return self._ask("GET", path, query=query)

    def post(self, path: str, body: Json, **query: str) -> Json:
        """What a POST makes. Raises as `get`."""
        return self._ask("POST", path, query=query, body=body)

    def delete(self, path: str, **query: str) -> None:
        """DELETE; gone already is done. Raises as `get`."""
        try:
            self._ask("DELETE", path, query=query)
        except Absent:
            return

    def _ask(self, method: str, path: str, *, query: Mapping[str, str], body: Json | None = None) -> Json:
        headers = {"Accept": "application/json", "Content-Type": "application/json", **self.credentials()}
        sent = {"body": json.dumps(body)} if body is not None else {}
        url = f"{self.where}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            answer = self.send(method, url, headers=headers, timeout=TIMEOUT, **sent)
        except (HTTPError, OSError) as error:
            raise FFNError(f"Kubernetes at {self.where} does not answer: {_line(error)}") from None
        self.warnings = _warnings(answer.headers.get("Warning", ""))
        try:
            said: Json = json.loads(answer.data)
        except ValueError:
            said = {"message": answer.data.decode(errors="replace")[:300] or answer.reason}
        if answer.status < 300:
            return said
        message = " ".join(str(said.get("message", answer.reason)).split())
        if answer.status == 401:
            raise FFNError(f"Kubernetes at {self.where} does not know us: {message}")
        if answer.status == 403 and (refused := NO_RIGHT.search(message)):
            raise Denied(f"{refused['verb']} {refused['what']}")
        if answer.status == 404:
            raise Absent(message)
        if answer.status >= 500 or answer.status == 429:
            raise FFNError(f"Kubernetes at {self.where}: {answer.status} {message}")
        raise Rejected(message)


def _headers(chosen: Any) -> dict[str, str]:
    token = chosen.get_api_key_with_prefix("authorization")
    return {"authorization": token} if token else {}


def _line(error: Exception) -> str:
    """The cause on one line: urllib3 tells it last, within what it says of its own doings."""
    text = " ".join(str(error).split()) or type(error).__name__
    before, _, cause = text.rpartition("(Caused by ")
    return (cause.removesuffix(")") if before else text)[:300]


def _warnings(header: str) -> list[str]:
    """The texts of `299 - "text", 299 - "text"`."""
    return [text.replace('\\"', '"') for text in re.findall(r'299 \S+ "((?:[^"\\]|\\.)*)"', header)]
