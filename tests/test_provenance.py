"""Where results come from: a commit, and whether the files are those of it."""

import subprocess

import pytest

from eaft import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of its own, in which eaft seems to lie."""
    package = tmp_path / "src" / "eaft"
    package.mkdir(parents=True)
    (package / "provenance.py").write_text("")
    (tmp_path / ".gitignore").write_text("/runs/\n")
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    return tmp_path


def test_untracked_and_changed_files_are_noticed(checkout):
    head = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout
    assert provenance.commit() == head[:12]
    (checkout / "runs").mkdir()
    (checkout / "runs" / "out.json").write_text("{}")  # ignored
    assert provenance.commit() == head[:12]
    (checkout / "src" / "eaft" / "new.py").write_text("")
    assert provenance.commit() == head[:12] + "-dirty"
    (checkout / "src" / "eaft" / "new.py").unlink()
    (checkout / "src" / "eaft" / "provenance.py").write_text("x = 1\n")
    assert provenance.commit() == head[:12] + "-dirty"


def test_in_somebody_elses_checkout_there_is_no_commit(checkout, monkeypatch):
    (checkout / "src").rename(checkout / "site-packages")
    here = checkout / "site-packages" / "eaft" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(here))
    assert provenance.commit() is None
