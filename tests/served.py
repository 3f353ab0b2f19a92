"""A web server on this machine for the fakes of APIs."""

import json
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Request(BaseHTTPRequestHandler):
    """What was asked, and the way to answer it."""

    protocol_version = "HTTP/1.1"

    @property
    def place(self) -> str:
        return urlsplit(self.path).path

    @property
    def query(self) -> dict[str, str]:
        return {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}

    def body(self) -> Any:
        """From JSON, or the bytes of an upload."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upload = (self.headers.get("Content-Type") or "").startswith("multipart/form-data")
        return content if upload else json.loads(content or "null")

    def reply(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        """With JSON; bytes are sent as they are."""
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        given = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        self.send_response(status)
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(answer: Callable[[Request], None], certificate: Sequence[Path] = ()) -> Iterator[str]:
    """Have `answer` take every request; the address. With a certificate and its key, over TLS."""

    class Handler(Request):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_DELETE = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # who asked has gone, or we closed it
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
