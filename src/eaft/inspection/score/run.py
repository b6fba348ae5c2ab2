"""Scores the examples with every model, and writes the tables; a stopped run is continued."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eaft.errors import EAFTError
from eaft.evaluation.drift import Share
from eaft.evaluation.launch import processes, shared
from eaft.inspection.folder import (
    BASE,
    EXAMPLES,
    EXAMPLES_FILE,
    VOCABULARY,
    VOCABULARY_FILE,
)
from eaft.inspection.run_file import (
    RolloutFlags,
    ScoredModel,
    ScoredRows,
    read_run,
    write_run,
)
from eaft.inspection.score import ray_actors, rollouts
from eaft.inspection.score.curve import sample_logits, top_k_curve
from eaft.inspection.score.examples import Prompt, Rollout
from eaft.inspection.score.job import Job, LazyModel, write_shard
from eaft.inspection.score.model import ScoringModel
from eaft.inspection.score.pieces import Pieces
from eaft.inspection.score.stopping import SHARD_ROWS, looks, reason_to_stop
from eaft.inspection.score.tables import (
    write_parquet,
)
from eaft.inspection.score.vllm_model import VLLMModel
from eaft.phases import Phases
from eaft.provenance import write_json
from eaft.text import visible

WAY = "give this command again, with another --output_dir."
ROLLOUTS_FILE = "rollouts.json"


def score_all(
    job: Job,
    flags: RolloutFlags,
    phases: Phases,
    measure_curve: bool = False,
) -> None:
    """
    Score the missing shards with each model, one model in memory at a time.

    Each process scores its share.

    Args:
        job: the models, the examples and the folder.
        flags: to how many prompts the base model samples answers, and how.
        phases: that it is shown in: one for the answers, one for each model, one for the curve; one
            more for the answers' scores where the rows are in random order.
        measure_curve: whether to measure the top-K curve too.
    """
    state = processes()
    model = LazyModel(job, job.base)
    pieces, base = Pieces(job.tokenizer), ScoredModel(BASE, job.base)
    if job.of is not None:
        sample = score_until_sure(job, job.of, model, pieces, phases)
        job.examples = job.examples.first(sample.rows)
    if flags.rollouts:
        prompts = job.examples.prompts(flags.rollouts)
        job.examples = job.examples.with_rollouts(answers(job, model, prompts, flags, phases))
    if flags.rollouts or job.of is None:
        score_model(job, base, model, pieces, phases)
    if measure_curve:
        phases.begin("the entropy of the K likeliest tokens")
        if state.is_main_process:
            keep_top_k_curve(job, model)
    model.free()
    for other in job.others:
        model = LazyModel(job, other.model, is_base=False)
        score_model(job, other, model, pieces, phases)
        model.free()
    state.wait_for_everyone()


def answers(
    job: Job, model: LazyModel, prompts: list[Prompt], flags: RolloutFlags, phases: Phases
) -> list[Rollout]:
    """Return the base model's answers to prompts, sampled unless the folder has them."""
    state, args = processes(), job.settings.args
    file, share = job.parts / ROLLOUTS_FILE, Share(state.process_index, state.num_processes)
    batches = len(share.of(-(-len(prompts) // rollouts.BATCH)))
    name = f"the model's own answers to {len(prompts)} prompts"
    with phases.counted(name, batches * flags.max_new_tokens, "steps at most") as advance:
        if not shared(file.is_file):
            sampling = model
            if flags.rollout_backend != job.backend:
                sampling = LazyModel(job, job.base, backend=flags.rollout_backend)
            sampler = sampling.get()
            if isinstance(sampler, VLLMModel):
                sampled = sampler.sample(prompts, flags.max_new_tokens, args.seed)
            else:
                sampled = rollouts.sample(
                    sampler,
                    job.tokenizer,
                    prompts,
                    flags.max_new_tokens,
                    args.seed,
                    share,
                    advance,
                )
            if sampling is not model:
                del sampler
                sampling.free()
            if state.is_main_process:
                job.parts.mkdir(exist_ok=True)
                write_json(file, [asdict(answer) for answer in sampled])
            state.wait_for_everyone()
    return [Rollout(**entry) for entry in json.loads(file.read_text())]


def score_until_sure(
    job: Job, of: int, scoring: LazyModel, pieces: Pieces, phases: Phases
) -> ScoredRows:
    """
    Score rows with the base model until enough are scored, and write how many to run.json.

    Processes score the rows up to the next look together; then the first one decides. The decision
    depends on the files of these rows alone, so that a continued run stops at the same place.

    Args:
        job: the examples of the data in random order, and the folder.
        of: rows of the data.
        scoring: the base model.
        pieces: the texts of its tokens.
        phases: of the command; this function begins the next one.
    """
    if sample := shared(lambda: read_run(job.folder, WAY).sample):
        return sample  # an earlier command has stopped there
    state, base = processes(), ScoredModel(BASE, job.base)
    rows, shards = len(job.examples.dataset), job.examples.shards()
    share = int(job.examples.lengths.sum()) // state.num_processes
    with phases.counted(f"scoring with {BASE}", share, "tokens at most") as advance:
        for look in looks(rows):
            until = -(-look // SHARD_ROWS)
            missing = my_missing(job, BASE, dict(enumerate(shards[:until])))
            score_shards(job, base, scoring, pieces, missing, advance)
            state.wait_for_everyone()
            reason = shared(functools.partial(enough, job, until, look == rows))
            if reason is not None:
                break
    sample = ScoredRows(look, of, str(reason))
    if state.is_main_process:
        write_run(job.folder, replace(read_run(job.folder, WAY), sample=sample))
    state.wait_for_everyone()
    return sample


def enough(job: Job, shards: int, is_last: bool) -> str | None:
    """Return why the rows of the first shards are enough, as `reason_to_stop`."""
    columns = ["labelled", "nll", "conflict_share", "conflict_nll_share"]
    files = [job.parts / f"{shard:05d}.parquet" for shard in range(shards)]
    table = pa.concat_tables(pq.read_table(file, columns=columns) for file in files)
    labelled, nll, tokens, share = (table[name].to_numpy() for name in columns)
    whole = (labelled * nll)[has_nll := ~np.isnan(share)]
    conflicts = round(float(np.nansum(labelled * tokens)))
    return reason_to_stop(whole * share[has_nll], whole, conflicts, is_last)


def score_model(
    job: Job, model: ScoredModel, scoring: LazyModel, pieces: Pieces, phases: Phases
) -> None:
    """
    Write this process's share of a model's missing shards.

    Args:
        job: the examples and the folder.
        model: whose files are written.
        scoring: the same model, to score with.
        pieces: the texts of its tokens.
        phases: of the command; this function begins the next one.
    """
    state, shards = processes(), dict(enumerate(job.examples.shards()))
    missing = my_missing(job, model.name, shards)
    with phases.counted(
        f"scoring with {model.name}", sum(tokens_of(job, missing).values()), "tokens"
    ) as advance:
        score_shards(job, model, scoring, pieces, missing, advance)
    state.wait_for_everyone()


def my_missing(job: Job, model: str, shards: dict[int, range]) -> dict[int, range]:
    """Return this process's share of the shards without a file of a model, by number."""
    state = processes()
    missing = shared(lambda: [shard for shard in shards if not job.file(model, shard).is_file()])
    return {shard: shards[shard] for shard in missing[state.process_index :: state.num_processes]}


def tokens_of(job: Job, shards: dict[int, range]) -> dict[int, int]:
    """Return the number of tokens of each shard."""
    return {shard: int(job.examples.lengths[list(part)].sum()) for shard, part in shards.items()}


def score_shards(
    job: Job,
    model: ScoredModel,
    scoring: LazyModel,
    pieces: Pieces,
    shards: dict[int, range],
    advance: Callable[[int], object],
) -> None:
    """Write a model's files of some shards; the arguments are as `score_model`'s."""
    if job.ray_actors:
        counts = tokens_of(job, shards)
        for shard in ray_actors.score(job, model, list(shards)):
            advance(counts[shard])
        return
    for shard, part in shards.items():
        try:
            write_shard(job, model.name, shard, part, scoring, pieces, advance)
        except EAFTError as error:
            # The main process prints its own errors, but does not see these rows
            if not processes().is_main_process:
                print(visible(f"eaft inspect: error: {error}"), file=sys.stderr)
            raise


def keep_top_k_curve(job: Job, model: LazyModel) -> None:
    """
    Measure the top-K entropy against the exact one (the paper's Figure 6) and write it to run.json.

    A continued run keeps the first measurement.
    """
    run = read_run(job.folder, WAY)
    if run.top_k_curve is None:
        scoring = model.get()
        assert isinstance(scoring, ScoringModel)
        curve = top_k_curve(sample_logits(scoring, job.examples, job.settings.args.seed))
        write_run(job.folder, replace(run, top_k_curve=curve))


def finish(job: Job) -> None:
    """Write examples.parquet and vocabulary.parquet, and mark the run as scored."""
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
    write_parquet(
        vocabulary_table(job, Pieces(job.tokenizer)), VOCABULARY, job.folder / VOCABULARY_FILE
    )
    write_run(job.folder, replace(run, models=models, scored=True))


def vocabulary_table(job: Job, pieces: Pieces) -> pa.Table:
    """Return the text of every token that occurs, in the data or as a model's first choice."""
    seen: set[int] = set()
    for file in [*job.folder.glob("tokens/*.parquet"), *job.folder.glob("compared/*/*.parquet")]:
        names = {"token_id", "first_choice"} & set(pq.read_schema(file).names)
        for column in pq.read_table(file, columns=sorted(names)).columns:
            seen.update(column.drop_null().unique().to_pylist())
    ids = sorted(seen)
    columns = {
        "token_id": ids,
        "text": [pieces.text(i) for i in ids],
        "special": [i in pieces.special for i in ids],
    }
    return pa.table(columns, VOCABULARY)
