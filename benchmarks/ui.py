"""The page in a browser: neighbors after typing at 100,000 rows, and page load to first sample.

Both with the shipped model (``retrodiff-pictograms``), in Chromium through Playwright, with server
and browser on one machine.

- *Neighbors after typing*: words are typed into the prompt over a database of drawn rows around the
  pictograms' embeddings, whose pictures and records are the pictograms'. The time from the last
  letter until the cards in the page are those of the whole text.
- *First sample*: from the request for the page, over a press of the button, until four finished
  samples are shown; the model is loaded already, as it is when ``retrodiff ui`` says its address.

    python benchmarks/ui.py --out benchmarks/results/ui.json
    python benchmarks/ui.py --rows 2000 --words 2 --loads 1       # a short check
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.databases import ArrayDatabase, Searchable
from retrodiff.ui import Question, Shelf, Shelves, Studio, shown
from retrodiff.ui.starting import opened

WORDS = (
    "smiling face", "cat face", "clock", "purple heart", "sunglasses", "tree", "dog face",
    "umbrella",
    "moon", "red apple", "bell", "robot", "penguin", "envelope", "soccer ball", "tropical fish",
)  # fmt: skip
BOUND_NEIGHBORS, BOUND_SAMPLE = 0.5, 10.0


class Around(ArrayDatabase):
    """Rows drawn around those of another database, with its pictures."""

    def __init__(self, database: Searchable, rows: int):
        rng = np.random.default_rng(0)
        of = torch.arange(rows) % len(database)
        embeddings = database.embeddings(of)
        noise = torch.from_numpy(rng.standard_normal(embeddings.shape, np.float32))
        embeddings = embeddings + 0.03 * embeddings.norm(dim=1, keepdim=True) * noise
        super().__init__(embeddings, database.fingerprint, database.records(of))
        self.pictured = database

    def image(self, index: int) -> Tensor:
        """The picture of the row that it was drawn around."""
        return self.pictured.image(index % len(self.pictured))


def typed(page: Any, studio: Studio, words: list[str]) -> list[float]:
    """Seconds from the last letter to the cards of the whole text, for each text."""
    seconds: list[float] = []
    names = studio.shelves.first
    for text in words:
        used = studio.neighbors(Question(prompt=text, names=names)).used
        assert used is not None
        rows = used.indices[0].tolist()
        box = page.get_by_label("Prompt")
        box.fill("")
        box.press_sequentially(text[:-1], delay=60)
        page.wait_for_timeout(1500)
        page.evaluate(
            """(rows) => {
                const there = () => [...document.querySelectorAll('#rd-near .used')]
                    .map((card) => Number(card.dataset.lit)).join() === rows.join();
                window.seen = there() ? 'before' : null;
                const watch = () => {
                    if (window.seen === null && there()) window.seen = performance.now();
                    if (window.seen === null) requestAnimationFrame(watch);
                };
                document.querySelector('#rd-prompt textarea, #rd-prompt input').addEventListener(
                    'input', () => { window.pressed = performance.now(); }, { once: true });
                requestAnimationFrame(watch);
            }""",
            rows,
        )
        box.press_sequentially(text[-1])
        page.wait_for_function("window.seen !== null", timeout=30_000)
        if page.evaluate("window.seen") != "before":  # else the shorter text had the same rows
            seconds.append(page.evaluate("(window.seen - window.pressed) / 1000"))
    return seconds


def loaded(browser: Any, address: str) -> tuple[float, float]:
    """Seconds from the request for the page to its neighbors, and to four finished samples."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    start = time.perf_counter()
    page.goto(address)
    page.wait_for_selector("#rd-near .rd-card", timeout=60_000)
    near = time.perf_counter() - start
    page.get_by_role("button", name="Sample", exact=True).click()
    page.wait_for_function("document.querySelectorAll('#rd-made .rd-links').length === 4")
    whole = time.perf_counter() - start
    page.close()
    return near, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=len(WORDS))
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    start = time.perf_counter()
    studio, examples, about = opened()
    studio.warm()
    ready = time.perf_counter() - start
    assert isinstance(studio.model.database, Searchable)
    many = Around(studio.model.database, options.rows)
    large = Studio(studio.model, Shelves([Shelf("drawn rows", many)]), "pictograms")
    large.warm()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=options.chromium, args=["--no-sandbox"]
        )
        with shown(studio, examples=examples, about=about) as address:
            loads = [loaded(browser, address) for _ in range(options.loads)]
        with shown(large, examples=examples, about=about) as address:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(address)
            page.wait_for_selector("#rd-near .rd-card", timeout=60_000)
            seconds = typed(page, large, list(WORDS[: options.words]))
            version = browser.version
        browser.close()
    import gradio

    report = {
        "rows": options.rows,
        "dim": many.fingerprint.dim,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gradio": gradio.__version__,
        "chromium": version,
        "python": platform.python_version(),
        "model_ready_s": round(ready, 2),
        "texts": len(seconds),
        "neighbors_after_typing_s": {
            "median": round(statistics.median(seconds), 3),
            "slowest": round(max(seconds), 3),
            "bound": BOUND_NEIGHBORS,
        },
        "load_to_neighbors_s": [round(near, 2) for near, _ in loads],
        "load_to_four_samples_s": [round(whole, 2) for _, whole in loads],
        "bound_of_load_to_samples_s": BOUND_SAMPLE,
    }
    print(json.dumps(report, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
