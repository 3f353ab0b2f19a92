"""What the pods of a run ask for, against what quotas, limit ranges and nodes have to give."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from components.kube import Json
from ffn.config import STREAMS
from pipeline import probe
from pipeline.check.finding import Finding, amount, failed, ok, text, warning
from pipeline.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one pod asks for."""

    what: str
    requests: Mapping[str, str]
    limits: Mapping[str, str]

    def usage(self) -> dict[str, Decimal]:
        """As resource quotas count it."""
        counted = {"pods": Decimal(1), "count/pods": Decimal(1)}
        for resource, request in self.requests.items():
            counted[f"requests.{resource}"] = counted[resource] = amount(request)
        for resource, limit in self.limits.items():
            counted[f"limits.{resource}"] = amount(limit)
        return counted


def demands(settings: Settings) -> tuple[Demand, Demand]:
    """A training, and a light step."""
    heavy = {"cpu": settings.cpu, "memory": settings.memory} | ({settings.gpu: str(settings.gpus)} if settings.gpus else {})
    light = {"cpu": settings.light_cpu, "memory": settings.light_memory}
    return (
        Demand(what="a training", requests=heavy, limits=heavy),
        Demand(what="a light step", requests=probe.light_requests(settings), limits=light),
    )


def quota(found: Json, settings: Settings, namespace: str) -> Iterator[Finding]:
    """Of one ResourceQuota: whether it lets a pod be at all, and how many trainings beside a light step now."""
    hard, used = found["spec"].get("hard") or {}, found.get("status", {}).get("used") or {}
    heavy, light = (demand.usage() for demand in demands(settings))
    counted = [key for key in hard if key in heavy or key in light]
    if not counted or not _covers_steps(found["spec"]):
        return
    what = f"ResourceQuota {found['metadata']['name']} in {namespace}"
    raised = f"raise it: kubectl -n {namespace} edit resourcequota {found['metadata']['name']}"
    for demand in demands(settings):
        asks = demand.usage()
        if over := [f"{key} {hard[key]}, it asks for {text(asks[key])}" for key in counted if asks.get(key, 0) > amount(hard[key])]:
            yield failed(
                what, f"never admits {demand.what}: {'; '.join(over)}", f"{raised}, or ask for less (FFN_CPU, FFN_MEMORY, FFN_GPUS)"
            )
            return
    free = {key: amount(hard[key]) - amount(used.get(key, "0")) - light.get(key, 0) for key in counted}
    room = {key: int(free[key] // heavy[key]) for key in counted if heavy.get(key)}
    least = min(room, key=lambda key: room[key], default="")
    wanted = settings.parallelism or len(STREAMS)
    if least and room[least] < wanted:
        yield warning(
            what, f"has room for {max(0, room[least])} trainings now ({least}: {used.get(least, '0')} of {hard[least]} used), "
            f"a protocol starts {wanted} at once; the others wait",
            f"{raised}, or export FFN_PARALLELISM={max(1, room[least])}",
        )  # fmt: skip
    else:
        yield ok(what, f"has room for {room[least]} trainings" if least else "leaves room")


def _covers_steps(spec: Json) -> bool:
    """Whether a quota counts steps' pods: they have requests and a deadline, and no priority class.

    Source: scopes of Kubernetes' resource quotas.
    """
    outside = {"BestEffort", "NotTerminating", "PriorityClass", "CrossNamespacePodAffinity"}
    selected = [each.get("scopeName") for each in (spec.get("scopeSelector") or {}).get("matchExpressions") or []]
    return not outside & {*(spec.get("scopes") or []), *selected}


def limit_range(found: Json, settings: Settings, namespace: str) -> Iterator[Finding]:
    """Of one LimitRange: whether what pods ask for is within it."""
    name = found["metadata"]["name"]
    what = f"LimitRange {name} in {namespace}"
    wrong = [
        f"{demand.what} {outside}"
        for item in found["spec"].get("limits") or []
        if item.get("type") in ("Container", "Pod")
        for demand in demands(settings)
        for outside in _outside(demand, item)
    ]
    if wrong:
        raised = f"kubectl -n {namespace} edit limitrange {name}"
        yield failed(
            what, f"refuses {'; '.join(wrong)}", f"{raised}, or change FFN_CPU, FFN_MEMORY, FFN_LIGHT_CPU, FFN_LIGHT_MEMORY"
        )
    else:
        yield ok(what, "admits trainings and light steps")


def _outside(demand: Demand, item: Json) -> Iterator[str]:
    """How what a pod asks for breaks one item of a LimitRange."""
    for resource, limit in demand.limits.items():
        request = demand.requests.get(resource, limit)
        highest, lowest, ratio = ((item.get(key) or {}).get(resource) for key in ("max", "min", "maxLimitRequestRatio"))
        if highest is not None and amount(limit) > amount(highest):
            yield f"with {resource} {limit} (at most {highest} a {item['type']})"
        if lowest is not None and amount(request) < amount(lowest):
            yield f"with {resource} {request} (at least {lowest} a {item['type']})"
        if ratio is not None and amount(limit) > amount(ratio) * amount(request):
            yield f"with {resource} {request} to {limit} (at most {ratio} times the request)"


def usable(node: Json) -> bool:
    """Whether pods are put on the node at all."""
    conditions = {each["type"]: each["status"] for each in node.get("status", {}).get("conditions") or []}
    return conditions.get("Ready") == "True" and not node.get("spec", {}).get("unschedulable")


def train_nodes(nodes: Sequence[Json], settings: Settings, tolerations: Sequence[Json], *, autoscaled: bool) -> Finding:
    """Which nodes could take a training; where none could, what keeps the last of them from it.

    `tolerations` are the pod's, as the API made them: some clusters add those for accelerators by themselves. A cluster that makes
    nodes as they are needed (`autoscaled`) may have none now.
    """
    what, asked = "Nodes for trainings:", demands(settings)[0].requests
    fitting, none = _fitting(nodes, settings, asked, tolerations)
    if not none:
        names = ", ".join(node["metadata"]["name"] for node in fitting[:3]) + (", ..." if len(fitting) > 3 else "")
        kinds = sum((_allocatable(node, settings.gpu) for node in fitting), Decimal(0))
        return ok(
            what, f"{len(fitting)} of {len(nodes)}: {names}" + (f"; {text(kinds)} {settings.gpu} in all" if settings.gpus else "")
        )
    said, remedy = none
    if autoscaled:
        return warning(what, f"{said}; this cluster makes nodes as they are needed", f"see that it can make such, else {remedy}")
    return failed(what, said, remedy)


def light_nodes(nodes: Sequence[Json], settings: Settings) -> Finding:
    """Which nodes could take a light step, which goes where it likes and tolerates nothing."""
    anywhere = replace(settings, node_selector={}, gpus=0, tolerations=())
    fitting, none = _fitting(nodes, anywhere, demands(settings)[1].requests, ())
    what = "Nodes for light steps:"
    if none:
        said, _ = none
        return failed(what, said, "add a node without taints, with 500m of CPU and 2Gi to give")
    return ok(what, f"{len(fitting)} of {len(nodes)}")


def _fitting(
    nodes: Sequence[Json], settings: Settings, asked: Mapping[str, str], tolerations: Sequence[Json]
) -> tuple[list[Json], tuple[str, str] | None]:
    """The nodes that could take a pod; or else what left none, and its remedy."""
    wanted = ",".join(f"{key}={value}" for key, value in settings.node_selector.items())
    if not nodes:
        return [], ("there are none", "kubectl get nodes")
    found = [node for node in nodes if settings.node_selector.items() <= (node["metadata"].get("labels") or {}).items()]
    if not found:
        return [], (
            f"none of {len(nodes)} has the labels {wanted}",
            f"kubectl label node <name> {wanted.replace(',', ' ')}, or change FFN_NODE_SELECTOR",
        )
    if settings.gpus:
        most = max(_allocatable(node, settings.gpu) for node in found)
        if not most:
            return [], (
                f"none of {len(found)} offers {settings.gpu}",
                "install the vendor's device plugin, or name another kind in FFN_GPU; FFN_GPUS=0 trains on CPUs",
            )
        if most < settings.gpus:
            return [], (f"none has {settings.gpus} {settings.gpu}, the most is {text(most)}", f"export FFN_GPUS={text(most)}")
        found = [node for node in found if _allocatable(node, settings.gpu) >= settings.gpus]
    large = [node for node in found if all(_allocatable(node, key) >= amount(asked[key]) for key in ("cpu", "memory"))]
    if not large:
        cpu, memory = (max(_allocatable(node, key) for node in found) for key in ("cpu", "memory"))
        said = f"none has cpu {asked['cpu']} and memory {asked['memory']} to give"
        return [], (said, f"set FFN_CPU below {text(cpu)} and FFN_MEMORY below {int(memory // 2**30)}Gi, or add larger nodes")
    tolerated = [node for node in large if not _taints(node, tolerations)]
    if not tolerated:
        taints = min((_taints(node, tolerations) for node in large), key=len)
        names = ", ".join(map(_taint, taints))
        given = [_toleration(each) for each in probe.tolerations(settings)]
        return [], (
            f"all have taints that the pod does not tolerate: {names}",
            f"export FFN_TOLERATIONS={','.join([*given, *map(_taint, taints)])}",
        )
    ready = [node for node in tolerated if usable(node)]
    if not ready:
        names = ", ".join(node["metadata"]["name"] for node in tolerated)
        return [], (f"{names} not ready, or cordoned", f"kubectl uncordon {tolerated[0]['metadata']['name']}; kubectl get nodes")
    return ready, None


def _allocatable(node: Json, resource: str) -> Decimal:
    return amount((node.get("status", {}).get("allocatable") or {}).get(resource, "0"))


def _taints(node: Json, tolerations: Sequence[Json]) -> list[Json]:
    """Taints that keep a pod with these tolerations away; those that say a node's state are `usable`'s."""
    return [
        taint
        for taint in node.get("spec", {}).get("taints") or []
        if taint["effect"] != "PreferNoSchedule"
        and not taint["key"].startswith("node.kubernetes.io/")
        and not any(_tolerates(toleration, taint) for toleration in tolerations)
    ]


def _tolerates(toleration: Json, taint: Json) -> bool:
    """Source: Toleration.ToleratesTaint of Kubernetes' core/v1."""
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("key") and toleration["key"] != taint["key"]:
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")


def _taint(taint: Json) -> str:
    """As FFN_TOLERATIONS has it: `key=value:effect`."""
    value = f"={taint['value']}" if taint.get("value") else ""
    return f"{taint['key']}{value}:{taint['effect']}"


def _toleration(toleration: Json) -> str:
    value = f"={toleration['value']}" if toleration.get("value") else ""
    return f"{toleration['key']}{value}" + (f":{toleration['effect']}" if toleration.get("effect") else "")
