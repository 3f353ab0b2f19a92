"""What a check says: one line for each thing, and for one that is wrong the remedy."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from kubernetes.utils import parse_quantity


class State(StrEnum):
    """How much a finding matters: a warning does not keep a run from going well."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "FAILED"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a run needs, and how it is with it."""

    what: str
    state: State = State.OK
    said: str = ""
    remedy: str = ""

    @property
    def line(self) -> str:
        """For a person: `FAILED  Secret ffn-mlflow in kubeflow lacks X: kubectl ...`."""
        told = " ".join(f"{self.what} {self.said}".split())
        return f"{self.state:<8}{told}" + (f": {self.remedy}" if self.remedy else "")


def ok(what: str, said: str = "") -> Finding:
    return Finding(what=what, said=said)


def warning(what: str, said: str, remedy: str) -> Finding:
    return Finding(what=what, state=State.WARNING, said=said, remedy=remedy)


def failed(what: str, said: str, remedy: str) -> Finding:
    return Finding(what=what, state=State.FAILED, said=said, remedy=remedy)


def not_seen(what: str, right: str) -> Finding:
    """What we have no right to look at."""
    return warning(what, "could not be looked at", f"it takes the right to {right}")


def version_of(text: str) -> tuple[int, ...] | None:
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else None


def dots(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def amount(quantity: str) -> Decimal:
    return Decimal(parse_quantity(quantity))


def text(amount: Decimal) -> str:
    """A number of cores, bytes or things as a person reads it."""
    if amount >= 2**20:
        return f"{amount / 2**30:.4g}Gi"
    return f"{amount.normalize():f}"
