"""`graftwork demo`: runs every method on data and models that ship with the package and writes one report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from graftwork.core.files import read_json, write_json, write_text
from graftwork.core.messages import say
from graftwork.core.progress import Stages
from graftwork.core.registry import Registry
from graftwork.demo.offline import offline_world
from graftwork.demo.parts.part import Part, Scale, Summary
from graftwork.errors import ConfigError
from graftwork.reporting.explanations import write_explanations
from graftwork.reporting.method_overview import MethodNumbers, overview_of_methods
from graftwork.reporting.render import Section, link, read_run, to_html, to_markdown
from graftwork.reporting.report import RunReport
from graftwork.reporting.verdicts import sorted_by_verdict

TITLE = "Graftwork demo"
INTRO = (
    "Every method on a small invented world and tiny models pretrained on it. All results were computed on this "
    "machine by the same code as a full-size run; they show how the methods work, not how they rank."
)
NOTICES = {
    Scale.QUICK: "Smoke test (--quick): two training steps, a handful of examples. Its scores mean nothing.",
    Scale.SHORT: "Short demonstration: {shortened}. Run graftwork demo --full for all of it.",
    Scale.FULL: "",
}
"""Notice on the page by scale."""
OVERVIEW = (
    "Every number was measured on this machine, the graft beside the dense model. What was measured is named below for "
    "each method; the tasks differ, so methods cannot be compared with each other."
)
SCALE_FILE = "demo.json"

PARTS: Registry[type[Part]] = Registry(
    "part of the demonstration",
    {
        path.stem: f"graftwork.demo.parts.{path.stem}:PART"
        for path in Path(__file__).with_name("parts").glob("*.py")
        if path.stem not in ("__init__", "part")
    },
)
"""Demonstrations, found by the files of `demo.parts`; each module assigns its class to `PART`."""


def run_demo(
    output: str | Path, *, methods: Sequence[str] = (), quick: bool = False, full: bool = False
) -> dict[str, Summary]:
    """Write the world, run the demonstration of each method, and write `report.html`.

    An interrupted demonstration resumes when called again with the same folder.

    Args:
        output: Output folder.
        methods: Names of the methods to demonstrate; all by default.
        quick: Train for two steps on a handful of examples, as a smoke test.
        full: Train for the full number of steps with all settings, instead of a selection.

    Returns:
        Summary of each demonstration, by method.

    Raises:
        ConfigError: If a method has no demonstration, or the folder contains a demonstration of another scale.
        GraftworkError: If a result violates an identity of the method.
    """
    if quick and full:
        raise ConfigError("Found quick and full; expected at most one of them.")
    folder, scale = Path(output), Scale.QUICK if quick else Scale.FULL if full else Scale.SHORT
    started = time.perf_counter()
    parts = _parts(folder, methods, scale)
    _claim(folder, scale, parts)
    stages = [(name, stage) for name, part in parts.items() for stage in part.stages()]
    expected = sum(stage.seconds for _, stage in stages)
    say(f"Expected time: about {_duration(expected)} on two cores, for {len(stages)} stages in {folder}")
    offline_world(folder / "world")
    with Stages([stage.seconds for _, stage in stages]) as progress:
        for name, stage in stages:
            progress.start(f"{name}: {stage.description}")
            stage.run()
            progress.finish()
    page, summaries = write_demo_report(folder, parts, scale)
    say(f"Wrote {page} after {_duration(time.perf_counter() - started)}")
    return summaries


def write_demo_report(folder: Path, parts: Mapping[str, Part], scale: Scale) -> tuple[Path, dict[str, Summary]]:
    """Write `report.html` and `report.md` from the run folders of finished demonstrations.

    Args:
        folder: Output folder.
        parts: Finished demonstrations by method.
        scale: Amount of computation, which the page states.

    Returns:
        Path of the page, and the summary of each demonstration.
    """
    summaries = {name: part.summary() for name, part in parts.items()}
    numbers = {name: MethodNumbers(one.accuracy, one.time, one.memory) for name, one in summaries.items()}
    sections = [
        Section((), title="Overview", intro=OVERVIEW, overview=overview_of_methods(numbers)),
        *(_section(name, part, summaries[name], folder) for name, part in parts.items()),
    ]
    reports = [report for section in sections for report in section.reports]
    shortened = "; ".join(f"{name}: {part.shortened}" for name, part in parts.items())
    notice = NOTICES[scale].format(shortened=shortened)
    page = folder / "report.html"
    write_text(page, to_html(sections, title=TITLE, intro=INTRO, notice=notice))
    write_text(folder / "report.md", to_markdown(Section(reports)))
    return page, summaries


def _parts(folder: Path, methods: Sequence[str], scale: Scale) -> dict[str, Part]:
    chosen = {name: PARTS.get(name) for name in methods or PARTS.names()}
    return {name: part(folder / name, folder / "world", scale=scale) for name, part in chosen.items()}


def _claim(folder: Path, scale: Scale, parts: Mapping[str, Part]) -> None:
    """Record the scale of a folder; demonstrations of different scales cannot resume each other's runs."""
    file = folder / SCALE_FILE
    # demonstrations of earlier versions, which recorded no scale, were full ones
    earlier = any(part.folder.exists() for part in parts.values())
    found = read_json(file).get("scale") if file.exists() else Scale.FULL.value if earlier else scale.value
    if found != scale.value:
        raise ConfigError(
            f"Found a {found} demonstration in {folder}; expected a {scale.value} one. Give another folder with "
            "--output, or delete this one."
        )
    write_json(file, {"scale": scale.value})


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _section(name: str, part: Part, summary: Summary, folder: Path) -> Section:
    reports: list[RunReport] = []
    for run in part.runs():
        page = write_explanations(run, run.path)
        report = read_run(run)
        reports.append(report if page is None else replace(report, answers_page=link(page, folder)))
    return Section(
        title=name,
        intro=part.intro,
        verdicts=sorted_by_verdict(summary.comparisons),
        facts=(f"Changed: {summary.changed}", *summary.facts),
        folded=True,
        reports=reports,
        tables=part.tables(),
        links={run.path.name: f"{run.path.relative_to(folder).as_posix()}/" for run in part.runs()},
    )
