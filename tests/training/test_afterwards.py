"""State after training: a model with its original dtype, and no lock or settings of a refused training."""

import pytest
import torch

from graftwork.core.example import Example, Examples
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save
from graftwork.methods.topk import TopK
from graftwork.pipeline import training as pipeline
from graftwork.pipeline.loading import load
from graftwork.pipeline.training import train_phases
from graftwork.settings.training import TrainingSettings
from tiny_models import padded_batch, tiny_model, word_tokenizer

ROWS = tuple(Example(str(number), "w4 w9 w30", "w5 w6") for number in range(4))
EXAMPLES = [Examples("words", "train", ROWS, len(ROWS), 0, "here")]


def start(name="t5"):
    return convert(tiny_model(name, dtype=torch.float32), TopK(feed_forward_k=6), tokenizer=word_tokenizer())


def train(converted, folder, **changes):
    settings = TrainingSettings(tasks=("words",), max_steps=1, **changes)
    return train_phases(converted, settings, EXAMPLES, RunFolder(folder), seed=0, overwrite=False)[0]


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_model_trained_in_bfloat16_is_restored_to_its_dtype_and_loads(tmp_path, name):
    trained = train(start(name), tmp_path, bf16=True)
    assert "forward" not in vars(trained.model)
    assert "_original_forward" not in vars(trained.model)
    save(trained, tmp_path / "saved")
    batch = padded_batch(name)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "saved").model(**batch).logits, trained.model(**batch).logits)


def test_a_patched_forward_is_kept_after_training_in_bfloat16(tmp_path):
    converted = start()
    own = converted.model.forward
    converted.model.forward = lambda *words, **options: own(*words, **options)
    kept = converted.model.forward
    assert train(converted, tmp_path, bf16=True).model.forward is kept


def test_a_locked_run_folder_is_refused_and_unchanged(tmp_path):
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text('{"input": "w4 w9", "target": "w5"}\n' * 4)
    settings = TrainingSettings(tasks=(str(rows),), max_steps=1)
    with RunFolder(run).training(), pytest.raises(ConfigError, match="Another process is training in"):
        pipeline.train(start(), settings, run=run)
    assert {file.name for file in run.iterdir()} <= {"train.lock"}
    pipeline.train(start(), settings, run=run)


def test_a_training_refused_before_its_first_step_does_not_block_another(tmp_path):
    with pytest.raises(ConfigError, match="no_such"):
        train(start(), tmp_path, arguments={"no_such": 1})
    train(start(), tmp_path)
    with pytest.raises(ConfigError, match="contains a training with another train"):
        train(start(), tmp_path, learning_rate=1.0)
