"""Layout of the run folder: the only module that defines its file names."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from graftwork.core import systems
from graftwork.core.commits import COMMIT, complete, writing
from graftwork.core.locks import locked
from graftwork.errors import IncompleteRunError

RUN_FILE = "run.yaml"
MANIFEST_FILE = "graftwork.json"
MODEL_FOLDER = "model"
DETAILS_SUFFIX = ".details.jsonl"
"""Suffix of the file next to a prediction file that holds a method's own record of each answer."""


class RunFolder:
    """Paths of the files of one run, identical for all methods.

    Args:
        path: Run folder; created on the first write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def run_file(self) -> Path:
        """Resolved configuration, versions and seed; `graftwork run` repeats the run from it."""
        return self.path / RUN_FILE

    @property
    def conversion_file(self) -> Path:
        """Changed modules, and a probe of the converted model."""
        return self.path / "conversion.json"

    @property
    def model(self) -> Path:
        """Output of `save_pretrained`, and the manifest `graftwork.json`."""
        return self.path / MODEL_FOLDER

    @property
    def adapter(self) -> Path:
        """Adapter folder of PEFT that a training with `lora_adapter` writes."""
        return self.path / "adapter"

    @property
    def artifacts(self) -> Path:
        """Artifacts of training phases: centroids, gradient bank, index."""
        return self.path / "artifacts"

    @property
    def predictions(self) -> Path:
        """Predictions: one JSON-lines file per task and setting."""
        return self.path / "predictions"

    @property
    def graphs(self) -> Path:
        """Curves, tables and figures of attention graphs, and the list of those shown in the report."""
        return self.path / "graphs"

    @property
    def results_file(self) -> Path:
        """Scores and costs of all evaluations of this run."""
        return self.path / "results.json"

    @property
    def best_file(self) -> Path:
        """Best evaluated checkpoint, with its scores."""
        return self.path / "best.json"

    def report(self, extension: str) -> Path:
        """Path of report.md or report.html."""
        return self.path / f"report.{extension}"

    def phase(self, name: str) -> Path:
        """Folder with log.jsonl, TensorBoard events and checkpoints of one phase."""
        return self.path / "train" / name

    def derived(self) -> list[str]:
        """Names of what the run contains besides a converted model: training, results and what depends on them."""
        folders = ("train", "adapter", "artifacts", "predictions", "graphs")
        names = (*folders, "results.json", "best.json", "report.md", "report.html")
        return [name for name in names if (self.path / name).exists()]

    @contextmanager
    def training(self) -> Generator[None, None, None]:
        """Hold the lock of the writers of `model/`: conversion and training.

        Raises:
            ConfigError: If another process holds the lock.
        """
        busy = f"Another process is training in {self.path}. Wait until it has ended, or name another run folder."
        with locked(self.path / "train.lock", busy):
            yield

    @contextmanager
    def writing(self) -> Generator[None, None, None]:
        """Hold the lock for an update of `run.yaml`, `results.json` or `best.json`.

        Raises:
            ConfigError: If another process does not release the lock in time.
        """
        with writing(self.path):
            yield

    def exists(self) -> bool:
        """True if the folder holds a run, complete or not."""
        return self.run_file.exists() or self.conversion_file.exists() or self.model.exists()

    def require(self, file: Path, stage: str) -> Path:
        """Return `file` if it exists.

        Raises:
            IncompleteRunError: If it does not; the message names the stage that writes it.
        """
        complete(self.path)
        if not file.exists():
            is_folder = self.path.is_dir()
            present = ", ".join(sorted(item.name for item in self.path.iterdir())) if is_folder else "no such folder"
            raise IncompleteRunError(
                f"{self.path} holds no {file.relative_to(self.path)} (found: {present or 'nothing'}). "
                f"It is written by `graftwork {stage}`; run that first, or give another run folder."
                f"{'' if is_folder else similar_folders(self.path)}"
            )
        return file


def task_file(task: str, name: str) -> str:
    """File name of the predictions for one task and setting, below `predictions/`."""
    file = f"{task.removesuffix('.jsonl').strip('/').replace('..', '_')}.{name.replace('/', '_')}.jsonl"
    # characters that Windows refuses, such as the colon in feed_forward_k=0:64
    return re.sub(r'[\\<>:"|?*]', "_", file) if systems.WINDOWS else file


def is_run(path: str | Path) -> bool:
    """True if a path is a run folder, not a model folder or a hub id."""
    folder = Path(path)
    return folder.is_dir() and any((folder / name).exists() for name in (RUN_FILE, "conversion.json", COMMIT))


def is_path(name: str) -> bool:
    """True if a model's name cannot be a hub id: `user/model` is one unless `user` is a folder here."""
    if name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or ":" in name:
        return True
    first, _, rest = name.partition("/")
    return "/" in rest or (bool(rest) and Path(first).is_dir())


def absolute(path: str | Path) -> str:
    """Path that is valid from every folder; a hub id is returned unchanged."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


def similar_folders(path: str | Path) -> str:
    """Hint for a folder that does not exist: a similar path that exists, or the runs and models beside it.

    Returns:
        A sentence after a space; empty if nothing is similar.
    """
    asked = Path(path).expanduser()
    start = Path(asked.anchor) if asked.is_absolute() else Path()
    similar = [start]
    for part in asked.relative_to(asked.anchor).parts:
        similar = [folder / name for folder in similar for name in get_close_matches(part, _folders(folder))]
    if found := get_close_matches(str(asked), [str(folder) for folder in similar], n=1, cutoff=0):
        return f" Did you mean {found[0]}?"
    beside = asked.parent
    models = [name for name in _folders(beside) if is_run(beside / name) or (beside / name / "config.json").exists()]
    if not models or beside == start:
        return ""
    return (
        f" Runs and models in {beside}: {', '.join(models[:SUGGESTIONS])}{', …' if len(models) > SUGGESTIONS else ''}."
    )


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


SUGGESTIONS = 5
"""Number of runs that the error about a missing folder names."""
EXTRAS_FILE = "report.json"
"""File in a folder of figures that lists the figures and tables shown in the report of the run."""
