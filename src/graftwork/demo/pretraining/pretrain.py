"""Make the tiny pretrained models of the offline world from its seed.

`python -m graftwork.demo.pretraining.pretrain NAME -o DIR` repeats the pretraining of a shipped model; its `card.json`
records command, duration and scores.
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
"""Word of the command line to what makes the model of that folder."""


def build_parser() -> argparse.ArgumentParser:
    """What the command line accepts."""
    parser = argparse.ArgumentParser(prog="python -m graftwork.demo.pretraining.pretrain", description=__doc__)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: as many as the shipped model had)")
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
