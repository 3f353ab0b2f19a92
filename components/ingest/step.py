"""Ingest: raw recordings become one skeleton set, once for every state of the recordings and of the code that reads them."""

import json
from pathlib import Path
from typing import Any, cast, get_args

from components import say, skeletons, step, storage, tracking
from ffn.config import code, digest
from ffn.data.ingest import READS, ingest
from ffn.data.store import Space
from ffn.errors import FFNError


@step
def run(*, source: Path | str, source_version: str, space: str, store: str, data: Path, report: Path) -> dict[str, str]:
    """Write the skeleton set of `source`, a path or `s3://BUCKET/NAME`, to `data`, and what became of the recordings to `report`.

    With a `store`, the durable folder or `s3://BUCKET/PREFIX`, the set is kept there, or found where the same recordings were
    read before, and `data` says where. Returns what names it: digest, samples, classes, layout. The step is not told its parent
    run: one machine's cache finds what it made for any, and it looks the run up itself.
    """
    if space not in get_args(Space):
        raise FFNError(f"space {space!r}: expected one of {', '.join(get_args(Space))}")
    key = digest("ingest", str(source), source_version, space, code(*READS))  # a version is one of its source
    store = store.rstrip("/")

    def make(out: Path) -> dict[str, Any]:
        with storage.at_hand(source) as files:
            kept = ingest(files, out, space=cast(Space, space))
        return {"dropped": len(kept.dropped), "seconds": kept.seconds, "report": kept.to_dict(), "page": kept.to_markdown()}

    with tracking.child(tracking.present(), key=key, name="ingest", kind="ingest") as track:
        if not store:
            facts = make(data)
        else:
            note = skeletons.found(store, key)
            say(f"found in {store}" if note else f"kept in {store}")
            note = note or skeletons.keep(store, key, make)
            facts = note["facts"]
            data.parent.mkdir(parents=True, exist_ok=True)
            data.write_text(json.dumps(note))
        with skeletons.opened(data) as made:
            track.params({"source": str(source), "space": space, "digest": made.digest, "layout": made.layout.name})
            track.metrics({"samples": len(made), "dropped": facts["dropped"], "seconds": facts["seconds"]})
            track.text(facts["page"], "report.md")
            track.text(json.dumps(facts["report"], indent=1), "report.json")
            track.dataset(made, "ingestion")
            track.tag(tracking.LINEAGE["data_digest"], made.digest)
            names = {
                "digest": made.digest,
                "samples": str(len(made)),
                "classes": str(len(made.classes)),
                "layout": made.layout.name,
            }
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(facts["page"])
    say(f"{names['samples']} samples, {names['classes']} classes, {facts['dropped']} dropped, digest {names['digest']}")
    return names
