"""Ingestion: from a source of recordings to a published `SkeletonSet`, with a report of what was kept and what was not."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ffn
from ffn.data.readers import mmaction, ntu, table, ucla
from ffn.data.readers.source import Dropped, Source, file_names
from ffn.data.store import Sample, SkeletonSetWriter, Space, publishing
from ffn.errors import FFNError
from ffn.machine import cores

READS = ("data", "layouts.py", "protocols.py")
"""What of ffn decides what is made of a source: `ffn.config.code` of it is the reader's version."""

_PARTS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an ingestion kept and what it left out."""

    source: str
    """Name of the source, without its folder."""
    reader: str
    digest: str
    """The set's digest."""
    samples: int
    classes: Mapping[str, int]
    """Class -> samples, in the set's order; classes without a sample are left out."""
    protocols: Mapping[str, Mapping[str, int]]
    """Protocol -> samples in `train` and `test`."""
    empty_protocols: Mapping[str, Mapping[str, int]]
    """Protocols of the source that are not in the set, because `train` or `test` has no sample."""
    dropped: tuple[tuple[str, str], ...]
    """File (and line) or sample, and why it was left out."""
    reasons: Mapping[str, int]
    """Reason -> samples left out for it, most frequent first."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def to_markdown(self) -> str:
        """The report as a page."""
        parts = [
            f"# Ingestion of {_cell(self.source)}",
            f"{self.samples} samples kept, {len(self.dropped)} left out, in {self.seconds:.1f} s. "
            f"Reader `{self.reader}`, digest `{self.digest}`.",
            "## Protocols",
            _markdown(("protocol", "train", "test"), ((name, n["train"], n["test"]) for name, n in self.protocols.items())),
        ]
        if self.empty_protocols:
            rows = ((name, n["train"], n["test"]) for name, n in self.empty_protocols.items())
            parts += ["Not in the set, because a part is empty:", _markdown(("protocol", "train", "test"), rows)]
        parts += ["## Classes", _markdown(("class", "samples"), self.classes.items())]
        if self.dropped:
            parts += [
                "## Left out",
                _markdown(("reason", "samples"), self.reasons.items()),
                "\n".join(f"- {_cell(where)}: {_cell(why)}" for where, why in self.dropped),
            ]
        return "\n\n".join(parts) + "\n"


def ingest(source: Path, out: Path, *, space: Space = "3d", workers: int | None = None, progress: bool = False) -> Report:
    """Ingest `source` into the skeleton set `out`, with `<out>.report.json` and `<out>.report.md` beside it.

    `source` is a folder or zip of NTU `.skeleton` files, an MMAction2 or pyskl pickle, a folder or zip of NW-UCLA JSON
    files, or a folder with one's own table. `space` chooses what is taken from `.skeleton` files; the others hold only one.
    `workers` processes (default: one per core that it may use) parse `.skeleton` files where there are many; the set and its
    digest do not depend on their number.
    `progress` shows a bar on standard error if that is a terminal.

    A sample that cannot be used is left out and reported. Raises `FFNError`, and leaves nothing behind, where the source
    is not one, no sample is left, or no protocol has both training and held-out samples.
    """
    begin = time.monotonic()
    source, out = Path(source), Path(out)
    opened = _open(source, space, workers or cores())
    tally = _Tally(opened)
    provenance = {"source": source.resolve().name, "reader": opened.reader, "ffn": ffn.__version__}
    with SkeletonSetWriter(
        out,
        layout=opened.layout,
        space=opened.space,
        classes=opened.classes,
        protocols=opened.protocols,
        provenance=provenance,
    ) as writer:
        # Closed, so that an error here ends the reading processes at once.
        with contextlib.closing(_shown(opened.items, opened.total, progress and sys.stderr.isatty())) as items:
            for item in items:
                sample = tally.judge(item)
                if sample:
                    writer.write(sample)
        tally.check(source)
        # Known only now; neither takes part in what was written so far.
        writer.protocols = tuple(tally.full)
        writer.provenance["source_digest"] = opened.content.hexdigest()
    report = tally.report(provenance["source"], writer.digest, time.monotonic() - begin)
    _write(out.with_name(f"{out.name}.report.json"), json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    _write(out.with_name(f"{out.name}.report.md"), report.to_markdown())
    return report


def source_version(source: Path) -> str:
    """Sixteen hex digits that name the state of `source` by its files' names, sizes and times, without reading them.

    Raises `FFNError` where there is no such file or folder.
    """
    source = Path(source)
    if not source.exists():
        raise _absent(source)
    files = sorted(file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]
    marks = hashlib.sha256(source.resolve().name.encode())
    for file in files:
        stat = file.stat()
        marks.update(f"{file.relative_to(source).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return marks.hexdigest()[:16]


class _Tally:
    """Counts what passes, and turns away an id that comes twice."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.ids: set[str] = set()
        self.classes: Counter[int] = Counter()
        self.parts: Counter[tuple[str, str]] = Counter()
        self.dropped: list[Dropped] = []

    def judge(self, item: Sample | Dropped) -> Sample | None:
        """The sample, if it is to be written."""
        if isinstance(item, Sample) and item.id in self.ids:
            item = Dropped(where=item.id, reason="the same id again", detail="the first one was kept")
        if isinstance(item, Dropped):
            self.dropped.append(item)
            return None
        self.ids.add(item.id)
        self.classes[item.label] += 1
        self.parts.update(item.splits.items())
        return item

    @property
    def full(self) -> dict[str, dict[str, int]]:
        """Protocols with both parts, and their counts."""
        return {name: counts for name, counts in self._counts() if all(counts.values())}

    def check(self, source: Path) -> None:
        """Raise `FFNError` where no set can come of it."""
        if not self.ids:
            hint = f"; the first of {len(self.dropped)} left out: {self.dropped[0]}" if self.dropped else ""
            raise FFNError(f"{source}: no sample that can be used{hint}")
        if not self.full:
            found = ", ".join(f"{name} {n['train']} train and {n['test']} test" for name, n in self._counts())
            raise FFNError(
                f"{source}: an empty part in every protocol ({found or 'it names none'}); add samples or mend the splits"
            )

    def report(self, source: str, digest: str, seconds: float) -> Report:
        return Report(
            source=source,
            reader=self.source.reader,
            digest=digest,
            samples=len(self.ids),
            classes={name: self.classes[label] for label, name in enumerate(self.source.classes) if self.classes[label]},
            protocols=self.full,
            empty_protocols={name: counts for name, counts in self._counts() if not all(counts.values())},
            dropped=tuple((d.where, f"{d.reason}: {d.detail}" if d.detail else d.reason) for d in self.dropped),
            reasons=dict(Counter(d.reason for d in self.dropped).most_common()),
            seconds=round(seconds, 3),
        )

    def _counts(self) -> Iterator[tuple[str, dict[str, int]]]:
        for name in self.source.protocols:
            yield name, {part: self.parts[name, part] for part in _PARTS}


def _open(source: Path, space: Space, workers: int) -> Source:
    if not source.exists():
        raise _absent(source)
    if source.is_dir() and (source / table.LABELS).is_file():
        return table.read(source)
    if source.suffix in mmaction.SUFFIXES and source.is_file():
        return mmaction.read(source)
    if source.is_dir() or zipfile.is_zipfile(source):
        if file_names(source, ntu.SUFFIX):
            return ntu.read(source, space=space, workers=workers)
        if file_names(source, ucla.SUFFIX):
            return ucla.read(source)
    elif source.suffix.lower() == ".zip":
        raise FFNError(f"{source}: not a zip file, or cut short; fetch it again")
    expected = f"*{ntu.SUFFIX} or *{ucla.SUFFIX} files (folder or zip), {table.LABELS} (folder), or a {mmaction.SUFFIXES[0]} file"
    raise FFNError(f"{source}: no sample found; expected {expected}")


def _absent(source: Path) -> FFNError:
    return FFNError(f"{source}: no such file or folder; give a folder, zip or pickle of skeletons")


def _shown(items: Iterable[Sample | Dropped], total: int | None, show: bool) -> Generator[Sample | Dropped, None, None]:
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, "ingest", total, console=Console(stderr=True), transient=True)


def _write(path: Path, text: str) -> None:
    with publishing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _markdown(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [header, ("---", *("---:" for _ in header[1:])), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
