"""
The rule: EAFT's expected drift compared with SFT's, from the share of the nll in conflicts.

The nll is the base model's, on the data. The rule is a straight line, fitted by least squares to
the runs of the study (docs/when-it-helps.md), one for each seed and condition. Its prediction
interval is for one more run. `benchmarks/study/curve.py` fits it and writes rule.json.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eaft.inspection.summary import ExpectedDrift

RULE_FILE = Path(__file__).with_name("rule.json")


@dataclass(frozen=True)
class Rule:
    """
    A line through runs.

    Attributes:
        slope, intercept: of the change in drift by dose. The change is EAFT's drift minus SFT's at
            the same held-out nll, as a share of SFT's. The dose is the share of the nll in
            conflicts.
        residual: standard deviation around the line.
        runs: the number of runs it was fitted to.
        mean, spread: of the runs' doses, the mean and the sum of squares around it.
        lowest, highest: of the runs' doses.
    """

    slope: float
    intercept: float
    residual: float
    runs: int
    mean: float
    spread: float
    lowest: float
    highest: float

    @classmethod
    def fit(cls, doses: list[float], changes: list[float]) -> Rule:
        """Fit the line by least squares to at least three runs with at least two doses."""
        x, y = np.asarray(doses), np.asarray(changes)
        spread = float(((x - x.mean()) ** 2).sum())
        slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
        intercept = float(y.mean() - slope * x.mean())
        residual = math.sqrt(float(((y - intercept - slope * x) ** 2).sum()) / (len(x) - 2))
        return cls(
            slope,
            intercept,
            residual,
            len(x),
            float(x.mean()),
            spread,
            float(x.min()),
            float(x.max()),
        )

    @classmethod
    def fitted(cls) -> Rule:
        """Return the rule in rule.json."""
        return cls(**json.loads(RULE_FILE.read_text())["rule"])

    def expect(self, dose: float) -> ExpectedDrift:
        """Return what is expected at a dose, or at the nearest dose that was measured."""
        from scipy import stats  # the command says if it is missing

        dose = min(max(dose, self.lowest), self.highest)
        change = self.intercept + self.slope * dose
        error = self.residual * math.sqrt(1 + 1 / self.runs + (dose - self.mean) ** 2 / self.spread)
        half = float(stats.t.ppf(0.975, self.runs - 2)) * error
        return ExpectedDrift(change, change - half, change + half)
