"""Implementation of the commands `graftwork bank build`, `add` and `pairs`, which run a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.core.config import to_plain
from graftwork.core.devices import ACCELERATOR, CPU, Placing
from graftwork.core.example import Example
from graftwork.core.messages import say
from graftwork.core.processes import is_main_process
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError
from graftwork.grafting.commands import Loader
from graftwork.grafting.converted import required_tokenizer
from graftwork.methods.regrad.answering.open_answering import recorded_passages
from graftwork.methods.regrad.bank.files import holds_bank
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.encoding.adapter_training import AdapterTraining
from graftwork.methods.regrad.encoding.adapters import AdapterEncoder
from graftwork.methods.regrad.encoding.encoder import Encoded, PassageEncoder, count_missing, encode_passages
from graftwork.methods.regrad.encoding.workers import encode_share, encode_with_ray, workers_of_torchrun
from graftwork.methods.regrad.text.pairs import read_pairs
from graftwork.retrieval import open_index
from graftwork.retrieval.corpus import CorpusReader, find_corpus
from graftwork.retrieval.retriever import Passage
from graftwork.tasks.augmentation import read_augmented

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def build(
    load: Loader,
    run: str,
    source: str,
    output: str | None,
    *,
    precision: str | None,
    batch_size: int,
    tokens_per_batch: int | None,
    limit: int | None,
    workers: int | None,
    cpus_per_worker: float,
    gpus_per_worker: float,
    compact: bool,
    placing: Placing | None = None,
    train_adapters: bool = False,
    pairs: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Encode passages into a bank with one process, the processes of `torchrun`, or a pool of actors.

    Args:
        load: Loads a run.
        run: Run folder of a model with ReGrad.
        source: Corpus or augmented questions.
        output: Location of the bank; None for the run's artifacts.
        precision: Storage format of a new bank.
        batch_size: Maximum number of passages in a batch.
        tokens_per_batch: Maximum number of tokens in a batch, including padding; None for the device's default.
        limit: Number of passages to encode, from the beginning; None for all.
        workers: Number of Ray actors; None for no actors.
        cpus_per_worker: Number of CPUs per actor.
        gpus_per_worker: Number of GPUs per actor.
        compact: Compact the bank at the end.
        placing: Device, device map and data type of the model.
        train_adapters: Train adapters instead of computing gradients.
        pairs: Pairs file for adapter training.
        training: Settings of adapter training; None values mean defaults.

    Returns:
        Counts and location of the bank; None in all processes but the first.
    """
    if workers is not None and workers_of_torchrun() > 1:
        raise ConfigError("Found --workers under torchrun; expected one of the two. Omit --workers.")
    if workers is None and gpus_per_worker:
        raise ConfigError(
            f"Found --gpus-per-worker {gpus_per_worker:g} without --workers, whose GPUs it reserves. Give --workers, "
            "or omit it: one process uses the accelerator, and --device chooses another one."
        )
    how = _training(train_adapters, training or {}, pairs)
    passages = read_passages(source, limit)
    # an absolute path, because actors run in other working directories
    load_encoder = partial(
        encoder_of,
        load,
        str(Path(run).resolve()),
        batch_size,
        tokens_per_batch,
        training=how,
        pairs=None if pairs is None else Path(pairs).resolve(),
    )
    asked: Placing = placing or {}
    if workers is None:
        own = asked
    else:
        # the actors encode; this process formats and counts
        own: Placing = {"device": CPU, "dtype": asked.get("dtype")}
        asked = _placing_of_actors(asked, gpus_per_worker)
    encoder = load_encoder(placing=own)
    folder = str(RunFolder(run).artifacts / "bank") if output is None else output
    if workers_of_torchrun() > 1:
        done = encode_share(encoder, folder, passages(), precision=precision)
        # only the first process reports, with the counts of its share
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
            partial(load_encoder, placing=asked),
            encoder,
            bank,
            passages(),
            workers=workers,
            cpus_per_worker=cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            total=total,
        )
    # an earlier process may have been killed after its last batch
    if compact and (done.written + done.aliased or bank.stats()["batches"] > 1):
        # rows appended after index creation would be scanned, which is slow and takes memory
        bank.compact()
    return _summary(folder, done)


def _placing_of_actors(asked: Placing, gpus: float) -> Placing:
    """Device of each actor: the GPU that Ray reserves for it and makes the only visible one, else the CPU.

    Raises:
        ConfigError: If a reserved GPU would be unused, or an unreserved one used.
    """
    given = asked.get("device") or asked.get("device_map")
    if given is None:
        return {**asked, "device": ACCELERATOR if gpus else CPU}
    if gpus and given == CPU:
        raise ConfigError(f"Found --gpus-per-worker {gpus:g} and --device cpu, which leaves them unused. Omit one.")
    if not gpus and given != CPU:
        raise ConfigError(
            f"Found {given!r} as device of actors that reserve no GPU. Expected --gpus-per-worker 1, or a fraction for "
            "several actors on one GPU."
        )
    return asked


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
    tokens_per_batch: int | None,
    placing: Placing | None = None,
) -> dict[str, Any]:
    """Add passages to an existing bank, and optionally to an index.

    Args:
        load: Loads a run.
        folder: Location of the bank.
        run: Run folder of the model that the bank belongs to.
        source: Corpus or augmented questions; None with `id` and `text`.
        id: Id of a single passage.
        text: Text of a single passage.
        title: Title of a single passage.
        replace: Let existing ids refer to their new texts.
        index: Embedded index that receives the passages together with the bank.
        batch_size: Maximum number of passages in a batch.
        tokens_per_batch: Maximum number of tokens in a batch, including padding; None for the device's default.
        placing: Device, device map and data type of the model.

    Raises:
        ConfigError: If the bank does not exist, or the passages are ambiguous.
    """
    if not holds_bank(folder):
        raise ConfigError(f"Found no gradient bank in {folder}. Create one with `graftwork bank build`.")
    if (source is None) == (id is None) or (id is None) != (text is None):
        raise ConfigError("Expected either a file of passages, or one passage by --id and --text.")
    passages: Callable[[], Iterable[Passage]]
    passages = (lambda: [Passage(str(id), str(text), title)]) if source is None else read_passages(source, None)
    encoder = encoder_of(load, run, batch_size, tokens_per_batch, placing=placing)
    bank = encoder.open_bank(folder)
    total = count_missing(encoder, bank, passages())
    opened = None
    if index is not None:
        opened = open_index(index)
    done = encode_passages(encoder, bank, passages(), replace=replace, total=total, index=opened)
    if done.rejected and source is None:
        raise ConfigError(done.reasons[0])
    return _summary(folder, done)


def make(
    load: Loader,
    run: str,
    source: str,
    output: str,
    *,
    limit: int | None,
    placing: Placing | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Generate a pairs file, or resume an interrupted one.

    Args:
        load: Loads a run.
        run: Run folder of a model with ReGrad, whose pretrained model generates.
        source: Corpus or augmented questions.
        output: Path of the pairs file.
        limit: Number of passages, from the beginning; None for all.
        placing: Device, device map and data type of the model.
        settings: Arguments of `PairMaker`.
    """
    from graftwork.methods.regrad.text.pair_making import PairMaker, make_pairs

    passages = read_passages(source, limit)
    model, tokenizer, _ = _adapted(load, run, placing)
    done = make_pairs(PairMaker(model, tokenizer, **settings), passages(), Path(output))
    if done.failed:
        say(f"Left out {done.failed} passages, such as: {'; '.join(done.reasons)}")
    say(f"Wrote rewrite and pairs of {done.written} passages to {output}")
    return {"pairs": output, **to_plain(done)}


def _training(train: bool, given: Mapping[str, Any], pairs: str | None) -> AdapterTraining | None:
    """Settings of adapter training; None if gradients are computed."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if train:
        training = AdapterTraining(**chosen)
        training.check_pairs(pairs is not None)
        return training
    if odd := [*chosen, *(["pairs"] if pairs is not None else [])]:
        flag = "--" + odd[0].replace("_", "-")
        raise ConfigError(
            f"Found {flag}, which applies to adapter training only. Add --train-adapters, or omit the option."
        )
    return None


def encoder_of(
    load: Loader,
    run: str,
    batch_size: int,
    tokens_per_batch: int | None,
    *,
    placing: Placing | None = None,
    training: AdapterTraining | None = None,
    pairs: Path | None = None,
) -> PassageEncoder:
    """Create the encoder of a run: of gradients, or of trained adapters if `training` is given.

    Args:
        load: Loads a run.
        run: Run folder of a model with ReGrad.
        batch_size: Maximum number of passages in a batch.
        tokens_per_batch: Maximum number of tokens in a batch, including padding; None for the device's default.
        placing: Device, device map and data type of the model.
        training: Settings of adapter training; None for gradients.
        pairs: Path of the pairs file for adapter training.

    Raises:
        ConfigError: If the model is not converted with ReGrad.
    """
    model, tokenizer, config = _adapted(load, run, placing)
    if training is None:
        return PassageEncoder(model, tokenizer, config, batch_size, tokens_per_batch)
    read = None if pairs is None else read_pairs(pairs)
    return AdapterEncoder(model, tokenizer, config, batch_size, tokens_per_batch, training=training, pairs=read)


def _adapted(
    load: Loader, run: str, placing: Placing | None
) -> tuple[nn.Module, PreTrainedTokenizerBase, ReGradConfig]:
    converted = load(run, **(placing or {}))
    configs = [method.config for method in converted.methods if isinstance(method.config, ReGradConfig)]
    if not configs:
        raise ConfigError(f"Found no regrad on the model in {run}. Convert it: graftwork convert regrad MODEL -o RUN.")
    return converted.model, required_tokenizer(converted), configs[0]


def read_passages(source: str, limit: int | None) -> Callable[[], Iterator[Passage]]:
    """Return a function that streams the passages of a corpus or of augmented questions from the beginning."""
    if source.endswith(".json"):
        read: Callable[[], Iterable[Passage]] = partial(_of_questions, read_augmented(Path(source)))
    else:
        files = find_corpus(source)
        read = partial(CorpusReader, files)
    return lambda: islice(iter(read()), limit)


def _of_questions(rows: Sequence[Mapping[str, Any]]) -> Iterator[Passage]:
    """Yield the distinct passages of augmented questions."""
    seen: set[str] = set()
    for row in rows:
        for passage in recorded_passages(Example(str(row["test_id"]), "", "", metadata=row), None) or ():
            if passage.id not in seen:
                seen.add(passage.id)
                yield passage


def _summary(folder: str, done: Encoded) -> dict[str, Any]:
    if done.rejected:
        say(f"Left out {done.rejected} passages, such as: {'; '.join(done.reasons)}")
    say(f"Encoded {done.written} passages; wrote {folder}")
    return {"bank": folder, **to_plain(done)}
