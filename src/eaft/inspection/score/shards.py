"""Scores the examples of one shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eaft.errors import NonFiniteError
from eaft.inspection.folder import STATISTICS
from eaft.inspection.score.examples import Examples, Tokens, batches, count_labelled
from eaft.inspection.score.model import BATCH_TOKENS, GPU_BATCH_TOKENS, ScoringModel
from eaft.inspection.score.tables import FLOATS, Statistics


@dataclass(frozen=True)
class ScoredShard:
    """The tokens of a shard, and their statistics."""

    tokens: Tokens
    statistics: Statistics


def score_shard(
    model: ScoringModel, examples: Examples, part: range, advance: Callable[[int], object]
) -> ScoredShard:
    """
    Return a shard's tokens with their statistics.

    Args:
        model: that scores them.
        examples: of all shards.
        part: the shard's examples.
        advance: called with the number of tokens of each batch, and of examples without a label.

    Raises:
        NonFiniteError: the model's probabilities are NaN or infinite; the message names the rows.
    """
    tokens = examples.tokens(part)
    columns: Statistics = {
        field.name: np.zeros(len(tokens.ids), np.float32 if field.name in FLOATS else np.int32)
        for field in STATISTICS
    }
    budget = GPU_BATCH_TOKENS if model.device.type == "cuda" else BATCH_TOKENS
    for batch in batches(tokens, budget):
        statistics, places = model.statistics(tokens, batch)
        values = {name: getattr(statistics, name).cpu().numpy() for name in columns}
        finite = np.isfinite(np.stack([values[name] for name in FLOATS])).all(0)
        if not finite.all():
            ends = tokens.starts + tokens.lengths
            bad = np.searchsorted(ends, places[~finite], side="right")
            rows = sorted({examples.row(part[i]) for i in bad})
            raise NonFiniteError(
                f"{model.name}: probabilities are not finite in {examples.origin(part)}, row"
                f" {', '.join(map(str, rows[:10]))}. Look at these rows, or compute in float32"
                " (--bf16 false)."
            )
        for name, column in values.items():
            columns[name][places] = column
        advance(int(tokens.lengths[batch].sum()))
    advance(int(tokens.lengths[count_labelled(tokens) == 0].sum()))
    return ScoredShard(tokens, columns)
