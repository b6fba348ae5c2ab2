"""The tasks lm-eval lacks: right answers score 1, wrong ones 0."""

import json
import sys

import pytest
from lm_eval.api.model import LM

from eaft.errors import ConfigurationError
from eaft.evaluation.protocol import Protocol
from eaft.evaluation.scores import score
from eaft.evaluation.suite import load_suites
from eaft.evaluation.tasks.bfcl import bfcl
from eaft.evaluation.tasks.cluewsc import target


class Oracle(LM):
    """A model that answers as a rule says."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def loglikelihood(self, requests):
        return [(self.rule(*request.args), False) for request in requests]

    def generate_until(self, requests):
        return [self.rule(request.args[0], request.doc) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.mark.parametrize("labels", [("true", "false"), (True, False), (0, 1)])
def test_cluewsc(tmp_path, labels):
    spans = {"span1_text": "床", "span2_text": "它", "span1_index": 5, "span2_index": 37}
    rows = [
        {"idx": i, "text": f"第{i}句。", "label": label, "target": spans}
        for i, label in enumerate(labels)
    ]
    (tmp_path / "cluewsc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, benchmarks = load_suites(["cluewsc"], data_dir=str(tmp_path))
    right = {"第0句。": "是", "第1句。": "否"}
    for wrong in (False, True):
        oracle = Oracle(
            lambda prompt, choice, wrong=wrong: float(
                (right[prompt[:4]] == choice.strip()) != wrong
            )
        )
        items = score(oracle, benchmarks["cluewsc"], Protocol())
        assert [item.score for item in items] == [float(not wrong)] * 2
    assert items[0].prompt.startswith("第0句。\n上文中的“它”指的是“床”吗")


def test_cluewsc_label_must_be_one():
    with pytest.raises(ValueError, match="expected 'true' or 'false'"):
        target({"label": -1})


def test_everyday_is_balanced_and_has_one_answer_each():
    _, benchmarks = load_suites(["everyday"])
    docs = list(benchmarks["everyday"].tasks["everyday"].eval_docs)
    assert len(docs) == 120
    assert all(len(set(doc["choices"])) == 4 and 0 <= doc["answer"] < 4 for doc in docs)
    counts = [sum(doc["answer"] == k for doc in docs) for k in range(4)]
    assert max(counts) <= 0.35 * len(docs)  # always the same letter is not knowledge


def test_a_group_of_lm_evals_tasks(tmp_path):
    subjects = [
        "abstract algebra, astronomy, college biology, college chemistry, college computer science",
        (
            "college mathematics, college physics, computer security, conceptual physics,"
            " electrical engineering"
        ),
        (
            "elementary mathematics, high school biology, high school chemistry, high school"
            " computer science"
        ),
        "high school mathematics, high school physics, high school statistics, machine learning",
    ]
    subjects = [subject.replace(" ", "_") for subject in ", ".join(subjects).split(", ")]
    rows = [
        {"question": "?", "choices": list("abcd"), "answer": 1, "type": subject}
        for subject in subjects
    ]
    (tmp_path / "mmlu_stem.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, benchmarks = load_suites(["mmlu_stem_18"], data_dir=str(tmp_path))
    assert sorted(benchmarks["mmlu_stem_18"].tasks) == sorted(
        f"mmlu_{subject}" for subject in subjects
    )
    few = tmp_path / "few.yaml"
    few.write_text("suite: few\ntasks: [mmlu_stem_18]\nlimit: 1")
    with pytest.raises(
        ConfigurationError, match="mmlu_astronomy is in two suites with different limits"
    ):
        load_suites(["mmlu_astronomy", str(few)], data_dir=str(tmp_path))


def test_bfcl_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bfcl_eval", None)
    with pytest.raises(
        ConfigurationError, match=r"BFCL v3 needs its package: pip install --no-deps bfcl-eval=="
    ):
        load_suites(["agent"])


def call(answer):
    """
    Write a possible answer as the call it stands for: of each argument the first value that is not
    left out.
    """
    calls = []
    for function in answer:
        ((name, arguments),) = function.items()
        given = {k: v[0] for k, v in arguments.items() if v and v[0] != ""}
        calls.append(f"{name}({', '.join(f'{k}={plain(v)!r}' for k, v in given.items())})")
    return f"[{', '.join(calls)}]"


def plain(value):
    """Return a value whose alternatives are listed (inside dictionaries) as the first of them."""
    if isinstance(value, dict):
        return {
            k: plain(v[0] if isinstance(v, list) and v else v)
            for k, v in value.items()
            if v != [""]
        }
    return [plain(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "category", ["simple", "multiple", "parallel", "live_simple", "irrelevance", "live_relevance"]
)
def test_bfcl(category):
    pytest.importorskip("bfcl_eval")
    _, benchmarks = load_suites([f"bfcl_v3_{category}"], limit=12)

    def good(prompt, doc):
        assert "You are an expert in composing functions" in prompt
        if "relevance" in category:
            return (
                "[f(x=1)]" if category == "live_relevance" else "None of the functions can be used."
            )
        return call(json.loads(doc["answer"]))

    def bad(prompt, doc):
        if "relevance" in category:
            return "I cannot." if category == "live_relevance" else "[f(x=1)]"
        return good(prompt, doc).replace("(", "_damaged(", 1)

    for rule, expected in ((good, 1.0), (bad, 0.0)):
        items = score(Oracle(rule), benchmarks[f"bfcl_v3_{category}"], Protocol())
        assert [item.score for item in items] == [expected] * 12


PYTHON = ["simple", "multiple", "parallel", "parallel_multiple"]
PYTHON += [f"live_{category}" for category in PYTHON]
COMPUTED = [
    "[f(x=1+len([print('EXECUTED')]))]",
    "f(x=1+exit())",
    "[f(x=9**9**9)]",
    "[f(x='a'*9**9)]",
    "[g(x=1), f(x=[{'a': 1+exit()}])]",
    "[f(x=-(9**9**9))]",
    "[f(x=g(1+exit()))]",
    "[f(x=data[1+exit()])]",
    "[f(x=lambda: exit())]",
    "[(lambda: exit())(x=1)]",
    "[f(x=f'{exit()}')]",
    "[f(x=[exit() for i in '1'])]",
    "[f(x=(y := 2))]",
    "[f(x=1 if exit() else 2)]",
]


@pytest.mark.parametrize("answer", COMPUTED)
def test_bfcl_runs_nothing_that_a_model_wrote(answer, capsys):
    """
    Python's `eval` would print, end this process or never return; a computed argument is wrong
    whatever is asked.
    """
    pytest.importorskip("bfcl_eval")
    function = {
        "name": "f",
        "parameters": {"properties": {"x": {"type": "integer"}}, "required": ["x"]},
    }
    doc = {"functions": json.dumps([function]), "answer": '[{"f": {"x": [2]}}]'}
    for category in ("simple", "irrelevance", "live_irrelevance", "live_relevance"):
        assert bfcl.check({**doc, "category": category}, [answer]) == {"acc": 0.0}
    assert bfcl.check({**doc, "category": "simple"}, ["[f(x=2)]"]) == {"acc": 1.0}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("category", ["simple", "java", "javascript"])
def test_bfcl_survives_what_is_nested_deeply(category):
    """The parsers of Java and JavaScript, in C, end the process at some depth beyond 10,000."""
    pytest.importorskip("bfcl_eval")
    function = {"name": "g", "parameters": {"properties": {}, "required": []}}
    doc = {"category": category, "functions": json.dumps([function]), "answer": '[{"g": {}}]'}
    for before, after in (("(", ")"), ("f(x=", ")"), ("+-", ""), ("1+", ""), ("[", "]")):
        for depth in (1_500, 50_000):
            assert bfcl.check(doc, [f"[f(x={before * depth}1{after * depth})]"]) == {"acc": 0.0}


@pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="bfcl_eval decodes by ast.NameConstant, gone in Python 3.14"
)
def test_bfcl_decodes_as_the_package_does():
    """
    Every possible answer of the package's data, and the forms of calls that are no literals but are
    not run.
    """
    pytest.importorskip("bfcl_eval")
    utils, _ = bfcl.package()
    forms = [
        "f(x=-1.5, y=true, z=None, w=...)",
        "a.b.c(x=(1, 2)), g()",
        "[f(x=g(y=[1]), z=h(2), w=data['sales'], v=variable)]",
        "`[f(x={'a': [1, {'b': -2}]})]`",
        "['f(x=1)']",
    ]
    answers = [
        call(json.loads(row["answer"]))
        for category in PYTHON
        for row in bfcl.load(category)["test"]
    ]
    assert len(answers) > 2_000
    for text in forms + answers:
        assert (
            bfcl.decode(text, "Python") == utils.default_decode_ast_prompting(text, "Python") != []
        )
    for text in (
        "None of the functions fits.",
        "N/A",
        "1+1",
        "[f(x=1+2), 3]",
        "(lambda: 1)",
        "f(x=1",
        "",
    ):
        assert bfcl.decode(text, "Python") == []  # no call: right where none is to be made
