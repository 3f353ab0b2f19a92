"""KFP's API through KFP's own client, with what that leaves out: patience, and one word for each kind of trouble.

What may be sent twice is retried here. What makes something is sent once per turn of `create`'s loop, and never again before a look
at what the one before has done: urllib3's retries count attempts and cannot look, so the client has none.

Answers are taken as the JSON that they are (`_preload_content=False`). The client's models read a page to log in as an empty list
(`__deserialize_model` of kfp_server_api 2.17.3, api_client.py:636), and know nothing of the version in `healthz`
(models/v2beta1_get_healthz_response.py:35).
"""

import contextlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import kfp_server_api as kfp
from requests.utils import get_environ_proxies, select_proxy
from urllib3 import Retry
from urllib3.exceptions import HTTPError

from ffn.errors import FFNError

Json = dict[str, Any]
Call = Callable[..., Any]
"""A method of the client: `server.runs.run_service_get_run`."""
T = TypeVar("T")

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
PAGE = 100


class Unreachable(Exception):
    """No connection, no answer in time, or a server's or gateway's error, for longer than our patience."""


class Refused(Exception):
    """The server does not take our credentials, or sends us to a page to log in."""


class NotThere(FFNError):
    """The server knows nothing of that id."""


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
        if not re.fullmatch(r"https?://(\[[\da-fA-F:]+\]|[^/:\s]+)(:\d+)?(/\S*)?", url):
            raise FFNError(f"FFN_KFP_URL={url!r}: expected the address of KFP's API, https://host/pipeline or http://host:8888")
        chosen = [f"FFN_KFP_{name.upper()}" for name in ("token", "token_file", "cookie") if given[name]]
        if len(chosen) > 1:
            raise FFNError(f"{' and '.join(chosen)} are set: expected one way to say who we are")
        if (ca := given["ca"]) and not Path(ca).is_file():
            raise FFNError(f"FFN_KFP_CA={ca}: no such file")
        return cls(**{**given, "url": url, "ui": given["ui"].rstrip("/") or url})

    def secret(self) -> str:
        """The token as it is now. Raises `FFNError` where its file cannot be read."""
        try:
            return Path(self.token_file).read_text().strip() if self.token_file else self.token
        except OSError as error:
            raise FFNError(f"FFN_KFP_TOKEN_FILE={self.token_file}: {error.strerror}") from None

    def client(self) -> kfp.ApiClient:
        """KFP's client: it says who we are, and asks once."""
        chosen = kfp.Configuration(host=self.url)
        chosen.retries = Retry(0, raise_on_redirect=False)
        chosen.ssl_ca_cert = self.ca or None
        chosen.proxy = select_proxy(self.url, get_environ_proxies(self.url))
        if self.token or self.token_file:
            chosen.api_key, chosen.api_key_prefix = {"authorization": ""}, {"authorization": "Bearer"}
            chosen.refresh_api_key_hook = lambda chosen: chosen.api_key.update(authorization=self.secret())
        return kfp.ApiClient(chosen, cookie=self.cookie or None)


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

    client = cached_property(lambda self: self.endpoint.client())
    runs = property(lambda self: kfp.RunServiceApi(self.client))
    schedules = property(lambda self: kfp.RecurringRunServiceApi(self.client))
    experiments = property(lambda self: kfp.ExperimentServiceApi(self.client))
    pipelines = property(lambda self: kfp.PipelineServiceApi(self.client))
    uploads = property(lambda self: kfp.PipelineUploadServiceApi(self.client))
    health = property(lambda self: kfp.HealthzServiceApi(self.client))

    @classmethod
    def from_environment(cls) -> Self:
        """The server of `Endpoint.from_environment`."""
        return cls(endpoint=Endpoint.from_environment())

    def ask(self, call: Call, *given: str, patience: float | None = None, **more: object) -> Json:
        """The answer to a call that does no harm when it is made twice. Raises `Unreachable`, `Refused`, `NotThere`, `FFNError`."""
        return self._persist(lambda: self._once(call, *given, **more), patience)

    def delete(self, call: Call, *given: str) -> None:
        """A call that deletes; gone already is done. Raises as `ask`."""
        with contextlib.suppress(NotThere):
            self.ask(call, *given)

    def create(self, find: Callable[[], Json | None], call: Call, *given: object, **more: object) -> tuple[Json, bool]:
        """What `find` finds, or else what the call makes; and whether it was made.

        After an attempt of unknown outcome (the connection broke, the gateway gave up) `find` looks first, so that a
        request which arrived is not sent again.
        """

        def attempt() -> tuple[Json, bool]:
            found = find()
            return (found, False) if found is not None else (self._once(call, *given, **more), True)

        return self._persist(attempt)

    def list(self, call: Call, *given: str, **query: Any) -> Iterator[Json]:
        """Every entry of all pages: what KFP calls them, a page has no other list."""
        token = ""
        while True:
            page = self.ask(call, *given, page_size=PAGE, page_token=token, **query)
            yield from next((value for value in page.values() if isinstance(value, list)), ())
            if not (token := page.get("next_page_token", "")):
                return

    def _persist(self, attempt: Callable[[], T], patience: float | None = None) -> T:
        """The first success of `attempt`, within our patience since its last answer."""
        until, pause = time.monotonic() + (self.patience if patience is None else patience), self.pause
        while True:
            try:
                return attempt()
            except Unreachable as trouble:
                wait = pause * random.uniform(0.5, 1.0)  # many jobs should not come back at one moment
                if time.monotonic() + wait > until:
                    raise
                if pause == self.pause:
                    print(f"ffn: {trouble}; trying again", file=sys.stderr, flush=True)
                pause = min(2 * pause, self.longest_pause)
                time.sleep(wait)

    def _once(self, call: Call, *given: object, **more: object) -> Json:
        url, what = self.endpoint.url, call.__name__.rpartition("_service_")[2].replace("_", " ")
        try:
            content = call(*given, **more, _preload_content=False, _request_timeout=self.timeout).data
        except kfp.ApiException as error:
            said = f"{error.status} {_said(error)}"
            if error.status in TRANSIENT:
                raise Unreachable(f"{url}: {what}: {said}") from None
            if error.status in (401, 403) or 300 <= error.status < 400:
                where = f" and sends us to {error.headers['location']}" if "location" in error.headers else ""
                raise Refused(f"{url} answers {said}{where}") from None
            kind = NotThere if error.status == 404 else FFNError
            raise kind(f"{url} refuses to {what}: {said}") from None
        except (HTTPError, UnicodeDecodeError) as error:  # the client wants every error's text in UTF-8
            cause = " ".join(str(getattr(error, "reason", error)).split())
            if "CERTIFICATE" in cause:
                raise FFNError(f"{url}: certificate not trusted ({cause}); FFN_KFP_CA names the authority's file") from None
            raise Unreachable(f"{url}: {what}: {cause}") from None
        try:
            return dict(json.loads(content))
        except (ValueError, TypeError):
            raise Refused(f"{url} answers with {content[:40]!r}, not JSON: a page to log in, or not the API's address") from None


def equals(key: str, value: str) -> str:
    """A filter of lists: entries whose `key` is `value`."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "string_value": value}]})


def _said(error: kfp.ApiException) -> str:
    """What the server said of an error, on one line; an upload's errors have a form of their own."""
    try:
        said = json.loads(error.body)
        text = str(said.get("message") or said.get("error_message") or said.get("error") or said)
    except (ValueError, AttributeError):
        text = error.reason or ""
    return " ".join(text.split())[:300]
