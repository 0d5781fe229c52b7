"""`graftwork demo`: runs every method on data and models that ship with the package and writes one report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graftwork.core.files import write_text
from graftwork.core.messages import say
from graftwork.core.registry import Registry
from graftwork.demo.parts.part import Part, Summary
from graftwork.demo.world.world import build_world
from graftwork.demo.world.writers import write_world
from graftwork.reporting.explanations import write_explanations
from graftwork.reporting.render import Section, link, read_run, to_html, to_markdown
from graftwork.reporting.report import RunReport

TITLE = "Graftwork demo"
INTRO = (
    "Every method on a small invented world and tiny models pretrained on it. All results were computed on this "
    "machine by the same code as a full-size run."
)

PARTS: Registry[type[Part]] = Registry(
    "part of the demonstration",
    {
        path.stem: f"graftwork.demo.parts.{path.stem}:PART"
        for path in Path(__file__).with_name("parts").glob("*.py")
        if path.stem not in ("__init__", "part")
    },
)
"""Demonstrations, found by the files of `demo.parts`; each module assigns its class to `PART`."""


def run_demo(output: str | Path, *, methods: Sequence[str] = (), quick: bool = False) -> dict[str, Summary]:
    """Write the world, run the demonstration of each method, and write `report.html`.

    An interrupted demonstration resumes when called again with the same folder.

    Args:
        output: Output folder.
        methods: Names of the methods to demonstrate; all by default.
        quick: Train for two steps on a handful of examples, as a smoke test.

    Returns:
        Summary of each demonstration, by method.

    Raises:
        ConfigError: If a method has no demonstration.
        GraftworkError: If a result violates an identity of the method.
    """
    folder = Path(output)
    started = time.perf_counter()
    chosen = {name: PARTS.get(name) for name in methods or PARTS.names()}
    world = folder / "world"
    say(f"Writing the offline world to {world}")
    write_world(build_world(), world)
    summaries: dict[str, Summary] = {}
    sections: list[Section] = []
    for name, part_class in chosen.items():
        part = part_class(folder / name, world, quick=quick)
        stages = part.stages()
        for number, stage in enumerate(stages, 1):
            say(f"{name} {number}/{len(stages)}: {stage.description}")
            stage.run()
        summaries[name] = part.summary()
        sections.append(_section(name, part, summaries[name], folder))
    reports = [report for section in sections for report in section.reports]
    write_text(folder / "report.html", to_html(sections, title=TITLE, intro=INTRO))
    write_text(folder / "report.md", to_markdown(Section(reports)))
    say(f"Wrote {folder / 'report.html'} after {time.perf_counter() - started:.0f} s")
    return summaries


def _section(name: str, part: Part, summary: Summary, folder: Path) -> Section:
    reports: list[RunReport] = []
    for run in part.runs():
        page = write_explanations(run, run.path)
        report = read_run(run)
        reports.append(report if page is None else replace(report, answers_page=link(page, folder)))
    return Section(
        title=name,
        intro=part.intro,
        facts=(summary.changed, summary.cost, summary.gained),
        folded=True,
        reports=reports,
        tables=part.tables(),
        links={run.path.name: f"{run.path.relative_to(folder).as_posix()}/" for run in part.runs()},
    )
