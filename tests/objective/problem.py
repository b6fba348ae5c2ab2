"""A problem that the fused loss and the reference function both solve, and how they compare."""

import os

import torch

from eaft import gated_cross_entropy, linear_gated_cross_entropy, token_statistics
from eaft.objective import fused
from eaft.objective.fused import Reference

# Where there is a GPU all of this runs on it, the kernels compiled
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
CAPPED = {"logit_scale": 0.4, "softcap": 2.0}


def use(backend, monkeypatch):
    choose = fused.choose_backend
    monkeypatch.setattr(
        fused,
        "choose_backend",
        lambda name, hidden, *vocabulary: choose(
            None if hidden.dtype == torch.float64 else backend, hidden, *vocabulary
        ),
    )


class Problem:
    """Hidden states, a head and labels; everything else a gate may need beside them."""

    def __init__(self, n=11, vocab=45, width=8, dtype=torch.float64, scale=1.0, seed=0, bias=True):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = (normal(n, width) * scale).to(dtype)
        self.weight = normal(vocab, width).to(dtype)
        self.bias = normal(vocab).to(dtype) if bias else None
        self.labels = torch.randint(vocab, (n,), generator=generator)
        self.labels[torch.rand(n, generator=generator) < 0.3] = -100
        self.labels[0] = vocab - 1
        self.example_ids = torch.randint(4, (n,), generator=generator)
        self.example_nll = (normal(4).abs() + 0.1)[self.example_ids]
        reference_hidden = (self.hidden + 0.3 * normal(n, width)).to(DEVICE, dtype)
        for name, value in vars(self).items():
            setattr(self, name, None if value is None else value.to(DEVICE))
        self.reference = Reference(reference_hidden, self.weight, self.bias)

    def to(self, dtype):
        """The same numbers in another dtype."""
        other = Problem(1)
        for name, value in vars(self).items():
            if isinstance(value, Reference):
                tensors = (value.hidden, value.weight, value.bias)
                value = Reference(*(None if t is None else t.to(dtype) for t in tensors))
            elif value is not None and value.is_floating_point():
                value = value.to(dtype)
            setattr(other, name, value)
        return other

    def leaves(self):
        names = ["hidden", "weight", "bias"] if self.bias is not None else ["hidden", "weight"]
        return {name: getattr(self, name).detach().clone().requires_grad_() for name in names}

    @property
    def context(self):
        return {
            "example_ids": self.example_ids,
            "example_nll": self.example_nll,
            "old_log_prob": -self.example_nll,
        }


def capped(z, logit_scale=1.0, softcap=None):
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain(problem, gate="eaft", logit_scale=1.0, softcap=None, **params):
    """
    Loss, statistics and gradients by the reference function, on logits in the problem's dtype.
    """
    leaves = problem.leaves()

    def logits(hidden, weight, bias=None):
        return capped(torch.nn.functional.linear(hidden, weight, bias), logit_scale, softcap)

    z, r = logits(**leaves), problem.reference
    loss = gated_cross_entropy(
        z,
        problem.labels,
        gate,
        reference_logits=logits(r.hidden, r.weight, r.bias),
        **problem.context,
        **params,
    )
    loss.backward()
    kept = problem.labels != -100
    return (
        loss,
        token_statistics(z[kept], problem.labels[kept]).detach(),
        {k: v.grad for k, v in leaves.items()},
    )


def fuse(problem, gate="eaft", **kwargs):
    """The same by the fused function."""
    leaves = problem.leaves()
    loss, losses = linear_gated_cross_entropy(
        leaves["hidden"],
        leaves["weight"],
        problem.labels,
        gate,
        leaves.get("bias"),
        reference=problem.reference,
        return_losses=True,
        **problem.context,
        **kwargs,
    )
    loss.backward()
    return loss, losses.statistics, {k: v.grad for k, v in leaves.items()}


def flatten(result):
    """Every number of a result by name, as float64 tensors."""
    loss, stats, gradients = result
    fields = ("log_prob", "entropy", "top_k_entropy", "sum_sq_probs")
    return {
        "loss": loss.detach().double(),
        **{field: getattr(stats, field).double() for field in fields},
        **{f"gradient of {name}": gradient.double() for name, gradient in gradients.items()},
    }


def relative_error(value, truth):
    return ((value - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def broken(function, spoil):
    return lambda *args, **kwargs: spoil(function(*args, **kwargs))


def plain_without_bias(problem):
    problem.bias = None
    problem.reference = Reference(problem.reference.hidden, problem.weight)
    return plain(problem)
