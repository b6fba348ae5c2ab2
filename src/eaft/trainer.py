"""`EAFTTrainer`: TRL's `SFTTrainer` with a gate on each token's loss. Everything else stays TRL's."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import get_config_model_id

from eaft.errors import ConfigurationError, NonFiniteError
from eaft.gates import check_gate, gate_help
from eaft.head import GatedLMHead

logger = get_logger(__name__)


@dataclass
class EAFTConfig(SFTConfig):
    """
    `SFTConfig` plus the gate.

    Args:
        gate: how each token's loss is weighted; one of `eaft.gates.GATES`.
        gate_alpha: exponent of the `eaft` gate; 0 is plain SFT, 2 and 3 are the paper's EAFT^2 and EAFT^3.
        gate_top_k: K of the top-K entropy.

    Raises:
        ConfigurationError: unknown gate, `gate_top_k` < 2, `gate_alpha` < 0, or a TRL option that computes a loss of
            its own (`loss_type`, `label_smoothing_factor`), which a gate would not reach.
    """

    gate: str = field(
        default="eaft",
        metadata={"help": "How each token's loss is weighted: 'eaft' (entropy), 'sft' (1) or 'dft' (probability)."},
    )
    gate_alpha: float = field(
        default=1.0, metadata={"help": "Exponent of the 'eaft' gate: 0 is plain SFT, larger is stricter."}
    )
    gate_top_k: int = field(
        default=20, metadata={"help": "The gate's entropy is that of the K largest probabilities, renormalised."}
    )

    def __post_init__(self) -> None:
        """Check our fields, then TRL's."""
        if self.gate_top_k < 2:
            raise ConfigurationError(f"gate_top_k must be at least 2, got {self.gate_top_k}; the paper uses 20.")
        if not (math.isfinite(self.gate_alpha) and self.gate_alpha >= 0):
            raise ConfigurationError(f"gate_alpha must be a number of at least 0, got {self.gate_alpha}.")
        check_gate(self.gate, self.gate_params)
        if self.loss_type != "nll":
            raise ConfigurationError(f"loss_type={self.loss_type!r} does not go with a gate; use gate='dft' instead.")
        if self.label_smoothing_factor:
            raise ConfigurationError("label_smoothing_factor does not go with a gate; leave it at 0.")
        super().__post_init__()

    @property
    def gate_params(self) -> dict[str, float]:
        """The parameters handed to the gate: its alpha, if it is the `eaft` gate or alpha was set."""
        return {"alpha": self.gate_alpha} if self.gate == "eaft" or self.gate_alpha != 1.0 else {}


class EAFTTrainer(SFTTrainer):
    """
    Takes what TRL's `SFTTrainer` takes, with `args` an `EAFTConfig`.

    The loss runs inside the model's forward, on labelled positions, in chunks (`eaft.head`). `eval_loss` is always the
    plain nll. Logged beside TRL's metrics, per labelled token: `nll` (ungated, nats), `mean_gate`, `conflict_share`
    (confident conflicts: H < 0.5 nats and P(label) < 0.1) and `conflict_nll_share` (their share of the nll).

    Raises:
        ConfigurationError: the data set is empty, or no token is labelled after preparation.
        NonFiniteError: a loss or a gradient is NaN or infinite; the weights have not been touched by it.
    """

    _tag_names = ["trl", "sft", "eaft"]  # noqa: RUF012 - TRL's own convention

    def __init__(
        self,
        model: Any,
        args: EAFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ConfigurationError("compute_loss_func does not go with a gate; use SFTTrainer, or register a gate.")
        args = EAFTConfig() if args is None else args
        if not isinstance(args, EAFTConfig):
            raise ConfigurationError(f"args must be an EAFTConfig, which has the gate; got {type(args).__name__}.")
        if train_dataset is not None and next(iter(train_dataset), None) is None:
            raise ConfigurationError("The training data set is empty.")
        super().__init__(model, args=args, data_collator=data_collator, train_dataset=train_dataset, **kwargs)
        base_model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self.gated_lm_head = GatedLMHead(base_model, args.gate, args.gate_top_k, args.gate_params)
        self._token_sums: dict[str, Tensor | float] = defaultdict(float)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        """Prepare a data set as TRL does; say how many rows lost all their labels, which TRL drops in silence."""
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        # The first token is nobody's label
        if not any(label != -100 for row in prepared for label in row["labels"][1:]):
            raise ConfigurationError(
                f"No row has a labelled token left after truncation to max_length={args.max_length}: raise max_length, "
                "or check completion_only_loss and assistant_only_loss."
            )
        if isinstance(dataset, Dataset) and not packing and (dropped := len(dataset) - len(prepared)):
            logger.warning(
                f"{dropped} of {len(dataset)} rows have no labelled token left after truncation to "
                f"max_length={args.max_length} and are dropped."
            )
        return prepared

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute TRL's loss, whose per-token terms our head has gated, and keep the sums behind our metrics."""
        batch = dict(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        self._require_finite(loss, batch)

        stats, weights = self.gated_lm_head.statistics, self.gated_lm_head.weights
        conflict = stats.is_conflict
        tokens = torch.ones_like(weights)
        sums = [x.float().sum() for x in (tokens, stats.nll, weights, conflict, stats.nll * conflict)]
        mode = "train" if self.model.training else "eval"
        self._token_sums[mode] = self._token_sums[mode] + torch.stack(sums)
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics, averaged over all labelled tokens of all ranks since the last log."""
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        if isinstance(sums := self._token_sums.pop(mode, 0.0), Tensor):
            tokens, nll, gate, conflicts, conflict_nll = self.accelerator.reduce(sums, "sum").tolist()
            logs[f"{prefix}nll"] = nll / max(tokens, 1)
            logs[f"{prefix}mean_gate"] = gate / max(tokens, 1)
            logs[f"{prefix}conflict_share"] = conflicts / max(tokens, 1)
            logs[f"{prefix}conflict_nll_share"] = conflict_nll / nll if nll > 0 else 0.0
        super().log(logs, start_time)

    def _require_finite(self, loss: Tensor, batch: dict[str, Any]) -> None:
        """Stop every rank, before the backward pass, if the loss of any is not finite."""
        finite = torch.isfinite(loss.detach())
        if self.accelerator.gather(finite).all():
            return
        rows = f"the batch's rows are {self._describe_rows(batch)}" if not finite else "in another process's batch"
        doing = f"training, step {self.state.global_step + 1}" if self.model.training else "evaluation"
        raise NonFiniteError(
            f"The loss is {loss.item()} in {doing}; {rows}. The weights are those of step {self.state.global_step}, "
            "and saved checkpoints are untouched. Look at these rows, or lower learning_rate."
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Stop before the optimizer's step if a finite loss had a gradient that is not (fp16's scaler skips those)."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16 and grad_norm is not None and not math.isfinite(grad_norm):
            raise NonFiniteError(
                f"The gradient's norm is {float(grad_norm)} in training, step {self.state.global_step + 1}. The "
                f"weights are those of step {self.state.global_step}, and saved checkpoints are untouched. Lower "
                "learning_rate, or train in float32."
            )
        return grad_norm

    def _describe_rows(self, batch: dict[str, Any]) -> str:
        """Name a batch's rows: their index in the prepared training data, and how their text begins."""
        input_ids = batch["input_ids"]
        if (mask := batch.get("attention_mask")) is not None:
            texts = [ids[keep.bool()] for ids, keep in zip(input_ids, mask, strict=True)]
        else:  # padding-free: one row holds every sequence, each starting at position 0
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
            texts = list(input_ids[0].tensor_split(starts[1:]))
        wanted = {tuple(ids.tolist()): ids for ids in texts}
        index: dict[tuple[int, ...], int] = {}
        if self.model.training:
            for i, row in enumerate(self.train_dataset):
                first = tuple(row["input_ids"][: row["seq_lengths"][0]] if "seq_lengths" in row else row["input_ids"])
                if first in wanted:
                    index.setdefault(first, i)
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        return ", ".join(
            f"{index.get(key, '(unnumbered)')}: {tokenizer.decode(ids[:32])!r}" for key, ids in wanted.items()
        )

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md` into the output folder: the model, the gate and how it was trained. See TRL's method."""
        if not self.is_world_process_zero():
            return
        args, base_model = self.args, get_config_model_id(self.model.config) or None
        on_hub = base_model is not None and not Path(base_model).exists()
        card = ModelCard.from_template(
            ModelCardData(
                base_model=base_model if on_hub else None,
                library_name="transformers",
                model_name=model_name,
                tags=["generated_from_trainer", *self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            ),
            template_path=str(Path(__file__).with_name("model_card.md")),
            base_model=base_model if on_hub else base_model and Path(base_model).name,
            dataset_name=dataset_name,
            gate=args.gate,
            gate_settings={**args.gate_params, "top_k": args.gate_top_k},
            gate_help=gate_help(args.gate),
            training={
                name: getattr(args, name)
                for name in (
                    "learning_rate",
                    "num_train_epochs",
                    "per_device_train_batch_size",
                    "gradient_accumulation_steps",
                    "max_length",
                    "seed",
                )
            },
            versions={name: version(name) for name in ("eaft", "trl", "transformers", "torch")},
        )
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        card.save(Path(args.output_dir) / "README.md")
