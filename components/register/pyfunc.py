"""The registered model, as MLflow loads it: raw keypoints of recordings in, class names with probabilities out.

Input (N, M, T, V, 3) float32: N recordings, up to two persons, metres in 3D, pixels and a score in 2D. Recordings of
different length share one tensor by zeros: a frame or person of zeros only is no frame and no person.
"""

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from ffn.inference import FusedModel


class Recogniser(PythonModel):  # type: ignore[misc]  # mlflow has no types
    """`ffn.inference.FusedModel` behind MLflow's interface."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model = FusedModel.load(context.artifacts["fused"])
        # Its loops compile at the first recording, for seconds where nothing is cached: no request waits for that.
        self.model.predict([np.ones((1, 1, len(self.model.meta.layout.joints), 3))])

    def predict(self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, int] | None = None) -> pd.DataFrame:
        """One row per recording: `label`, `probability`, and `probabilities` as a mapping from class name."""
        size = (params["width"], params["height"]) if params else None
        p = self.model.predict(list(np.asarray(model_input, np.float32)), image_size=size)
        best = p.argmax(1)
        return pd.DataFrame(
            {
                "label": [self.model.classes[k] for k in best],
                "probability": p.max(1).astype(float),
                "probabilities": [dict(zip(self.model.classes, row.tolist(), strict=True)) for row in p],
            }
        )


mlflow.models.set_model(Recogniser())
