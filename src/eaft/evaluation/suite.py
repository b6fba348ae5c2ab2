"""
What models are measured on: suites of lm-evaluation-harness tasks, and where their data comes from.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, with_config

from eaft.errors import ConfigurationError, first_line, nearest
from eaft.files import Count, Text, check, read_text, read_yaml

SUITES = Path(__file__).parent / "suites"
TASKS = Path(__file__).parent / "tasks"  # tasks that lm-eval lacks


@dataclass
class Benchmark:
    """
    One line of a report: an lm-eval task, or a group whose items are taken together (as `mmlu` has
    57 tasks).

    Attributes:
        name: as the user or a suite names it.
        tasks: lm-eval's `Task` objects with their data, by name.
        limit: at most so many items of each task, the first ones; None for all.
        digest: of all that; set at the first measurement.
    """

    name: str
    tasks: dict[str, Any]
    limit: int | None
    digest: str | None = None


@dataclass
class Suite:
    """
    Benchmarks whose mean is reported. A benchmark that the user names alone is a suite without a
    mean.
    """

    name: str
    benchmarks: list[str]


def suites_help() -> str:
    """Return the built-in suites as lines of at most 100 columns."""
    contents = [yaml.safe_load(path.read_text()) for path in sorted(SUITES.glob("*.yaml"))]
    lines = [f"  {c['suite']:<9} {c['description']}: {', '.join(c['tasks'])}" for c in contents]
    return "\n".join(textwrap.fill(line, 100, subsequent_indent=" " * 12) for line in lines)


def load_suites(
    names: list[str],
    include_path: str | None = None,
    data_dir: str | None = None,
    limit: int | None = None,
) -> tuple[list[Suite], dict[str, Benchmark]]:
    """
    Return the named suites, and their benchmarks with all data loaded. Missing data is reported
    before a model is loaded.

    Args:
        names: of suites (ours, or a YAML file with `suite` and `tasks`), or of lm-eval tasks,
            groups, tags or files.
        include_path: a folder with lm-eval task YAMLs of the user's own.
        data_dir: a folder whose files are taken instead of the Hub's; see `local_data`.
        limit: overrides the suites' own.

    Raises:
        ConfigurationError: lm-eval is not installed, there is no such task, two suites want
            different parts of one task, two tasks have one file name, or data is missing (all of it
            is named).
    """
    suites: list[Suite] = []
    limits: dict[str, int | None] = {}  # of the named tasks and, if they are groups, of their parts

    def set_limit(task: str, wanted: int | None) -> None:
        if limits.setdefault(task, wanted) != wanted:
            raise ConfigurationError(
                f"{task} is in two suites with different limits: give --limit, or one suite."
            )

    for name in names:
        content = read_suite(name)
        suites.append(Suite(content.suite, content.tasks))
        for task in content.tasks:
            set_limit(task, limit if limit is not None else content.limit)
    files: dict[str, str] = {}
    for task in limits:
        if (other := files.setdefault(Path(task).stem, task)) != task:
            raise ConfigurationError(
                f"{other} and {task} would write to one file: rename one, or evaluate it apart."
            )
    manager = task_manager(list(limits), include_path)
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ConfigurationError(f"data_dir={data_dir!r}: there is no such folder.")

    benchmarks, missing = {}, []
    for name, task_limit in list(limits.items()):
        tasks: dict[str, Any] = {}
        for task, spec in leaves(manager, name):
            override = local_data(task, Path(data_dir)) if data_dir is not None else None
            try:
                with quiet():
                    loaded = manager.load(
                        [spec if override is None else {**full_config(manager, spec), **override}]
                    )
            except Exception as error:  # each data set fails in its own way
                missing.append(f"{name}: {describe(manager, task, error, data_dir)}")
                break  # the other parts of a group are missing likewise
            for part, loaded_task in loaded["tasks"].items():
                check_metric(part, loaded_task)
                set_limit(part, task_limit)
            tasks.update(loaded["tasks"])
        if "ifeval" in tasks and not has_sentence_tokenizer():
            missing.append(
                f"{name}: ifeval needs NLTK's sentence tokenizer: python -m nltk.downloader"
                " punkt_tab"
            )
        benchmarks[name] = Benchmark(name, tasks, task_limit)
    if missing:
        raise ConfigurationError(
            "Data or a package is missing, nothing was run:\n  " + "\n  ".join(missing)
        )
    return suites, benchmarks


@with_config(ConfigDict(extra="forbid"))
@dataclass
class SuiteFile:
    """What a suite's YAML file holds."""

    suite: Text
    tasks: Annotated[list[Text], Field(min_length=1)]
    description: str = ""
    limit: Count | None = None


def read_suite(name: str) -> SuiteFile:
    """
    Return a suite; the name of a task, or a task's own file, is a suite of one.

    Raises:
        ConfigurationError: a file that is missing, or neither a suite's nor a task's.
    """
    where, path = f"suite {name!r}", SUITES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
        if path.suffix != ".yaml":
            return SuiteFile(name, [name])
        text = read_text(path, where)
        try:
            # A task's file may hold !function tags, which only lm-eval can read; a suite's has none
            content = yaml.load(text, Loader=yaml.BaseLoader)
        except yaml.YAMLError as error:
            raise ConfigurationError(f"{where}: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ConfigurationError(
                f"{where}: expected a mapping with `suite` and `tasks`, or a task's."
            )
        if "group" in content:
            raise ConfigurationError(
                f"{where} is a group's file: give its folder as include_path, and name"
                f" {content['group']!r}."
            )
        if "suite" not in content and "task" in content:
            return SuiteFile(name, [name])
    return check(SuiteFile, read_yaml(path, where), where)


def task_manager(tasks: list[str], include_path: str | None) -> Any:
    """
    Return an lm-eval registry that knows `tasks`: ours, the user's, and lm-eval's own if need be.

    Raises:
        ConfigurationError: lm-eval is not installed, or has no such task.
    """
    try:
        from eaft.evaluation.lm_eval_internals import TaskManager
    except ImportError as error:
        raise ConfigurationError(
            "Evaluating needs lm-evaluation-harness: pip install 'eaft[eval]'."
        ) from error
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigurationError(f"include_path={include_path!r}: there is no such folder.")
    paths = [str(TASKS), *([include_path] if include_path else [])]
    names = {task for task in tasks if not task.endswith(".yaml")}
    # Indexing lm-eval's own thousands of tasks takes seconds
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(leaf in manager.all_tasks for name in names for leaf, _ in leaves(manager, name)):
        manager = TaskManager(include_path=paths) if include_path else lm_eval_tasks()
    for task in names:
        if task not in manager.all_tasks:
            known = [*manager.all_tasks, *(path.stem for path in SUITES.glob("*.yaml"))]
            raise ConfigurationError(
                f"There is no suite and no lm-eval task {task!r}.{nearest(task, known)} Your own go"
                " into include_path."
            )
    return manager


@functools.cache
def lm_eval_tasks() -> Any:
    """Return lm-eval's registry with our tasks, built once."""
    from eaft.evaluation.lm_eval_internals import TaskManager

    return TaskManager(include_path=str(TASKS))


def leaves(manager: Any, spec: str | dict[str, Any]) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """Yield the tasks that a task, group or tag stands for, with what lm-eval is to load."""
    from eaft.evaluation.lm_eval_internals import Kind, load_yaml

    name = spec if isinstance(spec, str) else str(spec.get("task", spec.get("group")))
    entry = manager.task_index.get(name)
    if entry is not None and entry.kind is Kind.TAG:
        for task in sorted(entry.tags):
            yield from leaves(manager, task)
    elif entry is not None and entry.kind is Kind.GROUP and isinstance(spec, str):
        content = load_yaml(entry.yaml_path, resolve_func=True)
        if set(content) - {
            "group",
            "group_alias",
            "task",
            "aggregate_metric_list",
            "metadata",
            "include",
            "tag",
        }:
            yield name, spec  # it changes its tasks' settings: lm-eval must load it whole
        else:
            for child in content["task"]:
                yield from leaves(manager, child)
    else:
        yield name, spec


def full_config(manager: Any, spec: str | dict[str, Any]) -> dict[str, Any]:
    """Return a task's whole configuration, which lm-eval takes in place of a name."""
    from eaft.evaluation.lm_eval_internals import load_yaml

    name, changes = (spec, {}) if isinstance(spec, str) else (spec["task"], spec)
    entry = manager.task_index.get(name)
    content = load_yaml(entry.yaml_path if entry else name, resolve_func=True)
    return {
        **{key: value for key, value in content.items() if key not in ("tag", "group")},
        **changes,
    }


def local_data(task: str, folder: Path) -> dict[str, Any] | None:
    """
    Return the part of a task's lm-eval configuration that makes it read local files, or None if
    the folder has none for it.

    A task's items are the rows of `TASK.jsonl` or `TASK_test.jsonl`, with the fields its data set
    has on the Hub; its few-shot examples are the rows of `TASK_train.jsonl`. `mmlu.jsonl` and
    `mmlu_stem.jsonl` hold all subjects' rows, told apart by `subject` or `type`;
    `pubmedqa_labeled.jsonl` is PubMedQA's own release, with its fields in lower case.
    """
    if task.startswith("mmlu_") and (subject := task.removeprefix("mmlu_")):
        for name in ("mmlu.jsonl", "mmlu_stem.jsonl"):
            if (folder / name).is_file():
                return {
                    **json_settings({"test": folder / name}),
                    "process_docs": functools.partial(of_subject, subject),
                }
    if task == "pubmedqa" and (file := folder / "pubmedqa_labeled.jsonl").is_file():
        return {**json_settings({"test": file}), "process_docs": pubmedqa_fields}
    tests = [
        file for name in (task, f"{task}_test") if (file := folder / f"{name}.jsonl").is_file()
    ]
    if not tests:
        return None
    files = {"test": tests[0]}
    if (train := folder / f"{task}_train.jsonl").is_file():
        files["train"] = train
    return json_settings(files)


def json_settings(files: dict[str, Path]) -> dict[str, Any]:
    """Return the part of a task's lm-eval configuration that reads JSON Lines, one file a split."""
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        "training_split": "train" if "train" in files else None,
        "validation_split": None,
        "test_split": "test",
        # From the test split lm-eval takes other items than the one that is asked
        "fewshot_split": "train" if "train" in files else "test",
    }


def of_subject(subject: str, rows: Any) -> Any:
    """Keep one subject's rows."""
    column = "subject" if "subject" in rows.column_names else "type"
    kept = rows.filter(lambda value: value == subject, input_columns=column)
    if len(kept) == 0:
        raise ConfigurationError(f"no row with {column} {subject!r}")
    return kept


def pubmedqa_fields(rows: Any) -> Any:
    """Name the fields of PubMedQA's release as lm-eval's task expects them."""
    names = {"question": "QUESTION", "contexts": "CONTEXTS", "answer": "final_decision"}
    return rows.rename_columns(
        {name: new for name, new in names.items() if name in rows.column_names}
    )


def check_metric(name: str, task: Any) -> None:
    """
    Refuse a task whose items have no score that is better when higher: nothing could be compared.

    Raises:
        ConfigurationError: its first metric is better when lower, or it measures perplexity.
    """
    metric, higher_is_better = next(iter(task.higher_is_better().items()), ("perplexity", False))
    if task.OUTPUT_TYPE == "loglikelihood_rolling" or higher_is_better is False:
        raise ConfigurationError(
            f"{name}: its first metric, {metric}, is no score of an item that is better when"
            " higher."
        )


def has_sentence_tokenizer() -> bool:
    """
    Return whether NLTK has what IFEval's checks read: they fail only after the answers are
    generated.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def describe(manager: Any, task: str, error: Exception, data_dir: str | None) -> str:
    """Say what is missing for a task, and where it could come from."""
    cause = error.__cause__ or error
    if isinstance(error, ConfigurationError):
        return f"{task}: {first_line(error)}"
    if isinstance(error, ImportError):
        package = f": pip install {error.name}" if error.name else ""
        return f"{task}: {first_line(error)}{package}"
    path = full_config(manager, task).get("dataset_path")
    local = (
        f", or {task}.jsonl in {data_dir}"
        if data_dir is not None
        else ", or --data_dir with local files"
    )
    return (
        f"{task} needs the data set {path} from the Hub{local} ({type(cause).__name__}:"
        f" {first_line(cause)[:200]})"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's notes on every task and its bars while it builds their prompts."""
    from eaft.evaluation.lm_eval_internals import task_module

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, task_module.tqdm
    logger.setLevel(logging.ERROR)
    task_module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bar
