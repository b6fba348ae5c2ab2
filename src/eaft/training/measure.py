"""
One pass over the training data with the base model, before the first step: what some gates must know.

Thresholds that are percentiles of the data's tokens (`masked`, `conflict-mask`), and each example's mean nll with their
median (`flow`). Written to the output folder, and read from there when training is resumed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eaft.errors import ConfigurationError, NonFiniteError
from eaft.objective.gates import missing_params, normalized_entropy
from eaft.provenance import write_json

if TYPE_CHECKING:
    from eaft.training.trainer import EAFTTrainer

MEASURED = ("entropy_threshold", "prob_threshold", "tau")  # parameters of gates that this module can find
MEASUREMENTS_FILE = "gate_measurements.json"


class MeasureGate(TrainerCallback):
    """
    Completes the parameters of the trainer's gate when training begins.

    Args:
        trainer: whose model, at the first step, is the base model.
        dataset: the training examples, one a row or split over several, in a fixed order: `input_ids`, `labels`,
            `example_ids` (of every token, the index of its example).
        num_examples: examples of the training data, also those without a label left.

    Raises:
        ConfigurationError: training is resumed, and the file is missing or is of other data or another gate.
        NonFiniteError: the base model's nll is NaN or infinite.
    """

    def __init__(self, trainer: EAFTTrainer, dataset: Dataset, num_examples: int) -> None:
        self.trainer, self.dataset, self.num_examples = trainer, dataset, num_examples

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, or read what was measured when this run began."""
        head = self.trainer.gated_lm_head
        if not missing_params(head.gate, head.params) and (
            head.example_nll is not None or not head.gate.needs_example_nll
        ):
            return  # `train` was called before, so the model is no longer the base model
        path = Path(args.output_dir) / MEASUREMENTS_FILE
        inputs = {
            "gate": {"name": args.gate, "top_k": args.gate_top_k, **args.gate_params},
            "data_sha256": fingerprint(self.dataset),
        }
        if state.global_step > 0:
            measured = read(path, inputs)
        else:
            measured = {"inputs": inputs, **self.measure()}
            if args.should_save:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, measured)
        head.params = {**head.params, **measured["params"]}
        if head.gate.needs_example_nll:
            head.example_nll = torch.tensor(measured["example_nll"], dtype=torch.float32, device=args.device)

    def measure(self) -> dict[str, Any]:
        """Return the missing parameters, and each example's mean nll if the gate needs it."""
        trainer, head = self.trainer, self.trainer.gated_lm_head
        sums, counts, entropy, prob = self.run_base_model(head.params.get("entropy", "top-k"))
        ids = [row["example_ids"][0] for row in self.dataset]
        sums, counts = (np.bincount(ids, weights=x, minlength=self.num_examples) for x in (sums, counts))
        if not np.isfinite(sums).all():
            first = int(np.flatnonzero(~np.isfinite(sums))[0])
            raise NonFiniteError(f"The base model's nll is not finite on example {first} of the training data.")
        labelled = counts > 0
        example_nll = np.where(labelled, sums / np.maximum(counts, 1), 0.0)
        find = {
            "entropy_threshold": lambda: np.percentile(entropy, head.params.get("entropy_percentile", 15.0)),
            "prob_threshold": lambda: np.percentile(prob, head.params.get("prob_percentile", 15.0)),
            "tau": lambda: np.median(example_nll[labelled]),
        }
        measured: dict[str, Any] = {
            "params": {name: float(find[name]()) for name in missing_params(head.gate, trainer.args.gate_params)},
            "examples": int(labelled.sum()),
            "tokens": len(prob),
        }
        if head.gate.needs_example_nll:
            measured["example_nll"] = example_nll.tolist()
        return measured

    @torch.no_grad()
    def run_base_model(self, entropy: str) -> tuple[np.ndarray, ...]:
        """Return each row's nll and number of tokens `[rows]`, and each token's g and probability `[tokens]`."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        loader = accelerator.prepare_data_loader(
            DataLoader(
                self.dataset.select_columns(["input_ids", "labels"]),
                batch_size=trainer.args.per_device_eval_batch_size,
                collate_fn=DataCollatorForLanguageModeling(trainer.data_collator.collator.pad_token_id),
            )
        )
        model, head = trainer.model_wrapped, trainer.gated_lm_head
        rows_found, tokens_found = [], []
        model.eval()
        # The order of the training data must not depend on whether something was measured before
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), trainer.compute_loss_context_manager():
            for batch in tqdm(loader, "Measuring the base model", disable=not accelerator.is_main_process):
                model(**batch, fused_lm_head=True)
                stats, labelled = head.losses.statistics, batch["labels"][:, 1:] != -100
                rows = torch.full((3, *labelled.shape), -1.0, device=labelled.device)  # -1: no label
                found = torch.stack([stats.nll, normalized_entropy(stats, entropy), stats.prob])
                rows[:, labelled] = found.to(rows)
                rows = accelerator.pad_across_processes(rows.transpose(0, 1), dim=2, pad_index=-1)
                nll, g, prob = accelerator.gather_for_metrics(rows).unbind(1)
                labelled = g != -1
                rows_found.append(torch.stack([nll.where(labelled, 0.0).sum(-1), labelled.sum(-1)]).cpu().numpy())
                tokens_found.append(torch.stack([g, prob])[:, labelled].cpu().numpy())
        model.train()
        return *np.concatenate(rows_found, axis=1), *np.concatenate(tokens_found, axis=1)


def fingerprint(dataset: Dataset) -> str:
    """Return a digest of the examples' tokens and labels, in their order."""
    digest = hashlib.sha256()
    for row in dataset.with_format("numpy"):
        for column in ("input_ids", "labels"):
            tokens = np.asarray(row[column], dtype=np.int64)
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
    return digest.hexdigest()


def read(path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured for these inputs, or say what differs."""
    if not path.is_file():
        raise ConfigurationError(
            f"{path} is missing: it holds what gate={inputs['gate']['name']!r} measured with the base model before "
            "training, which the checkpoint no longer is. Copy it from the run's output folder, or start afresh."
        )
    measured = json.loads(path.read_text())
    if changed := [name for name, value in inputs.items() if measured["inputs"].get(name) != value]:
        what = {"gate": "another gate or other parameters of it", "data_sha256": "other training data"}
        raise ConfigurationError(
            f"{path} is of {' and '.join(what[name] for name in changed)}. Resume with what the run began with, or "
            "start afresh in another output_dir."
        )
    return measured
