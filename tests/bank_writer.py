"""Writer of a gradient bank in a separate process that tests can kill: `python bank_writer.py BANK FIRST END BATCH`.

Prints the last passage of each batch after its commit. The gradient of a passage depends on its number only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from graftwork.methods.regrad.bank.files import holds_bank
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.layout import Layout
from graftwork.methods.regrad.bank.records import Gradient

LAYOUT = Layout.of([("a", (4, 64)), ("b", (16, 16))])
FINGERPRINT = {"model": "tiny", "tokenizer": "t", "document_template": "{text}", "max_tokens": "128"}


def gradient(number: int) -> Gradient:
    values = np.random.default_rng(number).normal(size=LAYOUT.size).astype(np.float32) * 1e-3
    return Gradient(f"p{number}", f"text {number}", values, tokens=10 + number, loss=1.5)


def open_bank(location: str | Path, precision: str = "bfloat16") -> GradientBank:
    if not holds_bank(location):
        return GradientBank.create(location, fingerprint=FINGERPRINT, layout=LAYOUT, precision=precision)
    return GradientBank(location, "a")


def main() -> None:
    location, (first, end, batch) = sys.argv[1], map(int, sys.argv[2:5])
    bank = open_bank(location)
    print("ready", flush=True)
    for start in range(first, end, batch):
        bank.append([gradient(number) for number in range(start, min(end, start + batch))])
        print(min(end, start + batch) - 1, flush=True)


if __name__ == "__main__":
    main()
