"""Label the assistant's turns where the chat template does not mark them."""

from __future__ import annotations

import copy
from typing import Any

from eaft.errors import ConfigurationError
from eaft.training.config import EAFTConfig
from eaft.training.templates import (
    Row,
    conversational,
    find_template_tokenizer,
    row_messages,
    template_kwargs,
    training_template,
    with_template,
)
from eaft.training.trl_internals import global_then_local_main_first

OTHER_FORM = (
    'Split the row into {"prompt": [...], "completion": [...]}, one for each turn of the assistant:'
    " training uses the completion of each."
)


def label_turns(dataset: Any, tokenizer: Any, args: EAFTConfig) -> Any:
    """
    Return conversational rows as `input_ids` and `labels`, the assistant's tokens labelled (int64,
    -100: no label).

    This is for a template without `{% generation %}` marks. The row is rendered up to each turn of
    the assistant. The turn is the text that follows, with its end token, like the completion of a
    row of `prompt` and `completion`.

    Raises:
        ConfigurationError: a turn cannot be located, for example if a template changes earlier
            turns.
    """
    settings: Row = {"remove_columns": list(next(iter(dataset)))}
    settings["fn_kwargs"] = {
        "tokenizer": tokenizer,
        "completion_only": args.completion_only_loss is not False,
    }
    if hasattr(dataset, "__len__"):  # a stream's `map` takes neither
        settings |= {"desc": "Labelling turns", "num_proc": args.dataset_num_proc}
    with global_then_local_main_first():  # like TRL's preparation: the others read the cache
        return dataset.map(labelled_turns, with_indices=True, **settings)


def labelled_turns(
    row: Row, number: int, tokenizer: Any, completion_only: bool
) -> dict[str, list[int]]:
    """Return the tokens and labels of one row."""
    messages, settings = row_messages(row), {"tokenize": False, **template_kwargs(row)}
    text = tokenizer.apply_chat_template(messages, **settings)
    prompt = len(row["prompt"]) if "prompt" in row and completion_only else 0
    turns = [i for i, m in enumerate(messages) if i >= prompt and m["role"] == "assistant"]
    spans = []
    for turn in turns:
        span = find_turn(tokenizer, messages, turn, text, settings)
        if span is None:
            raise ConfigurationError(
                f"Row {number}: the chat template has no {{% generation %}} marks, and it renders"
                f" message {turn} differently once others follow, so that the assistant's tokens"
                f" cannot be found. {OTHER_FORM}"
            )
        spans.append(span)
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise ConfigurationError(
            "The tokenizer does not say where its tokens lie, so that the assistant's cannot be"
            f" found. {OTHER_FORM}"
        ) from error
    labels = [
        token if any(start < high and max(end, start + 1) > low for low, high in spans) else -100
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def find_turn(
    tokenizer: Any, messages: list[Row], turn: int, text: str, settings: Row
) -> tuple[int, int] | None:
    """
    Return where a turn of the assistant begins and ends in a row's text, or None if it cannot be
    located.
    """
    through = tokenizer.apply_chat_template(messages[: turn + 1], **settings)
    # Some templates write the end token once, at the end of the row
    if not text.startswith(through) and tokenizer.eos_token:
        through = through.removesuffix(tokenizer.eos_token)
    if not text.startswith(through):
        return None
    if turn == 0:  # many templates cannot render an empty list of messages
        start = text.find(str(messages[0].get("content") or "").strip())
        return (start, len(through)) if start >= 0 else None
    before = tokenizer.apply_chat_template(messages[:turn], **settings).removesuffix(
        tokenizer.eos_token or ""
    )
    asked = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, **settings)
    start = next(
        (i for i, (a, b) in enumerate(zip(asked, through, strict=False)) if a != b), len(asked)
    )
    return (start, len(through)) if len(before) <= start < len(through) else None


def mark_assistant(
    args: EAFTConfig, model: Any, tokenizer: Any, train_dataset: Any
) -> tuple[EAFTConfig, bool]:
    """
    Return the arguments for TRL, and whether `label_turns` must label the assistant's tokens.

    `assistant_only_loss` stays on if the template marks these tokens, or TRL knows a version of it
    that does. `completion_only_loss` with `messages`, which TRL ignores, means the same.
    """
    first: Row = next(iter(train_dataset), {}) if train_dataset is not None else {}
    wanted = args.assistant_only_loss or (args.completion_only_loss and "messages" in first)
    if not wanted or not conversational([first]) or {"image", "images"} & first.keys():
        return args, False
    args = copy.copy(args)
    args.assistant_only_loss = True
    if tokenizer is not None:
        tokenizer = with_template(tokenizer, args)
    else:
        revision = (args.model_init_kwargs or {}).get("revision")
        tokenizer = find_template_tokenizer(
            model if isinstance(model, str) else getattr(model, "name_or_path", ""), args, revision
        )
    if tokenizer is not None and tokenizer.chat_template is not None:
        _, args.assistant_only_loss = training_template(tokenizer, args)
    return args, not args.assistant_only_loss
