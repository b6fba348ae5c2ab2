"""
The recipe of a comparison: its fields, and the runs of `eaft train` that it describes; checked
before any of them begins.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from datasets import Dataset
from pydantic import ConfigDict, Field, with_config
from trl import get_peft_config

from eaft.errors import ConfigurationError, nearest
from eaft.evaluation.drift import read_prompts
from eaft.evaluation.protocol import PROMPTS, Protocol
from eaft.files import Count, Positive, Seed, Text, check, read_yaml
from eaft.models import resolve_model
from eaft.provenance import versions
from eaft.training.apart import TRAINS, file_digest, local_files, parse_flags
from eaft.training.data import load_data, load_rows
from eaft.training.family import check_adapter
from eaft.training.held_out import check_apart
from eaft.training.template_checks import check_templates, told
from eaft.training.train import check_model

HELD_OUT = "evaluate.held_out"  # as messages call it
REFERENCE = "sft"  # what every objective is compared with, where the recipe names no pairs
STRICT = ConfigDict(extra="forbid", revalidate_instances="always")


@with_config(STRICT)
@dataclass(kw_only=True)
class EvaluateConfig(Protocol):
    """How each model is measured (the fields of `Protocol`), and on what."""

    target_tasks: list[Text] = field(default_factory=list)
    general_tasks: list[Text] = field(default_factory=list)
    every_checkpoint_tasks: list[Text] = field(default_factory=list)
    general_prompts: Text = str(PROMPTS)
    target_prompts: Text | None = None
    held_out: Text | None = None
    interpolations: list[Annotated[float, Field(gt=0, lt=1)]] = field(default_factory=list)
    include_path: Text | None = None
    data_dir: Text | None = None
    limit: Count | None = None

    @property
    def protocol(self) -> Protocol:
        """How each model is measured."""
        return Protocol(**{f.name: getattr(self, f.name) for f in fields(Protocol)})

    @property
    def prompts(self) -> dict[str, list[Any]]:
        """The prompts whose answers drift is measured on, by kind."""
        files = {"general": self.general_prompts, "target": self.target_prompts}
        return {
            kind: read_prompts(file, self.drift_prompts)
            for kind, file in files.items()
            if file is not None
        }


@with_config(STRICT)
@dataclass
class Recipe:
    """A comparison; see `eaft compare --help`."""

    output_dir: Text
    objectives: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    train: dict[str, Any]
    evaluate: EvaluateConfig
    seeds: Annotated[list[Seed], Field(min_length=1)] = field(default_factory=lambda: [0])
    learning_rates: Annotated[list[Positive], Field(min_length=1)] | None = None
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None
    keep_checkpoints: Literal["all", "chosen"] = "all"

    @property
    def compared(self) -> list[tuple[str, str]]:
        """The pairs of objectives to compare: the named pairs, or each objective with `sft`."""
        if self.pairs is not None:
            return [(first, second) for first, second in self.pairs]
        names = [name for name in self.objectives if name != REFERENCE]
        return [(name, REFERENCE) for name in names] if REFERENCE in self.objectives else []


@dataclass(frozen=True)
class Run:
    """
    One training of a comparison.

    Attributes:
        objective, seed: what it trains with.
        learning_rate: one of the recipe's; None where it names none.
        folder: where it is.
        flags: of `eaft train`.
        identity: what it depends on, without paths: the same on each machine.
    """

    objective: str
    seed: int
    learning_rate: float | None
    folder: Path
    flags: dict[str, Any] = field(hash=False)
    identity: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.folder.name


def read_recipe(path: str, overrides: dict[str, Any]) -> Recipe:
    """
    Read and check a recipe.

    Args:
        overrides: fields that replace the recipe's, if they are not None. `objectives` names some
            of its objectives; `model_name_or_path` and `dataset_name` go into `train`, and
            `held_out` into `evaluate`.

    Raises:
        ConfigurationError: it cannot be read, or a field is unknown, missing or useless.
    """
    content = read_yaml(path, f"--config {path}")
    recipe = check(Recipe, content, path)
    for name in ("target_tasks", "general_tasks"):
        if content["evaluate"].get(name) == []:
            raise ConfigurationError(
                f"{path}: evaluate: {name}: []: name a task, or leave {name} out."
            )
    chosen = {name: value for name, value in overrides.items() if value is not None}
    for name in ("model_name_or_path", "dataset_name"):
        if name in chosen:
            recipe.train[name] = chosen.pop(name)
    if "held_out" in chosen:
        recipe.evaluate.held_out = chosen.pop("held_out")
    if (names := chosen.pop("objectives", None)) is not None:
        check_names("--objectives", names, recipe.objectives)
        recipe.objectives = {name: recipe.objectives[name] for name in names}
        recipe.pairs = recipe.pairs and [pair for pair in recipe.pairs if set(pair) <= set(names)]
    for name, value in chosen.items():
        setattr(recipe, name, value)
    # What is trained is also what is measured
    places = {"model_revision": "revision", "trust_remote_code": "trust_remote_code"}
    trained = {place: recipe.train[name] for name, place in places.items() if name in recipe.train}
    recipe.evaluate.model_args = {**trained, **recipe.evaluate.model_args}
    recipe = check(Recipe, recipe, f"{path}, with the flags")
    check_fields(recipe, path)
    return recipe


def check_names(where: str, names: list[str], known: Any) -> None:
    """Raise a ConfigurationError for an unknown name."""
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"{where}: {name!r} is none of {', '.join(known)}.{nearest(name, known)}"
            )


def check_fields(recipe: Recipe, path: str) -> None:
    """
    Check what can be checked without a model.

    Raises:
        ConfigurationError: see the messages.
    """
    for name in recipe.objectives:
        if not re.fullmatch(r"[\w.^-]+", name):
            raise ConfigurationError(
                f"{path}: the objective {name!r} names a folder; use letters, digits, '-', '_',"
                " '.'."
            )
    for name in ("seeds", "learning_rates", "pairs"):
        values = getattr(recipe, name)
        if values is not None and any(value in values[:i] for i, value in enumerate(values)):
            raise ConfigurationError(
                f"{path}: {name}: {values!r}: expected a list of values that differ."
            )
    for pair in recipe.pairs or []:
        if pair[0] == pair[1]:
            raise ConfigurationError(
                f"{path}: pairs: {pair!r} is not two objectives, as [eaft, sft]."
            )
        check_names(f"{path}: pairs", pair, recipe.objectives)
    if recipe.learning_rates is not None:
        if own := [name for name, flags in recipe.objectives.items() if "learning_rate" in flags]:
            raise ConfigurationError(
                f"{path}: {own[0]} has a learning_rate, and learning_rates are for all: drop one."
            )
        if len(recipe.learning_rates) > 1 and recipe.evaluate.held_out is None:
            raise ConfigurationError(
                f"{path}: several learning_rates need evaluate.held_out, rows that choose among"
                " them and are neither trained on nor scored."
            )
    if recipe.evaluate.interpolations and recipe.evaluate.held_out is None:
        raise ConfigurationError(
            f"{path}: evaluate: interpolations={recipe.evaluate.interpolations}: they are compared"
            " at equal held-out nll: give held_out, or leave interpolations out."
        )
    if not recipe.evaluate.target_tasks and recipe.evaluate.held_out is None:
        raise ConfigurationError(
            f"{path}: evaluate: nothing says what is learned: give held_out, target_tasks, or both."
        )
    if not recipe.evaluate.drift_prompts:
        raise ConfigurationError(
            f"{path}: evaluate: drift_prompts=0 leaves nothing to compare forgetting by."
        )
    for name in ("output_dir", "seed", "resume_from_checkpoint", "template_date"):
        if any(name in flags for flags in (recipe.train, *recipe.objectives.values())):
            raise ConfigurationError(
                f"{path}: train: {name} is compare's to set, run by run: leave it out."
            )
    for name in ("select_checkpoint", "forgetting_budget", "load_best_model_at_end"):
        if any(flags.get(name) for flags in (recipe.train, *recipe.objectives.values())):
            raise ConfigurationError(
                f"{path}: train: with {name} the model is not the last checkpoint; compare chooses"
                " by evaluate.held_out, alike for all: leave it out."
            )


def plan_runs(recipe: Recipe, model_identity: Any) -> list[Run]:
    """
    Return every run, seed by seed and objective by objective, its flags and data checked as `eaft
    train` does.

    Args:
        model_identity: a digest of the base model, with its tokenizer.

    Raises:
        ConfigurationError: no model is named, a flag is wrong, a package is missing, or the data is
            missing, held out too, or refused by the chat template.
    """
    if recipe.train.get("model_name_or_path") is None:
        raise ConfigurationError("train: model_name_or_path is missing.")
    runs: list[Run] = []
    rates: list[float | None] = (
        [None] if recipe.learning_rates is None else [*recipe.learning_rates]
    )
    seen, digests, warnings = set[str](), dict[Path, str](), set[str]()
    for seed in recipe.seeds:
        for objective, own in recipe.objectives.items():
            for rate in rates:
                flags = {
                    name: of_seed(value, seed)
                    for name, value in {**recipe.train, **own, "seed": seed}.items()
                }
                name = f"{objective}-seed{seed}"
                if rate is not None:
                    flags["learning_rate"], name = rate, f"{objective}-lr{rate:g}-seed{seed}"
                files = {
                    key: file_digest(path, digests) for key, path in local_files(flags).items()
                }
                known = {
                    key: value
                    for key, value in flags.items()
                    if key not in (*files, "model_name_or_path")
                }
                if "gate" in files:
                    known["gate"] = flags["gate"]
                identity = {
                    "model": model_identity,
                    "flags": known,
                    "files": files,
                    "versions": versions(TRAINS),
                }
                flags["output_dir"] = str(Path(recipe.output_dir) / name)
                if recipe.evaluate.template_date is not None:
                    flags["template_date"] = recipe.evaluate.template_date
                # Another seed on the same data changes nothing here
                if (
                    key := json.dumps([own, rate, flags.get("dataset_name")], default=str)
                ) not in seen:
                    warnings.add(check_training(flags, recipe.evaluate))
                    seen.add(key)
                identity = json.loads(json.dumps(identity, default=str))
                runs.append(Run(objective, seed, rate, Path(flags["output_dir"]), flags, identity))
    print("".join(sorted(warnings)), end="", file=sys.stderr)
    return runs


def of_seed(value: Any, seed: int) -> Any:
    """Return a flag's value with the seed for `{seed}`, so that each seed can have its own data."""
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


def check_training(flags: dict[str, Any], evaluate: EvaluateConfig) -> str:
    """
    Check one run's flags and data; return what its chat template makes of the data, as lines.

    Raises:
        ConfigurationError: they cannot be used, or a row is both trained on and held out.
    """
    configs = parse_flags(flags)
    if flags.get("use_peft") and find_spec("peft") is None:
        raise ConfigurationError("use_peft: PEFT is not installed: pip install 'eaft[peft]'.")
    train, _ = load_data(*configs)
    _, args, model_args, _ = configs
    text = args.dataset_text_field
    rows = load_rows(evaluate.held_out, text, HELD_OUT) if evaluate.held_out is not None else None
    if evaluate.interpolations and (peft := get_peft_config(model_args)) is not None:
        check_adapter(peft.to_dict())
    template_facts = check_templates({"train": train, HELD_OUT: rows}, args, model_args)
    if rows is not None and isinstance(train, Dataset):
        check_apart(rows, train, text, HELD_OUT)
    model = str(model_args.model_name_or_path)
    if (
        isinstance(train, Dataset)
        and "input_ids" in train.column_names
        and not model.endswith(".gguf")
    ):
        check_model(resolve_model(model, args.trust_remote_code), args, model_args, train)
    return told(template_facts)


def described(recipe: Recipe) -> Recipe:
    """
    Return a recipe for the results: with all its pairs, and without this machine's paths, which
    tell others nothing.
    """
    anonymous = copy.deepcopy(recipe)
    if Path(model := recipe.train["model_name_or_path"]).exists():
        anonymous.train["model_name_or_path"] = Path(model).name
    for name in ("general_prompts", "target_prompts", "held_out"):
        if (path := getattr(recipe.evaluate, name)) is not None:
            setattr(anonymous.evaluate, name, Path(path).name)
    anonymous.pairs = [list(pair) for pair in recipe.compared]
    return anonymous


def base_model(recipe: Recipe) -> str:
    """
    Return the base model, as it can be loaded.

    Raises:
        ConfigurationError: it cannot be read.
    """
    recipe.train["model_name_or_path"] = resolve_model(
        recipe.train["model_name_or_path"],
        bool(recipe.evaluate.model_args.get("trust_remote_code")),
    )
    return recipe.train["model_name_or_path"]
