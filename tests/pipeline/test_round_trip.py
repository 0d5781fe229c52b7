"""A graft in a process of its own: with Graftwork installed it is opened, without it refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graftwork.demo import shipped_model
from graftwork.grafting.conversion import convert
from graftwork.methods.cald import Cald
from graftwork.methods.regrad import ReGrad
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.topk import TopK
from graftwork.methods.wt5 import WT5
from graftwork.pipeline.loading import load
from installed_package import ROOT, entry_points

GRAFTS = {
    "topk": ("encoder_decoder", lambda: TopK(feed_forward_k=16)),
    "topk_attention": ("decoder", lambda: TopK(attention_k=2)),
    "cald": ("encoder", lambda: Cald(rank=8)),
    "sparsefinder": ("encoder", lambda: Sparsefinder(alpha=1.5)),
    "regrad": ("decoder", lambda: ReGrad(rank=2, b_std=0.5)),
    "wt5": ("encoder_decoder", lambda: WT5()),
}
OPEN = """
import sys, torch, transformers
sys.modules.update({"graftwork": None} if sys.argv[1] == "without" else {})
ids = torch.tensor([[5, 9, 11, 40, 2]])
TASKS = {"LlamaForCausalLM": "text-generation", "RobertaForMaskedLM": "fill-mask"}
AUTO = {"LlamaForCausalLM": "CausalLM", "RobertaForMaskedLM": "MaskedLM", "T5ForConditionalGeneration": "Seq2SeqLM"}
for name, (kind, graft, dense) in torch.load("logits.pt").items():
    targets = {"decoder_input_ids": ids} if "T5" in kind else {}
    ways = {
        "class": getattr(transformers, kind).from_pretrained,
        "auto": getattr(transformers, "AutoModelFor" + AUTO[kind]).from_pretrained,
    }
    if kind in TASKS:
        ways["pipeline"] = lambda name: transformers.pipeline(TASKS[kind], model=name).model
    found = []
    for way in ways.values():
        try:
            model = way(name)
        except ValueError as error:
            found.append("refused" if "install Graftwork to load it" in str(error) else str(error))
            continue
        with torch.no_grad():
            logits = model(input_ids=ids, **targets).logits
        found.append("graft" if torch.equal(logits, graft) else "dense" if torch.equal(logits, dense) else "neither")
    print(name, *dict.fromkeys(found))
print("graftwork.pipeline.quantizer" in sys.modules)
"""


def opened(folder: Path, argument: str, *paths: Path, **environment: str) -> list[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **environment}
    command = [sys.executable, "-c", OPEN, argument]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="the package is not run from its repository")
def test_new_processes_open_grafts_with_graftwork_installed_and_refuse_them_without(tmp_path):
    ids = torch.tensor([[5, 9, 11, 40, 2]])
    logits = {}
    for name, (base, method) in GRAFTS.items():
        converted = convert(load(shipped_model(base)), method())
        model = converted.model
        converted.tokenizer.save_pretrained(tmp_path / name)
        targets = {"decoder_input_ids": ids} if base == "encoder_decoder" else {}
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            graft = model(input_ids=ids, **targets).logits
            dense = load(shipped_model(base)).model(input_ids=ids, **targets).logits
        assert torch.equal(graft, dense) == (name == "wt5"), name
        logits[name] = type(model).__name__, graft, dense
    torch.save(logits, tmp_path / "logits.pt")
    # `import torch` imports an installed Graftwork, so that the process need not
    found = opened(tmp_path, "with", ROOT / "src", entry_points(tmp_path))
    assert found == [*(f"{name} graft" for name in GRAFTS), "True"]
    without = opened(tmp_path, "without", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert without == [f"{name} {'graft' if name == 'wt5' else 'refused'}" for name in GRAFTS] + ["False"]
