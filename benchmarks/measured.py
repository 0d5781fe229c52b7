"""Repeat the benchmarks whose ratios depend on the machine, and add the ratios to docs/measured.json.

Runs with one and with two threads alternate, so that other load of the machine affects both. The README and the cards
show the smallest and the largest ratio; `python docs/generate.py` renders them.

    python benchmarks/measured.py --runs 3 --threads 1 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "docs" / "measured.json"


def ratios(figure: Mapping[str, Any], threads: int, rounds: int) -> float:
    """Run the benchmark of a figure once, and return the time of the candidate relative to the baseline."""
    words = [*figure["arguments"].split(), "--only", figure["candidate"], "--rounds", str(rounds)]
    script = Path(__file__).with_name(figure["script"])
    done = subprocess.run(
        [sys.executable, str(script), *words, "--threads", str(threads), "--json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    (row,) = (row for row in json.loads(done.stdout)["rows"] if row["candidate"] == figure["candidate"])
    return round(float(row["time_ratio"]), 3)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=3, help="processes for each figure and number of threads")
    options.add_argument("--rounds", type=int, default=3, help="timed calls in a process; their median counts")
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--figure", nargs="+", help="ids of figures in the file; all with a script by default")
    chosen = options.parse_args()
    whole = json.loads(FILE.read_text(encoding="utf-8"))
    figures = {
        one["id"]: one for one in whole["figures"] if "script" in one and one["id"] in (chosen.figure or [one["id"]])
    }
    for _ in range(chosen.runs):
        for name, figure in figures.items():
            for threads in chosen.threads:
                found = ratios(figure, threads, chosen.rounds)
                print(f"{name}, {threads} threads: {found}", file=sys.stderr, flush=True)
                figure["ratios"].setdefault(str(threads), []).append(found)
                FILE.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
