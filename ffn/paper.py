"""The paper's rows and figures as data, and our counts beside them.

Source: Guo, Ma, Li, Chen, "Feature Fusion Network for Skeleton-based Action Recognition", Tables 1 to 8 and Fig. 4.
"""

import functools
import warnings
from dataclasses import dataclass, replace
from decimal import Decimal

from ffn.config import PRESETS, S1_ALPHA, ModelConfig
from ffn.errors import FFNError
from ffn.layouts import COCO17, NTU25, Layout
from ffn.markdown import table
from ffn.protocols import NTU_PROTOCOLS


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of one table. Figures are strings, as the paper prints them; empty where it gives none."""

    table: str
    name: str
    """What the paper calls it."""
    preset: str
    space: str = "2d"
    stream: str = "j"
    """A stream or a fusion; empty where the paper does not say."""
    parameters: str = ""
    """Millions."""
    macs: str = ""
    """Multiply-accumulates of one clip, 1e9; the paper says FLOPs."""
    top1: tuple[str, ...] = ()
    """Percent, in the order of `NTU_PROTOCOLS`."""
    top5: str = ""
    """Percent, ntu60-xsub."""


ROWS: tuple[Row, ...] = (
    Row(table="1", name="S0", preset="S0", parameters="3.09", macs="3.82", top1=("89.05", "96.43", "83.98", "84.1")),
    Row(table="1", name="S1", preset="S1", parameters="3.41", macs="4.20", top1=("90.79", "97.09", "83.63", "86.73")),
    *(Row(table="Fig. 4", name=f"S1, alpha {config.model.alpha}", preset=config.preset) for config in S1_ALPHA),
    Row(table="2", name="S0", preset="S0", parameters="3.09", macs="3.82", top1=("89.05", "96.43", "83.98", "84.1")),
    Row(table="2", name="S0-2", preset="S0-2", parameters="1.09", macs="1.50", top1=("90.73", "96.99", "84.73", "87.18")),
    Row(table="2", name="S1", preset="S1", parameters="3.41", macs="4.20", top1=("90.79", "97.09", "83.63", "86.73")),
    Row(table="2", name="S2", preset="S2", parameters="1.42", macs="1.88", top1=("91.82", "97.23", "85.19", "87.31")),
    Row(table="3", name="S2", preset="S2", top1=("91.82",), top5="99.22"),
    Row(table="3", name="S3(CVSTA)", preset="S3-cvsta", top1=("84.10",), top5="97.95"),
    Row(table="3", name="S3(Drop-att)", preset="S3-drop", top1=("89.36",), top5="98.95"),
    Row(table="3", name="S3(MS-CAM)", preset="S3-mscam", top1=("92.09",), top5="99.24"),
    Row(table="3", name="S3(AFF-4)", preset="S3-aff4", top1=("92.25",), top5="99.24"),
    Row(table="3", name="S3(AFF-2)", preset="S3-aff2", top1=("92.21",), top5="99.21"),
    Row(table="3", name="S3(AFF-1)", preset="S3-aff1", top1=("92.74",), top5="99.25"),
    Row(table="4", name="S2", preset="S2", top1=("91.82", "97.23", "85.19", "87.31")),
    Row(table="4", name="S3(AFF-1)", preset="S3-aff1", top1=("92.74", "97.47", "85.38", "88.03")),
    Row(table="5", name="S0", preset="S0", parameters="3.09", macs="3.82"),
    Row(table="5", name="S1", preset="S1", parameters="3.41", macs="4.20"),
    Row(table="5", name="S2", preset="S2", parameters="1.42", macs="1.88"),
    Row(table="5", name="S3(CVSTA)", preset="S3-cvsta", parameters="2.22", macs="1.94"),
    Row(table="5", name="S3(Drop-att)", preset="S3-drop", parameters="1.42", macs="1.88"),
    Row(table="5", name="S3(MS-CAM)", preset="S3-mscam", parameters="2.48", macs="2.50"),
    Row(table="5", name="S3(AFF-4)", preset="S3-aff4", parameters="2.56", macs="2.46"),
    Row(table="5", name="S3(AFF-2)", preset="S3-aff2", parameters="2.83", macs="2.61"),
    Row(table="5", name="S3(AFF-1)", preset="S3-aff1", parameters="3.35", macs="2.92"),
    Row(table="6", name="S0", preset="S0", top1=("89.05",), top5="98.85"),
    Row(table="6", name="S0(Focal Loss)", preset="S0-focal", top1=("89.06",), top5="98.94"),
    Row(table="6", name="S0(Poly Loss)", preset="S0-poly", top1=("89.32",), top5="98.96"),
    Row(table="6", name="S0(Two-stage Loss-2)", preset="S0-two-stage-2", top1=("90.11",), top5="98.99"),
    Row(table="6", name="S0(Two-stage Loss-6)", preset="S0-two-stage-6", top1=("90.08",), top5="99.01"),
    Row(table="6", name="S0(Two-stage Loss-4)", preset="S0-two-stage-4", top1=("90.19",), top5="99.08"),
    # Table 7 prints X-Sub and X-Set of NTU 120 in each other's column; Tables 4 and 8 have them this way round.
    Row(table="7", name="S3(AFF-1)", preset="S3-aff1", top1=("92.74", "97.47", "85.38", "88.03")),
    Row(table="7", name="S4", preset="S4", top1=("92.79", "97.46", "85.48", "88.26")),
    Row(table="8", name="ST-GCN(2d)", preset="S0", stream="", parameters="3.08", top1=("85.7", "92.4", "80.1", "84.2")),
    Row(
        table="8", name="2s-AGCN(3d)", preset="2s-AGCN", space="3d", stream="", parameters="3.5",
        top1=("88.5", "95.1", "82.9", "84.9"),
    ),
    Row(table="8", name="AAGCN(2d)", preset="AAGCN", stream="", parameters="3.77", top1=("89.7", "97.1", "80.2", "86.3")),
    Row(table="8", name="MS-G3D(2d)", preset="MS-G3D", stream="", parameters="3.17", top1=("92.7", "97.1", "85.5", "88.2")),
    Row(table="8", name="CTR-GCN(2d)", preset="CTR-GCN", stream="", parameters="1.43", top1=("90.6", "96.9", "82.2", "84.5")),
    Row(table="8", name="ST-GCN++(2d)", preset="ST-GCN++", stream="", parameters="1.39", top1=("89.3", "97.4", "84.4", "88.1")),
    Row(table="8", name="Proposed(j)", preset="S4", parameters="3.35", top1=("92.8", "97.5", "85.5", "88.3")),
    Row(
        table="8", name="Proposed(j-3d)", preset="S4", space="3d", parameters="3.35", top1=("88.89", "95.55", "82.19", "84.52")
    ),
    Row(table="8", name="Proposed(2s)", preset="S4", stream="2s", parameters="3.35", top1=("93.72", "97.81", "86.56", "90.08")),
    Row(table="8", name="Proposed(4s)", preset="S4", stream="4s", parameters="3.35", top1=("94.24", "98.30", "87.31", "90.95")),
)  # fmt: skip
"""Every row of Tables 1 to 7, and the rows of Table 8 that name a preset."""


def merged() -> list[Row]:
    """One row per name, with all its tables and whatever figures one of them gives."""
    made = []
    for name in dict.fromkeys(row.name for row in ROWS):
        rows = [row for row in ROWS if row.name == name]
        made.append(
            replace(
                rows[0],
                table=", ".join(row.table for row in rows),
                parameters=max((row.parameters for row in rows), key=len),
                macs=max((row.macs for row in rows), key=len),
                top1=max((row.top1 for row in rows), key=len),
                top5=max((row.top5 for row in rows), key=len),
            )
        )
    return made


def reported(preset: str, protocol: str, *, stream: str = "j", space: str = "2d") -> float | None:
    """The paper's top-1 accuracy, a fraction; None where its tables give none."""
    for row in merged():
        figures = dict(zip(NTU_PROTOCOLS, row.top1, strict=False))
        if (row.preset, row.stream, row.space) == (preset, stream, space) and protocol in figures:
            return float(figures[protocol]) / 100
    return None


@functools.cache
def count(model: ModelConfig, layout: Layout = COCO17, classes: int = 60) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one clip of 2 persons and 100 frames.

    As fvcore counts: a multiply-add of a convolution, linear layer or matrix product once, batch-norm 2 per element,
    adaptive pooling 1 per element, nothing else. Raises `FFNError` where fvcore is not installed.
    """
    import torch

    from ffn.model.network import build

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: Python numbers become constants, as they should
        try:
            from fvcore.nn import FlopCountAnalysis
        except ImportError:
            raise FFNError("counting needs fvcore, which is not installed; pip install '.[dev]'") from None
        network = build(model, layout, classes).eval()
        analysis = FlopCountAnalysis(network, torch.ones(1, 2, 100, len(layout.joints), 3))
        macs = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
    return sum(parameter.numel() for parameter in network.parameters()), int(macs)


def counts() -> str:
    """A table of every row's parameters and multiply-accumulates: ours, the paper's, the difference at the paper's digits."""
    lines = []
    for row in merged():
        model = replace(PRESETS[row.preset].model, alpha=ModelConfig().alpha)  # it changes no count
        parameters, macs = count(model)
        beside = (*_beside(parameters / 1e6, row.parameters), *_beside(macs / 1e9, row.macs))
        lines.append((row.name, row.preset, row.table, *beside))
    return table(("row", "preset", "tables", "M ours", "M paper", "diff", "G ours", "G paper", "diff"), lines, names=3)


def accuracies() -> str:
    """A table of the accuracies the paper reports, in percent."""
    header = ("row", "preset", "tables", *(f"{name}, paper" for name in NTU_PROTOCOLS), "top-5 ntu60-xsub, paper")
    rows = [row for row in merged() if row.top1]
    lines = [(row.name, row.preset, row.table, *row.top1, *[""] * (4 - len(row.top1)), row.top5) for row in rows]
    return table(header, lines, names=3)


def _beside(ours: float, paper: str) -> tuple[str, str, str]:
    if not paper:
        return f"{ours:.4f}", "", ""
    difference = Decimal(ours).quantize(Decimal(paper)) - Decimal(paper)
    return f"{ours:.4f}", paper, f"{difference:+}" if difference else "0"


def markdown() -> str:
    """The page docs/paper.md."""
    parameters, macs = count(PRESETS["S4"].model, NTU25)
    in_3d = f"{parameters / 1e6:.2f} M and {macs / 1e9:.2f} G"
    return f"""\
# The paper's tables, row by row

Written by `ffn paper --markdown docs/paper.md`; a test keeps it current. Every row is a preset: `ffn run --preset S3-cvsta
--data ...` trains it. The presets stand in `ffn/config.py`, the paper's figures in `ffn/paper.py`.

## Parameters and operations

60 classes; one clip of 2 persons, 100 frames, 17 joints (COCO) and 3 channels for every row. "FLOPs" of the paper are
multiply-accumulates as fvcore counts them: convolutions, linear layers and matrix products once per multiply-add, batch-norm
2 per element, adaptive pooling 1 per element. diff is ours, rounded to the paper's digits, less the paper's. `ffn paper`
prints this table.

{counts()}

Where they differ:

- **Parameters of AFF and S4.** The paper's are larger by a constant: 0.459 M fits all three r, and no operations come with
  it. These are weights that take no part in the computation; the network here computes the same and is not padded with them.
- **Operations of MS-CAM, AFF-2 and AFF-1.** fvcore counts the global pooling of MS-CAM where it is called pooling and not where
  it is called a mean, which computes the same. Without these 0.0022 G the three are 2.5044, 2.6139 and 2.9230, and round to the
  paper's figures.
- **Proposed(j-3d), (2s), (4s).** The paper repeats 3.35 M. The 25 joints of 3D make it {in_3d} here; a
  fusion of two or four streams holds two or four such networks, the counts are those of one.
- **Rivals.** The paper does not say where its figures come from. The networks here have the parameters that the published code
  of each has at 17 joints; at 25 joints AAGCN has 3.78 M and MS-G3D 3.19 M. ST-GCN and CTR-GCN are cut, not rounded. Their own
  counts of operations leave batch-norm out: 4.34 (2s-AGCN), 4.34 (AAGCN), 6.81, 1.94 and 1.93 G (ST-GCN++).

## What the paper leaves open, and what is built

| where | what is built | what settles it |
| --- | --- | --- |
| ESF-GCN | residual: identity, or a bare 1x1 convolution where the width changes; no shift back after the spatial shift \
| both columns; Eq. (2) |
| MSF-TCN | a 1x1 convolution of its own for each of seven branches, one full 1x1 convolution at the end | both columns |
| AFF at stride 2 | the input of MSF-TCN passes a strided 5x1 convolution and batch-norm | the operations, for every r |
| MS-CAM | without AFF, only the output of MSF-TCN takes part | both columns |
| CVSTA | a coordinate form: means over joints and over frames, 1x1 convolution, batch-norm, Hardswish; a 1x1 convolution, \
batch-norm and sigmoid for each direction; not the graph refinement of its source | both columns |
| Drop-att | SkeAttnCLR's, threshold 0.7, at the end of MSF-TCN; only in training, without chance | its code |
| focal and poly loss | gamma 2, epsilon 1 | their papers' defaults |
| two-stage loss | the first stage ends at epoch m = epochs / f_c | there xi is 0: no jump, nothing negative |

## Accuracies the paper reports

In percent, top-1 unless said otherwise; all of them the paper's. What this code reaches stands in
[results.md](results.md) and is never mixed with them.

{accuracies()}

Where the paper contradicts itself:

- Table 7 prints X-Sub and X-Set of NTU 120 in each other's column (S3(AFF-1) 88.03 and 85.38, S4 88.26 and 85.48), and section
  3.5 reads them so; Tables 4 and 8 have them the other way round, which is how they stand above.
- Table 8 gives ST-GCN 3.08 M, the same network as S0 with 3.09 M.
- Section 3.2: S1 gains 0.64 on NTU 60 X-View over S0; Table 1 says 97.09 - 96.43 = 0.66. Section 3.3: S2 gains 0.16 there over
  S1; Table 2 says 97.23 - 97.09 = 0.14.
- Section 3.4 calls the counts of S3(AFF-1) unchanged from S0: the tables say 0.26 M more and 0.90 G less.
- Table 7 sets S4's 97.46 on NTU 60 X-View in bold as the better one, above 97.47.
"""
