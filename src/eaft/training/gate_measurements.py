"""
One pass over the training data with the base model, before the first step, for gates that need it.

It measures thresholds, which are percentiles over the data's tokens (`masked`, `conflict-mask`);
each example's mean nll and the median of these (`flow`); and every label's log-probability
(`psft`, `stm`). The results are written to the output folder, and read from there if training is
resumed.

Only `psft` and `stm` keep a number for each token. For other gates each example has a sum, and
percentiles come from histograms, so that memory does not grow with the number of tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
# float32 [tokens of the prepared data], nats; 0 where there is no label
OLD_LOG_PROB_FILE = "_old_log_prob.npy"
OLD_LOG_PROB_ABOUT_FILE = "_old_log_prob.json"  # the gate and the data that it was measured with


class Histogram:
    """
    Counts of numbers in [0, 1], for percentiles that are at most 2**-15 (relative) too high.

    A bin holds the float32 numbers with the same upper 24 bits: 15 of the 23 bits of mantissa. A
    value counts as the upper end of its bin, so that it is never above its own percentile.
    """

    SHIFT = 8
    BINS = (0x3F800000 >> SHIFT) + 1  # the last begins at 1.0

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count `values` `[n]`. Values outside [0, 1], and NaN, count as the nearest end."""
        # Non-negative floats are in the order of their bits
        bins = (values.float().cpu().view(torch.int32) >> self.SHIFT).long().clamp(0, self.BINS - 1)
        self.counts.scatter_add_(0, bins, torch.ones_like(bins))

    def percentile(self, q: float) -> float:
        """
        Return `numpy.percentile(values, q)` to within the bound above, linear between neighbours.
        """
        cumulative = self.counts.cumsum(0)
        position = (int(cumulative[-1]) - 1) * q / 100
        ranks = torch.tensor([int(position), int(np.ceil(position))])
        bins = torch.searchsorted(cumulative, ranks, right=True)
        ends = ((bins + 1 << self.SHIFT) - 1).int().view(torch.float32).clamp(max=1.0).double()
        return float(ends[0] + (ends[1] - ends[0]) * (position - int(position)))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of a pass, as in its file beside `inputs`; None is not written."""

    params: dict[str, float] | None = None  # the parameters that were missing
    examples: int | None = None  # how many have a label
    tokens: int  # how many are labelled
    example_nll: list[float] | None = None  # nats, of each example; 0 without a label


class BaseModelPass(TrainerCallback, ABC):
    """
    The common part of both callbacks: a pass over rows with the base model when training begins,
    and its file.

    Args:
        head: the head whose gate needs the measurement.
        dataset: rows in a fixed order: `input_ids`, `labels`, and the column `numbers`.
        size: how many examples, or tokens, `numbers` counts.
        collator: makes a batch of rows.
        accelerator: the trainer's accelerator.
        model: returns the model as the trainer wraps it. When training begins it is still the base
            model.

    Raises:
        ConfigurationError: training is resumed, and the file is missing, or was measured with other
            data or another gate.
        NonFiniteError: the base model's nll is NaN or infinite.
    """

    file: str  # in the output folder; one gate may need both passes, so each has its own
    numbers: str  # the column with the number of each token's example, or of the token itself

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
        """Return whether the head has the measurement already."""

    @abstractmethod
    def measure(self, batch_size: int) -> Measurement:
        """Return what the base model says, as it is written to the file."""

    @abstractmethod
    def apply(self, measured: Measurement, args: Any) -> None:
        """Give the measurement to the head."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure; or read the measurement of this run's beginning, if it is resumed."""
        if self.is_known():
            return  # `train` was called before, and the model is no longer the base model
        path = Path(args.output_dir) / self.file
        digest = [fingerprint(self.dataset) if self.accelerator.is_main_process else None]
        inputs = {
            "gate": args.gate_spec.settings,
            "data_sha256": broadcast_object_list(digest)[0],
        }
        if state.global_step > 0:
            measured = read(path, inputs)
        else:
            measured = self.measure(args.per_device_eval_batch_size)
            if args.should_save:
                path.parent.mkdir(parents=True, exist_ok=True)
                values = {k: v for k, v in vars(measured).items() if v is not None}
                write_json(path, {"inputs": inputs, **values})
        self.apply(measured, args)

    @torch.no_grad()
    def score_rows(self, batch_size: int) -> Iterator[tuple[Tensor, TokenStatistics]]:
        """
        Yield the numbers `[n]` and statistics of labelled tokens under the base model, for this
        process's share of the rows.
        """
        accelerator, head, model = self.accelerator, self.head, self.model()
        rows, device = self.dataset.with_format("numpy"), accelerator.device
        begins = range(0, len(rows), batch_size * accelerator.num_processes)
        model.eval()
        # The order of the training data must not depend on whether a measurement came first
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for begin in tqdm(
                begins, "Measuring the base model", disable=not accelerator.is_main_process
            ):
                mine = begin + batch_size * accelerator.process_index
                own = range(mine, min(mine + batch_size, len(rows)))
                # A rank that runs out of rows keeps making the collective calls with a dummy row
                # that it does not count
                batch = self.collator(rows.__getitems__(list(own or [0])))
                numbers = batch.pop(self.numbers)[:, 1:]
                labelled = batch["labels"][:, 1:] != -100
                model(**send_to_device(batch, device), fused_lm_head=True)
                if own:
                    yield numbers[labelled].long(), head.losses.statistics
        model.train()

    def sum(self, *counts: Tensor) -> list[Tensor]:
        """Return the sums of the counts over all processes, on the CPU."""
        if self.accelerator.num_processes == 1:
            return list(counts)
        return [self.accelerator.reduce(x.to(self.accelerator.device), "sum").cpu() for x in counts]


class MeasureGate(BaseModelPass):
    """
    Measures the missing parameters of the head's gate, and each example's mean nll if it needs it.
    """

    file = MEASUREMENTS_FILE
    numbers = "example_ids"

    def is_known(self) -> bool:
        """See `BaseModelPass`."""
        gate = self.head.gate
        return not gate.missing and (
            self.head.example_nll is not None or not gate.needs_example_nll
        )

    def apply(self, measured: Measurement, args: Any) -> None:
        """See `BaseModelPass`."""
        head = self.head
        head.gate = head.gate.complete(measured.params or {})
        if head.gate.needs_example_nll:
            head.example_nll = torch.tensor(
                measured.example_nll, dtype=torch.float32, device=args.device
            )

    def measure(self, batch_size: int) -> Measurement:
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
        return Measurement(
            params={name: float(find[name]()) for name in gate.missing},
            examples=int(labelled.sum()),
            tokens=int(counts.sum()),
            example_nll=example_nll.tolist() if gate.needs_example_nll else None,
        )

    def run_base_model(
        self, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray, Histogram, Histogram]:
        """
        Return the sum of the nll (float64) and the number of tokens of each example `[examples]`,
        and histograms of g and of the probability over all tokens.
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
    Measures every label's log-probability under the base model, in the rows as they are trained on.
    """

    file = OLD_LOG_PROB_ABOUT_FILE
    numbers = "token_numbers"

    def is_known(self) -> bool:
        """See `BaseModelPass`."""
        return self.head.old_log_prob is not None

    def measure(self, batch_size: int) -> Measurement:
        """See `BaseModelPass`; the numbers themselves are in `OLD_LOG_PROB_FILE`."""
        log_probs, tokens = torch.zeros(self.size), torch.zeros(1, dtype=torch.int64)
        for numbers, stats in self.score_rows(batch_size):
            log_probs[numbers] = stats.log_prob.float().cpu()
            tokens += len(numbers)
        log_probs, tokens = self.sum(log_probs, tokens)
        if not log_probs.isfinite().all():
            raise NonFiniteError(
                "The base model's nll is not finite on"
                f" {int((~log_probs.isfinite()).sum())} tokens of the training data."
            )
        self.head.old_log_prob = log_probs
        return Measurement(tokens=int(tokens))

    def apply(self, measured: Measurement, args: Any) -> None:
        """See `BaseModelPass`."""
        path, log_probs = Path(args.output_dir) / OLD_LOG_PROB_FILE, self.head.old_log_prob
        if log_probs is None:  # the run is resumed
            if not path.is_file():
                raise ConfigurationError(
                    f"{path} is missing: copy it from the run's output folder, or start afresh."
                )
            log_probs = torch.from_numpy(np.load(path))
        elif args.should_save:
            staging = path.with_suffix(".partial")
            with staging.open("wb") as file:
                np.save(file, log_probs.numpy())
            os.replace(staging, path)
        self.head.old_log_prob = log_probs.to(args.device)


def fingerprint(dataset: Dataset) -> str:
    """Return a digest of the examples' tokens and labels, in their order."""
    digest = hashlib.sha256()
    for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1024):
        for column in ("input_ids", "labels"):
            for numbers in flat(table[column])[::-1]:  # lengths, then tokens
                digest.update(numbers.astype("<i8").tobytes())
    return digest.hexdigest()


def read(path: Path, inputs: dict[str, Any]) -> Measurement:
    """
    Return the measurement in a file.

    Raises:
        ConfigurationError: the file is missing, or was measured with another gate or other data.
    """
    if not path.is_file():
        raise ConfigurationError(
            f"{path} is missing: it holds what gate={inputs['gate']['name']!r} measured with the"
            " base model before training, and a checkpoint is no longer the base model. Copy it"
            " from the run's output folder, or start afresh."
        )
    measured = json.loads(path.read_text())
    if changed := [name for name, value in inputs.items() if measured["inputs"].get(name) != value]:
        what = {
            "gate": "another gate or other parameters of it",
            "data_sha256": "other training data",
        }
        raise ConfigurationError(
            f"{path} was measured with {' and '.join(what[name] for name in changed)}. Resume with"
            " the gate and data that the run began with, or start afresh in another output_dir."
        )
    return Measurement(**{name: value for name, value in measured.items() if name != "inputs"})
