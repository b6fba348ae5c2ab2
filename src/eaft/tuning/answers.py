"""What `eaft tune` shows of the chosen model: answers to held-out rows, and what drifted most."""

from __future__ import annotations

from typing import Any

from eaft.evaluation.held_out import to_show
from eaft.evaluation.results import HeldOutAnswer
from eaft.phases import Phases
from eaft.training.run_rows import asked_by, text_of
from eaft.tuning.measure import Kept, LoadedFamily, Part
from eaft.tuning.plan import Plan
from eaft.tuning.points import Member
from eaft.tuning.results import Confirmation, Drifted

SHOWN_ANSWERS, SHOWN_TOKENS, SHOWN_DRIFTED = 8, 128, 5


def answers(
    plan: Plan, family: LoadedFamily, chosen: Confirmation, phases: Phases
) -> list[HeldOutAnswer]:
    """Return the first confirmation rows with the answers of the base and of the chosen model."""
    rows, base = plan.held_out[1], family.base
    asked, prompts, room = to_show(base, asked_by(rows), SHOWN_ANSWERS, SHOWN_TOKENS)
    if not asked:
        return []
    batches = -(-len(prompts) // base.protocol.answer_batch)
    with phases.counted("answers before and after", 2 * batches * room, "steps") as advance:
        sides = [
            family.likeliest(Member(chosen.step, share), prompts, room, advance)
            for share in (0.0, chosen.share)
        ]
    return [
        HeldOutAnswer(row=row.row, prompt=row.text, target=row.target, before=before, after=after)
        for row, before, after in zip(asked, *sides, strict=True)
    ]


def most_drifted(
    plan: Plan, kept: Kept, chosen: Confirmation, part: Part, tokenizer: Any
) -> list[Drifted]:
    """Return the confirmation prompts on whose answers the chosen model has drifted most."""
    drift, prompts = kept(Member(chosen.step, chosen.share)).drift, plan.prompts[1]
    means = drift.sums / drift.counts
    return [
        Drifted(
            prompt=prompt_text(prompts[i]),
            answer=tokenizer.decode(part.answers.answers[i].answer_ids, skip_special_tokens=True),
            drift=float(means[i]),
        )
        for i in means.argsort()[::-1][:SHOWN_DRIFTED]
    ]


def prompt_text(prompt: Any) -> str:
    """Return a prompt, as `eaft.evaluation.asking.ask` takes it, as a reader sees it."""
    return text_of(prompt["prompt"] if isinstance(prompt, dict) else prompt)
