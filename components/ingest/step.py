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
def run(*, source: Path | str, source_version: str, space: str, parent: str, out: Path) -> dict[str, str]:
    """Write the skeleton set of `source`, a path or `s3://BUCKET/NAME`, to `out`.

    Returns what names it: digest, samples, classes, layout.
    """
    if space not in get_args(Space):
        raise FFNError(f"space {space!r}: expected one of {', '.join(get_args(Space))}")
    with tracking.child(parent, key=digest("ingest", source_version, space), name="ingest", kind="ingest") as track:
        with storage.at_hand(source) as files:
            report = ingest(files, out, space=cast(Space, space))
        data = SkeletonSet.open(out)
        track.params({"source": str(source), "space": space, "digest": data.digest, "layout": data.layout.name})
        track.metrics({"samples": len(data), "dropped": len(report.dropped), "seconds": report.seconds})
        track.text(report.to_markdown(), "report.md")
        track.text(json.dumps(report.to_dict(), indent=1), "report.json")
        track.dataset(data, "ingestion")
    say(f"{len(data)} samples, {len(data.classes)} classes, {len(report.dropped)} dropped, digest {data.digest}")
    return {"digest": data.digest, "samples": str(len(data)), "classes": str(len(data.classes)), "layout": data.layout.name}
