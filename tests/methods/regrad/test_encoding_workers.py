"""Encoding with several processes equals encoding with one; started by the commands that users run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.core.ray_cluster import check_cpus, check_gpus
from graftwork.errors import ConfigError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.opening import backend_for
from graftwork.methods.regrad.encoding.encoder import encode_passages
from regrad_engine import adapted_decoder, encoder_of, passages

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A run, a corpus, and the bank of a single process."""
    folder = tmp_path_factory.mktemp("workers")
    converted = adapted_decoder()
    converted.save(folder / "run")
    some = passages(converted, 24)
    lines = [json.dumps({"_id": one.id, "text": one.text, "title": one.title}) for one in some]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    encoder = encoder_of(converted)
    encode_passages(encoder, encoder.open_bank(folder / "whole", precision="float32"), some)
    return folder


def build(workspace: Path, name: str | Path, *launcher: str, options: tuple[str, ...] = ()) -> dict:
    command = [
        *launcher,
        "bank",
        "build",
        str(workspace / "run"),
        str(workspace / "corpus.jsonl"),
        "-o",
        str(name),
        "--precision",
        "float32",
        "--json",
        *options,
    ]
    # the test provides the environment of the object store
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_equal(workspace: Path, name: str | Path) -> None:
    with GradientBank(name) as found, GradientBank(workspace / "whole") as whole:
        assert found.ids() == whole.ids()
        left, right = found.get(found.ids()), whole.get(found.ids())
        assert float((left - right).norm() / right.norm()) <= 1e-6


@pytest.mark.long
def test_torchrun_processes_fill_one_bank(workspace: Path, location):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "graftwork")
    done = build(workspace, location, *torchrun)
    assert 0 < done["written"] < 24
    assert backend_for(location).sibling(".parts").children() == []
    assert_equal(workspace, location)


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'graftwork[ray]'"
)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="Ray needs a CPU in addition to its actors")
def test_ray_actors_fill_one_bank(workspace: Path):
    options = ("--workers", "1", "--cpus-per-worker", "0.5")
    done = build(workspace, workspace / "pool", sys.executable, "-m", "graftwork", options=options)
    assert done["written"] == 24
    assert_equal(workspace, workspace / "pool")


class Cluster:
    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {"CPU": 2.0, "GPU": 1.0}


@pytest.mark.parametrize(("workers", "share"), [(2, 1.0), (3, 0.5), (0, 1.0)])
def test_actors_must_leave_a_cpu(workers, share):
    with pytest.raises(ConfigError, match="Ray deadlocks without"):
        check_cpus(Cluster, workers, share)
    check_cpus(Cluster, 1, 1.0)
    check_cpus(Cluster, 2, 0.5)


def test_actors_must_not_wait_for_gpus_that_do_not_exist():
    with pytest.raises(ConfigError, match="2 workers of 1 GPUs, and 1 GPUs"):
        check_gpus(Cluster, 2, 1.0)
    check_gpus(Cluster, 2, 0.5)
    check_gpus(Cluster, 2, 0.0)
