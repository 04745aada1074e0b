"""Accuracy as a metric script for ``evaluate.load``, so that the example needs no network."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "The share of examples whose predicted class is the true one: correct / all."

_INPUTS = """
Args:
    predictions (`list` of `int`): Predicted classes.
    references (`list` of `int`): True classes.

Returns:
    accuracy (`float`): Between 0 and 1.

Example:
    >>> accuracy = evaluate.load("examples/metrics/accuracy/accuracy.py")
    >>> accuracy.compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2])
    {'accuracy': 0.75}
"""


class Accuracy(evaluate.Metric):
    """Share of correct predictions."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
