"""What the benchmark scripts share: options, the table, and JSON."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graftwork.metrics.cost import Candidate, Cost, compare_costs

MEBIBYTE = 1 << 20


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every script has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--rounds", type=int, default=5, help="timed runs of each candidate, in turns")
    options.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    options.add_argument("--seed", type=int, default=42)
    options.add_argument("--only", nargs="+", help="candidates to measure beside the baseline; all by default")
    options.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return options


def prepare(options: argparse.Namespace) -> None:
    """Apply the options that are global to the process."""
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)


def random(*shape: int, options: argparse.Namespace, scale: float = 1.0) -> Tensor:
    """A Gaussian leaf on the device and in the type that was asked for."""
    dtype = getattr(torch, options.dtype)
    return (torch.randn(*shape, device=options.device) * scale).to(dtype).requires_grad_()


def checkpointed(forward: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], Tensor]:
    """The same computation under activation checkpointing."""
    return lambda: checkpoint(forward, *leaves, use_reentrant=False)


def selected(
    forwards: dict[str, Callable[[], Tensor]], baseline: str, options: argparse.Namespace
) -> dict[str, Callable[[], Tensor]]:
    """Candidates named by `--only`, and the baseline; all without the option."""
    if options.only is None:
        return forwards
    return {name: forward for name, forward in forwards.items() if name in (baseline, *options.only)}


def measure(
    forwards: dict[str, Callable[[], Tensor]],
    leaves: list[Tensor],
    baseline: str,
    options: argparse.Namespace,
    *,
    backward: bool,
    ignore: list[Tensor] | None = None,
) -> dict[str, Cost]:
    """Compare forward passes, with or without their backward pass."""
    candidates: dict[str, Candidate] = {}
    for name, forward in forwards.items():
        if backward:
            candidates[name] = Candidate(forward, torch.randn_like(forward().detach()), leaves)
        else:
            candidates[name] = Candidate(torch.no_grad()(forward))
    return compare_costs(candidates, baseline, rounds=options.rounds, ignore=ignore or [], device=options.device)


def processor_times(candidates: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1) -> dict[str, float]:
    """Median processor time of one call of every candidate, over rounds in which they take turns, after a warm-up.

    Unlike wall time, it does not count the time in which other processes had the cores.
    """
    found: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, call in candidates.items():
                start = time.process_time()
                for _ in range(repeats):
                    call()
                found[name].append((time.process_time() - start) / repeats)
    return {name: statistics.median(own[1:]) for name, own in found.items()}


class Report:
    """Rows of one script's results."""

    def __init__(self, title: str, options: argparse.Namespace, baseline: str) -> None:
        self.title, self.options, self.baseline = title, options, baseline
        self.rows: list[dict[str, object]] = []

    def add(self, setting: str, costs: dict[str, Cost]) -> None:
        """Add the candidates of one setting; shows progress on stderr."""
        for name, cost in costs.items():
            self.rows.append({"setting": setting, "candidate": name, **asdict(cost)})
            print(f"{setting}: {name} {cost.seconds:.4f} s", file=sys.stderr)

    def show(self) -> None:
        """Print everything to stdout."""
        machine = (
            f"{self.options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
        )
        if self.options.json:
            settings = {name: value for name, value in vars(self.options).items() if name != "json"}
            print(
                json.dumps({"title": self.title, "kind": "measured", "machine": machine, **settings, "rows": self.rows})
            )
            return
        table = Table(title=f"{self.title}\nmeasured on {machine}, {self.options.dtype}")
        for heading in ("setting", "candidate", "seconds", f"time / {self.baseline}", "saved MiB", "peak MiB"):
            table.add_column(heading, justify="left" if heading in ("setting", "candidate") else "right")
        last = None
        for row in self.rows:
            if last not in (None, row["setting"]):
                table.add_section()
            last = row["setting"]
            table.add_row(
                str(row["setting"]),
                str(row["candidate"]),
                f"{row['seconds']:.4f}",
                f"{row['time_ratio']:.2f}",
                f"{int(str(row['saved_bytes'])) / MEBIBYTE:.1f}",
                f"{int(str(row['peak_bytes'])) / MEBIBYTE:.1f}",
            )
        Console().print(table)
