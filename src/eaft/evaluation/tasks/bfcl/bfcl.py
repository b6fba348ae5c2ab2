"""
BFCL v3's single-turn categories: data, prompts, parser and checker are the package's (bfcl-eval
2025.6.16), never ours.

The package's parser runs sums (`x=60*5`) through `eval`, with anything else in them. Here a call
whose arguments are not written out is a wrong answer, and nothing that a model wrote is ever run.

The checker's module imports the clients of every model vendor, for one table of their quirks; that
table is put in its place beforehand, so that the package can be installed without its dependencies.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

VERSION = "2025.6.16"  # packages from 2025.7.17 on hold BFCL v4
INSTALL = (
    f"pip install --no-deps bfcl-eval=={VERSION} tree_sitter==0.21.3 tree-sitter-java==0.21.0 "
    "tree-sitter-javascript==0.21.4 tenacity"
)
LANGUAGES = {"java": "Java", "javascript": "JavaScript"}
# Of Python's grammar: calls with values written out. Names, and calls and items of names, stay text
LITERAL = (
    ast.Call | ast.keyword | ast.Constant | ast.List | ast.Tuple | ast.Dict
    | ast.UnaryOp | ast.unaryop | ast.Name | ast.Attribute | ast.Subscript | ast.expr_context
)  # fmt: skip
# characters; at 20,000 what is nested ends the process within the parsers of Java and JavaScript
LONGEST = 10_000


def package() -> tuple[Any, Any]:
    """
    Return the package's prompt and parser functions, and its checker.

    Raises:
        ImportError: the package or a dependency is missing; says how to install it.
    """
    table = types.ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))  # type: ignore
    sys.modules.setdefault(table.__name__, table)
    try:
        from bfcl_eval.eval_checker.ast_eval import ast_checker
        from bfcl_eval.model_handler import utils
    except ImportError as error:
        raise ImportError(f"BFCL v3 needs its package: {INSTALL} ({error})") from error
    return utils, ast_checker


def load(category: str, **kwargs: Any) -> DatasetDict:
    """
    Return a category's rows from the installed package: `id`, `prompt`, and as JSON `functions` and
    `answer`.
    """
    utils, _ = package()
    spec = importlib.util.find_spec("bfcl_eval")
    assert spec is not None
    assert spec.origin is not None
    folder, name = Path(spec.origin).parent / "data", f"BFCL_v3_{category}.json"
    if not (folder / name).is_file():
        raise ImportError(f"The installed bfcl-eval holds no {name}: {INSTALL}")
    answers = {}
    if (
        folder / "possible_answer" / name
    ).is_file():  # where no function is to be called there is none
        answers = {
            row["id"]: row["ground_truth"] for row in read(folder / "possible_answer" / name)
        }
    rows = []
    for row in read(folder / name):
        functions = json.dumps(row["function"])
        described = utils.func_doc_language_specific_pre_processing(row["function"], category)
        messages = utils.system_prompt_pre_processing_chat_model(
            row["question"][0], described, category
        )
        rows.append(
            {
                "id": row["id"],
                # lm-eval asks in one message; the package sends the first of these as the system's
                "prompt": "\n\n".join(message["content"] for message in messages),
                "functions": functions,
                "answer": json.dumps(answers.get(row["id"], [])),
                "category": category,
            }
        )
    return DatasetDict({"test": Dataset.from_list(rows)})


def read(path: Path) -> list[dict[str, Any]]:
    """Return a JSON Lines file's rows."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def check(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """
    Return `acc`: 1 if the package's checker accepts the answer; for (ir)relevance, if it calls
    (nothing).
    """
    _, ast_checker = package()
    category = doc["category"]
    language = LANGUAGES.get(category, "Python")
    try:
        calls = decode(results[0], language)
    except NotLiteralError:
        return {"acc": 0.0}
    called = bool(calls) and all(isinstance(call, dict) and call for call in calls)
    if "relevance" in category:
        return {"acc": float(called != ("irrelevance" in category))}
    if not called:
        return {"acc": 0.0}
    functions = json.loads(doc["functions"])
    checked = ast_checker.ast_checker(
        functions, calls, json.loads(doc["answer"]), language, category, "model"
    )
    return {"acc": float(checked["valid"])}


class NotLiteralError(Exception):
    """A call with arguments that would have to be computed."""


def decode(text: str, language: str) -> list[Any]:
    """
    Return the calls an answer makes, as the package's parser has them; none if it does not parse,
    as in its own runner.

    Raises:
        NotLiteralError: an argument would have to be computed.
    """
    utils, _ = package()
    if len(text) > LONGEST:
        return []
    try:
        if language == "Python":  # calls in Java and JavaScript are only read
            body = ast.parse(
                text.strip("`\n ").strip("[]'"), mode="eval"
            ).body  # what the package's parser takes off
            if not all(isinstance(call, ast.Call) for call in getattr(body, "elts", [body])):
                return []
            if not all(isinstance(node, LITERAL) for node in ast.walk(body)):
                raise NotLiteralError(text)
        return utils.default_decode_ast_prompting(text, language)
    except NotLiteralError:
        raise
    except Exception:
        return []
