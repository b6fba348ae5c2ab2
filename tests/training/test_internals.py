"""TRL's internals that we use exist in the installed version, and are used through one module."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import trl

import eaft

SOURCE = Path(eaft.__file__).parent
INTERNALS = SOURCE / "training" / "trl_internals.py"  # read: importing it stops at the first name


def imports(path):
    """Yield the module and the name of each `from module import name` in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


@pytest.mark.parametrize(("module", "name"), imports(INTERNALS))
def test_trl_has_the_name(module, name):
    assert hasattr(importlib.import_module(module), name), f"TRL {trl.__version__} lacks {name}"


def trainer_attributes():
    for node in ast.parse(INTERNALS.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "TRAINER_ATTRIBUTES":
            return ast.literal_eval(node.value)


@pytest.mark.parametrize("name", trainer_attributes())
def test_the_trainer_has_the_attribute(name):
    classes = [kind for kind in trl.SFTTrainer.__mro__ if kind.__module__.startswith("tr")]
    # Some are only set on an instance
    assert any(name in inspect.getsource(kind) for kind in classes), (
        f"SFTTrainer of TRL {trl.__version__} lacks {name}"
    )


def test_no_other_module_reaches_into_trl():
    others = [p for p in SOURCE.rglob("*.py") if p != INTERNALS]
    assert len(others) > 50
    modules = [(p.name, module) for p in others for module, _ in imports(p)]
    assert not [(name, module) for name, module in modules if module.startswith("trl.")]
