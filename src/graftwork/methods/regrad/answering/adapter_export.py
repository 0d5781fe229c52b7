"""The trained adapter, or the adapter after the update of a question, as an ordinary adapter folder of PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor

from graftwork.core.devices import Placing
from graftwork.core.messages import say
from graftwork.core.run_folder import RunFolder, is_path, is_run
from graftwork.errors import ConfigError
from graftwork.grafting.base_model import changed_weight, is_graft_folder, other_methods
from graftwork.grafting.commands import Loader, ModelLoader
from graftwork.grafting.converted import Converted, required_tokenizer
from graftwork.grafting.peft_folder import (
    LowRankChange,
    check_adapter_folder,
    check_linear,
    is_adapter_folder,
    write_peft_folder,
)
from graftwork.methods.regrad.answering.gradient_retrieval import GradientRetriever, default_strength
from graftwork.methods.regrad.bank.files import holds_bank
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.encoding.encoder import PassageEncoder
from graftwork.methods.regrad.modules import adapters, flat_adapter, layout
from graftwork.methods.regrad.text.prompting import PromptBuilder
from graftwork.methods.regrad.text.requests import PASSAGES, Question, RetrievedUpdate
from graftwork.retrieval import open_index
from graftwork.settings.recipe import read_run
from graftwork.surgery.sites import pretrained

if TYPE_CHECKING:
    from torch import nn

NO_QUESTION = "passages by id"
"""Text of a question that only names passages; nothing is retrieved for it."""


def export(
    load: Loader,
    load_model: ModelLoader,
    run: str,
    output: str,
    *,
    question: str | None = None,
    ids: Sequence[str] = (),
    bank: str | None = None,
    index: str | None = None,
    passages: int | None = None,
    strength: float | None = None,
    base: str | None = None,
    overwrite: bool = False,
    **placing: Unpack[Placing],
) -> dict[str, Any]:
    """Write the adapter of a run, after the update of a question or of passages if one of them is given.

    Args:
        load: Loads a run.
        load_model: Loads the pretrained model, which is compared with the weights in the run.
        run: Run folder of a model with ReGrad.
        output: Folder to write; new or empty.
        question: Question whose passages are retrieved as for an answer, unless `ids` names them.
        ids: Ids of passages.
        bank: The bank; that of the settings by default, else artifacts/bank in the run.
        index: Index to retrieve from; that of the settings by default.
        passages: Number of passages to retrieve; that of the settings by default.
        strength: Factor of the gradient step; that of the settings by default.
        base: Folder or hub id of the pretrained model; the one that the run started from by default.
        overwrite: Replace an adapter in the folder.
        placing: Device and data type of the model.

    Returns:
        Folder, base model, rank, passages and size of the update; for a question also its prompt.

    Raises:
        ConfigError: If an option has no effect, the base model has other weights, or there is no bank or index.
        UnsupportedModelError: If an adapted module is not an ordinary linear one.
    """
    _check_options(question, ids, {"bank": bank, "index": index, "passages": passages, "strength": strength})
    check_adapter_folder(Path(output), overwrite=overwrite)
    converted = load(run, **placing)
    config = next((one.config for one in converted.methods if isinstance(one.config, ReGradConfig)), None)
    if config is None:
        raise ConfigError(f"Found no regrad on the model in {run}. Convert it: graftwork convert regrad MODEL -o RUN.")
    model = converted.model
    check_linear({path: pretrained(model).get_submodule(path) for path in adapters(model)})
    name = _base(converted, run, base, load_model)
    update = None
    if question is not None or ids:
        update = _update(converted, config, run, question, ids, bank, index, passages, strength)
    done = write_adapter(model, config, Path(output), name, update, overwrite=overwrite)
    prompt = None
    if update is not None and question is not None:
        # the tokenizers of transformers are untyped
        tokenizer: Any = required_tokenizer(converted)
        builder = PromptBuilder(tokenizer, config, 2048, None)
        prompt = str(tokenizer.decode(builder.build(update.question, update.hits, 0)))
    say(f"Wrote {output}, an adapter for {name}")
    return {**done, **({} if prompt is None else {"prompt": prompt})}


def write_adapter(
    model: nn.Module,
    config: ReGradConfig,
    folder: Path,
    base: str,
    update: RetrievedUpdate | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the adapter θ*, or θ* + Δ after an update, as an adapter folder of PEFT.

    The step changes both matrices of a pair, so that the weight changes by s · (B + ΔB)(A + ΔA): the rank of the folder
    is that of the adapter, and the product is exact.

    Args:
        model: The converted model.
        config: Settings of the conversion.
        folder: Folder to write; new or empty.
        base: Folder or hub id of the pretrained model.
        update: Update of a question; None writes the trained adapter.
        overwrite: Replace an adapter in the folder.
    """
    flat: Tensor = flat_adapter(model).detach().cpu()
    if update is not None and update.delta is not None:
        flat = flat + update.delta.cpu()
    parts = layout(model).split(flat)
    changes = {path: LowRankChange(parts[f"{path}.lora_A"], parts[f"{path}.lora_B"]) for path in adapters(model)}
    used = () if update is None else update.used
    written = write_peft_folder(
        folder,
        model,
        changes,
        scaling=config.scaling,
        base=base,
        readme=_readme(base, used, update is not None),
        overwrite=overwrite,
    )
    return {
        "adapter": str(folder),
        "base": base,
        "rank": written["r"],
        "alpha": written["lora_alpha"],
        "modules": len(changes),
        "passages": list(used),
        "missing": [] if update is None else list(update.missing),
        "update_norm": 0.0 if update is None else round(update.update_norm, 6),
    }


def _check_options(question: str | None, ids: Sequence[str], given: dict[str, Any]) -> None:
    """Refuse options that only a question, or only retrieval, reads."""
    idle = [name for name, value in given.items() if value is not None]
    if ids:
        idle = [name for name in idle if name in ("index", "passages")]
    elif question is not None:
        idle = []
    if idle:
        needed = "leave it out beside --ids, which names the passages" if ids else "give --question or --ids as well"
        raise ConfigError(f"Found --{idle[0]}, which has no effect here; {needed}.")


def _base(converted: Converted, run: str, base: str | None, load_model: ModelLoader) -> str:
    """Folder or hub id of the pretrained model, after comparing its weights with those in the run."""
    if base is None:
        if not is_run(run):
            raise ConfigError(f"Found no record of the pretrained model beside {run}. Name it with --base.")
        base = read_run(RunFolder(run)).model
    if is_run(base):
        base = str(RunFolder(base).model)
    name = str(Path(base).resolve()) if is_path(base) or Path(base).exists() else base
    if is_adapter_folder(Path(name)):
        raise ConfigError(
            f"Found an adapter of PEFT as pretrained model, {name}, on which no second one can be loaded. Write the "
            "whole model (graftwork.load, then model.save_pretrained) and name it with --base."
        )
    others = other_methods(converted.model, "regrad")
    if others and not is_graft_folder(Path(name)):
        raise ConfigError(
            f"Found {', '.join(others)} on the model beside regrad, so that the adapter answers differently on the "
            f"dense model {name}. Name a folder with that graft as --base, or restore the other methods."
        )
    dtype = str(pretrained(converted.model).dtype).removeprefix("torch.")
    changed = changed_weight(converted.model, name, lambda: load_model(name, dtype=dtype, device="cpu")[0])
    if changed is not None:
        raise ConfigError(
            f"Found other weights in {run} than in {name} ({changed}), so that the adapter does not belong to that "
            "model. Write the run's own dense model (graftwork.restore, then save_pretrained) and name it with --base."
        )
    return name


def _update(
    converted: Converted,
    config: ReGradConfig,
    run: str,
    question: str | None,
    ids: Sequence[str],
    bank: str | None,
    index: str | None,
    passages: int | None,
    strength: float | None,
) -> RetrievedUpdate:
    """Update of a question, retrieved as for an answer."""
    location = bank or config.bank or RunFolder(run).artifacts / "bank"
    if not holds_bank(location):
        raise ConfigError(
            f"Found no gradient bank in {location}. Build one with `graftwork bank build`, or name another with --bank."
        )
    place = index or config.index
    if not ids and place is None:
        raise ConfigError("Found no index to retrieve passages from. Name one with --index, or passages with --ids.")
    encoder = PassageEncoder(converted.model, required_tokenizer(converted), config)
    with ExitStack() as opened:
        gradients = opened.enter_context(GradientBank(location))
        encoder.check(gradients)
        retriever = (
            None
            if place is None
            else open_index(place, config.backend if index is None else None, retriever=config.retriever)
        )
        asked = Question(
            question or NO_QUESTION,
            tuple(ids) or None,
            count=passages or config.passages or PASSAGES,
            strength=default_strength(config, gradients) if strength is None else strength,
            context=not config.blind and question is not None,
        )
        update = GradientRetriever(encoder, gradients, retriever, config.on_missing).retrieve([asked])[0]
    if not update.hits:
        say("Found no passage for the question; the adapter is the trained one, which also answers it in Graftwork.")
    if update.missing:
        say(f"Left out passages without a gradient: {', '.join(update.missing)}")
    return replace(update, delta=None if update.delta is None else update.delta.clone())


def _readme(base: str, used: Sequence[str], updated: bool) -> str:
    named = "" if is_path(base) or Path(base).exists() else f"base_model: {base}\n"
    what = "The trained adapter of ReGrad, without a gradient step."
    if updated:
        what = "The adapter of ReGrad after one gradient step on these passages: " + (
            ", ".join(f"`{one}`" for one in used) + "." if used else "none."
        )
    return (
        f"---\nlibrary_name: peft\n{named}tags:\n- lora\n- graftwork\n- regrad\n---\n\n"
        "# Adapter written by Graftwork\n\n"
        f"{what} Answers equal those of Graftwork for the same prompt; each question and each set of passages has an "
        f"adapter of its own.\n\n```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("THIS FOLDER")\n```\n'
    )
