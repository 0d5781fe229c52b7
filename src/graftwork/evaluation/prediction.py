"""Batched, resumable prediction; longest inputs first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from graftwork.core import faults
from graftwork.core.config import to_plain
from graftwork.core.digests import tokenizer_digest
from graftwork.core.example import Example
from graftwork.core.files import DIGEST_KEY
from graftwork.core.locks import locked
from graftwork.core.processes import (
    gather,
    init_process_group,
    is_main_process,
    main_process_first,
    process_count,
    process_index,
    wait_for_everyone,
)
from graftwork.core.storage import writing
from graftwork.core.stored_rows import rows_digest
from graftwork.errors import ConfigError
from graftwork.evaluation.answer_file import AnswerFile, part_file
from graftwork.evaluation.sampling import Sampling, TokenSampler, derive_seed
from graftwork.grafting.activity import check_active
from graftwork.grafting.capabilities import Answers, ConstrainsGeneration, ReadsAnswers
from graftwork.grafting.converted import Converted, required_tokenizer
from graftwork.grafting.identity import weights_digest
from graftwork.grafting.precision import stored_types
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.surgery.finiteness import check_finite
from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.tasks.chat import ChatEncoder
from graftwork.tasks.offsets import encode_inputs
from graftwork.training.encoding import PadBatch, chat_input, has_chat, is_chat, padding_id, target_language
from graftwork.training.lengths import longest_first

Pool = Callable[[Sequence[Sequence[int]]], Iterable[tuple[Sequence[int], Sequence[Mapping[str, Any]]]]]
"""Function of batches of row numbers that yields each with its answers, in any order."""


def predict_texts(
    converted: Converted,
    rows: Sequence[Example],
    settings: EvaluationSettings,
    *,
    output: Path | None = None,
    digest: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Predict one answer for each row: the class with the highest score, or generated text.

    Args:
        converted: The model and its tokenizer.
        rows: Inputs.
        settings: Lengths and batch size.
        output: JSON-lines file that receives each answer as it is generated. Answers with the same cache key (model,
            methods, settings, rows) are reused; others are discarded.
        digest: Digest of the model's weights, if it is known; computed by default.
        advance: Called with the number of answers that were added.

    Returns:
        Answers in the order of `rows`.

    Raises:
        ConfigError: If there is no tokenizer, if the model can neither classify nor generate, if `output` was not
            written by this function, or if another process writes to it.
        NonFiniteError: If a weight is NaN or infinite.
    """
    records = predict_records(converted, rows, settings, output=output, digest=digest, advance=advance)
    return [record["prediction"] for record in records]


def predict_records(
    converted: Converted,
    rows: Sequence[Example],
    settings: EvaluationSettings,
    *,
    output: Path | None = None,
    digest: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
    pool: Pool | None = None,
) -> Sequence[Mapping[str, Any]]:
    """Predict as `predict_texts` does, and return the fields that a method adds to each answer.

    Args:
        converted: The model and its tokenizer.
        rows: Inputs.
        settings: Lengths and batch size.
        output: JSON-lines file that receives each answer, for resuming.
        digest: Digest of the model's weights, if it is known; computed by default.
        advance: Called with the number of answers that were added.
        pool: Answers the batches in other processes; None answers them here.

    Returns:
        JSON objects with `prediction`, in the order of `rows`; those of a file are read on access.
    """
    tokenizer = required_tokenizer(converted)
    check_active(converted.model, "predict with this model")
    with writing(output or "predictions"):
        faults.point("prediction.weights", output or "predictions", converted.model.parameters())
    check_finite(converted.model, "predict with this model")
    converted.model.eval()
    with ExitStack() as opened:
        processes = process_count()
        if processes > 1:
            init_process_group(cpu=pretrained(converted.model).device.type == "cpu")
        if output is not None and is_main_process():
            busy = f"Another process is writing to {output}. Wait until it has ended, or give another file."
            opened.enter_context(locked(output.with_name(f".{output.name}.lock"), busy))
        answer_batch, identity = batch_predictor(converted, rows, settings, opened)
        file = own = None
        if output is not None:
            identity = {**_identity(converted, rows, settings, digest), **identity}
            with main_process_first():
                file = own = AnswerFile(output, len(rows), identity)
                if is_main_process():
                    # answers that the processes of a stopped call left
                    file.absorb()
            if processes > 1:
                own = AnswerFile(part_file(output, process_index()), len(rows), identity)
            advance(len(file))
        found: dict[int, Mapping[str, Any]] = {}
        # longest first wastes least padding, and runs out of memory at once or never
        todo = [index for index in longest_first(tokenizer, rows) if file is None or index not in file]
        batches = [todo[start : start + settings.rows_at_once] for start in range(0, len(todo), settings.rows_at_once)]
        # the batches of one process, dealt out in turns: long and short ones to every process
        own_batches = batches[process_index() :: processes]
        here = ((chosen, answer_batch([rows[i] for i in chosen])) for chosen in own_batches)
        for chosen, records in here if pool is None else pool(batches):
            if own is None:
                found.update(zip(chosen, records, strict=True))
            else:
                own.begin()
                for index, record in zip(chosen, records, strict=True):
                    own.append(index, rows[index], record)
            advance(len(chosen))
        if file is None:
            shares = gather(found) if processes > 1 else [found]
            whole = {index: record for share in shares for index, record in share.items()}
            return [whole[index] for index in range(len(rows))]
        wait_for_everyone()
        if processes > 1:
            with main_process_first():
                if is_main_process():
                    file.absorb()
        return file.answers()


def batch_predictor(
    converted: Converted, rows: Sequence[Example], settings: EvaluationSettings, opened: ExitStack
) -> tuple[Callable[[Sequence[Example]], Sequence[Mapping[str, Any]]], Mapping[str, Any]]:
    """Function that answers a batch of rows.

    Args:
        converted: The model and its tokenizer.
        rows: All rows that will be answered.
        settings: Lengths and decoding.
        opened: Receives what stays open while it answers.

    Returns:
        The function, and its part of the cache key: a method's own, or the model's.

    Raises:
        ConfigError: If the model can neither classify nor generate, or a setting of generation has no effect.
    """
    for method in converted.methods:
        if isinstance(method, Answers):
            _refuse_decoding(settings, f"{method.name} answers with its own settings; use --set method.KEY=VALUE")
            own = opened.enter_context(method.answering(converted.model, required_tokenizer(converted), rows, settings))
            return own.answer, {"answering": dict(own.identity)}
    inner = pretrained(converted.model)
    answer_batch = _classify if is_classifier(inner) else _generate
    if answer_batch is _classify:
        _refuse_decoding(settings, "the model is a classifier, which generates no text; leave it out")
    if answer_batch is _generate and not inner.can_generate():
        raise ConfigError(
            f"{type(inner).__name__} can neither generate text nor classify. Load it with a language-model "
            "head, or convert it for a task, which gives it a classification head."
        )
    return lambda batch: answer_batch(converted, batch, settings), {}


def _refuse_decoding(settings: EvaluationSettings, reason: str) -> None:
    """Refuse settings of generation that would have no effect."""
    given = {**settings.sampling, **({"num_beams": settings.num_beams} if settings.num_beams > 1 else {})}
    if given:
        found = ", ".join(f"{name} is {value}" for name, value in given.items())
        raise ConfigError(f"{found}, without effect here: {reason}.")


@torch.no_grad()
def _classify(converted: Converted, rows: Sequence[Example], settings: EvaluationSettings) -> list[Mapping[str, Any]]:
    """The name of the class with the highest score, for each row."""
    tokenizer: Any = converted.tokenizer
    inner = pretrained(converted.model)
    encoded = [tokenizer(row.input, row.pair, truncation=True, max_length=settings.input_limit) for row in rows]
    batch = PadBatch(padding_id(tokenizer))(encoded)
    batch = {name: tensor.to(inner.device) for name, tensor in batch.items()}
    best = converted.model(**batch).logits.argmax(-1).tolist()
    names: Any = inner.config.id2label
    return [{"prediction": names[index]} for index in best]


@torch.no_grad()
def _generate(converted: Converted, rows: Sequence[Example], settings: EvaluationSettings) -> list[Mapping[str, Any]]:
    """Generated text of each row, with what methods read from its tokens."""
    from transformers import LogitsProcessorList

    tokenizer: Any = converted.tokenizer
    inner = pretrained(converted.model)
    encoder_decoder = bool(inner.config.is_encoder_decoder)
    encoded, ends = prompt_ids(tokenizer, rows, settings.input_limit, encoder_decoder)
    options: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    collate = PadBatch(padding_id(tokenizer), side="right" if encoder_decoder else "left")
    batch = {name: tensor.to(inner.device) for name, tensor in collate([{"input_ids": ids} for ids in encoded]).items()}
    language = target_language(tokenizer) if encoder_decoder else None
    if language is not None:
        options["forced_bos_token_id"] = language
    for method in converted.methods:
        if isinstance(method, ConstrainsGeneration):
            options |= method.generation(converted.model, tokenizer, rows, settings)
    if settings.samples:
        # after the constraints of a method, so that a forbidden token is never among the likely ones
        processors = [*options.get("logits_processor", ()), _sampler(rows, settings)]
        options["logits_processor"] = LogitsProcessorList(processors)
    generated = converted.model.generate(
        **batch,
        max_new_tokens=settings.answer_limit,
        do_sample=False,
        num_beams=settings.num_beams,
        pad_token_id=padding_id(tokenizer),
        **options,
    )
    # the first token of a decoder with an encoder is its start token
    generated = generated[:, 1 if encoder_decoder else batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    found: list[Mapping[str, Any]] = [{"prediction": text.strip()} for text in texts]
    for method in converted.methods:
        if isinstance(method, ReadsAnswers):
            read = method.read(converted.model, tokenizer, rows, generated.tolist())
            found = [{**one, **more} for one, more in zip(found, read, strict=True)]
    return found


def _sampler(rows: Sequence[Example], settings: EvaluationSettings) -> TokenSampler:
    """Logits processor that samples each row with a seed of its own."""
    temperature = 1.0 if settings.temperature is None else settings.temperature
    top_p = 1.0 if settings.top_p is None else settings.top_p
    seeds = [derive_seed(settings.seed or 0, row.key) for row in rows]
    return TokenSampler([Sampling(temperature, top_p, seed, settings.top_k) for seed in seeds])


def prompt_ids(
    tokenizer: Any, rows: Sequence[Example], limit: int, encoder_decoder: bool
) -> tuple[list[list[int]], list[int]]:
    """Token ids of the inputs, and those that end an answer: conversations end with the end of a turn.

    Args:
        tokenizer: Tokenizer of the model.
        rows: Examples.
        limit: Maximum number of tokens of an input.
        encoder_decoder: True if the inputs go to an encoder.

    Returns:
        Token ids of each input; and token ids that end an answer, empty for the end-of-sequence token alone.
    """
    chat = ChatEncoder(tokenizer) if any(map(is_chat, rows)) else None
    plain = [row for row in rows if not is_chat(row)]
    ids = encode_inputs(tokenizer, plain, limit, automatic=encoder_decoder) if plain else []
    if not encoder_decoder and tokenizer.bos_token_id is not None:
        ids = [[tokenizer.bos_token_id, *row] for row in ids]
    if chat is None:
        return ids, []
    following = iter(ids)
    mixed = [
        chat_input(chat, row, tokenizer, limit, encoder_decoder=encoder_decoder) if is_chat(row) else next(following)
        for row in rows
    ]
    return mixed, [] if encoder_decoder else sorted(chat.end_tokens)


def _identity(
    converted: Converted, rows: Sequence[Example], settings: EvaluationSettings, digest: str | None
) -> dict[str, Any]:
    inner = pretrained(converted.model)
    config: Any = inner.config
    labels: dict[int, str] = config.id2label if is_classifier(inner) else {}
    return {
        "lines": DIGEST_KEY,
        "weights": digest or weights_digest(converted.model),
        "tokenizer": tokenizer_digest(required_tokenizer(converted)),
        "labels": [labels[index] for index in sorted(labels)],
        "rows": rows_digest((row.key, row.text) for row in rows)[:16],
        "max_new_tokens": settings.answer_limit,
        "max_input_tokens": settings.input_limit,
        "num_beams": settings.num_beams,
        # absent for greedy search, so that answers of earlier versions are reused
        **({"sampling": settings.sampling} if settings.samples else {}),
        **({"chat": True} if has_chat(rows) else {}),
        # answers of earlier versions have no positions
        **({"located": 1} if any(isinstance(method, ReadsAnswers) for method in converted.methods) else {}),
        "methods": [{"name": method.name, **to_plain(method.config)} for method in converted.methods],
        # the digest is that of the weights as stored
        **({"dtype": str(inner.dtype)} if stored_types(converted.model) else {}),
    }
