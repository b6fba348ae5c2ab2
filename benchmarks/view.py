"""
The viewer's server at scale: how long a first picture, a box, a filter, a slider or a page takes,
over real HTTP.

    .venv/bin/python benchmarks/view.py                                  # 10^7 tokens
    .venv/bin/python benchmarks/view.py --tokens 100000000 --no_compared # 3 GB in /tmp, once; is
    used again .venv/bin/python benchmarks/view.py --tokens_per_example 10          # a million
    examples

The folder is synthetic (`make_folder`): statistics with a realistic spread, eight sources, a sixth
of it rollouts, one compared model. `eaft view` is started as a user starts it. What is timed is
what a user does: an action's requests are sent at once, as the page does, and the last byte of the
last answer ends it. Then the parts of answers, in one process: what the time goes to. Writes
benchmarks/results/view_TOKENS_EXAMPLES.json and prints both tables.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic_core import to_json
from tabulate import tabulate

from eaft.inspection.folder import BASE, COMPARED, EXAMPLES, TOKENS, VOCABULARY, Inspection
from eaft.inspection.labelled import weighed_gates
from eaft.inspection.summary import DATA, ROLLOUTS
from eaft.inspection.view.queries import Queries
from eaft.inspection.view.queries.gates import weigh
from eaft.inspection.view.selection import Selection
from eaft.inspection.view.tables import Tables
from eaft.objective.statistics import CONFLICT_MAX_ENTROPY, CONFLICT_MAX_PROB
from eaft.provenance import environment, write_json

RESULTS = Path(__file__).parent / "results"
VOCAB, SOURCES, SHARD_TOKENS = 30_000, 8, 2**17  # as `eaft inspect` has them
TOKEN, PORT = "benchmark", 8799
SENT = dict[str, Any]

# The folder


def make_statistics(random: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """
    Return the columns of `STATISTICS` for n tokens: skewed entropies, mostly the first choice, 3%
    in conflict.
    """
    entropy = random.gamma(0.6, 1.6, n).clip(1e-4, 10)
    first_prob = np.exp(-0.75 * entropy).clip(1e-3, 0.9999)
    is_first = random.random(n) < 0.97 * first_prob + 0.02
    prob = np.where(
        is_first, first_prob, np.minimum(1 - first_prob, first_prob) * random.random(n) ** 3
    ).clip(1e-9, 1)
    return {
        "log_prob": np.log(prob).astype(np.float32),
        "entropy": entropy.astype(np.float32),
        "top_k_entropy": np.minimum(0.95 * entropy, np.log(20)).astype(np.float32),
        "sum_sq_probs": (first_prob**2 + 0.2 * (1 - first_prob) ** 2).astype(np.float32),
        "first_choice": random.zipf(1.3, n).clip(1, VOCAB).astype(np.int32) - 1,
        "first_prob": first_prob.astype(np.float32),
        "rank": np.where(is_first, 1, 2 + random.zipf(1.5, n).clip(1, VOCAB - 2)).astype(np.int32),
    }


def make_folder(folder: Path, tokens: int, tokens_per_example: int, compared: bool) -> None:
    """Write an inspection of about so many tokens, two thirds of them labelled."""
    random = np.random.default_rng(0)
    words = np.array([f" w{i}" for i in range(VOCAB)], dtype=object)
    lengths_of_words = np.array([len(word) for word in words], dtype=np.int32)
    examples = tokens // tokens_per_example
    names = ["tuned"] if compared else []
    for part in ("tokens", *(f"compared/{name}" for name in names)):
        (folder / part).mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(folder / "examples.parquet", EXAMPLES) as writer:
        step = max(1, SHARD_TOKENS // tokens_per_example)
        for shard, first in enumerate(range(0, examples, step)):
            count = min(step, examples - first)
            lengths = random.integers(
                max(2, tokens_per_example // 2), tokens_per_example * 3 // 2 + 1, count
            )
            starts = np.concatenate([[0], lengths.cumsum()[:-1]])
            n = int(lengths.sum())
            example = np.repeat(np.arange(first, first + count, dtype=np.int32), lengths)
            position = (np.arange(n) - np.repeat(starts, lengths)).astype(np.int32)
            ids = random.zipf(1.2, n).clip(1, VOCAB).astype(np.int32) - 1
            ends = lengths_of_words[ids].cumsum()
            ends = (ends - np.repeat(ends[starts] - lengths_of_words[ids[starts]], lengths)).astype(
                np.int32
            )
            labelled = (position >= np.repeat(lengths // 3, lengths)) & (position > 0)
            keys = {"example": example, "position": position}
            base: dict[str, np.ndarray] = {}
            for name in (BASE, *names):
                found = make_statistics(random, n)
                base = base or found
                columns = {k: pa.array(v, mask=~labelled) for k, v in found.items()}
                if name == BASE:
                    table = pa.table(
                        {**keys, "token_id": ids, "end": ends, "labelled": labelled, **columns},
                        TOKENS,
                    )
                    pq.write_table(table, folder / "tokens" / f"{shard:05d}.parquet")
                else:
                    table = pa.table({**keys, **columns}, COMPARED)
                    pq.write_table(table, folder / "compared" / name / f"{shard:05d}.parquet")

            def mean(
                values: np.ndarray, labelled: np.ndarray = labelled, starts: np.ndarray = starts
            ) -> np.ndarray:
                return np.add.reduceat(values * labelled, starts) / np.add.reduceat(
                    labelled.astype(float), starts
                )

            nll = -base["log_prob"].astype(float)
            conflict = (base["entropy"] < CONFLICT_MAX_ENTROPY) & (
                np.exp(base["log_prob"]) < CONFLICT_MAX_PROB
            )
            texts = ["".join(words[ids[a : a + b]]) for a, b in zip(starts, lengths, strict=True)]
            index = np.arange(first, first + count)
            rollouts = index >= examples * 5 // 6
            rows = {
                "example": index.astype(np.int32),
                "origin": np.where(rollouts, ROLLOUTS, DATA),
                "source": np.char.add("source ", (index % SOURCES).astype(str)),
                "row": np.where(rollouts, index - examples * 5 // 6, index),
                "digest": [f"{i:016x}" for i in index],
                "text": texts,
                "messages": [None] * count,
                "tokens": lengths.astype(np.int32),
                "labelled": np.add.reduceat(labelled.astype(np.int32), starts).astype(np.int32),
                "cut": np.zeros(count, np.int32),
                "cut_labelled": np.zeros(count, np.int32),
                "nll": mean(nll),
                "entropy": mean(base["entropy"]),
                "conflict_share": mean(conflict),
                "conflict_nll_share": mean(conflict * nll) / mean(nll),
            }
            writer.write_table(pa.table(rows, EXAMPLES))
    vocabulary = {"token_id": range(VOCAB), "text": words, "special": [False] * VOCAB}
    pq.write_table(pa.table(vocabulary, VOCABULARY), folder / "vocabulary.parquet")
    write_json(
        folder / "summary.json",
        {"measured": {"entropy_threshold": 0.03, "prob_threshold": 0.1, "tau": 1.5}},
    )
    models = [{"name": name, "model": name} for name in (BASE, *names)]
    write_json(
        folder / "run.json", {"scored": True, "finished": True, "top_k": 20, "models": models}
    )


# What is timed


def box(random: random.Random) -> str:
    """Return a random box of the plane."""
    ends = [
        sorted((random.random() * 5, random.random() * 5)),
        sorted((random.random(), random.random())),
    ]
    return ",".join(f"{x:.4f}" for pair in ends for x in pair)


def selection(random: random.Random) -> SENT:
    """Return a random filter, or two."""
    filters: list[SENT] = [
        {"source": f"source {random.randrange(SOURCES)}"},
        {"nll": f"{random.random():.3f},{1 + random.random():.3f}"},
        {"conflict": f"{random.random() * 0.05:.4f},"},
        {"origin": random.choice([DATA, ROLLOUTS])},
    ]
    chosen: SENT = {}
    for part in random.sample(filters, random.choice([1, 2])):
        chosen |= part
    return chosen


def slider(random: random.Random) -> SENT:
    """Return a gate with its sliders somewhere."""
    gates = weighed_gates()
    gate = random.choice(list(gates))
    values = {
        "alpha": 4,
        "steepness": 60,
        "center": 1,
        "entropy_threshold": 1,
        "prob_threshold": 1,
        "tau": 5,
    }
    params = {
        name: round(0.01 + random.random() * most, 3)
        for name, most in values.items()
        if name in gates[gate].params
    }
    return {"gate": gate, "params": json.dumps(params)}


def actions(
    random: random.Random, examples: int, compared: bool
) -> dict[str, Callable[[], list[tuple[str, SENT]]]]:
    """Return what a user does, by name: each makes the paths and parameters of its requests."""
    held: SENT = {}

    def drag() -> list[tuple[str, SENT]]:
        where = {**held, "box": box(random)}
        return [("landscape", where), ("examples", where)]

    def choose() -> list[tuple[str, SENT]]:
        held.clear()
        held.update(selection(random))
        return [("landscape", held), ("examples", held)]

    def search() -> list[tuple[str, SENT]]:
        where = {"search": f"W{random.randrange(VOCAB)}"}
        return [("landscape", where), ("examples", where)]

    def turn() -> list[tuple[str, SENT]]:
        sort = random.choice(["nll", "conflict_share", "entropy", "tokens", "example"])
        order = random.choice(["asc", "desc"])
        return [
            (
                "examples",
                {
                    "sort": sort,
                    "order": order,
                    "offset": random.randrange(examples // 2),
                    "limit": 100,
                },
            )
        ]

    def words() -> list[tuple[str, SENT]]:
        group = random.choice(["conflict", "high_entropy", "low_entropy"])
        return [("tokens", {"group": group, **selection(random)})]

    def places() -> list[tuple[str, SENT]]:
        return [("concordance", {"group": "conflict", "token": random.randrange(50), "limit": 50})]

    def gate() -> list[tuple[str, SENT]]:
        return [("gates", slider(random))]

    def gate_elsewhere() -> list[tuple[str, SENT]]:
        return [("gates", {**slider(random), **selection(random)})]

    def one() -> list[tuple[str, SENT]]:
        return [("example", {"example": random.randrange(examples), "gate": "eaft"})]

    def two_models() -> list[tuple[str, SENT]]:
        where = selection(random)
        return [("landscape", where), ("landscape", {**where, "model": "tuned"})]

    found = {
        "box": drag,
        "filter": choose,
        "search": search,
        "slider": gate,
        "slider, another selection": gate_elsewhere,
        "page of examples": turn,
        "example": one,
        "tokens": words,
        "concordance": places,
    }
    return {**found, "two models": two_models} if compared else found


class Client:
    """A browser: some connections, kept open."""

    def __init__(self, port: int) -> None:
        self.port, self.pool = port, ThreadPoolExecutor(4)
        self.connections = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(4)]

    def get(self, slot: int, path: str) -> int:
        """Return how many bytes an answer has."""
        connection = self.connections[slot]
        try:
            connection.request("GET", path, headers={"Authorization": f"token {TOKEN}"})
            answer = connection.getresponse()
        except http.client.RemoteDisconnected:  # it was idle for long; a browser asks again too
            connection.close()
            connection.request("GET", path, headers={"Authorization": f"token {TOKEN}"})
            answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {body[:300]!r}")
        return len(body)

    def act(self, requests: list[tuple[str, SENT]]) -> tuple[float, int]:
        """Send requests at once; return the seconds until all are answered, and the bytes."""
        paths = [f"/api/{name}?{urlencode(sent)}" for name, sent in requests]
        start = time.perf_counter()
        sizes = list(self.pool.map(self.get, range(len(paths)), paths))
        return time.perf_counter() - start, sum(sizes)


def memory_gib(pid: int) -> tuple[float, float]:
    """Return a process's resident memory now and at its peak, GiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(found["VmRSS"]) / 2**20, int(found["VmHWM"]) / 2**20


def measure(folder: Path, examples: int, compared: bool, rounds: int) -> SENT:
    """Start the server, do everything `rounds` times in random order, and return the times."""
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "eaft",
        "view",
        str(folder),
        "--no_browser",
        "--token",
        TOKEN,
        "--port",
        str(PORT),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        while "http://" not in (line := server.stdout.readline()):
            if not line and server.poll() is not None:
                raise RuntimeError("the server has ended")
        client = Client(PORT)
        client.act([("folder", {})])
        found: SENT = {"start_s": time.perf_counter() - start}
        found["first_picture_s"] = client.act([("folder", {}), ("landscape", {})])[0]
        if compared:
            found["other_model_s"] = client.act([("landscape", {"model": "tuned"})])[
                0
            ]  # is it read by now?
        chooser = random.Random(0)
        todo = actions(chooser, examples, compared)
        order = [name for name in todo for _ in range(rounds)]
        chooser.shuffle(order)
        times: dict[str, list[float]] = {name: [] for name in todo}
        sizes: dict[str, list[int]] = {name: [] for name in todo}
        for name in order:
            seconds, size = client.act(todo[name]())
            times[name].append(seconds)
            sizes[name].append(size)
        now, peak = memory_gib(server.pid)
        return {
            **found,
            "memory_gib": now,
            "peak_memory_gib": peak,
            "seconds": times,
            "bytes": sizes,
        }
    finally:
        server.terminate()
        server.wait()


def parts(folder: Path, repeats: int = 5) -> dict[str, float]:
    """
    Return what the time goes to: the median milliseconds of each part of an answer, one at a time,
    none kept.
    """
    torch.set_num_threads(1)  # as the server has it
    start = time.perf_counter()
    tables = Tables(Inspection(folder))
    found = {"reading the base model, at the start": 1000 * (time.perf_counter() - start)}
    queries, whole = Queries(tables), Selection()
    boxes = [Selection(box=(0.1, 0.5 + i / 10, 0.1, 0.6)) for i in range(repeats)]
    plane = queries.plane.landscape(whole)
    gated = queries.gates.gate_tokens(whole)
    known = len(tables.example_nll)
    jobs: dict[str, Callable[[int], Any]] = {
        "sums over the plane's bins, all tokens": lambda i: queries.plane.find_plane(whole),
        "sums in a box": lambda i: queries.plane.landscape(boxes[i]),
        "examples by their nll": lambda i: queries.database.find_chosen_examples(
            Selection(nll=(0.5, 1 + i / 10))
        ),
        "sums over the bins, of those examples": lambda i: queries.plane.find_plane(
            Selection(nll=(0.5, 1 + i / 10))
        ),
        "search of all texts": lambda i: queries.database.find_chosen_examples(
            Selection(search=f"w{1000 + i} ")
        ),
        "order of all examples": lambda i: queries.examples.find_ordered(whole, "nll", bool(i % 2)),
        "order of the examples with tokens in a box": lambda i: queries.examples.find_ordered(
            boxes[i], "nll", True
        ),
        "a page's rows": lambda i: queries.examples.page(whole, "example", False, 100 * i, 100),
        "a gate's tokens (a sample)": lambda i: queries.gates.find_gate_tokens(whole),
        "a gate's weights": lambda i: weigh("eaft", gated.stats, {"alpha": 1 + i / 10}),
        "a gate's weights and all sums of them": lambda i: queries.gates.effect(
            whole, "eaft", {"alpha": 1 + i / 10}
        ),
        "one example, from Parquet": lambda i: queries.examples.whole(
            (i + 1) * known // (repeats + 2), BASE, "eaft", {}
        ),
        "tokens' counts in a group": lambda i: queries.tokens.find_token_counts(whole, "conflict"),
        "an answer's JSON": lambda i: to_json(plane),
    }
    for name, job in jobs.items():
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            job(i)
            times.append(1000 * (time.perf_counter() - start))
        found[name] = float(np.median(times))
    tables.close()
    return found


def table(found: SENT) -> str:
    """Return the times as a table: median, 99th percentile, largest."""
    rows = []
    everything = {"everything": [s for times in found["seconds"].values() for s in times]}
    for name, times in {**found["seconds"], **everything}.items():
        quantiles = [f"{1000 * np.quantile(times, q):.0f}" for q in (0.5, 0.99, 1)]
        size = np.median(found["bytes"][name]) / 1000 if name in found["bytes"] else None
        rows.append([name, len(times), *quantiles, "" if size is None else f"{size:.0f}"])
    return tabulate(
        rows,
        ["action", "times", "median ms", "p99 ms", "most ms", "kB"],
        tablefmt="github",
        disable_numparse=True,
    )


def main() -> None:
    """Make the folder if it is not there, measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--tokens_per_example", type=int, default=200, help="on average")
    parser.add_argument("--no_compared", action="store_true", help="no second model")
    parser.add_argument("--rounds", type=int, default=40, help="of every action")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/eaft-view"), help="where the folders are kept"
    )
    parser.add_argument(
        "--note", default="", help="written into the results: what else ran meanwhile"
    )
    flags = parser.parse_args()
    examples, compared = flags.tokens // flags.tokens_per_example, not flags.no_compared
    folder = (
        flags.work / f"{flags.tokens}-{flags.tokens_per_example}-{'two' if compared else 'one'}"
    )
    if not (folder / "run.json").is_file():
        make_folder(folder, flags.tokens, flags.tokens_per_example, compared)
    found = measure(folder, examples, compared, flags.rounds)
    found["parts_ms"] = parts(folder)
    facts = {
        "tokens": flags.tokens,
        "examples": examples,
        "models": 1 + compared,
        "note": flags.note,
    }
    facts["disk_gib"] = sum(file.stat().st_size for file in folder.rglob("*.parquet")) / 2**30
    about = {"date": date.today().isoformat(), "environment": environment(), **facts}
    write_json(
        RESULTS / f"view_{flags.tokens:.0e}_{examples}.json".replace("e+0", "e"), {**about, **found}
    )
    print(
        {
            **facts,
            **{name: round(value, 2) for name, value in found.items() if isinstance(value, float)},
        }
    )
    print(table(found))
    rows = [[name, f"{value:.0f}"] for name, value in found["parts_ms"].items()]
    print(tabulate(rows, ["what the time goes to", "ms"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
