"""Crash safety of appending: a repeatedly killed writer must produce the same bank as an uninterrupted one.

Kills the writer at random moments, verifies after each kill that every acknowledged passage exists and every checksum
matches, lets the writer finish, and compares the banks record by record.

    python benchmarks/regrad_bank_kills.py --kills 20
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))


def main() -> None:
    from bank_writer import gradient, open_bank
    from graftwork.methods.regrad.bank.check import verify
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.bank.transfer import record_digests

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--gradients", type=int, default=2000)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--longest", type=float, default=1.5, help="longest time until a kill in seconds")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    draw = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "bank"
        open_bank(folder)
        command = [sys.executable, str(TESTS / "bank_writer.py"), str(folder), "0", str(chosen.gradients)]
        for number in range(chosen.kills):
            process = subprocess.Popen([*command, str(chosen.batch)], stdout=subprocess.PIPE, text=True)
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise SystemExit("the writer did not start")
            time.sleep(draw.uniform(0, chosen.longest))
            process.send_signal(signal.SIGKILL)
            acknowledged = [int(line) for line in process.stdout.read().splitlines()]
            process.wait()
            with GradientBank(folder) as reader:
                safe = reader.contains(f"p{at}" for at in range(acknowledged[-1] + 1)) if acknowledged else {}
                found = verify(reader)
                if not found.whole or not all(safe.values()):
                    raise SystemExit(f"kill {number + 1}: {found}")
                print(f"kill {number + 1}: {len(reader)} passages, all whole", flush=True)
        subprocess.run([*command, "100"], check=True, stdout=subprocess.DEVNULL)
        whole = open_bank(Path(root) / "whole")
        for first in range(0, chosen.gradients, 100):
            whole.append([gradient(at) for at in range(first, min(first + 100, chosen.gradients))])
        with GradientBank(folder) as reader:
            equal = dict(record_digests(reader)) == dict(record_digests(whole))
        print(
            f"{chosen.kills} kills, {chosen.gradients} gradients: "
            + ("equal record for record" if equal else "DIFFERENT")
        )
        raise SystemExit(not equal)


if __name__ == "__main__":
    main()
