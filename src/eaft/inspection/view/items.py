"""
The items of an evaluation, as the page lists and opens them: answers of base and tuned model.

Files of other versions of eaft are read as far as they go. What cannot be shown is said in a note.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from eaft.evaluation.pairs import SAME
from eaft.inspection.view.cache import Cache

Json = dict[str, Any]  # an object of a JSON file
Listing = Literal["regressions", "gains", "all", "answers", "drift"]
LISTS: tuple[Listing, ...] = ("regressions", "gains", "all", "answers", "drift")
SNIPPET = 300  # characters of a prompt in a list; of a longer one its end, where the question is
REMEMBERED = 2  # evaluations whose items stay in memory


@dataclass(frozen=True)
class Place:
    """Where the items of an evaluation are."""

    folder: Path  # of the results
    before: str | None  # below it, the folder of the base model's items; None: there is no base
    after: str  # of the tuned model's
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Answered:
    """A model's answer to an item."""

    response: Any
    score: float | None  # in [0, 1]; None if it was not graded
    cut: list[str]  # the parts that were cut
    choices: list[float | None] | None  # log-likelihood of each choice, nats
    scores: dict[str, float] | None  # by filter, where there are several


@dataclass(frozen=True)
class Entry:
    """An item, or a prompt for drift, with all that was answered."""

    number: int  # its place among all
    benchmark: str  # the task or group
    task: str  # the lm-eval task
    doc_id: int | None  # the row's number in the task's data
    prompt: str
    target: Any  # the right answer
    before: Answered | None
    after: Answered | None
    drift: float | None  # nats per token; only of a prompt for drift
    tokens: int | None  # of the answer that drift was measured on

    @property
    def graded(self) -> bool:
        """Whether there is a score."""
        return any(
            side is not None and side.score is not None for side in (self.before, self.after)
        )

    @property
    def change(self) -> float:
        """The tuned model's score minus the base model's; 0 where there is only one."""
        if self.before is None or self.after is None:
            return 0.0
        return (self.after.score or 0.0) - (self.before.score or 0.0)


@dataclass(frozen=True)
class ItemRow:
    """An entry in a list."""

    number: int
    task: str
    doc_id: int | None
    snippet: str
    before: float | None  # scores
    after: float | None
    drift: float | None
    tokens: int | None


@dataclass(frozen=True)
class ItemPage:
    """A page of a list."""

    which: Listing
    total: int  # entries of the list that match
    rows: list[ItemRow]
    counts: dict[str, int]  # of each list, whatever the task and the search
    tasks: dict[str, int]  # entries of the list by task and group, whatever the search
    notes: list[str]  # what cannot be shown, and why


@dataclass(frozen=True)
class Items:
    """All entries of an evaluation."""

    entries: list[Entry]
    notes: list[str]

    def listed(self, which: Listing) -> list[Entry]:
        """
        Return a list: the largest loss, gain or drift first, others in the files' order.

        `answers` are answers without a score, as to held-out rows.
        """
        if which == "drift":
            drifted = [entry for entry in self.entries if entry.drift is not None]
            return sorted(drifted, key=lambda entry: -(entry.drift or 0.0))
        if which == "answers":
            return [entry for entry in self.entries if not entry.graded and entry.drift is None]
        items = [entry for entry in self.entries if entry.graded]
        if which == "regressions":
            lost = [entry for entry in items if entry.change < 0]
            return sorted(lost, key=lambda entry: entry.change)
        if which == "gains":
            gained = [entry for entry in items if entry.change > 0]
            return sorted(gained, key=lambda entry: -entry.change)
        return items

    def page(
        self, which: Listing | None, task: str, search: str, offset: int, limit: int
    ) -> ItemPage:
        """
        Return a page of a list.

        Args:
            which: the list; None: the first that is not empty.
            task: only the items of this task or group; empty: of all.
            search: only items with this text in prompt, right answer or an answer; capitals do not
                matter.
        """
        counts: dict[str, int] = {name: len(self.listed(name)) for name in LISTS}
        first: Listing = next((name for name in LISTS if counts[name]), "all")
        listed = self.listed(which or first)
        by_task: Counter[str] = Counter()
        for entry in listed:
            by_task.update({entry.benchmark, entry.task})
        found = [entry for entry in listed if task in ("", entry.task, entry.benchmark)]
        if search:
            found = [entry for entry in found if search.lower() in searched(entry)]
        return ItemPage(
            which=which or first,
            total=len(found),
            rows=[row_of(entry) for entry in found[offset : offset + limit]],
            counts=counts,
            tasks=dict(by_task),
            notes=self.notes,
        )


def text(value: Any) -> str:
    """Return a JSON value as text; a string is not changed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def searched(entry: Entry) -> str:
    """Return the text that a search looks into."""
    answers = [text(side.response) for side in (entry.before, entry.after) if side is not None]
    return "\n".join([entry.prompt, text(entry.target), *answers]).lower()


def row_of(entry: Entry) -> ItemRow:
    """Return an entry as a list shows it."""
    prompt = entry.prompt.strip()
    return ItemRow(
        number=entry.number,
        task=entry.task,
        doc_id=entry.doc_id,
        snippet=prompt if len(prompt) <= SNIPPET else f"…{prompt[-SNIPPET:]}",
        before=None if entry.before is None else entry.before.score,
        after=None if entry.after is None else entry.after.score,
        drift=entry.drift,
        tokens=entry.tokens,
    )


class ItemReader:
    """
    Reads items, and remembers the last evaluations' items until their files change.

    Args:
        read_text: returns the text of a file in a folder; empty if it cannot be read.
    """

    def __init__(self, read_text: Callable[[Path, str], str]) -> None:
        self.read_text = read_text
        self.cached = Cache(self.read, REMEMBERED)

    def __call__(self, place: Place) -> Items:
        """Return the items at a place."""
        names = [*files_of(place), "answers.json"]
        return self.cached(place, tuple(stamp(place.folder / name) for name in names))

    def read(self, place: Place, stamps: tuple[object, ...]) -> Items:
        """Return the items at a place; `stamps` tell whether its files have changed."""
        entries: list[Entry] = []
        notes: list[str] = []
        missing: list[str] = []

        def records(side: str, task: str) -> list[Json]:
            """Return the readable lines of a file of items; say what cannot be read."""
            name = f"{side}/{Path(task).stem}.jsonl"
            lines = [
                line for line in self.read_text(place.folder, name).split("\n") if line.strip()
            ]
            found = [record for record in map(parsed, lines) if record is not None]
            if not lines:
                missing.append(name)
            elif bad := len(lines) - len(found):
                notes.append(
                    f"{name}: {bad} of {len(lines)} lines are no items, and are not shown."
                )
            return found

        for task in place.tasks:
            after = records(place.after, task)
            if place.before is None:
                entries += [entry_of(task, None, record) for record in after]
                continue
            before = records(place.before, task)
            first, second = keyed(before), keyed(after)
            both = [key for key in first if key in second]
            entries += [entry_of(task, first[key], second[key]) for key in both]
            if alone := len(first) + len(second) - 2 * len(both):
                notes.append(
                    f"{task}: {alone} answers are not shown, since the other model was not asked"
                    " the same."
                )
        entries += self.drifted(place.folder)
        if missing:
            notes.insert(0, f"Missing, or cannot be read: {', '.join(missing)}.")
        return Items(numbered(entries), notes)

    def drifted(self, folder: Path) -> list[Entry]:
        """Return the base model's answers that drift was measured on."""
        try:
            answers = json.loads(self.read_text(folder, "answers.json") or "[]")
        except (ValueError, RecursionError):
            return []
        return entries_of(answers, drift_entry)


def entries_of(values: Any, make: Callable[[Json], Entry | None]) -> list[Entry]:
    """Return the entries of a list in a file, without what is none."""
    found = [make(value) for value in values if isinstance(value, dict)] if is_list(values) else []
    return [entry for entry in found if entry is not None]


def drift_entry(answer: Json) -> Entry | None:
    """Return an answer with its drift as an entry."""
    if not is_number(answer.get("drift")):
        return None
    tokens = answer.get("tokens")
    return Entry(
        number=0,
        benchmark="drift",
        task="drift",
        doc_id=None,
        prompt=text(answer.get("prompt", "")),
        target=None,
        before=Answered(answer.get("answer"), None, [], None, None),
        after=None,
        drift=float(answer["drift"]),
        tokens=int(tokens) if is_number(tokens) else None,
    )


def held_out_entry(answer: Json) -> Entry:
    """Return the answers to a held-out row, of `eaft eval` or `eaft tune`, as an entry."""
    row, before, after = (answer.get(name) for name in ("row", "before", "after"))
    return Entry(
        number=0,
        benchmark="held-out rows",
        task="held-out rows",
        doc_id=row if isinstance(row, int) else None,
        prompt=text(answer.get("prompt", "")),
        target=answer.get("target"),
        before=Answered(before, None, [], None, None),
        after=Answered(after, None, [], None, None),
        drift=None,
        tokens=None,
    )


def files_of(place: Place) -> list[str]:
    """Return the names of the files of items."""
    sides = [side for side in (place.before, place.after) if side is not None]
    return [f"{side}/{Path(task).stem}.jsonl" for side in sides for task in place.tasks]


def stamp(file: Path) -> tuple[int, int] | None:
    """Return what changes when a file does; None if there is no file."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Return whether a JSON value is a list."""
    return isinstance(value, list)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def parsed(line: str) -> Json | None:
    """Return a line's item; None if it is none: what is shown needs `prompt` and `score`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "prompt" not in record:
        return None
    return record if is_number(record.get("score")) else None


def keyed(records: list[Json]) -> dict[tuple[str, ...], Json]:
    """
    Return items by the key that they share with the same item of the other model.

    Items with equal keys, as in files without hashes, are told apart by order.
    """
    found: dict[tuple[str, ...], Json] = {}
    times: Counter[tuple[str, ...]] = Counter()
    for record in records:
        key = tuple(str(record.get(name)) for name in SAME)
        found[*key, str(times[key])] = record
        times[key] += 1
    return found


def answered(record: Any) -> Answered | None:
    """Return an item's answer; fields that are missing or of another form are left out."""
    if not isinstance(record, dict):
        return None
    score, cut, choices, scores = (record.get(n) for n in ("score", "cut", "choices", "scores"))
    return Answered(
        response=record.get("response"),
        score=float(score) if is_number(score) else None,
        cut=[text(part) for part in cut] if isinstance(cut, list) else [],
        choices=[v if is_number(v) else None for v in choices]
        if isinstance(choices, list)
        else None,
        scores=scores if isinstance(scores, dict) else None,
    )


def entry_of(task: str, before: Json | None, after: Json) -> Entry:
    """Return an item as an entry; of a group, the task is the item's own."""
    doc_id = after.get("doc_id")
    own = after.get("task", task)
    return Entry(
        number=0,
        benchmark=task,
        task=own if isinstance(own, str) else task,
        doc_id=doc_id if isinstance(doc_id, int) else None,
        prompt=text(after["prompt"]),
        target=after.get("target"),
        before=answered(before),
        after=answered(after),
        drift=None,
        tokens=None,
    )


def worst_entry(item: Json) -> Entry:
    """Return a regression as results.json has it."""
    entry = entry_of(text(item.get("benchmark", "")), None, {"prompt": "", **item})
    return replace(entry, before=answered(item.get("before")), after=answered(item.get("after")))


def numbered(entries: list[Entry]) -> list[Entry]:
    """Return the entries with their places as numbers."""
    return [replace(entry, number=number) for number, entry in enumerate(entries)]
