"""
Does a model think before it answers, and can it be told not to? Read from what its chat
template renders.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from eaft.errors import ConfigurationError, first_line

END = "</think>"
SWITCHES = ("enable_thinking", "thinking")  # Qwen, SmolLM, GLM and others; DeepSeek and Granite
VALUES = (
    (True, False),
    (-1, 0),
    ("on", "off"),
    ("enabled", "disabled"),
    ("high", "none"),
)  # on and off, as they occur
KEYS = (
    "reasoning_content",
    "reasoning",
    "thinking",
)  # of a message: where templates look for its thoughts
THOUGHTS, ANSWER = "HMMHMM", "ANSWERANSWER"
TAG = re.compile(r"(?:<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷\s]+▷)")
EMPTY = re.compile(rf"({TAG.pattern})\s*({TAG.pattern})\s*$")
WAY_OUT = '--model_args \'{"think_start_token": "...", "think_end_token": "..."}\''


@dataclass(frozen=True)
class Thinking:
    """
    How a chat template lets its model think.

    Attributes:
        on: the template's variables that turn thinking on; empty if it has none.
        off: the variables that turn it off.
        opens: whether the prompt of an answer ends within the thoughts, and nothing turns that off.
        start: what begins the thoughts; None if that is unknown.
        end: what ends the thoughts; None if the template and the vocabulary know no thoughts.
    """

    on: dict[str, Any]
    off: dict[str, Any]
    opens: bool
    start: str | None
    end: str | None


NONE = Thinking({}, {}, False, None, None)


def find_thinking(
    tokenizer: Any, markers: dict[str, Any] | None = None, system: str | None = None
) -> Thinking:
    """
    Return how a tokenizer's chat template, if it has one, lets the model think.

    Args:
        markers: `think_end_token` and `think_start_token`; they replace the template's.
        system: the system message that the model is asked with, which may turn its thoughts off.
    """
    if tokenizer.chat_template is None:
        return NONE
    own = [(markers or {}).get(f"think_{name}_token") for name in ("start", "end")]
    start, end = (str(tokenizer.convert_ids_to_tokens(m)) if isinstance(m, int) else m for m in own)
    return probe(tokenizer, str(tokenizer.get_chat_template()), start, end, system)


@lru_cache(maxsize=16)
def probe(
    tokenizer: Any, template: str, start: str | None, end: str | None, system: str | None
) -> Thinking:
    """Return `find_thinking`'s answer; every prompt asks for it."""

    def render(*turns: dict[str, Any], **settings: Any) -> str:
        """
        Return a chat of a question and these turns; a prompt if there are none; an empty text if
        the template refuses.
        """
        chat = [{"role": "user", "content": "Hello"}, *turns]
        options = {"tokenize": False, "add_generation_prompt": not turns, **settings}
        for opening in ([{"role": "system", "content": system}], []) if system else ([],):
            try:
                return str(tokenizer.apply_chat_template([*opening, *chat], **options))
            except TemplateSyntaxError as error:
                raise ConfigurationError(
                    f"The chat template is not valid Jinja (line {error.lineno}:"
                    f" {first_line(error)}): mend it, or give a model with another."
                ) from error
            except TemplateError:
                continue
            # The template does not know a setting
            except (TypeError, ValueError, KeyError, IndexError, AttributeError):
                return ""
        return ""

    prompt = render()
    plain, _ = parts(prompt, render(said(ANSWER)))
    marks = markers_of(tokenizer, template, render, plain)
    if end is None:
        start, end = start or marks[0], marks[1]
    elif start is None:
        start = marks[0] if end == marks[1] else start_of(end)
    settings = find_switch(template, render, start, end)
    off = render(**settings[1]) if settings else prompt
    left, _ = parts(off, render(said(ANSWER), **(settings[1] if settings else {})))
    tags = TAG.findall(left)
    # The text of a prompt that no earlier message has before its content: thoughts, begun or empty
    begun = (
        bool(tags)
        and left.strip().endswith(tags[-1])
        and not closes(tags[-1], end)
        and not EMPTY.search(left)
    )
    if begun and start is None:
        start = tags[-1]
    opens = (
        start is not None
        and (begun or is_open(off, start))
        and not (end and off.rstrip().endswith(end))
    )
    on, off_settings = settings or ({}, {})
    return Thinking(on, off_settings, opens, start, end)


def said(content: str, **more: Any) -> dict[str, Any]:
    """Return an assistant's message as chat templates take it."""
    return {"role": "assistant", "content": content, **more}


def parts(prompt: str, chat: str) -> tuple[str, str]:
    """
    Return the ends of a prompt and of a chat, from where they differ; empty texts if the chat was
    not rendered.
    """
    if ANSWER not in chat:
        return "", ""
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, chat, strict=False)) if a != b),
        min(len(prompt), len(chat)),
    )
    return prompt[same:], chat[same:]


def closes(tag: str, end: str | None) -> bool:
    """Return whether a tag ends something."""
    return tag == end or "/" in tag


def markers_of(
    tokenizer: Any, template: str, render: Any, plain: str
) -> tuple[str | None, str | None]:
    """
    Return what begins and what ends a model's thoughts, by how the template renders thoughts, or
    cuts them from an earlier answer.

    Args:
        plain: the end of a prompt that earlier messages do not have.
    """
    prompt = render()
    forms = [said(ANSWER, **dict.fromkeys(KEYS, THOUGHTS))]
    forms += [said([{"type": "thinking", "thinking": THOUGHTS}, {"type": "text", "text": ANSWER}])]  # type: ignore[arg-type]
    for turn in forms:
        chat = render(turn)
        before, thoughts, after = chat.partition(THOUGHTS)
        end = after.partition(ANSWER)[0].strip()
        if thoughts and ANSWER in after and end and "{" not in end:
            start = parts(prompt, before + ANSWER)[1].partition(ANSWER)[0].strip()
            return start or start_of(end) or last_tag(before), end
    literals = [a or b for a, b in re.findall(r"'([^'\n]{2,40})'|\"([^\"\n]{2,40})\"", template)]
    tags = list(
        dict.fromkeys(
            tag
            for text in literals
            for tag in [text.strip(), *TAG.findall(text)]
            if TAG.search(tag)
        )
    )
    asked = {"role": "user", "content": "And?"}
    for start, end in itertools.chain(
        ((None, tag) for tag in tags), itertools.permutations(tags[:16], 2)
    ):
        chat = render(said(f"{start or ''}{THOUGHTS}{end}{ANSWER}"), asked)
        if ANSWER in chat and THOUGHTS not in chat:
            return start or start_of(end) or last_tag(plain) or None, end
    known = {END: 0, **tokenizer.get_added_vocab()}
    ends = [token for token in known if "think" in token.lower() and closes(token, END)]
    for end in [
        *ends,
        *re.findall(r"</[\w:|]*think[\w:|]*>|<\|END_THINKING\|>|\[/THINK\]", template),
    ]:
        if end in template or end in tokenizer.get_added_vocab():
            return start_of(end), end
    if empty := EMPTY.search(plain):
        return empty[1], empty[2]
    return None, None


def last_tag(text: str) -> str | None:
    """Return the tag that a text ends with."""
    tags = TAG.findall(text)
    return tags[-1] if tags and text.rstrip().endswith(tags[-1]) else None


def find_switch(
    template: str, render: Any, start: str | None, end: str | None
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """
    Return the settings that turn thoughts on and off; None if there are none.

    A variable counts if its name is known, or if with its second value the prompt begins no
    thought.
    """
    names = re.findall(r"\b\w*(?:think|reason)\w*\b", template)
    for name in dict.fromkeys([*SWITCHES, *names]):
        for on, off in VALUES:
            first, second = render(**{name: on}), render(**{name: off})
            if not (first and second) or first == second:
                continue
            if name in SWITCHES:
                return {name: on}, {name: off}
            left = parts(first, second + ANSWER)[1].removesuffix(ANSWER)
            shut = (end is not None and second.rstrip().endswith(end)) or EMPTY.search(left)
            if shut or (start is not None and is_open(first, start) and not is_open(second, start)):
                return {name: on}, {name: off}
    return None


def start_of(end: str) -> str | None:
    """
    Return what begins the thoughts that `end` ends: `<think>` for `</think>`; None if that cannot
    be told.
    """
    for last, first in (("/", ""), ("END", "START"), ("end", "begin"), ("suffix", "prefix")):
        if last in end:
            return end.replace(last, first, 1)
    return None


def is_open(prompt: str, start: str | None) -> bool:
    """Return whether what follows the prompt are thoughts."""
    return start is not None and prompt.rstrip().endswith(start)


def decide(
    tokenizer: Any,
    wanted: bool | None,
    markers: dict[str, Any] | None = None,
    system: str | None = None,
) -> bool:
    """
    Return whether a model that is asked by its chat template thinks: as wanted or, for None, not if
    that can be turned off.

    Raises:
        ConfigurationError: the template cannot do what is wanted, or what begins or ends the
            thoughts is unknown.
    """
    thinking = find_thinking(tokenizer, markers, system)
    if thinking.opens and wanted is False:
        told = (
            " Its system message can: --system_instruction /no_think."
            if has_no_think(tokenizer)
            else ""
        )
        raise ConfigurationError(
            "enable_thinking=False: this chat template always begins an answer with thoughts."
            f" Leave it out, or take a model whose template can turn them off.{told}"
        )
    if thinking.opens and thinking.end is None:
        raise ConfigurationError(
            f"thinking: this chat template begins each answer with {thinking.start!r}, and what"
            f" ends such thoughts is unknown. Name it: {WAY_OUT}."
        )
    if thinking.end is not None and thinking.start is None:
        raise ConfigurationError(
            f"thinking: {thinking.end!r} ends this model's thoughts, and what begins them is"
            " unknown, so that an answer without thoughts cannot be told from one that is cut. Name"
            f" both: {WAY_OUT}."
        )
    if wanted and not thinking.on and not thinking.opens and thinking.end is None:
        raise ConfigurationError(
            "enable_thinking=True: this chat template knows no thinking (neither a variable that"
            f" turns it on, nor {END}). Leave it out."
        )
    if wanted and thinking.end is None:
        raise ConfigurationError(
            f"enable_thinking=True: what ends this model's thoughts is unknown ({END} is not in its"
            f" chat template). Name it: {WAY_OUT}."
        )
    return thinking.opens if wanted is None else wanted


def has_no_think(tokenizer: Any) -> bool:
    """
    Return whether a system message `/no_think` turns off thoughts that the template otherwise
    begins.
    """
    return (
        "/no_think" in tokenizer.get_chat_template()
        and not find_thinking(tokenizer, None, "/no_think").opens
    )


def split_thoughts(prompt: str, text: str, start: str | None, end: str | None) -> str | None:
    """
    Return the answer in what a model wrote to a prompt; None if its thoughts never ended, so that
    there is no answer.

    Args:
        start: what begins the thoughts.
        end: what ends the thoughts; None if the model does not think.
    """
    if end is None:
        return text
    if end in text:
        return text.rpartition(end)[2]
    began = is_open(prompt, start) or (start is not None and text.lstrip().startswith(start))
    return None if began else text
