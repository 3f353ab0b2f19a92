"""KFP's API over HTTP, with what its own client leaves out: a time-out, retries with pauses, one word per kind of trouble.

What may be sent twice (a GET, a DELETE) is retried here. A POST is sent once per call of `create`'s loop, and never again
before a look at what the one before has done.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import requests

from ffn.errors import FFNError

Json = dict[str, Any]
T = TypeVar("T")

BASE = "apis/v2beta1"
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
PAGE = 100


class Unreachable(Exception):
    """The server gave no usable answer for longer than our patience."""


class Refused(Exception):
    """The server does not take our credentials, or sends us to a page to log in."""


class NotThere(FFNError):
    """The server knows nothing of that id."""


class _Trouble(Exception):
    """One failed attempt that another may mend: no connection, no answer in time, a server's or gateway's error."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where KFP's API is and who we are there."""

    url: str
    ui: str
    """Where a person's browser finds KFP's interface."""
    namespace: str = ""
    """Profile of a multi-user installation."""
    token: str = ""
    token_file: str = ""
    """Read again for every request: what mounts a token there renews it."""
    cookie: str = ""
    ca: str = ""
    """File with the authorities that the server's certificate is to be trusted by."""

    @classmethod
    def from_environment(cls) -> Self:
        """FFN_KFP_URL, _UI, _NAMESPACE, _TOKEN, _TOKEN_FILE, _COOKIE, _CA. Raises `FFNError` where they do not fit together."""
        given = {name: os.environ.get(f"FFN_KFP_{name.upper()}", "") for name in cls.__dataclass_fields__}
        url = given["url"].rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise FFNError(f"FFN_KFP_URL={url!r}: expected the address of KFP's API, https://host/pipeline or http://host:8888")
        chosen = [f"FFN_KFP_{name.upper()}" for name in ("token", "token_file", "cookie") if given[name]]
        if len(chosen) > 1:
            raise FFNError(f"{' and '.join(chosen)} are set: expected one way to say who we are")
        return cls(**{**given, "url": url, "ui": given["ui"].rstrip("/") or url})

    def headers(self) -> dict[str, str]:
        """What says who we are. Raises `FFNError` where the token's file cannot be read."""
        if self.cookie:
            return {"Cookie": self.cookie}
        token = self.token
        if self.token_file:
            try:
                token = Path(self.token_file).read_text().strip()
            except OSError as error:
                raise FFNError(f"FFN_KFP_TOKEN_FILE={self.token_file}: {error.strerror}") from None
        return {"Authorization": f"Bearer {token}"} if token else {}


@dataclass(frozen=True, kw_only=True)
class Server:
    """KFP's API, spoken to with patience."""

    endpoint: Endpoint
    patience: float = 600.0
    """Seconds without one usable answer after which the server is called unreachable."""
    pause: float = 2.0
    """Seconds before the first retry; they double up to `longest_pause`."""
    longest_pause: float = 30.0
    timeout: tuple[float, float] = (10.0, 60.0)
    """Seconds for a connection, and between two bytes of an answer."""

    @classmethod
    def from_environment(cls) -> Self:
        """The server of `Endpoint.from_environment`."""
        return cls(endpoint=Endpoint.from_environment())

    def get(self, path: str, query: Mapping[str, str] | None = None, *, patience: float | None = None) -> Json:
        """The answer to a GET. Raises `Unreachable`, `Refused`, `NotThere`, `FFNError`."""
        return self._persist(lambda: self._once("GET", path, query=query), patience)

    def delete(self, path: str) -> None:
        """DELETE; gone already is done."""

        def attempt() -> Json:
            try:
                return self._once("DELETE", path)
            except NotThere:
                return {}

        self._persist(attempt)

    def post(self, path: str, *, patience: float | None = None) -> None:
        """A POST that does no harm when it is done twice."""
        self._persist(lambda: self._once("POST", path), patience)

    def create(
        self, path: str, body: Json | None, find: Callable[[], Json | None], *,
        query: Mapping[str, str] | None = None, file: Path | None = None,
    ) -> tuple[Json, bool]:  # fmt: skip
        """What `find` finds, or else what the POST makes of `body` or of an uploaded `file`; and whether it was made.

        After an attempt of unknown outcome (the connection broke, the gateway gave up) `find` looks first, so that a
        request which arrived is not sent again.
        """

        def attempt() -> tuple[Json, bool]:
            found = find()
            return (found, False) if found is not None else (self._once("POST", path, query=query, body=body, file=file), True)

        return self._persist(attempt)

    def list(self, path: str, key: str, **query: str) -> Iterator[Json]:
        """Every entry `key` of all pages."""
        token = ""
        while True:
            page = self.get(path, {"page_size": str(PAGE), "page_token": token, **query})
            yield from page.get(key) or []
            token = page.get("next_page_token") or ""
            if not token:
                return

    def _persist(self, attempt: Callable[[], T], patience: float | None = None) -> T:
        """The first success of `attempt`, within our patience since its last answer."""
        until, pause, told = time.monotonic() + (self.patience if patience is None else patience), self.pause, False
        while True:
            try:
                return attempt()
            except _Trouble as trouble:
                wait = pause * random.uniform(0.5, 1.0)  # many jobs should not come back at one moment
                if time.monotonic() + wait > until:
                    raise Unreachable(f"{self.endpoint.url}: {trouble}") from None
                if not told:
                    print(f"ffn: {trouble}; trying again", file=sys.stderr, flush=True)
                told, pause = True, min(2 * pause, self.longest_pause)
                time.sleep(wait)

    def _once(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Json | None = None, file: Path | None = None
    ) -> Json:
        url = f"{self.endpoint.url}/{BASE}/{path}"
        headers = {"Accept": "application/json", **self.endpoint.headers()}
        params = {name: value for name, value in (query or {}).items() if value}
        try:
            answer = requests.request(
                method, url, params=params, json=body, files={"uploadfile": (file.name, file.read_bytes())} if file else None,
                headers=headers, auth=_as_given, timeout=self.timeout,
                allow_redirects=False, verify=self.endpoint.ca or True,
            )  # fmt: skip
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            if "CERTIFICATE" in str(error):
                raise FFNError(f"{url}: certificate not trusted ({error}); FFN_KFP_CA names the authority's file") from None
            raise _Trouble(f"{method} {path}: {type(error).__name__}") from None
        except (requests.RequestException, OSError) as error:
            raise FFNError(f"{url}: {error}") from None
        if answer.status_code in TRANSIENT:
            raise _Trouble(f"{method} {path}: {answer.status_code} {_said(answer)}")
        if answer.status_code in (401, 403) or answer.is_redirect:
            where = f" and sends us to {answer.headers['location']}" if answer.is_redirect else ""
            raise Refused(f"{self.endpoint.url} answers {answer.status_code} {_said(answer)}{where}")
        if answer.status_code == 404:
            raise NotThere(f"{self.endpoint.url} knows no {path}: {_said(answer)}")
        if not answer.ok:
            raise FFNError(f"{self.endpoint.url} refuses {method} {path}: {answer.status_code} {_said(answer)}")
        try:
            parsed = answer.json()
        except ValueError:
            kind = answer.headers.get("content-type", "no content type")
            raise Refused(f"{url} answers with {kind}, not JSON: a page to log in, or not the API's address") from None
        return parsed if isinstance(parsed, dict) else {}


def equals(key: str, value: str) -> str:
    """A filter of lists: entries whose `key` is `value`."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "string_value": value}]})


def _as_given(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Stands where requests would put a login from ~/.netrc over our own."""
    return request


def _said(answer: requests.Response) -> str:
    """What the server said of an error, on one line."""
    try:
        said = answer.json()
        text = str(said.get("message") or said.get("error") or said) if isinstance(said, dict) else str(said)
    except ValueError:
        text = answer.reason or ""
    return " ".join(text.split())[:300]
