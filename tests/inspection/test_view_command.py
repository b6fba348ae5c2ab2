"""`eaft view`: what it serves, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest

from eaft.errors import ConfigurationError
from eaft.inspection.folder import Inspection
from eaft.inspection.view.runs import Runs
from eaft.inspection.view.serve import find_inspection, listen
from eaft.inspection.view.tables import Tables
from tests.inspection.made import make_inspection
from tests.inspection.test_view_runs import COMPARED, EVALUATION, item


def test_the_command_serves_a_folder_of_both(tmp_path):
    folder = make_inspection(tmp_path / "all" / "inspected", examples=3, rollouts=0)
    (tmp_path / "all" / "out").mkdir()
    (tmp_path / "all" / "out" / "results.json").write_text(json.dumps(EVALUATION))
    with listen(None) as taken:  # so that the first port is not free
        command = [sys.executable, "-m", "eaft", "view", str(folder.parent), "--no_browser"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = next(line for line in server.stdout if "http://" in line).split()[1]
            start, _, token = address.partition("/?token=")
            assert start.rpartition(":")[2] != str(taken.getsockname()[1])
            assert len(token) >= 40
            request = urllib.request.Request(
                f"{start}/api/folder", headers={"Authorization": f"token {token}"}
            )
            about = json.loads(
                urllib.request.urlopen(request, timeout=30).read()
            )  # it listens already
            assert (about["name"], about["kind"]) == ("all", "both")
            # No other interface of this machine
            sockets = Path("/proc/net/tcp")
            if sockets.exists():
                ours = f"{int(start.rpartition(':')[2]):04X}"
                lines = [line.split() for line in sockets.read_text().splitlines()[1:]]
                bound = {
                    line[1] for line in lines if line[1].endswith(f":{ours}") and line[3] == "0A"
                }
                assert bound == {f"0100007F:{ours}"}
        finally:
            server.terminate()
            server.wait()


def test_what_cannot_be_served_is_one_message(tmp_path, capsys, monkeypatch):
    from eaft import cli
    from eaft.inspection.view import serve

    folder = make_inspection(tmp_path / "a", examples=3, rollouts=0)
    make_inspection(tmp_path / "b", examples=3, rollouts=0)
    (tmp_path / "empty").mkdir()
    unfinished = tmp_path / "c"
    (unfinished / "tokens").mkdir(parents=True)
    (unfinished / "run.json").write_text('{"scored": false}')
    with listen(None) as taken:
        port = str(taken.getsockname()[1])
        for flags, message in (
            ([tmp_path / "none"], "is not a folder"),
            (
                [tmp_path / "empty"],
                "holds nothing that `eaft inspect`, `compare`, `eval` or `tune` wrote",
            ),
            ([tmp_path], "holds several inspections (a, b): give one of them"),
            ([unfinished], "give its `eaft inspect` command again"),
            ([folder, "--port", port], f"--port {port} cannot be used"),
            ([folder, "--port", "99999"], "--port 99999 cannot be used"),
            ([folder, "--token", "a&b"], "--token: use only letters, digits"),
        ):
            assert cli.main(["view", *map(str, flags)]) == 2
            assert message in capsys.readouterr().err
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "duckdb" else name)
    assert cli.main(["view", str(folder)]) == 2
    assert "Viewing needs duckdb: pip install 'eaft[inspect]'" in capsys.readouterr().err


def test_links_that_lead_out_are_not_followed(tmp_path):
    copy = make_inspection(tmp_path / "copy", examples=3, rollouts=0)
    file = copy / "tokens" / "00000.parquet"
    file.rename(tmp_path / "elsewhere.parquet")
    file.symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(ConfigurationError, match="is a link that leads out of its folder"):
        Tables(Inspection(copy))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "other").symlink_to(tmp_path / "copy")
    (tmp_path / "held" / "run").mkdir()
    (tmp_path / "held" / "run" / "results.json").symlink_to(COMPARED / "results.json")
    assert find_inspection(tmp_path / "held") is None
    assert Runs(tmp_path / "held").names == []
    # Nor from a comparison to somebody's answers and logs
    (tmp_path / "held" / "run" / "results.json").unlink()
    compared = shutil.copytree(COMPARED, tmp_path / "held" / "compared")
    for side in ("base/items", "eaft-seed0/items/step-20"):
        (tmp_path / "out" / side).mkdir(parents=True)
        line = json.dumps(item(0, float(side.startswith("base"))))
        (tmp_path / "out" / side / "everyday.jsonl").write_text(line)
    (tmp_path / "out" / "eaft-seed0" / "metrics.jsonl").write_text('{"step": 1, "nll": 2.0}')
    (compared / "base").symlink_to(tmp_path / "out" / "base")
    (compared / "eaft-seed0").mkdir()
    for name in ("items", "metrics.jsonl"):
        (compared / "eaft-seed0" / name).symlink_to(tmp_path / "out" / "eaft-seed0" / name)
    found = asdict(Runs(tmp_path / "held").run("compared"))
    assert not any(curve["metrics"] for curve in found["curves"])
    ours = next(i for i, pair in enumerate(found["pairings"]) if pair["objective"] == "eaft")
    items = Runs(tmp_path / "held").items("compared", ours)
    assert items.entries == []
    assert "eaft-seed0/items/step-20/everyday.jsonl" in items.notes[0]


MESSAGES = {
    "missing": "is missing",
    "cut": "cannot be read",
    "other rows": "its rows differ from those of",
}


@pytest.mark.parametrize("damage", MESSAGES)
def test_a_damaged_folder_is_refused(tmp_path, damage):
    copy = make_inspection(tmp_path / "copy", examples=4, rollouts=0)
    first, second = sorted((copy / "tokens").glob("*.parquet"))
    if damage == "missing":
        (copy / "vocabulary.parquet").unlink()
    elif damage == "cut":
        first.write_bytes(first.read_bytes()[:-100])
    else:
        os.replace(second, copy / "compared" / "tuned" / "00000.parquet")
        second.write_bytes(first.read_bytes())
    with pytest.raises(ConfigurationError, match=MESSAGES[damage]):
        Tables(Inspection(copy)).number("tuned")
