"""Record the source lines that each test executes, to select the tests of a mutant."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest


class LineRecorder:
    """Pytest plugin. Lines executed at import belong to no test; subprocesses are not traced."""

    def __init__(self, root: Path, packages: list[str]):
        self.files = {
            str(path): str(path.relative_to(root))
            for package in packages
            for path in (root / "src" / "graftwork" / package).rglob("*.py")
        }
        self.tests: dict[str, dict[str, list[int]]] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: list[str] = []
        self._current: dict[str, set[int]] = defaultdict(set)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = self.files.get(frame.f_code.co_filename)
        if name is None:
            return None
        lines = self._current[name]

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return line

        lines.add(frame.f_lineno)
        return line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._current = defaultdict(set)
        threading.settrace(self._call)
        sys.settrace(self._call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # pyright: ignore[reportArgumentType]
            self.tests[item.nodeid] = {name: sorted(lines) for name, lines in self._current.items()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def record(self) -> dict[str, Any]:
        return {"tests": self.tests, "seconds": dict(self.seconds), "failed": self.failed}
