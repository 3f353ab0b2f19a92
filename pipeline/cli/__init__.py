"""The command line: verbs for this machine, `ffn model` for the registry, `ffn cluster` for Kubeflow Pipelines.

Imports stay inside the verbs, so that `ffn --help` is instant and `ffn cluster compile` never loads torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from ffn.errors import FFNError
from pipeline.cli import cluster, daily, model, options
from pipeline.cli.options import Verbs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 a failed step, 2 a mistake to mend, 130 interrupted, 141 unread."""
    given = parser().parse_args(arguments)
    try:
        with options.applied(given):
            status = int(given.verb(given) or 0)
        sys.stdout.flush()
        return status
    except FFNError as error:
        print(f"ffn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ffn: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    root = argparse.ArgumentParser(prog="ffn", description="From raw skeletons to a promoted action-recognition model.")
    verbs = Verbs(root)
    daily.add(verbs)
    model.add(verbs.group("model", "registered models: list, promote, roll back, compare", options.cluster_models))
    cluster.add(verbs.group("cluster", "Kubeflow Pipelines: check, compile, submit, watch, schedule, clean up", options.cluster))
    return root


if __name__ == "__main__":
    sys.exit(main())
