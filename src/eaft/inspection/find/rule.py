"""
The rule: how much less EAFT is expected to drift than SFT, from the share of the nll in confident
conflicts.

The nll is the base model's, on the data. A straight line, by least squares, through what was found
with each seed of each condition of the study (docs/when-it-helps.md), with the prediction interval
for one more run. `benchmarks/study/curve.py` fits it and writes rule.json.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RULE_FILE = Path(__file__).with_name("rule.json")


@dataclass(frozen=True)
class Expected:
    """
    What is expected of one more run: EAFT's drift less SFT's, as a share of SFT's, with its 95%
    interval.
    """

    change: float
    low: float
    high: float


@dataclass(frozen=True)
class Rule:
    """
    A line through runs.

    Attributes:
        slope, intercept: of the change in drift (EAFT's less SFT's at the same held-out nll, as a
        share of SFT's), by
            the share of the nll in conflicts.
        residual: standard deviation around the line.
        runs: how many it was fitted to.
        mean, spread: of their doses, the mean and the sum of squares around it.
        lowest, highest: of their doses.
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
        """Fit the line by least squares; at least three runs, of more than one dose."""
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
        """Return the rule that the study found."""
        return cls(**json.loads(RULE_FILE.read_text())["rule"])

    def expect(self, dose: float) -> Expected:
        """
        Return what is expected at a dose; beyond those measured, what is expected at the nearest of
        them.
        """
        from scipy import (
            stats,
        )  # whether it is installed is said by the command, not by this import

        dose = min(max(dose, self.lowest), self.highest)
        change = self.intercept + self.slope * dose
        error = self.residual * math.sqrt(1 + 1 / self.runs + (dose - self.mean) ** 2 / self.spread)
        half = float(stats.t.ppf(0.975, self.runs - 2)) * error
        return Expected(change, change - half, change + half)
