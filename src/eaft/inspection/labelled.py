"""
The labelled tokens of an inspection as `objective` computes with them, and what their examples are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from eaft.errors import ConfigurationError
from eaft.inspection.folder import BASE, DATA, ROLLOUTS, STATISTICS, VOCABULARY_FILE, Inspection
from eaft.objective.registry import GATES, Gate
from eaft.objective.statistics import TokenStatistics

ORIGINS = (DATA, ROLLOUTS)


def weighed_gates() -> dict[str, Gate]:
    """
    Return the gates that an inspection can show; not `psft`, whose weights under the base model
    itself are 1.
    """
    return {name: gate for name, gate in GATES.items() if not gate.needs_old_log_prob}


@dataclass(frozen=True)
class Labelled:
    """Labelled tokens, `[n]` each, in the folder's order."""

    stats: TokenStatistics
    example: NDArray[np.int32]
    token_id: NDArray[np.int32]  # the label
    first_choice: NDArray[np.int32]

    @cached_property
    def quantities(self) -> dict[str, NDArray[np.float64]]:
        """
        What shares are taken of: the tokens (1 each), their nll, and their gradient's norm by the
        logits.
        """
        nll = self.stats.nll.double().numpy()
        return {
            "tokens": np.ones_like(nll),
            "nll": nll,
            "gradient": self.stats.grad_norm.double().numpy(),
        }


def labelled_tokens(inspection: Inspection) -> Iterator[Labelled]:
    """Yield the tokens that the base model was scored on, a million at a time."""
    for batch in inspection.batches(["example", "token_id", *(field.name for field in STATISTICS)]):
        scored = batch.filter(pc.is_valid(batch["log_prob"]))
        numbers = {
            name: scored[name].to_numpy() for name in ("example", "token_id", "first_choice")
        }
        yield Labelled(stats=inspection.statistics(scored), **numbers)


def labelled_pairs(
    inspection: Inspection, model: str
) -> Iterator[tuple[Labelled, TokenStatistics]]:
    """
    Yield the base model's labelled tokens, and the same tokens' statistics under another model.

    Raises:
        ConfigurationError: the other model's rows are not those of the base.
    """
    if model == BASE:
        yield from ((tokens, tokens.stats) for tokens in labelled_tokens(inspection))
        return
    others = inspection.batches(["example", *(field.name for field in STATISTICS)], model)
    for tokens, batch in zip(labelled_tokens(inspection), others, strict=True):
        scored = batch.filter(pc.is_valid(batch["log_prob"]))
        if not np.array_equal(scored["example"].to_numpy(), tokens.example):
            raise ConfigurationError(
                f"The tokens of {model!r} are not those of {BASE!r}: score that model again."
            )
        yield tokens, inspection.statistics(scored)


def with_examples(
    stats: TokenStatistics, example: NDArray[np.int32], example_nll: NDArray[np.floating]
) -> TokenStatistics:
    """
    Return statistics that also say which example each token is of, and its mean nll: gates by
    example need these.

    Args:
        stats: of `n` tokens.
        example: `[n]`, the token's example.
        example_nll: `[examples]`, nats, under the base model; NaN where nothing is labelled.
    """
    return replace(
        stats,
        example_ids=torch.from_numpy(example.astype(np.int64)),
        example_nll=torch.from_numpy(example_nll[example].astype(np.float32)),
    )


class Examples:
    """What the findings need of examples.parquet: a few bytes an example."""

    def __init__(self, inspection: Inspection) -> None:
        table = inspection.examples(["origin", "source", "nll", "tokens", "labelled"])
        self.is_rollout: NDArray[np.bool_] = pc.equal(table["origin"], ROLLOUTS).to_numpy()
        encoded = table["source"].combine_chunks().dictionary_encode()
        self.sources: list[str] = encoded.dictionary.to_pylist()
        self.source: NDArray[np.int32] = encoded.indices.to_numpy()
        self.nll: NDArray[np.float64] = table["nll"].to_numpy()  # NaN where nothing is labelled
        self.tokens: NDArray[np.int32] = table["tokens"].to_numpy()
        self.labelled: NDArray[np.int32] = table["labelled"].to_numpy()

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins that there are."""
        return ORIGINS if self.is_rollout.any() else (DATA,)

    def of(self, origin: str) -> NDArray[np.bool_]:
        """Return which examples are of an origin."""
        return self.is_rollout if origin == ROLLOUTS else ~self.is_rollout

    def counts(self, origin: str) -> dict[str, int] | None:
        """
        Return how many examples, tokens and labelled tokens there are; None for an origin that
        there is not.
        """
        if origin not in self.origins:
            return None
        of = self.of(origin)
        return {
            "examples": int(of.sum()),
            "tokens": int(self.tokens[of].sum(dtype=np.int64)),
            "labelled": int(self.labelled[of].sum(dtype=np.int64)),
        }


class Vocabulary:
    """The texts of token ids."""

    def __init__(self, inspection: Inspection) -> None:
        columns: dict[str, list[Any]] = pq.read_table(
            inspection.folder / VOCABULARY_FILE
        ).to_pydict()
        self.texts: dict[int, str] = dict(zip(columns["token_id"], columns["text"], strict=True))
        self.special: set[int] = {
            i for i, s in zip(columns["token_id"], columns["special"], strict=True) if s
        }
        self.size = max(self.texts, default=-1) + 1

    def named(self, token_id: int) -> dict[str, Any]:
        """Return a token's id and text."""
        return {"token_id": int(token_id), "text": self.texts.get(int(token_id), f"<{token_id}>")}
