"""
`eaft train`: what `trl sft` does, with a gate. The output folder loads with `from_pretrained`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_peft_config,
    get_quantization_config,
)

from eaft.errors import STARTED, ConfigurationError
from eaft.evaluation.model_settings import load_tokenizer
from eaft.models import (
    check_finite,
    check_vocabulary,
    loading,
    resolve_model,
    text_config,
)
from eaft.processes import locked
from eaft.provenance import environment, peak_memory_gib, write_json
from eaft.text import visible
from eaft.training.config import EAFTConfig
from eaft.training.data import check_data, load_data
from eaft.training.early_stopping import stopped_early
from eaft.training.plan import plan
from eaft.training.replay import replayed_rows
from eaft.training.row_checks import check_ids
from eaft.training.run_folder import (
    METRICS_FILE,
    RUN_FILE,
    MetricsFile,
    changed_arguments,
    find_checkpoint,
    finished,
    is_complete,
)
from eaft.training.trainer import EAFTTrainer


def train(
    script_args: ScriptArguments,
    args: EAFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Train, and write the model, its card, `metrics.jsonl` and `run.json` to `args.output_dir`.

    The input is checked before the folder is touched.
    """
    state = PartialState()
    if message := finished(args):
        if state.is_main_process:
            print(visible(message))
        return
    find_checkpoint(args)
    state.wait_for_everyone()  # no process may write before every one has looked
    train_dataset, eval_dataset = load_data(script_args, args, model_args, dataset_args)
    check_data(script_args, args, model_args, train_dataset, eval_dataset)
    with state.main_process_first():
        model = resolve_model(model_args.model_name_or_path, args.trust_remote_code)
    args.model_init_kwargs = model_init_kwargs(args, model_args)
    check_model(model, args, model_args, train_dataset)
    cannot = f"model_name_or_path={model!r} cannot be loaded."
    try:
        with loading(cannot):
            replayed = replayed_rows(train_dataset, model, args) if args.replay else None
            trainer = EAFTTrainer(
                model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                quantization_config=get_quantization_config(model_args),
                peft_config=get_peft_config(model_args),
                replayed=(
                    Dataset.from_list(replayed.rows).select_columns(["input_ids", "labels"])
                    if replayed
                    else None
                ),
            )
    except (ValueError, RuntimeError) as error:  # TRL's own complaints about data and flags
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(" ".join(str(error).split())) from error
    check_finite(trainer.model, str(model_args.model_name_or_path))

    output_dir = Path(args.output_dir)
    with contextlib.ExitStack() as stack:
        if trainer.is_world_process_zero():
            stack.enter_context(locked(output_dir, begins_with=(RUN_FILE, METRICS_FILE)))
        if message := finished(args):  # another process may just have ended
            print(visible(message))
            return
        checkpoint = find_checkpoint(args)  # again, for the same reason
        state.wait_for_everyone()
        if replayed:
            if trainer.is_world_process_zero():
                replayed.save(output_dir)
            state.wait_for_everyone()  # each process reads the probabilities
        fit(trainer, checkpoint, script_args, args, model_args, dataset_args)


def check_model(model: str, args: EAFTConfig, model_args: ModelConfig, dataset: Any) -> None:
    """
    Check a model without loading its weights: its vocabulary must have the tokenizer's tokens and
    the data's token ids.

    Raises:
        ConfigurationError: it lacks one of them, or there is no tokenizer.
    """
    source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    tokenizer, size = load_tokenizer(model, source), text_config(model, source).vocab_size
    check_vocabulary(model, tokenizer, size)
    check_ids(dataset, size, "the data")


def model_init_kwargs(args: EAFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments with which `from_pretrained` loads the model."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }


def fit(
    trainer: EAFTTrainer,
    checkpoint: str | None,
    script_args: ScriptArguments,
    args: EAFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Train from a checkpoint or afresh, and write everything into a folder that no other run uses.
    """
    output_dir = Path(args.output_dir)
    run = {
        "finished": False,
        "model": model_args.model_name_or_path,
        "dataset": script_args.dataset_name or [vars(d) for d in dataset_args.datasets],
        "dataset_flags": {
            name: getattr(script_args, name) for name in ("dataset_config", "dataset_train_split")
        },
        "gate": args.gate_spec.settings,
        "seed": args.seed,
        "config": changed_arguments(args),
        "environment": environment(),
    }
    if trainer.is_world_process_zero():
        for path in output_dir.glob("checkpoint-*"):
            if not is_complete(path):  # a killed run left it
                shutil.rmtree(path)
        if checkpoint is None:
            (output_dir / METRICS_FILE).unlink(missing_ok=True)
        write_json(output_dir / RUN_FILE, run)
    trainer.add_callback(MetricsFile(output_dir / METRICS_FILE))
    result = trainer.train(resume_from_checkpoint=checkpoint)

    save_model(trainer, output_dir)
    if trainer.is_world_process_zero():
        trainer.create_model_card(model_name=output_dir.name, dataset_name=script_args.dataset_name)
        runtime = result.metrics["train_runtime"]
        run["result"] = {
            "steps": trainer.state.global_step,
            # None: all steps were trained before, and their loss was not logged
            "train_loss": result.metrics.get("train_loss"),
            "train_runtime_s": runtime,  # with evaluation and saving; since the last resumption
            "tokens_per_s": trainer._total_train_tokens / runtime,
            "peak_memory_gib": peak_memory_gib(),
        }
        if stopped := stopped_early(trainer.state, args.early_stopping_patience):
            run["result"]["stopped_early"] = stopped
        write_json(output_dir / RUN_FILE, {**run, "finished": True})
        if STARTED not in os.environ:  # else `eaft tune` or `compare` says what comes next
            model = str(model_args.model_name_or_path)
            print(visible(farewell(trainer.state, runtime, model, output_dir, stopped)))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()  # `Trainer.end` is this, and new in transformers 5.18


def farewell(state: Any, seconds: float, model: str, folder: Path, stopped: str | None) -> str:
    """
    Return the last message: what was trained, what was written, and what to do next.

    Args:
        stopped: why training ended early, if it did.
    """
    logged = [log["nll"] for log in state.log_history if "nll" in log]
    nll = ""
    if logged:
        nll = f" Training nll, as logged first and last: {logged[0]:.3f}, {logged[-1]:.3f}."
    checkpoints = len(list(folder.glob("checkpoint-*")))
    return (
        f"\nTrained {state.global_step:,} steps ({state.epoch:.3g} epochs) in {seconds:.0f} s.{nll}"
        f"{f' {stopped}' if stopped else ''}"
        f"\n\nWritten to {folder}: the model, README.md (its card), {METRICS_FILE}, {RUN_FILE};"
        f" checkpoints: {checkpoints}. Next, see what was gained and forgotten: eaft eval {folder}"
        f" --base {model} --held_out ROWS.jsonl"
    )


def dry_run(configs: list[Any], launch_args: list[str], refused: str | None = None) -> str:
    """
    Check the four arguments of `train` as it does, and return the plan (`eaft.training.plan`).

    Args:
        refused: why `train` would stop on this machine.
    """
    script_args, args, model_args, dataset_args = configs
    if message := finished(args):
        return message
    find_checkpoint(args)
    data = load_data(script_args, args, model_args, dataset_args)
    check_data(script_args, args, model_args, *data)
    return plan(args, model_args, *data, launch_args, refused)


def save_model(trainer: EAFTTrainer, output_dir: Path) -> None:
    """Save the final model beside its place and move it there whole."""
    staging = output_dir / "saving"
    # By default FSDP2 saves shards, which `from_pretrained` does not read
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for path in staging.iterdir():
            os.replace(path, output_dir / path.name)
        staging.rmdir()
