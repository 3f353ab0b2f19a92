"""Finish: the result table, and the end of the parent run, whatever became of the steps."""

import json
from dataclasses import asdict
from pathlib import Path

from components import step, tracking
from ffn import plots, report

STATES = {
    "SUCCEEDED": "FINISHED", "COMPLETE": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED", "CANCELED": "KILLED",
}  # fmt: skip
"""How KFP says a pipeline ended (here and on a cluster in different words) -> how MLflow does."""


@step
def run(*, name: str, state: str, out: Path) -> None:
    """Log what the pipeline run `name` found to its MLflow run, write it to `out` as Markdown, end the run.

    That is the table of results, or where the run had several presets or seeds their comparison. A run that is not open is
    left as it is: `begin` refused to take it up.
    """
    parent = tracking.parent(name)
    results = report.in_order(tracking.results(parent.id))
    several = report.compares(results)
    cells = report.cells(results, space=parent.param("space"))
    text = f"{report.comparison(cells) if several else report.table(results)}\nRuns and models: {parent.page()}\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    if not parent.open:
        return
    if results:
        parent.text(text, "results.md")
        parent.text(json.dumps([asdict(result) for result in results], indent=1), "results.json")
        parent.figure(plots.comparison(cells) if several else plots.results_table(report.by_protocol(results)), "results.png")
        if not several:
            parent.metrics({f"top1/{result.protocol}/{result.stream.replace('+', ' ')}": result.top1 for result in results})
    # A server may still call a pipeline with loops RUNNING at its end: then its parts say how it went.
    parent.client.set_terminated(parent.id, STATES.get(state) or tracking.outcome(parent.id))
