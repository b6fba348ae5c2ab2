"""
What is published is whole: the sdist of the repository, the wheel of the sdist, as `python -m
build` makes them.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BUILD = (
    "import sys; from setuptools import build_meta; print(getattr(build_meta,"
    " sys.argv[1])(sys.argv[2]))"
)


def build(kind, source, target):
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, target], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return target / done.stdout.split()[-1]


def files(folder):
    """The files of a folder, but for what setuptools writes about them."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        path.as_posix()
        for path in found
        if not any(part.endswith(".egg-info") for part in path.parts)
    }


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of what git has, since setuptools writes beside what it builds."""
    if not (ROOT / ".git").exists():
        pytest.skip("not the repository")
    copy = tmp_path_factory.mktemp("repository")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(repository, tmp_path_factory):
    """The folder that the sdist unpacks to."""
    target = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("build_sdist", repository, target)) as archive:
        archive.extractall(target, filter="data")
    return next(path for path in target.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The folder that the wheel unpacks to, which is how it is installed."""
    target = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("build_wheel", sdist, target)) as archive:
        archive.extractall(target / "site")
    return target / "site"


def test_the_sdist_has_what_the_repository_has(repository, sdist):
    assert not files(repository) - files(sdist)


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(repository, wheel):
    ours = {name for name in files(wheel) if name.startswith("eaft/")}
    assert ours == {
        name.removeprefix("src/") for name in files(repository) if name.startswith("src/")
    }
    assert {
        "eaft/py.typed",
        "eaft/inspection/view/page/index.html",
        "eaft/training/replay_prompts.jsonl",
    } <= ours
    assert all(re.match(r"eaft(/|-[\d.]+\w*\.dist-info/)", name) for name in files(wheel))


def test_the_wheel_runs_without_the_repository(wheel, tmp_path):
    # The environment that the tests run in has the dependencies, and the repository itself: the
    # wheel comes before it
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    code = "import eaft, eaft.cli; print(eaft.__file__); eaft.cli.main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(str(wheel))
    assert "eaft COMMAND --help" in done.stdout


def test_one_version_everywhere(wheel):
    (info,) = wheel.glob("*.dist-info")
    version = PathDistribution(info).version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
