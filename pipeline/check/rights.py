"""What the account of a run may do: what its pods need, and no more."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.check.finding import Finding, failed, ok, warning


@dataclass(frozen=True, kw_only=True)
class Right:
    """One verb on one kind of object, or on one object."""

    verb: str
    resource: str
    group: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{f'/{self.name}' if self.name else ''}"

    def attributes(self, namespace: str) -> dict[str, str]:
        """As Kubernetes' access reviews ask for it."""
        given = {"namespace": namespace, "verb": self.verb, "resource": self.resource, "group": self.group, "name": self.name}
        return {key: value for key, value in given.items() if value}


NEEDED = (
    Right(verb="create", resource="workflowtaskresults", group="argoproj.io"),
    Right(verb="patch", resource="workflowtaskresults", group="argoproj.io"),
    Right(verb="list", resource="workflows", group="argoproj.io"),
    Right(verb="get", resource="pods"),
    Right(verb="get", resource="configmaps", name="kfp-launcher"),
    Right(verb="get", resource="secrets", name="mlpipeline-minio-artifact"),
)
"""Argo's executor reports how a step ended; steps look whether another run still lives; KFP's driver and launcher look at their
pod, where artifacts are kept, and the key to it.

Source: manifests/quick-start/base/executor/emissary/executor-role.yaml of Argo 4.0.5; backend/src/v2 of KFP 2.17.0:
driver/k8s.go:1198, component/launcher_v2.go:607, config/env.go:73, objectstore/object_store.go:391.
"""
TOO_MUCH = (
    Right(verb="create", resource="pods"),
    Right(verb="get", resource="secrets"),
    Right(verb="list", resource="secrets"),
    Right(verb="create", resource="workflows", group="argoproj.io"),
)
"""What no step does, and who breaks into one would."""
RIGHTS = NEEDED + TOO_MUCH


def rights(allowed: Mapping[Right, bool], account: str, namespace: str) -> Iterator[Finding]:
    """Of what the account may do, as access reviews answered."""
    what = f"ServiceAccount {account} in {namespace}"
    if lacking := [right for right in NEEDED if not allowed[right]]:
        yield failed(what, f"may not {_listed(lacking)}", f"kubectl -n {namespace} apply -f k8s/runs/account.yaml")
    else:
        yield ok(what, "may do what Argo's executor, KFP's launcher and the steps do")
    if more := [right for right in TOO_MUCH if allowed[right]]:
        yield warning(
            what, f"may {_listed(more)} of the whole namespace, which no step does",
            "export FFN_SERVICE_ACCOUNT=ffn-pipeline (k8s/runs/account.yaml), or take it from its roles",
        )  # fmt: skip


def _listed(rights: Iterable[Right]) -> str:
    return ", ".join(map(str, rights))
