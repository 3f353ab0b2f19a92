"""Finish: the result table, and the end of the parent run, whatever became of the steps."""

import json
from collections.abc import Iterable
from pathlib import Path

from components import step, tracking
from ffn.config import FUSIONS, STREAMS
from ffn.plots import results_table
from ffn.protocols import NTU_PROTOCOLS, UCLA_PROTOCOLS

STATES = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED"}
"""How KFP says a pipeline ended -> how MLflow does."""


@step
def run(*, name: str, state: str, out: Path) -> None:
    """Log the table of results of the pipeline run `name` to its MLflow run, write it to `out` as Markdown, end the run.

    A run that is not open is left as it is: `begin` refused to take it up.
    """
    parent = tracking.parent(name)
    rows = ordered(tracking.results(parent.id))
    text = f"{markdown(rows)}\nRuns and models: {parent.page()}\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    if not parent.open:
        return
    if rows:
        parent.text(text, "results.md")
        parent.text(json.dumps(rows, indent=1), "results.json")
        parent.figure(results_table(rows), "results.png")
        parent.metrics({f"top1/{protocol}/{stream}": top1 for protocol, row in rows.items() for stream, top1 in row.items()})
    parent.client.set_terminated(parent.id, STATES.get(state, "FAILED"))


def ordered(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The same rows, protocols and columns in the house's order, unknown ones after the known."""
    protocols, columns = [*NTU_PROTOCOLS, *UCLA_PROTOCOLS], [*STREAMS, *FUSIONS]
    return {
        protocol: {column: rows[protocol][column] for column in _sorted(rows[protocol], columns)}
        for protocol in _sorted(rows, protocols)
    }


def _sorted(names: Iterable[str], known: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """Top-1 in percent, a row per protocol, a column per stream and fusion."""
    columns = _sorted({column for row in rows.values() for column in row}, [*STREAMS, *FUSIONS])
    width = max([len("protocol"), *map(len, rows)])
    lines = [
        f"| {'protocol':<{width}} | " + " | ".join(f"{column:>5}" for column in columns) + " |",
        f"| {'-' * width} | " + " | ".join("----:" for _ in columns) + " |",
    ]
    for protocol, row in rows.items():
        cells = (f"{100 * row[column]:5.1f}" if column in row else "     " for column in columns)
        lines.append(f"| {protocol:<{width}} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
