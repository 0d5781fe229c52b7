"""Grafts in lm-eval: the model type `graftwork`, tasks of lm-eval in `evaluate`, and models by path."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graftwork.cli.records import records_of
from graftwork.core.files import read_lines
from graftwork.demo import shipped_model
from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.methods.regrad import ReGrad
from graftwork.methods.topk import TopK
from graftwork.metrics.answers import paired_bootstrap
from graftwork.metrics.results import Results
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.harness.tasks import check_lm_eval
from graftwork.pipeline.loading import load
from graftwork.pipeline.sweeps import sweep
from graftwork.reporting.render import report
from graftwork.settings.evaluation import EvaluationSettings
from installed_package import ROOT, entry_points

# lm-eval and its dependencies use deprecated parts of the standard library and of datasets
pytestmark = pytest.mark.filterwarnings("ignore")
SUBJECTS = ("red", "blue", "old", "small")
CHOICES = ("blue", "the red house", "a blue book")
ROWS = [
    {
        "question": f"who wrote {' '.join(SUBJECTS[: 1 + number % 4])}?",
        "choices": [CHOICES[(number + shift) % 3] for shift in range(3)],
        "answer": number % 2,
        "text": f"the author of {CHOICES[number % 3]} is {SUBJECTS[number % 4]}",
    }
    for number in range(8)
]
"""Questions for which the dense model and the graft prefer different choices."""
CONTEXT = "question: {question} answer:"
PROMPT = "doc_to_text: 'question: {{question}} answer:'"
TASKS = {
    "choices": f"output_type: multiple_choice\n{PROMPT}\ndoc_to_target: answer\ndoc_to_choice: choices\n"
    "metric_list:\n  - metric: acc\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list:\n  - metric: word_perplexity\n",
    "generate": f"output_type: generate_until\n{PROMPT}\ndoc_to_target: '{{{{choices[answer]}}}}'\n"
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 5}\nmetric_list:\n  - metric: exact_match\n',
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with YAML files of three tasks, and their rows."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; it is the extra lm-eval")
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: own_{name}\n{text}test_split: test\n{data}")
    return folder


@pytest.fixture(autouse=True)
def cached_data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def decoder() -> Converted:
    return convert(load(shipped_model("decoder"), dtype="float32"), TopK(attention_k=1))


@torch.no_grad()
def log_likelihood(converted: Converted, context: list[int], continuation: list[int]) -> float:
    """Sum of the log-probabilities of the tokens of a continuation, without padding."""
    model = converted.model
    if model.config.is_encoder_decoder:
        logits = model(input_ids=torch.tensor([context]), labels=torch.tensor([continuation])).logits[0]
    else:
        logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum())


def of_choices(converted: Converted) -> list[list[float]]:
    tokenizer = converted.tokenizer
    found = []
    for row in ROWS:
        context = CONTEXT.format(**row)
        begun = tokenizer(context)["input_ids"]
        if converted.model.config.is_encoder_decoder:
            ends = [tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in row["choices"]]
        else:
            ends = [tokenizer(f"{context} {choice}")["input_ids"][len(begun) :] for choice in row["choices"]]
        found.append([log_likelihood(converted, begun, end) for end in ends])
    return found


def word_perplexity(converted: Converted) -> float:
    tokenizer = converted.tokenizer
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    total = sum(log_likelihood(converted, [first], tokenizer(row["text"])["input_ids"]) for row in ROWS)
    return math.exp(-total / sum(len(row["text"].split()) for row in ROWS))


def answered(run: Path, task: str, label: str) -> list:
    return [line["prediction"] for line in read_lines(run / "predictions" / "lm_eval" / f"{task}.{label}.jsonl")]


def settings_of(tasks: Path, **options) -> EvaluationSettings:
    return EvaluationSettings(lm_eval=("own_*",), include_path=str(tasks), baseline=True, batch_size=4, **options)


def test_scores_of_lm_eval_are_those_of_the_graft_beside_the_dense_model(tasks, tmp_path):
    converted, run = decoder(), tmp_path / "run"
    results = evaluate(converted, settings=settings_of(tasks), run=run)
    right = {}
    for label, model in (("converted", converted), ("dense", load(shipped_model("decoder"), dtype="float32"))):
        expected = of_choices(model)
        # contexts and choices of different lengths, which lm-eval pads in batches
        found = [[score for score, _ in pairs] for pairs in answered(run, "own_choices", label)]
        assert found == [pytest.approx(row, abs=1e-3) for row in expected]
        right[label] = [float(row.index(max(row)) == one["answer"]) for row, one in zip(expected, ROWS, strict=True)]
        accuracy = sum(right[label]) / len(ROWS)
        assert results.scores("lm_eval/own_choices", label)["acc"] == pytest.approx(accuracy)
        perplexity = results.scores("lm_eval/own_rolling", label)["word_perplexity"]
        assert perplexity == pytest.approx(word_perplexity(model), rel=1e-3)
        prompt = torch.tensor([model.tokenizer(CONTEXT.format(**ROWS[3]))["input_ids"]])
        tokens = model.model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
        text = model.tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0]
        assert answered(run, "own_generate", label)[3] == [text]
    assert right["converted"] != right["dense"]

    compared = {(row.task, row.metric): row for row in results.comparisons}
    assert len(compared) == 3
    accuracy = compared["lm_eval/own_choices", "acc"]
    expected = paired_bootstrap(right["converted"], right["dense"])
    assert accuracy.difference == pytest.approx(expected["difference"])
    assert (accuracy.low, accuracy.high, accuracy.p_value) == (expected["low"], expected["high"], expected["p_value"])
    perplexity = compared["lm_eval/own_rolling", "word_perplexity"]
    assert perplexity.low < perplexity.difference < perplexity.high
    assert (accuracy.higher_is_better, perplexity.higher_is_better) == (True, False)
    assert Results.read(run / "results.json").comparisons == results.comparisons

    report(run)
    page = (run / "report.md").read_text()
    assert f"| lm_eval/own_choices | acc | higher | converted | {accuracy.value:.4g} |" in page
    assert [row["p_value"] for row in records_of(results) if "p_value" in row and row["p_value"] != "–"] == [
        round(row.p_value, 4) for row in results.comparisons
    ]


def test_every_point_of_a_sweep_is_compared_with_the_dense_point(tasks, tmp_path):
    points = [{"method.attention_k": k} for k in (1, None, 4)]
    settings = EvaluationSettings(lm_eval=("own_choices",), include_path=str(tasks), limit=2)
    results = sweep(decoder(), points, settings, run=tmp_path)
    assert [row.label for row in results.comparisons] == ["attention_k=1", "attention_k=4"]
    assert [row.baseline for row in results.comparisons] == ["dense", "dense"]
    assert Results.read(tmp_path / "results.json").comparisons == results.comparisons
    again = evaluate(decoder(), settings=settings, run=tmp_path, name="attention_k=1")
    assert again.comparisons == ()
    assert [row.label for row in Results.read(tmp_path / "results.json").comparisons] == ["attention_k=4"]


def test_what_lm_eval_cannot_score_is_refused_with_the_reason(tasks):
    from graftwork.pipeline.harness.model import GraftLM

    with pytest.raises(ConfigError, match="Found no run"):
        GraftLM()
    with pytest.raises(ConfigError, match="Found peft, pretrained in the arguments of the model type graftwork"):
        GraftLM(run="runs/a", pretrained="a", peft="b")
    with pytest.raises(ConfigError, match="there is no such folder"):
        GraftLM(run="./nowhere")
    with pytest.raises(ConfigError, match=r"regrad answers every question in its own way.* --task"):
        GraftLM(convert(load(shipped_model("decoder")), ReGrad(rank=2)))
    with pytest.raises(ConfigError, match="RobertaForMaskedLM is no language model"):
        GraftLM(load(shipped_model("encoder")))


def test_unknown_tasks_of_lm_eval_are_refused_before_a_model_is_loaded(tasks, tmp_path):
    with pytest.raises(ConfigError, match="Found no folder"):
        check_lm_eval(EvaluationSettings(lm_eval=("x",), include_path=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"Found no file .*none\.yaml"):
        check_lm_eval(EvaluationSettings(lm_eval=(str(tmp_path / "none.yaml"),)))
    broken = tasks.parent / "broken"
    broken.mkdir()
    (broken / "broken.yaml").write_text((tasks / "choices.yaml").read_text().replace("rows.jsonl", "lost.jsonl"))
    with pytest.raises(ConfigError, match=r"Cannot load the task .* of lm-eval: .*lost\.jsonl"):
        evaluate(decoder(), settings=EvaluationSettings(lm_eval=(str(broken / "broken.yaml"),)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_fewshot": 2, "tasks": ("cos_e",)}, "num_fewshot is 2, which has an effect on tasks of lm-eval only"),
        ({"lm_eval": ("x",), "num_fewshot": -1}, "num_fewshot is -1. Expected"),
        ({"lm_eval": ("x",), "max_new_tokens": 5}, "max_new_tokens is 5, which has no effect on tasks of lm-eval"),
        ({"lm_eval": ("x",), "input_field": "a"}, "input_field is a, which has no effect on tasks of lm-eval"),
    ],
)
def test_settings_without_effect_on_the_tasks_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationSettings(**settings)
    if "max_new_tokens" in settings:
        assert EvaluationSettings(**settings, tasks=("cos_e",)).max_new_tokens == 5


@pytest.mark.long
def test_a_name_close_to_one_of_the_tasks_of_lm_eval_is_suggested(tasks):
    with pytest.raises(ConfigError, match=r"Unknown task of lm-eval 'helaswag'. Did you mean 'hellaswag'\?"):
        check_lm_eval(EvaluationSettings(lm_eval=("helaswag",)))
    check_lm_eval(EvaluationSettings(lm_eval=("mmlu_anatomy", "hellaswag")))


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="the package is not run from its repository")
@pytest.mark.parametrize("base", ["decoder", "encoder_decoder"])
def test_the_command_of_lm_eval_scores_a_run_by_its_model_type_and_by_path(base, tasks, tmp_path):
    method = TopK(attention_k=1) if base == "decoder" else TopK(feed_forward_k=16)
    converted = convert(load(shipped_model(base), dtype="float32"), method)
    run = converted.save(tmp_path / "run")
    evaluate(converted, settings=settings_of(tasks, limit=5), run=tmp_path / "own")
    own = [[score for score, _ in pairs] for pairs in answered(tmp_path / "own", "own_choices", "converted")]
    assert own == [pytest.approx(row, abs=1e-3) for row in of_choices(converted)[:5]]
    dense = [[score for score, _ in pairs] for pairs in answered(tmp_path / "own", "own_choices", "dense")]
    assert own != [pytest.approx(row, abs=1e-3) for row in dense]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", entry_points(tmp_path))))}
    for model, arguments in (("graftwork", f"run={run},device=cpu"), ("hf", f"pretrained={run / 'model'}")):
        command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments]
        command += ["--tasks", "own_choices,own_rolling,own_generate", "--include_path", str(tasks), "--limit", "5"]
        command += ["--batch_size", "3", "--log_samples", "--output_path", str(tmp_path / model)]
        done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        for task in ("own_choices", "own_rolling", "own_generate"):
            [file] = (tmp_path / model).rglob(f"samples_{task}_*.jsonl")
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            found = sorted(lines, key=lambda line: line["doc_id"])
            for line, answers in zip(found, answered(tmp_path / "own", task, "converted"), strict=True):
                if task == "own_generate":
                    assert line["filtered_resps"] == answers
                    continue
                scores = [float(score[0] if isinstance(score, list) else score) for score in line["filtered_resps"]]
                assert scores == pytest.approx(
                    [pair[0] if isinstance(pair, list) else pair for pair in answers], abs=1e-3
                )
