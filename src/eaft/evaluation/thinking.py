"""Does a model think before it answers, and can it be told not to? Found out from its chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eaft.errors import ConfigurationError

END = "</think>"
SWITCHES = ("enable_thinking", "thinking")  # Qwen, SmolLM, GLM and others; DeepSeek and Granite


@dataclass(frozen=True)
class Thinking:
    """
    How a chat template lets its model think.

    Attributes:
        switch: the template's variable that turns thinking on and off; None if it has none.
        opens: whether the prompt of an answer ends within the thoughts, with nothing to turn that off.
        end: what ends the thoughts; None if the template and the vocabulary know no thoughts.
    """

    switch: str | None
    opens: bool
    end: str | None


def find_thinking(tokenizer: Any, end: str | None = None) -> Thinking:
    """
    Return how a tokenizer's chat template, if it has one, lets the model think.

    Args:
        end: what ends the thoughts; None to look for `</think>` in the template and the vocabulary.
    """

    if tokenizer.chat_template is None:
        return Thinking(None, False, None)

    def render(**settings: bool) -> str:
        chat = [{"role": "user", "content": "Hello"}]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **settings)

    switch = next((name for name in SWITCHES if render(**{name: True}) != render(**{name: False})), None)
    if end is None and (END in tokenizer.get_chat_template() or END in tokenizer.get_added_vocab()):
        end = END
    return Thinking(switch, switch is None and end is not None and is_open(render(), end), end)


def start_of(end: str) -> str:
    """Return what begins the thoughts that `end` ends: `<think>` for `</think>`."""
    return end.replace("/", "", 1)


def is_open(prompt: str, end: str) -> bool:
    """Return whether what follows the prompt are thoughts."""
    return prompt.rstrip().endswith(start_of(end))


def decide(tokenizer: Any, wanted: bool | None, end: str | None = None) -> bool:
    """
    Return whether a model asked by its chat template thinks: as wanted, or for None off wherever that can be.

    Raises:
        ConfigurationError: what is wanted cannot be, or nobody knows what ends the thoughts.
    """
    found = find_thinking(tokenizer, end)
    if found.opens and wanted is False:
        raise ConfigurationError(
            "enable_thinking=False: this chat template always begins an answer with thoughts. Leave it out, or take "
            "a model whose template can turn them off."
        )
    if wanted and found.switch is None and not found.opens and (end or END) not in tokenizer.get_chat_template():
        raise ConfigurationError(
            "enable_thinking=True: this chat template knows no thinking (neither a variable that turns it on, nor "
            f"{END}). Leave it out."
        )
    if wanted and found.end is None:
        raise ConfigurationError(
            f"enable_thinking=True: what ends this model's thoughts is unknown ({END} is not in its chat template). "
            'Name it: --model_args \'{"think_end_token": "..."}\'.'
        )
    return found.opens if wanted is None else wanted


def split_thoughts(prompt: str, text: str, end: str | None) -> str | None:
    """
    Return the answer in what a model wrote to a prompt; None if its thoughts never ended, so that there is no answer.

    Args:
        end: what ends the thoughts; None if the model does not think.
    """
    if end is None or end in text:
        return text.rpartition(end)[2] if end else text
    return None if is_open(prompt, end) or text.lstrip().startswith(start_of(end)) else text
