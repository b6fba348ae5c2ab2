"""The flags of `eaft inspect` beside the flags of `eaft train`, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class InspectArguments:
    """The flags of `eaft inspect` beside the flags of `eaft train`."""

    all: bool = field(
        default=False,
        metadata={
            "help": (
                "Score every row. Without it, data of more than 256 rows is read in random order"
                " (by --seed), until the 95 per cent interval of the conflicts' share of the nll"
                " is at most 4 percentage points wide; at least 128 rows, at most 4,096."
            )
        },
    )
    backend: str = field(
        default="hf",
        metadata={
            "help": (
                "What scores: 'hf', or 'vllm', which knows only the --gate_top_k likeliest tokens."
            ),
            "choices": ["hf", "vllm"],
        },
    )
    rollouts: int = field(
        default=0,
        metadata={
            "help": "Also score the model's own answers to the prompts of so many rows; 0: none."
        },
    )
    rollout_backend: str | None = field(
        default=None,
        metadata={
            "help": "What samples them, 'hf' or 'vllm'; the same as --backend by default.",
            "choices": ["hf", "vllm"],
        },
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "The most tokens of such an answer."}
    )
    ray_actors: int = field(
        default=0,
        metadata={
            "help": (
                "Score with so many Ray actors, one GPU each (with --use_cpu: one core);"
                " RAY_ADDRESS names the cluster. 0: without Ray."
            )
        },
    )
    top_k_curve: bool = field(
        default=False,
        metadata={
            "help": (
                "Also measure how close the entropy of the K likeliest tokens is to the exact one"
                " (Figure 6 of the paper), which takes minutes on a CPU."
            )
        },
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": (
                "Models, adapters, or folders of training runs (each checkpoint) to score the same"
                " with."
            )
        },
    )
