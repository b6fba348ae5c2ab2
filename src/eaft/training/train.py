"""
`eaft train`: what `trl sft` does, with a gate. The output folder loads with `from_pretrained`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired

import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import Dataset
from pydantic import ConfigDict, with_config
from transformers import TrainerCallback
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)
from typing_extensions import TypedDict

from eaft.errors import ConfigurationError, nearest
from eaft.evaluation.measured_model import shared, write_jsonl
from eaft.evaluation.scores import load_tokenizer, processes
from eaft.files import read_json, read_yaml
from eaft.models import (
    check_finite,
    check_vocabulary,
    loading,
    noted_date,
    resolve_model,
    template_date,
    template_today,
    text_config,
)
from eaft.objective.gate_flags import gates_help
from eaft.processes import check_place, locked
from eaft.provenance import environment, peak_memory_gib, write_json
from eaft.text import visible
from eaft.training.bounds import MIXTURE, MODEL, check_bounds, check_types
from eaft.training.config import EAFTConfig
from eaft.training.data import exclude_rows, load_splits, select_split
from eaft.training.plan import DryRunArguments, plan
from eaft.training.replay import REPLAY_FILE, check_replay, replayed_rows
from eaft.training.row_checks import check_ids
from eaft.training.templates import Finding, check_templates, told
from eaft.training.trainer import EAFTTrainer
from eaft.training.trl_internals import resolve_accelerate_config_argument, subtract_subsequence

DESCRIPTION = """
Fine-tune a language model with a gate on each token's loss. Takes the flags and the YAML of `trl
sft`, plus --gate, --gate_alpha, --gate_entropy, --gate_top_k and --gate_kwargs. Flags override the
YAML file.

  eaft train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --output_dir out
  eaft train --config recipe.yaml --gate sft --output_dir out-sft
  eaft train --config recipe.yaml --gate eaft-sigmoid --gate_kwargs '{"steepness": 20}' --output_dir out-sigmoid
  torchrun --nproc_per_node 8 -m eaft train --config recipe.yaml
  accelerate launch --config_file fsdp2.yaml -m eaft train --config recipe.yaml
  eaft train --config recipe.yaml --dry_run         check it, count tokens, estimate memory and time; train nothing

gates (g: entropy / ln K, in [0, 1]; each with its parameters: formulas, needs and costs in
docs/objectives.md):
"""  # noqa: E501
LAUNCHED = "EAFT_LAUNCHED"  # set for the processes that accelerate starts for us
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
DELETE = "delete the folder, or choose another output_dir."
# What stays the same when a run goes on: the checkpoint's optimizer and schedule keep the first of
# them whatever is given (findings/trainer_resume_settings.sh), and `run.json` has one value of each
STAYS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("gate", "gate_alpha", "gate_entropy", "gate_top_k", "gate_kwargs"),
    *("seed", "data_seed", "replay", "max_length", "packing"),
)


@with_config(ConfigDict(extra="allow"))
class RunRecord(TypedDict):
    """What is read again of `run.json`; `result` is there once the run is finished."""

    finished: bool
    environment: NotRequired[dict[str, Any]]
    config: NotRequired[dict[str, Any]]
    result: NotRequired[dict[str, Any]]


def make_parser() -> TrlParser:
    """Return the parser of `eaft train`."""
    return TrlParser(
        (ScriptArguments, EAFTConfig, ModelConfig, DatasetMixtureConfig, DryRunArguments),
        prog="eaft train",
        usage=(
            "eaft train --model_name_or_path MODEL --dataset_name DATA --output_dir DIR [--config"
            " FILE] [flags]"
        ),
        description=DESCRIPTION + gates_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(argv: list[str]) -> None:
    """
    Train, or plan it, as the flags say. Flags of `accelerate launch` start it through that, as `trl
    sft` does.
    """
    if {"--dry_run", "--dry-run"} & set(argv) and not torch.accelerator.is_available():
        argv = [*argv, "--use_cpu", "true"]  # else bf16 is refused here, where it need not run
    (*configs, dry), launch_args, train_args = parse(argv)
    if dry.dry_run:
        print(visible(dry_run(configs, launch_args)))
    elif not launch("train", launch_args, train_args):
        args = configs[1]
        resume = str(args.resume_from_checkpoint or "false")
        folder = Path(args.output_dir) if resume.lower() == "true" else Path(resume).parent
        with run_date(args, folder / RUN_FILE if resume.lower() != "false" else None):
            train(*configs)


@contextlib.contextmanager
def run_date(args: EAFTConfig, run_file: Path | None) -> Iterator[None]:
    """
    Let chat templates write one date for a whole run, and note it in its arguments.

    Args:
        run_file: `run.json` of a run that is gone on with, whose date stays.

    Raises:
        ConfigurationError: `template_date` is no date.
    """
    noted = shared(
        lambda: (
            (noted_date(run_file, "config") if run_file is not None else None) or template_today()
        )
    )
    args.template_date = args.template_date or noted
    with template_date(args.template_date):
        yield


def launch(command: str, launch_args: list[str], command_args: list[str]) -> bool:
    """
    Run a command through `accelerate launch` if flags or several GPUs ask for it; return whether
    that was done.
    """
    launched = "RANK" in os.environ or LAUNCHED in os.environ
    if launched or not (launch_args or torch.cuda.device_count() > 1):
        return False
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(
            launch_command_parser().parse_args([*launch_args, "-m", "eaft", command, *command_args])
        )
    except subprocess.CalledProcessError as error:  # it has said why
        raise SystemExit(error.returncode) from None
    return True


def parse(
    argv: list[str], parser: TrlParser | None = None, recipe_launches: bool = True
) -> tuple[list[Any], list[str], list[str]]:
    """
    Return the arguments of `train`, the flags meant for `accelerate launch`, and the other flags.

    Args:
        parser: of another command that takes these flags.
        recipe_launches: whether the YAML file's settings for `accelerate launch` count too.

    Raises:
        ConfigurationError: an unknown flag, a value of the wrong type, a YAML file that cannot be
            read.
    """
    parser = parser or make_parser()
    if "--config" in argv[:-1]:
        path = argv[argv.index("--config") + 1]
        check_types(read_yaml(path, f"--config {path}"), parser.dataclass_types, path)
    try:
        *configs, yaml_rest, flags_rest = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        launch_args = resolve_accelerate_config_argument(
            (yaml_rest if recipe_launches else []) + flags_rest
        )
    except (
        OSError,
        ValueError,
        TypeError,
    ) as error:  # transformers' and TRL's own complaints about flags
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(" ".join(str(error).split())) from error
    check_bounds(configs[2], MODEL)
    check_bounds(configs[3], MIXTURE)
    check_place(Path(configs[1].output_dir), "output_dir")
    known_args, unknown = launch_command_parser().parse_known_args([*launch_args, "script"])
    if flags := [flag for flag in unknown if flag.startswith("-")]:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ConfigurationError(
            f"{flags[0]} is unknown.{nearest(flags[0], known)} See {parser.prog} --help."
        )
    if known_args.training_script != "script":
        raise ConfigurationError(
            f"{known_args.training_script!r} belongs to no flag. See {parser.prog} --help."
        )
    return configs, launch_args, subtract_subsequence(argv, flags_rest)


def train(
    script_args: ScriptArguments,
    args: EAFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Train, and write the model, its card, `metrics.jsonl` and `run.json` to `args.output_dir`.

    Everything that can be wrong with the input is found before the folder is touched.
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
            replayed = replayed_rows(train_dataset, model, args) if args.replay else []
            trainer = EAFTTrainer(
                model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                quantization_config=get_quantization_config(model_args),
                peft_config=get_peft_config(model_args),
                replayed=(
                    Dataset.from_list(replayed).select_columns(["input_ids", "labels"])
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
        if replayed and trainer.is_world_process_zero():
            write_jsonl(output_dir / REPLAY_FILE, replayed)
        fit(trainer, checkpoint, script_args, args, model_args, dataset_args)


def check_model(model: str, args: EAFTConfig, model_args: ModelConfig, dataset: Any) -> None:
    """
    Check what can be known of a model without its weights: that its tokenizer and the data's token
    ids are its own.

    Raises:
        ConfigurationError: they are not, or there is no tokenizer.
    """
    source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    tokenizer, size = load_tokenizer(model, source), text_config(model, source).vocab_size
    check_vocabulary(model, tokenizer, size)
    check_ids(dataset, size, "the data")


def model_init_kwargs(args: EAFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Return what the model is loaded with."""
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
    Train from a checkpoint or afresh, and write everything, in a folder that is this run's alone.
    """
    output_dir = Path(args.output_dir)
    run = {
        "finished": False,
        "model": model_args.model_name_or_path,
        "dataset": script_args.dataset_name or [vars(d) for d in dataset_args.datasets],
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
            "train_loss": result.metrics.get(
                "train_loss"
            ),  # None: all was trained before, and its loss not logged
            "train_runtime_s": runtime,  # with evaluation and saving; since the last resumption
            "tokens_per_s": trainer._total_train_tokens / runtime,
            "peak_memory_gib": peak_memory_gib(),
        }
        write_json(output_dir / RUN_FILE, {**run, "finished": True})
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()  # `Trainer.end` is this, and new in transformers 5.18


def dry_run(configs: list[Any], launch_args: list[str]) -> str:
    """
    Check what `train` checks of its four arguments, and return the plan (`eaft.training.plan`).
    """
    script_args, args, model_args, dataset_args = configs
    if message := finished(args):
        return message
    find_checkpoint(args)
    data = load_data(script_args, args, model_args, dataset_args)
    check_data(script_args, args, model_args, *data)
    return plan(args, model_args, *data, launch_args)


def load_data(
    script_args: ScriptArguments,
    args: EAFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> tuple[Any, Any]:
    """
    Return the training data and, if it is to be evaluated on, the held-out data, before a model is
    loaded or converted.

    Raises:
        ConfigurationError: no model or no data is named, or the data cannot be used.
    """
    if model_args.model_name_or_path is None:
        raise ConfigurationError(
            "model_name_or_path is missing: give a Hub id, a folder or a .gguf file."
        )
    splits = load_splits(script_args, dataset_args)
    names = [(script_args.dataset_train_split, "dataset_train_split")]
    if args.eval_strategy != "no":
        names.append((script_args.dataset_test_split, "dataset_test_split"))
    found = [select_split(splits, split, flag, args.dataset_text_field) for split, flag in names]
    if args.exclude_examples is not None:
        found[0] = exclude_rows(found[0], args.exclude_examples)
    if args.replay:
        check_replay(found[0], args)
    return found[0], found[1] if len(found) > 1 else None


def check_data(
    script_args: ScriptArguments,
    args: EAFTConfig,
    model_args: ModelConfig,
    train_dataset: Any,
    eval_dataset: Any,
) -> list[Finding]:
    """
    Print the findings of `check_templates`, and return those about the training data.

    Raises:
        ConfigurationError: the chat template raises on a row.
    """
    names = {"dataset_train_split": train_dataset, "dataset_test_split": eval_dataset}
    rows = {f"{flag}={getattr(script_args, flag)!r}": data for flag, data in names.items()}
    findings = check_templates(rows, args, model_args)
    if processes().is_main_process:
        print(told(findings), end="", file=sys.stderr)
    return findings.get(next(iter(rows)), [])


def finished(args: EAFTConfig) -> str | None:
    """
    Return what to say of a run that is to be resumed and is at its end already, so that nothing is
    to be done.

    It goes on if more steps or epochs are asked for than before, or an earlier checkpoint of its
    own.
    """
    folder, resume = Path(args.output_dir), str(args.resume_from_checkpoint or "false")
    file = folder / RUN_FILE
    if resume.lower() == "false" or not file.is_file() or not list(folder.glob("*.safetensors")):
        return None
    run = read_json(file, RunRecord, DELETE)
    if not run["finished"]:
        return None
    last = last_complete_checkpoint(folder)
    if resume.lower() != "true":
        own = Path(resume).resolve().parent == folder.resolve()
        if own and last is not None and Path(resume).resolve() != Path(last).resolve():
            return None
    before = [
        run["config"].get(name, getattr(EAFTConfig, name))
        for name in ("max_steps", "num_train_epochs")
    ]
    if (args.max_steps, args.num_train_epochs) != tuple(before):
        more_steps = args.max_steps > run["result"]["steps"]
        more_epochs = args.max_steps < 1 and (before[0] > 0 or args.num_train_epochs > before[1])
        if more_steps or more_epochs:
            return None
    return (
        f"output_dir={args.output_dir!r} holds this run, finished after {run['result']['steps']}"
        " steps; nothing was changed. To train further, raise max_steps or num_train_epochs; to"
        " train anew, choose another output_dir or delete this one."
    )


def find_checkpoint(args: EAFTConfig) -> str | None:
    """
    Return the checkpoint to resume from, or None for a fresh start in a folder that holds no other
    run.

    With `resume_from_checkpoint` true a run that was killed before its first checkpoint, or was
    never begun, starts
    afresh: the same command can be given again until it ends.

    Raises:
        ConfigurationError: the folder holds another run, there is nothing to resume from, or the
            run had other settings.
    """
    folder, resume = Path(args.output_dir), str(args.resume_from_checkpoint or "false")
    if resume.lower() not in ("true", "false"):
        if not is_complete(Path(resume)):
            raise ConfigurationError(
                f"resume_from_checkpoint={resume!r} is no complete checkpoint."
            )
        check_settings(args, Path(resume).parent)
        return resume
    if resume.lower() == "true":
        if checkpoint := last_complete_checkpoint(folder):
            check_settings(args, folder)
            return checkpoint
        run = folder / RUN_FILE
        if run.is_file() and not read_json(run, RunRecord, DELETE)["finished"]:
            return None
    held = [RUN_FILE, METRICS_FILE, "config.json", "adapter_config.json", "checkpoint-*"]
    if found := [path.name for pattern in held for path in folder.glob(pattern)]:
        way = "has no complete checkpoint" if resume.lower() == "true" else "holds another run"
        raise ConfigurationError(
            f"output_dir={args.output_dir!r} {way} ({found[0]}): choose another folder, delete this"
            " one, or go on with a run that was stopped by --resume_from_checkpoint true."
        )
    return None


def check_settings(args: EAFTConfig, folder: Path) -> None:
    """
    Check that a run goes on with the settings that it was begun with (`STAYS`).

    Args:
        folder: of the run that is resumed; without a `run.json`, nothing is known of its settings.

    Raises:
        ConfigurationError: one of them is another now.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        return
    before = read_json(file, RunRecord, DELETE).get("config", {})
    after = changed_arguments(args)
    for name in STAYS:
        default = getattr(EAFTConfig, name, None)
        old, new = (settings.get(name, default) for settings in (before, after))
        if old != new:
            raise ConfigurationError(
                f"{name}={new!r}: the run that is resumed ({str(folder)!r}) was begun with {old!r},"
                f" and a run has one {name}. Give {old!r} again, or begin another run in another"
                " output_dir (it may take a checkpoint of this one as its model_name_or_path)."
            )


def last_complete_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written whole."""
    complete = [path for path in folder.glob("checkpoint-*") if is_complete(path)]
    return (
        str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None
    )


def is_complete(checkpoint: Path) -> bool:
    """
    Return whether a checkpoint was written whole: the trainer writes `trainer_state.json` last.

    Raises:
        ConfigurationError: that file is whole, and not a trainer's.
    """
    file = checkpoint / "trainer_state.json"
    try:
        state = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise ConfigurationError(
            f"{file} has no global_step, so it is no trainer's state: delete this checkpoint."
        )
    return True


def save_model(trainer: EAFTTrainer, output_dir: Path) -> None:
    """Save the final model beside its place and move it there whole."""
    staging = output_dir / "saving"
    if (
        trainer.is_fsdp_enabled
    ):  # by default FSDP2 saves shards, which `from_pretrained` does not read
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for path in staging.iterdir():
            os.replace(path, output_dir / path.name)
        staging.rmdir()


def changed_arguments(args: EAFTConfig) -> dict[str, Any]:
    """Return the training arguments that differ from their defaults, as JSON values."""
    values, changed = args.to_dict(), {}
    for field in dataclasses.fields(args):
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        if field.name in values and values[field.name] != default:
            changed[field.name] = values[field.name]
    return json.loads(json.dumps(changed, default=str))


class MetricsFile(TrainerCallback):
    """
    Appends every log of the trainer to a JSON Lines file; a resumed run drops what lies after its
    checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.first_step = path, 0
        self.loss: float | None = None  # of a run that had come to its end before

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step training starts at."""
        self.first_step = state.global_step
        if state.is_world_process_zero:
            lines = self.path.read_text().split("\n") if self.path.exists() else []
            # What follows the last line's end is empty, or what a killed run did not get written
            logs = {line: json.loads(line) for line in lines[:-1]}
            self.loss = next(
                (log["train_loss"] for log in logs.values() if "train_loss" in log), None
            )
            # The end's summary is written again
            kept = [
                line
                for line, log in logs.items()
                if log["step"] <= state.global_step and "train_loss" not in log
            ]
            staging = self.path.with_suffix(".tmp")
            staging.write_text("".join(line + "\n" for line in kept))
            os.replace(staging, self.path)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Append one line; a summary of no steps has the loss of those before, if it was logged."""
        if logs is not None and "train_loss" in logs and state.global_step == self.first_step:
            del logs["train_loss"]
            logs |= {} if self.loss is None else {"train_loss": self.loss}
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
