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
    """Pytest plugin. Lines executed at import belong to no test; subprocesses are not traced.

    Lines are recorded as text, so that a record remains valid when the file changes elsewhere.
    """

    def __init__(self, root: Path, packages: list[str]):
        self.root = root
        self.files = {
            str(path): str(path.relative_to(root))
            for package in packages
            for path in (root / "src" / "graftwork" / package).rglob("*.py")
        }
        self.tests: dict[str, dict[str, set[int]]] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self._current: dict[str, set[int]] = defaultdict(set)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = self.files.get(frame.f_code.co_filename)
        if name is None:
            return None
        lines = self._current[name]

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return line

        return line(frame, event, argument)

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
            self.tests[item.nodeid] = dict(self._current)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def record(self) -> dict[str, dict[str, Any]]:
        """Test to its duration, True if it failed, and the text of the executed lines by file."""
        texts = {name: (self.root / name).read_text(encoding="utf-8").splitlines() for name in self.files.values()}
        return {
            test: {
                "seconds": self.seconds[test],
                "failed": test in self.failed,
                "lines": {
                    name: sorted({texts[name][number - 1].strip() for number in numbers})
                    for name, numbers in files.items()
                },
            }
            for test, files in self.tests.items()
        }
