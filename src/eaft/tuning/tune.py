"""Train once, and return the model of the run that learned most within a budget."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from eaft.errors import EAFTError
from eaft.evaluation.comparable import comparable_models
from eaft.evaluation.paired import FEWEST_PROMPTS, bootstrap_interval
from eaft.evaluation.results import as_json
from eaft.files import read_json
from eaft.models import noted_date, template_date, template_today
from eaft.phases import Phases
from eaft.processes import locked
from eaft.provenance import environment, write_json
from eaft.text import visible
from eaft.training.apart import (
    checkpoints,
    finished,
    run_train,
)
from eaft.training.family import saved_files, write_member
from eaft.training.replay_kl import PROBS_FOLDER
from eaft.training.run_folder import RunRecord, last_complete_checkpoint
from eaft.tuning.answers import answers, most_drifted
from eaft.tuning.confirm import confirm, judge_task, typical_margin
from eaft.tuning.measure import Kept, LoadedFamily, Part, TaskChanges
from eaft.tuning.plan import (
    EXCLUDED,
    MARK,
    RUN,
    WATCHED,
    WAY,
    WORK,
    Plan,
    Settings,
    check_folder,
    check_settings,
    make_plan,
)
from eaft.tuning.points import Member, Point, Sums
from eaft.tuning.report import sentence, write_report
from eaft.tuning.results import (
    Budget,
    Confirmation,
    Data,
    Screened,
    TaskLoss,
    TuneResults,
    Unconstrained,
)
from eaft.tuning.search import Search, choose_candidates, usually_measured

RESULTS = "results.json"
HELD_OUT = "held_out.jsonl"  # the rows that confirmed, for `eaft eval`
SCREENING, CONFIRMATION, TASKS = "screening.jsonl", "confirmation.jsonl", "tasks.jsonl"
PHASES = 6  # with a model at the end; `--suite` has its own progress


def tune(settings: Settings, train_flags: list[str]) -> TuneResults:
    """
    Train, screen, confirm, and write the returned model with its report; see docs/tuning.md.

    The same call continues a killed one, and changes nothing after a finished one.

    Args:
        train_flags: of `eaft train`: the model, the data, and whatever else.

    Raises:
        ConfigurationError: anything that is wrong before training begins.
        EAFTError: training failed.
    """
    check_settings(settings)
    folder = Path(settings.output_dir)
    day = noted_date(folder / MARK) or template_today()
    with template_date(day):
        plan = make_plan(settings, train_flags, day)
        check_folder(folder, plan.identity)
        with locked(folder, begins_with=(MARK,)):
            check_folder(folder, plan.identity)
            write_json(folder / MARK, plan.identity)
            if (folder / RESULTS).is_file():
                results = read_json(folder / RESULTS, TuneResults, WAY)
                say(f"{folder} holds these results; nothing was changed.\n\n{results.sentence}")
            else:
                results = run(plan, settings, folder)
            if not settings.keep_checkpoints:
                delete_weights(folder / WORK / RUN)
    return results


def run(plan: Plan, settings: Settings, folder: Path) -> TuneResults:
    """Do all that is left to do, in a folder that no other command uses."""
    work = folder / WORK
    work.mkdir(exist_ok=True)
    introduce(plan, settings)
    phases = Phases()
    phases.count = PHASES
    stopped = train(plan, work, phases)["result"].get("stopped_early")
    if stopped:
        say(stopped)
    saved = checkpoints(work / RUN)
    members = [
        checkpoint
        for checkpoint in saved
        if saved_files(checkpoint.folder) or (checkpoint.folder / "adapter_config.json").is_file()
    ]
    way = "Under FSDP, set fsdp_state_dict_type: FULL_STATE_DICT."
    if not members:
        raise EAFTError(f"{work / RUN} holds no model as safetensors. {way}")
    if len(members) < len(saved):
        say(
            f"{len(saved) - len(members)} of {len(saved)} checkpoints hold no model as safetensors,"
            f" and are left out. {way}"
        )
    _, base = comparable_models(str(members[-1].folder), plan.base.model, plan.protocol, drift=True)
    assert base is not None
    batches = sum(-(-len(prompts) // base.protocol.answer_batch) for prompts in plan.prompts)
    steps = batches * settings.max_new_tokens
    with phases.counted("answers of the base model, for drift", steps, "steps at most") as advance:
        screening, confirmation = (
            Part.of(base, rows, prompts, advance)
            for rows, prompts in zip(plan.rows, plan.prompts, strict=True)
        )
    family = LoadedFamily(base, members, plan.options)
    kept = Kept(work / SCREENING, screening, family)
    usual = usually_measured(len(members))
    with phases.counted("screening", usual, "models or so") as advance:
        search = Search(Told(kept, "choose", advance), screening.base_nll.mean)
        search.run([member.step for member in members], settings.drift_limit)
        candidates = choose_candidates(
            search, settings.drift_limit, settings.strict, len(confirmation.answers.answers)
        )
    kept = Kept(work / CONFIRMATION, confirmation, family)
    changes = TaskChanges(work / TASKS, plan.benchmarks, base, family)
    statements = len(candidates) * len(plan.benchmarks)

    def losses(member: Member) -> list[TaskLoss]:
        if plan.benchmarks:
            say(f"Tasks: {', '.join(plan.benchmarks)}")
        assert settings.max_drop is not None or not plan.benchmarks
        return [
            judge_task(name, change, settings.max_drop or 0.0, statements)
            for name, change in changes(member).items()
        ]

    with phases.counted("confirmation", len(candidates), "models at most") as advance:
        chosen, tried = confirm(
            [point.member for point in candidates],
            Told(kept, "confirm", advance),
            confirmation.base_nll,
            settings.drift_limit,
            settings.strict,
            losses,
        )
    results = TuneResults(
        status="none" if chosen is None else "shown" if chosen.shown else "within",
        sentence="",
        budget=Budget(
            max_drift=settings.max_drift, max_drop=settings.max_drop, strict=settings.strict
        ),
        model=str(plan.configs[2].model_name_or_path),
        data=Data(
            training_rows=plan.training_rows,
            screening_rows=len(plan.rows[0]),
            confirmation_rows=len(plan.rows[1]),
            left_out=plan.left_out,
            screening_prompts=len(plan.prompts[0]),
            confirmation_prompts=len(plan.prompts[1]),
        ),
        base_nll=confirmation.base_nll.mean,
        base_nll_screening=screening.base_nll.mean,
        chosen=chosen,
        candidates=tried,
        screened=[screened(point, screening.base_nll) for point in search.points],
        unconstrained=unconstrained(search, chosen),
        answers=[] if chosen is None else answers(plan, family, chosen, phases),
        stopped_early=stopped,
        most_drifted=(
            [] if chosen is None else most_drifted(plan, kept, chosen, confirmation, base.tokenizer)
        ),
        flags=plan.arguments,
        environment=environment(),
    )
    results.sentence = sentence(results)
    if chosen is not None:
        phases.begin("writing the model")
        write_rows(plan.held_out[1], folder / HELD_OUT)
        write_model(plan, family.folders[chosen.step], chosen, results.sentence, folder)
    write_report(results, folder)
    write_json(folder / RESULTS, as_json(results))  # last: it says that all beside it is there
    say(farewell(results, folder, settings))
    return results


def introduce(plan: Plan, settings: Settings) -> None:
    """Say how many rows and prompts there are, and what so many can show."""
    screening, confirmation = map(len, plan.rows)
    prompts = len(plan.prompts[1])
    lost = f" ({plan.left_out} of --held_out left out: trained on)" if plan.left_out else ""
    text = ""
    if settings.max_drift is not None and prompts >= FEWEST_PROMPTS:
        most = settings.max_drift / (1 + typical_margin(prompts))
        text = (
            f" With {prompts} prompts a drift of up to about {most:.2g} can usually be shown to be"
            f" within {settings.max_drift:g}."
        )
    say(
        f"{plan.training_rows} rows to train on; held out: {screening} to choose by and"
        f" {confirmation} to confirm on{lost}. Drift: {len(plan.prompts[0])} prompts to choose by,"
        f" {prompts} to confirm on.{text}"
    )


def train(plan: Plan, work: Path, phases: Phases) -> RunRecord:
    """
    Train the run to its end, unless it has been, and return its record.

    Raises:
        EAFTError: it failed; its message is in the output.
    """
    folder = work / RUN
    if record := finished(folder):
        phases.begin("training, done before")
        return record
    checkpoint = last_complete_checkpoint(folder) if folder.is_dir() else None
    if checkpoint is None:  # what was measured is of another run
        for name in (SCREENING, CONFIRMATION, TASKS):
            (work / name).unlink(missing_ok=True)
    if plan.excluded:
        write_rows(plan.excluded, work / EXCLUDED)
    if plan.watched:
        write_rows(plan.held_out[0], work / WATCHED)
    phases.begin("training" + (f" from {checkpoint}" if checkpoint else ""))
    code = run_train([*plan.arguments, "--resume_from_checkpoint", "true"], folder)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise EAFTError(f"training ended with exit code {code}; its message is above.")
    for pattern in ("optimizer*", "scheduler*", "rng_state*", "scaler*"):
        for file in folder.glob(f"checkpoint-*/{pattern}"):
            # Only a run that goes on needs them. FSDP writes folders
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    record = finished(folder)
    assert record is not None
    return record


def write_rows(rows: Iterable[Any], file: Path) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    staging = file.with_name(f"{file.name}.tmp")
    staging.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    os.replace(staging, file)


class Told:
    """
    Measures members of the family, and says what was found.

    Args:
        measure: measures one.
        what: what its rows do: choose, or confirm.
        advance: called with 1 after each.
    """

    def __init__(self, measure: Kept, what: str, advance: Callable[[int], object]) -> None:
        self.measure, self.what, self.advance = measure, what, advance

    def __call__(self, member: Member) -> Point:
        """Measure, and say so."""
        point = self.measure(member)
        say(
            f"    step {member.step}, share {member.share:g}: nll {point.nll.mean:.4f} on the rows"
            f" that {self.what}, drift {point.drift.mean:.4f}"
        )
        self.advance(1)
        return point


def screened(point: Point, base_nll: Sums) -> Screened:
    """
    Return a point of screening as it is reported.

    Args:
        base_nll: the base model's, of the same rows.
    """
    nll, drift = point.nll, point.drift
    change = Sums(nll.sums - base_nll.sums, nll.counts)
    nll_low, nll_high = bootstrap_interval(change.sums, change.counts)
    drift_low, drift_high = bootstrap_interval(drift.sums, drift.counts)
    return Screened(
        step=point.member.step,
        share=point.member.share,
        nll=nll.mean,
        drift=drift.mean,
        nll_change=change.mean,
        nll_low=nll_low,
        nll_high=nll_high,
        drift_low=drift_low,
        drift_high=drift_high,
    )


def unconstrained(search: Search, chosen: Confirmation | None) -> Unconstrained:
    """Return the lowest held-out nll of all that screening measured, and what the budget cost."""
    best = min(search.points, key=lambda point: point.nll.mean)
    cost = None
    if chosen is not None:
        cost = search.at(chosen.step, chosen.share).nll.mean - best.nll.mean
    return Unconstrained(
        step=best.member.step,
        share=best.member.share,
        nll=best.nll.mean,
        drift=best.drift.mean,
        cost=cost,
    )


def write_model(
    plan: Plan, checkpoint: Path, chosen: Confirmation, said: str, folder: Path
) -> None:
    """Write the chosen model beside its place, and move its files to the top of the folder."""
    staging = folder / WORK / "model"
    shutil.rmtree(staging, ignore_errors=True)
    write_member(plan.base.model, checkpoint, chosen.share, staging, plan.options)
    card = folder / WORK / RUN / "README.md"
    text, name = card.read_text() if card.is_file() else "", folder.resolve().name
    for line in ("# {}\n", "model_name: {}\n"):
        text = text.replace(line.format(RUN), line.format(name), 1)
    share = "" if chosen.share == 1 else f" It is base + {chosen.share} * (checkpoint - base)."
    (staging / "README.md").write_text(f"{text}\n## Tuned within a budget\n\n{said}{share}\n")
    for path in sorted(staging.iterdir()):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    staging.rmdir()


def delete_weights(run_folder: Path) -> None:
    """Delete the run's weights, checkpoints and kept probabilities; its logs stay."""
    for path in [*run_folder.glob("checkpoint-*"), *run_folder.glob(PROBS_FOLDER)]:
        shutil.rmtree(path)
    for path in [*run_folder.glob("*.safetensors"), *run_folder.glob("*.safetensors.index.json")]:
        path.unlink()


def farewell(results: TuneResults, folder: Path, settings: Settings) -> str:
    """Return the last message: the sentence, what was written, and what to do next."""
    kept = (
        "The run's checkpoints are kept."
        if settings.keep_checkpoints
        else f"The run's checkpoints are deleted; logs and measurements are in {folder / WORK}."
    )
    if results.chosen is None:
        return (
            f"\n{results.sentence}\n\nWritten to {folder}: report.html, front.png, {RESULTS}; no"
            f" model. {kept} Raise the budget, or train less, in another --output_dir."
        )
    return (
        f"\n{results.sentence}\n\nWritten to {folder}: the model, report.html, front.png,"
        f" {RESULTS}, {HELD_OUT} (the rows that confirmed). {kept}\nNext: eaft view {folder}\nMore"
        f" answers, and tasks: eaft eval {folder} --base {results.model} --held_out"
        f" {folder / HELD_OUT} --held_out_answers {min(results.data.confirmation_rows, 32)} --suite"
        " everyday"
    )


def say(message: str) -> None:
    """Print a message at once."""
    print(visible(message), flush=True)
