"""`eaft inspect`: score data through a model, token by token, and say what is found."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from eaft.errors import ConfigurationError, EAFTError
from eaft.evaluation.drift import Share
from eaft.evaluation.evaluate import check_packages as check_evaluation
from eaft.evaluation.identity import weights_digest
from eaft.evaluation.measured_model import shared
from eaft.evaluation.scores import load_tokenizer, processes
from eaft.files import read_json
from eaft.inspection.find.findings import find
from eaft.inspection.flags import InspectArguments
from eaft.inspection.folder import (
    BASE,
    COMPARED,
    EXAMPLES,
    EXAMPLES_FILE,
    TOKENS,
    VOCABULARY,
    VOCABULARY_FILE,
    Inspection,
)
from eaft.inspection.run_file import (
    RUN_FILE,
    Identity,
    InspectedRun,
    RolloutFlags,
    ScoredModel,
    SeededRolloutFlags,
    read_run,
    write_run,
)
from eaft.inspection.score import rollouts
from eaft.inspection.score.compared import find_compared
from eaft.inspection.score.curve import top_k_curve
from eaft.inspection.score.examples import Examples, Rollout
from eaft.inspection.score.pieces import Pieces
from eaft.inspection.score.scorer import (
    Scorer,
    Settings,
    compared_table,
    example_table,
    sample_logits,
    score_shard,
    token_table,
    write_parquet,
)
from eaft.inspection.summary import CheckResult, write_summary
from eaft.models import check_vocabulary, find_model, text_config, vocabulary_size
from eaft.objective.statistics import usable_top_k
from eaft.processes import locked
from eaft.provenance import environment, write_json
from eaft.text import visible
from eaft.training.config import EAFTConfig
from eaft.training.data import check_data, load_data, rows_digest
from eaft.training.gate_measurements import fingerprint
from eaft.training.prepare import prepare_rows
from eaft.training.row_checks import check_ids
from eaft.training.run_folder import changed_arguments

WAY = "give this command again, with another --output_dir."
PARTS = "parts"  # in the folder: what is not whole yet
ROLLOUTS_FILE = "rollouts.json"


def check_packages() -> None:
    """
    Find out what is not installed before anything is scored.

    Raises:
        ConfigurationError: a package is missing.
    """
    for package in ("jinja2", "matplotlib", "scipy", "tabulate", "wordcloud"):
        if find_spec(package) is None:
            raise ConfigurationError(f"Inspecting needs {package}: pip install 'eaft[inspect]'.")


@dataclass
class Job:
    """What is to be scored, and where to."""

    folder: Path
    settings: Settings
    tokenizer: Any
    base: str
    others: list[ScoredModel]
    examples: Examples

    @property
    def parts(self) -> Path:
        """Where what is not whole yet is kept."""
        return self.folder / PARTS

    def file(self, model: str, shard: int) -> Path:
        """Return a shard's file of a model's tokens."""
        parent = self.folder / "tokens" if model == BASE else self.folder / "compared" / model
        return parent / f"{shard:05d}.parquet"


def inspect(
    script_args: ScriptArguments,
    args: EAFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    inspect_args: InspectArguments,
) -> None:
    """
    Score the data, and write what `eaft.inspection.folder` describes to `args.output_dir`.

    Everything that can be wrong with the input is found before the folder is touched.
    """
    state, folder = processes(), Path(args.output_dir)
    if (folder / RUN_FILE).is_file():  # before minutes of preparing
        read_json(
            folder / RUN_FILE, dict[str, Any], "choose another --output_dir, or delete this one."
        )
    args.eval_strategy = "no"  # the held-out data is not asked for
    if inspect_args.rollouts < 0 or inspect_args.max_new_tokens < 1:
        raise ConfigurationError("rollouts must not be negative, and max_new_tokens at least 1.")
    if inspect_args.rollout_backend == "vllm":
        if state.num_processes > 1:
            raise ConfigurationError(
                "rollout_backend='vllm' has processes of its own: add --num_processes 1, or sample"
                " with hf."
            )
        check_evaluation("vllm")  # it is lm-eval's
    dataset, _ = load_data(script_args, args, model_args, dataset_args)
    findings = check_data(script_args, args, model_args, dataset, None)
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
    check_ids(dataset, size, "the data")
    for other in others:
        check_vocabulary(other.model, tokenizer, text_config(other.model, source).vocab_size)
    rows = prepare_rows(tokenizer, args, dataset)
    data = script_args.dataset_name or ", ".join(mixed.path for mixed in dataset_args.datasets)
    flags = RolloutFlags(
        inspect_args.rollouts, inspect_args.rollout_backend, inspect_args.max_new_tokens
    )
    settings = Settings(args, model_args)
    examples = Examples(rows, dataset, data, [])
    if not examples.labelled.any():
        raise ConfigurationError(
            f"No row has a labelled token left after truncation to max_length={args.max_length}:"
            " raise max_length, or check completion_only_loss and assistant_only_loss."
        )
    prompts = examples.prompts(inspect_args.rollouts) if inspect_args.rollouts else []

    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(locked(folder, begins_with=(RUN_FILE,)))
            begin(
                folder,
                InspectedRun(
                    scored=False,
                    models=[ScoredModel(BASE, str(model_args.model_name_or_path)), *others],
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
                        numbers=numbers(settings),
                        rollouts=SeededRolloutFlags(**vars(flags), seed=args.seed)
                        if flags.rollouts
                        else None,
                        compared={other.name: weights_digest(other.model) for other in others},
                    ),
                ),
            )
        state.wait_for_everyone()
        job = Job(folder, settings, tokenizer, base, others, examples)
        score_all(job, prompts, inspect_args)
        if state.is_main_process:
            finish(job)
            conclude(folder)


def numbers(settings: Settings) -> dict[str, str | int]:
    """Return the flags that change what is computed."""
    model_args = settings.model_args
    flags = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "load_in_4bit": model_args.load_in_4bit,
        "load_in_8bit": model_args.load_in_8bit,
        "autocast": settings.autocast,
        "model_init_kwargs": settings.args.model_init_kwargs,
    }
    return {name: str(value) for name, value in flags.items()} | {"top_k": settings.args.gate_top_k}


def begin(folder: Path, run: InspectedRun) -> None:
    """
    Write run.json, or add models to the run.json of the same run.

    Raises:
        ConfigurationError: the folder holds another run.
    """
    if (folder / RUN_FILE).is_file():
        run = continued(folder, run)
    write_run(folder, run)


def continued(folder: Path, run: InspectedRun) -> InspectedRun:
    """
    Return the run that a folder holds, with the models of a new command.

    Raises:
        ConfigurationError: the folder holds another run than the new command's.
    """
    way = "Choose another --output_dir, or delete this one."
    content = read_json(folder / RUN_FILE, dict[str, Any], way)
    if not isinstance(content.get("identity"), dict) or "compared" not in content["identity"]:
        raise ConfigurationError(
            f"output_dir={str(folder)!r} holds another run, none of eaft inspect. {way}"
        )
    before = read_run(folder, way)
    old, new = before.identity, run.identity
    assert old is not None
    assert new is not None
    changed = differences(old, new)
    if changed:
        raise ConfigurationError(
            f"output_dir={str(folder)!r} is an inspection of {' and '.join(changed)}. {way}"
        )
    models = {model.name: model for model in [*before.models, *run.models]}
    return replace(
        run,
        models=list(models.values()),
        top_k_curve=before.top_k_curve,
        identity=replace(new, compared=old.compared | new.compared),
    )


def differences(old: Identity, new: Identity) -> list[str]:
    """Return in words how a run's identity differs from that of the run in the folder."""
    changed = []
    for name, words in (
        ("model", "another model"),
        ("data", "other data"),
        ("rollouts", "other rollouts"),
        ("numbers", "other flags"),
    ):
        if getattr(old, name) != getattr(new, name):
            changed.append(words)
    for name in sorted(old.compared.keys() & new.compared.keys()):
        if old.compared[name] != new.compared[name]:
            changed.append(f"another model as {name!r}")
    return changed


def score_all(job: Job, prompts: rollouts.Prompts, inspect_args: InspectArguments) -> None:
    """
    Score with each model what is not scored yet, one model in memory at a time; every process its
    share.
    """
    state, args = processes(), job.settings.args
    scorer = Lazy(job.base, job.settings)
    if prompts:
        file = job.parts / ROLLOUTS_FILE
        if not shared(file.is_file):
            if inspect_args.rollout_backend == "vllm":
                found = rollouts.sample_with_vllm(
                    job.base,
                    job.tokenizer,
                    prompts,
                    inspect_args.max_new_tokens,
                    args.seed,
                    job.settings,
                )
            else:
                share = Share(state.process_index, state.num_processes)
                found = rollouts.sample(
                    scorer.get(),
                    job.tokenizer,
                    prompts,
                    inspect_args.max_new_tokens,
                    args.seed,
                    share,
                )
            if state.is_main_process:
                job.parts.mkdir(exist_ok=True)
                write_json(file, [asdict(rollout) for rollout in found])
            state.wait_for_everyone()
        answers = [Rollout(**entry) for entry in json.loads(file.read_text())]
        job.examples = Examples(job.examples.rows, job.examples.dataset, job.examples.name, answers)
    pieces = Pieces(job.tokenizer)
    score_model(job, ScoredModel(BASE, job.base), scorer, pieces)
    if state.is_main_process:
        keep_top_k_curve(job, scorer)
    scorer.free()
    for other in job.others:
        scorer = Lazy(other.model, job.settings, is_base=False)
        score_model(job, other, scorer, pieces)
        scorer.free()
    state.wait_for_everyone()


class Lazy:
    """A `Scorer` that is loaded when it is first needed."""

    def __init__(self, model: str, settings: Settings, is_base: bool = True) -> None:
        self.arguments = (model, settings, is_base)
        self.scorer: Scorer | None = None

    def get(self) -> Scorer:
        """Return it."""
        if self.scorer is None:
            self.scorer = Scorer(*self.arguments)
        return self.scorer

    def free(self) -> None:
        """Give back the memory, so that the next model finds it free."""
        self.scorer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def score_model(job: Job, model: ScoredModel, scorer: Lazy, pieces: Pieces) -> None:
    """Write this process's share of a model's shards that are not there."""
    state, shards = processes(), dict(enumerate(job.examples.shards()))
    missing = shared(
        lambda: [shard for shard in shards if not job.file(model.name, shard).is_file()]
    )
    mine = missing[state.process_index :: state.num_processes]
    counts = {shard: int(job.examples.lengths[list(shards[shard])].sum()) for shard in mine}
    with tqdm(
        total=sum(counts.values()),
        desc=visible(f"Scoring with {model.name}", lines=False),
        unit=" tokens",
        unit_scale=True,
        disable=None if state.is_main_process else True,
    ) as bar:
        for shard in mine:
            part, before, loaded = shards[shard], bar.n, scorer.get()
            try:
                tokens, found = score_shard(loaded, job.examples, part, bar.update)
            except EAFTError as error:
                if (
                    not state.is_main_process
                ):  # of these rows, which the first process, that speaks for all, has not seen
                    print(visible(f"eaft inspect: error: {error}"), file=sys.stderr)
                raise
            if model.name == BASE:
                table, texts = token_table(part, tokens, found, pieces)
                about, top_k = job.examples.about(part), job.settings.args.gate_top_k
                # First, so that a shard whose tokens are there has its examples too
                described = example_table(about, tokens, found, texts, top_k)
                write_parquet(described, EXAMPLES, job.parts / f"{shard:05d}.parquet")
                write_parquet(table, TOKENS, job.file(BASE, shard))
            else:
                write_parquet(
                    compared_table(part, tokens, found), COMPARED, job.file(model.name, shard)
                )
            bar.update(
                counts[shard] - (bar.n - before) if not bar.disable else 0
            )  # those without a label
    state.wait_for_everyone()


def keep_top_k_curve(job: Job, scorer: Lazy) -> None:
    """
    Measure the top-K entropy against the exact one (the paper's Figure 6) and write it to run.json.

    A continued run keeps the first measurement.
    """
    run = read_run(job.folder, WAY)
    if run.top_k_curve is None:
        curve = top_k_curve(sample_logits(scorer.get(), job.examples, job.settings.args.seed))
        write_run(job.folder, replace(run, top_k_curve=curve))


def finish(job: Job) -> None:
    """Write the tables of examples and of the vocabulary, and note that all is scored."""
    if not (job.folder / EXAMPLES_FILE).is_file():
        files = sorted(job.parts.glob("*.parquet"))
        write_parquet((pq.read_table(file) for file in files), EXAMPLES, job.folder / EXAMPLES_FILE)
    for file in job.parts.glob("*.parquet"):
        file.unlink()
    run = read_run(job.folder, WAY)
    # A model is left out if an earlier command was stopped while scoring with it and this command
    # does not name it
    shards = range(len(job.examples.shards()))
    models = [
        model
        for model in run.models
        if all(job.file(model.name, shard).is_file() for shard in shards)
    ]
    write_parquet(vocabulary(job, Pieces(job.tokenizer)), VOCABULARY, job.folder / VOCABULARY_FILE)
    write_run(job.folder, replace(run, models=models, scored=True))


def vocabulary(job: Job, pieces: Pieces) -> pa.Table:
    """Return the text of every token that occurs, in the data or as a model's first choice."""
    seen: set[int] = set()
    for file in [*job.folder.glob("tokens/*.parquet"), *job.folder.glob("compared/*/*.parquet")]:
        for name in pq.read_schema(file).names:
            if name in ("token_id", "first_choice"):
                seen.update(
                    pq.read_table(file, columns=[name])[name].drop_null().unique().to_pylist()
                )
    ids = sorted(seen)
    columns = {
        "token_id": ids,
        "text": [pieces.text(i) for i in ids],
        "special": [i in pieces.special for i in ids],
    }
    return pa.table(columns, VOCABULARY)


def conclude(folder: Path) -> None:
    """Write summary.json and the report, and print a page."""
    from eaft.inspection.find import report  # needs the extra; `check_packages` has looked for it

    inspection = Inspection(folder)
    write_summary(folder, find(inspection, inspection.run.top_k_curve))
    report.write(inspection)
    write_run(folder, replace(inspection.run, finished=True))
    print(visible(report.page(inspection)))
