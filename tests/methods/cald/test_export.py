"""Export of a converted encoder to ONNX with dynamic batch size and length."""

import numpy as np
import pytest
import torch

from graftwork.grafting.conversion import convert
from graftwork.methods.cald import Cald
from methods.cald.test_method import ids, logits, tiny

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

POSITIONS = 66


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"share": "layer", "initialization": "segment_mean"}])
def test_an_exported_student_equals_the_model_for_every_batch_size_and_length(settings, tmp_path):
    model = convert(tiny(), Cald(rank=8, **settings)).model
    example = ids(9, 5)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=POSITIONS - 2)
    torch.onnx.export(
        model,
        (),
        tmp_path / "student.onnx",
        kwargs=example,
        dynamo=True,
        verbose=False,
        dynamic_shapes={name: {0: batch, 1: length} for name in example},
        output_names=["logits"],
    )
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    for inputs in (ids(9, 5), ids(10, 10), ids(33, 12, 2, 1), ids(5, to=8), ids(7, 3, side="left")):
        found = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0]
        np.testing.assert_allclose(found, logits(model, inputs).numpy(), rtol=0, atol=1e-4)
