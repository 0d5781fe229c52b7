"""Rewrites of passages, and questions with answers about them, by the pretrained model itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from graftwork.core.files import append_line, drop_torn_line
from graftwork.core.progress import Progress
from graftwork.errors import ConfigError
from graftwork.methods.regrad.modules import adapter_off
from graftwork.methods.regrad.text.generation import generate_tokens, model_stop_tokens
from graftwork.methods.regrad.text.pairs import Augmented, Pair, read_pairs
from graftwork.methods.regrad.text.prompting import question_ids
from graftwork.methods.regrad.text.sampling import Sampling, derive_seed
from graftwork.retrieval.retriever import Passage
from graftwork.surgery.sites import pretrained
from graftwork.tasks.prompts import PromptFamily, prompt_family
from graftwork.training.encoding import padding_id

_SHOWN = 5
_PAIR = re.compile(
    r"^\W*(?:\d+\W+)?question\W*\d*\W*:[ *]*(?P<question>\S.*?)[ *]*$\s*"
    r"^\W*(?:\d+\W+)?answer\W*\d*\W*:[ *]*(?P<answer>\S.*?)[ *]*$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Made:
    """What making pairs did."""

    written: int = 0
    """Passages that have a rewrite and pairs now."""
    skipped: int = 0
    """Passages that had them already."""
    failed: int = 0
    """Passages for which the model wrote something else; nothing is written for them, and another call tries again."""
    reasons: tuple[str, ...] = ()
    """Why, of the first ones."""


def parsed_pairs(text: str) -> tuple[Pair, ...]:
    """The pairs in a text that has a line `Question: …` and a line `Answer: …` for each, numbered or not."""
    found = [Pair(match["question"].strip(), match["answer"].strip()) for match in _PAIR.finditer(text)]
    return tuple(dict.fromkeys(found))


@dataclass
class PairMaker:
    """Has the pretrained model, without any adapter, say passages again and ask about them.

    Source: Parametric RAG, document augmentation. The wording is ours.

    Args:
        model: The converted model.
        tokenizer: Its tokenizer.
        at_least: Pairs without which a passage counts as failed.
        batch_size: Texts generated at once.
        max_new_tokens: Tokens of one text at most.
        temperature: Draw tokens at this temperature; 0 takes the likeliest one.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: What the seed of each text's draws is made of, together with the passage's id.
        rewrite_prompt: YAML file of another wording for rewrites.
        pairs_prompt: YAML file of another wording for pairs.

    Raises:
        ConfigError: If a number is out of range, or a file is none.
    """

    model: nn.Module
    tokenizer: Any
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
        given = {"rewrite": self.rewrite_prompt, "pairs": self.pairs_prompt}
        self._families = {name: _family(name, path) for name, path in given.items()}
        self._sampling(Passage("", ""), "")  # refuses numbers that cannot be drawn with

    def make(self, passages: Sequence[Passage]) -> list[Augmented | str]:
        """Rewrite and pairs of each passage, or why there are none."""
        rewrites = self._written(passages, "rewrite")
        asked = self._written(passages, "pairs")
        found: list[Augmented | str] = []
        for passage, rewrite, text in zip(passages, rewrites, asked, strict=True):
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

    def _written(self, passages: Sequence[Passage], what: str) -> list[str | None]:
        """What the model wrote about each passage; None where there is no room for it."""
        family = self._families[what]
        prompts = [question_ids(self.tokenizer, family, "", passages=[(one.title, one.text)]) for one in passages]
        room = getattr(self._generating.config.get_text_config(), "max_position_embeddings", None)
        kept = [number for number, ids in enumerate(prompts) if room is None or len(ids) + self.max_new_tokens <= room]
        written: list[str | None] = [None] * len(passages)
        for start in range(0, len(kept), self.batch_size):
            rows = kept[start : start + self.batch_size]
            sampling = [self._sampling(passages[row], what) for row in rows]
            for row, tokens in zip(rows, self._generated([prompts[row] for row in rows], sampling), strict=True):
                ended = any(token in self._ends for token in tokens)
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                # a last line that was cut short says something else than it was going to
                written[row] = text if ended or "\n" not in text else text.rpartition("\n")[0]
        return written

    def _generated(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling | None]) -> list[list[int]]:
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
        own = self.tokenizer.eos_token_id
        return model_stop_tokens(self.model) | (set() if own is None else {int(own)})


def make_pairs(maker: PairMaker, passages: Iterable[Passage], path: Path) -> Made:
    """Add the pairs of passages to a pairs file, those that it lacks; stopped at any moment, it goes on from there.

    Raises:
        DataError: If the file holds something else.
    """
    drop_torn_line(path)
    known = set(read_pairs(path)) if path.exists() else set()
    written = skipped = failed = 0
    reasons: list[str] = []
    rest = iter(passages)
    with Progress("pairs", 0) as progress:
        while part := list(islice(rest, maker.batch_size)):
            new = list({one.id: one for one in part if one.id not in known}.values())
            skipped += len(part) - len(new)
            for passage, found in zip(new, maker.make(new), strict=True):
                if isinstance(found, str):
                    failed += 1
                    reasons += [found] if len(reasons) < _SHOWN else []
                    continue
                append_line(path, found.row(passage.id))
                known.add(passage.id)
                written += 1
            progress.advance(len(part))
    return Made(written, skipped, failed, tuple(reasons))


def _family(name: str, path: str | None) -> PromptFamily:
    if path is not None:
        return prompt_family(path)
    with as_file(files("graftwork.methods.regrad") / "pair_prompts" / f"{name}.yaml") as shipped:
        return prompt_family(str(shipped))
