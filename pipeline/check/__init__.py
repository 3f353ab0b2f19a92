"""Whether a cluster gives what a run needs: one finding for each thing, and for each that fails the remedy.

What judges is a pure function of what Kubernetes' and KFP's APIs said, in their own JSON; `examine` asks them, and goes from what
a person would mend first to what depends on it. What we may not look at is a warning that names the right.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kubernetes.client import ApiClient, AuthorizationV1Api, CoreV1Api, CustomObjectsApi, StorageV1Api, VersionApi

from components import kube
from components.kube import Absent, Denied, Json, or_none
from ffn.errors import FFNError
from pipeline import placement, probe
from pipeline.check.argo import CONFIG, artifact_secrets, executor, retry_policy
from pipeline.check.finding import Finding, State, failed, not_seen, warning
from pipeline.check.names import (
    account_there,
    admitted_by_ours,
    authorities,
    claim,
    home,
    kfp_version,
    kubernetes_version,
    named,
    namespace_there,
    profile,
    pull_secret,
    secret,
    shared,
)
from pipeline.check.pods import admitted, from_pod, security_level
from pipeline.check.resources import light_nodes, limit_range, quota, train_nodes, usable
from pipeline.check.rights import RIGHTS, Right, rights
from pipeline.probe import End
from pipeline.server import Refused, Server, Unreachable
from pipeline.settings import Settings

KFP_NAMESPACE = "kubeflow"
"""Where KFP's manifests put it, and without profiles its runs."""
KFP_PATIENCE = 10.0


def examine(api: ApiClient, server: Callable[[], Server], settings: Settings, *, namespace: str, account: str) -> Iterator[Finding]:
    """Every finding about a run with these settings, in the namespace where runs live (empty: KFP's own) and with that account.

    `server` is KFP's, or raises `FFNError`. Makes one pod there, and deletes it. Raises `FFNError` where Kubernetes
    does not answer.
    """
    core = CoreV1Api(api)
    try:
        yield kubernetes_version(kube.ask(VersionApi(api).get_code))
    except Denied as denied:
        yield not_seen("Kubernetes", str(denied))
    found, healthz = _kfp(server, namespace)
    yield from found
    account = account or ("default-editor" if healthz.get("multi_user") else "pipeline-runner")
    namespace = namespace or KFP_NAMESPACE
    blocked = False
    """Whether a pod like a step's cannot start, by what was found before."""
    space: Json | None = None
    try:
        space = or_none(core.read_namespace, namespace)
        finding = namespace_there(space, namespace)
        yield finding
        if finding.state is State.FAILED:
            return
    except Denied as denied:
        yield not_seen(f"Namespace {namespace}", str(denied))

    def there(found: Json | None) -> Finding:
        return account_there(found, account, namespace)

    needs = [_look(there, core.read_namespaced_service_account, account, namespace), *_names(core, settings, namespace)]
    claims = list(_claims(core, settings, namespace))
    for finding in (*needs, *(finding for finding, _ in claims)):
        blocked |= finding.state is State.FAILED
        yield finding
    config, where, hidden = _argo(core, namespace)
    yield from home(healthz, where, namespace)
    for name, keys in artifact_secrets(config).items():
        yield _secret(core, name, namespace, keys)
    nodes = _nodes(core)
    for finding, held in claims:
        if held and finding.state is State.OK and held["metadata"]["name"] == settings.states_claim:
            yield from shared(held, namespace=namespace, nodes=None if nodes is None else sum(map(usable, nodes)))
    yield from named(settings)
    reviewed = _reviewed(api, account, namespace)
    if reviewed:
        yield from rights(reviewed, account, namespace)

    quotas, ranges = core.list_namespaced_resource_quota, core.list_namespaced_limit_range
    for kind, judge, call in (("resourcequotas", quota, quotas), ("limitranges", limit_range, ranges)):
        try:
            items = kube.ask(call, namespace)["items"]
            limits = [finding for item in items for finding in judge(item, settings, namespace)]
            yield from limits or [Finding(what=f"No {kind}", said=f"limit what pods of {namespace} ask for")]
        except Denied as denied:
            yield not_seen(f"{kind} in {namespace}", str(denied))

    if space:
        yield security_level(space)
        yield from admitted_by_ours(space, settings)
    tolerations = probe.tolerations(settings)
    for what, make in (("A training's pod", probe.train), ("A light step's pod", probe.ingest)):
        sent = make(settings, name=probe.name(), account=account, executor=executor(config))
        try:
            outcome, made = probe.dry_run(core, namespace, sent)
        except Denied as denied:
            yield not_seen(what, f"{denied} in {namespace}")
            blocked = True
            continue
        yield from admitted(what, outcome, kube.warnings(api), namespace)
        blocked |= outcome.end is End.REFUSED and make is probe.ingest
        if make is probe.train and made:
            tolerations = made["spec"].get("tolerations") or []

    autoscaled = _autoscaled(core)
    if nodes is None:
        yield not_seen("Nodes", "list nodes")
    else:
        yield train_nodes(nodes, settings, tolerations, autoscaled=autoscaled)
        yield light_nodes(nodes, settings)
    yield not_seen("Argo's retries", hidden) if hidden else retry_policy(config, where)

    if blocked:
        yield warning("A pod like a step's", "was not tried, for it could not start", "mend what fails above, then check again")
        return
    yield from _in_a_pod(core, settings, namespace, account, reviewed=bool(reviewed), autoscaled=autoscaled)


def _in_a_pod(
    core: CoreV1Api, settings: Settings, namespace: str, account: str, *, reviewed: bool, autoscaled: bool
) -> Iterator[Finding]:
    asked = [] if reviewed else [right.attributes(namespace) for right in RIGHTS]
    pod = probe.probe(settings, name=probe.name(), account=account, rights=asked)
    try:
        outcome = probe.run(core, namespace, pod, patience=probe.SECONDS if autoscaled else probe.PLACE_SECONDS)
    except Denied as denied:
        yield not_seen("A pod like a step's", f"{denied} in {namespace}")
        return
    yield from from_pod(outcome, settings, namespace, autoscaled=autoscaled)
    answers = outcome.report.get("rights") or []
    if asked and None not in answers and len(answers) == len(RIGHTS):
        yield from rights(dict(zip(RIGHTS, answers, strict=True)), account, namespace)
    elif asked:
        yield not_seen(f"What ServiceAccount {account} may do", "create subjectaccessreviews")


def _kfp(server: Callable[[], Server], given: str) -> tuple[list[Finding], Json]:
    """Findings of KFP's API, and what its `healthz` said."""
    what = "Kubeflow Pipelines"
    try:
        asked = server()
        healthz = asked.ask(asked.health.healthz_service_get_healthz, patience=KFP_PATIENCE)
        return [kfp_version(healthz, asked.endpoint.url), *profile(healthz, given)], healthz
    except Unreachable as error:
        return [
            failed(what, f"does not answer: {error}", "see FFN_KFP_URL, and kubectl -n kubeflow get pods -l app=ml-pipeline")
        ], {}
    except Refused as error:
        return [failed(what, f"refuses us: {error}", "set FFN_KFP_TOKEN, FFN_KFP_TOKEN_FILE or FFN_KFP_COOKIE")], {}
    except FFNError as error:
        return [failed(what, f"cannot be asked: {error}", "see docs/cluster.md")], {}


def _names(core: CoreV1Api, settings: Settings, namespace: str) -> Iterator[Finding]:
    """The Secrets and ConfigMaps that settings name."""
    for name, keys in (
        (settings.mlflow_secret, placement.MLFLOW_KEYS),
        (settings.s3_secret, placement.S3_KEYS),
        (settings.webhook_secret, placement.WEBHOOK_KEYS),
    ):
        if name:
            yield _secret(core, name, namespace, keys)
    if name := settings.pull_secret:
        yield _look(lambda got: pull_secret(got, name=name, namespace=namespace), core.read_namespaced_secret, name, namespace)
    if name := settings.ca:
        yield _look(lambda got: authorities(got, name=name, namespace=namespace), core.read_namespaced_config_map, name, namespace)


def _secret(core: CoreV1Api, name: str, namespace: str, keys: Sequence[str]) -> Finding:
    return _look(lambda got: secret(got, name=name, namespace=namespace, keys=keys), core.read_namespaced_secret, name, namespace)


def _claims(core: CoreV1Api, settings: Settings, namespace: str) -> Iterator[tuple[Finding, Json | None]]:
    """The volume claims that settings name: that of the states, and that of the recordings."""
    for name, variable in ((settings.states_claim, "FFN_CHECKPOINTS_CLAIM"), (settings.data_claim, "FFN_DATA_CLAIM")):
        if not name:
            continue
        try:
            found = or_none(core.read_namespaced_persistent_volume_claim, name, namespace)
            binding = _binding(core, found) if found else ""
            yield claim(found, name=name, namespace=namespace, variable=variable, binding=binding), found
        except Denied as denied:
            yield not_seen(f"PersistentVolumeClaim {name} in {namespace}", str(denied)), None


def _binding(core: CoreV1Api, found: Json) -> str:
    """When volumes of the claim's class are bound; empty where there is no such class, or none is needed any more."""
    if found.get("status", {}).get("phase") == "Bound" or not (name := found.get("spec", {}).get("storageClassName")):
        return ""
    return str((or_none(StorageV1Api(core.api_client).read_storage_class, name) or {}).get("volumeBindingMode", ""))


def _reviewed(api: ApiClient, account: str, namespace: str) -> dict[Right, bool]:
    """What the account may do; nothing where we may not ask for others."""
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    found = {}
    for right in RIGHTS:
        spec = {
            "user": f"system:serviceaccount:{namespace}:{account}",
            "groups": groups,
            "resourceAttributes": right.attributes(namespace),
        }
        try:
            answer = kube.ask(AuthorizationV1Api(api).create_subject_access_review, {"spec": spec})
        except Denied:
            return {}
        found[right] = bool(answer["status"].get("allowed"))
    return found


def _argo(core: CoreV1Api, namespace: str) -> tuple[Json | None, str | None, str]:
    """Argo's configuration and the namespace it was found in; or the right that it takes to see it.

    It is where KFP runs: with profiles, not where runs live.
    """
    hidden = ""
    for where in dict.fromkeys((namespace, KFP_NAMESPACE)):
        try:
            if found := or_none(core.read_namespaced_config_map, CONFIG, where):
                return found, where, ""
        except Denied as denied:
            hidden = f"{denied} in {where}"
    try:
        items = kube.ask(core.list_config_map_for_all_namespaces, field_selector=f"metadata.name={CONFIG}")["items"]
    except Denied as denied:
        return None, None, hidden or str(denied)
    return (items[0], items[0]["metadata"]["namespace"], "") if items else (None, None, "")


def _autoscaled(core: CoreV1Api) -> bool:
    """Whether the cluster makes nodes as pods need them, as far as we may see: the cluster autoscaler or Karpenter."""
    try:
        if or_none(core.read_namespaced_config_map, "cluster-autoscaler-status", "kube-system"):
            return True
    except Denied:
        pass
    try:
        pools = CustomObjectsApi(core.api_client).list_cluster_custom_object
        return bool(kube.ask(pools, "karpenter.sh", "v1", "nodepools")["items"])
    except (Denied, Absent):
        return False


def _nodes(core: CoreV1Api) -> list[Json] | None:
    """All nodes; None where we may not see them."""
    try:
        return list(kube.ask(core.list_node)["items"])
    except Denied:
        return None


def _look(judge: Callable[[Json | None], Finding], call: Callable[..., Any], *given: str) -> Finding:
    """What is found of an object that may not be there, or not for us to see."""
    try:
        return judge(or_none(call, *given))
    except Denied as denied:
        return not_seen(judge(None).what, str(denied))
