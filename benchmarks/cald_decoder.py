"""Perplexity of a decoder: dense, converted, after attention transfer, and after fine-tuning with or without LoRA.

The control is the dense model after the same fine-tuning, because fine-tuning also adapts a model to the text.

Without --text, the text is sampled from the model itself: stories for training, and others to score. The perplexity of
a model on its own samples is close to its entropy, the lowest possible one.

    python benchmarks/cald_decoder.py ../shared/models/stories260K --output results.json
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graftwork as gw
from graftwork.core.files import write_json
from graftwork.methods.cald import Cald


def sample(model: Any, tokenizer: Any, count: int, tokens: int, seed: int) -> list[str]:
    """Sample stories from the start token at temperature 1, one per line.

    Args:
        model: Dense decoder.
        tokenizer: Its tokenizer.
        count: Number of stories.
        tokens: Maximum number of tokens of a story.
        seed: Seed of the sampling.
    """
    torch.manual_seed(seed)
    stories: list[str] = []
    while len(stories) < count:
        start = torch.full((min(128, count - len(stories)), 1), tokenizer.bos_token_id)
        made = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
        for row in made[:, 1:].tolist():
            # a second start token begins another story
            ends = [row.index(each) for each in (tokenizer.bos_token_id, tokenizer.eos_token_id) if each in row]
            text = tokenizer.decode(row[: min(ends, default=len(row))], skip_special_tokens=True)
            stories.append(" ".join(text.split()))
    return stories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a decoder")
    parser.add_argument("--text", nargs=2, metavar=("TRAIN", "TEST"), help="text files; sampled without")
    parser.add_argument("--output", type=Path, default=Path("cald_decoder.json"))
    parser.add_argument("--runs", type=Path, default=Path("cald_decoder_runs"), help="folder for runs and samples")
    parser.add_argument("--stories", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=200, help="chunks that are scored")
    parser.add_argument("--feature-maps", nargs="*", default=["softmax"], help="none: the dense model only")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--transfer-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--finetuning", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--guide", default="target", choices=["target", "unguided"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, tokenizer = gw.load_model(options.model)
    options.runs.mkdir(parents=True, exist_ok=True)
    if options.text is None:
        options.text = [str(options.runs / name) for name in ("train.txt", "test.txt")]
        for name, count, seed in zip(options.text, (options.stories, options.chunks), (1, 2), strict=True):
            if not Path(name).exists():
                stories = sample(model, tokenizer, count, options.tokens, options.seed + seed)
                Path(name).write_text("\n".join(stories), encoding="utf-8")
    settings = gw.EvaluationSettings(max_input_tokens=options.tokens, batch_size=16, limit=options.chunks)
    rows: list[dict[str, Any]] = []

    def score(name: str, converted: Any) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        scores = gw.evaluate(converted, [options.text[1]], settings=settings).rows[0].scores
        rows.append({"model": name, **scores, "cpu_minutes": round((used.ru_utime + used.ru_stime) / 60, 1)})
        machine = f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}"
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        write_json(options.output, {"kind": "measured", "machine": machine, **plain, "rows": rows})
        print(json.dumps(rows[-1]), flush=True)

    def train(method: Cald, finetuning: str, name: str) -> None:
        model, tokenizer = gw.load_model(options.model)
        converted = gw.convert(model, method, tokenizer=tokenizer)
        lora = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        training = gw.TrainingSettings(
            tasks=(options.text[0],),
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            warmup_ratio=0.06,
            per_device_train_batch_size=options.batch,
            max_input_tokens=options.tokens,
            lora=lora if finetuning == "lora" else None,
            save_steps=10**6,
        )
        run = options.runs / name.replace(", ", "-")
        score(name, gw.train(converted, training, run=run, seed=options.seed, overwrite=True).converted)

    dense = gw.convert(model, Cald(guide="dense"), tokenizer=tokenizer)
    score("dense", dense)
    for finetuning in options.finetuning:
        train(Cald(guide="dense"), finetuning, f"dense, {finetuning}")
    for feature_map in options.feature_maps:
        base: dict[str, Any] = {"mixer": "linear", "feature_map": feature_map, "window": options.window}
        guided: dict[str, Any] = {"guide": options.guide}
        if options.guide == "target":
            guided["teacher"] = options.model
        model, tokenizer = gw.load_model(options.model)
        score(f"{feature_map}, untrained", gw.convert(model, Cald(**base), tokenizer=tokenizer))
        for finetuning in options.finetuning:
            method = Cald(**base, **guided, transfer_steps=options.transfer_steps)
            train(method, finetuning, f"{feature_map}, transfer, {finetuning}")
    table = Table(title="perplexity")
    for heading in ("model", "perplexity", "of dense", "CPU minutes so far"):
        table.add_column(heading)
    for row in rows:
        ratio = row["perplexity"] / rows[0]["perplexity"]
        table.add_row(row["model"], f"{row['perplexity']:.4g}", f"{ratio:.3f}", f"{row['cpu_minutes']}")
    Console().print(table)


if __name__ == "__main__":
    main()
