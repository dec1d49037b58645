"""How good a classifier is: Matthews' correlation, as GUE has it, and accuracy.

    MCC = (s c - p.t) / sqrt((s^2 - p.p) (s^2 - t.t))

for s sequences of which c are right, with p and t the numbers of each class that are predicted and
true (Gorodkin 2004, https://doi.org/10.1016/j.compbiolchem.2004.09.006); for two classes that is
Matthews' own. 0 where one class is always predicted.
"""

import numpy as np


def average_strands(probabilities: np.ndarray, both: bool) -> np.ndarray:
    """[2N, C], all first strands, then all others -> their means [N, C]; as it is if not `both`."""
    if not both:
        return probabilities
    half = len(probabilities) // 2
    return (probabilities[:half] + probabilities[half:]) / 2


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """mcc and accuracy of the likeliest classes; probabilities [N, C], labels [N]."""
    said = probabilities.argmax(-1)
    return {"mcc": matthews(said, labels), "accuracy": float((said == labels).mean())}


def matthews(said: np.ndarray, labels: np.ndarray) -> float:
    size = 1 + int(max(said.max(), labels.max()))
    predicted = np.bincount(said, minlength=size).astype(float)
    true = np.bincount(labels, minlength=size).astype(float)
    n, right = len(labels), float((said == labels).sum())
    spread = (n * n - predicted @ predicted) * (n * n - true @ true)
    return float((n * right - predicted @ true) / np.sqrt(spread)) if spread > 0 else 0.0
