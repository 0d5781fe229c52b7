"""Results as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftwork.core.config import build
from graftwork.core.files import DIGEST_KEY, read_json, write_text
from graftwork.core.readers import fields_of, join_inside, read_bytes, require
from graftwork.core.run_folder import EXTRAS_FILE, RunFolder
from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.metrics.results import LM_EVAL, PairedRow, ResultRow
from graftwork.reporting.curves import Curve, read_curves
from graftwork.reporting.eraser import write_eraser_results
from graftwork.reporting.explanations import highlights, write_explanations
from graftwork.reporting.overview import Overview, names_of, overview_of
from graftwork.reporting.pages import render
from graftwork.reporting.picture import Line, Picture, check_svg
from graftwork.reporting.plots import plots_of, training_plots_of
from graftwork.reporting.report import Cell, RunReport, ScoreTable, Table
from graftwork.reporting.selection import current_results, unevaluated_results
from graftwork.reporting.verdicts import Comparison, Verdict
from graftwork.settings.recipe import Published
from graftwork.settings.recipe import read_run as read_config


@dataclass(frozen=True)
class Section:
    """Group of runs on a page, with introduction, findings and tables."""

    reports: Sequence[RunReport]
    title: str = ""
    """Heading above the runs; empty for no heading."""
    intro: str = ""
    verdicts: Mapping[Verdict, Sequence[Comparison]] = field(default_factory=dict[Verdict, Sequence[Comparison]])
    """Comparisons with the dense model, sorted into gains, costs and unclear ones."""
    facts: Sequence[str] = ()
    """Further short findings."""
    folded: bool = False
    """True folds tables and runs, which are then details of the findings."""
    tables: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict[str, Sequence[Mapping[str, str]]])
    """Further tables by title, above the runs; all rows of a table have the same keys."""
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    """Relative link of each run folder by name."""
    overview: Overview = field(default_factory=Overview)
    """Combined tables and plots of all runs, above them."""


def write_report(runs: Sequence[RunFolder], *, formats: Sequence[str], output: Path | None) -> list[Path]:
    """Write report.md and report.html, and with the format "eraser" the files for ERASER's scorer.

    Args:
        runs: Run folders to report.
        formats: "md", "html" and "eraser".
        output: Folder for the report; None writes to the first run folder.

    Raises:
        ConfigError: If a format is unknown, no run is given, or "eraser" finds no spans of ERASER documents.
        IncompleteRunError: If a run has neither results nor a training.
    """
    if unknown := sorted(set(formats) - {"md", "html", "eraser"}):
        raise ConfigError(f"Found the format {', '.join(unknown)}. Expected md, html or eraser.")
    if not runs:
        raise ConfigError("Found no run to report. Give at least one run folder.")
    names = names_of([run.path for run in runs])
    reports = [replace(read_run(run), name=name) for run, name in zip(runs, names, strict=True)]
    target = output or runs[0].path
    pages: list[Path] = []
    if "html" in formats:
        for number, run in enumerate(runs):
            page = write_explanations(run, run.path if output is None else output / names[number])
            if page is not None:
                pages.append(page)
                reports[number] = replace(reports[number], answers_page=link(page, target))
    written: list[Path] = []
    if "eraser" in formats:
        places = [
            (run, (run.path if output is None else output / name) / "eraser")
            for run, name in zip(runs, names, strict=True)
        ]
        files = [file for run, place in places for file in write_eraser_results(run, place)]
        pages += files
        if not files:
            raise ConfigError(
                "Found no spans of ERASER's documents in these runs. Evaluate a task of Movies or MultiRC first."
            )
    for extension in [name for name in formats if name != "eraser"]:
        path = target / f"report.{extension}"
        section = Section(reports, overview=overview_of(reports))
        write_text(path, to_markdown(section) if extension == "md" else to_html([section]))
        written.append(path)
    return [*written, *pages]


def link(path: Path, page_folder: Path) -> str:
    """Return the relative link from a page's folder to a file."""
    return Path(os.path.relpath(path, page_folder)).as_posix()


def read_run(run: RunFolder) -> RunReport:
    """Read the report of one run folder.

    Raises:
        IncompleteRunError: If the run has neither results nor a training, or no results of its current weights.
        CheckpointMismatchError: If the results, or a file of the run's model, have changed since they were written.
    """
    config = read_config(run) if run.run_file.exists() else None
    notice = ""
    if run.results_file.exists():
        results = current_results(run)
        results = replace(results, curves=_with_logs(results.curves, run))
    else:
        model, method = ("", None) if config is None else (config.model, (config.method or {}).get("name"))
        results = unevaluated_results(run, model, method)
        notice = f"Trained, not evaluated yet: `graftwork evaluate {run.path.name}` measures the scores."
    published = config.published if config is not None else ()
    changes = 0
    if run.conversion_file.exists():
        with fields_of(str(run.conversion_file), "a list of changes", error=CheckpointMismatchError):
            changes = len(read_json(run.conversion_file)["changes"])
    extra = read_extras(run.graphs)
    return RunReport(
        run.path.name or str(run.path),
        results,
        config,
        score_table(results.rows, published),
        {**plots_of(results), **extra.pictures},
        training_plots_of(results),
        max([changes, *results.changes.values()]),
        (*paired_tables(results.comparisons), *extra.tables),
        extra.wide,
        highlights(run),
        notice=notice,
    )


def _with_logs(recorded: Mapping[str, Mapping[str, Curve]], run: RunFolder) -> Mapping[str, Mapping[str, Curve]]:
    """Return the recorded curves, with those of the run's own log; results of earlier versions lack training curves."""
    own = read_curves(run)
    if not own:
        return recorded
    label = next(iter(recorded)) if len(recorded) == 1 else "training"
    return {**recorded, label: {**recorded.get(label, {}), **own}}


@dataclass(frozen=True)
class Extras:
    """Plots and tables that commands other than `evaluate` wrote for the report."""

    pictures: Mapping[str, Picture] = field(default_factory=dict[str, Picture])
    tables: tuple[Table, ...] = ()
    wide: frozenset[str] = frozenset()


def read_extras(folder: Path) -> Extras:
    """Read the plots and tables in a folder.

    Raises:
        CheckpointMismatchError: If their list or a plot has changed since it was written.
    """
    file = folder / EXTRAS_FILE
    if not file.exists():
        return Extras()
    listed = read_json(file)
    pictures: dict[str, Picture] = {}
    wide: set[str] = set()
    with fields_of(str(file), "pictures with file, title and wide, and tables", error=CheckpointMismatchError):
        for entry in listed["pictures"]:
            title = str(require(entry, "title", str, str(file)))
            path = join_inside(folder, entry["file"], str(file))
            if path.is_file():
                svg = check_svg(entry.get("svg", ""), str(file))
                lines = tuple(build(Line, line, where=str(file)) for line in entry.get("lines", ()))
                pictures[title] = Picture(read_bytes(path), svg, lines)
                _check_picture(path, pictures[title].png, entry.get(DIGEST_KEY))
                wide |= {title} if require(entry, "wide", bool, str(file)) else set()
        tables = tuple(Table(**table) for table in listed["tables"])
    return Extras(pictures, tables, frozenset(wide))


def _check_picture(path: Path, content: bytes, recorded: str | None) -> None:
    if recorded is not None and hashlib.sha256(content).hexdigest() != recorded:
        raise CheckpointMismatchError(
            f"{path} has changed since it was written; its SHA-256 differs. Run the command that wrote it again."
        )


def score_table(rows: Sequence[ResultRow], published: Sequence[Published] = ()) -> ScoreTable:
    """Build the table of scores: one row per setting, one column per task and metric, averaged over seeds."""
    columns = list(dict.fromkeys((row.task, metric) for row in rows for metric in row.scores))
    labels = list(dict.fromkeys(row.label for row in rows))
    table: list[tuple[str, tuple[Cell, ...]]] = []
    for name in labels:
        own = [row for row in rows if row.label == name]
        table.append((name, tuple(_cell(own, task, metric, published) for task, metric in columns)))
    return ScoreTable(tuple(f"{task} {metric}" for task, metric in columns), tuple(table))


def _cell(rows: Sequence[ResultRow], task: str, metric: str, published: Sequence[Published]) -> Cell:
    values = [row.scores[metric] for row in rows if row.task == task and metric in row.scores]
    entry = next(
        (
            number
            for number in published
            if number.task == task and number.metric == metric and rows and _belongs(number, rows[0])
        ),
        None,
    )
    mean = sum(values) / len(values) if values else None
    return Cell(
        value=mean,
        spread=(max(values) - min(values)) / 2 if len(values) > 1 else None,
        published=None if entry is None else entry.value,
        reproduced=None if entry is None or mean is None else abs(mean - entry.value) <= entry.tolerance,
        share=task.startswith(LM_EVAL),
    )


def _belongs(number: Published, row: ResultRow) -> bool:
    return all(row.settings.get(key, "absent") == value for key, value in number.at.items())


def paired_tables(rows: Sequence[PairedRow]) -> tuple[Table, ...]:
    """Build the table of paired comparisons; none if there are no comparisons."""
    if not rows:
        return ()
    columns = ("task", "score", "better", "setting", "value", "baseline", "difference", "95 % interval", "p", "n")
    note = "Differences of the same documents. Interval and p-value are those of a paired bootstrap over documents."
    directions = {True: "higher", False: "lower", None: "–"}
    cells = [
        (
            row.task,
            row.metric,
            directions[row.higher_is_better],
            row.label,
            f"{row.value:.4g}",
            f"{row.baseline}: {row.reference:.4g}",
            f"{row.difference:+.4g}",
            "–" if row.low is None or row.high is None else f"{row.low:+.4g} to {row.high:+.4g}",
            "–" if row.p_value is None else f"{row.p_value:.3f}",
            str(row.size),
        )
        for row in rows
    ]
    return (Table("Tasks of lm-eval beside the dense model", columns, cells, note),)


def to_markdown(section: Section) -> str:
    """Render the tables of all runs as Markdown."""
    lines = ["# Graftwork report", ""]
    for title, rows in section.overview.tables.items():
        lines += [f"{title}:", "", *_markdown_table(list(rows[0]), [list(row.values()) for row in rows]), ""]
    for run in section.reports:
        lines += [f"## {run.name}", ""]
        method = run.results.method or "none"
        lines += [f"Model `{run.model_name}`, method `{method}`, {run.changes} modules changed.", ""]
        if run.notice:
            lines += [run.notice, ""]
        scores = [[name, *_cells(cells)] for name, cells in run.table.rows]
        lines += _markdown_table(["setting", *run.table.columns], scores) if scores else []
        lines += [f"\n{note}" for note in run.notes]
        if run.results.cost:
            lines += ["", "Cost against length, measured:", ""]
            lines += _markdown_table(
                ["setting", "tokens", "forward s", "forward + backward s", "saved MiB", "peak MiB", "device"],
                [
                    [
                        row.label,
                        str(row.length),
                        "–" if row.forward_seconds is None else f"{row.forward_seconds:.4f}",
                        f"{row.seconds:.4f}",
                        f"{row.saved_bytes / 2**20:.2f}",
                        "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
                        row.device,
                    ]
                    for row in run.results.cost
                ],
            )
        for table in run.tables:
            lines += ["", f"{table.title}:", "", *_markdown_table(table.columns, table.rows)]
            lines += ["", table.note] if table.note else []
        if run.results.training:
            table = run.training
            lines += ["", "Training:", "", *_markdown_table(table.columns, table.rows)]
        lines.append("")
    return "\n".join(lines)


def _cells(cells: Sequence[Cell]) -> list[str]:
    return [f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in cells]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *(line(row) for row in rows)]


def to_html(sections: Sequence[Section], title: str = "Graftwork report", intro: str = "", *, notice: str = "") -> str:
    """Render one self-contained page with tables, plots and samples; it needs neither other files nor a network.

    Args:
        sections: Groups of runs.
        title: Title of the page.
        intro: Introduction below the title.
        notice: Warning below the introduction, such as that of a smoke test.
    """
    return render("report.html", sections=sections, title=title, intro=intro, notice=notice)


def report(
    runs: str | Path | Sequence[str | Path],
    *,
    formats: Sequence[str] = ("md", "html"),
    output: Path | None = None,
) -> list[Path]:
    """Write the report of runs as Markdown and as one self-contained HTML page.

    Args:
        runs: A run folder, or several to show in one report.
        formats: "md", "html" and "eraser".
        output: Folder for the report; None writes to the first run folder.

    Returns:
        The files written.

    Raises:
        IncompleteRunError: If a run has neither results nor a training.
    """
    folders = [runs] if isinstance(runs, (str, Path)) else runs
    return write_report([RunFolder(run) for run in folders], formats=formats, output=output)
