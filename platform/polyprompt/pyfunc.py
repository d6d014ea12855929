"""A bundle as an MLflow model: `mlflow.pyfunc.load_model(…).predict(frame)` and `mlflow models serve`.

MLflow names this module in the model's files and calls `_load_pyfunc`; nothing is pickled. A row of the frame has
`task`, and `input` or the task's own fields as columns of their own, or as a JSON object in the column `fields`.
"""

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from polyprompt.predictor import Predictor

#: Where the backbone is, if not where it was in training.
BACKBONE_VARIABLE = "POLYPROMPT_BACKBONE"
#: cpu by default.
DEVICE_VARIABLE = "POLYPROMPT_DEVICE"
FIELDS = "fields"


def _load_pyfunc(path: str) -> "Model":
    """MLflow's entry: a folder with a bundle."""
    return Model(Path(path))


class Model:
    """What MLflow calls."""

    def __init__(self, bundle: Path) -> None:
        """Load the bundle. Raises BundleError, ConfigError."""
        self.predictor = Predictor(
            bundle, backbone=os.environ.get(BACKBONE_VARIABLE), device=os.environ.get(DEVICE_VARIABLE, "cpu")
        )
        # MLflow's server answers each request in a thread of its own.
        self._one_at_a_time = threading.Lock()

    def predict(self, frame: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Answer each row: prediction, score, choice_scores (JSON) and error.

        params: `batch_size`, `mode`, as of `Predictor.predict`. A row that does not fit has its error there.
        """
        given = {key: value for key, value in (params or {}).items() if value not in (None, "")}
        rows = [_row(record) for record in frame.to_dict("records")]
        with self._one_at_a_time:
            answers = self.predictor.predict(rows, **given)
        table = [asdict(answer) for answer in answers]
        for line in table:
            line["choice_scores"] = json.dumps(line["choice_scores"], ensure_ascii=False)
        return pd.DataFrame(table, columns=["prediction", "score", "choice_scores", "error"])


def _row(record: Mapping[Any, Any]) -> dict[str, Any]:
    """Drop what a column of another task left empty, and unfold `fields`."""
    row = {
        # A column of lists that was read from Parquet has arrays.
        str(key): value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in record.items()
        if not (pd.api.types.is_scalar(value) and pd.isna(value))
    }
    fields = row.pop(FIELDS, None)
    if fields is None:
        return row
    try:
        unfolded = json.loads(fields)
    except (TypeError, ValueError):
        unfolded = None
    # What is no object is left as it is, and named in the row's error.
    return {**unfolded, **row} if isinstance(unfolded, dict) else {**row, FIELDS: fields}
