"""`graftwork demo`: every method on data and models that come with the package, and one page about them."""

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

TITLE = "Graftwork demo"
INTRO = (
    "Every method on a small invented world and tiny models that were pretrained on it. Everything here was computed "
    "on this machine, by the code that a full-size run uses."
)

PARTS: Registry[type[Part]] = Registry(
    "part of the demonstration",
    {
        "topk": "graftwork.demo.parts.topk:TopKPart",
        "wt5": "graftwork.demo.parts.wt5:WT5Part",
        "sparsefinder": "graftwork.demo.parts.sparsefinder:SparsefinderPart",
        "cald": "graftwork.demo.parts.cald:CALDPart",
        "regrad": "graftwork.demo.parts.regrad:ReGradPart",
    },
)


def run_demo(output: str | Path, *, methods: Sequence[str] = (), quick: bool = False) -> dict[str, Summary]:
    """Write the world, run the demonstration of each method, and write `report.html`.

    Called again after a stop, it goes on where it was.

    Args:
        output: Folder for everything.
        methods: Whose demonstrations to run; all by default.
        quick: Two training steps and a handful of examples, only to see that everything runs.

    Returns:
        What each method's demonstration found.

    Raises:
        ConfigError: If a method has no demonstration.
        GraftworkError: If something that must hold by definition does not.
    """
    folder = Path(output)
    started = time.perf_counter()
    chosen = {name: PARTS.get(name) for name in methods or PARTS.names()}
    world = folder / "world"
    say(f"Writing the offline world to {world}")
    write_world(build_world(), world)
    summaries: dict[str, Summary] = {}
    sections = []
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
    reports = []
    for run in part.runs():
        page = write_explanations(run, run.path)
        report = read_run(run)
        reports.append(report if page is None else replace(report, answers_page=link(page, folder)))
    return Section(
        title=name,
        intro=part.intro,
        facts={"What it changed": summary.changed, "What it cost": summary.cost, "What it gained": summary.gained},
        reports=reports,
        tables=part.tables(),
        links={run.path.name: f"{run.path.relative_to(folder).as_posix()}/" for run in part.runs()},
    )
