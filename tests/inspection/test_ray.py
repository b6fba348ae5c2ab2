"""`eaft inspect --ray_actors`: a local cluster writes what one process writes."""

import os
import signal
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from eaft import cli
from tests.inspection.test_inspect import CPU, LONG, alone, files, write_rows  # noqa: F401

ray = pytest.importorskip("ray")


def slowly():
    """Make each shard of a worker take a second, so that a worker can be killed in between."""
    from eaft.inspection.score import job

    score_shard = job.score_shard

    def slow(*args):
        time.sleep(1)
        return score_shard(*args)

    job.score_shard = slow


@pytest.fixture
def cluster():
    """A local cluster with room for two actors."""
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=2**27,
        runtime_env={
            "worker_process_setup_hook": slowly,
            "env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])},
        },
    )
    yield
    ray.shutdown()


def actors():
    """Return the processes of Ray's actors."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"MapWorker" in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def test_a_killed_actor_changes_nothing(model_dir, tmp_path, alone, cluster):  # noqa: F811
    data = write_rows(tmp_path / "rows.jsonl", LONG)
    flags = ["inspect", model_dir, data, "--all", *CPU, "--output_dir"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*map(str, flags), str(one)]) == 0
    killed = []

    def kill():
        while not list((two / "tokens").glob("*.parquet")):
            time.sleep(0.05)
        killed.extend([len(list((two / "tokens").glob("*.parquet"))), *actors()])
        os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert cli.main([*map(str, flags), str(two), "--ray_actors", "2"]) == 0
    killer.join()
    shards = len(list((one / "tokens").glob("*.parquet")))
    assert killed[0] < shards - 2
    assert len(killed) == 3  # two actors
    assert list(files(one)) == list(files(two))
    for name in files(one):
        a, b = (pq.read_table(folder / name).to_pandas() for folder in (one, two))
        for column in a:
            if a[column].dtype.kind == "f":
                assert a[column].to_numpy() == pytest.approx(
                    b[column].to_numpy(), rel=1e-4, abs=1e-5, nan_ok=True
                )
            elif column not in ("first_choice", "rank"):  # which rounding may change
                assert a[column].equals(b[column]), (name, column)
