"""Configuration: parsing, validation, merging and round trips."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from graftwork.core.config import (
    build,
    field_docs,
    merge,
    parse_assignments,
    parse_sweep,
    parse_value,
    read_yaml,
    to_plain,
    write_yaml,
)
from graftwork.errors import ConfigError
from graftwork.methods.topk.config import TopKConfig
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, label, load_recipe, write_run
from graftwork.settings.training import TrainingSettings


@dataclass(frozen=True)
class Inner:
    size: int = 1
    """Number of items."""


@dataclass(frozen=True)
class Outer:
    name: str
    """Name of the item,
    over two lines."""
    rate: float | None = None
    """Fraction of items."""
    words: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


CONFIGURATIONS = [
    TopKConfig(feed_forward_k=0.5, stacks=("encoder",), layers="0-3"),
    EvaluationSettings(tasks=("a",), cost_lengths=(1, 2), lowercase=True),
    TrainingSettings(tasks=("a",), lora={"r": 8, "target_modules": ["q"]}, lowercase=True),
    RunConfig(model="m", method={"name": "topk"}, over={"method.feed_forward_k": (None, 8)}),
]


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: type(config).__name__)
def test_configurations_round_trip_through_a_file(config, tmp_path):
    write_yaml(tmp_path / "config.yaml", config)
    again = build(type(config), read_yaml(tmp_path / "config.yaml"), where="file")
    assert to_plain(again) == to_plain(config)


@pytest.mark.parametrize("cls", [TopKConfig, EvaluationSettings, TrainingSettings, RunConfig])
def test_every_setting_has_help(cls):
    assert set(field_docs(cls)) == set(cls.__dataclass_fields__)


def test_help_texts_are_joined_to_one_line():
    assert field_docs(Outer)["name"] == "Name of the item, over two lines."


def test_unknown_keys_are_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"Unknown key 'nme' in a test. Did you mean 'name'\?"):
        build(Outer, {"nme": "x"}, where="a test")
    with pytest.raises(ConfigError, match=r"Unknown key 'sise' in inner of a test. Did you mean 'size'\?"):
        build(Outer, {"name": "x", "inner": {"sise": 1}}, where="a test")


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="Missing name in a test"):
        build(Outer, {}, where="a test")


@pytest.mark.parametrize(
    ("key", "value"), [("name", 3), ("rate", "high"), ("rate", True), ("words", "one"), ("words", [1]), ("inner", 4)]
)
def test_values_of_a_wrong_type_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key} in a test"):
        build(Outer, {"name": "x", key: value}, where="a test")


def test_integers_are_valid_floats_but_strings_are_not_valid_integers():
    assert build(Outer, {"name": "x", "rate": 1}, where="").rate == 1.0
    with pytest.raises(ConfigError, match="12"):
        build(Inner, {"size": "12"}, where="")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("null", None),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("12", 12),
        ("word", "word"),
        ("-1", -1),
        ("inf", float("inf")),
    ],
)
def test_command_line_values_are_parsed_as_yaml(text, value):
    assert parse_value(text, "") == value


def test_a_command_line_value_that_is_no_yaml_is_refused():
    with pytest.raises(ConfigError, match=r"'a.b=\[1, 2' is not readable as YAML .*Put it in quotes"):
        parse_assignments(["a.b=[1, 2"])


def test_assignments_nest_and_later_ones_win():
    assert parse_assignments(["a.b=1", "a.c=x", "a.b=2"]) == {"a": {"b": 2, "c": "x"}}
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        parse_assignments(["a.b"])


def test_sweeps_parse_null_as_none():
    assert parse_sweep(["method.feed_forward_k=null,256,0.5"]) == {"method.feed_forward_k": [None, 256, 0.5]}


def test_merge_recurses_into_mappings_and_replaces_lists():
    assert merge({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}}


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "word"])
def test_files_without_a_mapping_are_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        read_yaml(tmp_path / "x.yaml")


def test_sweep_points_are_all_combinations_with_readable_labels():
    config = RunConfig(model="m", method={"name": "topk"}, over={"method.feed_forward_k": (None, 8), "seed": (0, 1)})
    assert [label(point) for point in config.points()] == [
        "dense,seed=0",
        "dense,seed=1",
        "feed_forward_k=8,seed=0",
        "feed_forward_k=8,seed=1",
    ]
    assert config.at(config.points()[3]).method == {"name": "topk", "feed_forward_k": 8}


def test_run_files_can_be_loaded_as_recipes(tmp_path):
    config = RunConfig(model="m", method={"name": "topk"}, evaluate=EvaluationSettings(tasks=("a",)))
    write_run(tmp_path / "run.yaml", config)
    again = load_recipe(tmp_path / "run.yaml", {"seed": 3})
    assert (again.evaluate, again.seed) == (config.evaluate, 3)
    assert "torch" in again.versions
    assert load_recipe(Path(tmp_path)).evaluate == config.evaluate


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 0},
        {"max_steps": -2},
        {"learning_rate": 0.0},
        {"bf16": True, "fp16": True},
        {"take": 0},
        {"save_steps": 0},
    ],
)
def test_invalid_training_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        TrainingSettings(**settings)


UNUSABLE_YAML = {
    "an alias of its own parent": (b"train: &a [*a]", r"train\[0\] is an alias of a value that contains it"),
    "NUL": (b'model: "a\\0"', "model contains a NUL character"),
    "half a character": (b'data: {a: "\\ud800"}', r"data\.a contains half a character"),
    "bytes": (b"model: !!binary aGk=", "model is a bytes"),
    "a set": (b"model: !!set {a}", "model is a set"),
    "a key that is no name": (b"2024-01-01: !!timestamp 2024-01-01", "is a date"),
    "a tag that does not fit": (b'seed: !!int ""', "not readable as YAML"),
    "depth": (b"model: " + b"[" * 5000, "nested too deeply"),
    "digits": (b"seed: " + b"9" * 5000, "too many digits"),
    "expanded aliases": (
        b"a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
        b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n",
        "more than 100000 values",
    ),
    "another encoding": ("model: é".encode("latin-1"), "line 1: found byte 0xe9; expected UTF-8"),
    "text for settings": (b"model: m\ntrain: ''", "is ''. Expected keys and values"),
}


@pytest.mark.parametrize("name", UNUSABLE_YAML)
def test_unusable_yaml_names_file_and_field(name, tmp_path):
    content, message = UNUSABLE_YAML[name]
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"run\.yaml.*{message}|{message}.*run\.yaml"):
        load_recipe(tmp_path / "run.yaml")


def test_dates_are_text(tmp_path):
    (tmp_path / "x.yaml").write_text("a: 2024-01-01\nb: 2024-13-45\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": "2024-01-01", "b": "2024-13-45"}
    assert parse_value("2024-01-01", "x") == "2024-01-01"
