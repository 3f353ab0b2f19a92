"""Tables as Markdown that lines up, so that a terminal can show it too."""

from collections.abc import Sequence


def table(header: Sequence[str], lines: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """The first `names` columns to the left, the figures after them to the right; ends without a line break."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * width if column < names else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    aligns = [str.ljust if column < names else str.rjust for column in range(len(widths))]
    padded = [
        [align(text, width) for align, text, width in zip(aligns, line, widths, strict=True)] for line in (header, rule, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
