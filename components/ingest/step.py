"""Ingest: raw recordings become one skeleton set."""

import json
from pathlib import Path
from typing import cast, get_args

from components import say, step, storage, tracking
from ffn.config import digest
from ffn.data.ingest import ingest
from ffn.data.store import SkeletonSet, Space
from ffn.errors import FFNError


@step
def run(*, source: Path | str, source_version: str, space: str, parent: str, data: Path) -> dict[str, str]:
    """Write the skeleton set of `source`, a path or `s3://BUCKET/NAME`, to `data`.

    Returns what names it: digest, samples, classes, layout.
    """
    if space not in get_args(Space):
        raise FFNError(f"space {space!r}: expected one of {', '.join(get_args(Space))}")
    with tracking.child(parent, key=digest("ingest", source_version, space), name="ingest", kind="ingest") as track:
        with storage.at_hand(source) as files:
            report = ingest(files, data, space=cast(Space, space))
        made = SkeletonSet.open(data)
        track.params({"source": str(source), "space": space, "digest": made.digest, "layout": made.layout.name})
        track.metrics({"samples": len(made), "dropped": len(report.dropped), "seconds": report.seconds})
        track.text(report.to_markdown(), "report.md")
        track.text(json.dumps(report.to_dict(), indent=1), "report.json")
        track.dataset(made, "ingestion")
        track.tag(tracking.LINEAGE["data_digest"], made.digest)
    tracking.note(parent, {tracking.LINEAGE["data_digest"]: made.digest})
    say(f"{len(made)} samples, {len(made.classes)} classes, {len(report.dropped)} dropped, digest {made.digest}")
    return {"digest": made.digest, "samples": str(len(made)), "classes": str(len(made.classes)), "layout": made.layout.name}
