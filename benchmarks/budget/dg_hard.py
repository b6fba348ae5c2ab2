"""
DG-Hard (arXiv:2605.20296) beside interpolation at equal drift; README.md has the rule.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.budget.dg_hard ../shared/data

from the repository's root. Goes on where it was stopped; writes results/dg-hard.json after each
seed, and results/dg-hard.md.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor

from benchmarks.budget.run import base_of, flags_of, prepared, train
from benchmarks.budget.settings import REPORTED, RESULTS, SEEDS, SETTINGS
from benchmarks.budget.table import interval
from eaft.evaluation.drift import read_prompts
from eaft.evaluation.protocol import PROMPTS
from eaft.provenance import environment, write_json
from eaft.training.apart import Checkpoint, checkpoints, parse_flags
from eaft.tuning.measure import Kept, LoadedFamily, Part
from eaft.tuning.points import Member

SHARES = (0.25, 0.5, 0.75, 1.0)
REPAIRED = 10_000  # the step that the repaired model goes by
SMALLEST = 1024  # elements: smaller matrices are left as they are, as the authors' code does
FILE = RESULTS / "dg-hard.json"
SETTING = SETTINGS["gsm8k"]


def denoised(update: Tensor) -> tuple[Tensor, float]:
    """
    Return an update without its noise, and the share of the singular values that are kept.

    The threshold is omega(beta) times the median singular value: Gavish and Donoho, "The optimal
    hard threshold for singular values is 4/sqrt(3)" (2014), equation 5, for noise of unknown size.

    Args:
        update: `[m, n]`, tuned minus base, float32.
    """
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    beta = min(update.shape) / max(update.shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    kept = values > omega * values.median()
    return (left * (values * kept)) @ right, float(kept.float().mean())


def repair(base: Path, checkpoint: Path, folder: Path) -> float:
    """
    Write a checkpoint whose updates are denoised; return the mean share of singular values kept.

    All matrices are denoised, the embeddings too; norms stay as the checkpoint has them.
    """
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    tensors, shares = {}, []
    file = "model.safetensors"
    with safe_open(base / file, "pt") as before, safe_open(checkpoint / file, "pt") as after:
        for name in after.keys():  # noqa: SIM118
            tuned = after.get_tensor(name)
            if tuned.ndim == 2 and tuned.numel() >= SMALLEST:
                start = before.get_tensor(name).float()
                update, share = denoised(tuned.float() - start)
                tuned = (start + update).to(tuned.dtype)
                shares.append(share)
            tensors[name] = tuned.contiguous()
    save_file(tensors, folder / file, {"format": "pt"})
    return float(np.mean(shares))


def measure(seed: int, model: str, work: Path) -> dict[str, Any]:
    """Return the nll and drift of the repaired last checkpoint, and of its interpolations."""
    folder = work / f"dg-hard-{seed}"
    flags = flags_of(SETTING, "sft", seed, model, folder, work / "data")
    train(flags, folder)
    last = checkpoints(folder)[-1]
    kept = repair(Path(model), last.folder, folder / "repaired")
    configs = parse_flags(flags)
    base = base_of(model, 64)
    prompts = read_prompts(str(PROMPTS), REPORTED)
    part = Part.of(base, prepared("reported", configs, model, work / "data"), prompts)
    base.free()
    repaired = Checkpoint(REPAIRED, last.epoch, folder / "repaired")
    points = Kept(folder / "points.jsonl", part, LoadedFamily(base, [last, repaired], {}))

    def numbers(step: int, share: float) -> dict[str, float]:
        point = points(Member(step, share))
        return {"share": share, "nll": point.nll.mean, "drift": point.drift.mean}

    base_point = {"share": 0.0, "nll": part.base_nll.mean, "drift": 0.0}
    line = [base_point, *(numbers(last.step, share) for share in SHARES)]
    fixed = numbers(REPAIRED, 1.0)
    drifts, shares = ([point[name] for point in line] for name in ("drift", "share"))
    near = numbers(last.step, round(float(np.interp(fixed["drift"], drifts, shares)), 4))
    shutil.rmtree(folder)
    return {"seed": seed, "kept": kept, "repaired": fixed, "line": line, "near": near}


def at_equal_drift(run: dict[str, Any], near: bool) -> float:
    """
    Return the nll of the interpolation with the repaired model's drift (nats per token).

    Linear in the drift between the measured shares.

    Args:
        near: whether the share whose drift is nearly the same is one of them.
    """
    points = [*run["line"], run["near"]] if near else run["line"]
    points = sorted(points, key=lambda point: point["drift"])
    drifts, nlls = ([point[name] for point in points] for name in ("drift", "nll"))
    return float(np.interp(run["repaired"]["drift"], drifts, nlls))


def write_table(runs: list[dict[str, Any]]) -> None:
    """Write the numbers of each seed, and the difference with its interval over seeds."""
    rows = [
        [
            run["seed"],
            *(f"{run['line'][i][name]:.3f}" for i in (0, -1) for name in ("nll", "drift")),
            f"{run['kept']:.0%}",
            *(f"{run['repaired'][name]:.3f}" for name in ("nll", "drift")),
            f"{at_equal_drift(run, True):.3f}",
        ]
        for run in runs
    ]
    headers = ["seed", "base nll", "drift", "tuned nll", "drift", "kept", "DG-Hard nll", "drift"]
    text = tabulate(rows, [*headers, "interpolation's nll at that drift"], tablefmt="github")
    near, coarse = (
        interval([run["repaired"]["nll"] - at_equal_drift(run, way) for run in runs])
        for way in (True, False)
    )
    RESULTS.joinpath("dg-hard.md").write_text(
        "# DG-Hard beside interpolation at equal drift\n\nWritten by"
        " `python -m benchmarks.budget.dg_hard`; [README](../README.md) has the rule. *Kept*: the"
        f" mean share of a matrix's singular values.\n\n{text}\n\nDG-Hard's nll minus the"
        f" interpolation's: {near} nats per token, 95% t interval over {len(runs)} seeds. With"
        f" lines between shares that are 0.25 apart: {coarse}.\n"
    )


def main() -> None:
    """Measure the seeds that are not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path, help="holds gsm8k_train.jsonl and others")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/budget"))
    flags = parser.parse_args()
    model = SETTING.model()
    SETTING.write(flags.data_dir, flags.work_dir / "data")
    runs = json.loads(FILE.read_text())["runs"] if FILE.is_file() else []
    for seed in SEEDS:
        if seed not in [run["seed"] for run in runs]:
            runs.append(measure(seed, model, flags.work_dir))
            write_json(FILE, {"runs": runs, "environment": environment()})
        write_table(runs)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
