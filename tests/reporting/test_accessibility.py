"""Accessibility of the pages: structural rules without a browser, and axe-core in a headless one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from graftwork.core.run_folder import RunFolder
from graftwork.metrics.results import CostRow, ResultRow, Results, Sample
from graftwork.reporting.render import write_report
from graftwork.settings.recipe import RunConfig, write_run
from reporting.html_rules import axe_core, violations

LONG = "a-task-with-a-name-that-no-line-break-helps/" + "x" * 80


def write_runs(folder: Path) -> list[RunFolder]:
    """Write two runs with everything that a report shows."""
    runs = []
    for name in ("one", "two"):
        run = RunFolder(folder / name)
        settings = [None, 64, 8]
        labels = ["dense", "feed_forward_k=64", "feed_forward_k=8"]
        rows = tuple(
            ResultRow(LONG, "dev", label, {"exact_match": 80.0 - place, "f1": 81.0}, 10, {"method.k": k})
            for place, (label, k) in enumerate(zip(labels, settings, strict=True))
        )
        cost = tuple(CostRow(label, length, 0.5, 2**20, None) for label in labels for length in (128, 256))
        Results(
            "some/model",
            "topk",
            rows,
            {label: {"kept_mass/encoder.block.0": 0.5, "kept_mass/encoder.block.1": 0.75} for label in labels},
            cost,
            (Sample(LONG, "a <b> question " + "y" * 90, ("yes",), {"dense": "yes", "feed_forward_k=8": "no, it is"}),),
            training={"finetune": {"train_loss": 0.5}},
        ).write(run.results_file)
        write_run(run.run_file, RunConfig(model="some/model"))
        log = run.path / "train" / "finetune" / "log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 5)))
        spans = {"source": "a b .\n\nc d " + "z" * 120, "spans": [[1, 2]], "gold_spans": [[1, 3]], "unmatched": 1}
        answer = {"id": "1", "input": "x", "prediction": "p", "label": "l", "gold_label": "l", "right": True}
        texts = {"explanations": ["because"], "gold_explanations": ["it is so"]}
        chances = {"probabilities": {"a label of many words " * 3: 0.75, "other": 0.25}}
        entries = [{**answer, **texts, **spans}, {**answer, **texts, **chances, "id": "2", "right": False}]
        prompts = {"order": "separate", "input": "a prompt " * 30 + "w" * 90, "second_input": "explain " + "v" * 120}
        entries.append({**answer, **texts, **prompts, "id": "3"})
        details = run.path / "predictions" / "movies.converted.details.jsonl"
        details.parent.mkdir(parents=True)
        details.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        runs.append(run)
    return runs


def write_pages(folder: Path) -> list[Path]:
    """Write the report of two runs, and their pages of explanations."""
    return write_report(write_runs(folder), formats=["html"], output=folder / "both")


def test_every_page_follows_the_structural_rules(tmp_path):
    pages = write_pages(tmp_path)
    assert {page.name for page in pages} == {"report.html", "explanations.html"}
    assert len(pages) == 3
    for page in pages:
        assert violations(page.read_text()) == [], page


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ("<main><table></table></main>", "a table is not in a focusable region with a label"),
        ("<p>text</p>", "text outside all landmarks: 'text'"),
        ("<main><h1>a</h1><h3>b</h3></main>", "<h3> follows <h1>"),
        ('<main><img src="data:,"></main>', "an image has no alternative text"),
        ("<main><input></main>", "a field has no label"),
        ('<main><p style="width: 900px"></p></main>', "a fixed width can overflow: width: 900px"),
        ('<main><script src="https://a.b/c.js"></script></main>', "<script> loads https://a.b/c.js"),
        ('<main><i id="a"></i><i id="a"></i></main>', "the id a occurs 2 times"),
        ("<main><th>a</th></main>", "a header cell has no scope"),
        ('<main><div class="plot"></div></main>', "a plot cannot be focused, or has no label"),
        ("<style>a { background: url(x.png); }</style>", "a style loads something"),
        ("<h1>a</h1>", "found 0 of <main>; expected one"),
    ],
)
def test_broken_rules_are_found(html, problem):
    assert problem in violations(html)


@pytest.mark.long
def test_axe_finds_nothing_and_nothing_overflows(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="no driver for browsers: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser; install one of: {', '.join(names)}")
    axe = axe_core()
    if axe is None:
        pytest.skip("no axe-core; run `npm install --no-save axe-core`, or set AXE_CORE to its axe.min.js")
    pages = write_pages(tmp_path)
    with playwright.sync_playwright() as driver:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        opened = driver.chromium.launch(executable_path=browser, args=[*sandbox, "--disable-dev-shm-usage"])
        for path in pages:
            for width in (1400, 400, 390):
                for scheme in ("light", "dark"):
                    page = opened.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                    errors: list[str] = []
                    page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
                    page.on(
                        "request",
                        lambda request, errors=errors: (
                            None if request.url.startswith(("file:", "data:")) else errors.append(request.url)
                        ),
                    )
                    page.goto(path.as_uri())
                    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
                    assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
                    page.evaluate(axe.read_text())
                    found = page.evaluate("axe.run().then(found => found.violations.map(one => one.id))")
                    assert (found, errors) == ([], []), (path, width, scheme)
                    page.close()
        opened.close()


@pytest.mark.long
def test_points_of_a_plot_are_read_by_pointer_and_keys(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="no driver for browsers: pip install playwright")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser; install chromium")
    path = next(path for path in write_pages(tmp_path) if path.name == "report.html")
    with playwright.sync_playwright() as driver:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        opened = driver.chromium.launch(executable_path=browser, args=[*sandbox, "--disable-dev-shm-usage"])
        page = opened.new_page(viewport={"width": 1400, "height": 900})
        page.goto(path.as_uri())
        plot = page.locator(".plot").first
        plot.focus()
        page.keyboard.press("ArrowRight")
        first = plot.locator(".tip").inner_text()
        page.keyboard.press("ArrowRight")
        second = plot.locator(".tip").inner_text()
        assert first.startswith("one: dense")
        assert second.startswith("one: feed_forward_k=64")
        place = plot.locator(".dot").bounding_box()
        page.keyboard.press("ArrowLeft")
        page.mouse.move(place["x"] + 6, place["y"] + 6)
        assert plot.locator(".tip").inner_text() == second
        opened.close()
