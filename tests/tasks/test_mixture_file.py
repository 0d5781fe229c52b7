"""Mixture files: members by path, their shares, evaluation of each, and what is refused."""

import json
from pathlib import Path

import pytest

from graftwork.errors import ConfigError, UnknownNameError
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import check_tasks, evaluated_tasks, explained_tasks, load_training, load_validation
from graftwork.tasks.own_data.mixture_file import read_mixture_file


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()
    for name, count in (("few", 8), ("many", 24)):
        rows = [{"text": f"{name} {n}", "label": ("bad", "good")[n % 2], "why": "it is"} for n in range(count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = f"name: {name}\nsource: ../{name}.jsonl\ntext_field: text\nlabel_field: label\nexplanation_field: why\n"
        Path(f"tasks/{name}.task.yaml").write_text(own + ("validation: 0.25\nexplanations: 3\n" * (name == "few")))

    def write(rates):
        Path("tasks/both.mixture.yaml").write_text(json.dumps({"name": "both", "rates": rates}))
        return "tasks/both.mixture.yaml"

    return write


BOTH = {"few.task.yaml": "size", "many.task.yaml": 18, "esnli_eval_v010": 0}


def test_members_are_sampled_by_their_rates_and_keep_their_explanations(mixture):
    path = mixture(BOTH)
    check_tasks([path], None)
    assert read_mixture_file(path).rates == {f"tasks/{n}" if "." in n else n: rate for n, rate in BOTH.items()}
    settings = TrainingSettings(mixture=path)
    data = load_training(settings, None, 0)
    assert data.shares == pytest.approx({"few": 6 / 24, "many": 18 / 24})
    few, many = data.examples
    assert (len(few.rows), len(many.rows)) == (6, 24)
    assert sum(row.input.startswith("explain ") for row in few.rows) == 3
    assert [len(part.rows) for part in load_validation(settings, None, 0)] == [2]
    assert [own.name for own in explained_tasks(settings, 0)] == ["few", "many"]
    mixed = load_training(TrainingSettings(mixture=path, mixing_maximum=2), None, 0)
    assert mixed.shares == pytest.approx({"few": 2 / 20, "many": 18 / 20})
    # a mixture file is a task of a training and of an evaluation too
    assert load_training(TrainingSettings(tasks=(path,)), None, 0).shares == data.shares
    members = ["tasks/few.task.yaml", "tasks/many.task.yaml"]
    assert evaluated_tasks(path, "train") == members
    assert evaluated_tasks(path, "validation") == [*members, "esnli_eval_v010"]


def test_missing_members_and_other_files_are_one_line(mixture):
    with pytest.raises(ConfigError, match=r"found no task file tasks.gone.task.yaml"):
        read_mixture_file(mixture({"gone.task.yaml": 1}))
    with pytest.raises(UnknownNameError, match="gone"):
        check_tasks([mixture({"gone": 1})], None)
    with pytest.raises(ConfigError, match="found no name or no rates"):
        read_mixture_file(mixture({}))
    with pytest.raises(ConfigError, match="Found no mixture file nowhere"):
        read_mixture_file("nowhere.mixture.yaml")
    with pytest.raises(ConfigError, match=r"mixing_temperature is 2.0, which has no effect on mixture both"):
        load_training(
            TrainingSettings(mixture=mixture({"few.task.yaml": 1, "many.task.yaml": 2}), mixing_temperature=2.0),
            None,
            0,
        )
