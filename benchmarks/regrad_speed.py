"""Encoding and answering against the authors' code, in one interleaved run, by processor time.

    python benchmarks/regrad_speed.py --theirs ../ReGrad --model ../shared/models/stories260K \
        --corpus ../shared/data/dpr/psgs_w100.tsv --threads 1

`--theirs` is a checkout of github.com/oneal2000/ReGrad, whose `src` is imported: `compute_gradients` and the answer box
are called as their scripts call them, in float32, because float16 is slow or missing on a CPU. Without it, a loop of
the published structure takes their place and the table says so: PEFT adapters, one passage at a time, autograd over all
adapter tensors, one question at a time with weights copied and restored.

Both sides have the same weights; gradients and answers are compared before anything is timed. `at_most` is the ratio
if the candidate took the time of its counted FLOPs at the rate of the best matrix product of this machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from common import parser, prepare
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.encoding.encoder import PassageEncoder, encode_passages
from graftwork.methods.regrad.modules import adapters, layout
from graftwork.methods.regrad.text.requests import Question
from graftwork.pipeline.loading import load_model
from graftwork.retrieval.corpus import CorpusReader, find_corpus
from graftwork.retrieval.retriever import Passage
from graftwork.tasks.prompts import PromptFamily, recorded

NEW_TOKENS, TOP = 20, 3
SIMPLE = PromptFamily(
    "", "", "Passage {{ number - 1 }}: {{ text }}", "", "", ("", "\nQuestion: {{ question }}\nAnswer: ")
)
"""Structure of the authors' prompt without a chat."""


def wide_llama() -> Any:
    """Random Llama whose matrix products dominate: 8 layers of width 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).eval()


class Theirs:
    """The authors' way: a PEFT model with the adapter of ours, and their functions or a loop of their structure.

    Args:
        model: The pretrained model.
        tokenizer: Its tokenizer.
        ours: The converted model, whose adapter is copied.
        rank: Rank of the adapter.
        source: Checkout of their repository; None for the loop.
    """

    def __init__(self, model: Any, tokenizer: Any, ours: Any, rank: int, source: str | None) -> None:
        from peft import LoraConfig, get_peft_model

        self.tokenizer, self.source = tokenizer, source
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(adapters(ours)))
        self.model: Any = get_peft_model(copy.deepcopy(model), settings)
        self.tensors = {name: one for name, one in self.model.named_parameters() if "lora_" in name}
        for name, one in self.model.named_parameters():
            one.requires_grad = name in self.tensors
        own = adapters(ours)
        with torch.no_grad():
            for name, one in self.tensors.items():
                path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
                one.copy_(own[path].get_parameter(f"lora_{part[0]}"))
        if source is not None:
            sys.path.insert(0, str(Path(source) / "src"))
            # packages that their module imports and these functions do not use
            sys.modules.setdefault("ujson", json)
            sys.modules.setdefault("word2number", types.SimpleNamespace(w2n=None))  # type: ignore[arg-type]
            import ICL  # type: ignore[import-not-found]
            import Meta  # type: ignore[import-not-found]

            self.icl, self.meta = ICL, Meta
            self.learner = Meta.MetaLearner(self.model, tokenizer)

    def gradient(self, text: str) -> dict[str, torch.Tensor]:
        """Gradient of one passage, as their encoding script computes it."""
        if self.source is not None:
            data = self.meta.get_train_data(self.tokenizer, text, max_len=2048)
            data.pop("token_type_ids", None)
            return self.meta.compute_gradients(self.learner, data, create_graph=False)
        ids = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=2048)["input_ids"]
        loss = self.model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        found = torch.autograd.grad(loss, list(self.tensors.values()))
        return {name: one.float() for name, one in zip(self.tensors, found, strict=True)}

    def answer(self, question: str, gradients: list[dict[str, torch.Tensor]]) -> str:
        """Answer of one question after one step, as their inference script computes it."""
        from transformers import GenerationConfig

        settings = GenerationConfig(max_new_tokens=NEW_TOKENS)
        parameters = dict(self.model.named_parameters())
        changed = {name: parameters[name] - 0.01 * sum(one[name] for one in gradients) for name in gradients[0]}
        if self.source is not None:
            self.learner.adapt(changed)
            contents = {"contents": {"context": "", "test_id": 0, "dataset": "popqa"}}
            box = self.icl.ICLModelBox(
                self.model, self.tokenizer, contents, settings, blind_context=True, use_simple=True,
                device=torch.device("cpu"),
            )  # fmt: skip
            text = box.predict(question)
            self.learner.recover()
            return str(text)
        with torch.no_grad():
            kept = {name: parameters[name].data.clone() for name in changed}
            for name, value in changed.items():
                parameters[name].data.copy_(value)
            start = self.tokenizer("", return_tensors="pt")
            text = self.tokenizer(f"\nQuestion: {question}\nAnswer: ", return_tensors="pt", add_special_tokens=False)
            ids = torch.cat([start["input_ids"].long(), text["input_ids"]], 1)
            found = self.model.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), stop_strings="\n", tokenizer=self.tokenizer,
                pad_token_id=self.tokenizer.eos_token_id, eos_token_id=self.tokenizer.eos_token_id,
                generation_config=settings,
            )  # fmt: skip
            for name, value in kept.items():
                parameters[name].data.copy_(value)
        decoded = self.tokenizer.decode(found[0], skip_special_tokens=True)
        return str(decoded.split("Answer:")[-1].split("\n")[0].strip())


def cut(passages: list[Passage], words: int | None) -> list[Passage]:
    return [Passage(one.id, " ".join(one.text.split()[:words]), "") for one in passages]


def peak_rate() -> float:
    """FLOPs per second of processor time of the best of several matrix products."""
    best = 0.0
    for rows, columns, inner in ((1024, 1024, 256), (512, 1024, 1024), (1024, 1024, 1024)):
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        for _ in range(20):
            began = time.process_time()
            torch.mm(left, right)
            best = max(best, 2 * rows * columns * inner / max(time.process_time() - began, 1e-9))
    return best


class FlopCounter(TorchDispatchMode):
    """Counts FLOPs of matrix products and attention; torch's own counter does not support `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += 0 if formula is None else formula(*args, **(kwargs or {}), out_val=result)
        return result


def flops(call: Callable[[], Any]) -> int:
    with FlopCounter() as counter:
        call()
    return int(counter.total)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--theirs", help="checkout of the authors' repository; a loop of its structure without it")
    options.add_argument("--model", required=True, help="folder or hub id of a Llama")
    options.add_argument("--corpus", required=True, help="passages: .tsv or .jsonl")
    options.add_argument("--passages", type=int, default=32)
    options.add_argument("--questions", type=int, default=16)
    options.add_argument("--rank", type=int, default=4)
    chosen = options.parse_args()
    prepare(chosen)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    small, tokenizer = load_model(chosen.model, dtype="float32")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    passages = list(islice(CorpusReader(find_corpus(Path(chosen.corpus))), chosen.passages))
    rate = peak_rate()
    rows: list[dict[str, Any]] = []
    for name, model in ((Path(chosen.model).name, small), ("8 layers of width 256", wide_llama())):
        rows += cases(name, model, tokenizer, passages, rate, chosen)
    show(rows, rate, chosen)


def cases(
    name: str, model: Any, tokenizer: Any, passages: list[Passage], rate: float, chosen: argparse.Namespace
) -> list[dict[str, Any]]:
    method = ReGrad(rank=chosen.rank, b_std=0.02, prompt=recorded({"open": SIMPLE}))
    converted = convert(Converted(copy.deepcopy(model), tokenizer=tokenizer), method)
    theirs = Theirs(model, tokenizer, converted.model, chosen.rank, chosen.theirs)
    encoder = PassageEncoder(converted.model, tokenizer, method.config)
    rows: list[dict[str, Any]] = []
    for words in (None, 35):
        given = cut(passages, words)
        documents = [encoder.document(one) for one in given]
        expected, found = theirs.gradient(given[0].text), encoder.encode(given[:1])[0]
        parts = layout(converted.model).split(torch.as_tensor(found.values))
        difference = max(
            float((parts[ours] - expected[f"base_model.model.{ours}.default.weight"]).norm())
            / max(float(parts[ours].norm()), 1e-30)
            for ours in parts
        )
        tokens = sum(len(one.ids) for one in documents) / len(documents)
        candidates = {
            "theirs": lambda given=given: [theirs.gradient(one.text) for one in given],
            "ours": lambda documents=documents: [encoder.gradients(one) for one in encoder.batches(documents)],
        }
        what = f"encoding, {tokens:.0f} tokens"
        rows += measured(name, what, candidates, len(given), rate, chosen, f"difference {difference:.0e}")
    with tempfile.TemporaryDirectory() as folder:
        given = cut(passages, 35)
        bank = encoder.open_bank(f"{folder}/bank", precision="float32")
        encode_passages(encoder, bank, given)
        stored = [theirs.gradient(one.text) for one in given]
        asked = [f"What is the name of number {number}?" for number in range(chosen.questions)]
        used = [[(TOP * number + rank) % len(given) for rank in range(TOP)] for number in range(len(asked))]
        questions = [Question(text, tuple(given[one].id for one in own)) for text, own in zip(asked, used, strict=True)]
        engine = Answerer(converted.model, tokenizer, bank, config=method.config)
        candidates = {
            "theirs": lambda: [
                theirs.answer(text, [stored[one] for one in own]) for text, own in zip(asked, used, strict=True)
            ],
            "one by one": lambda: [engine.answer([one])[0].text for one in questions],
            "batch 16": lambda: [one.text for one in engine.answer(questions)],
        }
        texts = {way: call() for way, call in candidates.items()}
        same = sum(one == other for one, other in zip(texts["theirs"], texts["one by one"], strict=True))
        note = f"{same} of {len(asked)} answers equal"
        rows += measured(name, "answering", candidates, len(asked), rate, chosen, note)
        bank.close()
    return rows


def measured(
    name: str,
    what: str,
    candidates: dict[str, Callable[[], Any]],
    count: int,
    rate: float,
    chosen: argparse.Namespace,
    note: str,
) -> list[dict[str, Any]]:
    """Rows of one case: median of interleaved rounds, after one that is not counted."""
    seconds: dict[str, list[float]] = {way: [] for way in candidates}
    for number in range(chosen.rounds + 1):
        for way, call in candidates.items():
            began = time.process_time()
            call()
            if number:
                seconds[way].append(time.process_time() - began)
    base = statistics.median(seconds["theirs"])
    rows: list[dict[str, Any]] = []
    for way, call in candidates.items():
        spent, needed = statistics.median(seconds[way]), flops(call)
        ratios = [one / own for one, own in zip(seconds["theirs"], seconds[way], strict=True)]
        rows.append(
            {
                "model": name,
                "case": what,
                "candidate": way,
                "ms": round(1e3 * spent / count, 2),
                "ratio": round(statistics.median(ratios), 2),
                "mflop": round(needed / count / 1e6),
                "at_most": round(base / (needed / rate), 2),
                "note": note,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], rate: float, chosen: argparse.Namespace) -> None:
    base = "the authors' code" if chosen.theirs else "a loop of the authors' structure"
    about = {"kind": "measured", "theirs": base, "threads": torch.get_num_threads(), "peak_gflops": round(rate / 1e9)}
    if chosen.json:
        print(json.dumps({**about, "rows": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
