"""Loading with varied settings."""

from __future__ import annotations

import pytest

from graftwork.grafting.converted import Converted
from graftwork.methods.topk import TopK
from graftwork.pipeline import start
from tiny_models import tiny_model

PLACING = {"dtype": "float32", "device": "cpu", "device_map": {"": "cpu"}}
OPTIONS = {"strict": True, "random_weights": True, **PLACING}


@pytest.fixture
def calls(monkeypatch):
    found = []

    def load(path, **options):
        found.append((path, options))
        return Converted(tiny_model("t5"), methods=(TopK(feed_forward_k=4),))

    monkeypatch.setattr(start, "load", load)
    return found


def test_loading_as_recorded_receives_every_option(calls):
    start.load_varied("run", None, **OPTIONS)
    assert calls == [("run", OPTIONS)]


def test_loading_with_another_setting_replaces_the_recorded_method(calls):
    start.load_varied("run", {"feed_forward_k": 2}, **OPTIONS)
    (_, recorded), (_, varied) = calls
    # differences to the recorded method are expected while it is read, and refused afterwards
    assert recorded == {"random_weights": True, **PLACING}
    (method,) = varied.pop("methods")
    assert method.config.feed_forward_k == 2
    assert varied == OPTIONS
