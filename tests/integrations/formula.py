"""
The losses by their formulas, in float64, from logits `[..., V]` and labels that are shifted
already.
"""

import math

import torch


def terms(logits, labels, gate="eaft"):
    """Return each labelled token's g * nll."""
    labelled = labels != -100
    log_probs = logits.double()[labelled].log_softmax(-1)
    nll = -log_probs[torch.arange(len(log_probs)), labels[labelled]]
    if gate == "eaft":
        top = log_probs.topk(20).values.softmax(-1)
        weights = -(top * top.log()).sum(-1) / math.log(20)
    else:
        weights = {"sft": torch.ones_like(nll), "dft": (-nll).exp()}[gate]
    return weights.detach() * nll
