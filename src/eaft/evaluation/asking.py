"""How a model is asked: by its chat template, thinking or not, or in plain text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from eaft.errors import ConfigurationError
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.suite import Benchmark
from eaft.evaluation.thinking import NONE, SWITCHES, Thinking, decide, find_thinking


def settled(protocol: Protocol, tokenizer: Any) -> Protocol:
    """
    Return the protocol with `apply_chat_template` and `enable_thinking` decided, if it leaves them
    to the chat template.

    Raises:
        ConfigurationError: there is no chat template, or thinking cannot be turned on or off as the
            protocol says.
    """
    for name in SWITCHES:
        if name in {**protocol.model_args, **protocol.model_args.get("chat_template_args", {})}:
            raise ConfigurationError(
                f"model_args: {name} is a setting of its own (--enable_thinking)."
            )
    chat = (
        tokenizer.chat_template is not None
        if protocol.apply_chat_template is None
        else protocol.apply_chat_template
    )
    if chat and tokenizer.chat_template is None:
        raise ConfigurationError(
            "apply_chat_template=True: the model has no chat template. Leave it out."
        )
    if not chat and protocol.enable_thinking:
        raise ConfigurationError(
            "enable_thinking=True: a model thinks when it is asked by its chat template only."
        )
    thinks = chat and decide(
        tokenizer, protocol.enable_thinking, protocol.model_args, protocol.system_instruction
    )
    return replace(protocol, apply_chat_template=chat, enable_thinking=thinks)


def thinking_of(tokenizer: Any, protocol: Protocol) -> Thinking:
    """Return how a model thinks if it is asked by this protocol."""
    if not protocol.apply_chat_template:
        return NONE
    return find_thinking(tokenizer, protocol.model_args, protocol.system_instruction)


def check_thinking(benchmarks: dict[str, Benchmark], tokenizer: Any, protocol: Protocol) -> None:
    """
    Refuse tasks that read the likelihood of choices, if the model always thinks.

    If thinking can be turned off, it is turned off for such tasks. A task that begins the answer
    itself leaves no room for thoughts.

    Raises:
        ConfigurationError: there is such a task; or as in `settled`.
    """
    protocol = settled(protocol, tokenizer)
    thinking = thinking_of(tokenizer, protocol)
    if not protocol.enable_thinking or (thinking.off and not thinking.opens):
        return
    refused = [
        name
        for name, benchmark in benchmarks.items()
        if any(
            task.OUTPUT_TYPE != "generate_until" and not task.config.gen_prefix
            for task in benchmark.tasks.values()
        )
    ]
    if refused:
        raise ConfigurationError(
            f"{', '.join(refused)}: the likelihood of the choices is read where the answer begins,"
            " and there this model's chat template begins thoughts, which it cannot turn off."
            " Leave these tasks out, or take tasks that are answered in words."
        )


def ask(tokenizer: Any, prompt: Any, protocol: Protocol) -> str:
    """
    Return the text that a model gets for a prompt, as lm-eval makes it for tasks.

    The chat template renders the messages, with thinking on or off. Without a chat template it is
    plain text: the contents of the messages with blank lines between them. A system instruction
    comes first, unless the template refuses system messages.

    Args:
        prompt: a string or messages; or a mapping with a `prompt`, `tools` (a list, or its JSON)
            and `chat_template_kwargs`, for a chat template only.

    Raises:
        ConfigurationError: see `settled`.
    """
    protocol = settled(protocol, tokenizer)
    row = prompt if isinstance(prompt, dict) else {"prompt": prompt}
    asked, tools = row["prompt"], row.get("tools")
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    if protocol.system_instruction:
        messages.insert(0, {"role": "system", "content": protocol.system_instruction})
    if not protocol.apply_chat_template:
        return "\n\n".join(message["content"] for message in messages)
    thinking = thinking_of(tokenizer, protocol)
    settings = {
        **protocol.model_args.get("chat_template_args", {}),
        **(thinking.on if protocol.enable_thinking else thinking.off),
    }
    settings |= {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **row.get("chat_template_kwargs", {}),
    }
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **settings
        )
    except TemplateError:
        messages = [message for message in messages if message["role"] != "system"]
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **settings
        )
