"""
Replayed answers held by the base model's own distribution: KL(base || model) at each position.

The base model's largest probabilities are kept when its answers are sampled, as drift keeps them
(`eaft.evaluation.drift.TopProbs`). So training needs no second model and no second forward.
Source: arXiv:2605.26097.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eaft.errors import ConfigurationError
from eaft.evaluation.drift import TopProbs
from eaft.objective.chunk import Head
from eaft.objective.fused import chunk_slices, default_budget
from eaft.objective.statistics import entropy_from_log_probs

# In a run's folder: a `TopProbs` with a row for each label of the replayed rows, in their order. It
# is in a subfolder, because it is no weight of the model
PROBS_FOLDER = "_replay"
PROBS_FILE = f"{PROBS_FOLDER}/probs.safetensors"
COPIES = 6  # of a chunk's logits, held at once in the backward pass of the divergence


@dataclass(frozen=True)
class HeldTokens:
    """Replayed tokens `[n]`: their loss, and what TRL logs of every labelled token."""

    kl: Tensor  # KL(base || model) in nats, with gradient
    entropy: Tensor  # nats
    is_top1: Tensor  # bool


@torch.compiler.disable
def hold_tokens(hidden: Tensor, head: Head, labels: Tensor, base: TopProbs) -> HeldTokens:
    """
    Return the divergence of replayed tokens from the base model, a chunk of logits at a time.

    The backward pass computes each chunk's logits again.

    Args:
        hidden: the model's hidden states `[n, H]`, any floating dtype; n is at least 1.
        head: the LM head.
        labels: int64 `[n]`.
        base: the base model's distributions at these tokens.
    """
    budget = default_budget(hidden.device) // COPIES
    chunks = chunk_slices(len(hidden), len(head.weight), torch.float32, budget)
    parts = []
    for rows in chunks:
        tokens = torch.arange(rows.start, rows.stop)
        parts.append(
            checkpoint(
                hold_chunk,
                hidden[rows],
                head,
                labels[rows],
                base.select(tokens),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return HeldTokens(*(torch.cat(values) for values in zip(*parts, strict=True)))


def hold_chunk(
    hidden: Tensor, head: Head, labels: Tensor, base: TopProbs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fields of `HeldTokens` for a chunk of tokens."""
    log_probs = head.logits(hidden).log_softmax(-1)
    with torch.no_grad():
        entropy, first = entropy_from_log_probs(log_probs), log_probs.argmax(-1)
    return base.kl_to(log_probs), entropy, first == labels


def save_probs(probs: TopProbs, output_dir: Path) -> None:
    """Write the probabilities into a run's folder, whole or not at all."""
    file = output_dir / PROBS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(".partial")
    save_file(vars(probs), staging)
    os.replace(staging, file)


def load_probs(output_dir: Path, tokens: int) -> TopProbs:
    """
    Return the probabilities of a run's folder.

    Args:
        output_dir: the run's folder.
        tokens: how many labels the replayed rows have.

    Raises:
        ConfigurationError: the file is missing, or belongs to other rows.
    """
    file = output_dir / PROBS_FILE
    if not file.is_file():
        raise ConfigurationError(
            f"{file} is missing: replay_loss='kl' needs the base model's probabilities of the"
            " replayed answers. Copy it from the run's output folder, or start afresh."
        )
    probs = TopProbs(**load_file(file))
    if len(probs.ids) != tokens:
        raise ConfigurationError(
            f"{file} has {len(probs.ids)} tokens, and the replayed answers have {tokens}: copy it"
            " from the run's output folder, or start afresh."
        )
    return probs
