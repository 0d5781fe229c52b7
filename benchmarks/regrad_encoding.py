"""Encoding speed: gradients of 100-word passages in batches of 1, 4 and 16.

Expected: a single short passage does not saturate a processor or accelerator, so batches are faster until they do.
Where a single passage saturates it, such as 400 tokens on few CPU cores, batches gain little and padding costs a bit.
Compared with one passage at a time and autograd over all adapter parameters, as the original encodes.

    python benchmarks/regrad_encoding.py --model ../shared/models/stories260K --corpus ../shared/data/dpr/psgs_w100.tsv

All batch sizes encode the same passages in interleaved rounds; reported are wall-clock and processor time of each
one's fastest round.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from common import parser, prepare
from graftwork.grafting.conversion import convert
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.encoding.encoder import Document, PassageEncoder
from graftwork.methods.regrad.functional import document_labels, mean_token_losses
from graftwork.methods.regrad.modules import adapters
from graftwork.pipeline.loading import load_model
from graftwork.retrieval.corpus import CorpusReader, find_corpus


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", required=True, help="folder or hub id of a Llama")
    options.add_argument("--corpus", required=True, help="passages: .tsv or .jsonl")
    options.add_argument("--passages", type=int, default=32)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    options.add_argument("--rank", type=int, default=4)
    options.add_argument("--attention", default="sdpa", help="attention implementation of the model")
    options.add_argument("--words", type=int, help="cut passages to this number of words")
    chosen = options.parse_args()
    prepare(chosen)
    model, tokenizer = load_model(chosen.model, dtype=chosen.dtype)
    model.to(chosen.device).set_attn_implementation(chosen.attention)
    method = ReGrad(rank=chosen.rank, b_std=0.02)
    encoder = PassageEncoder(convert(model, method).model, tokenizer, method.config, tokens_per_batch=10**9)
    passages = list(islice(CorpusReader(find_corpus(Path(chosen.corpus))), chosen.passages))
    if chosen.words:
        passages = [type(one)(one.id, " ".join(one.text.split()[: chosen.words]), one.title) for one in passages]
    documents = [encoder.document(passage) for passage in passages]
    candidates = {"original, 1": lambda: original(encoder, documents)}
    candidates |= {f"batch {size}": lambda size=size: batched(encoder, documents, size) for size in chosen.batches}
    best = rounds(candidates, chosen)
    report(best, documents, chosen)


def batched(encoder: PassageEncoder, documents: list[Document], size: int) -> None:
    encoder.batch_size = size
    for batch in encoder.batches(documents):
        encoder.gradients(batch)


def original(encoder: PassageEncoder, documents: list[Document]) -> None:
    """Compute gradients one passage at a time, by autograd over the adapter's tensors."""
    parameters = [part for one in adapters(encoder.model).values() for part in (one.lora_A, one.lora_B)]
    for document in documents:
        ids = torch.tensor([document.ids], device=next(encoder.model.parameters()).device)
        mask = torch.ones_like(ids)
        logits = encoder.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = mean_token_losses(logits, document_labels(ids, mask)).sum()
        torch.autograd.grad(loss, parameters)


def rounds(candidates: dict[str, Callable[[], None]], chosen: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return the minimum (wall-clock, processor) seconds of each candidate."""
    best: dict[str, tuple[float, float]] = {}
    for number in range(chosen.rounds + 1):
        for name, run in candidates.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if chosen.device != "cpu":
                torch.cuda.synchronize()
            spent = (time.perf_counter() - wall, time.process_time() - processor)
            if number:  # the first round is a warm-up
                before = best.get(name, spent)
                best[name] = (min(before[0], spent[0]), min(before[1], spent[1]))
        print(f"round {number} done", file=sys.stderr)
    return best


def report(best: dict[str, tuple[float, float]], documents: list[Document], chosen: argparse.Namespace) -> None:
    tokens = sum(len(one.ids) for one in documents) / len(documents)
    single = best[f"batch {chosen.batches[0]}"]
    rows = [
        {
            "candidate": name,
            "passages_per_second": round(len(documents) / wall, 2),
            "per_processor_second": round(len(documents) / processor, 2),
            "speed": round(single[0] / wall, 2),
            "speed_by_processor_time": round(single[1] / processor, 2),
        }
        for name, (wall, processor) in best.items()
    ]
    about = {
        "kind": "measured",
        "device": chosen.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "attention": chosen.attention,
        "passages": len(documents),
        "tokens_per_passage": round(tokens, 1),
    }
    if chosen.json:
        print(json.dumps({**about, "rows": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("\t".join(rows[0]))
    for row in rows:
        print("\t".join(map(str, row.values())))


if __name__ == "__main__":
    main()
