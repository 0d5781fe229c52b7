"""The probe of a saved model."""

from __future__ import annotations

import torch

from graftwork.grafting.converted import Converted, probe_model
from tiny_models import tiny_model


def test_the_probe_input_is_the_one_of_saved_models(monkeypatch):
    # manifests store the output for this input; another input makes every saved model look changed
    model, seen = tiny_model("t5", dtype=torch.float32), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **batch: seen.append(batch) or forward(**batch))
    probe = probe_model(model)
    (batch,) = seen
    expected = [(7 * position + 3) % model.config.vocab_size for position in range(batch["input_ids"].shape[1])]
    assert batch["input_ids"].tolist() == [expected]
    assert batch["decoder_input_ids"].tolist() == [expected[:4]]
    with torch.no_grad():
        logits = forward(**batch).logits.reshape(-1)
    assert probe["values"][0] == float(f"{logits[0]:.6g}")
    assert probe["values"][-1] == float(f"{logits[-1]:.6g}")


def test_a_converted_model_is_shown_without_its_folder(tmp_path):
    from graftwork.core.run_folder import RunFolder

    shown = repr(Converted(tiny_model("t5"), folder=RunFolder(tmp_path)))
    assert str(tmp_path) not in shown
