"""
`EAFTTrainer`: TRL's `SFTTrainer` with a gate on each token's loss. Everything else stays TRL's.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from huggingface_hub import ModelCard
from transformers import TrainingArguments
from trl import SFTTrainer

from eaft.errors import ConfigurationError
from eaft.training.config import eaft_config
from eaft.training.early_stopping import EarlyStopping
from eaft.training.following import (
    FOLLOWED,
    ExampleCollator,
    FollowedData,
    follow_examples,
    number_tokens,
)
from eaft.training.forgetting import ForgettingEval, answers_before_sharding, general_suite
from eaft.training.gate_measurements import MEASURED_PARAMETERS, MeasureGate, MeasureOldLogProb
from eaft.training.head import GatedLMHead
from eaft.training.logits_check import check_logits
from eaft.training.metrics import TokenSums
from eaft.training.model_card import model_card
from eaft.training.reference import make_reference
from eaft.training.replay_kl import load_probs
from eaft.training.rows import cached_by_date
from eaft.training.step_checks import (
    check_zero_gradient,
    require_finite_gradient,
    require_finite_loss,
)
from eaft.training.templates import conversational
from eaft.training.trl_internals import DataCollatorForLanguageModeling, get_config_model_id
from eaft.training.turns import label_turns, mark_assistant

logger = get_logger(__name__)
STREAM_ROWS = 1000  # how many rows of a stream are searched for a label


class EAFTTrainer(SFTTrainer):
    """
    TRL's `SFTTrainer` with a gate. It takes the same arguments. `args` is an `EAFTConfig`; other
    training arguments are completed with its defaults.

    The loss runs inside the model's forward, on labelled positions, in chunks
    (`eaft.training.head`). `eval_loss` is always the plain nll. Beside TRL's metrics it logs, per
    labelled token: `nll` (ungated, nats), `conflict_share` (confident conflicts: H < 0.5 nats and
    P(label) < 0.1), `conflict_nll_share` (their share of the nll), `nll_high_entropy` and
    `nll_low_entropy` (nats; tokens with H >= 2 and H <= 0.5 nats under the current model, if there
    are any). In training it also logs `mean_gate` and, with a reference model, `kl` (nats). With
    `replay_loss="kl"` replayed tokens have no nll: they count in `replay_kl` alone (nats per
    replayed token).

    For a gate with a KL term, the reference is a frozen copy of the given model; under PEFT it is
    the same weights with the adapters off. If a gate must be measured, training begins with a pass
    over the data (`eaft.training.gate_measurements`).

    Args:
        replayed: more rows to train on, with `input_ids` and `labels`. They are mixed into
            `train_dataset`, and cut, shuffled and packed like its rows. For `replay_loss="kl"` the
            base model's probabilities of their labels are in the output folder when training begins
            (`eaft.training.replay_kl.save_probs`).

    Raises:
        ConfigurationError: the data set is empty, no token is labelled after preparation, or the
            set-up lacks something that the gate needs (with a stream, a collator of your own, or
            context parallelism). In training: no parameter is trainable, or the gradient of the
            first step is 0.
        NonFiniteError: a loss or a gradient is NaN or infinite. The weights are as they were
            before it.
    """

    data_collator: Any
    router_aux_loss_coef: float
    _signature_columns: Any
    _tag_names = ["trl", "sft", "eaft"]  # noqa: RUF012 - TRL's own convention

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Any = None,
        *,
        replayed: Dataset | None = None,
    ) -> None:
        if compute_loss_func is not None:
            raise ConfigurationError(
                "compute_loss_func does not go with a gate; use SFTTrainer, or register a gate."
            )
        args = eaft_config(args, model)
        if train_dataset is not None and next(iter(train_dataset), None) is None:
            raise ConfigurationError("The training data set is empty.")
        args, self._label_turns = mark_assistant(args, model, processing_class, train_dataset)
        self._gate = args.gate_spec.bind(MEASURED_PARAMETERS)
        self._followed: FollowedData | None = None
        self._replayed = replayed
        self._held_tokens = 0  # labels of replayed rows that the base's distribution holds
        if replayed is not None and args.replay_loss == "kl":
            self._held_tokens = sum(label != -100 for row in replayed["labels"] for label in row)
        super().__init__(
            model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        base_model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        reference = make_reference(self) if self._gate.anchor else None
        self.gated_lm_head = GatedLMHead(base_model, self._gate, reference)
        if self._gate.needs_examples or self._gate.needs_old_log_prob or self._held_tokens:
            self._check_examples_can_be_followed()
            pad_token_id = self.data_collator.pad_token_id
            self.data_collator = ExampleCollator(self.data_collator)
            if self._gate.needs_old_log_prob and self.train_dataset is not None:
                self._set_signature_columns_if_needed()
                rows = self.train_dataset
                rows = rows.select_columns(
                    [name for name in rows.column_names if name in self._signature_columns]
                )
                self.add_callback(
                    MeasureOldLogProb(
                        self.gated_lm_head,
                        rows,
                        rows[-1]["token_numbers"][-1] + 1,
                        collator=self.data_collator,
                        accelerator=self.accelerator,
                        model=lambda: self.model_wrapped,
                    )
                )
            if self._followed is not None and self._followed.loose is not None:
                if len(self._followed.loose) == 0:
                    raise ConfigurationError("No example has a labelled token to measure.")
                self.add_callback(
                    MeasureGate(
                        self.gated_lm_head,
                        self._followed.loose,
                        self._followed.num_examples,
                        collator=ExampleCollator(DataCollatorForLanguageModeling(pad_token_id)),
                        accelerator=self.accelerator,
                        model=lambda: self.model_wrapped,
                    )
                )
        self._logits_checked = self._gradient_checked = False
        self._token_sums: dict[str, TokenSums] = {}  # since the last log, by mode
        self._eval_prefix = "eval_"
        if args.forgetting_eval_steps:
            sharded: dict[str, Any] = {}
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                general_suite(args, sharded=True)  # refuses suites before anything is sampled
                sharded["answers"] = answers_before_sharding(model, self.processing_class, args)
                sharded["wrapped"] = lambda: self.model_wrapped
            self.add_callback(ForgettingEval(args, self.log, **sharded))
        if args.early_stopping_patience:
            if isinstance(eval_dataset, dict):
                raise ConfigurationError(
                    "early_stopping_patience goes by the nll of one evaluation set, and"
                    f" eval_dataset has {len(eval_dataset)} ({', '.join(eval_dataset)}): pass one."
                )
            self.add_callback(EarlyStopping(args.early_stopping_patience))

    def _check_examples_can_be_followed(self) -> None:
        """Refuse set-ups that lose a token's example on its way to the gate."""
        parallelism = self.accelerator.parallelism_config
        reasons = {
            "a data_collator of your own": not isinstance(
                self.data_collator, DataCollatorForLanguageModeling
            ),
            "dataset_kwargs={'skip_prepare_dataset': True}, or images": self._skip_prepare_dataset,
            "context or sequence parallelism": (
                parallelism and (parallelism.cp_enabled or parallelism.sp_enabled)
            ),
            "tensor parallelism": (
                (self._gate.must_be_measured or self._gate.needs_old_log_prob)
                and parallelism
                and parallelism.tp_enabled
            ),
            "prompt learning": (
                is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning
            ),
        }
        for reason, holds in reasons.items():
            if holds:
                who, what = f"gate={self.args.gate!r}", "example"
                if self._gate.needs_old_log_prob:
                    what = "number"
                elif not self._gate.needs_examples:
                    who, what = "replay_loss='kl'", "number"
                raise ConfigurationError(f"{who} must know each token's {what}; not with {reason}.")

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        name: str,
    ) -> Any:
        """
        Prepare a data set as TRL does, and report rows without a label. If the gate needs it, each
        token keeps the index of its example.
        """
        prepare = functools.partial(super()._prepare_dataset, processing_class=processing_class)
        if isinstance(dataset, Dataset) and "strftime_now" in str(processing_class.chat_template):
            dataset = cached_by_date(dataset)
        if self._label_turns and conversational(dataset):
            dataset = label_turns(dataset, processing_class, args)
        columns = dataset.column_names or []  # of some streams they are not known
        text, pair = args.dataset_text_field, {"prompt", "completion"}
        if formatting_func is None and text not in pair and {*pair, text} <= set(columns):
            # TRL would end this text, which it does not train on, in place of the completion
            dataset = dataset.remove_columns(text)
        first_replayed = None
        # An evaluation set may also have the name `train`
        if name == "train" and self._replayed is not None:
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False  # later, with the replayed rows
            rows = prepare(
                dataset,
                args=whole,
                packing=False,
                formatting_func=formatting_func,
                dataset_name=name,
            )
            rows = rows.select_columns(["input_ids", "labels"])
            dataset, formatting_func = (
                concatenate_datasets([rows, self._replayed.cast(rows.features)]),
                None,
            )
            self._replayed = None
            first_replayed = len(rows) if self._held_tokens else None
        follow = self._gate.needs_examples or self._held_tokens
        # An evaluation set may also have the name `train`
        if name == "train" and follow and self._followed is None:
            loose = self._gate.must_be_measured
            self._followed = follow_examples(
                prepare, dataset, args, packing, formatting_func, loose, first_replayed
            )
            prepared = self._followed.prepared
        else:
            prepared = prepare(
                dataset,
                args=args,
                packing=packing,
                formatting_func=formatting_func,
                dataset_name=name,
            )
        # The first token of a row is never a label, and a stream may have no end
        looked_at = (
            prepared if isinstance(prepared, Dataset) else itertools.islice(prepared, STREAM_ROWS)
        )
        if not any(label != -100 for row in looked_at for label in row["labels"][1:]):
            raise ConfigurationError(
                "No row has a labelled token left after truncation to"
                f" max_length={args.max_length}: raise max_length, or check completion_only_loss"
                " and assistant_only_loss."
            )
        if (
            isinstance(dataset, Dataset)
            and not packing
            and (dropped := len(dataset) - len(prepared))
        ):
            logger.warning(
                f"{dropped} of {len(dataset)} rows have no labelled token left after truncation to "
                f"max_length={args.max_length} and are dropped."
            )
        if name == "train" and self._gate.needs_old_log_prob:
            if not isinstance(prepared, Dataset):
                raise ConfigurationError(
                    f"gate={args.gate!r} needs a data set with a length: no dataset_streaming."
                )
            prepared = number_tokens(prepared)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns with a number for each token, for the collator."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [n for n in FOLLOWED if n not in self._signature_columns]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """
        Compute TRL's loss, for which our head gates the terms of the tokens, and keep the sums for
        our metrics.
        """
        batch = dict(inputs)
        if not self._logits_checked:
            check_logits(model, inputs, self.accelerator.gather)
            self._logits_checked = True
        router_aux_loss_coef = self.router_aux_loss_coef
        # TRL also adds the auxiliary loss of a mixture of experts to `eval_loss`
        if not self.model.training:
            self.router_aux_loss_coef = 0.0
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.router_aux_loss_coef = router_aux_loss_coef
        loss = result[0] if return_outputs else result
        require_finite_loss(self, loss, batch)

        mode = "train" if self.model.training else "eval"
        held = self.gated_lm_head.held
        sums = TokenSums.of(self.gated_lm_head.losses, None if held is None else held.kl)
        before = self._token_sums.get(mode)
        self._token_sums[mode] = sums if before is None else before + sums
        return result

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as TRL does, without the sums that `predict` left."""
        self._token_sums.pop("eval", None)
        self._eval_prefix = f"{metric_key_prefix}_"  # with the evaluation set's name, if several
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics, averaged over all labelled tokens of all ranks since the last log."""
        mode, prefix = ("train", "") if self.model.training else ("eval", self._eval_prefix)
        if (sums := self._token_sums.pop(mode, None)) is not None:
            extra = [] if mode == "eval" else ["mean_gate"]
            if mode == "train" and self._gate.anchor is not None:
                extra.append("kl")
            means = sums.means(self.accelerator).logged(*extra)
            logs.update({f"{prefix}{name}": mean for name, mean in means.items()})
        super().log(logs, start_time)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """
        Save as transformers does, and beside an adapter also the generation config, which has the
        end tokens.
        """
        super()._save(output_dir, state_dict)
        if self.args.should_save and is_peft_model(self.model):
            config = getattr(self.model.get_base_model(), "generation_config", None)
            if config is not None:
                config.to_json_file(
                    Path(output_dir or self.args.output_dir) / "generation_config.json"
                )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Check the gradient before the optimizer's step: it is finite and, at first, not 0."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        require_finite_gradient(self, grad_norm)
        if not self._gradient_checked and grad_norm is not None and math.isfinite(grad_norm):
            sums = self._token_sums.get("train")  # None if a subclass computes its own loss
            if grad_norm != 0:
                self._gradient_checked = True
            elif sums is not None:
                self._gradient_checked = check_zero_gradient(self, sums.means(self.accelerator))
        return grad_norm

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does; without a trainable parameter, raise `ConfigurationError`."""
        if any(getattr(module, "_disable_adapters", False) for module in self.model.modules()):
            raise ConfigurationError(
                "The adapters are switched off: call enable_adapter_layers() on the model."
            )
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigurationError(
                "Every parameter of the model is frozen (requires_grad=False): unfreeze the"
                " parameters to be trained; load an adapter with PeftModel.from_pretrained(...,"
                " is_trainable=True), and switch adapters on with enable_adapter_layers()."
            )
        if self._held_tokens:
            output_dir = Path(self.args.output_dir)
            self.gated_lm_head.replay_probs = load_probs(output_dir, self._held_tokens)
        return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """
        Train an epoch, unless training is at its end, where transformers would train one more step.
        """
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Write `README.md` into the output folder: the model, the gate and the recipe. It takes the
        arguments of TRL's method.
        """
        if not self.is_world_process_zero():
            return
        file = Path(self.args.output_dir) / "README.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        super().create_model_card(model_name, dataset_name, tags)
        rows = self.train_dataset
        progress = {
            "rows": (f"{len(rows):,}" if hasattr(rows, "__len__") else "a stream of")
            + (" packed" if self.args.packing else ""),
            "steps": f"{self.state.global_step:,}",
            "epochs": f"{self.state.epoch or 0:.3g}",
        }
        args = copy.copy(self.args)
        args.assistant_only_loss |= self._label_turns  # which keeps TRL from doing it
        card = model_card(
            ModelCard(file.read_text()),
            args,
            self.gated_lm_head.gate,
            self.model,
            get_config_model_id(self.model.config),
            dataset_name,
            progress,
        )
        card.save(file)
