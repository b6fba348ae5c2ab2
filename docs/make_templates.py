"""
Write the table of docs/templates.md: what the chat templates that the installed TRL ships do with
the same few rows.

    .venv/bin/python docs/make_templates.py

Needs no download: the tokenizer is one of bytes, with each template's special tokens.
"""

import re
from pathlib import Path
from unittest.mock import patch

import trl
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAGE = Path(__file__).with_name("templates.md")
BEGIN, END = "<!-- made by docs/make_templates.py -->\n", "<!-- end -->\n"
COLUMNS = [
    "template",
    "thoughts: switch",
    "written in rows",
    "prompt is a prefix: text",
    "tokens",
    "a row ends with",
]
COLUMNS += ["tool arguments: map", "JSON text", "system text added", "date"]
USER = {"role": "user", "content": "Question?"}
ANSWER = {"role": "assistant", "content": "Answer."}
SWITCHES = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning_effort": ("high", "low"),
    "thinking_budget": (0, 512),
}
TODAY = "THE-DATE"
SPECIAL = r"<[|\uff5c/]?[\w\u2581|\uff5c]+[|\uff5c]?>"
NEWLINE = "\u010a"  # as byte-level tokenizers write it


def byte_tokenizer():
    """Return a tokenizer of bytes in which line ends merge, as they do for Qwen and Llama 3."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), NEWLINE * 2]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [(NEWLINE, NEWLINE)]))
    split = pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")


class Template:
    """A chat template and a tokenizer that knows its special tokens."""

    def __init__(self, text):
        self.text, self.tokenizer = text, byte_tokenizer()
        self.tokenizer.add_tokens(sorted(set(re.findall(SPECIAL, text))), special_tokens=True)
        self.blocks = False
        if self.render([USER, ANSWER]) is None or "Answer." not in self.render([USER, ANSWER]):
            self.blocks = True  # of vision-language models: contents are lists

    def render(self, messages, **settings):
        """Return the text of messages, or None where the template raises."""
        if self.blocks:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        settings |= {"chat_template": self.text, "tokenize": False}
        with patch("transformers.utils.chat_template_utils.datetime") as clock:
            clock.now.return_value.strftime.return_value = TODAY
            try:
                return self.tokenizer.apply_chat_template(messages, **settings)
            except Exception:  # a template's own
                return None

    def is_prefix(self, read, settings):
        """Return whether the prompt begins the row, each read as text or as tokens."""
        given = read(self.render([USER], add_generation_prompt=True, **settings))
        return read(self.render([USER, ANSWER], **settings))[: len(given)] == given

    def ids(self, text):
        """Return a text's tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def row_of(name, template):
    """Return a template's row of the table."""
    whole = template.render([USER, ANSWER])
    thought = template.render(
        [USER, {**ANSWER, "reasoning_content": "Thought.", "thinking": "Thought."}]
    )
    before = re.sub(r"<[^<>]*>|\[[^\[\]]*\]", " ", whole.split(USER["content"])[0])
    words = [
        w
        for w in before.split()
        if w.lower().strip(":") not in ("user", "system") and TODAY not in w
    ]
    switches = [
        (switch, values)
        for switch, values in SWITCHES.items()
        if switched(template, switch, values)
    ]
    settings = [{}, *({switch: value} for switch, values in switches for value in values)]
    return [
        name,
        ", ".join(f"`{switch}`" for switch, _ in switches) or "-",
        "yes" if thought is not None and "Thought." in thought else "no",
        every([template.is_prefix(lambda text: text, setting) for setting in settings], settings),
        every([template.is_prefix(template.ids, setting) for setting in settings], settings),
        code(whole.split(ANSWER["content"])[-1]) or "**nothing**",
        arguments(template, {"city": "Paris"}),
        arguments(template, '{"city": "Paris"}'),
        "yes" if words else "no",
        "yes" if TODAY in whole else "no",
    ]


def switched(template, name, values):
    """Return whether a setting changes the prompt, and is taken."""
    prompts = {
        template.render([USER], add_generation_prompt=True, **{name: value}) for value in values
    }
    return len(prompts) > 1 and None not in prompts


def arguments(template, value):
    """Return what becomes of a tool call's arguments."""
    call = {
        "type": "function",
        "id": "abcdefghi",
        "function": {"name": "weather", "arguments": value},
    }
    text = template.render([USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
    if text is None:
        return "**error**"
    if "Paris" not in text:
        return "**dropped**"
    return "escaped" if '\\"city\\"' in text else "yes"


def every(holds, settings):
    """Return whether something holds by default, and with which setting it does not."""
    if not holds[0]:
        return "**no**"
    odd = [
        f"{name}={value}"
        for hold, each in zip(holds, settings, strict=True)
        for name, value in each.items()
        if not hold
    ]
    return f"**not** with `{'`, `'.join(odd)}`" if odd else "yes"


def code(text):
    """Return text as code of a table, newlines shown."""
    return f"`{text}`".replace("\n", "\\n").replace("|", "\\|") if text.strip() else ""


def table():
    """Return the table, as Markdown."""
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [
        row_of(f.stem, Template(f.read_text())) for f in files if not f.stem.endswith("_training")
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return f"{BEGIN}TRL {trl.__version__}:\n\n" + "\n".join(lines) + f"\n{END}"


if __name__ == "__main__":
    page = PAGE.read_text()
    begin, end = page.index(BEGIN), page.index(END) + len(END)
    PAGE.write_text(page[:begin] + table() + page[end:])
