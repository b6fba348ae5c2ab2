"""
The commands before their work begins: what they take, what they import, and that `pip install eaft`
is enough.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import eaft
from eaft import cli, models
from eaft.commands import train
from eaft.commands.help import gates_help
from eaft.errors import STARTED
from eaft.objective.registry import GATES

from .conftest import make_rows
from .processes import eaft as run_eaft
from .processes import start


def python(code, *argv, cwd):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SLOW = {"torch", "transformers", "trl", "datasets", "lm_eval"}  # seconds to import


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_imports_nothing_slow(command, tmp_path):
    code = f"""
import sys
from eaft import cli
from eaft.errors import STARTED
try:
    cli.main(sys.argv[1:])
except SystemExit as exit_:
    print(exit_.code, sorted({SLOW} & sys.modules.keys()))
"""
    argv = [command, "--help"] if command else ["--help"]
    text = python(code, *argv, cwd=tmp_path)
    assert text.splitlines()[-1] == "0 []"
    assert f"  eaft {command or 'train'} " in text  # an example
    assert max(map(len, text.splitlines())) <= 100


def test_the_short_help_agrees_with_the_parsers():
    """It is written without TRL and the registry: flags, defaults and gates are theirs."""
    parser = train.make_parser()
    actions = {option: action for action in parser._actions for option in action.option_strings}
    for flag in train.COMMON:
        if flag.name == "config":  # TRL reads it before the others
            continue
        assert flag.default in (None, actions[f"--{flag.name}"].default), flag.name
    lines = [line for line in gates_help().splitlines() if not line.startswith("   ")]
    assert [line.split()[0] for line in lines] == list(GATES)
    text = " ".join(gates_help().split())
    assert text == " ".join(f"{name} {gate.help}" for name, gate in GATES.items())


def test_public_names():
    assert set(eaft.__all__) == {*eaft.MODULES, "gates"}
    for name in eaft.__all__:
        assert getattr(eaft, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="has no attribute 'gate'"):
        _ = eaft.gate


@pytest.mark.parametrize("flag", ["--chek", "now"])
def test_env_refuses_what_it_does_not_know(flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["env", flag])
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert f"unrecognized arguments: {flag}" in output.err
    assert "usage: eaft env [-h] [--check]" in output.err


def test_env_check_ends_with_the_checks_exit_code(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "eaft.objective.check", SimpleNamespace(main=lambda: 1))
    assert cli.main(["env", "--check"]) == 1
    assert capsys.readouterr().out == ""


def test_without_the_extras(tmp_path, model_dir):
    """Training works, and inspecting says what is missing before an hour of scoring."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    code = """
import sys
# None of these can be imported
extras = ["gguf", "lm_eval", "matplotlib", "peft", "scipy", "tabulate", "wordcloud"]
sys.modules.update(dict.fromkeys(extras))
sys.stderr = sys.stdout
from eaft import cli
assert cli.main(["inspect", "model", "data"]) == 2
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""
    flags = [
        "--model_name_or_path",
        model_dir,
        "--dataset_name",
        "data.jsonl",
        "--output_dir",
        "out",
        "--use_cpu",
    ]
    told = python(code, *flags, "--max_steps", 1, "--report_to", "none", cwd=tmp_path)
    assert told.startswith(
        "eaft inspect: error: Inspecting needs matplotlib: pip install 'eaft[inspect]'.\n"
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("chained", [False, True])
def test_a_full_disk_is_one_line(chained, monkeypatch, capsys):
    def fill(argv):
        full = OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")
        if chained:
            raise RuntimeError("cannot be written") from full
        raise full

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=fill))
    assert cli.main(["eval"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "eaft eval: error: the disk is full (out/model.safetensors could not be written): free"
    )
    assert told.count("\n") == 1
    monkeypatch.setenv(STARTED, "1")
    assert cli.main(["train"]) == errno.ENOSPC


def test_another_error_is_not_hidden(monkeypatch):
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: SimpleNamespace(main=lambda argv: [][0])
    )
    with pytest.raises(IndexError):
        cli.main(["eval"])


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: SimpleNamespace(main=interrupt)
    )
    assert cli.main(["train"]) == 130
    assert (
        capsys.readouterr().err
        == "eaft train: interrupted: give the same command again with --resume_from_checkpoint true"
        " to go on.\n"
    )


def test_an_interruption_that_a_library_takes_for_an_error_is_one_line(monkeypatch, capsys):
    def interrupt(argv):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RecursionError from None  # as numpy ends when it is interrupted in an import

    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: SimpleNamespace(main=interrupt)
    )
    # A shell's background job ignores the signal, and this test with it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["eval"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == (
        "eaft eval: interrupted: give the same command again to go on.\n"
    )


def test_what_eaft_started_ends_without_a_word(tmp_path):
    """Ctrl-C reaches it, too, and the command that started it has said how to go on."""
    log = tmp_path / "log"
    process = start(interrupted_in_a_command, log=log, environment={**os.environ, STARTED: "1"})
    process.join()
    assert (process.exitcode, log.read_text()) == (-signal.SIGINT, "")


def interrupted_in_a_command():
    main = SimpleNamespace(main=lambda argv: signal.raise_signal(signal.SIGINT))
    cli.importlib = SimpleNamespace(import_module=lambda name: main)
    return run_eaft("train")


def test_the_cache_lists_and_clears_converted_models_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path / "measured"))
    monkeypatch.setattr(models, "HF_HOME", tmp_path)
    mine = tmp_path / "eaft" / "my notes"
    for name, folder in (
        ("tiny-0123456789ab-3", tmp_path / "eaft"),
        ("0" * 64, tmp_path / "measured"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_bytes(b"x" * 2**20)
    (tmp_path / "measured" / ("0" * 64) / "about.json").write_text('{"model": ')
    mine.mkdir()
    for argv in ([], ["--clear"]):
        assert cli.main(["cache", *argv]) == 0
        told = capsys.readouterr().out
        assert "1.0 MiB  tiny-0123456789ab-3 (converted from GGUF)" in told
        assert "1.0 MiB  unreadable" in told
    assert [folder.name for folder in (tmp_path / "eaft").iterdir()] == [mine.name]
