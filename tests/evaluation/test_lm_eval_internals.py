"""lm-eval's internals that we use exist in the installed version; one module imports them."""

import inspect
from importlib.metadata import version
from pathlib import Path

import pytest

import eaft
from eaft.evaluation import lm_eval_internals
from tests.training.test_internals import imports

SOURCE = Path(eaft.__file__).parent


@pytest.mark.parametrize("name", lm_eval_internals.NAMES)
def test_lm_eval_has_the_name(name):
    assert getattr(lm_eval_internals, name), f"lm-eval {version('lm_eval')} lacks {name}"


@pytest.mark.parametrize(("owner", "name"), lm_eval_internals.ATTRIBUTES)
def test_lm_eval_has_the_attribute(owner, name):
    thing = getattr(lm_eval_internals, owner)
    there = hasattr(thing, name) or f"self.{name}" in inspect.getsource(thing)
    assert there, f"{owner} of lm-eval {version('lm_eval')} lacks {name}"


def test_no_other_module_imports_lm_eval():
    importers = {
        path.name
        for path in SOURCE.rglob("*.py")
        for module, _ in imports(path)
        if module.split(".")[0] == "lm_eval"
    }
    assert not importers
