"""Shards scored by the actors of a Ray cluster, each with a copy of the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eaft.errors import ConfigurationError, EAFTError
from eaft.inspection.folder import BASE
from eaft.inspection.run_file import ScoredModel
from eaft.inspection.score.job import Job, LazyModel, write_shard
from eaft.inspection.score.pieces import Pieces


class Scorer:
    """
    What each actor runs: it scores shards and writes their tables.

    Args:
        job: the examples and the folder. Every machine of the cluster must see their files.
        model: whose tables are written.
    """

    def __init__(self, job: Job, model: ScoredModel) -> None:
        self.job, self.name = job, model.name
        self.scoring = LazyModel(job, model.model, is_base=model.name == BASE)
        self.shards, self.pieces = job.examples.shards(), Pieces(job.tokenizer)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the tables of the shards in `batch["shard"]`, and return the batch."""
        for shard in batch["shard"].tolist():
            part = self.shards[shard]
            write_shard(
                self.job, self.name, shard, part, self.scoring, self.pieces, lambda tokens: None
            )
        return batch


def check(processes: int, backend: str) -> None:
    """
    Check that Ray is installed, the models are transformers', and no launcher has started this.

    Args:
        processes: of the command.
        backend: `hf` or `vllm`.

    Raises:
        ConfigurationError: one of these is not so.
    """
    if backend != "hf":
        raise ConfigurationError(
            f"ray_actors and backend={backend!r} do not go together: leave one of them out."
        )
    if find_spec("ray") is None:
        raise ConfigurationError("ray_actors needs Ray: pip install 'eaft[ray]'.")
    if processes > 1:
        raise ConfigurationError(
            "ray_actors starts processes on the whole cluster: give the command without a launcher."
        )


def score(job: Job, model: ScoredModel, shards: list[int]) -> Iterator[int]:
    """
    Yield each shard once its tables are written.

    Ray Data hands the shards to the actors, and a shard whose actor died to another actor.
    `RAY_ADDRESS` names the cluster. Without it Ray uses this machine alone.

    Args:
        job: the examples, the folder and the number of actors.
        model: whose tables are written.
        shards: to be scored.

    Raises:
        EAFTError: raised by an actor, or this machine does not see what an actor has written.
    """
    import ray
    from ray.exceptions import RayTaskError

    if not shards:
        return
    if not ray.is_initialized():
        ray.init(logging_level="ERROR", log_to_driver=False, include_dashboard=False)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Workers have working directories of their own
    job = replace(job, folder=job.folder.resolve())
    if Path(model.model).exists():
        model = replace(model, model=str(Path(model.model).resolve()))
    waiting = ray.data.from_items([{"shard": s} for s in shards], override_num_blocks=len(shards))
    done = waiting.map_batches(
        Scorer,
        fn_constructor_args=(job, model),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(job.ray_actors, len(shards))),
        num_cpus=1,
        num_gpus=0 if job.settings.args.use_cpu else 1,
    )
    try:
        for row in done.iter_rows():
            if not job.file(model.name, row["shard"]).is_file():
                raise ConfigurationError(
                    f"output_dir={job.folder}: Ray's workers have written there, and this machine"
                    " does not see it. Choose a folder that all machines share."
                )
            yield row["shard"]
    except RayTaskError as error:
        if isinstance(error.cause, EAFTError):
            raise error.cause from None
        raise
