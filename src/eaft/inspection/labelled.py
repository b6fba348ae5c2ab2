"""The labelled tokens of an inspection, with the statistics that `objective` computes with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from eaft.errors import ConfigurationError
from eaft.inspection.folder import BASE, STATISTICS, Inspection
from eaft.inspection.run_file import InspectedRun
from eaft.objective.registry import GATES, Gate
from eaft.objective.statistics import TokenStatistics


def weighed_gates(whole_vocabulary: bool = True) -> dict[str, Gate]:
    """
    Return the gates that an inspection can show, whether it has the columns `WHOLE_VOCABULARY` or
    not.

    Gates that compare with the base model token by token are left out. Under the base model itself
    the weights of `psft` are 1, and `stm` weighs as `profit` does with a prob_threshold of
    1 / perplexity_threshold.
    """
    return {
        name: gate
        for name, gate in GATES.items()
        if not gate.needs_old_log_prob and (whole_vocabulary or not gate.needs_vocabulary)
    }


def what_is_absent(run: InspectedRun) -> str | None:
    """Return what a run of vLLM does not show, in words; None for another run."""
    if run.whole_vocabulary:
        return None
    gates = ", ".join(sorted(weighed_gates().keys() - weighed_gates(False).keys()))
    return (
        f"vLLM scored these tokens. It knows only the {run.top_k} likeliest tokens, so the entropy"
        f" is theirs (renormalised), also where it decides what a confident conflict is. Absent,"
        f" because they need the whole vocabulary: the exact entropy, gradients, the gates {gates}."
    )


@dataclass(frozen=True)
class Labelled:
    """Labelled tokens, `[n]` each, in the folder's order."""

    stats: TokenStatistics
    example: NDArray[np.int32]
    token_id: NDArray[np.int32]  # the label
    first_choice: NDArray[np.int32]

    @cached_property
    def quantities(self) -> dict[str, NDArray[np.float64]]:
        """The tokens (1 each), their nll (nats), and the norm of their gradient by the logits."""
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
        ConfigurationError: the other model's rows differ from the base model's.
    """
    if model == BASE:
        yield from ((tokens, tokens.stats) for tokens in labelled_tokens(inspection))
        return
    others = inspection.batches(["example", *(field.name for field in STATISTICS)], model)
    for tokens, batch in zip(labelled_tokens(inspection), others, strict=True):
        scored = batch.filter(pc.is_valid(batch["log_prob"]))
        if not np.array_equal(scored["example"].to_numpy(), tokens.example):
            raise ConfigurationError(
                f"The tokens of {model!r} differ from those of {BASE!r}: score {model!r} again."
            )
        yield tokens, inspection.statistics(scored)


def with_examples(
    stats: TokenStatistics, example: NDArray[np.int32], example_nll: NDArray[np.floating]
) -> TokenStatistics:
    """
    Return statistics that also have each token's example and the example's mean nll.

    Gates that weigh whole examples need them.

    Args:
        stats: of `n` tokens.
        example: `[n]`, the token's example.
        example_nll: `[examples]`, nats, under the base model; NaN if no token is labelled.
    """
    return replace(
        stats,
        example_ids=torch.from_numpy(example.astype(np.int64)),
        example_nll=torch.from_numpy(example_nll[example].astype(np.float32)),
    )
