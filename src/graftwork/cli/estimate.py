"""Verb `estimate`: the memory of training and inference, before either starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from graftwork.core.messages import say, show
from graftwork.errors import ConfigError
from graftwork.grafting.commands import Assignments, Dtype, Json


def estimate(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id, model folder or config.json (no weights are needed), run folder, recipe or YAML file, or one "
            "of: roberta-base, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, t5-base, t5-3b, t5-11b."
        ),
    ],
    method: Annotated[
        str | None, typer.Argument(help="Method; `graftwork list` names them. Only the untouched model by default.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file with sections method, train and evaluate.")] = None,
    assignments: Assignments = None,
    device: Annotated[str, typer.Option(help="Type of device to estimate for: cuda or cpu.")] = "cuda",
    dtype: Dtype = None,
    classes: Annotated[
        int | None, typer.Option(help="Number of classes of an encoder's classification head.", min=2)
    ] = None,
    passages: Annotated[int, typer.Option(help="Number of passages in bank and index.", min=0)] = 0,
    passage_tokens: Annotated[int, typer.Option(help="Number of tokens of one passage.", min=2)] = 256,
    fit: Annotated[
        str | None, typer.Option(help="Memory of a device, such as 24GB: propose the largest batch that fits.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Add the untouched model, trained in full and with LoRA.")] = True,
    json: Json = False,
    settings: Any = None,
) -> None:
    """Estimate the memory of training and inference by running the real code without weights and without a device."""
    from graftwork.pipeline.estimation.estimate import Estimator, Shape
    from graftwork.pipeline.estimation.fitting import fit as largest
    from graftwork.pipeline.estimation.fitting import parse_bytes
    from graftwork.pipeline.estimation.plans import plan_of

    if device not in ("cuda", "cpu"):
        raise ConfigError(f"device is {device!r}. Expected cuda or cpu.")
    plan = plan_of(model, method, config, assignments or [], settings or {})
    labels = plan.labels if classes is None else tuple(map(str, range(classes)))
    estimator = Estimator(plan.model, Shape(device, dtype or plan.dtype, labels, passage_tokens))
    rows = plan.rows(estimator, passages, compare=compare)
    found = None if fit is None else largest(estimator, plan.methods, plan.train, parse_bytes(fit))
    if json:
        show({"rows": [row.plain() for row in rows], "fit": None if found is None else found.plain()}, as_json=True)
        return
    show([_line(row.plain()) for row in rows], as_json=False)
    say(f"GB (10⁹ bytes), estimated for {device}; a CUDA context, workspaces and fragmentation come on top.")
    if found is not None:
        sections = {"train": found.settings, "method": found.method}
        proposal = " ".join(
            f"--set {section}.{name}={str(value).lower()}"
            for section, values in sections.items()
            for name, value in values.items()
        )
        if found.needs:
            say(f"Does not fit into {fit}: one row needs {found.peak / 1e9:.2f} GB. Needed: {found.needs}.")
        else:
            say(f"Fits into {fit} with batches of up to {found.batch} ({found.peak / 1e9:.2f} GB): {proposal}")


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table, in GB."""
    training: Mapping[str, int] = row["training"] or {}
    inference: Mapping[str, int] = row["inference"] or {}
    line: dict[str, Any] = {
        "model": row["name"],
        "parameters": f"{row['parameters'] / 1e6:.1f}M",
        "phase": row["phase"],
    }
    for name in ("weights", "gradients", "optimizer", "other", "activations", "peak"):
        line[f"train {name}" if name == "peak" else name] = _gigabytes(training.get(name))
    line |= {"cache": _gigabytes(inference.get("cache")), "inference peak": _gigabytes(inference.get("peak"))}
    return line | {place: _gigabytes(size) for place, size in row["stored"].items()}


def _gigabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f}"
