"""
Other trainers' own command lines with our loss: the same losses as theirs, and as `eaft train`'s,
step for step?

    .venv/bin/python benchmarks/hosts.py [HOST ...]

makes an environment of the host's own (in runs/hosts: minutes, gigabytes), a small model, and data
that are tokens already, with answers of unequal lengths; trains with the host's SFT, the host's own
EAFT, and ours in the host, and with `eaft train` here, one after another. Writes
benchmarks/results/hosts.json and hosts.md; hosts that are not named keep their numbers.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from datasets import Dataset, DatasetDict
from tabulate import tabulate
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eaft.provenance import environment, write_json

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "hosts"
RESULTS = ROOT / "benchmarks" / "results"
SEED, ROWS, TOKENS, VOCABULARY = 0, 48, 512, 49_152
PROMPT = range(16, 448)  # without labels: micro-batches differ by how many they have
LIBRARIES = ("torch", "transformers", "trl", "accelerate")
BATCH, ACCUMULATED, STEPS = 4, 2, 6
TOKENS_A_STEP = BATCH * ACCUMULATED * TOKENS
# The same in every trainer; what they call the same things otherwise is below
TRAINING = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATED,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "seed": 42,
}
EXPLAINED = 1e-2  # a larger difference is no matter of averaging
TOLERANCE = 1e-5  # of a loss: they are logged as they are, and computed in another order


def make_inputs() -> None:
    """Write the model, with a vocabulary that makes logits cost, and rows of tokens."""
    torch.manual_seed(SEED)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=VOCABULARY, **sizes, pad_token_id=0, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(WORK / "model")
    find = [sys.executable, str(ROOT / "recipes" / "demo" / "find_model.py")]
    real = Path(subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip())
    AutoTokenizer.from_pretrained(real.parent, gguf_file=real.name).save_pretrained(WORK / "model")
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, 260, (ROWS, TOKENS), generator=generator).tolist()
    prompts = torch.randint(PROMPT.start, PROMPT.stop, (ROWS,), generator=generator).tolist()
    labels = [[-100] * prompt + row[prompt:] for row, prompt in zip(ids, prompts, strict=True)]
    rows = Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * TOKENS] * ROWS, "labels": labels}
    )
    DatasetDict({"train": rows}).save_to_disk(WORK / "tokens")
    rows.to_parquet(WORK / "tokens.parquet")
    with (WORK / "tokens.jsonl").open("w") as file:  # as text, for ms-swift
        for row, prompt in zip(ids, prompts, strict=True):
            parts = {"user": row[:prompt], "assistant": row[prompt:]}
            messages = [{"role": role, "content": json.dumps(part)} for role, part in parts.items()]
            file.write(json.dumps({"messages": messages}) + "\n")


def llamafactory(python: Path) -> dict[str, list[str]]:
    """Return the commands for LLaMA-Factory: its own, and the five lines of docs/trainers.md."""
    script = WORK / "llamafactory_train.py"
    script.write_text(
        "import sys\n"
        "from eaft import GateCallback\n"
        "from llamafactory.train.tuner import run_exp\n"
        "if __name__ == '__main__':\n"
        "    run_exp(callbacks=[GateCallback(gate=sys.argv.pop())])\n"
    )
    shared = {
        **TRAINING,
        "model_name_or_path": str(WORK / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "template": "empty",
        "dataset": "tokens",
        "tokenized_path": str(WORK / "tokens"),
        "cutoff_len": TOKENS,
        "disable_shuffling": True,
        "overwrite_output_dir": True,
    }
    cli, ours = [str(python.with_name("llamafactory-cli")), "train"], [str(python), str(script)]
    return {
        "its SFT": [*cli, recipe("llamafactory", "its SFT", shared)],
        "its EAFT": [*cli, recipe("llamafactory", "its EAFT", {**shared, "use_eaft_loss": True})],
        "ours, sft": [*ours, recipe("llamafactory", "ours, sft", shared), "sft"],
        "ours, eaft": [*ours, recipe("llamafactory", "ours, eaft", shared), "eaft"],
    }


def axolotl(python: Path) -> dict[str, list[str]]:
    """Return the commands for Axolotl: its own, and the lines of docs/trainers.md in its YAML."""
    same = ("gradient_accumulation_steps", "learning_rate", "max_steps", "logging_steps", "seed")
    shared = {
        "base_model": str(WORK / "model"),
        "datasets": [{"path": str(WORK / "tokens.parquet"), "ds_type": "parquet", "type": None}],
        "dataset_prepared_path": str(WORK / "axolotl" / "prepared"),
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # in order
        "sequence_len": TOKENS,
        "micro_batch_size": BATCH,
        "optimizer": "adamw_torch_fused",
        "attn_implementation": "sdpa",
        "bf16": False,
        "fp16": False,
        "save_steps": STEPS,  # a checkpoint has the losses
        "save_only_model": True,
        "lr_scheduler": TRAINING["lr_scheduler_type"],
        **{name: TRAINING[name] for name in same},
    }
    ours = {**shared, "plugins": ["eaft.integrations.axolotl.EAFTPlugin"]}
    settings = {
        "its SFT": shared,
        "its EAFT": {**shared, "use_eaft": True},
        "ours, sft": {**ours, "gate": "sft"},
        "ours, eaft": {**ours, "gate": "eaft"},
    }
    run = [str(python), "-m", "axolotl.cli.main", "train"]
    return {
        name: [*run, recipe("axolotl", name, of), "--launcher", "python"]
        for name, of in settings.items()
    }


def ms_swift(python: Path) -> dict[str, list[str]]:
    """Return the commands for ms-swift: its own, and the plugin of docs/trainers.md."""
    plugin = WORK / "ms_swift_plugin.py"
    plugin.write_text(
        "import json\nfrom eaft import GateCallback\nfrom swift import callbacks_map\nfrom"
        " swift.template import Template, TemplateMeta, register_template\nfor gate in ('sft',"
        " 'eaft'):\n    callbacks_map[f'eaft-{gate}'] = lambda args, trainer, gate=gate:"
        " GateCallback(gate=gate)\nclass Tokens(Template):\n    def _encode(self, inputs):\n       "
        " prompt, answer = (json.loads(message['content']) for message in inputs.messages)\n       "
        " return {'input_ids': prompt + answer, 'labels': [-100] * len(prompt) +"
        " answer}\nregister_template(TemplateMeta('tokens', [], ['{{QUERY}}'], None,"
        " template_cls=Tokens))\n"
    )
    shared = {
        **TRAINING,
        "model": str(WORK / "model"),
        "model_type": "llama",
        "use_hf": True,
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "external_plugins": str(plugin),
        "template": "tokens",
        "dataset": str(WORK / "tokens.jsonl"),
        "load_from_cache_file": False,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "split_dataset_ratio": 0,
        "tuner_type": "full",
        "adam_beta2": 0.999,
        "weight_decay": 0,
        "warmup_ratio": 0,
        "gradient_checkpointing": False,
        "eval_strategy": "no",
        "add_version": False,
    }
    ours = {**shared, "use_logits_to_keep": False}
    settings = {
        "its SFT": shared,
        "ours, sft": {**ours, "callbacks": "eaft-sft"},
        "ours, eaft": {**ours, "callbacks": "eaft-eaft"},
    }
    cli = [str(python.with_name("swift")), "sft"]
    return {name: [*cli, recipe("ms-swift", name, of)] for name, of in settings.items()}


def nemo_automodel(python: Path) -> dict[str, list[str]]:
    """
    Return the commands for NeMo AutoModel: its own, with its calls to a GPU replaced, and the loss
    in its YAML.
    """
    script = WORK / "nemo_automodel_train.py"
    script.write_text(
        "import torch\nfrom datasets import Dataset\ndef rows(path):  # its data sets shift"
        " labels\n    return [{**row, 'labels': row['labels'][1:] + [-100]} for row in"
        " Dataset.from_parquet(path)]\nif __name__ == '__main__':\n    for name in"
        " ('reset_peak_memory_stats', 'max_memory_allocated', 'empty_cache'):\n       "
        " setattr(torch.cuda, name, lambda *args, **settings: 0)\n    from nemo_automodel.cli.app"
        " import main\n    main()\n"
    )
    components = "nemo_automodel.components"
    shared = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": TRAINING["seed"],
        "step_scheduler": {
            "local_batch_size": BATCH,
            "global_batch_size": BATCH * ACCUMULATED,
            "max_steps": STEPS,
        },
        "dist_env": {"backend": "gloo"},
        "distributed": {"strategy": "ddp"},
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(WORK / "model"),
            "torch_dtype": "float32",
            "attn_implementation": "sdpa",
            "force_hf": True,
        },
        "dataset": {"_target_": f"{script.stem}.rows", "path": str(WORK / "tokens.parquet")},
        "dataloader": {
            "shuffle": False,
            "collate_fn": f"{components}.datasets.utils.default_collater",
        },
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "lr": TRAINING["learning_rate"],
            "weight_decay": 0.0,
        },
    }
    ours = "eaft.integrations.nemo_automodel.GatedCrossEntropy"
    losses = {
        "its SFT": {"_target_": f"{components}.loss.masked_ce.MaskedCrossEntropy"},
        "ours, sft": {"_target_": ours, "gate": "sft"},
        "ours, eaft": {"_target_": ours, "gate": "eaft"},
    }
    run = [str(python), "-m", "torch.distributed.run", "--nproc-per-node", "1", str(script)]
    commands = {}
    for name, loss in losses.items():
        logs = {"enabled": False, "checkpoint_dir": str(output("nemo-automodel", name))}
        commands[name] = [
            *run,
            recipe("nemo-automodel", name, {**shared, "loss_fn": loss, "checkpoint": logs}),
        ]
    return commands


def torchtitan(python: Path) -> dict[str, list[str]]:
    """
    Return the commands for torchtitan: its own, with its calls to a GPU replaced, and the loss in
    its config.
    """
    shared = {
        "model": str(WORK / "model"),
        "rows": str(WORK / "tokens.parquet"),
        "tokens": TOKENS,
        "batch": BATCH,
        "global_batch": BATCH * ACCUMULATED,
        "steps": STEPS,
        "learning_rate": TRAINING["learning_rate"],
        "seed": TRAINING["seed"],
    }
    run = [str(python), str(ROOT / "benchmarks" / "hosts_torchtitan.py")]
    config = ["--module", "hosts_torchtitan", "--config", "recipe"]
    gates = {"its SFT": None, "ours, sft": "sft", "ours, eaft": "eaft"}
    return {
        name: [*run, recipe("torchtitan", name, {**shared, "gate": gate}), *config]
        for name, gate in gates.items()
    }


class Host(NamedTuple):
    """
    A trainer.

    Attributes:
        packages: what is installed beside eaft, the host first.
        commands: what returns its commands, given its Python.
        factor: the host's own EAFT loss times this factor is the paper's loss.
        needs: packages installed in place of the host's own requirements.
        why_not: the known reason why our loss differs from the host's own SFT or EAFT loss.
        note: how the run differs from a user's run.
    """

    packages: list[str]
    commands: Callable[[Path], dict[str, list[str]]]
    factor: float = 1.0
    needs: list[str] | None = None
    why_not: dict[str, str] | None = None
    note: str | None = None


HOSTS = {
    "llamafactory": Host(["llamafactory==0.9.5"], llamafactory, factor=3 / math.log(20)),
    "axolotl": Host(
        ["axolotl==0.19.0", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6"],
        axolotl,
        factor=1 / math.log(20),
        # What `axolotl train` imports here, as it pins it; the rest is for GPUs, clouds and
        # trackers
        needs=[
            "transformers==5.16.1",
            "trl==1.9.0",
            "accelerate==1.13.0",
            "datasets==4.8.4",
            "peft==0.20.0",
            "huggingface_hub==1.17.0",
            "tokenizers==0.23.1",
            "pydantic==2.12.5",
            "posthog==6.7.11",
            "python-dotenv==1.0.1",
            "evaluate==0.4.1",
            "addict",
            "bitsandbytes==0.50.2",
            "colorama",
            "fastcore",
            "fire",
            "numba",
            "pillow",
            "triton",
            "wandb",
        ],
        why_not={"its SFT": "it averages the means of micro-batches"},
    ),
    "ms-swift": Host(["ms-swift==4.6.0"], ms_swift),
    "nemo-automodel": Host(
        ["nemo_automodel==0.7.0", "flashoptim==0.1.4"],
        nemo_automodel,
        # All that it names, but for Triton, which flashoptim does: 3.9 does not load one of its
        # kernels
        needs=[
            "transformers==5.18.0",
            "datasets",
            "megatron-fsdp==0.5.0",
            "mistral-common[audio,hf-hub,sentencepiece]",
            "ninja",
            "tiktoken",
            "torchdata",
            "torchao",
            "quack-kernels==0.6.4",
            "accelerate",
        ],
        note="its calls to a GPU replaced",
    ),
    "torchtitan": Host(
        ["torchtitan==0.3.0", "transformers", "accelerate", "triton"],
        torchtitan,
        note="its calls to a GPU and its attention replaced",
    ),
}


def recipe(host: str, name: str, settings: dict[str, Any]) -> str:
    """Write a training's YAML beside the folder which it is to write to, and return where."""
    folder = output(host, name)
    folder.mkdir(parents=True)
    file = folder.with_suffix(".yaml")  # ms-swift copies it into the folder
    file.write_text(yaml.safe_dump({**settings, "output_dir": str(folder)}))
    return str(file)


def output(host: str, name: str) -> Path:
    """Return where a training writes."""
    return WORK / host / name.replace(", ", "-").replace(" ", "-")


def install(host: str) -> Path:
    """Return the Python of the host's environment, made if it is not there."""
    folder = WORK / "environments" / host
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        packages, needs = HOSTS[host].packages, HOSTS[host].needs
        alone = [] if needs is None else packages
        wanted = ["torch==2.13.0", *(packages if needs is None else needs)]
        for more in (wanted, ["--no-deps", *alone, "-e", str(ROOT)]):  # eaft names another TRL
            subprocess.run([python, "-m", "pip", "install", "-q", *more], check=True)
        (folder / "done").touch()
    return python


def train(host: str, name: str, command: list[str]) -> dict[str, Any]:
    """Run a training in a process of its own; return its losses, tokens/s and peak memory (GiB)."""
    print(f"{host}, {name}")
    folder = output(host, name)
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "AXOLOTL_DATASET_NUM_PROC": "0",
    }
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=WORK)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{host}, {name}, failed: see {folder / 'log.txt'}")
    history = logged(folder)
    seconds = next((line["train_runtime"] for line in history if "train_runtime" in line), None)
    if seconds is None:
        raise SystemExit(f"{host}, {name}, logged no train_runtime: see {folder / 'log.txt'}")
    return {
        "losses": [line["loss"] for line in history if "loss" in line],
        "tokens_per_s": STEPS * TOKENS_A_STEP / seconds,
        "peak_gib": usage.ru_maxrss / 2**20,
        "load": os.getloadavg()[0],
    }


def logged(folder: Path) -> list[dict[str, Any]]:
    """
    Return what a training logged, in transformers' file, ms-swift's, NeMo's, torchtitan's output,
    or ours.
    """
    if (ours := folder / "metrics.jsonl").exists():
        return [json.loads(line) for line in ours.read_text().splitlines()]
    if (nemo := folder / "training.jsonl").exists():
        lines = [json.loads(line) for line in nemo.read_text().splitlines()]
        return [
            *lines,
            {"train_runtime": sum(line["num_tokens_per_step"] / line["tps"] for line in lines)},
        ]
    if (swift := folder / "logging.jsonl").exists():
        return json.loads(swift.read_text().splitlines()[-1])["log_history"]
    log = (folder / "log.txt").read_text()
    if (state := next(folder.rglob("trainer_state.json"), None)) is None:
        titan = re.findall(r"step: +\d+ +loss: +([\d.]+).* tps: +([\d,]+)", log)
        if not titan:
            return []
        runtime = sum(TOKENS_A_STEP / int(speed.replace(",", "")) for _, speed in titan)
        return [*({"loss": float(loss)} for loss, _ in titan), {"train_runtime": runtime}]
    history = json.loads(state.read_text())["log_history"]
    # Axolotl's is from a checkpoint, before the end
    seconds = re.search(r"'train_runtime': '?([\d.]+)", log)
    return [*history, {"train_runtime": float(seconds[1])}] if seconds else history


def eaft_train(host: str) -> dict[str, list[str]]:
    """Return the commands for `eaft train`, to stand beside the host's."""
    shared = {
        **TRAINING,
        "model_name_or_path": str(WORK / "model"),
        "dtype": "float32",
        "bf16": False,
        "dataset_name": str(WORK / "tokens.parquet"),
        "max_length": TOKENS,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
    }
    run = [sys.executable, "-m", "eaft", "train", "--config"]
    names = {f"eaft train, {gate}": gate for gate in ("sft", "eaft")}
    return {
        name: [*run, recipe(host, name, {**shared, "gate": gate})] for name, gate in names.items()
    }


def measure(host: str) -> dict[str, Any]:
    """
    Return what a host's trainings and ours gave, one after another, and how their losses stand to
    each other.
    """
    packages, commands, factor, _, why_not, note = HOSTS[host]
    python = install(host)
    shutil.rmtree(WORK / host, ignore_errors=True)
    runs = {
        name: train(host, name, command)
        for name, command in {**commands(python), **eaft_train(host)}.items()
    }
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True
    )
    versions = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    pairs = [
        ("ours, sft", "its SFT", 1.0),
        ("ours, sft", "eaft train, sft", 1.0),
        ("ours, eaft", "its EAFT", factor),
        ("ours, eaft", "eaft train, eaft", 1.0),
    ]
    return {
        "packages": packages,
        "note": note,
        "versions": {name: versions.get(name) for name in LIBRARIES},
        "runs": runs,
        "equal": [
            {
                "objective": name,
                "beside": other,
                "factor": scale,
                "largest_difference": difference(runs[name], runs[other], scale),
                "why_not": (why_not or {}).get(other),
            }
            for name, other, scale in pairs
            if other in runs
        ],
    }


def difference(run: dict[str, Any], other: dict[str, Any], factor: float) -> float:
    """
    Return the largest relative difference of the losses of two trainings, step by step; the other's
    scaled.
    """
    pairs = list(zip(run["losses"], other["losses"], strict=True))
    return max(abs(a - factor * b) / abs(factor * b) for a, b in pairs)


def report(hosts: dict[str, Any]) -> str:
    """Return the tables."""
    equal, cost = [], []
    for of_host in hosts.values():
        package, note = of_host["packages"][0].replace("==", " "), of_host.get("note")
        name = f"{package}, torch {of_host['versions']['torch']}{f' ({note})' if note else ''}"
        for pair in of_host["equal"]:
            factor = "" if pair["factor"] == 1 else f" times {pair['factor']:.6f}"
            known = pair["why_not"] if pair["largest_difference"] < EXPLAINED else None
            said = "yes" if pair["largest_difference"] < TOLERANCE else known or "no"
            difference = f"{pair['largest_difference']:.0e}"
            equal.append([name, pair["objective"], f"{pair['beside']}{factor}", said, difference])
        for objective, run in of_host["runs"].items():
            speed, peak, load = (
                f"{run['tokens_per_s']:.0f}",
                f"{run['peak_gib']:.2f}",
                f"{run['load']:.0f}",
            )
            cost.append([name, objective, speed, peak, load])
    heads = (
        ["host", "objective", "beside", "equal, or why not", "largest difference"],
        ["host", "objective", "tokens/s", "peak GiB", "load of the machine"],
    )
    return (
        "\n\n".join(
            tabulate(rows, head, tablefmt="github")
            for rows, head in zip((equal, cost), heads, strict=True)
        )
        + "\n"
    )


def main() -> None:
    """Run all hosts, or some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "hosts", nargs="*", metavar="HOST", help=f"{', '.join(HOSTS)} (default: all)"
    )
    hosts = parser.parse_args().hosts or list(HOSTS)
    WORK.mkdir(parents=True, exist_ok=True)
    make_inputs()
    file = RESULTS / "hosts.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    machine = asdict(environment())
    for host in hosts:
        found[host] = {"environment": machine, **measure(host)}
        write_json(file, found)
        (RESULTS / "hosts.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
