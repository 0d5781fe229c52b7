"""Proportions of mixtures and packed rows against the definitions of seqio, written out."""

import json
import random
from itertools import islice

import pytest

from graftwork.core.example import Example
from graftwork.errors import ConfigError
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import load_training
from graftwork.tasks.task import Mixture, SizeRate
from graftwork.training import sampling
from graftwork.training.encoding import EncodedExamples
from graftwork.training.packing import DECODER_SEGMENTS, SEGMENTS, PackBatch, PackedExamples
from graftwork.training.sampling import MixtureSchedule, PackedSampler
from tiny_models import PAD, word_tokenizer


def mixing_rate(size, maximum=None, temperature=1.0):
    """Definition of seqio's `mixing_rate_num_examples`."""
    rate = float(size)
    if maximum:
        rate = min(rate, maximum)
    if temperature != 1.0:
        rate = rate ** (1.0 / temperature)
    return rate


@pytest.mark.parametrize("maximum", [None, 1000, 2**19])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 100.0])
def test_proportions_are_those_of_seqio(maximum, temperature):
    sizes = {"a": 400, "b": 5000, "c": 2_000_000}
    rates = {name: mixing_rate(size, maximum, temperature) for name, size in sizes.items()}
    expected = {name: rate / sum(rates.values()) for name, rate in rates.items()}
    found = Mixture("m", dict.fromkeys(sizes, "size"), sized=SizeRate(maximum, temperature)).proportions(sizes)
    assert found == pytest.approx(expected)
    # numbers stay as they are beside rates by size
    found = Mixture("m", {"a": "size", "b": 250.0}, sized=SizeRate(maximum, temperature)).proportions(sizes)
    assert found["b"] == pytest.approx(250 / (250 + mixing_rate(400, maximum, temperature)))


@pytest.fixture
def files(tmp_path):
    paths = []
    for name, count in (("small", 4), ("large", 64)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"input": f"q {n}", "output": f"a {n}"}) + "\n" for n in range(count)))
        paths.append(str(path))
    return tuple(paths)


FIELDS = {"input_field": "input", "target_field": "output"}


def test_several_tasks_are_mixed_by_the_settings(files):
    def shares(**options):
        return load_training(TrainingSettings(tasks=files, **FIELDS, **options), None, 0).shares

    assert shares() is None
    assert shares(mixing_temperature=2.0) == pytest.approx({"small": 2 / 10, "large": 8 / 10})
    assert shares(mixing_maximum=12) == pytest.approx({"small": 4 / 16, "large": 12 / 16})
    with pytest.raises(ConfigError, match="mixing_maximum is 12, which has no effect on the task small alone"):
        load_training(TrainingSettings(tasks=files[:1], mixing_maximum=12, **FIELDS), None, 0)
    with pytest.raises(ConfigError, match=r"mixing_temperature is -1.0. Expected a number above 0"):
        TrainingSettings(tasks=files, mixing_temperature=-1.0)


def examples(count=40):
    generator = random.Random(0)

    def words(most):
        return " ".join(f"w{generator.randrange(4, 60)}" for _ in range(generator.randint(1, most)))

    return [Example(str(number), words(7), words(4)) for number in range(count)]


ROOM = {"inputs": 16, "targets": 12}


def seqio_packed(rows):
    """Definition of seqio's packing: next fit, ids of the sequences from 1, positions from 0, zeros at the end."""
    packed, partial, count = [], None, 0
    for row in [*rows, None]:
        fits = partial is not None and row is not None
        fits = fits and all(len(partial[key]) + len(row[key]) <= room for key, room in ROOM.items())
        if not fits:
            if partial is not None:
                for key, room in ROOM.items():
                    for name in (key, f"{key}_segment_ids", f"{key}_positions"):
                        partial[name] += [0] * (room - len(partial[name]))
                packed.append(partial)
            partial, count = {f"{key}{end}": [] for key in ROOM for end in ("", "_segment_ids", "_positions")}, 0
        if row is None:
            return packed
        count += 1
        for key in ROOM:
            partial[key] += row[key]
            partial[f"{key}_segment_ids"] += [count] * len(row[key])
            partial[f"{key}_positions"] += range(len(row[key]))
    raise AssertionError


def autoregressive(targets, segments):
    """Definition of seqio's `make_autoregressive_inputs`: shifted by one, 0 at the beginning of every sequence."""
    shifted, before = [0, *targets[:-1]], [0, *segments[:-1]]
    return [token if own == last else 0 for token, own, last in zip(shifted, segments, before, strict=True)]


def test_packed_rows_are_those_of_seqio(monkeypatch):
    # one open row is seqio's next fit; more waste less space
    monkeypatch.setattr(sampling, "OPEN_ROWS", 1)
    rows = examples()
    data = EncodedExamples(rows, word_tokenizer(), encoder_decoder=True, max_input_tokens=16, max_target_tokens=12)
    schedule = MixtureSchedule([len(rows)], [1.0], seed=0)
    order = schedule[0 : len(rows)]
    expected = seqio_packed([{"inputs": data[i]["input_ids"], "targets": data[i]["labels"]} for i in order])
    sampler = PackedSampler(schedule, data.lengths(), tuple(ROOM.values()))
    packs = [row for row, *_ in islice(sampler._rows(0, []), len(expected) - 1)]
    assert [index for pack in packs for index in pack] == order[: sum(map(len, packs))]
    for pack, theirs in zip(packs, expected, strict=False):
        ours = PackedExamples(data, PAD)[pack]
        size, room = len(ours["input_ids"]), len(ours["labels"])
        assert ours["input_ids"] == theirs["inputs"][:size]
        assert ours[SEGMENTS] == theirs["inputs_segment_ids"][:size]
        assert ours["labels"] == theirs["targets"][:room]
        assert ours[DECODER_SEGMENTS] == theirs["targets_segment_ids"][:room]
        shifted = autoregressive(theirs["targets"], theirs["targets_segment_ids"])
        assert ours["decoder_input_ids"] == shifted[:room]
        assert not any(theirs["inputs_segment_ids"][size:] + theirs["targets_segment_ids"][room:])
    decoder = EncodedExamples(rows, word_tokenizer(), encoder_decoder=False, max_input_tokens=16, max_target_tokens=12)
    row = PackedExamples(decoder, None)[packs[0]]
    assert row["position_ids"] == [place for i in packs[0] for place in range(len(decoder[i]["input_ids"]))]
    batch = PackBatch(PAD)([PackedExamples(data, PAD)[pack] for pack in packs])
    assert batch["labels"][batch[DECODER_SEGMENTS] == 0].unique().tolist() in ([-100], [])
