"""
Hosts that are not installed here: a module of ours is imported with stand-ins for what it takes of
its host.
"""

import importlib
import sys
import types

import pytest


@pytest.fixture
def import_with(monkeypatch):
    def load(name, **of_host):
        """`of_host` are the host's modules, `__` for each dot, with what is in them."""
        for path, contents in of_host.items():
            path = path.replace("__", ".")
            parts = path.split(".")
            for parent in (".".join(parts[:i]) for i in range(1, len(parts))):
                if parent not in sys.modules:
                    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
            module = types.ModuleType(path)
            module.__dict__.update(contents)
            monkeypatch.setitem(sys.modules, path, module)
        monkeypatch.delitem(sys.modules, f"eaft.integrations.{name}", raising=False)
        module = importlib.import_module(f"eaft.integrations.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # taken away with the stand-ins
        return module

    return load
