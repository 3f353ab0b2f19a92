"""A Kubernetes API for tests: objects by their paths, in the words and statuses of the real one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.served import Request, served

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
        self.objects: dict[str, Json | Answer] = {"/version/": {"gitVersion": "v1.34.4"}}
        """Path, or path?labelSelector -> the object, or the answer to any request there."""
        self.posted: list[tuple[str, Json]] = []
        self.asked: list[str] = []
        self.who: set[str] = set()
        """What those who asked said they are."""
        self.post: Callable[[str, Json], Answer] = lambda path, body: (201, body)
        self.warning = ""

    def answer(self, request: Request) -> None:
        path, body = request.place, request.body()
        self.asked.append(f"{request.command} {path}")
        self.who.add(request.headers.get("Authorization", ""))
        if request.command == "POST":
            self.posted.append((path, body))
            code, said = self.post(path, body)
        else:
            label = request.query.get("labelSelector")
            found = self.objects.get(f"{path}?{label}" if label else path, status(404, f"{path} not found"))
            code, said = found if isinstance(found, tuple) else (200, found)
        request.reply(code, said, {"Warning": f'299 - "{self.warning}"'} if self.warning else {})


@contextmanager
def kubernetes(api: FakeKubernetes, folder: Path) -> Iterator[Path]:
    """Serve `api` on this machine; a kubeconfig that leads there."""
    path = folder / "kubeconfig"
    with served(api.answer) as address:
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": address}}],
            "users": [{"name": "ada", "user": {"token": "t-o-k-e-n"}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "ada"}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        yield path
