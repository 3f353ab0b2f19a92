"""`python -m benchmarks [group ...]`: measure, print the table, record it under `benchmarks/results/`."""

import argparse
import sys
from pathlib import Path

from benchmarks import harness
from ffn.errors import FFNError


def main(arguments: list[str] | None = None) -> int:
    """Run the groups that are named, or all; 2 where one cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure against plain references.")
    parser.add_argument("groups", nargs="*", metavar="group", help=f"{', '.join(harness.groups())}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and smaller sets")
    parser.add_argument("--toy", action="store_true", help="only to see that everything runs and agrees; nothing is recorded")
    parser.add_argument("--profile", action="store_true", help="also write where the time goes, one text file per group")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    asked = parser.parse_args(arguments)
    scale: harness.Scale = "toy" if asked.toy else "quick" if asked.quick else "full"
    path = harness.result_path(asked.out)
    try:
        for group in asked.groups or harness.groups():
            print(f"## {group}\n", flush=True)
            rows = []
            for row in harness.run(group, scale):
                print(f"{row.name}: {row.value:.4g} {row.unit}", file=sys.stderr, flush=True)
                rows.append(row)
            print(harness.table(rows) + "\n", flush=True)
            if scale != "toy":
                harness.record(path, group, scale, rows)
                harness.picture(group, rows, asked.out)
            if asked.profile and (tables := harness.profile(group, scale)):
                text = "\n".join(f"# {name}\n{table}" for name, table in tables.items())
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(f".{group}.profile.txt").write_text(text, encoding="utf-8")
    except FFNError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
