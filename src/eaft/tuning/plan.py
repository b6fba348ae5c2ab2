"""Everything that `eaft tune` checks and decides before anything is trained."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from datasets import Dataset
from pydantic import ConfigDict, with_config
from transformers.trainer_utils import IntervalStrategy
from trl import get_peft_config
from typing_extensions import TypedDict

from eaft.errors import ConfigurationError
from eaft.evaluation.comparable import (
    check_measurable,
    check_template_adds_nothing,
    comparable_models,
)
from eaft.evaluation.drift import read_prompts
from eaft.evaluation.identity import digest, tasks_digest, tokenizer_digest, weights_digest
from eaft.evaluation.measured_model import MeasuredModel
from eaft.evaluation.model_settings import load_tokenizer
from eaft.evaluation.paired import FEWEST_PROMPTS
from eaft.evaluation.protocol import PROMPTS, Protocol
from eaft.evaluation.suite import Benchmark, load_suites
from eaft.files import Count, FiniteNotNegative, Positive, check, read_json, read_jsonl, read_yaml
from eaft.models import resolve_model
from eaft.processes import LOCK_FILE, check_place
from eaft.provenance import versions
from eaft.training.apart import (
    TRAINS,
    file_digest,
    local_files,
)
from eaft.training.arguments import parse
from eaft.training.data import check_data, load_data, load_rows, row_digest, rows_digest
from eaft.training.family import check_adapter
from eaft.training.held_out import Row, check_fit, prepare
from eaft.training.run_folder import TUNED_RUN
from eaft.tuning.rows import hold_out, split_held_out

MARK = "tune.json"  # what a folder holds, finished or not
WORK, RUN = TUNED_RUN.parts  # a folder of the run and of what was measured; the run
EXCLUDED = "excluded_rows.jsonl"  # numbers of rows of the data that are not trained on
WATCHED = "screening_rows.jsonl"  # whose nll stops training
WAY = "delete this folder, or choose another --output_dir."
SCREENING_FILE = Path(__file__).with_name("screening_prompts.jsonl")
# The recipe, where the user's flags and YAML say nothing else. Plain SFT: on what we measured,
# interpolation saves more than any objective (docs/tuning.md)
DEFAULTS: dict[str, Any] = {
    "gate": "sft",
    "save_strategy": "steps",
    "save_steps": 0.25,  # of all steps: four checkpoints
    "logging_steps": 10,
}
# Checkpoints in a row without a lower held-out nll after which training stops. The budget stops
# nothing: a checkpoint over it, interpolated back, has often learned most (docs/tuning.md)
PATIENCE = 2
# Flags of `eaft train` that do not go with this command, and why
NOT_HERE = {
    "save_only_model": "a run that is killed could not go on",
    "load_best_model_at_end": "eaft tune chooses the model",
    "select_checkpoint": "eaft tune chooses the model",
    "forgetting_eval_steps": "eaft tune measures drift after training",
    "forgetting_budget": "the budget is --max_drift",
    "push_to_hub": "it would push the run's last checkpoint, not the chosen model",
    "hub_token": "nothing is pushed, and the token would be written into the results",
    "save_total_limit": "every checkpoint is a candidate",
    "held_out": "in a recipe it is of eaft train; eaft tune has a flag of this name",
}
FREE = ("output_dir", "keep_checkpoints")  # settings that change no result


@with_config(ConfigDict(extra="allow"))
class ExcludedRow(TypedDict):
    """A line of --exclude_examples, as far as it is read here."""

    row: int


@dataclass(frozen=True)
class Settings:
    """
    The flags of `eaft tune` itself.

    Attributes:
        max_drift: a budget (nats per token); None: any drift.
        max_drop: a budget (percentage points, of each task of `suite`); None: no tasks are run.
        suite, data_dir, include_path, limit: the tasks, as `eaft eval` takes them.
        strict: return a model only if the bound on its drift is within the budget.
        held_out: a file of held-out rows; None: rows of the data.
        prompts: a file of prompts for drift, split into both parts; None: our everyday requests.
        screening_prompts, confirmation_prompts: how many, at most.
        max_new_tokens: of the base model's answers.
        output_dir: where everything goes.
        keep_checkpoints: do not delete the run's weights at the end.
    """

    max_drift: float | None
    max_drop: float | None = None
    suite: list[str] = field(default_factory=list)
    data_dir: str | None = None
    include_path: str | None = None
    limit: int | None = None
    strict: bool = False
    held_out: str | None = None
    prompts: str | None = None
    screening_prompts: int = 64
    confirmation_prompts: int = 128
    max_new_tokens: int = Protocol.max_new_tokens
    output_dir: str = "tuned"
    keep_checkpoints: bool = False

    @property
    def drift_limit(self) -> float:
        """The budget of drift; infinite if any is allowed."""
        return math.inf if self.max_drift is None else self.max_drift


@dataclass(frozen=True)
class Plan:
    """
    Everything that is known before anything is trained.

    Attributes:
        configs: as `eaft.training.train.train` takes them.
        arguments: of `eaft train`.
        base: the base model, to be measured; `protocol`: as asked for, before a model completes it.
        options: of the base model, as `from_pretrained` takes them.
        excluded: rows of the data that are not trained on, as `exclude_rows` reads them.
        held_out: raw rows of screening and confirmation; `rows`: as training prepares them.
        watched: whether the nll of screening's rows may stop training.
        prompts: of screening and confirmation.
        benchmarks: the tasks of --max_drop.
        training_rows, left_out: see `Data`.
        identity: what the results depend on.
    """

    configs: list[Any]
    arguments: list[str]
    base: MeasuredModel
    protocol: Protocol
    options: dict[str, Any]
    excluded: list[dict[str, Any]]
    held_out: list[Dataset]
    watched: bool
    rows: list[list[Row]]
    prompts: list[list[Any]]
    benchmarks: dict[str, Benchmark]
    training_rows: int
    left_out: int
    identity: dict[str, Any]


def check_settings(settings: Settings) -> None:
    """
    Check the flags of `eaft tune` itself, and what is installed.

    Raises:
        ConfigurationError: a value out of its bounds, a missing package, or a launcher.
    """
    check(Positive | None, settings.max_drift, "--max_drift")
    check(FiniteNotNegative | None, settings.max_drop, "--max_drop")
    check(Count | None, settings.limit, "--limit")
    if settings.max_drift is None and settings.max_drop is None:
        raise ConfigurationError(
            "A budget is missing: give --max_drift NATS, or --max_drop POINTS with --suite NAME."
        )
    if (settings.max_drop is None) != (not settings.suite):
        raise ConfigurationError("--max_drop and --suite go together: give both, or neither.")
    for name in ("screening_prompts", "confirmation_prompts", "max_new_tokens"):
        value = check(Count, getattr(settings, name), f"--{name}")
        if value < 2 and name != "max_new_tokens":
            raise ConfigurationError(f"--{name}={value}: how sure a mean is takes 2 or more.")
    check_place(Path(settings.output_dir), "--output_dir")
    for package in ("lm_eval", "matplotlib", "scipy", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise ConfigurationError(f"eaft tune needs {package}: pip install 'eaft[eval]'.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(
            "eaft tune starts the training itself: start it without a launcher, and give it the"
            " launcher's flags (--num_processes 8, --accelerate_config fsdp2)."
        )


def make_plan(settings: Settings, train_flags: list[str], day: str) -> Plan:
    """
    Check everything, split the rows, and return the plan.

    Raises:
        ConfigurationError: something is wrong.
    """
    folder = Path(settings.output_dir)
    given, recipe = named(train_flags), {}
    if "--config" in train_flags[:-1]:
        path = train_flags[train_flags.index("--config") + 1]
        recipe = read_yaml(path, f"--config {path}")
        given |= recipe.keys()
    arguments = [*train_flags]
    own = bool(given & {"eval_strategy", "dataset_test_split"})  # evaluations of the user's own
    for name, value in DEFAULTS.items():
        if name not in given:
            arguments += [f"--{name}", str(value)]
    arguments += ["--output_dir", str(folder / WORK / RUN)]
    (*configs, dry), _, _ = parse(arguments)
    script_args, args, model_args, dataset_args = configs
    check_train_flags(args, model_args, dry, given)
    if not own and "early_stopping_patience" not in given:
        args.early_stopping_patience = PATIENCE
        arguments += ["--early_stopping_patience", str(PATIENCE)]
    watched = args.early_stopping_patience > 0 and not own
    if watched:
        args.eval_strategy = IntervalStrategy.NO  # here; training evaluates on screening's rows
    data, _ = load_data(*configs)
    if not isinstance(data, Dataset):
        raise ConfigurationError("DATA is a stream: leave --dataset_streaming out.")
    text, seed = args.dataset_text_field, args.seed
    whole, before = data, set[int]()
    if args.exclude_examples is not None:  # `data` has been checked against it
        whole, _ = load_data(script_args, without_exclusion(args), model_args, dataset_args)
        lines = read_jsonl(
            Path(args.exclude_examples).expanduser(), ExcludedRow, "export it again."
        )
        before = {line["row"] for line in lines}
    kept = [i for i in range(len(whole)) if i not in before]
    if settings.held_out is None:
        split = hold_out(data, text, seed)
        parts = [split.screening, split.confirmation]
        held_out, left_out = [data.select(part) for part in parts], 0
        out = {kept[i] for part in parts for i in part}
        training_rows = len(data) - len(parts[0]) - len(parts[1])
    else:
        file = load_rows(settings.held_out, text, "--held_out")
        first, second, left_out = split_held_out(file, data, text, seed)
        held_out, out = [file.select(first), file.select(second)], set()
        training_rows = len(data)
    gone = sorted(before | out)
    excluded = [{"row": row, "digest": row_digest(whole[row])} for row in gone]
    check_data(script_args, args, model_args, data, None)

    model = resolve_model(str(model_args.model_name_or_path), args.trust_remote_code)
    options = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    protocol = Protocol(
        max_new_tokens=settings.max_new_tokens,
        model_args={k: v for k, v in options.items() if v and v != "main"},
    )
    check_template_adds_nothing(
        args.chat_template_path, model, "--chat_template_path", protocol.model_args
    )
    base, _ = comparable_models(model, None, protocol, drift=True)
    prompts = split_prompts(settings, seed)
    check_replayed(args, prompts)
    few = len(prompts[1]) < FEWEST_PROMPTS
    if settings.strict and settings.max_drift is not None and few:
        raise ConfigurationError(
            f"--strict: {len(prompts[1])} prompts cannot show that a drift is within the budget:"
            f" give {FEWEST_PROMPTS} or more to confirm on (--confirmation_prompts, --prompts)."
        )
    benchmarks: dict[str, Benchmark] = {}
    if settings.suite:
        _, benchmarks = load_suites(
            settings.suite, settings.include_path, settings.data_dir, settings.limit
        )
    check_measurable([base], benchmarks, [prompt for part in prompts for prompt in part])
    prepared = []
    for i, part in enumerate(held_out):
        rows_of_part = prepare(part, configs, model, "held-out rows")
        check_fit(rows_of_part, model, protocol.model_args, "held-out rows")
        labelled = [number for number, row in enumerate(rows_of_part) if row["input_ids"]]
        held_out[i] = part.select(labelled)
        prepared.append([rows_of_part[number] for number in labelled])
        if len(labelled) < 2:
            raise ConfigurationError(
                "Fewer than 2 held-out rows of a part have a labelled token: raise --max_length, or"
                " give more rows with --held_out."
            )
    arguments += ["--model_name_or_path", model, "--template_date", day]
    if excluded:
        arguments += ["--exclude_examples", str(folder / WORK / EXCLUDED)]
    if watched:
        arguments += ["--held_out", str(folder / WORK / WATCHED)]
    # Parsing the flags of training has set up its processes; measuring has its own
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = {name: getattr(args, name) for name in ("gate", "replay_prompts", "chat_template_path")}
    known: dict[Path, str] = {}
    files = {name: file_digest(path, known) for name, path in local_files(flags).items()}
    identity = {
        "settings": {k: v for k, v in asdict(settings).items() if k not in FREE},
        "train_flags": train_flags,
        "recipe": digest(recipe),
        "model": [
            weights_digest(model, model_args.model_revision),
            tokenizer_digest(load_tokenizer(model, protocol.model_args)),
        ],
        "data": rows_digest(whole),
        "held_out": [rows_digest(part) for part in held_out],
        "excluded": digest(excluded),
        "prompts": digest(prompts),
        "tasks": {
            name: tasks_digest(benchmark.tasks, benchmark.limit, None)
            for name, benchmark in benchmarks.items()
        },
        "files": files,
        "versions": versions(TRAINS),
        "template_date": day,
    }
    return Plan(
        configs=configs,
        arguments=arguments,
        base=base,
        protocol=protocol,
        options=options,
        excluded=excluded,
        held_out=held_out,
        watched=watched,
        rows=prepared,
        prompts=prompts,
        benchmarks=benchmarks,
        training_rows=training_rows,
        left_out=left_out,
        identity=json.loads(json.dumps(identity, default=str)),
    )


def named(train_flags: list[str]) -> set[str]:
    """Return the names of flags; of the ones that matter here also where they are abbreviated."""
    flags = [flag for flag in train_flags if flag.startswith("--")]
    given = {flag.partition("=")[0][2:].replace("-", "_") for flag in flags}
    known = {*DEFAULTS, *NOT_HERE, "eval_strategy", "dataset_test_split", "early_stopping_patience"}
    return given | {name for name in known if any(name.startswith(flag) for flag in given)}


def without_exclusion(args: Any) -> Any:
    """Return training's arguments without `exclude_examples`."""
    args = copy.copy(args)
    args.exclude_examples = None
    return args


def check_train_flags(args: Any, model_args: Any, dry: Any, given: set[str]) -> None:
    """
    Refuse flags of `eaft train` that do not go with this command.

    Raises:
        ConfigurationError: there is one.
    """
    for name, why in NOT_HERE.items():
        if name in given and getattr(args, name) not in (None, False, 0):
            raise ConfigurationError(f"--{name} does not go with eaft tune: {why}. Leave it out.")
    for name in ("resume_from_checkpoint", "template_date"):
        if name in given:
            raise ConfigurationError(
                f"--{name} does not go with eaft tune: the same command goes on by itself."
            )
    if dry.dry_run:
        model = model_args.model_name_or_path
        raise ConfigurationError(
            "--dry_run does not go with eaft tune; its training is planned by: eaft train"
            f" --model_name_or_path {model} --dataset_name DATA --output_dir {args.output_dir}"
            " --dry_run"
        )
    if str(args.save_strategy.value) not in ("steps", "epoch"):
        raise ConfigurationError(
            f"--save_strategy={args.save_strategy.value}: checkpoints are the candidates; choose"
            " steps or epoch."
        )
    peft = get_peft_config(model_args)
    if peft is not None:
        check_adapter(peft.to_dict())


def split_prompts(settings: Settings, seed: int) -> list[list[Any]]:
    """
    Return the prompts of screening and of confirmation, none in both.

    Raises:
        ConfigurationError: a file of prompts has fewer than four.
    """
    sizes = settings.screening_prompts, settings.confirmation_prompts
    if settings.prompts is None:
        return [read_prompts(str(SCREENING_FILE), sizes[0]), read_prompts(str(PROMPTS), sizes[1])]
    prompts = read_prompts(settings.prompts, sum(sizes))
    unique = list({json.dumps(prompt, sort_keys=True): prompt for prompt in prompts}.values())
    if len(unique) < 4:
        raise ConfigurationError(
            f"--prompts {settings.prompts}: {len(unique)} different prompts, and two parts need 4"
            " or more."
        )
    first = max(2, min(sizes[0], round(len(unique) * sizes[0] / sum(sizes))))
    return [unique[:first], unique[first:]]


def check_replayed(args: Any, prompts: list[list[Any]]) -> None:
    """
    Check that training does not replay answers to the prompts that drift is measured on.

    Raises:
        ConfigurationError: it does.
    """
    if not args.replay:
        return
    replayed, measured = (
        {json.dumps(prompt, sort_keys=True) for prompt in some}
        for some in (read_prompts(args.replay_prompts, sys.maxsize), [*prompts[0], *prompts[1]])
    )
    if both := len(replayed & measured):
        raise ConfigurationError(
            f"--replay_prompts={args.replay_prompts!r} has {both} of the prompts that drift is"
            " measured on, and drift on what is trained on says too little: give other --prompts."
        )


def check_folder(folder: Path, identity: dict[str, Any]) -> None:
    """
    Refuse a folder that holds something else.

    Raises:
        ConfigurationError: it does; names what changed.
    """
    mark = folder / MARK
    if not mark.is_file():
        if folder.exists() and any(
            p.name not in (LOCK_FILE, f"{MARK}.tmp") for p in folder.iterdir()
        ):
            raise ConfigurationError(
                f"--output_dir={str(folder)!r} was not made by eaft tune: choose another folder."
            )
        return
    old = read_json(mark, dict[str, Any], WAY)
    if changed := [name for name in {**old, **identity} if old.get(name) != identity.get(name)]:
        raise ConfigurationError(
            f"--output_dir={str(folder)!r} holds another run: {', '.join(changed)} changed since."
            f" To go on, give the same command; else {WAY}"
        )
