"""
Our objectives beside the peers' own functions: the same numbers up to a stated factor, and where a
peer goes wrong.

    .venv/bin/python benchmarks/peers.py

Installs LLaMA-Factory and Axolotl without their dependencies into a scratch folder, calls their
loss functions as they are, and writes benchmarks/results/peers.json.
"""

import importlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from tabulate import tabulate

from eaft import gated_cross_entropy
from eaft.provenance import environment, write_json

ROOT = Path(__file__).parents[1]
PEERS = [
    "llamafactory==0.9.5",
    "axolotl==0.19.0",
    "omegaconf==2.3.0",
    "antlr4-python3-runtime==4.9.3",
]
SEED = 0
Loss = Callable[[torch.Tensor], torch.Tensor]


class Outputs(dict):
    """A model's outputs, as the peers read them: by key or by attribute."""

    __getattr__ = dict.__getitem__


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return logits `[B, S, V]` about as sharp as a real model's, and labels `[B, S]`.

    A third of the labels is ignored.
    """
    generator = torch.Generator().manual_seed(SEED)
    logits = 5 * torch.randn(4, 32, 1000, generator=generator)
    labels = torch.randint(1000, (4, 32), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 1 / 3] = -100
    return logits, labels


def loss_and_gradient(loss: Loss, logits: torch.Tensor) -> tuple[float, Any]:
    """Return a loss's value and its gradient by the logits."""
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits)
    torch.autograd.backward(value)
    return value.item(), logits.grad


def ours(labels: torch.Tensor, gate: str, **kwargs: Any) -> Loss:
    """Return our reference loss as a function of the unshifted logits."""
    return lambda logits: gated_cross_entropy(logits[:, :-1], labels[:, 1:], gate, **kwargs)


def peer(function: Any, labels: torch.Tensor, *rest: Any) -> Loss:
    """Return a peer's function as a function of the unshifted logits."""
    return lambda logits: function(Outputs(logits=logits), labels, *rest)


def agreements(llamafactory: Any, axolotl_eaft: Any) -> list[dict[str, Any]]:
    """
    Compare values and gradients in float32: peer against ours times the factor that its formula
    differs by.
    """
    logits, labels = make_batch()
    reference = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    items = 300  # as if gradients were accumulated
    eaft, dft, asft = (
        llamafactory.eaft_loss_func,
        llamafactory.dft_loss_func,
        llamafactory.asft_loss_func,
    )
    ln_k = math.log(20)
    our_dft = ours(labels, "dft", num_items=items)
    our_asft = ours(labels, "asft", reference_logits=reference[:, :-1])
    cases = [
        ("LLaMA-Factory DFT", peer(dft, labels, items), our_dft, "1", 1.0),
        ("LLaMA-Factory ASFT", peer(asft, labels, reference), our_asft, "1", 1.0),
    ]
    for alpha in (1.0, 2.0):
        mine = ours(labels, "eaft", alpha=alpha, num_items=items)
        for name, function, text, factor in (
            ("LLaMA-Factory", eaft, f"(ln 20 / 3)^{alpha:g}", (ln_k / 3) ** alpha),
            ("Axolotl", axolotl_eaft, f"(ln 20)^{alpha:g}", ln_k**alpha),
        ):
            cases.append(
                (
                    f"{name} EAFT, alpha {alpha:g}",
                    peer(function, labels, items, alpha),
                    mine,
                    text,
                    factor,
                )
            )
    rows = []
    for name, theirs, mine, text, factor in cases:
        value, gradient = loss_and_gradient(theirs, logits)
        our_value, our_gradient = loss_and_gradient(mine, logits)
        rows.append(
            {
                "peer": name,
                "peer_loss": value,
                "our_loss": our_value,
                "factor": text,
                "loss_difference": abs(value / (our_value * factor) - 1),
                "gradient_difference": (
                    (gradient - factor * our_gradient).norm() / gradient.norm()
                ).item(),
            }
        )
    return [*rows, trl_dft()]


def trl_dft() -> dict[str, Any]:
    """
    Compare TRL's own trainer with `loss_type="dft"` to ours with `gate="dft"`, on one batch of a
    tiny model.
    """
    sys.path.insert(0, str(ROOT))
    from eaft import EAFTTrainer

    build = importlib.import_module("tests.training.test_trainer").build
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for cls, settings in (
            (trl.SFTTrainer, {"loss_type": "dft"}),
            (EAFTTrainer, {"gate": "dft"}),
        ):
            trainer = build(cls, folder, **settings)
            loss = trainer.compute_loss(
                trainer.model.train(), next(iter(trainer.get_train_dataloader()))
            )
            loss.backward()
            found.append(
                (loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
            )
    (value, gradient), (our_value, our_gradient) = found
    return {
        "peer": "TRL DFT",
        "peer_loss": value,
        "our_loss": our_value,
        "factor": "1",
        "loss_difference": abs(value / our_value - 1),
        "gradient_difference": ((gradient - our_gradient).norm() / gradient.norm()).item(),
    }


def differences(llamafactory: Any, axolotl_eaft: Any) -> list[dict[str, str]]:
    """Show what each does with inputs that occur in training."""
    logits, labels = make_batch()

    def all_three(labels: torch.Tensor) -> dict[str, Loss]:
        return {
            "LLaMA-Factory EAFT": peer(llamafactory.eaft_loss_func, labels),
            "Axolotl EAFT": peer(axolotl_eaft, labels),
            "ours": ours(labels, "eaft"),
        }

    few = torch.full_like(logits, -math.inf)
    few[..., :10] = logits[..., :10]  # 10 tokens allowed, as under constrained decoding
    rows = []
    for case, z, y in (
        ("a batch without labels", logits, torch.full_like(labels, -100)),
        ("fewer than 20 finite logits", few, torch.where(labels == -100, labels, labels % 10)),
        ("a vocabulary of 16", logits[..., :16], torch.where(labels == -100, labels, labels % 16)),
    ):
        for name, function in all_three(y).items():
            try:
                value, gradient = loss_and_gradient(function, z)
                result = (
                    f"loss {value:.4g}, gradient {'finite' if gradient.isfinite().all() else 'NaN'}"
                )
            except (RuntimeError, IndexError) as error:
                result = f"error: {str(error).splitlines()[0]}"
            rows.append({"case": case, "function": name, "result": result})

    # The same logits, rounded to bfloat16, in float64: what is left is the arithmetic
    rounded = logits.bfloat16()
    exact, _ = loss_and_gradient(ours(labels, "eaft"), rounded.double())
    for (name, function), factor in zip(
        all_three(labels).items(), (math.log(20) / 3, math.log(20), 1), strict=True
    ):
        off = abs(loss_and_gradient(function, rounded)[0] / (exact * factor) - 1)
        result = f"relative error of the loss {off:.1e}"
        rows.append({"case": "bfloat16 logits", "function": name, "result": result})

    # Two micro-batches of unequal size, accumulated: the sum over both, divided by the tokens of
    # both
    reference = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    micro_batches = [
        (logits[:1, :8], labels[:1, :8], reference[:1, :8]),
        (logits[1:], labels[1:], reference[1:]),
    ]
    tokens = sum(int((y[:, 1:] != -100).sum()) for _, y, _ in micro_batches)
    mine = [
        gated_cross_entropy(z[:, :-1], y[:, 1:], "asft", tokens, reference_logits=r[:, :-1]).item()
        for z, y, r in micro_batches
    ]
    # Its trainer sets `compute_loss_func`, whose result transformers' Trainer does not divide by
    # the micro-batches
    theirs = [
        llamafactory.asft_loss_func(Outputs(logits=z), y, r).item() for z, y, r in micro_batches
    ]
    case = "ASFT over 2 accumulated micro-batches"
    rows.append(
        {
            "case": case,
            "function": "LLaMA-Factory",
            "result": f"sum of their means {sum(theirs):.4f}",
        }
    )
    rows.append(
        {"case": case, "function": "ours", "result": f"mean over their tokens {sum(mine):.4f}"}
    )
    return rows


def main() -> None:
    """Install, compare, print, write."""
    os.environ["DISABLE_VERSION_CHECK"] = (
        "1"  # LLaMA-Factory's, of libraries its loss functions do not use
    )
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                scratch,
                *PEERS,
            ],
            check=True,
        )
        sys.path.insert(0, scratch)
        # LLaMA-Factory imports it from an older TRL; its loss functions do not use it
        vars(trl).setdefault("AutoModelForCausalLMWithValueHead", None)
        eaft_loss = importlib.import_module("axolotl.monkeypatch.loss.eaft").eaft_loss
        llamafactory = importlib.import_module("llamafactory.train.trainer_utils")
        results: dict[str, Any] = {
            "peers": PEERS,
            "seed": SEED,
            "agreements": agreements(llamafactory, eaft_loss),
            "differences": differences(llamafactory, eaft_loss),
            "environment": environment(),
        }
    print(tabulate(results["agreements"], headers="keys", tablefmt="github", floatfmt=".3g"))
    print()
    print(tabulate(results["differences"], headers="keys", tablefmt="github"))
    write_json(ROOT / "benchmarks" / "results" / "peers.json", results)


if __name__ == "__main__":
    main()
