"""
One pass over the training data with the base model, before the first step: what some gates must
know.

Thresholds that are percentiles of the data's tokens (`masked`, `conflict-mask`), each example's
mean nll with their median (`flow`), and every label's log-probability (`psft`). Written to the
output folder, and read from there when training is resumed.

But for the last no token is kept: examples have sums, and percentiles come from histograms, so
memory does not grow with the tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from eaft.arrow import flat
from eaft.errors import ConfigurationError, NonFiniteError
from eaft.objective.gates import normalized_entropy
from eaft.objective.statistics import TokenStatistics
from eaft.provenance import write_json
from eaft.training.following import ExampleCollator
from eaft.training.head import GatedLMHead

# Parameters of gates that are measured here
MEASURED_PARAMETERS = ("entropy_threshold", "prob_threshold", "tau")
MEASUREMENTS_FILE = "gate_measurements.json"
OLD_LOG_PROB_FILE = (  # float32 [tokens of the prepared data], nats; 0 where there is no label
    "_old_log_prob.npy"
)
OLD_LOG_PROB_ABOUT_FILE = "_old_log_prob.json"  # what it is of


class Histogram:
    """
    Counts of numbers in [0, 1], for percentiles that are at most 2**-15 (relative) above the exact
    ones.

    A bin holds the float32 numbers that share their upper 24 bits: 15 of their 23 bits of mantissa.
    Values are taken at their bin's upper end, so that a value at its own percentile is never above
    it.
    """

    SHIFT = 8
    BINS = (0x3F800000 >> SHIFT) + 1  # the last begins at 1.0

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count `values` `[n]`. Those outside [0, 1], NaN included, count as its ends."""
        # Floats that are not negative are in the order of their bits
        bins = (values.float().cpu().view(torch.int32) >> self.SHIFT).long().clamp(0, self.BINS - 1)
        self.counts.scatter_add_(0, bins, torch.ones_like(bins))

    def percentile(self, q: float) -> float:
        """
        Return what `numpy.percentile(values, q)` would, to the bound above; linear between
        neighbours, as there.
        """
        cumulative = self.counts.cumsum(0)
        position = (int(cumulative[-1]) - 1) * q / 100
        ranks = torch.tensor([int(position), int(np.ceil(position))])
        bins = torch.searchsorted(cumulative, ranks, right=True)
        ends = ((bins + 1 << self.SHIFT) - 1).int().view(torch.float32).clamp(max=1.0).double()
        return float(ends[0] + (ends[1] - ends[0]) * (position - int(position)))


class BaseModelPass(TrainerCallback, ABC):
    """
    What both callbacks below share: a pass over rows with the base model when training begins, and
    its file.

    Args:
        head: whose gate it is for.
        dataset: rows in a fixed order: `input_ids`, `labels`, and the column `numbers`.
        size: how many there are of what `numbers` counts.
        collator: makes a batch of rows.
        accelerator: the trainer's.
        model: returns the model to call when training begins, which is the base model, as the
            trainer wraps it.

    Raises:
        ConfigurationError: training is resumed, and the file is missing or is of other data or
            another gate.
        NonFiniteError: the base model's nll is NaN or infinite.
    """

    file: str  # in the output folder: what was measured, and of what; one gate may need both passes
    numbers: str  # the column that says of every token what it is counted under

    def __init__(
        self,
        head: GatedLMHead,
        dataset: Dataset,
        size: int,
        collator: ExampleCollator,
        accelerator: Accelerator,
        model: Callable[[], Any],
    ) -> None:
        self.head, self.dataset, self.size = head, dataset, size
        self.collator, self.accelerator, self.model = collator, accelerator, model

    @abstractmethod
    def is_known(self) -> bool:
        """Return whether the head has it already."""

    @abstractmethod
    def measure(self, batch_size: int) -> dict[str, Any]:
        """Return what is written to the file, from the base model."""

    @abstractmethod
    def apply(self, measured: dict[str, Any], args: Any) -> None:
        """Give it to the head."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, or read what was measured when this run began."""
        if self.is_known():
            return  # `train` was called before, so the model is no longer the base model
        path = Path(args.output_dir) / self.file
        digest = [fingerprint(self.dataset) if self.accelerator.is_main_process else None]
        inputs = {
            "gate": args.gate_spec.settings,
            "data_sha256": broadcast_object_list(digest)[0],
        }
        if state.global_step > 0:
            measured = read(path, inputs)
        else:
            measured = {"inputs": inputs, **self.measure(args.per_device_eval_batch_size)}
            if args.should_save:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, measured)
        self.apply(measured, args)

    @torch.no_grad()
    def score_rows(self, batch_size: int) -> Iterator[tuple[Tensor, TokenStatistics]]:
        """
        Yield the numbers `[n]` and statistics of labelled tokens under the base model; this
        process's share.
        """
        accelerator, head, model = self.accelerator, self.head, self.model()
        rows, device = self.dataset.with_format("numpy"), accelerator.device
        begins = range(0, len(rows), batch_size * accelerator.num_processes)
        model.eval()
        # The order of the training data must not depend on whether something was measured before
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for begin in tqdm(
                begins, "Measuring the base model", disable=not accelerator.is_main_process
            ):
                mine = begin + batch_size * accelerator.process_index
                own = range(mine, min(mine + batch_size, len(rows)))
                # Out of rows before the others, a process still makes their calls, and counts
                # nothing
                batch = self.collator(rows.__getitems__(list(own or [0])))
                numbers = batch.pop(self.numbers)[:, 1:]
                labelled = batch["labels"][:, 1:] != -100
                model(**send_to_device(batch, device), fused_lm_head=True)
                if own:
                    yield numbers[labelled].long(), head.losses.statistics
        model.train()

    def sum(self, *counts: Tensor) -> list[Tensor]:
        """Return each process's counts added up, on the CPU."""
        if self.accelerator.num_processes == 1:
            return list(counts)
        return [self.accelerator.reduce(x.to(self.accelerator.device), "sum").cpu() for x in counts]


class MeasureGate(BaseModelPass):
    """
    Completes the parameters of the head's gate, and finds each example's mean nll if the gate needs
    it.
    """

    file = MEASUREMENTS_FILE
    numbers = "example_ids"

    def is_known(self) -> bool:
        """See `BaseModelPass`."""
        gate = self.head.gate
        return not gate.missing and (
            self.head.example_nll is not None or not gate.needs_example_nll
        )

    def apply(self, measured: dict[str, Any], args: Any) -> None:
        """See `BaseModelPass`."""
        head = self.head
        head.gate = head.gate.complete(measured["params"])
        if head.gate.needs_example_nll:
            head.example_nll = torch.tensor(
                measured["example_nll"], dtype=torch.float32, device=args.device
            )

    def measure(self, batch_size: int) -> dict[str, Any]:
        """Return the missing parameters, and each example's mean nll if the gate needs it."""
        gate = self.head.gate
        sums, counts, g, prob = self.run_base_model(batch_size)
        if not np.isfinite(sums).all():
            first = int(np.flatnonzero(~np.isfinite(sums))[0])
            raise NonFiniteError(
                f"The base model's nll is not finite on example {first} of the training data."
            )
        labelled = counts > 0
        example_nll = np.where(labelled, sums / np.maximum(counts, 1), 0.0)
        find = {
            "entropy_threshold": lambda: g.percentile(gate.params.get("entropy_percentile", 15.0)),
            "prob_threshold": lambda: prob.percentile(gate.params.get("prob_percentile", 15.0)),
            "tau": lambda: np.median(example_nll[labelled]),
        }
        measured: dict[str, Any] = {
            "params": {name: float(find[name]()) for name in gate.missing},
            "examples": int(labelled.sum()),
            "tokens": int(counts.sum()),
        }
        if gate.needs_example_nll:
            measured["example_nll"] = example_nll.tolist()
        return measured

    def run_base_model(
        self, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray, Histogram, Histogram]:
        """
        Return each example's summed nll (float64) and tokens `[examples]`, and all tokens' g and
        probability.
        """
        entropy = self.head.gate.params.get("entropy", "top-k")
        sums, counts = (torch.zeros(self.size, dtype=t) for t in (torch.float64, torch.int64))
        g, prob = Histogram(), Histogram()
        for examples, stats in self.score_rows(batch_size):
            sums.index_add_(0, examples, stats.nll.cpu().double())
            counts.index_add_(0, examples, torch.ones_like(examples))
            g.add(normalized_entropy(stats, entropy))
            prob.add(stats.prob)
        sums, counts, g.counts, prob.counts = self.sum(sums, counts, g.counts, prob.counts)
        return sums.numpy(), counts.numpy(), g, prob


class MeasureOldLogProb(BaseModelPass):
    """
    Finds every label's log-probability under the base model, in the rows that are trained on, as
    they are.
    """

    file = OLD_LOG_PROB_ABOUT_FILE
    numbers = "token_numbers"

    def is_known(self) -> bool:
        """See `BaseModelPass`."""
        return self.head.old_log_prob is not None

    def measure(self, batch_size: int) -> dict[str, Any]:
        """See `BaseModelPass`; the numbers themselves are in `OLD_LOG_PROB_FILE`."""
        found, tokens = torch.zeros(self.size), torch.zeros(1, dtype=torch.int64)
        for numbers, stats in self.score_rows(batch_size):
            found[numbers] = stats.log_prob.float().cpu()
            tokens += len(numbers)
        found, tokens = self.sum(found, tokens)
        if not found.isfinite().all():
            raise NonFiniteError(
                f"The base model's nll is not finite on {int((~found.isfinite()).sum())} tokens of"
                " the training data."
            )
        self.head.old_log_prob = found
        return {"tokens": int(tokens)}

    def apply(self, measured: dict[str, Any], args: Any) -> None:
        """See `BaseModelPass`."""
        path, found = Path(args.output_dir) / OLD_LOG_PROB_FILE, self.head.old_log_prob
        if found is None:  # the run is resumed
            if not path.is_file():
                raise ConfigurationError(
                    f"{path} is missing: copy it from the run's output folder, or start afresh."
                )
            found = torch.from_numpy(np.load(path))
        elif args.should_save:
            staging = path.with_suffix(".partial")
            with staging.open("wb") as file:
                np.save(file, found.numpy())
            os.replace(staging, path)
        self.head.old_log_prob = found.to(args.device)


def fingerprint(dataset: Dataset) -> str:
    """Return a digest of the examples' tokens and labels, in their order."""
    digest = hashlib.sha256()
    for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1024):
        for column in ("input_ids", "labels"):
            for numbers in flat(table[column])[::-1]:  # lengths, then tokens
                digest.update(numbers.astype("<i8").tobytes())
    return digest.hexdigest()


def read(path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured for these inputs, or say what differs."""
    if not path.is_file():
        raise ConfigurationError(
            f"{path} is missing: it holds what gate={inputs['gate']['name']!r} measured with the"
            " base model before training, which the checkpoint no longer is. Copy it from the"
            " run's output folder, or start afresh."
        )
    measured = json.loads(path.read_text())
    if changed := [name for name, value in inputs.items() if measured["inputs"].get(name) != value]:
        what = {
            "gate": "another gate or other parameters of it",
            "data_sha256": "other training data",
        }
        raise ConfigurationError(
            f"{path} is of {' and '.join(what[name] for name in changed)}. Resume with what the run"
            " began with, or start afresh in another output_dir."
        )
    return measured
