"""What a person reads first of a pipeline run: how it ended, why a step failed, the results; as Markdown and as one HTML page."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ffn import report
from ffn.report import Result

LEGEND = (
    "Held-out top1 of the last epoch in percent. Streams: j joints, b bones, jm and bm their motion; 2s, 4s: two and four fused."
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What there is to say of a pipeline run."""

    name: str
    status: str
    """FINISHED, FAILED or KILLED, as MLflow says it."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Step -> why it failed."""
    results: Sequence[Result] = ()
    space: str = "3d"
    """Keypoints that were trained on, which the paper's figures are chosen by."""
    models: Sequence[str] = ()
    """A line per registered version: what became of it, and why."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Preset, data digest, commit and the like, by name."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Name -> address that a person's browser finds."""

    @property
    def tables(self) -> str:
        """The results as Markdown; empty without any."""
        if not self.results:
            return ""
        if report.compares(self.results):
            return report.comparison(report.cells(self.results, space=self.space))
        return f"{report.table(self.results)}\n{LEGEND}\n"


def markdown(summary: Summary) -> str:
    """The summary as Markdown, why it failed before everything else."""
    parts = [f"# {summary.name}: {summary.status}"]
    parts += [f"**FAILED**: {step}: {why}" for step, why in summary.failed.items()]
    parts.append(summary.tables.rstrip() or "No results: nothing was evaluated.")
    parts += [f"- {line}" for line in summary.models]
    parts.append(", ".join(f"{name} {value}" for name, value in summary.facts.items() if value))
    parts.append("  \n".join(f"{name}: {address}" for name, address in summary.links.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def short(summary: Summary) -> str:
    """The summary in a few lines, as a message: why it failed before everything else."""
    whys = [f"{step}: {' '.join(why.split())[:LONGEST_WHY]}" for step, why in summary.failed.items()]
    parts = [f"{summary.name}: {summary.status}" + (f" in {whys[0]}" if whys else ""), *whys[1:MOST_WHYS]]
    if len(whys) > MOST_WHYS:
        parts.append(f"and {len(whys) - MOST_WHYS} more")
    if not report.compares(summary.results):
        widest = {result.protocol: result for result in report.in_order(summary.results)}
        parts += [f"{result.protocol} {result.stream}: top1 {100 * result.top1:.1f} %" for result in widest.values()]
    parts += summary.models
    return "\n".join([*parts, *(f"{name}: {address}" for name, address in summary.links.items())])


LONGEST_WHY, MOST_WHYS = 300, 5
"""Characters of a reason, and reasons, in a message."""


def page(summary: Summary, figures: Mapping[str, bytes]) -> str:
    """The summary as one HTML page that asks nothing of any server; `figures` are titles and PNG files."""
    said = html.escape
    body = [f"<h1>{said(summary.name)}: <span class={summary.status.lower()}>{said(summary.status)}</span></h1>"]
    body += [f"<p class=failed><b>FAILED</b>: {said(step)}: {said(why)}</p>" for step, why in summary.failed.items()]
    body.append(f"<pre>{said(summary.tables.rstrip() or 'No results: nothing was evaluated.')}</pre>")
    body += [f"<p>{said(line)}</p>" for line in summary.models]
    rows = "".join(f"<tr><th>{said(name)}</th><td>{said(value)}</td></tr>" for name, value in summary.facts.items() if value)
    body.append(f"<table>{rows}</table>")
    body += [f'<p><a href="{said(address)}">{said(name)}</a></p>' for name, address in summary.links.items()]
    for title, content in figures.items():
        data = base64.b64encode(content).decode()
        body.append(f'<h2>{said(title)}</h2><img alt="{said(title)}" src="data:image/png;base64,{data}">')
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>{said(summary.name)}</title>{STYLE}{''.join(body)}</html>"


STYLE = """\
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 1100px; margin: 24px auto; padding: 0 16px }
h1 { font-size: 22px } h2 { font-size: 16px; margin-top: 32px } pre { overflow-x: auto; background: #f6f8fa; padding: 12px }
th { text-align: left; padding-right: 16px; font-weight: 600 } img { max-width: 100% }
.failed, .killed { color: #b3261e } .finished { color: #1a7f37 }
</style>
"""
