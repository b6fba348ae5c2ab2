"""
Gates of the fact check: is it the confident conflicts that EAFT's gain comes from, or that it
learns less?
"""

import torch
from torch import Tensor

from eaft import TokenStatistics


def random_mask(stats: TokenStatistics) -> Tensor:
    """
    Weight 0 on tokens drawn at random, else 1: of a batch's gradient norm as large a share as its
    conflicts have.
    """
    grad_norm = stats.grad_norm
    share = grad_norm[stats.is_conflict].sum() / grad_norm.sum().clamp(
        min=torch.finfo(grad_norm.dtype).tiny
    )
    return (torch.rand_like(grad_norm) >= share).to(grad_norm.dtype)
