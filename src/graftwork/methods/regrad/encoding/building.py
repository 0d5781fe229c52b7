"""`graftwork bank build` and `add`: a model, passages, and a bank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from graftwork.core.config import to_plain
from graftwork.core.example import Example
from graftwork.core.messages import say
from graftwork.core.processes import is_main_process
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError
from graftwork.grafting.commands import Loader
from graftwork.methods.regrad.answering.open_answering import recorded_passages
from graftwork.methods.regrad.bank.files import holds_bank
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.encoding.adapter_training import AdapterTraining
from graftwork.methods.regrad.encoding.adapters import AdapterEncoder
from graftwork.methods.regrad.encoding.encoder import Encoded, PassageEncoder, count_missing, encode_passages
from graftwork.methods.regrad.encoding.workers import encode_share, encode_with_ray, workers_of_torchrun
from graftwork.methods.regrad.text.pairs import read_pairs
from graftwork.retrieval.corpus import CorpusReader, find_corpus
from graftwork.retrieval.retriever import Passage
from graftwork.tasks.augmentation import read_augmented


def build(
    load: Loader,
    run: str,
    source: str,
    output: str | None,
    *,
    precision: str | None,
    batch_size: int,
    tokens_per_batch: int,
    limit: int | None,
    workers: int | None,
    cpus_per_worker: float,
    gpus_per_worker: float,
    compact: bool,
    dtype: str | None,
    train_adapters: bool = False,
    pairs: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Fill a bank, by one process, by all of `torchrun`'s, or by a pool of actors, and tidy it up."""
    if workers is not None and workers_of_torchrun() > 1:
        raise ConfigError("Found --workers under torchrun; expected one or the other. Leave --workers out.")
    how = _training(train_adapters, training or {}, pairs)
    passages = read_passages(source, limit)
    # an absolute path, because actors run in folders of their own
    load_encoder = partial(
        encoder_of,
        load,
        str(Path(run).resolve()),
        batch_size,
        tokens_per_batch,
        dtype,
        how,
        None if pairs is None else Path(pairs).resolve(),
    )
    encoder = load_encoder()
    folder = str(RunFolder(run).artifacts / "bank") if output is None else output
    if workers_of_torchrun() > 1:
        done = encode_share(encoder, folder, passages(), precision=precision)
        # one of them tells, and of its own share
        if not is_main_process():
            return None
        bank = encoder.open_bank(folder)
        if compact:
            bank.compact()
        return _summary(folder, done)
    bank = encoder.open_bank(folder, precision=precision)
    total = count_missing(encoder, bank, passages())
    if workers is None:
        done = encode_passages(encoder, bank, passages(), total=total)
    else:
        done = encode_with_ray(
            load_encoder,
            encoder,
            bank,
            passages(),
            workers=workers,
            cpus_per_worker=cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            total=total,
        )
    if compact and done.written + done.aliased:
        # what came after the index was made would be searched for row by row, and take memory
        bank.compact()
    return _summary(folder, done)


def add(
    load: Loader,
    folder: str,
    run: str,
    source: str | None,
    *,
    id: str | None,
    text: str | None,
    title: str,
    replace: bool,
    index: str | None,
    batch_size: int,
    tokens_per_batch: int,
    dtype: str | None,
) -> dict[str, Any]:
    """Add to a bank that is there, and to an index."""
    if not holds_bank(folder):
        raise ConfigError(f"Found no gradient bank in {folder}. Make one with `graftwork bank build`.")
    if (source is None) == (id is None) or (id is None) != (text is None):
        raise ConfigError("Expected either a file of passages, or one passage by --id and --text.")
    passages: Callable[[], Iterable[Passage]]
    passages = (lambda: [Passage(str(id), str(text), title)]) if source is None else read_passages(source, None)
    encoder = encoder_of(load, run, batch_size, tokens_per_batch, dtype)
    bank = encoder.open_bank(folder)
    total = count_missing(encoder, bank, passages())
    done = encode_passages(encoder, bank, passages(), replace=replace, total=total)
    if done.rejected and source is None:
        raise ConfigError(done.reasons[0])
    if index is not None:
        _index(index, passages())
    return _summary(folder, done)


def make(
    load: Loader, run: str, source: str, output: str, *, limit: int | None, dtype: str | None, **settings: Any
) -> dict[str, Any]:
    """Make a pairs file, or go on with one."""
    from graftwork.methods.regrad.text.pair_making import PairMaker, make_pairs

    passages = read_passages(source, limit)
    model, tokenizer, _ = _adapted(load, run, dtype)
    done = make_pairs(PairMaker(model, tokenizer, **settings), passages(), Path(output))
    if done.failed:
        say(f"Left out {done.failed} passages, such as: {'; '.join(done.reasons)}")
    say(f"Wrote rewrite and pairs of {done.written} passages to {output}")
    return {"pairs": output, **to_plain(done)}


def _training(train: bool, given: Mapping[str, Any], pairs: str | None) -> AdapterTraining | None:
    """How adapters are trained, if they are."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if train:
        training = AdapterTraining(**chosen)
        training.check_pairs(pairs is not None)
        return training
    if odd := [*chosen, *(["pairs"] if pairs is not None else [])]:
        flag = "--" + odd[0].replace("_", "-")
        raise ConfigError(f"Found {flag}, which is about training adapters. Add --train-adapters, or leave it out.")
    return None


def encoder_of(
    load: Loader,
    run: str,
    batch_size: int,
    tokens_per_batch: int,
    dtype: str | None,
    training: AdapterTraining | None = None,
    pairs: Path | None = None,
) -> PassageEncoder:
    """The model of a run, ready to encode: to compute gradients, or to train adapters if it is said how.

    Raises:
        ConfigError: If regrad is not on it.
    """
    model: Any = (*_adapted(load, run, dtype), batch_size, tokens_per_batch)
    if training is None:
        return PassageEncoder(*model)
    return AdapterEncoder(*model, training=training, pairs=None if pairs is None else read_pairs(pairs))


def _adapted(load: Loader, run: str, dtype: str | None) -> tuple[Any, Any, ReGradConfig]:
    converted = load(run, dtype=dtype)
    configs = [method.config for method in converted.methods if isinstance(method.config, ReGradConfig)]
    if not configs:
        raise ConfigError(f"Found no regrad on the model in {run}. Convert it: graftwork convert regrad MODEL -o RUN.")
    return converted.model, converted.tokenizer, configs[0]


def read_passages(source: str, limit: int | None) -> Callable[[], Iterator[Passage]]:
    """What reads the passages of a corpus, or of augmented questions, from the beginning, as often as it is called."""
    if source.endswith(".json"):
        read: Callable[[], Iterable[Passage]] = partial(_of_questions, read_augmented(Path(source)))
    else:
        files = find_corpus(source)
        read = partial(CorpusReader, files)
    return lambda: islice(iter(read()), limit)


def _of_questions(rows: Sequence[Mapping[str, Any]]) -> Iterator[Passage]:
    """The passages of augmented questions, each once."""
    seen: set[str] = set()
    for row in rows:
        for passage in recorded_passages(Example(str(row["test_id"]), "", "", metadata=row), None) or ():
            if passage.id not in seen:
                seen.add(passage.id)
                yield passage


def _index(folder: str, passages: Iterable[Passage]) -> None:
    from graftwork.retrieval.embedded import EmbeddedIndex

    index, rest = EmbeddedIndex(folder), iter(passages)
    while part := list(islice(rest, 10_000)):
        index.add(part)


def _summary(folder: str, done: Encoded) -> dict[str, Any]:
    if done.rejected:
        say(f"Left out {done.rejected} passages, such as: {'; '.join(done.reasons)}")
    say(f"Encoded {done.written} passages; wrote {folder}")
    return {"bank": folder, **to_plain(done)}
