"""Training a whole T5: bytes saved for the backward pass with top-k attention, against SDPA.

SDPA has no kernel for an additive bias without a tensor of queries × keys: T5's position bias and the mask become one
such tensor in every layer, which is saved. Top-k attention saves k numbers per query, and the bias once per distance.

    python benchmarks/topk_model.py --tokens 1024 --layers 4 --k 32
"""

from __future__ import annotations

import json

import torch
from transformers import T5Config, T5ForConditionalGeneration

import graftwork as gw
from common import parser, prepare
from graftwork.metrics.cost import saved_tensors


def saved(tokens: int, layers: int, width: int, heads: int, settings: dict[str, object] | None) -> float:
    """MiB saved for the backward pass of one example, weights not counted; settings None is the dense model."""
    torch.manual_seed(0)
    sizes = {"d_model": width, "d_kv": width // heads, "num_heads": heads, "d_ff": 2 * width, "vocab_size": 128}
    config = T5Config(**sizes, num_layers=layers, num_decoder_layers=layers, decoder_start_token_id=0)
    config._attn_implementation = "sdpa"
    model = T5ForConditionalGeneration(config).train()
    if settings is not None:
        gw.convert(model, gw.TopK(**settings))
    ids = torch.randint(3, 128, (1, tokens))
    with saved_tensors(list(model.parameters())) as record:
        model(input_ids=ids, labels=ids)
    return record.bytes / 2**20


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[1024], help="tokens of the input and of the target")
    options.add_argument("--layers", type=int, default=4, help="layers of the encoder, and of the decoder")
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--heads", type=int, default=4)
    options.add_argument("--k", type=int, default=32)
    chosen = options.parse_args()
    prepare(chosen)
    half = f"0-{max(0, chosen.layers // 2 - 1)}"
    variants = {
        "SDPA": None,
        f"top-{chosen.k}, layers {half}": {"attention_k": chosen.k, "layers": half},
        f"top-{chosen.k}, all layers": {"attention_k": chosen.k},
    }
    for tokens in chosen.tokens:
        sizes = (tokens, chosen.layers, chosen.width, chosen.heads)
        found = {name: round(saved(*sizes, settings), 1) for name, settings in variants.items()}
        if chosen.json:
            print(json.dumps({"tokens": tokens, "saved_mib": found}))
        else:
            print(f"{tokens} tokens, saved MiB: " + ", ".join(f"{name} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
