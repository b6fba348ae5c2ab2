"""
What the demo says of what was expected and found, on what it found when its results were committed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "benchmarks" / "results" / "demo"


def test_expected_beside_found(tmp_path):
    expected = {"gsm8k": (-0.9, -0.8), "function_calls": (-1.0, 1.0)}
    for name, (low, high) in expected.items():
        shutil.copytree(DEMO / name, tmp_path / name)
        facts = {"nll": 0.5, "expected": {"change": (low + high) / 2, "low": low, "high": high}}
        (tmp_path / "inspect" / name).mkdir(parents=True)
        (tmp_path / "inspect" / name / "summary.json").write_text(
            json.dumps({"advice": {"facts": facts}})
        )
    script = ROOT / "recipes" / "demo" / "expected.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    rows = [
        [cell.strip() for cell in line.split("|")]
        for line in (tmp_path / "demo.md").read_text().splitlines()
        if line.startswith("| ")
    ][1:]
    assert [row[3] for row in rows] == ["-85% (-90% to -80%)", "+0% (-100% to +100%)"]
    assert [row[5] for row in rows] == ["no", "yes"]
    for name, row in zip(expected, rows, strict=True):
        front = json.loads((DEMO / name / "results.json").read_text())["pairs"][0]["fronts"][
            "held-out nll"
        ]
        change = front["mean"]["change"] / (sum(front["second"]) / len(front["second"]))
        assert row[4].startswith(f"{change:+.0%} (")
