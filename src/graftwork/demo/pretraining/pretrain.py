"""Pretrain the tiny models of the offline world.

`python -m graftwork.demo.pretraining.pretrain NAME -o DIR` repeats the pretraining of a shipped model; its `card.json`
records the command, duration and scores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from graftwork.demo.pretraining.decoder import pretrain_decoder
from graftwork.demo.pretraining.encoder import pretrain_encoder
from graftwork.demo.pretraining.encoder_decoder import pretrain_encoder_decoder

MODELS = {
    "encoder_decoder": pretrain_encoder_decoder,
    "encoder": pretrain_encoder,
    "decoder": pretrain_decoder,
}
"""Pretraining function by model name."""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m graftwork.demo.pretraining.pretrain", description=__doc__)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, help="number of optimizer steps (default: that of the shipped model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = build_parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    steps = {} if options.steps is None else {"steps": options.steps}
    card = MODELS[options.model](options.out, seed=options.seed, **steps)
    print(json.dumps(card, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
