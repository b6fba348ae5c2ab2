"""`eaft inspect`: scores data through a model, token by token, and reports on it."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from eaft.errors import ConfigurationError
from eaft.evaluation.evaluate import check_packages as check_evaluation
from eaft.evaluation.identity import weights_digest
from eaft.evaluation.launch import processes
from eaft.evaluation.model_settings import load_tokenizer
from eaft.files import read_json
from eaft.inspection.find.findings import find
from eaft.inspection.flags import InspectArguments
from eaft.inspection.folder import (
    BASE,
    Inspection,
)
from eaft.inspection.run_file import (
    RUN_FILE,
    Identity,
    InspectedRun,
    RolloutFlags,
    ScoredModel,
    SeededRolloutFlags,
    write_run,
)
from eaft.inspection.score import ray_actors
from eaft.inspection.score.chosen import choose_rows
from eaft.inspection.score.compared import find_compared
from eaft.inspection.score.examples import Examples
from eaft.inspection.score.job import Job
from eaft.inspection.score.model import Settings
from eaft.inspection.score.resume import begin, numbers
from eaft.inspection.score.run import finish, score_all
from eaft.inspection.summary import CheckResult, write_summary
from eaft.models import (
    check_vocabulary,
    context_length,
    find_model,
    text_config,
    vocabulary_size,
)
from eaft.objective.statistics import usable_top_k
from eaft.phases import Phases
from eaft.processes import locked
from eaft.provenance import environment
from eaft.text import visible
from eaft.training.config import EAFTConfig
from eaft.training.data import check_data, load_data, rows_digest
from eaft.training.gate_measurements import fingerprint
from eaft.training.prepare import prepare_rows
from eaft.training.row_checks import check_ids
from eaft.training.run_folder import changed_arguments

WAY = "give this command again, with another --output_dir."


def check_packages() -> None:
    """
    Check that the packages of the extra `inspect` are installed.

    Raises:
        ConfigurationError: a package is missing.
    """
    for package in ("jinja2", "matplotlib", "scipy", "tabulate", "wordcloud"):
        if find_spec(package) is None:
            raise ConfigurationError(f"Inspecting needs {package}: pip install 'eaft[inspect]'.")


def inspect(
    script_args: ScriptArguments,
    args: EAFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    inspect_args: InspectArguments,
) -> None:
    """
    Score the data, and write the folder `args.output_dir` that `eaft.inspection.folder` describes.

    Raises:
        ConfigurationError: an input is wrong; nothing has been written.
    """
    state, folder = processes(), Path(args.output_dir)
    if (folder / RUN_FILE).is_file():  # checked before the data is prepared, which may take minutes
        read_json(
            folder / RUN_FILE, dict[str, Any], "choose another --output_dir, or delete this one."
        )
    args.eval_strategy = "no"  # held-out data is not inspected
    if inspect_args.rollouts < 0 or inspect_args.max_new_tokens < 1:
        raise ConfigurationError("rollouts must not be negative, and max_new_tokens at least 1.")
    rollout_backend = inspect_args.rollout_backend or inspect_args.backend
    flags = RolloutFlags(inspect_args.rollouts, rollout_backend, inspect_args.max_new_tokens)
    if "vllm" in (inspect_args.backend, rollout_backend):
        check_vllm(inspect_args, model_args)
    if inspect_args.ray_actors:
        ray_actors.check(state.num_processes, inspect_args.backend)
    phases = Phases(state.is_main_process)
    phases.begin("reading the model and the data")
    chosen = choose_rows(script_args, args, dataset_args, inspect_args.all)
    dataset, _ = load_data(
        script_args, args, model_args, dataset_args, chosen.splits, chosen.numbers
    )
    findings = check_data(script_args, args, model_args, dataset, None, chosen.numbers)
    template = [CheckResult(**asdict(finding)) for finding in findings]
    source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    with state.main_process_first():
        base = find_model(str(model_args.model_name_or_path), source)
        tokenizer = load_tokenizer(base, source)
        others = find_compared(
            inspect_args.compare, base, tokenizer, {"trust_remote_code": args.trust_remote_code}
        )
    size = text_config(base, source).vocab_size
    check_vocabulary(base, tokenizer, size)
    check_ids(dataset, size, "the data", chosen.numbers)
    for other in others:
        check_vocabulary(other.model, tokenizer, text_config(other.model, source).vocab_size)
    rows = prepare_rows(tokenizer, args, dataset)
    data = script_args.dataset_name or ", ".join(mixed.path for mixed in dataset_args.datasets)
    settings = Settings(args, model_args)
    examples = Examples(rows, dataset, data, [], chosen.numbers)
    if not examples.labelled.any():
        raise ConfigurationError(
            f"No row has a labelled token left after truncation to max_length={args.max_length}:"
            " raise max_length, or check completion_only_loss and assistant_only_loss."
        )
    # Which rows of a random order are scored is not known yet
    asked = inspect_args.rollouts if chosen.of is None else len(dataset)
    prompts = examples.prompts(asked) if inspect_args.rollouts else []
    answered = max((len(prompt.ids) for prompt in prompts), default=0) + flags.max_new_tokens
    context = max(int(examples.lengths.max()), answered if prompts else 0)
    if "vllm" in (inspect_args.backend, rollout_backend):
        check_context(context, context_length(base, source))
    # The data, the base model and the others, and the report
    phases.count = 3 + len(others) + inspect_args.top_k_curve
    if inspect_args.rollouts:
        phases.count += 1 if chosen.of is None else 2

    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(locked(folder, begins_with=(RUN_FILE,)))
            begin(
                folder,
                InspectedRun(
                    scored=False,
                    models=[ScoredModel(BASE, str(model_args.model_name_or_path)), *others],
                    backend=inspect_args.backend,
                    top_k=usable_top_k(args.gate_top_k, vocabulary_size(tokenizer)),
                    model=model_args.model_name_or_path,
                    dataset=data,
                    template=template,
                    rollouts=flags if flags.rollouts else None,
                    config=changed_arguments(args),
                    environment=environment(),
                    identity=Identity(
                        model=weights_digest(base, model_args.model_revision),
                        data=[fingerprint(rows.cut), rows_digest(dataset)],
                        numbers=numbers(settings, chosen.of is not None),
                        rollouts=SeededRolloutFlags(**vars(flags), seed=args.seed)
                        if flags.rollouts
                        else None,
                        compared={other.name: weights_digest(other.model) for other in others},
                    ),
                ),
            )
        state.wait_for_everyone()
        job = Job(
            *(folder, settings, tokenizer, base, others, examples),
            *(inspect_args.backend, context, inspect_args.ray_actors, chosen.of),
        )
        score_all(job, flags, phases, inspect_args.top_k_curve)
        phases.begin("the report")
        if state.is_main_process:
            finish(job)
            conclude(folder)


def check_vllm(inspect_args: InspectArguments, model_args: ModelConfig) -> None:
    """
    Check that vLLM can do what is asked for.

    Raises:
        ConfigurationError: it cannot, or a package is missing.
    """
    if processes().num_processes > 1:
        raise ConfigurationError(
            "backend='vllm' starts its own processes: add --num_processes 1, or take --backend hf."
        )
    check_evaluation("vllm")  # lm-eval loads vLLM
    if inspect_args.backend == "vllm" and inspect_args.top_k_curve:
        raise ConfigurationError(
            "top_k_curve needs the logits of the whole vocabulary, which vLLM does not give: leave"
            " it out, or take --backend hf."
        )
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, name):
            raise ConfigurationError(
                f"{name} is not for vLLM: give a model that is quantised already, or take"
                " --backend hf."
            )


def check_context(tokens: int, context: int) -> None:
    """Check that the longest example, or an answer with its prompt, fits the context of vLLM."""
    if tokens + 1 > context:
        raise ConfigurationError(
            f"backend='vllm' needs a context of {tokens + 1} tokens, for the longest example or"
            f" answer and one more, and the model has {context}: lower max_length or"
            " max_new_tokens, or take --backend hf."
        )


def conclude(folder: Path) -> None:
    """Write summary.json and the report, and print a page."""
    from eaft.inspection.find import report  # needs the extra; `check_packages` has looked for it

    inspection = Inspection(folder)
    write_summary(folder, find(inspection, inspection.run.top_k_curve))
    report.write(inspection)
    write_run(folder, replace(inspection.run, finished=True))
    print(visible(report.page(inspection)))
