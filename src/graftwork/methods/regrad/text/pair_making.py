"""Generation of pairs files: the pretrained model writes a paraphrase and question–answer pairs of every passage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from graftwork.core.files import append_line, drop_torn_line, write_checksum
from graftwork.core.progress import Progress
from graftwork.core.readers import checksum_file
from graftwork.errors import ConfigError
from graftwork.evaluation.sampling import Sampling, derive_seed
from graftwork.methods.regrad.modules import adapter_off
from graftwork.methods.regrad.text.generation import generate_tokens, model_stop_tokens
from graftwork.methods.regrad.text.pairs import Augmented, Pair, read_pairs
from graftwork.methods.regrad.text.prompting import decoded_text, question_ids
from graftwork.retrieval.retriever import Passage
from graftwork.surgery.sites import pretrained
from graftwork.tasks.prompts import PromptFamily, prompt_family
from graftwork.training.encoding import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5
"""Number of failures whose reasons are kept."""
_PAIR = re.compile(
    r"^\W*(?:\d+\W+)?question\W*\d*\W*:[ *]*(?P<question>\S.*?)[ *]*$\s*"
    r"^\W*(?:\d+\W+)?answer\W*\d*\W*:[ *]*(?P<answer>\S.*?)[ *]*$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Counts of one call of `make_pairs`."""

    written: int = 0
    """Number of passages that were written to the file."""
    skipped: int = 0
    """Number of passages that the file contained already, or that occurred before in the same call."""
    failed: int = 0
    """Number of passages without a usable model output; they are not written, so the next call retries them."""
    reasons: tuple[str, ...] = ()
    """Reasons of the first failures."""


def parsed_pairs(text: str) -> tuple[Pair, ...]:
    """Return the pairs in a text with lines `Question: …` and `Answer: …`, with or without numbers; each pair once."""
    found = [Pair(match["question"].strip(), match["answer"].strip()) for match in _PAIR.finditer(text)]
    return tuple(dict.fromkeys(found))


@dataclass
class PairMaker:
    """Paraphrases passages and writes question–answer pairs, with the pretrained model, without any adapter.

    Source: Parametric RAG, document augmentation. The prompts are ours.

    Args:
        model: The converted model.
        tokenizer: Its tokenizer.
        at_least: Minimum number of pairs; a passage with fewer counts as failed.
        batch_size: Number of texts in a batch.
        max_new_tokens: Maximum number of new tokens of one text.
        temperature: Sampling temperature; 0 for greedy decoding. Raise it to retry failed passages with other samples.
        top_p: Sample from the smallest set of tokens with this total probability.
        seed: Common seed; the seed of each text is derived from it and the passage's id.
        rewrite_prompt: YAML file with a prompt family for paraphrases; None takes the shipped one.
        pairs_prompt: YAML file with a prompt family for pairs; None takes the shipped one.

    Raises:
        ConfigError: If a number is out of range, or a file is no prompt family.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    at_least: int = 3
    batch_size: int = 8
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    rewrite_prompt: str | None = None
    pairs_prompt: str | None = None
    _families: Mapping[str, PromptFamily] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("at_least", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a whole number from 1.")
        paths = {"rewrite": self.rewrite_prompt, "pairs": self.pairs_prompt}
        self._families = {name: _family(name, path) for name, path in paths.items()}
        self._sampling(Passage("", ""), "")  # validates temperature and top_p

    def make(self, passages: Sequence[Passage]) -> list[Augmented | str]:
        """Return the augmentation of each passage, or the reason of the failure."""
        rewrites = self.texts(passages, "rewrite")
        pair_texts = self.texts(passages, "pairs")
        found: list[Augmented | str] = []
        for passage, rewrite, text in zip(passages, rewrites, pair_texts, strict=True):
            pairs = parsed_pairs(self._families["pairs"].assistant + (text or ""))
            if rewrite is None or text is None:
                found.append(f"passage {passage.id!r}: too long for the model with {self.max_new_tokens} new tokens")
            elif not rewrite.strip():
                found.append(f"passage {passage.id!r}: the rewrite is empty")
            elif len(pairs) < self.at_least:
                found.append(
                    f"passage {passage.id!r}: {len(pairs)} pairs of at least {self.at_least} in {text.strip()[:60]!r}"
                )
            else:
                found.append(Augmented(rewrite.strip(), pairs))
        return found

    def texts(self, passages: Sequence[Passage], what: str) -> list[str | None]:
        """Generate one text for each passage; None for passages that exceed the model's context.

        Args:
            passages: The passages.
            what: Prompt family: rewrite or pairs.
        """
        family = self._families[what]
        prompts = [question_ids(self.tokenizer, family, "", passages=[(one.title, one.text)]) for one in passages]
        room = getattr(self._generating.config.get_text_config(), "max_position_embeddings", None)
        kept = [number for number, ids in enumerate(prompts) if room is None or len(ids) + self.max_new_tokens <= room]
        written: list[str | None] = [None] * len(passages)
        for start in range(0, len(kept), self.batch_size):
            rows = kept[start : start + self.batch_size]
            sampling = [self._sampling(passages[row], what) for row in rows]
            for row, tokens in zip(rows, self.generate([prompts[row] for row in rows], sampling), strict=True):
                ended = any(token in self._ends for token in tokens)
                text = decoded_text(self.tokenizer, tokens)
                # the last line is incomplete if the limit of new tokens ended the text
                written[row] = text if ended or "\n" not in text else text.rpartition("\n")[0]
        return written

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling | None]) -> list[list[int]]:
        """Generate a continuation of each prompt with the pretrained model."""
        with adapter_off(self.model):
            return generate_tokens(
                self.model,
                prompts,
                sampling,
                padding=padding_id(self.tokenizer),
                ends=sorted(self._ends),
                max_new_tokens=self.max_new_tokens,
            )

    def _sampling(self, passage: Passage, what: str) -> Sampling | None:
        if not self.temperature:
            return None
        return Sampling(self.temperature, self.top_p, derive_seed(self.seed, f"{what} {passage.id}"))

    @cached_property
    def _generating(self) -> Any:
        return pretrained(self.model.eval())

    @cached_property
    def _ends(self) -> set[int]:
        end: Any = self.tokenizer.eos_token_id
        stop_tokens = model_stop_tokens(self.model)
        return stop_tokens if end is None else {int(end), *stop_tokens}


def make_pairs(maker: PairMaker, passages: Iterable[Passage], path: Path) -> PairCounts:
    """Append the augmentations of passages that a pairs file lacks; an interrupted call can be repeated.

    Raises:
        DataError: If the file has another format.
    """
    drop_torn_line(path)
    known: set[str] = set(read_pairs(path)) if path.exists() else set()
    written = skipped = failed = 0
    reasons: list[str] = []
    rest = iter(passages)
    with Progress("pairs", 0) as progress:
        while part := list(islice(rest, maker.batch_size)):
            new = list({one.id: one for one in part if one.id not in known}.values())
            skipped += len(part) - len(new)
            for passage, made in zip(new, maker.make(new), strict=True):
                if isinstance(made, str):
                    failed += 1
                    reasons += [made] if len(reasons) < _SHOWN else []
                    continue
                # a killed call leaves a file without checksum
                checksum_file(path).unlink(missing_ok=True)
                append_line(path, made.row(passage.id))
                known.add(passage.id)
                written += 1
            progress.advance(len(part))
    if path.exists():
        write_checksum(path)
    return PairCounts(written, skipped, failed, tuple(reasons))


def _family(name: str, path: str | None) -> PromptFamily:
    if path is not None:
        return prompt_family(path)
    with as_file(files("graftwork.methods.regrad") / "pair_prompts" / f"{name}.yaml") as shipped:
        return prompt_family(str(shipped))
