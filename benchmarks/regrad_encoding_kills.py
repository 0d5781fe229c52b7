"""Crash safety of encoding: a repeatedly killed encoder must produce the same bank as an uninterrupted one.

Kills the encoder at random moments, verifies all checksums after each kill, lets two concurrent encoders finish, and
compares the bank record by record with that of a single uninterrupted encoder.

    python benchmarks/regrad_encoding_kills.py --kills 20
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


def main() -> None:
    from graftwork.methods.regrad.bank.check import verify
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.bank.transfer import record_digests

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--passages", type=int, default=600)
    options.add_argument("--window", type=int, default=4, help="passages in one commit")
    options.add_argument("--longest", type=float, default=1.5, help="longest time until a kill in seconds")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    draw = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as root:
        folder, whole = Path(root) / "bank", Path(root) / "whole"
        words = [sys.executable, str(TESTS / "regrad_engine.py")]
        rest = [str(chosen.passages), str(chosen.window)]
        for number in range(chosen.kills):
            with subprocess.Popen([*words, str(folder), *rest], stdout=subprocess.PIPE, text=True) as process:
                if process.stdout is None or process.stdout.readline() != "ready\n":
                    raise SystemExit("the encoder did not start")
                time.sleep(draw.uniform(0, chosen.longest))
                process.send_signal(signal.SIGKILL)
                over = process.stdout.read() != ""
            with GradientBank(folder) as reader:
                if not verify(reader).whole:
                    raise SystemExit(f"kill {number + 1}: {verify(reader)}")
                print(f"kill {number + 1}: {len(reader)} passages, all whole{', finished before' * over}", flush=True)
        both = [subprocess.Popen([*words, str(folder), *rest]) for _ in range(2)]
        if any(process.wait() for process in both):
            raise SystemExit("an encoder failed")
        subprocess.run([*words, str(whole), *rest], check=True)
        with GradientBank(folder) as reader, GradientBank(whole) as expected:
            counted = reader.stats()["records"] == reader.stats()["ids"] == chosen.passages
            equal = counted and dict(record_digests(reader)) == dict(record_digests(expected))
        print(
            f"{chosen.kills} kills, {chosen.passages} passages: {'equal record for record' if equal else 'DIFFERENT'}"
        )
        raise SystemExit(not equal)


if __name__ == "__main__":
    main()
