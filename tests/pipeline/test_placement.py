"""Every command and function that loads a model asks the owner of placement, seen with a fake accelerator."""

from __future__ import annotations

import pytest
import transformers

import graftwork
from graftwork.cli.app import command_line, run
from graftwork.core import devices
from graftwork.errors import ConfigError
from graftwork.methods.regrad.encoding import building
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.training import TrainingSettings

HELD_OUT = "--task world/facts --data WORLD"
COMMANDS = {
    "convert": "convert regrad MODEL --dry-run",
    "train": f"train RUN {HELD_OUT} --max-steps 1",
    "evaluate": f"evaluate RUN {HELD_OUT}",
    "predict": "predict RUN -i INPUT",
    "run": "run RUN --set evaluate.tasks=[world/facts] --data WORLD",
    "bank build": "bank build RUN CORPUS",
    "bank add": "bank add BANK RUN --id a --text b",
    "bank pairs": "bank pairs RUN CORPUS -o PAIRS",
    "calibrate": f"calibrate MODEL {HELD_OUT}",
    "graphs": f"graphs RUN {HELD_OUT}",
    "serve": "serve RUN --port 0 --no-page",
    "doctor": "doctor RUN --drift 1",
}
"""A call of every command that loads a model to run it."""
WITHOUT_MAP = {"bank adapter", "demo", "estimate"}
"""Commands with --device and no map: an adapter is computed on one device, models of the demo are placed by
`default_device`, and an estimate loads none."""


class LoadedError(ConfigError):
    """Raised in place of loading a model."""


@pytest.fixture
def asked(monkeypatch):
    """Options of every model that is loaded, on a machine with two accelerators of a kind that torch does not know."""
    found = []

    def loading(cls, name, *args, **options):
        found.append((options.get("device_map"), options["dtype"]))
        raise LoadedError("stopped before loading")

    monkeypatch.setattr(devices, "accelerators", lambda: ("fake:0", "fake:1"))
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loading))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from graftwork.demo.offline import shipped_model

    folder = tmp_path_factory.mktemp("placement")
    (folder / "INPUT").write_text("a\n")
    (folder / "CORPUS.tsv").write_text("id\ttext\ttitle\n1\ta b c\tt\n")
    model = shipped_model("decoder")
    assert run(["convert", "regrad", model, "-o", str(folder / "RUN"), "--rank", "2", "--device", "cpu"]) == 0
    (folder / "BANK").mkdir()
    return folder, str(model)


def words(line, place, world):
    folder, model = place
    known = {"MODEL": model, "WORLD": str(world / "unifiedqa"), "CORPUS": str(folder / "CORPUS.tsv")}
    return [known.get(word, str(folder / word) if word.isupper() else word) for word in line.split()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_places_its_model(name, place, offline_world, asked, monkeypatch):
    monkeypatch.setattr(building, "holds_bank", lambda folder: True)
    monkeypatch.setattr("graftwork.serving.launch.holds_bank", lambda folder: True)
    call = words(COMMANDS[name], place, offline_world)
    run(call)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    run([*call, "--dtype", "float32"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    run([*call, "--device", "cpu", "--dtype", "float32"])
    run([*call, "--device-map", "auto", "--dtype", "float32"])
    per_call = len(asked) // 4
    assert asked[::per_call] == [
        ({"": "fake:0"}, "bfloat16"),
        ({"": "fake:1"}, "float32"),
        (None, "float32"),
        ("auto", "float32"),
    ]


def test_the_commands_with_a_device_are_those_that_load_a_model():
    found, narrow = set(), set()

    def walk(command, path):
        for name, child in getattr(command, "commands", {}).items():
            walk(child, [*path, name])
        options = {option for parameter in command.params for option in parameter.opts}
        if "--device" in options:
            (found if {"--device-map", "--dtype"} <= options else narrow).add(" ".join(path))

    walk(command_line(["convert", "regrad"]), [])
    assert (found, narrow) == (set(COMMANDS), WITHOUT_MAP)


def test_every_function_places_its_model(place, offline_world, asked):
    folder, model = place
    data, settings = offline_world / "unifiedqa", EvaluationSettings(tasks=("world/facts",))
    calls = [
        lambda device: graftwork.load(folder / "RUN", device=device),
        lambda device: graftwork.load_model(model, device=device),
        lambda device: graftwork.evaluate(folder / "RUN", settings=settings, data=data, device=device),
        lambda device: graftwork.predict(folder / "RUN", ["a"], device=device),
        lambda device: graftwork.train(
            folder / "RUN", TrainingSettings(tasks=("world/facts",), max_steps=1), data=data, device=device
        ),
    ]
    for call in calls:
        for device in (None, "cpu"):
            with pytest.raises(LoadedError):
                call(device)
    assert asked == [({"": "fake:0"}, "bfloat16"), (None, "bfloat16")] * len(calls)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gpus_per_worker": 1.0}, {"device": "accelerator"}),
        ({"gpus_per_worker": 0.0}, {"device": "cpu"}),
        ({"gpus_per_worker": 0.5, "placing": {"device": "fake:1"}}, {"device": "fake:1"}),
        ({"gpus_per_worker": 2.0, "placing": {"device_map": "auto"}}, {"device_map": "auto"}),
    ],
)
def test_actors_place_their_model_on_what_is_reserved_for_them(options, expected, place, monkeypatch):
    folder, _ = place
    made = []

    class StoppedError(Exception):
        pass

    def encode_with_ray(load, *args, **settings):
        with pytest.raises(StoppedError):
            load()
        raise StoppedError

    class Encoder:
        def open_bank(self, folder, precision=None):
            return None

    def encoder_of(load, *args, placing, **settings):
        made.append(placing)
        if len(made) > 1:
            raise StoppedError
        return Encoder()

    monkeypatch.setattr(building, "encoder_of", encoder_of)
    monkeypatch.setattr(building, "encode_with_ray", encode_with_ray)
    monkeypatch.setattr(building, "count_missing", lambda *args: 0)
    with pytest.raises(StoppedError):
        building.build(
            None,
            str(folder / "RUN"),
            str(folder / "CORPUS.tsv"),
            None,
            precision=None,
            batch_size=1,
            tokens_per_batch=16,
            limit=None,
            workers=2,
            cpus_per_worker=1.0,
            compact=False,
            **options,
        )
    # this process formats and counts on its CPU
    assert made == [{"device": "cpu", "dtype": None}, expected]
