"""
The viewer's page at scale: how long until the first picture, and until what an action asks for is
drawn, in Chromium.

    .venv/bin/python benchmarks/view_page.py                                # the folder of 10^7
    tokens of view.py .venv/bin/python benchmarks/view_page.py --folder inspection            # any
    other

A first picture is timed from opening the address in a fresh browser profile; an action from
changing the address's fragment, as a click does, until the first part of the page (the picture, the
numbers, the table) has its answer, and until no part waits for one. Beside the server's own times
(view.py) this has the browser's: parsing, drawing, layout. Writes
benchmarks/results/view_page_FOLDER.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright
from tabulate import tabulate

from eaft.provenance import environment, write_json

RESULTS = Path(__file__).parent / "results"
FOLDER = Path("/tmp/eaft-view/10000000-200-two")  # as view.py makes it
TOKEN, PORT = "benchmark", 8798
# Lists are asked for after the picture, and not at every step of a drag: waited for, too
ACT = """async (fragment) => {
  const busy = () => document.querySelector("[role=tabpanel]:not([hidden]) [aria-busy=true]");
  const frame = () => new Promise(requestAnimationFrame);
  let first = 0;
  const seen = new MutationObserver((changes) => {
    const done = ({ target }) => target.getAttribute("aria-busy") === "false";
    if (changes.some(done)) first ||= performance.now();
  });
  seen.observe(document.body, { subtree: true, attributeFilter: ["aria-busy"] });
  const start = performance.now();
  location.hash = fragment;
  let drawn = start;
  for (let quiet = 0; quiet < 200; quiet = performance.now() - drawn) {
    await frame();
    if (busy()) drawn = performance.now();
  }
  seen.disconnect();
  return [(first || drawn) - start, Math.max(first, drawn) - start];
}"""


def fragments(random: random.Random) -> dict[str, str]:
    """Return an action of each kind: the fragment of the address that it leads to."""
    h, p = random.random() * 3, random.random() * 0.7
    alpha, center = round(random.random() * 4, 2), round(random.random(), 3)
    sort = random.choice(["nll", "entropy", "conflict_share", "tokens"])
    return {
        "box": f"view=landscape&box={h:.3f},{h + 1:.3f},{p:.3f},{p + 0.3:.3f}",
        "filter": f"view=landscape&nll={random.random():.3f},",
        "slider": f"view=gates&params={json.dumps({'alpha': alpha})}",
        "slider of another gate": (
            f"view=gates&gate=eaft-sigmoid&params={json.dumps({'center': center})}"
        ),
        "page of examples": f"view=examples&sort={sort}&page={random.randrange(1, 100)}",
        "search": f"view=examples&search=w{random.randrange(1000)}",
        "example": f"view=examples&example={random.randrange(1000)}",
        "tokens": f"view=tokens&group=high_entropy&conflict={random.random() * 0.05:.4f},",
        "concordance": f"view=tokens&token={random.randrange(50)}",
    }


def first_picture(browser: Browser, address: str) -> float:
    """Return the milliseconds from opening the page until the plane is drawn."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(address, wait_until="commit")
    page.wait_for_selector(".plane svg image")
    drawn: float = page.evaluate("performance.now()")
    context.close()
    return drawn


def actions(page: Page, address: str, rounds: int) -> dict[str, list[list[float]]]:
    """
    Return the milliseconds of every action until the first part and until all is drawn, by kind, in
    random order.
    """
    page.goto(address)
    page.wait_for_selector(".plane svg image")
    chooser = random.Random(0)
    todo = [
        (name, fragment) for _ in range(rounds) for name, fragment in fragments(chooser).items()
    ]
    chooser.shuffle(todo)
    times: dict[str, list[list[float]]] = {name: [] for name in fragments(chooser)}
    for name, fragment in todo:
        times[name].append(page.evaluate(ACT, fragment))
    return times


def main() -> None:
    """Serve the folder, measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument(
        "--rounds", type=int, default=20, help="of every action, and first pictures"
    )
    parser.add_argument(
        "--note", default="", help="written into the results: what else ran meanwhile"
    )
    flags = parser.parse_args()
    command = [sys.executable, "-m", "eaft", "view", str(flags.folder), "--no_browser"]
    server = subprocess.Popen(
        [*command, "--token", TOKEN, "--port", str(PORT)], stdout=subprocess.PIPE, text=True
    )
    address = f"http://127.0.0.1:{PORT}/?token={TOKEN}"
    try:
        assert server.stdout is not None
        while "http://" not in (line := server.stdout.readline()):
            if not line and server.poll() is not None:
                raise RuntimeError("the server has ended")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            first = [first_picture(browser, address) for _ in range(flags.rounds)]
            found = actions(
                browser.new_page(viewport={"width": 1280, "height": 800}), address, flags.rounds
            )
            version = browser.version
            browser.close()
    finally:
        server.terminate()
        server.wait()
    about = {
        "date": date.today().isoformat(),
        "environment": environment(),
        "chromium": version,
        "note": flags.note,
    }
    times = {"first_picture_ms": first, "actions_ms": found}
    write_json(RESULTS / f"view_page_{flags.folder.name}.json", {**about, **times})
    found["every action"] = [both for times in found.values() for both in times]
    rows = [["first picture", len(first), *quantiles(first), "", ""]]
    for name, both in found.items():
        rows.append(
            [
                name,
                len(both),
                *quantiles([ms for ms, _ in both]),
                *quantiles([ms for _, ms in both]),
            ]
        )
    titles = ["action", "times", "first part: median ms", "p99 ms", "all: median ms", "p99 ms"]
    print(tabulate(rows, titles, tablefmt="github", disable_numparse=True))


def quantiles(times: list[float]) -> list[str]:
    """Return the median and the 99th percentile."""
    return [f"{np.quantile(times, q):.0f}" for q in (0.5, 0.99)]


if __name__ == "__main__":
    main()
