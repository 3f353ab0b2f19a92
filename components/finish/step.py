"""Finish: the results, and the end of the parent run, whatever became of the steps."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from components import cluster, registry, say, step, tracking
from components.begin.step import page as kfp_page
from components.notify import notify
from ffn import plots, report, summary
from ffn.errors import FFNError
from ffn.report import Result
from ffn.summary import Summary

STATES = {
    "SUCCEEDED": "FINISHED", "COMPLETE": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED", "CANCELED": "KILLED",
}  # fmt: skip
"""How KFP says a pipeline ended (here and on a cluster in different words) -> how MLflow does.

Where a pod was lost, or a pipeline has loops, its server still calls it RUNNING at its end: `unsaid` then asks Argo."""

SHOWN = ("presets", "seeds", "space", "overrides", "source", "source_version", *tracking.LINEAGE)
"""What a reader of the results wants to know of the run, if it is known."""


@step
def run(*, job: str, status: str, table: Path, metrics: Path, report: Path) -> dict[str, float]:
    """Log what the pipeline run `job` found to its MLflow run and end it; write it to `table` (Markdown) and `report` (HTML).

    Returns the held-out accuracies by name, fractions. A run that is not open is left as it is: `begin` refused to take it up.
    """
    for path in (table, metrics, report):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # KFP's pages look for a file of each
    try:
        parent = tracking.parent(job)
    except FFNError as error:
        why, link = f"no run was opened in MLflow; its log says why ({error})", kfp_page(job)
        begun = Summary(name=job, status="FAILED", failed={"begin": why}, links={"KFP": link} if link else {})
        table.write_text(summary.markdown(begun))
        report.write_text(summary.page(begun, {}))
        notify(summary.short(begun))
        return {}
    results, ours = by_order(parent), parent.open
    failed = tracking.failures(parent.id)
    ended = tracking.outcome(parent.id, STATES.get(status) or unsaid(job)) if ours else parent.status
    told = tell(parent, ended, failed, results)
    text, page = summary.markdown(told), summary.page(told, figures(parent, results))
    table.write_text(text)
    report.write_text(page)
    if ours:
        log(parent, text, page, results)
        tracking.end(parent.id, ended)  # the last of all: what is cut off before is done by the next attempt
        notify(summary.short(told))
    for what, why in failed.items():
        say(f"FAILED: {what}: {why}")
    return {name_of(result, results): result.top1 for result in results}


def unsaid(job: str) -> str:
    """How a pipeline run went whose server does not say: by its workflow, where it has one."""
    if not cluster.inside():
        return "FINISHED"
    try:
        return "FAILED" if cluster.broken(job) else "FINISHED"
    except FFNError as error:
        say(f"no word of run {job}: {error}")
        return "FAILED"


def by_order(parent: tracking.Child) -> list[Result]:
    """What was measured, in the house's order."""
    return report.in_order(tracking.results(parent.id))


def name_of(result: Result, results: Sequence[Result]) -> str:
    """`ntu60-xsub 4s`, and in a comparison `S4 ntu60-xsub 4s seed1`: names of KFP's metrics."""
    stream = result.stream.replace("+", " ")
    if not report.compares(results):
        return f"{result.protocol} {stream}"
    return f"{result.preset} {result.protocol} {stream} seed{result.seed}"


def tell(parent: tracking.Child, ended: str, failed: dict[str, str], results: Sequence[Result]) -> Summary:
    """All there is to say of the run."""
    known = parent.facts()
    links = {"MLflow": parent.page()} | ({"KFP": known["kfp_url"]} if "kfp_url" in known else {})
    shown = {name: known[name] for name in SHOWN if name in known and name != "kfp_url"}
    return Summary(
        name=parent.name, status=ended, failed=failed, results=results, space=known.get("space", "3d"),
        models=[verdict(version) for version in registry.versions(parent.id)], facts=shown, links=links,
    )  # fmt: skip


def verdict(version: registry.Version) -> str:
    """What the gate said of a version and what became of it."""
    champion, gate = registry.champion(version.champions), version.tags.get("gate", "")
    if champion and champion.tags.get(registry.CANDIDATE) == version.called:
        state = f"champion, as {champion.name} version {champion.number}"
    else:
        state = {"hold": "held by the gate", "promote": "let through by the gate"}.get(gate, "challenger")
    reason = version.tags.get("gate_reason", "")
    todo = f"; next: `ffn model promote {version.called}`" if state == "let through by the gate" else ""
    return f"{version.name} version {version.number}: {state}{f': {reason}' if reason else ''}{todo}"


def figures(parent: tracking.Child, results: Sequence[Result]) -> dict[str, bytes]:
    """Title -> PNG: the results; of a run that compares nothing also the widest fusions' confusion, and the learning curves."""
    if not results:
        return {}
    compared = report.compares(results)
    drawn = {"Results": png(overview(results, parent.param("space")))}
    if compared:
        return drawn
    widest = {result.protocol: result.stream for result in results}  # the last of a protocol in the house's order
    for name, of in tracking.pictures(parent.id).items():
        protocol, stream = name.split("/")[1:3]
        if widest.get(protocol) == stream and "confusion" in of:
            drawn[f"Confusion, {protocol} {stream}"] = of["confusion"]
        if "learning_curves" in of:
            drawn[f"Training, {protocol} {stream}"] = of["learning_curves"]
    return drawn


def overview(results: Sequence[Result], space: str) -> Figure:
    if report.compares(results):
        return plots.comparison(report.cells(results, space=space))
    return plots.results_table(report.by_protocol(results))


def png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def log(parent: tracking.Child, text: str, page: str, results: Sequence[Result]) -> None:
    """Leave in the parent run what was found."""
    parent.text(text, "results.md")
    parent.text(page, "report.html")
    parent.tag(tracking.NOTE, text)
    if not results:
        return
    parent.text(json.dumps([asdict(result) for result in results], indent=1), "results.json")
    parent.figure(overview(results, parent.param("space")), "results.png")
    if not report.compares(results):
        parent.metrics({f"top1/{result.protocol}/{result.stream.replace('+', ' ')}": result.top1 for result in results})
