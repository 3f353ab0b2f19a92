"""What the API and the nodes make of a pod like a step's, and what it meets."""

import re
from collections.abc import Iterator, Sequence

from components.kube import Json
from pipeline import placement
from pipeline.check.finding import Finding, dots, failed, ok, version_of, warning
from pipeline.probe import End, Outcome
from pipeline.settings import Settings

MLFLOW = ((3, 17), (4,))
"""Versions of the server: from, and below which. Those of the client, in pyproject.toml."""


def security_level(namespace: Json) -> Finding:
    """Of the namespace's labels: what Pod Security enforces there."""
    labels = namespace["metadata"].get("labels") or {}
    name = namespace["metadata"]["name"]
    level = labels.get("pod-security.kubernetes.io/enforce", "")
    return ok(f"Pod Security of {name}", f"enforces {level}" if level else "enforces nothing, or the cluster's default")


def admitted(what: str, outcome: Outcome, warnings: Sequence[str], namespace: str) -> Iterator[Finding]:
    """Of a pod that was sent and not made."""
    if outcome.end is End.REFUSED:
        yield failed(what, f"would be refused: {_reason(outcome.said)}", refusal_remedy(outcome.said, namespace))
        return
    violated = [each for each in warnings if "PodSecurity" in each]
    if violated:
        yield warning(
            what,
            f"is admitted, and warned of: {violated[0]}",
            "tell KFP's administrator: Argo's executor and KFP's launcher are theirs",
        )
    else:
        yield ok(what, "is admitted")


def _reason(message: str) -> str:
    """What an admission said, without the pod's made-up name."""
    return re.sub(r'^[Pp]ods? "[^"]*" is (forbidden|invalid): ', "", message)


def refusal_remedy(message: str, namespace: str) -> str:
    """What to do about an admission's refusal."""
    remedies = (
        (
            "violates PodSecurity",
            f"ask its owner: kubectl label namespace {namespace} --overwrite pod-security.kubernetes.io/enforce=baseline",
        ),
        ("exceeded quota", f"kubectl -n {namespace} get resourcequota; raise it, or ask for less (FFN_CPU, FFN_MEMORY, FFN_GPUS)"),
        # A quota on limits wants one of every container, and Argo's have none.
        ("must specify", f"make a LimitRange in {namespace} with defaults: Argo's containers ask for nothing"),
        ("usage per", f"kubectl -n {namespace} get limitrange; change it, or FFN_CPU, FFN_MEMORY, FFN_LIGHT_CPU, FFN_LIGHT_MEMORY"),
        ("request ratio per", f"kubectl -n {namespace} get limitrange; change it, or FFN_LIGHT_CPU, FFN_LIGHT_MEMORY"),
        ("error looking up service account", f"kubectl -n {namespace} apply -f k8s/runs/account.yaml"),
        ("must be less than or equal to", "raise what is below its request: FFN_LIGHT_CPU, FFN_LIGHT_MEMORY"),
        ("admission webhook", "ask who runs that webhook what it wants of pods"),
    )  # fmt: skip
    return next((remedy for part, remedy in remedies if part in message), "mend what the API names")


def from_pod(outcome: Outcome, settings: Settings, namespace: str, *, autoscaled: bool = False) -> Iterator[Finding]:
    """Of the pod that was made as a step's is."""
    what = "A pod like a step's"
    if outcome.end is not End.TOLD:
        said = f"{outcome.end}: {_reason(outcome.said)}"
        late = autoscaled and outcome.end is End.UNSCHEDULABLE
        yield (warning if late else failed)(what, said, pod_remedy(outcome, settings, namespace))
        return
    yield ok(what, "starts and runs")
    for name, works, said in outcome.report["parts"]:
        if works:
            yield ok(f"In a pod, {name}:", said)
        else:
            yield failed(f"In a pod, {name}:", said, part_remedy(name, said, settings, namespace))
    if version := outcome.report.get("version"):
        yield mlflow_version(version)


def mlflow_version(said: str) -> Finding:
    """Of the server's own answer."""
    found, (oldest, below) = version_of(said), MLFLOW
    if found is None or not oldest <= found < below:
        return warning(
            "MLflow", f"{said} is not from {dots(oldest)} to below {dots(below)}", "give the server a version between these"
        )
    return ok("MLflow", said)


def pod_remedy(outcome: Outcome, settings: Settings, namespace: str) -> str:
    """What to do about a pod that did not tell."""
    said = outcome.said
    if outcome.end is End.REFUSED:
        return refusal_remedy(said, namespace)
    if outcome.end is End.UNSCHEDULABLE:
        return _first(said, UNSCHEDULABLE, "kubectl get nodes")
    if outcome.end is End.IMAGE:
        secret = "name in FFN_PULL_SECRET the Secret that it is pulled with" + (
            f" (now {settings.pull_secret})" if settings.pull_secret else ""
        )
        return _first(said, IMAGE, f"see that nodes reach the registry of {settings.image}").format(secret=secret)
    if outcome.end is End.NOT_STARTED:
        return _first(said, NOT_STARTED, "mend what the node names")
    if outcome.end is End.LATE:
        return _first(said, LATE, f"kubectl -n {namespace} get events; a pod of a run would wait as long")
    return _first(said, DIED, "set FFN_IMAGE to an image of this version of ffn")


Remedies = tuple[tuple[str, str], ...]
"""(what to look for, what to do), the first that is found."""

UNSCHEDULABLE: Remedies = (
    ("were unschedulable", "kubectl uncordon the nodes that are meant"),
    ("untolerated taint", "add the taint to FFN_TOLERATIONS, as key=value:effect"),
    ("taints that the pod didn't tolerate", "add the taint to FFN_TOLERATIONS, as key=value:effect"),
    ("node affinity/selector", "label the nodes, or change FFN_NODE_SELECTOR"),
    ("ersistentVolume", "see kubectl get pv,storageclass: the claims' volumes must be where the pod may go"),
    ("Insufficient", "the nodes are full: wait, or add nodes"),
)
IMAGE: Remedies = (
    (r"nauthorized|authentication required|no basic auth|denied|orbidden|\b40[13]\b", "{secret}"),
    (r"not found|manifest unknown|\b404\b", "no such image there: export FFN_IMAGE=...@sha256:..., as it was pushed"),
    (r"InvalidImageName|invalid reference|couldn't parse", "export FFN_IMAGE=registry/name@sha256:..."),
    (r"x509|certificate|server gave HTTP response", "the nodes' container runtime must trust the registry"),
)
NOT_STARTED: Remedies = (
    ("[Ss]ecret", "make that Secret with that key: k8s/secrets/steps"),
    ("[Cc]onfig[Mm]ap", "make that ConfigMap: FFN_CA names it"),
    ("runAsNonRoot|run as root", "set FFN_IMAGE to an image that does not run as root"),
    ("executable file not found|no such file", "set FFN_IMAGE to an image of ffn"),
)
LATE: Remedies = (
    ("FailedMount.*(configmap|secret)", "make what is named: FFN_CA, FFN_MLFLOW_SECRET, FFN_S3_SECRET"),
    (
        "FailedMount|FailedAttachVolume|Multi-Attach",
        "the volume cannot be mounted there: see its driver, and that no other node holds it",
    ),
    ("Pulling|ContainerCreating", "pull the image before, or from a registry nearer by"),
)
DIED: Remedies = (
    ("OOMKilled", "raise FFN_LIGHT_MEMORY"),
    ("DeadlineExceeded", "try again: the pod began late, its image is large or the node slow"),
    ("Evicted|Preempt", "try again: the node ran out of something, or a more important pod came"),
)


def part_remedy(name: str, said: str, settings: Settings, namespace: str) -> str:
    """What to do about something that does not work in a pod."""
    stored = settings.checkpoints.startswith("s3://")
    if name == "torch":
        return "set FFN_IMAGE to an image for this kind of node"
    if name == "scratch":
        return "make /tmp writable in the image that FFN_IMAGE names"
    if name == "data":
        return f"make the volume of {settings.data_claim} readable by user and group {placement.IDENTITY}"
    if name == "states" and not stored:
        return (
            f"hand the volume of {settings.checkpoints_claim} to group {placement.IDENTITY}: a pod with that fsGroup mounts it "
            "once (k8s/components/volume); NFS is exported to that group"
        )
    variable, names, account = {
        "MLflow": ("MLFLOW_TRACKING_URI", "FFN_MLFLOW_SECRET", settings.mlflow_secret),
        "states": ("AWS_ENDPOINT_URL_S3", "FFN_S3_SECRET", settings.s3_secret),
    }.get(name, ("the API's address", "FFN_SERVICE_ACCOUNT", ""))
    rules = f"the network rules of {namespace} (k8s/runs/network.yaml)"
    found: Remedies = (
        ("esolve|esolution|Name or service", f"set {variable} to a name within the cluster; {rules} must let steps reach its DNS"),
        ("Invalid Host", f"add name:port as in {variable} to the server's MLFLOW_SERVER_ALLOWED_HOSTS"),
        ("no bucket", "make the bucket, or change FFN_CHECKPOINTS"),
        (
            r"\b40[13]\b|nauthor|authenticat|no keys|refused the keys",
            f"mend the account in the Secret that {names} names (now {account or 'none'})",
        ),
        (
            "CERTIFICATE|certificate|SSL|not trusted",
            f"name in FFN_CA a ConfigMap with the authority as ca.crt (now {settings.ca or 'none'})",
        ),
        (
            "refused|timed out|imeout|unreachable|No route|no connection",
            f"see that it runs; {variable} and {rules} must lead there",
        ),
    )
    return _first(said, found, f"see {variable} and {rules}")


def _first(said: str, remedies: Remedies, otherwise: str) -> str:
    return next((remedy for pattern, remedy in remedies if re.search(pattern, said)), otherwise)
