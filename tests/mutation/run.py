"""Mutation testing with a sample: change one place of the source and check that a test of that line fails.

    python tests/mutation/run.py [--sample 81] [--seed 0] [--packages core …] [--only SUBSTRING] [--survivors]

Mutants come from Cosmic Ray. The tests of a mutant are those that execute the mutated line: from the mirror of the
package first, then the fastest and most specific, up to `--budget` seconds. Everything runs in a temporary copy of the
repository. Results are written to `build/mutation/`. `survivors.yaml` lists accepted survivors with a reason each.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from lines import LineRecorder
from mutants import Mutant, draw, mutants

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "mutation"
ACCEPTED = Path(__file__).with_name("survivors.yaml")
PACKAGES = ["core", "settings", "tasks", "training", "evaluation", "pipeline", "reporting", "retrieval", "grafting"]
TESTS = [
    *PACKAGES,
    "cli",
    "test_chaining.py",
    "contract/test_conversion.py",
    "methods/sparsefinder/test_pipeline.py",
    "methods/wt5/test_*.py",
]
"""Files and folders of tests that may be selected: the mirror of the packages, and tests of their interplay."""
# imported once before forking; importing them takes longer than most tests
PRELOADED = ["torch", "transformers", "transformers.trainer", "datasets", "accelerate", "peft", "matplotlib.pyplot"]
GOAL = 0.85
CPU_LIMIT = 30
"""CPU seconds for the tests of a mutant, in addition to five times their usual duration."""
WALL_LIMIT = 600
"""Seconds for the tests of a mutant that waits without using the CPU."""


def copy_of_repository(folder: Path) -> Path:
    """Copy of all files that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    copy = folder / "repository"
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def in_child(work: Callable[[], int], log: Path, cpu_seconds: float | None = None) -> int | None:
    """Exit status of `work` in a forked process group; `None` after `cpu_seconds` of CPU time or `WALL_LIMIT`.

    CPU time, because other programs on the machine do not change it.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            if cpu_seconds is not None:
                used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
                resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + cpu_seconds),) * 2)
            with log.open("wb") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            status = int(work())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + (math.inf if cpu_seconds is None else WALL_LIMIT)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_pytest(copy: Path, arguments: list[str], plugin: LineRecorder | None = None) -> int:
    os.chdir(copy)
    sys.path.insert(0, str(copy / "src"))
    # plugins of pytest may have been imported by the parent
    ignored = "ignore::pytest.PytestAssertRewriteWarning"
    options = ["-q", "-m", "not long", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", ignored, *arguments]
    return int(pytest.main(options, plugins=[plugin] if plugin else []))


def recorded_lines(copy: Path, folders: list[str]) -> dict[str, dict[str, Any]]:
    """Test to the lines that it executes and its seconds; only new and changed test files are recorded again."""
    stored = OUTPUT / "lines.json"
    tests: dict[str, dict[str, Any]] = json.loads(stored.read_text()) if stored.is_file() else {}
    files = [path for one in folders for path in sorted((copy / "tests").glob(one))]
    files = [path for one in files for path in (sorted(one.rglob("test_*.py")) if one.is_dir() else [one])]
    digests = {str(path.relative_to(copy)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}
    tests = {name: one for name, one in tests.items() if digests.get(name.partition("::")[0]) == one["digest"]}
    missing = sorted(digests.keys() - {name.partition("::")[0] for name in tests})

    def record() -> int:
        recorder = LineRecorder(copy, PACKAGES)
        run_pytest(copy, missing, recorder)
        found = {name: {**one, "digest": digests[name.partition("::")[0]]} for name, one in recorder.record().items()}
        stored.write_text(json.dumps({**tests, **found}))
        return 0

    if missing:
        print(f"recording the lines that the tests of {len(missing)} files execute …", flush=True)
        if in_child(record, OUTPUT / "lines.log") != 0:
            sys.exit(f"recording failed; see {OUTPUT / 'lines.log'}")
    return json.loads(stored.read_text())


def select(mutant: Mutant, source: str, tests: dict[str, dict[str, Any]], budget: float) -> list[str]:
    """Tests that execute the mutated statement; for code executed at import, those of the file and of the package."""
    first, last = mutant.lines
    statement = {line.strip() for line in source.splitlines()[first - 1 : last]}
    mirror = f"tests/{mutant.package}/"

    def concerned(name: str) -> bool:
        executed = tests[name]["lines"].get(mutant.path, [])
        return not statement.isdisjoint(executed) if mutant.function else bool(executed) or name.startswith(mirror)

    found = [name for name, one in tests.items() if not one["failed"] and concerned(name)]

    def distance(name: str) -> tuple[bool, float, int]:
        return not name.startswith(mirror), tests[name]["seconds"] // 2, sum(map(len, tests[name]["lines"].values()))

    chosen, total = [], 0.0
    for name in sorted(found, key=distance):
        if not chosen or total + tests[name]["seconds"] <= budget:
            chosen.append(name)
            total += tests[name]["seconds"]
    return chosen


def outcome_of(mutant: Mutant, copy: Path, tests: list[str], seconds: float) -> str:
    if not tests:
        return "no test"
    file = copy / mutant.path
    source = file.read_text(encoding="utf-8")
    file.write_text(mutant.code(source) or source, encoding="utf-8")
    log = OUTPUT / "last.log"
    try:
        status = in_child(lambda: run_pytest(copy, ["-x", *tests]), log, CPU_LIMIT + 5 * seconds)
    finally:
        file.write_text(source, encoding="utf-8")
    if status in (4, 5) and in_child(lambda: run_pytest(copy, ["-x", *tests]), log) != 0:
        sys.exit(f"The recorded tests of {mutant.path} cannot be run; remove {OUTPUT / 'lines.json'}. See {log}.")
    return "survived" if status == 0 else "timeout" if status is None else "killed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=81, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", nargs="+", default=PACKAGES, choices=PACKAGES)
    parser.add_argument("--tests", nargs="+", default=TESTS, help="folders under tests/ to select from")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of tests per mutant")
    parser.add_argument("--only", help="only mutants whose path contains this text")
    parser.add_argument("--survivors", action="store_true", help="keep the mutants that the previous run killed")
    given = parser.parse_args()

    OUTPUT.mkdir(parents=True, exist_ok=True)
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    os.environ.setdefault("GRAFTWORK_SHARED", str(ROOT.parent / "shared"))
    results_file = OUTPUT / "results.json"
    previous = json.loads(results_file.read_text()) if results_file.is_file() else []
    files = [path for one in given.packages for path in sorted((ROOT / "src" / "graftwork" / one).rglob("*.py"))]
    population = [one for path in files for one in mutants(path, ROOT)]
    print(f"{len(population)} mutants in {len(files)} files", flush=True)
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    # some operators produce code that does not parse or equals the original; those places are drawn again
    drawn = [one for one in draw(population, 2 * given.sample, given.seed) if one.code(sources[one.path])]
    drawn = draw(drawn, given.sample, given.seed)
    accepted = {(one["path"], *one["change"]): one["reason"] for one in yaml.safe_load(ACCEPTED.read_text()) or []}
    if given.only:
        drawn = [one for one in drawn if given.only in one.path]

    for name in PRELOADED:
        importlib.import_module(name)
    results = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = copy_of_repository(Path(folder).resolve())
        os.environ["PYTHONPATH"] = str(copy / "src")
        recorded = recorded_lines(copy, given.tests)
        for number, mutant in enumerate(drawn, start=1):
            change = mutant.change(sources[mutant.path])
            known = [one for one in previous if [one["path"], *one["change"]] == [mutant.path, *change]]
            if given.survivors and known and known[0]["outcome"] == "killed":
                results.append(known[0])
                continue
            tests = select(mutant, sources[mutant.path], recorded, given.budget)
            start = time.monotonic()
            outcome = outcome_of(mutant, copy, tests, sum(recorded[one]["seconds"] for one in tests))
            where = f"{mutant.path}:{mutant.line} {mutant.function}"
            print(f"{number}/{len(drawn)} {outcome:8} {time.monotonic() - start:5.1f} s {where}", flush=True)
            results.append(
                {
                    "path": mutant.path,
                    "line": mutant.line,
                    "function": mutant.function,
                    "operator": mutant.kind,
                    "change": change,
                    "outcome": outcome,
                    "tests": tests,
                }
            )
            # an interrupted run keeps what the previous one found for the mutants that follow
            done = {(one["path"], *one["change"]) for one in results}
            rest = [one for one in previous if (one["path"], *one["change"]) not in done]
            results_file.write_text(json.dumps([*results, *rest], indent=1))
    results_file.write_text(json.dumps(results, indent=1))
    sys.exit(report(results, accepted))


def report(results: list[dict[str, Any]], accepted: dict[tuple[str, ...], str]) -> int:
    """Print the score per package and the survivors; 1 if the score is below the goal or a survivor has no reason."""
    survived = [one for one in results if one["outcome"] in ("survived", "no test")]
    total = Counter(Path(one["path"]).parts[2] for one in results)
    missed = Counter(Path(one["path"]).parts[2] for one in survived)
    for package, count in total.items():
        print(f"{package:12} {count - missed[package]}/{count}")
    unexplained = 0
    for one in survived:
        reason = accepted.get((one["path"], *one["change"]))
        unexplained += reason is None
        print(f"\n{one['path']}:{one['line']} {one['function']} ({one['outcome']}, {len(one['tests'])} tests)")
        print(f"  - {one['change'][0]}\n  + {one['change'][1]}\n  {reason or 'NO REASON in survivors.yaml'}")
    score = 1 - len(survived) / max(1, len(results))
    print(f"\n{len(results) - len(survived)} of {len(results)} mutants killed: {score:.0%} (goal {GOAL:.0%})")
    return int(score < GOAL or unexplained > 0)


if __name__ == "__main__":
    main()
