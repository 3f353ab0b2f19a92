"""A Kubernetes API for tests: objects by their paths, in the words and statuses of the real one."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Json = dict[str, Any]
Answer = tuple[int, Json]


def status(code: int, message: str) -> Answer:
    """How the API says no."""
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


def denied(verb: str, resource: str) -> Answer:
    """How an authoriser says no."""
    return status(
        403, f'{resource} is forbidden: User "ada" cannot {verb} resource "{resource}" in API group "" at the cluster scope'
    )


class FakeKubernetes:
    """What is there, and what was asked."""

    def __init__(self) -> None:
        self.objects: dict[str, Json | Answer] = {"/version": {"gitVersion": "v1.34.4"}}
        """Path -> the object, or the answer to any request there."""
        self.posted: list[tuple[str, Json]] = []
        self.asked: list[str] = []
        self.post: Callable[[str, Json], Answer] = lambda path, body: (201, body)
        self.warning = ""

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Answer:
        self.asked.append(f"{method} {path}")
        if method == "POST":
            self.posted.append((path, body))
            return self.post(path, body)
        found = self.objects.get(path)
        if found is None:
            return status(404, f"{path} not found")
        return found if isinstance(found, tuple) else (200, found)


@contextmanager
def kubernetes(api: FakeKubernetes, folder: Path) -> Iterator[Path]:
    """Serve `api` on this machine; a kubeconfig that leads there."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            split = urlsplit(self.path)
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
            query = {key: values[0] for key, values in parse_qs(split.query).items()}
            code, answer = api.answer(self.command, split.path, query, body)
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if api.warning:
                self.send_header("Warning", f'299 - "{api.warning}"')
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "ada", "user": {"token": "t-o-k-e-n"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "ada"}}],
    }  # fmt: skip
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    try:
        yield path
    finally:
        server.shutdown()
        server.server_close()
