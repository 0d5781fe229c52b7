"""Estimated against measured peak memory on a CPU: every method, training and inference, three sizes.

Each case is measured in a fresh process, with real weights and values, by the memory events of torch's profiler: the
allocator's own record, independent of the estimate. The high-water mark of the process (VmHWM), which includes Python
and libraries, is printed beside it.

    python benchmarks/memory_estimates.py            # all cases
    python benchmarks/memory_estimates.py --json

Memory that a kernel allocates outside the allocator of torch, such as packed weights of oneDNN, is in VmHWM only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 128, "layers": 2, "tokens": 64, "rows": 4},
    "medium": {"width": 256, "layers": 4, "tokens": 128, "rows": 4},
    "large": {"width": 512, "layers": 6, "tokens": 128, "rows": 2},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "topk": ("t5", {"attention_k": 32, "feed_forward_k": 64}),
    "wt5": ("t5", {}),
    "cald": ("roberta", {"rank": 32, "guide": "trajectory"}),
    "sparsefinder": ("roberta", {"alpha": 1.5}),
    "regrad": ("llama", {"rank": 8}),
}
KINDS = ("training", "inference")


def config_of(family: str, size: dict[str, int]) -> Any:
    import transformers

    width, layers = size["width"], size["layers"]
    shared = {"vocab_size": 8000, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    if family == "t5":
        names = {"d_model": width, "d_ff": 4 * width, "d_kv": 32, "num_layers": layers, "num_heads": width // 32}
        return transformers.T5Config(
            vocab_size=8000,
            decoder_start_token_id=0,
            architectures=["T5ForConditionalGeneration"],
            dtype="float32",
            **names,
        )
    if family == "roberta":
        return transformers.RobertaConfig(
            **shared,
            intermediate_size=4 * width,
            max_position_embeddings=514,
            architectures=["RobertaForMaskedLM"],
            dtype="float32",
        )
    return transformers.LlamaConfig(
        **shared, intermediate_size=3 * width, architectures=["LlamaForCausalLM"], dtype="float32"
    )


def parts(name: str, size: dict[str, int]) -> tuple[Any, list[Any], Any, Any, tuple[str, str] | None]:
    """Configuration, methods, settings of training and of inference, and class labels of a case."""
    from graftwork.methods import NAMES
    from graftwork.settings.evaluation import EvaluationSettings
    from graftwork.settings.training import TrainingSettings

    family, settings = METHODS[name]
    methods = [] if name == "dense" else [NAMES.get(name)(**settings)]
    train = TrainingSettings(
        per_device_train_batch_size=size["rows"], max_input_tokens=size["tokens"], max_target_tokens=32
    )
    evaluate = EvaluationSettings(batch_size=size["rows"], max_input_tokens=size["tokens"], max_new_tokens=16)
    return config_of(family, size), methods, train, evaluate, ("no", "yes") if name == "cald" else None


def estimated(name: str, kind: str, size: dict[str, int]) -> int:
    from graftwork.pipeline.estimation.estimate import Estimator, Shape

    config, methods, train, evaluate, labels = parts(name, size)
    estimator = Estimator(config, Shape("cpu", "float32", labels, passage_tokens=size["tokens"]))
    if kind == "training":
        memory = estimator.training(methods, train)[2]
        return 0 if memory is None else memory.peak
    return estimator.inference(methods, evaluate)[1].peak


def measured(name: str, kind: str, size: dict[str, int]) -> dict[str, int]:
    """Run a case with real values; return the allocator's peak and the high-water mark of the process, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    from graftwork.grafting.conversion import convert
    from graftwork.grafting.converted import Converted
    from graftwork.metrics.memory import MemoryRecorder
    from graftwork.pipeline.estimation.estimate import SampleTokenizer
    from graftwork.pipeline.estimation.inference import measure_inference
    from graftwork.pipeline.estimation.training import take_update, training_run
    from graftwork.pipeline.loading import head_for, model_class_of
    from graftwork.pipeline.phases import phases_of
    from graftwork.training.batching import BatchSize

    config, methods, train, evaluate, labels = parts(name, size)
    kept = rss()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if labels is None:
            model = model_class_of(config)(config)
        else:
            chosen, options = head_for(config, labels, name)
            model = chosen.from_config(type(config).from_dict({**config.to_dict(), **options}))
        converted = Converted(model)
        for method in methods:
            converted = convert(converted, method)
        built = time.time_ns()
        if kind == "training":
            phase = phases_of(converted)[0]
            shape = BatchSize(train.passes()[0], train.max_input_tokens, train.max_target_tokens, size["tokens"])
            with training_run(model, phase, train, shape, SampleTokenizer()) as run:
                take_update(run, phase, 1)
                take_update(run, phase, 1)
        else:
            shape = BatchSize(evaluate.rows_at_once, evaluate.max_input_tokens, evaluate.max_new_tokens)
            measure_inference(converted, shape, MemoryRecorder())
    total = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda each: each.start_ns()):
        total += event.nbytes()
        # untied embeddings of a model that is being built are not part of a stage
        peak = max(peak, total) if event.start_ns() >= built else total
    return {"peak": peak, "high_water": high_water() - kept}


def rss() -> int:
    return _status("VmRSS")


def high_water() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    options.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options.add_argument("--only", help="one method")
    chosen = options.parse_args()
    if chosen.case:
        name, kind, size = chosen.case
        print(json.dumps(measured(name, kind, SIZES[size])))
        return
    rows: list[dict[str, Any]] = []
    for name in METHODS:
        for size, numbers in SIZES.items():
            for kind in KINDS:
                if chosen.only not in (None, name):
                    continue
                command = [sys.executable, "-W", "ignore", __file__, "--case", name, kind, size]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                guess = estimated(name, kind, numbers)
                row = {"method": name, "stage": kind, "size": size, "estimated": guess, **found}
                row["error"] = guess / found["peak"] - 1
                rows.append(row)
                if not chosen.json:
                    print(line(row), flush=True)
    if chosen.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        worst = max(rows, key=lambda row: abs(row["error"]))
        inside = sum(abs(row["error"]) <= 0.1 for row in rows)
        print(f"{inside} of {len(rows)} within 10 %; largest difference {worst['error']:+.1%} ({worst['method']})")


def line(row: dict[str, Any]) -> str:
    cells = [row["method"], row["stage"], row["size"]]
    cells += [f"{row[name] / 1e6:.1f}" for name in ("estimated", "peak", "high_water")]
    return "| " + " | ".join([*cells, f"{row['error']:+.1%}"]) + " |"


if __name__ == "__main__":
    main()
