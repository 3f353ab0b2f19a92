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
def run(*, source: Path | str, source_version: str, space: str, data: Path, report: Path) -> dict[str, str]:
    """Write the skeleton set of `source`, a path or `s3://BUCKET/NAME`, to `data`, and what became of the recordings to `report`.

    Returns what names it: digest, samples, classes, layout. It is not told its parent run, so that what it made is found by
    whichever pipeline run reads the same recordings: it looks that up itself.
    """
    if space not in get_args(Space):
        raise FFNError(f"space {space!r}: expected one of {', '.join(get_args(Space))}")
    key = digest("ingest", source_version, space)
    with tracking.child(tracking.present(), key=key, name="ingest", kind="ingest") as track:
        with storage.at_hand(source) as files:
            kept = ingest(files, data, space=cast(Space, space))
        made = SkeletonSet.open(data)
        track.params({"source": str(source), "space": space, "digest": made.digest, "layout": made.layout.name})
        track.metrics({"samples": len(made), "dropped": len(kept.dropped), "seconds": kept.seconds})
        track.text(kept.to_markdown(), "report.md")
        track.text(json.dumps(kept.to_dict(), indent=1), "report.json")
        track.dataset(made, "ingestion")
        track.tag(tracking.LINEAGE["data_digest"], made.digest)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(kept.to_markdown())
    say(f"{len(made)} samples, {len(made.classes)} classes, {len(kept.dropped)} dropped, digest {made.digest}")
    return {"digest": made.digest, "samples": str(len(made)), "classes": str(len(made.classes)), "layout": made.layout.name}
