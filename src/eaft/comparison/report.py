"""The report of a comparison: results.md, results.json, and the pictures beside them."""

from __future__ import annotations

from pathlib import Path

from eaft.comparison.collect import LEVEL
from eaft.comparison.pictures import draw_curves, draw_fronts, draw_pareto
from eaft.comparison.results import Comparison, PairResult
from eaft.comparison.sentences import fronts_of, headline, interpolated_fronts, where
from eaft.comparison.tables import checkpoints_table, objectives_table, pairs_table, table_1
from eaft.comparison.wording import VIEWS, views_of
from eaft.evaluation.report import briefly, settings_text
from eaft.evaluation.results import as_json
from eaft.provenance import write_json
from eaft.text import markdown_strings, table


def write(results: Comparison, folder: Path) -> str:
    """
    Write results.md, the pictures and, last, results.json, with the sentence that is made here;
    return the Markdown.
    """
    # An earlier run's. results.json says that all files beside it belong to one run
    (folder / "results.json").unlink(missing_ok=True)
    safe = markdown_strings(results)
    results.sentence = safe.sentence = headline(safe)
    for run, raw in zip(safe.runs, results.runs, strict=True):
        run.differs = raw.differs  # shown as code, which keeps text as it is
    text = markdown(safe)
    (folder / "results.md").write_text(text)
    draw_pareto(results, folder / "pareto.png")
    draw_curves(results, folder)
    draw_fronts(results, folder / "fronts.png")
    write_json(folder / "results.json", as_json(results))
    return text


# The tables


def markdown(results: Comparison) -> str:
    """Return the whole report."""
    seeds = results.recipe["seeds"]
    lines = [results.sentence]
    if results.failed:
        lines += [
            "## What failed",
            "\n".join(f"- {failure.message}" for failure in results.failed),
        ]
    lines += [
        "## Gained and forgotten",
        f"Seeds: {', '.join(map(str, seeds))}"
        + ("; mean ± standard deviation over them" if len(seeds) > 1 else "")
        + ". Drift: mean KL(base ‖ tuned), nats per token, over the base model's own answers.",
    ]
    views = views_of(results)
    for view in views:
        lines += [f"### {VIEWS[view]}", objectives_table(results, view)]
    if results.pairs:
        lines += ["## Objective against objective", how_tested(results.pairs)]
        lines += [
            part
            for view in views
            for part in (f"### {VIEWS[view]}", pairs_table(results.pairs, view))
        ]
        if targets := list(results.pairs[0].fronts):
            lines += ["## Drift at a matched target", MATCHED]
            lines += [
                "\n".join(
                    f"- {where(fronts)}"
                    for target in targets
                    for pair in results.pairs
                    for fronts in fronts_of(pair)
                    if fronts.target == target
                )
            ]
            if interpolated := interpolated_fronts(results):
                lines += ["### With interpolation toward the base model", INTERPOLATED]
                lines += ["\n".join(f"- {where(fronts)}" for fronts in interpolated)]
            lines += ["![The fronts, and their differences](fronts.png)"]
    if results.groups:
        lines += ["## Every benchmark", table_1(results, views[0])]
    lines += ["## What was asked", *asked_section(results)]
    lines += ["## Every checkpoint", checkpoints_table(results)]
    lines += ["![What was learned against what was kept](pareto.png)", "![Training](curves.png)"]
    return "\n\n".join(lines) + "\n"


MATCHED = (
    "The least drift with which each objective, at any of its learning rates and checkpoints, has a"
    " target at least so good; linear between checkpoints. The band is simultaneous: in about 95%"
    " of comparisons it holds the whole true curve. It carries the uncertainty of drift (prompts),"
    " of the target (held-out examples or items) and of seeds."
)


INTERPOLATED = (
    "Interpolation needs no training, so it is what an objective has to beat. The first line of a"
    " pair says whether the objective adds to it, the second whether it does better alone. The"
    " interpolations are measured, like checkpoints; linear between them."
)


def how_tested(pairs: list[PairResult]) -> str:
    """Return how the pairs were tested."""
    several = "items (or prompts) and seeds both count (Cochran and Cox's t)"
    one = "one seed, so items (or prompts) alone count, as in `eaft eval`"
    counts = {len(pair.seeds) > 1 for pair in pairs}
    how = (
        several
        if counts == {True}
        else one
        if counts == {False}
        else f"{several}; where there is {one}"
    )
    return (
        f"First minus second, on the same items. 95% intervals; {how}. p is adjusted by Holm's"
        " method over the pairs and, together, means, drift and nll; or single tasks. **Bold**:"
        f" adjusted p < {LEVEL}."
    )


def asked_section(results: Comparison) -> list[str]:
    """Return how the tasks were asked, what was cut, and what was not measured anew."""
    protocol = results.protocol
    template = (
        "with the chat template"
        if protocol.apply_chat_template
        else "in plain text, without a chat template"
    )
    thinking = {True: ", thinking on", False: ", thinking off", None: ""}[protocol.enable_thinking]
    thinking = thinking if protocol.apply_chat_template else ""
    limit = f", at most {protocol.limit} items of each task" if protocol.limit else ""
    rows = []
    for task, a in results.asked.items():
        cut = [
            f"{model}: {', '.join(f'{n} {part}s' for part, n in vars(parts).items() if n)}"
            for model, parts in a.cut.items()
            if any(vars(parts).values())
        ]
        about = (briefly(a.version), a.metric, a.filter, briefly(a.num_fewshot))
        rows.append([task, *about, "; ".join(cut) or "nothing"])
    kept = {model: what for model, what in results.kept.models.items() if what}
    read = (
        "Not measured anew, but read from the store (`eaft cache` says where): measurements of"
        f" {len(kept)} models."
    )
    return [
        (
            f"Asked {template}{thinking}, in {protocol.dtype}, seed {protocol.seed}{limit}."
            " Cut: items, over all seeds, to fit the context or the limit of an answer."
        ),
        *(
            [table(rows, ["task", "version", "metric", "filter", "examples", "cut"])]
            if rows
            else []
        ),
        *([read] if kept else []),
        *differs_lines(results),
    ]


def differs_lines(results: Comparison) -> list[str]:
    """Return the settings, beside the weights, in which the runs' models differ from the base."""
    folders: dict[str, list[str]] = {}
    for run in results.runs:
        if run.differs:
            folders.setdefault(settings_text(run.differs), []).append(run.folder)
    return [
        f"**{', '.join(names)}: differs from the base model in more than weights**: {settings}. All"
        " models were asked with one chat template and one tokenizer; each stops and generates as"
        " its own folder says."
        for settings, names in folders.items()
    ]
