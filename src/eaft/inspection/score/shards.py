"""Scores the examples of one shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eaft.errors import ConfigurationError, NonFiniteError
from eaft.inspection.score.examples import Examples, Tokens, batches, count_labelled
from eaft.inspection.score.tables import FLOATS, Statistics
from eaft.objective.statistics import TokenStatistics


class Scorer(Protocol):
    """
    A model that scores tokens: `ScoringModel` or `VLLMModel`.

    Attributes:
        name: of the model.
        vocab_size: token ids are below this.
        columns: of `STATISTICS`, those that it computes.
        batch_tokens: the most tokens of a batch, with padding.
    """

    name: str
    vocab_size: int
    columns: tuple[str, ...]
    batch_tokens: int

    def statistics(
        self, tokens: Tokens, batch: list[int]
    ) -> tuple[TokenStatistics, NDArray[np.integer]]:
        """
        Return the statistics of the `n` labelled tokens of some examples, and their places.

        Args:
            tokens: of a shard.
            batch: the examples, as indices into the shard; the longest first.

        Returns:
            The statistics, and for each token its index in `tokens.ids`, `[n]`.
        """
        ...


@dataclass(frozen=True)
class ScoredShard:
    """The tokens of a shard, and their statistics."""

    tokens: Tokens
    statistics: Statistics


def score_shard(
    model: Scorer, examples: Examples, part: range, advance: Callable[[int], object]
) -> ScoredShard:
    """
    Return a shard's tokens with their statistics.

    Args:
        model: that scores them.
        examples: of all shards.
        part: the shard's examples.
        advance: called with the number of tokens of each batch, and of examples without a label.

    Raises:
        ConfigurationError: the tokenizer has ids that the model does not have.
        NonFiniteError: the model's probabilities are NaN or infinite; the message names the rows.
    """
    tokens = examples.tokens(part)
    columns: Statistics = {
        name: np.zeros(len(tokens.ids), np.float32 if name in FLOATS else np.int32)
        for name in model.columns
    }
    if len(tokens.ids) and tokens.ids.max() >= model.vocab_size:
        raise ConfigurationError(
            f"{model.name} has {model.vocab_size} tokens, but the tokenized data has the id"
            f" {tokens.ids.max()}: use the model's own tokenizer."
        )
    for batch in batches(tokens, model.batch_tokens):
        statistics, places = model.statistics(tokens, batch)
        values = {name: getattr(statistics, name).cpu().numpy() for name in columns}
        finite = np.isfinite([values[name] for name in FLOATS if name in values]).all(0)
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
