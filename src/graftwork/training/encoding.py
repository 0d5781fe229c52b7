"""Encoding and collation of examples: text targets for generative models, class targets for classification heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from graftwork.core.example import AUXILIARY, Example
from graftwork.core.stored_rows import has_metadata
from graftwork.errors import ConfigError, DataError
from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.tasks.chat import ChatEncoder
from graftwork.tasks.offsets import ESCAPE, PARTS, encode_inputs, encode_texts, visible_target
from graftwork.training.lengths import Lengths, row_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
"""Label of positions that the loss ignores."""
SECOND = f"{AUXILIARY}_"
"""Prefix of the columns of a row's second example, such as `auxiliary_input_ids`."""


class EncodedExamples(Dataset[dict[str, list[int]]]):
    """Data set of examples with text targets, encoded on access.

    Args:
        rows: Examples to encode.
        tokenizer: Tokenizer of the model.
        encoder_decoder: True if input and target go to different stacks. Otherwise the target follows the input in one
            row, and only the target has labels.
        max_input_tokens: Maximum length of an input; longer ones are truncated.
        max_target_tokens: Maximum length of a target; longer ones are truncated, and the end-of-sequence token is
            kept.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder_decoder: bool,
        max_input_tokens: int,
        max_target_tokens: int,
    ) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self.max_input_tokens = max_input_tokens
        self.max_target_tokens = max_target_tokens
        self.chat = ChatEncoder(tokenizer) if has_chat(rows) else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        second: Example | None = row.metadata.get(AUXILIARY)
        if second is None:
            return self._encoded(row)
        return {
            **self._encoded(row),
            **{SECOND + name: value for name, value in self._encoded(second).items()},
        }

    def _encoded(self, row: Example) -> dict[str, list[int]]:
        if self.chat is not None and is_chat(row):
            return self._conversation(self.chat, row)
        (source,) = self._inputs([row])
        (target,) = self._targets([row], [source])
        if self.encoder_decoder:
            return {"input_ids": source, "labels": target}
        bos = special_token(self.tokenizer, "bos_token_id")
        start = [] if bos is None else [bos]
        prompt = start + source
        return {"input_ids": prompt + target, "labels": [IGNORED_LABEL] * len(prompt) + target}

    def _conversation(self, chat: ChatEncoder, row: Example) -> dict[str, list[int]]:
        """Encode a conversation; only assistant turns have labels."""
        turns = row.metadata["turns"]
        if self.encoder_decoder:
            source = chat_input(chat, row, self.tokenizer, self.max_input_tokens, encoder_decoder=True)
            return {"input_ids": source, "labels": self._targets([row], [[]])[0]}
        ids, mask = chat.training(turns, self.max_input_tokens, self.max_target_tokens, place_of(row))
        return {
            "input_ids": ids,
            "labels": [token if own else IGNORED_LABEL for token, own in zip(ids, mask, strict=True)],
        }

    def lengths(self) -> Lengths:
        """Return numbers of input tokens and of target tokens [examples 2], without the tokens around them."""
        limits = (self.encoder_decoder, self.max_input_tokens, self.max_target_tokens)
        return row_lengths(self.rows, self.tokenizer, self._counts, "input and target", *limits)

    def input_lengths(self) -> Lengths:
        """Return the numbers of tokens in `input_ids` [examples]."""
        lengths = self.lengths()
        if self.encoder_decoder or self.chat is not None:
            return lengths[:, 0]
        # a decoder reads start token, input and target in one row
        return lengths.sum(1) + (special_token(self.tokenizer, "bos_token_id") is not None)

    def _counts(self, rows: Sequence[Example]) -> list[tuple[int, int]]:
        if self.chat is not None:
            encoded = [self._encoded(row) for row in rows]
            return [(len(row["input_ids"]), len(row["labels"])) for row in encoded]
        inputs = self._inputs(rows)
        return [(len(ids), len(target)) for ids, target in zip(inputs, self._targets(rows, inputs), strict=True)]

    def _inputs(self, rows: Sequence[Example]) -> list[list[int]]:
        return encode_inputs(self.tokenizer, rows, self.max_input_tokens, automatic=self.encoder_decoder)

    def _targets(self, rows: Sequence[Example], inputs: Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids of the targets; parts about a text beyond the end of a cut input are left out."""
        end = special_token(self.tokenizer, "eos_token_id")
        targets: list[str] = []
        for row, source in zip(rows, inputs, strict=True):
            target, limit = row.target, self.max_input_tokens
            if len(source) >= limit and PARTS in row.metadata:
                target, _ = visible_target(self.tokenizer, row, limit, automatic=self.encoder_decoder)
            # a decoder gets input and target in one row, so a space separates them
            targets.append(target if self.encoder_decoder else f" {target}")
        escape = any(row.metadata.get(ESCAPE) for row in rows)
        # before targets are encoded, which makes the source language the target language if there is none
        code = target_language(self.tokenizer) if self.encoder_decoder else None
        # tokenizers of translation models have another vocabulary, or a language token, for targets
        encoded = encode_texts(self.tokenizer, targets, automatic=False, escape=escape, as_targets=self.encoder_decoder)
        language = [] if code is None else [code]
        room = self.max_target_tokens - 1 - len(language)
        return [language + ids[:room] + ([] if end is None else [end]) for ids in encoded]


def target_language(tokenizer: Any) -> int | None:
    """Token id of the target language of a multilingual translation model (M2M100, NLLB, mBART); None for others.

    The tokenizer names the languages in `src_lang` and `tgt_lang`, which `save_pretrained` keeps.

    Raises:
        ConfigError: If the tokenizer of a multilingual model names no target language, or one that it does not know.
    """
    code, name = getattr(tokenizer, "tgt_lang", None), type(tokenizer).__name__
    if not code:
        # a property of the classes of multilingual tokenizers
        if not hasattr(type(tokenizer), "src_lang"):
            return None
        raise ConfigError(
            f"Found a multilingual tokenizer ({name}) with source language {tokenizer.src_lang} and no target "
            f"language. Expected the codes of both. {_SAVE_LANGUAGES}"
        )
    by_code = getattr(tokenizer, "get_lang_id", None)
    try:
        found = tokenizer.convert_tokens_to_ids(code) if by_code is None else by_code(code)
    except KeyError:
        found = None
    if found is None or found == getattr(tokenizer, "unk_token_id", None):
        raise ConfigError(
            f"Found target language {code!r}, which the tokenizer ({name}) does not know. Expected one of its codes. "
            f"{_SAVE_LANGUAGES}"
        )
    return int(found)


_SAVE_LANGUAGES = (
    'Save the tokenizer with them: AutoTokenizer.from_pretrained(MODEL, src_lang="eng_Latn", tgt_lang="deu_Latn")'
    ".save_pretrained(MODEL)."
)


def is_chat(row: Example) -> bool:
    """True if an example is a conversation, which is encoded with the chat template."""
    return "turns" in row.metadata


def has_chat(rows: Sequence[Example]) -> bool:
    """True if some example is a conversation."""
    return has_metadata(rows, "turns")


def place_of(row: Example) -> str:
    """File and place of a conversation, else the key of the example."""
    return str(row.metadata.get("where", f"example {row.key}"))


def chat_input(
    chat: ChatEncoder, row: Example, tokenizer: PreTrainedTokenizerBase, limit: int, *, encoder_decoder: bool
) -> list[int]:
    """Return the prompt of a conversation as input of a model; encoders get an end-of-sequence token.

    Args:
        chat: Encoder of conversations.
        row: The conversation.
        tokenizer: Tokenizer of the model.
        limit: Maximum number of tokens.
        encoder_decoder: True if the prompt is the input of an encoder.
    """
    ids = chat.prompt(row.metadata["turns"], limit, place_of(row))
    end = special_token(tokenizer, "eos_token_id")
    if not encoder_decoder or end is None or ids[-1:] == [end]:
        return ids
    return [*ids[-(limit - 1) :], end]


class LabelledExamples(Dataset[dict[str, Any]]):
    """Data set of examples with class targets, encoded on access.

    Args:
        rows: Examples to encode.
        tokenizer: Tokenizer of the model.
        label2id: Class index by name, from the model's config.
        max_input_tokens: Maximum length of an input; longer ones are truncated, the longer text of a pair first.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        label2id: Mapping[str, int],
        max_input_tokens: int,
    ) -> None:
        unknown = next((row for row in rows if row.target not in label2id), None)
        if unknown is not None:
            raise DataError(
                f"Found the class {unknown.target!r} in example {unknown.key}; the model's head has "
                f"{', '.join(label2id)}. Convert a model for this task (graftwork convert … --task), or check the data."
            )
        self.rows = rows
        self.tokenizer = tokenizer
        self.label2id = label2id
        self.max_input_tokens = max_input_tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        encoded = self.tokenizer(row.input, row.pair, truncation=True, max_length=self.max_input_tokens)
        columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        return {**columns, "labels": self.label2id[row.target]}

    def input_lengths(self) -> Lengths:
        """Return the numbers of tokens in `input_ids` [examples]."""

        def count(rows: Sequence[Example]) -> list[int]:
            texts = [row.input for row in rows]
            # the tokenizer takes pairs for all rows of a batch or for none
            if any(row.pair is not None for row in rows):
                return [len(self.tokenizer(row.input, row.pair, **options)["input_ids"]) for row in rows]
            encoded: Any = self.tokenizer(texts, **options)
            return [len(ids) for ids in encoded["input_ids"]]

        options: dict[str, Any] = {"truncation": True, "max_length": self.max_input_tokens, "verbose": False}
        return row_lengths(self.rows, self.tokenizer, count, "text pairs", self.max_input_tokens)


def encode(
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase | None,
    model: nn.Module,
    *,
    max_input_tokens: int,
    max_target_tokens: int,
) -> EncodedExamples | LabelledExamples:
    """Encode examples with class targets for a classification head, else with text targets.

    Args:
        rows: Examples to encode.
        tokenizer: Tokenizer of the model.
        model: Model that is trained or evaluated.
        max_input_tokens: Maximum length of an input.
        max_target_tokens: Maximum length of a text target.

    Raises:
        ConfigError: If there is no tokenizer, or the model can neither generate nor classify.
        DataError: If the class of an example is missing in the model's config.
    """
    if tokenizer is None:
        raise ConfigError("Found a model without a tokenizer; expected one to encode examples. Pass tokenizer=.")
    inner = pretrained(model)
    if is_classifier(inner):
        label2id: Any = inner.config.label2id
        return LabelledExamples(rows, tokenizer, label2id=label2id, max_input_tokens=max_input_tokens)
    if not inner.can_generate():
        raise ConfigError(
            f"{type(inner).__name__} can neither generate text nor classify. Convert it for a task "
            "(graftwork convert … --task NAME), which gives it a classification head."
        )
    return EncodedExamples(
        rows,
        tokenizer,
        encoder_decoder=bool(inner.config.is_encoder_decoder),
        max_input_tokens=max_input_tokens,
        max_target_tokens=max_target_tokens,
    )


@dataclass(frozen=True)
class PadBatch:
    """Collator of encoded rows of unequal length into tensors [batch tokens]."""

    padding_id: int
    side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad `input_ids` and `labels` to their longest rows [batch tokens], add the mask, and stack class labels.

        Columns of second examples are padded by themselves [pairs tokens]; rows without one are left out of them.
        """
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": self._pad(ids, self.padding_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._pad([torch.tensor(row["token_type_ids"]) for row in rows], 0)
        if "labels" in rows[0] and isinstance(rows[0]["labels"], int):
            batch["labels"] = torch.tensor([row["labels"] for row in rows])  # [batch]
        elif "labels" in rows[0]:
            batch["labels"] = self._pad([torch.tensor(row["labels"]) for row in rows], IGNORED_LABEL)
        names = ("input_ids", "labels")
        seconds = [{name: row[SECOND + name] for name in names} for row in rows if SECOND + "input_ids" in row]
        return {**batch, **{SECOND + name: value for name, value in (self(seconds) if seconds else {}).items()}}

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=value, padding_side="left" if self.side == "left" else "right"
        )


def padding_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the padding token, else the end-of-sequence token, else 0; the positions are masked in any case."""
    tokens = (special_token(tokenizer, name) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in tokens if token is not None), 0)


def special_token(tokenizer: PreTrainedTokenizerBase | None, name: str) -> int | None:
    """Return the id of a special token such as "bos_token_id"; None if there is no such token."""
    # transformers computes these attributes, so their declared types include texts and lists
    token: Any = getattr(tokenizer, name, None)
    return None if token is None else int(token)
