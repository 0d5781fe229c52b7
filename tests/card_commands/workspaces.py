"""Working folders of the card scripts: miniature data, models and files of the authors' code."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from graftwork.grafting.conversion import convert
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.importing import original_names
from graftwork.methods.regrad.modules import adapters
from graftwork.tasks.unifiedqa import DEFAULT_DATASETS
from methods.cald.runs import model as encoder_without_head
from tiny_models import VOCABULARY, tiny_model, word_tokenizer


def topk(folder: Path) -> None:
    """Create every default raw data set; openbookqa has a test file instead of a dev file."""
    lines = [f"who has the {pet}? \\n {name} has a {pet} .\t{name}" for name, pet in (("an", "owl"), ("bo", "dog"))]
    for dataset in DEFAULT_DATASETS:
        target = folder / "data" / dataset
        target.mkdir(parents=True)
        for split in ("train", "test" if dataset == "openbookqa" else "dev"):
            (target / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def wt5(folder: Path) -> None:
    """Create no files; the script uses the offline world only."""


def sparsefinder(folder: Path) -> None:
    """Create a random RoBERTa, a small WikiText, and a dump of queries and keys in the authors' format."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<unk>"})
    tiny_model("roberta", dtype=torch.float32).save_pretrained(folder / "roberta")
    tokenizer.save_pretrained(folder / "roberta")
    draw = random.Random(1)
    for target in (folder / "wiki" / "wikitext-103-raw", folder / "plain"):
        target.mkdir(parents=True)
        for split, count in (("train", 24), ("valid", 12)):
            lines = [" ".join(f"w{draw.randrange(4, VOCABULARY)}" for _ in range(16)) for _ in range(count)]
            (target / f"wiki.{split}.raw").write_text("".join(f" {line} \n \n" for line in lines))
    tensors = [torch.randn(2, 2, 5, 8)]
    torch.save({"q": tensors, "k": tensors, "length_src": [5]}, folder / "dump_enc-attn.pt")
    projections = [{"w": torch.randn(2, 8, 4), "b": torch.zeros(2, 1, 4)} for _ in range(2)]
    torch.save([{"q": entry, "k": entry} for entry in projections], folder / "projections.pickle")


def cald(folder: Path) -> None:
    """Create an encoder without a head, its configuration, a table, and files of GLUE and of the IMDb archive."""
    encoder_without_head().bert.save_pretrained(folder / "encoder")
    word_tokenizer().save_pretrained(folder / "encoder")
    encoder_without_head().bert.config.save_pretrained(folder / "configuration")
    word_tokenizer().save_pretrained(folder / "configuration")
    draw = random.Random(0)

    def text() -> str:
        return " ".join(f"w{draw.randrange(4, VOCABULARY)}" for _ in range(6))

    for split in ("train", "dev"):
        rows = [f"{text()},{('low', 'high')[number % 2]}" for number in range(20)]
        (folder / f"{split}.csv").write_text("\n".join(["sentence1,label", *rows]) + "\n")
        for name, header, row in (
            ("SST-2", "sentence\tlabel", "{0}\t{2}"),
            ("QNLI", "index\tquestion\tsentence\tlabel", "1\t{0}\t{1}\t{3}"),
            ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t1\t2\t{0}\t{1}\t{2}"),
        ):
            target = folder / "glue" / name
            target.mkdir(parents=True, exist_ok=True)
            filled = [
                row.format(text(), text(), number % 2, ("entailment", "not_entailment")[number % 2])
                for number in range(8)
            ]
            (target / f"{split}.tsv").write_text("\n".join([header, *filled]) + "\n")
    for split in ("train", "test"):
        for kind in ("neg", "pos"):
            target = folder / "reviews" / "aclImdb" / split / kind
            target.mkdir(parents=True)
            for number in range(4):
                (target / f"{number}_1.txt").write_text(text() + "\n")
    (folder / "settings.yaml").write_text("train: {max_steps: 1}\n")


def regrad(folder: Path) -> None:
    """Create checkpoints in the authors' format, a valid one and several defective ones."""
    plain = tiny_model("llama", dtype=torch.float32)
    plain.save_pretrained(folder / "llama")
    word_tokenizer().save_pretrained(folder / "llama")
    tiny_model("llama", dtype=torch.float32, num_hidden_layers=16).save_pretrained(folder / "deep")
    word_tokenizer().save_pretrained(folder / "deep")
    model = convert(plain, ReGrad(rank=4, layers="0,1", b_std=0.1)).model
    stored = {}
    for ours, theirs in original_names(model).items():
        path, _, letter = ours.rpartition(".lora_")
        adapter = adapters(model)[path]
        stored[f"base_model.{theirs}"] = adapter.get_parameter(f"lora_{letter}").detach().clone()
        stored["alpha_" + theirs.replace(".", "-")] = torch.tensor(0.01)
    files = {
        "peft_config": {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [f"model.layers.{n}.mlp.{part}_proj" for n in (0, 1) for part in ("gate", "up", "down")],
        },
        "learner_config": {
            "base_model_name_or_path": "meta-llama/Llama-3.2-1B-Instruct",
            "init_alpha": 0.01,
            "alpha_mode": "tie",
            "use_simple_prompt": False,
            "load_dtype": "auto",
        },
        "train_args": {
            "meta_batch_size": 16,
            "meta_lr": 4e-4,
            "num_epochs": 1,
            "max_context_len": 32,
            "mixed_precision": "bf16",
            "lr_scheduler": "LinearLR",
        },
        "generation_config": {"max_new_tokens": 20},
    }
    for name, changes in (
        ("original", {}),
        ("loha", {"peft_config": {"peft_type": "LOHA"}}),
        ("unknown", {"train_args": {"wandb": True}}),
        ("missing", {}),
        ("specific", {}),
    ):
        target = folder / name
        target.mkdir()
        for file, content in files.items():
            (target / f"{file}.json").write_text(json.dumps({**content, **changes.get(file, {})}))
        torch.save(stored, target / "meta_state_dict.pth")
    (folder / "missing" / "peft_config.json").unlink()
    (folder / "specific" / "train_args.json").rename(folder / "specific" / "train_specific_args.json")
    (folder / "settings.yaml").write_text("train: {max_steps: 1}\n")
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "some.tsv").write_text(
        "id\ttext\ttitle\n" + "".join(f'{n}\t"w{n} w{n + 1} w9"\tw{n}\n' for n in range(5))
    )
    shutil.copy(corpus / "some.tsv", folder / "more.tsv")
    pair = {"question": "w4 w5", "answer": "w6"}
    rows = [{"id": f"{n}", "rewrite": f"w9 w{n + 1} w{n}", "pairs": [pair] * 3} for n in range(5)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


WORKSPACES: Mapping[str, Callable[[Path], None]] = {
    "topk": topk,
    "wt5": wt5,
    "sparsefinder": sparsefinder,
    "cald": cald,
    "regrad": regrad,
}
