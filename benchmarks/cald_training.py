"""Updates per second of every guide and of dense fine-tuning, measured in turns with the trainer.

Expected passes per batch: dense and unguided one forward and backward pass; target, waypoint and the guided part of
hybrid one more forward pass; trajectory twice as many, and a second optimizer. The student's pass is cheaper than the
dense one above the break-even length. Writing checkpoints is not timed.

    python benchmarks/cald_training.py --length 512 --rank 64 --updates 6 --rounds 3 --threads 1
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from graftwork.core.example import Example, Examples
from graftwork.core.run_folder import RunFolder
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save
from graftwork.methods.cald import Cald
from graftwork.pipeline.training import train_phases
from graftwork.settings.training import TrainingSettings

GUIDES = ("dense", "unguided", "target", "waypoint", "trajectory")
VOCABULARY = 1000


def tokenizer() -> Any:
    """Tokenizer of the words w4, w5 and so on."""
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    words |= {f"w{index}": index for index in range(4, VOCABULARY)}
    own = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]")


def model(options: argparse.Namespace) -> Any:
    """Encoder with random weights, of the size in `options`."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            intermediate_size=4 * options.hidden,
            max_position_embeddings=options.length,
            id2label={0: "a", 1: "b"},
            label2id={"a": 0, "b": 1},
        )
    )


def seconds(guide: str, folder: Path, dense: Path, options: argparse.Namespace, *, snapshots: bool = False) -> float:
    """Return the seconds per run, without loading.

    Args:
        guide: Guide of the run.
        folder: Folder of the run.
        dense: Folder of a dense run.
        options: Command-line options.
        snapshots: Save the snapshots for waypoint.
    """
    generator = random.Random(0)
    rows = tuple(
        Example(str(i), " ".join(f"w{generator.randrange(4, VOCABULARY)}" for _ in range(options.length)), "ab"[i % 2])
        for i in range(options.batch * options.updates)
    )
    own: dict[str, dict[str, Any]] = {
        "target": {"teacher": str(dense)},
        "waypoint": {"snapshots": str(dense / "train" / "distill" / "checkpoint-*")},
    }
    method = Cald(guide=guide, rank=options.rank, **own.get(guide, {}))  # type: ignore[arg-type]
    converted = convert(model(options), method, tokenizer=tokenizer())
    settings = TrainingSettings(
        tasks=("random",),
        max_steps=options.updates,
        per_device_train_batch_size=options.batch,
        save_steps=max(1, options.updates // 2),
        save_total_limit=2,
        max_input_tokens=options.length,
        arguments={"save_strategy": "steps" if snapshots else "no", "save_only_model": True},
    )
    examples = [Examples("random", "train", rows, len(rows), 0, "made here")]
    _, closing = train_phases(converted, settings, examples, RunFolder(folder), seed=0, overwrite=False)
    if snapshots:
        save(converted, folder)
    return closing["distill"]["train_runtime"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 512), ("rank", 64), ("hidden", 256), ("layers", 4), ("heads", 4), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    times: dict[str, list[float]] = {guide: [] for guide in GUIDES}
    with tempfile.TemporaryDirectory() as place:
        teacher = Path(place) / "teacher"
        seconds("dense", teacher, teacher, options, snapshots=True)
        for number in range(options.rounds):
            for guide in GUIDES:
                times[guide].append(seconds(guide, Path(place) / f"{guide}{number}", teacher, options))
    ratios = {
        guide: statistics.median(own / base for own, base in zip(times[guide], times["dense"], strict=True))
        for guide in GUIDES
    }
    rates = {guide: options.updates / statistics.median(own) for guide, own in times.items()}
    if options.json:
        print(json.dumps({"kind": "measured", **vars(options), "updates_per_second": rates, "time_ratio": ratios}))
        return
    table = Table(title=f"measured, {torch.get_num_threads()} threads, {options.length} tokens, rank {options.rank}")
    for heading in ("guide", "updates / s", "time / dense"):
        table.add_column(heading)
    for guide in GUIDES:
        table.add_row(guide, f"{rates[guide]:.3g}", f"{ratios[guide]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
