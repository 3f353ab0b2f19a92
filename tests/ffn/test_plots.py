import io

import pytest

from ffn import plots
from ffn.scores import measure
from tests.ffn.test_scores import make


@pytest.mark.parametrize("classes", [2, 8])
def test_figures_render_what_they_are_given(classes):
    scores = make(classes=classes)
    metrics = measure(scores)
    history = [{"epoch": n, "loss": 1 / n, "top1": n / 5, "lr": 0.1} for n in range(1, 5)]
    figures = [
        plots.learning_curves(history),
        plots.confusion_matrix(metrics, scores.classes),
        plots.per_class(metrics, scores.classes),
        plots.results_table({"p": {"j": 0.5, "4s": 0.75}, "q": {"j": 0.25}}),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO(), format="png", dpi=40)
    assert [len(axes.lines) for axes in figures[0].axes] == [1, 1, 1]
    texts = {text.get_text() for text in figures[3].axes[0].texts}
    assert {"50", "75", "25", "j", "4s"} <= texts
