"""Translation of parallel text, scored by BLEU and chrF of sacrebleu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graftwork.core.example import Example, Examples
from graftwork.errors import DataError, MissingExtraError
from graftwork.metrics.metric import MetricGroup
from graftwork.tasks.sources import Record, Records, read_json_lines, read_lines, read_tsv
from graftwork.tasks.task import Task

PAIRS = (("en", "de"), ("en", "fr"), ("en", "ro"), ("en", "es"), ("source", "target"))
"""Language pairs with a task in both directions; source and target are names for any other pair."""
_SPLITS = {"dev": ("dev", "valid", "validation"), "validation": ("validation", "valid", "dev")}


@dataclass(frozen=True, slots=True)
class ParallelText:
    """Reader of `<split>.<source>` and `<split>.<target>`, one sentence a line, or of `<split>.tsv` or `<split>.jsonl`.

    A TSV file has a header with both languages; a JSON line has both as keys, or under `translation`, as on the hub.
    """

    source: str
    target: str

    def __call__(self, data: Path, split: str) -> Records:
        """Read the sentence pairs of a split; pairs with an empty side are ignored.

        Raises:
            DataError: If there is no such file, both sides have different numbers of lines, or a language is missing.
        """
        for name in _SPLITS.get(split, (split,)):
            sides = [data / f"{name}.{language}" for language in (self.source, self.target)]
            if all(side.is_file() for side in sides):
                return self._records(split, self._parallel(sides), data)
            for path, read in ((data / f"{name}.tsv", self._tsv), (data / f"{name}.jsonl", self._json_lines)):
                if path.is_file():
                    return self._records(split, read(path), path)
        raise DataError(
            f"Found no {split} text in {data}. Expected {split}.{self.source} and {split}.{self.target}, {split}.tsv "
            f"or {split}.jsonl. Name the folder with --data, or another split."
        )

    def _records(self, split: str, pairs: Sequence[tuple[str, str]], path: Path) -> Records:
        rows = tuple(
            Record(str(number), {"source": source.strip(), "target": target.strip()})
            for number, (source, target) in enumerate(pairs)
            if source.strip() and target.strip()
        )
        name = f"{self.source}_{self.target}"
        return Records(name, split, rows, len(rows), len(pairs) - len(rows), path)

    def _parallel(self, sides: Sequence[Path]) -> list[tuple[str, str]]:
        source, target = (list(read_lines(side)) for side in sides)
        if len(source) != len(target):
            raise DataError(
                f"{sides[0]} has {len(source)} lines and {sides[1]} has {len(target)}. Expected equal numbers: line n "
                "of one is the translation of line n of the other."
            )
        return list(zip(source, target, strict=True))

    def _tsv(self, path: Path) -> list[tuple[str, str]]:
        return [self._pair(cells, f"{path}, line {number + 2}") for number, cells in read_tsv(path).rows]

    def _json_lines(self, path: Path) -> list[tuple[str, str]]:
        pairs: list[tuple[str, str]] = []
        for number, row in read_json_lines(path):
            fields = _fields(row)
            pairs.append(self._pair(fields.get("translation", fields), f"{path}, line {number}"))
        return pairs

    def _pair(self, row: Any, where: str) -> tuple[str, str]:
        fields = _fields(row)
        found: list[str] = []
        for language in (self.source, self.target):
            text = fields.get(language)
            if not isinstance(text, str):
                keys = ", ".join(fields) or type(row).__name__
                raise DataError(f"{where}: found {keys}. Expected the texts {self.source} and {self.target}.")
            found.append(text)
        return found[0], found[1]


def _fields(row: object) -> dict[str, Any]:
    """Fields of a row; none if it is no object."""
    return dict(cast("Mapping[str, Any]", row)) if isinstance(row, Mapping) else {}


def translation_example(record: Record) -> Example:
    """Format a sentence pair: the source as input, the target as the only answer."""
    return Example(record.key, record.fields["source"], record.fields["target"])


def translation_task(source: str, target: str) -> Task:
    """Make a translation task of one direction."""
    return Task(
        name=f"translation/{source}_{target}",
        source=ParallelText(source, target),
        format=translation_example,
        metrics=(TRANSLATION_SCORES,),
        description=f"translation from {source} to {target}; parallel files, TSV or JSON lines in the data folder",
    )


def translation_scores(predictions: Sequence[str], examples: Examples) -> dict[str, float]:
    """Corpus BLEU with the tokenizer 13a and chrF, in [0, 100], with sacrebleu's defaults; `signatures` names them.

    Source: Post 2018, `sacrebleu`; Popović 2015.
    """
    references = [[row.target for row in examples.rows]]
    bleu, chrf = _metrics()
    return {
        "bleu": float(bleu.corpus_score(list(predictions), references).score),
        "chrf": float(chrf.corpus_score(list(predictions), references).score),
    }


def signatures() -> str:
    """Signatures of sacrebleu for both metrics."""
    found: list[str] = []
    for name, metric in zip(("BLEU", "chrF2"), _metrics(), strict=True):
        metric.corpus_score(["a"], [["a"]])
        found.append(f"{name} {metric.get_signature()}")
    return "; ".join(found)


def _metrics() -> tuple[Any, Any]:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise MissingExtraError("sacrebleu", "wt5") from None
    return BLEU(), CHRF()


TRANSLATION_SCORES = MetricGroup(("bleu", "chrf"), translation_scores, note=signatures)

TASKS: Mapping[str, Task] = {
    task.name: task
    for one, other in PAIRS
    for task in (translation_task(one, other), translation_task(other, one))
    if (one, other) != ("source", "target") or task.name.endswith("source_target")
}
