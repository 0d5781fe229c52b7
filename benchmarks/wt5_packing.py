r"""Training on packed rows compared with padded rows, in non-padding tokens per second.

Forward and backward passes over the same examples, interleaved in one process: padded in random order, padded and
grouped by length (group_by_length), and packed. Only non-padding tokens of inputs and targets count. Expected: short
pairs of e-SNLI gain most; single reviews nearly fill a row, and attention runs over the whole packed row.

    python benchmarks/wt5_packing.py --data DATA --tokenizer google-t5/t5-base --task esnli_v010 --room 256 128
    python benchmarks/wt5_packing.py --data DATA --tokenizer google-t5/t5-base --task movie_rationales_v010 \
        --lengths movie_rationales --room 2048 512 --batch 4 --examples 24
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from common import parser, prepare
from graftwork.settings.lengths import PROFILES
from graftwork.tasks import get_task
from graftwork.training.encoding import EncodedExamples, PadBatch
from graftwork.training.packing import PackBatch, PackedExamples, forward
from graftwork.training.sampling import OPEN_ROWS

Batches = Sequence[dict[str, torch.Tensor]]


def model_of(options: Any, vocabulary: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=options.width,
        d_kv=64,
        d_ff=4 * options.width,
        num_layers=options.layers,
        num_heads=options.width // 64,
        decoder_start_token_id=0,
        pad_token_id=0,
        dropout_rate=0.1,
    )
    return T5ForConditionalGeneration(config).to(options.device, getattr(torch, options.dtype)).train()


def packs(lengths: Sequence[tuple[int, int]], order: Sequence[int], room: Sequence[int]) -> list[tuple[int, ...]]:
    """Packed rows as in training: each example goes into the first open row with room."""
    done: list[tuple[int, ...]] = []
    open_rows: list[tuple[list[int], list[int]]] = []
    for index in order:
        source, target = lengths[index]
        for row, left in open_rows:
            if left[0] >= source and left[1] >= target:
                row.append(index)
                left[0], left[1] = left[0] - source, left[1] - target
                break
        else:
            open_rows.append(([index], [room[0] - source, room[1] - target]))
            if len(open_rows) > OPEN_ROWS:
                done.append(tuple(open_rows.pop(0)[0]))
    return done + [tuple(row) for row, _ in open_rows]


def batches_of(options: Any, data: EncodedExamples, lengths: Sequence[tuple[int, int]]) -> dict[str, Batches]:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed)).tolist()
    collate = PadBatch(0)

    def padded(indices: Sequence[int]) -> Batches:
        chunks = [indices[start : start + options.batch] for start in range(0, len(indices), options.batch)]
        return [collate([data[index] for index in chunk]) for chunk in chunks]

    rows = packs(lengths, order, options.room)
    # number of packed rows with the size of a padded batch
    slots = statistics.mean(batch["input_ids"].numel() for batch in padded(order))
    at_once = max(1, round(slots / options.room[0]))
    pack, examples = PackBatch(0), PackedExamples(data, 0)
    packed = [pack([examples[row] for row in rows[start : start + at_once]]) for start in range(0, len(rows), at_once)]
    grouped = padded(sorted(order, key=lambda index: -lengths[index][0]))
    return {"padded": padded(order), "padded, grouped by length": grouped, "packed": packed}


def pass_over(model: T5ForConditionalGeneration, batches: Batches) -> float:
    started = time.perf_counter()
    for batch in batches:
        model.zero_grad(set_to_none=True)
        forward(model, {name: tensor.to(model.device) for name, tensor in batch.items()}).loss.backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measured(run: Callable[[str], float], names: Sequence[str], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate over interleaved rounds, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            seconds = run(name)
            print(f"round {number}: {name} {seconds:.2f} s", file=sys.stderr)
            if number:
                times[name].append(seconds)
    return {name: statistics.median(own) for name, own in times.items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of the task's files")
    options.add_argument("--tokenizer", required=True, help="folder or hub id of a T5 tokenizer")
    options.add_argument("--task", default="esnli_v010")
    options.add_argument("--split", default="train")
    options.add_argument("--lengths", default="esnli", choices=list(PROFILES))
    options.add_argument(
        "--room", type=int, nargs=2, default=[256, 128], help="input and target tokens of a packed row"
    )
    options.add_argument("--examples", type=int, default=256)
    options.add_argument("--batch", type=int, default=32, help="examples of a padded batch")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--width", type=int, default=256)
    chosen = options.parse_args()
    prepare(chosen)
    tokenizer: Any = AutoTokenizer.from_pretrained(chosen.tokenizer)
    rows = get_task(chosen.task).load(chosen.data, chosen.split, take=chosen.examples).rows
    longest = [min(profile, room) for profile, room in zip(PROFILES[chosen.lengths], chosen.room, strict=True)]
    data = EncodedExamples(
        rows, tokenizer, encoder_decoder=True, max_input_tokens=longest[0], max_target_tokens=longest[1]
    )
    lengths = data.lengths()
    real = sum(source + target for source, target in lengths)
    candidates = batches_of(chosen, data, lengths)
    model = model_of(chosen, len(tokenizer))
    seconds = measured(lambda name: pass_over(model, candidates[name]), list(candidates), chosen.rounds)
    found = []
    for name, batches in candidates.items():
        slots = sum(batch["input_ids"].numel() + batch["labels"].numel() for batch in batches)
        ratio = seconds["padded"] / seconds[name]
        found.append(
            {
                "candidate": name,
                "seconds": seconds[name],
                "tokens_per_second": real / seconds[name],
                "speed_up": ratio,
                "real_share": real / slots,
            }
        )
    title = f"{chosen.task}: {len(rows)} examples, {real} real tokens, measured on {chosen.device}, {chosen.dtype}"
    if chosen.json:
        print(json.dumps({"title": title, "kind": "measured", "torch": torch.__version__, "rows": found}))
        return
    table = Table("candidate", "seconds", "real tokens/s", "× padded", "real share of positions", title=title)
    for row in found:
        numbers = (f"{row['seconds']:.2f}", f"{row['tokens_per_second']:.0f}", f"{row['speed_up']:.2f}")
        table.add_row(str(row["candidate"]), *numbers, f"{row['real_share']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
