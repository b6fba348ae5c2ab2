"""Which backend of the fused loss a test runs through."""

import pytest

from tests.objective.problem import use


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """
    Run through torch, or through the Triton kernels: on a GPU if there is one, else interpreted.
    """
    use(request.param, monkeypatch)
    return request.param


@pytest.fixture
def kernels(monkeypatch):
    """Run through the Triton kernels."""
    use("triton", monkeypatch)
