"""`EAFTTrainer`: TRL's `SFTTrainer` with a gate on each token's loss. Everything else stays TRL's."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import fsdp2_prepare_model, is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_config_model_id

from eaft.errors import ConfigurationError, NonFiniteError
from eaft.evaluation.drift import PROMPTS
from eaft.objective.gates import check_gate, get_gate, missing_params
from eaft.training.examples import ExampleCollator, FollowedData, follow_examples
from eaft.training.forgetting import RULES, ForgettingEval, check_selection
from eaft.training.head import GatedLMHead, frozen_copy
from eaft.training.measure import MEASURED, MeasureGate

logger = get_logger(__name__)


@dataclass
class EAFTConfig(SFTConfig):
    """
    `SFTConfig` plus the gate.

    Args:
        gate: how each token's loss is weighted; one of `eaft.objective.gates.GATES`, or `module:function`.
        gate_alpha: exponent of the `eaft` gate; 0 is plain SFT, 2 and 3 are the paper's EAFT^2 and EAFT^3.
        gate_entropy: `top-k` or `exact`, for the gates that use the entropy.
        gate_top_k: K of the top-K entropy, and of the ln K that entropies are divided by.
        gate_kwargs: the other parameters of the gate, e.g. `{"steepness": 20}` for `eaft-sigmoid`.
        forgetting_eval_steps: measure drift and the suites every so many steps (0: never); see
            `eaft.training.forgetting`.
        forgetting_suite: suites or tasks of general ability, as `eaft eval --suite` takes them.
        target_suite: suites or tasks of what is being learned.
        forgetting_data_dir: a folder with local data for them.
        forgetting_prompts: JSON Lines with a `prompt`, whose answers drift is measured on (the first 32).
        select_checkpoint: which checkpoint to keep: `budget`, `best-mean` or `pareto`
            (`eaft.training.forgetting.RULES`).
        forgetting_budget: the drift (nats per token) at which training stops.

    Raises:
        ConfigurationError: unknown gate, a parameter it does not take or refuses, `gate_top_k` < 2, a TRL option that
            computes a loss of its own (`loss_type`, `label_smoothing_factor`), which a gate would not reach, or a
            selection of checkpoints that is not complete.
    """

    gate: str = field(
        default="eaft",
        metadata={"help": "How each token's loss is weighted: one of the gates above, or module:function of your own."},
    )
    gate_alpha: float = field(
        default=1.0, metadata={"help": "Exponent of the 'eaft' gate: 0 is plain SFT, larger is stricter."}
    )
    gate_entropy: str = field(
        default="top-k",
        metadata={
            "help": "Entropy of the gates that use it: 'top-k' (of the K largest probabilities, renormalised) or "
            "'exact' (of the whole vocabulary, clamped to ln K)."
        },
    )
    gate_top_k: int = field(default=20, metadata={"help": "K of the top-K entropy; entropies are divided by ln K."})
    gate_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Other parameters of the gate, as listed above: '{\"steepness\": 20}' (JSON, or a YAML map)."
        },
    )

    forgetting_eval_steps: int = field(
        default=0, metadata={"help": "Measure drift, forgetting_suite and target_suite every so many steps; 0: never."}
    )
    forgetting_suite: list[str] = field(
        default_factory=lambda: ["everyday"],
        metadata={"help": "Suites or lm-eval tasks of general ability (default: 120 easy questions)."},
    )
    target_suite: list[str] | None = field(
        default=None, metadata={"help": "Suites or lm-eval tasks of what is being learned."}
    )
    forgetting_data_dir: str | None = field(
        default=None, metadata={"help": "A folder with local data for the suites, as `eaft eval --data_dir`."}
    )
    forgetting_prompts: str = field(
        default=str(PROMPTS),
        metadata={"help": "JSON Lines with a `prompt`; drift is measured on answers to 32 of them."},
    )
    select_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Which checkpoint to keep. " + " ".join(f"{name}: {what}." for name, what in RULES.items())},
    )
    forgetting_budget: float | None = field(
        default=None, metadata={"help": "Stop when drift (nats per token) passes this, and keep the last one within."}
    )

    def __post_init__(self) -> None:
        """Check our fields, then TRL's."""
        if self.gate_top_k < 2:
            raise ConfigurationError(f"gate_top_k must be at least 2, got {self.gate_top_k}; the paper uses 20.")
        if isinstance(self.gate_kwargs, str):
            try:
                self.gate_kwargs = json.loads(self.gate_kwargs)
            except ValueError as error:
                raise ConfigurationError(f"gate_kwargs={self.gate_kwargs!r} is not JSON: {error}.") from error
        if not isinstance(self.gate_kwargs, dict | None):
            raise ConfigurationError(f"gate_kwargs={self.gate_kwargs!r}: expected a map of names to values.")
        check_gate(self.gate, self.gate_params, MEASURED)
        if self.loss_type != "nll":
            raise ConfigurationError(f"loss_type={self.loss_type!r} does not go with a gate; use gate='dft' instead.")
        if self.label_smoothing_factor:
            raise ConfigurationError("label_smoothing_factor does not go with a gate; leave it at 0.")
        super().__post_init__()
        check_selection(self)

    @property
    def gate_params(self) -> dict[str, Any]:
        """The gate's parameters, as given or by default; without those that are still to be measured."""
        params = {k: v for k, v in get_gate(self.gate).params.items() if v is not inspect.Parameter.empty}
        given: dict[str, Any] = dict(self.gate_kwargs or {})  # type: ignore[arg-type]
        for name, value, default in (("alpha", self.gate_alpha, 1.0), ("entropy", self.gate_entropy, "top-k")):
            if name in given:
                raise ConfigurationError(f"gate_kwargs: set {name} by gate_{name}.")
            if name in params or value != default:
                given[name] = value
        return {**params, **given}


def must_be_measured(args: EAFTConfig) -> bool:
    """Return whether the gate needs a pass over the data with the base model."""
    return bool(missing_params(args.gate, args.gate_params)) or get_gate(args.gate).needs_example_nll


def needs_examples(args: EAFTConfig) -> bool:
    """Return whether the gate, or its measurement, needs to know which example each token is from."""
    return get_gate(args.gate).needs_examples or must_be_measured(args)


class EAFTTrainer(SFTTrainer):
    """
    Takes what TRL's `SFTTrainer` takes, with `args` an `EAFTConfig`.

    The loss runs inside the model's forward, on labelled positions, in chunks (`eaft.training.head`). `eval_loss` is
    always the plain nll. Logged beside TRL's metrics, per labelled token: `nll` (ungated, nats), `conflict_share`
    (confident conflicts: H < 0.5 nats and P(label) < 0.1), `conflict_nll_share` (their share of the nll), and in
    training `mean_gate` and, with a reference model, `kl` (nats).

    A gate with a KL term takes as its reference the model as it is handed over (a frozen copy), or under PEFT the same
    weights with the adapters off. One that must be measured takes a pass over the data first (`eaft.training.measure`).

    Raises:
        ConfigurationError: the data set is empty, no token is labelled after preparation, or the gate needs something
            this set-up cannot give (a stream, a collator of your own, context parallelism).
        NonFiniteError: a loss or a gradient is NaN or infinite; the weights have not been touched by it.
    """

    data_collator: Any
    _signature_columns: Any
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
        self._followed: FollowedData | None = None
        super().__init__(model, args=args, data_collator=data_collator, train_dataset=train_dataset, **kwargs)
        base_model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        reference = self._make_reference() if get_gate(args.gate).anchor else None
        self.gated_lm_head = GatedLMHead(base_model, args.gate, args.gate_top_k, args.gate_params, reference)
        if needs_examples(args):
            self._check_examples_can_be_followed()
            self.data_collator = ExampleCollator(self.data_collator)
            if self._followed is not None and self._followed.loose is not None:
                if len(self._followed.loose) == 0:
                    raise ConfigurationError("No example has a labelled token to measure.")
                self.add_callback(MeasureGate(self, self._followed.loose, self._followed.num_examples))
        self._token_sums: dict[str, Tensor | float] = defaultdict(float)
        if args.forgetting_eval_steps:
            self.add_callback(ForgettingEval(self))

    def _make_reference(self) -> Any:
        """Return what the head runs as the reference model: the PEFT model around the policy, or a frozen copy."""
        if is_peft_model(self.model):
            if self.model.active_peft_config.is_prompt_learning:
                raise ConfigurationError(f"gate={self.args.gate!r} does not go with prompt learning: use LoRA.")
            return self.model
        state = self.accelerator.state
        zero3 = self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3
        if zero3 or (self.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1):
            raise ConfigurationError(
                f"gate={self.args.gate!r} keeps a copy of the base model, which it can shard with FSDP2 but not with "
                "ZeRO-3 or FSDP1: use FSDP2, or LoRA."
            )
        reference = frozen_copy(self.model)
        if self.is_fsdp_enabled:
            return fsdp2_prepare_model(self.accelerator, reference)  # layer by layer, as the policy will be
        return reference.to(self.args.device) if self.place_model_on_device else reference

    def _check_examples_can_be_followed(self) -> None:
        """Refuse set-ups in which a token's example is lost on its way to the gate."""
        parallelism = self.accelerator.parallelism_config
        reasons = {
            "a data_collator of your own": not isinstance(self.data_collator, DataCollatorForLanguageModeling),
            "dataset_kwargs={'skip_prepare_dataset': True}, or images": self._skip_prepare_dataset,
            "context or sequence parallelism": parallelism and (parallelism.cp_enabled or parallelism.sp_enabled),
            "tensor parallelism": must_be_measured(self.args) and parallelism and parallelism.tp_enabled,
            "prompt learning": is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ConfigurationError(f"gate={self.args.gate!r} must know each token's example; not with {reason}.")

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, name: str
    ) -> Any:
        """Prepare a data set as TRL does, following examples if the gate needs it; report rows without a label."""
        prepare = functools.partial(super()._prepare_dataset, processing_class=processing_class)
        if name == "train" and needs_examples(args) and self._followed is None:  # an evaluation set may have that name
            loose = must_be_measured(args)
            self._followed = follow_examples(prepare, dataset, args, packing, formatting_func, loose)
            prepared = self._followed.prepared
        else:
            prepared = prepare(dataset, args=args, packing=packing, formatting_func=formatting_func, dataset_name=name)
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

    def _set_signature_columns_if_needed(self) -> None:
        """Let `example_ids` pass to the collator."""
        super()._set_signature_columns_if_needed()
        if "example_ids" not in self._signature_columns:
            self._signature_columns.append("example_ids")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute TRL's loss, whose per-token terms our head has gated, and keep the sums behind our metrics."""
        batch = dict(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        self._require_finite(loss, batch)

        losses = self.gated_lm_head.losses
        nll, weights, conflict = losses.statistics.nll, losses.weights, losses.statistics.is_conflict
        kl = torch.zeros_like(nll) if losses.kl is None else losses.kl
        sums = [x.float().sum() for x in (torch.ones_like(nll), nll, conflict, nll * conflict, weights, kl)]
        mode = "train" if self.model.training else "eval"
        self._token_sums[mode] = self._token_sums[mode] + torch.stack(sums)
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as TRL does; what `predict` left in our metrics is dropped."""
        self._token_sums.pop("eval", None)
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics, averaged over all labelled tokens of all ranks since the last log."""
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        if isinstance(sums := self._token_sums.pop(mode, 0.0), Tensor):
            tokens, nll, conflicts, conflict_nll, gate, kl = self.accelerator.reduce(sums, "sum").tolist()
            logs[f"{prefix}nll"] = nll / max(tokens, 1)
            logs[f"{prefix}conflict_share"] = conflicts / max(tokens, 1)
            logs[f"{prefix}conflict_nll_share"] = conflict_nll / nll if nll > 0 else 0.0
            if mode == "train":
                logs["mean_gate"] = gate / max(tokens, 1)
                if self.gated_lm_head.anchor is not None:
                    logs["kl"] = kl / max(tokens, 1)
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
            weights = f"The weights are those of step {self.state.global_step}"
            if self.is_deepspeed_enabled:
                weights = "DeepSpeed has taken this step, so the weights may be spoilt"
            raise NonFiniteError(
                f"The gradient's norm is {float(grad_norm)} in training, step {self.state.global_step + 1}. {weights}, "
                "and saved checkpoints are untouched. Lower learning_rate, or train in float32."
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
            gate_settings={**self.gated_lm_head.params, "top_k": args.gate_top_k},
            gate_help=get_gate(args.gate).help,
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
