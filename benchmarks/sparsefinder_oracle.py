"""Choices of key blocks on one text: window, mean-pooled, pages, learned gate, k-means, and the best possible choice.

Every model is converted twice without fine-tuning, once for the gate and once for k-means, both trained on the first
part of the text. One forward pass over the last part then measures all choices within each budget of blocks.

    python benchmarks/sparsefinder_oracle.py --models MODEL … --text FILE --folder FOLDER --threads 1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import graftwork as gw
from common import parser, prepare
from graftwork.cli.app import run
from graftwork.methods.sparsefinder.graph_report.oracle_page import OracleReport, oracle_page

GROUPINGS = {
    "gate": ("--block-size", "{block}", "--rounds", "8"),
    "kmeans": ("--num-clusters", "16", "--rounds", "4", "--loss", "logistic"),
}
"""Learned choices, with the options of their conversion."""


def measured(model: str, grouping: str, chosen: argparse.Namespace) -> OracleReport:
    """Convert and train a model, and measure the choices of blocks."""
    folder = Path(chosen.folder) / f"{Path(model).parent.name}-{Path(model).name}-{grouping}"
    options = [word.format(block=chosen.block_size) for word in GROUPINGS[grouping]]
    convert = ["convert", "sparsefinder", model, "-o", str(folder), "--no-finetune", "--grouping", grouping, *options]
    convert += ["--samples", str(chosen.samples), "--projection-epochs", str(chosen.epochs)]
    convert += ["--projection-batch-size", "8", "--overwrite"]
    train = ["train", str(folder), "--task", chosen.text, "--split", chosen.train_split, "--max-input-tokens", "256"]
    for words in () if chosen.reuse and (folder / "artifacts" / "centroids.json").exists() else (convert, train):
        if run(words):
            raise SystemExit(f"graftwork {' '.join(words)} failed")
    return oracle_page(
        gw.load(folder),
        [chosen.text],
        split=chosen.split,
        samples=chosen.sequences,
        max_input_tokens=chosen.tokens,
        budgets=chosen.budgets,
        block_size=chosen.block_size,
    )


def main() -> None:
    """Measure every model and print one row per budget and choice."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", required=True)
    options.add_argument("--text", required=True)
    options.add_argument("--folder", default="oracle", help="folder of the runs")
    options.add_argument("--reuse", action="store_true", help="measure trained runs of the folder without training")
    options.add_argument("--train-split", default="all[:40%]")
    options.add_argument("--split", default="all[85%:]")
    options.add_argument("--samples", type=int, default=24, help="sentences for training")
    options.add_argument("--epochs", type=int, default=10, help="epochs over the queries and keys")
    options.add_argument("--sequences", type=int, default=3, help="sequences of the measured forward pass")
    options.add_argument("--tokens", type=int, default=512, help="tokens of a measured sequence")
    options.add_argument("--budgets", type=float, nargs="+", default=[0.125, 0.25])
    options.add_argument("--block-size", type=int, default=16)
    chosen = options.parse_args()
    prepare(chosen)
    for model in chosen.models:
        seen: set[tuple[object, object]] = set()
        for grouping in GROUPINGS:
            for row in measured(model, grouping, chosen).table:
                # the other choices do not depend on what was learned
                if (row["budget"], row["choice"]) not in seen:
                    seen.add((row["budget"], row["choice"]))
                    print(json.dumps({"model": model, **row}), flush=True)


if __name__ == "__main__":
    main()
