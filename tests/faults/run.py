"""Kill every writer at every commit point and at random moments, and compare the results with an uninterrupted run.

`python tests/faults/run.py [SCENARIO ...] [--moments N] [--seed N] [--processes N]`; used by `make faults`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import faulthandler
import gc
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

from faults.scenarios import RANDOM, SCENARIOS, CommandError, Scenario, graftwork
from faults.server import call, call_all
from graftwork.core import faults

MOMENTS = 20
"""Random moments for each scenario in `RANDOM`."""
COMMON = (
    "accelerate",
    "datasets",
    "graftwork.cli.verbs",
    "graftwork.methods.regrad.encoding.building",
    "graftwork.pipeline.diagnosis",
    "graftwork.tasks.wikitext",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "nltk.stem.porter",
    "peft",
    "pydantic.dataclasses",
    "pydantic.json_schema",
    "pydantic.main",
    "Stemmer",
    "sklearn.cluster",
    "torch.utils.tensorboard",
    "transformers.trainer",
)
"""Slow imports of the commands; tantivy and lance start threads, and are imported in the children only."""

Hit = tuple[str, str, int]
"""Name of a point, name of the file or folder, and which of its hits."""


def warm_up() -> None:
    """Import what the commands need."""
    import torch
    import transformers
    from PIL import Image

    from graftwork.cli.app import command_line
    from graftwork.methods import NAMES

    torch.set_num_threads(1)
    for name in COMMON:
        import_module(name)
    for name in NAMES.names():
        command_line(["convert", name, "model"])
    Image.init()
    # objects of the parent are not visited in children, which would copy their pages
    gc.freeze()
    for name in ("T5ForConditionalGeneration", "RobertaForMaskedLM", "LlamaForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)


def execute(scenario: Scenario, folder: Path, fault: str | None = None) -> None:
    """Run the command of a scenario, with a fault or without."""
    handler = None if fault is None else faults.Fault.parse(fault)
    with patched(scenario), faults.handled_by(handler):
        graftwork(folder, scenario.command)


def repeat(scenario: Scenario, folder: Path) -> None:
    """Run the command of a scenario again, as a user does after a kill."""
    try:
        execute(scenario, folder)
    except CommandError as error:
        if scenario.finished is None or scenario.finished not in str(error):
            raise


def patched(scenario: Scenario) -> Any:
    """Apply the patches of a scenario."""
    from contextlib import ExitStack

    stack = ExitStack()
    for path, value in scenario.patches.items():
        stack.enter_context(patch(path, value))
    return stack


def observe(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """Run a scenario to its end; return its results, its duration and the points that it reached."""
    hits: list[tuple[str, str]] = []
    started = time.monotonic()
    with patched(scenario), faults.handled_by(lambda name, path, values: hits.append((name, path.name))):
        graftwork(folder, scenario.command)
    return {"seconds": time.monotonic() - started, "hits": hits}


def moments_of(hits: list[list[str]], *, first: bool) -> Iterator[Hit]:
    """Last hit of each point on each name of a file or folder, and with `first` the first one too."""
    seen: dict[tuple[str, str], list[int]] = {}
    for point, name in hits:
        counted = seen.setdefault((point, name), [])
        counted.append(len(counted) + 1)
    for (point, name), numbers in seen.items():
        for number in sorted({numbers[0] if first else numbers[-1], numbers[-1]}):
            yield point, name, number


def trial(
    scenario: Scenario, base: Path, expected: Any, *, hit: Hit | None = None, seconds: float | None = None
) -> str | None:
    """Interrupt a scenario once and repeat its command.

    Args:
        scenario: The scenario.
        base: Folder with its inputs.
        expected: Results of an uninterrupted run.
        hit: Point that kills the process; None kills it after a time.
        seconds: That time.

    Returns:
        Difference to the results of an uninterrupted run; None if there is none.
    """
    with tempfile.TemporaryDirectory(dir=base.parent) as temporary:
        folder, result = Path(temporary) / "work", Path(temporary) / "result.json"
        shutil.copytree(base, folder, symlinks=True)
        fault = None if hit is None else f"{hit[0]}@{escaped(hit[1])}:kill:{hit[2]}"
        killed, _ = call(partial(execute, scenario, folder, fault), result, kill_after=seconds)
        if not killed and hit is not None:
            return "the process was not killed"
        call(partial(scenario.usable, folder), result)
        call(partial(repeat, scenario, folder), result)
        _, found = call(partial(scenario.read, folder), result)
        return None if found == expected else difference(expected, found)


def escaped(name: str) -> str:
    """Pattern for a name; colons and brackets have a meaning in faults."""
    return "".join("?" if letter in ":[]*@" else letter for letter in name)


def difference(expected: Any, found: Any, path: str = "") -> str:
    """First difference of two JSON values."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name) or (name in expected) != (name in found):
                return difference(expected.get(name), found.get(name), f"{path}/{name}")
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            if one != other:
                return difference(one, other, f"{path}[{number}]")
    return f"{path}: expected {str(expected)[:300]}, found {str(found)[:300]}"


def prepared(name: str, place: Path) -> tuple[Path, Any, dict[str, Any]]:
    """Inputs of a scenario, results of an uninterrupted run, and how it ran."""
    scenario, base, whole = SCENARIOS[name], place / name / "base", place / name / "whole"
    base.mkdir(parents=True)
    result = place / name / "result.json"
    call(partial(scenario.prepare, base), result)
    shutil.copytree(base, whole, symlinks=True)
    _, about = call(partial(observe, scenario, whole), result)
    _, expected = call(partial(scenario.read, whole), result)
    return base, expected, about


def trials(names: list[str], place: Path, moments: int, seed: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All interruptions of the scenarios."""
    for name in names:
        scenario = SCENARIOS[name]
        base, expected, about = prepared(name, place)
        for hit in moments_of(about["hits"], first=name in RANDOM):
            yield f"{name} {hit[0]}@{hit[1]}:{hit[2]}", partial(trial, scenario, base, expected, hit=hit)
        draw = random.Random(f"{seed} {name}")
        for _ in range(moments if name in RANDOM else 0):
            seconds = draw.uniform(0, about["seconds"])
            yield f"{name} after {seconds:.3f} s", partial(trial, scenario, base, expected, seconds=seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--moments", type=int, default=MOMENTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    if unknown := sorted(set(given.scenarios) - set(SCENARIOS)):
        parser.error(f"found {', '.join(unknown)}; expected {', '.join(SCENARIOS)}")
    faulthandler.enable()
    started = time.monotonic()
    warm_up()
    failed, count = 0, dict[str, int]()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        waiting = trials(given.scenarios, place, given.moments, given.seed)
        for name, problem, error in call_all(waiting, place, at_once=given.processes):
            count[name.split()[0]] = count.get(name.split()[0], 0) + 1
            if problem or error:
                failed += 1
                print(f"FAILED {name}\n  {problem or error}", flush=True)
    for name, number in count.items():
        print(f"{name}: {number} kills")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    print(
        f"{sum(count.values())} kills, {failed} failed; {time.monotonic() - started:.0f} s with {given.processes} "
        f"processes, {seconds:.0f} s of processor time"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
