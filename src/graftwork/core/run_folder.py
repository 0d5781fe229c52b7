"""The run folder: the only place that knows file names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graftwork.errors import ConfigError, IncompleteRunError

RUN_FILE = "run.yaml"
MANIFEST_FILE = "graftwork.json"
DETAILS_SUFFIX = ".details.jsonl"
"""Ending of the file, beside one of predictions, in which a method tells of each answer."""


class RunFolder:
    """The files of one run, the same for all methods.

    Args:
        path: The folder. It is made when something is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def run_file(self) -> Path:
        """The complete resolved configuration, versions, seed; `graftwork run` repeats it."""
        return self.path / RUN_FILE

    @property
    def conversion_file(self) -> Path:
        """Every changed module, and a probe of the converted model."""
        return self.path / "conversion.json"

    @property
    def model(self) -> Path:
        """Ordinary `save_pretrained` output and `graftwork.json`."""
        return self.path / "model"

    @property
    def artifacts(self) -> Path:
        """What phases collected."""
        return self.path / "artifacts"

    @property
    def predictions(self) -> Path:
        """Answers, one JSON-lines file for each task and setting."""
        return self.path / "predictions"

    @property
    def graphs(self) -> Path:
        """Curves, tables and pictures of attention graphs, and what of them belongs into the report."""
        return self.path / "graphs"

    @property
    def results_file(self) -> Path:
        """Scores and costs of every evaluation in this run."""
        return self.path / "results.json"

    @property
    def best_file(self) -> Path:
        """The best of all checkpoints that were evaluated, with its scores."""
        return self.path / "best.json"

    def report(self, extension: str) -> Path:
        """report.md or report.html."""
        return self.path / f"report.{extension}"

    def phase(self, name: str) -> Path:
        """log.jsonl, TensorBoard events and checkpoints of one phase."""
        return self.path / "train" / name

    @contextmanager
    def training(self) -> Iterator[None]:
        """Be the only one who trains here; a killed training gives the folder free at once.

        Raises:
            ConfigError: If another process trains here.
        """
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.path / "train.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"Another process is training in {self.path}. Wait until it has ended, or name another run folder."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def exists(self) -> bool:
        """Whether there is a run here, whole or half."""
        return self.run_file.exists() or self.conversion_file.exists() or self.model.exists()

    def require(self, file: Path, stage: str) -> Path:
        """`file`, if it is there.

        Raises:
            IncompleteRunError: If it is not; the message says which stage writes it.
        """
        if not file.exists():
            there = (
                ", ".join(sorted(item.name for item in self.path.iterdir())) if self.path.is_dir() else "no such folder"
            )
            raise IncompleteRunError(
                f"{self.path} holds no {file.relative_to(self.path)} (found: {there or 'nothing'}). "
                f"It is written by `graftwork {stage}`; run that first, or give another run folder."
            )
        return file


def is_run(path: str | Path) -> bool:
    """Whether a path is a run folder, rather than a model folder or a hub id."""
    folder = Path(path)
    return folder.is_dir() and ((folder / RUN_FILE).exists() or (folder / "conversion.json").exists())


EXTRAS_FILE = "report.json"
"""File in a folder of pictures that says which of them, and which tables, belong into the report of the run."""
