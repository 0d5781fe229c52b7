"""A third-party package adds a method through an entry point."""

import os
import subprocess
import sys

import pytest

from graftwork.errors import UnknownNameError
from graftwork.methods import NAMES

MODULE = '''
from dataclasses import dataclass

from torch import nn

from graftwork.method import Change, Method, Paper
from graftwork.surgery.attention import graft_attention
from graftwork.surgery.sites import attention_sites


@dataclass(frozen=True)
class MeanConfig:
    """Settings of mean attention."""

    strength: float = 1.0
    """Factor on the mean."""


class MeanAttention(nn.Module):
    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def forward(self, owner, query, key, value, mask, **options):
        return self.strength * value.mean(2, keepdim=True).expand_as(query)


class Mean(Method[MeanConfig]):
    """Attention that averages all values."""

    name = "mean"
    title = "Mean attention of a third party"
    paper = Paper("The mean", "doi:0", 1999, "nobody/mean")
    config_class = MeanConfig
    families = frozenset({"gpt2"})

    def apply(self, model):
        sites = attention_sites(model)
        graft_attention(model, self.name, {site.path: MeanAttention(self.config.strength) for site in sites})
        return [Change(site.path, type(site.module).__name__, "MeanAttention") for site in sites]
'''

PROGRAM = """
import torch
from tiny_models import tiny_model

from graftwork import convert, restore
from graftwork.methods import NAMES
from graftwork.pipeline.start import build_method

model, ids = tiny_model("gpt2"), torch.arange(3, 9)[None]
dense = model(ids).logits
converted = convert(model, build_method({"name": "mean", "strength": 0.5}))
assert len(converted.changes) == 2
assert not torch.equal(model(ids).logits, dense)
restore(converted)
assert torch.equal(model(ids).logits, dense)
print(NAMES.get("mean").title)
"""


def install(folder, name):
    (folder / "thirdparty_mean.py").write_text(MODULE)
    info = folder / "thirdparty_mean-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty-mean\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[graftwork.methods]\n{name} = thirdparty_mean:Mean\n")


def python(folder, *arguments):
    paths = [str(folder), os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.long
def test_an_installed_package_adds_a_method(tmp_path):
    install(tmp_path, "mean")
    listed = python(tmp_path, "-m", "graftwork", "list", "methods")
    assert listed.returncode == 0, listed.stderr
    assert "Mean attention of a third party" in listed.stdout
    assert "topk" in listed.stdout
    used = python(tmp_path, "-c", PROGRAM)
    assert used.returncode == 0, used.stderr
    assert used.stdout.strip() == "Mean attention of a third party"


def test_without_the_package_the_method_is_unknown():
    with pytest.raises(UnknownNameError, match="Unknown method 'mean'"):
        NAMES.get("mean")


def test_a_package_with_a_built_in_name_is_refused(tmp_path):
    install(tmp_path, "topk")
    listed = python(tmp_path, "-m", "graftwork", "list", "methods")
    assert listed.returncode != 0
    assert "'topk' twice" in " ".join(listed.stderr.split())
    assert "thirdparty_mean:Mean" in listed.stderr
