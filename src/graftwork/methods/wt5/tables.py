"""The 163 tasks and 50 mixtures of the paper, generated per data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from graftwork.methods.wt5 import formats
from graftwork.methods.wt5.formats import SENTIMENTS, TRUTHS
from graftwork.methods.wt5.parsing import Mode
from graftwork.methods.wt5.templates import (
    Abstractive,
    ClassId,
    Extractive,
    Format,
    Template,
    abstractive_metrics,
    class_metrics,
    extractive_metrics,
    reference_order,
)
from graftwork.settings.lengths import PROFILES, Lengths
from graftwork.tasks.cos_e import cos_e
from graftwork.tasks.eraser import MOVIES, MULTIRC
from graftwork.tasks.esnli import ESNLI, LABELS
from graftwork.tasks.mnli import mnli
from graftwork.tasks.reviews import AMAZON_CATEGORIES, IMDB, amazon
from graftwork.tasks.sources import Source
from graftwork.tasks.task import SIZE, Mixture, Task

COS_E_COUNTS = (5000, 2000, 1000, 500, 200, 100)
ESNLI_COUNTS = (50000, 20000, 10000, 5000, 2000, 1000, 500, 200, 100)
MOVIE_COUNTS = (1000, 500, 200, 100)
MULTIRC_COUNTS = (10000, 5000, 2000, 1000, 500, 200, 100)
"""Numbers of explained examples in the paper's experiments, per data set."""

COS_E_SIZE, COS_E_VALIDATION_SIZE = 9741, 1221
ESNLI_SIZE = 549367
MNLI_SIZE, MNLI_VALIDATION_SIZE = 392702, 9815
MOVIE_SIZE = 1600
MULTIRC_SIZE = 24029
AMAZON_SIZE = 125_000_000
"""Numbers of training examples, used as mixture rates."""

AMAZON_FACTORS = (10, 20, 30, 40)
"""Sampling ratios of movie examples to Amazon examples."""

_TRAIN = ("train",)
_TRAIN_VALIDATION = ("train", "validation")
_ALL = ("train", "validation", "test")
_EVALUATION = ("validation", "test")
_AMAZON = tuple(category.lower() for category in AMAZON_CATEGORIES)
_AMAZON_EVALUATED = ("books_v1_00", "electronics_v1_00", "apparel_v1_00")


def _abstractive(
    name: str, splits: tuple[str, ...], source: Source, template: Template, *, lengths: Lengths, scored: bool = True
) -> Task:
    def task(mode: Mode) -> Task:
        metrics = abstractive_metrics(mode) if scored else ()
        return Task(
            name=name,
            source=source,
            format=template,
            parse=Abstractive(mode),
            metrics=metrics,
            splits=splits,
            lengths=lengths,
            new_tokens=None,
            version=2,
            description="label and free-text explanation" if "explain" in str(template.options) else "label",
        )

    return replace(task("fixed"), reference=task("reference"))


def _cos_e_tasks() -> Iterator[Task]:
    source = cos_e()

    def task(name: str, splits: tuple[str, ...], *, scored: bool = True, **options: Any) -> Task:
        template = Template(formats.cos_e, options)
        return _abstractive(name, splits, source, template, lengths=PROFILES["cos_e"], scored=scored)

    nli: dict[str, Any] = {"question_prefix": "premise:"}
    explained: dict[str, Any] = {"prefix": "explain cos_e"}
    label_only: dict[str, Any] = {"prefix": "cos_e", "drop_explanations": True}
    yield task("cos_e_v001", _TRAIN_VALIDATION, **explained)
    yield task("cos_e_v001_0_expln_like_esnli", _TRAIN_VALIDATION, prefix="nli", drop_explanations=True, **nli)
    for count in COS_E_COUNTS:
        taken = task(f"cos_e_explanations_take{count}_v001", _TRAIN, scored=False, **explained)
        rest = task(f"cos_e_labels_skip{count}_v001", _TRAIN, scored=False, **label_only)
        yield from _take_and_skip(taken, rest, count)
    yield task("cos_e_eval_v001", ("validation",), **explained)
    yield task("cos_e_eval_v001_like_esnli", ("validation",), prefix="explain nli", **nli)


def _esnli_tasks() -> Iterator[Task]:
    def task(name: str, splits: tuple[str, ...], *, scored: bool = True, **options: Any) -> Task:
        template = Template(formats.esnli, options, LABELS)
        return _abstractive(name, splits, ESNLI, template, lengths=PROFILES["esnli"], scored=scored)

    explained: dict[str, Any] = {"prefix": "explain nli"}
    label_only: dict[str, Any] = {"prefix": "nli", "drop_explanations": True}
    yield task("esnli_v010", _ALL, **explained)
    yield task("esnli_v010_0_expln", _ALL, **label_only)
    yield task("esnli_v010_with_choices", _ALL, add_choices=True, **explained)
    yield task("esnli_v010_0_expln_with_choices", _ALL, add_choices=True, **label_only)
    yield task("esnli_eval_v010", _EVALUATION, **explained)
    for count in ESNLI_COUNTS:
        taken = task(f"esnli_explanations_take{count}_v010", _TRAIN, scored=False, **explained)
        rest = task(f"esnli_labels_skip{count}_v010", _TRAIN, scored=False, **label_only)
        yield from _take_and_skip(taken, rest, count)


def _mnli_tasks() -> Iterator[Task]:
    splits = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    template = Template(formats.esnli, {"prefix": "nli", "drop_explanations": True}, LABELS)
    reference = Task(
        name="mnli_v002",
        source=mnli(),
        format=template,
        parse=ClassId(LABELS),
        metrics=class_metrics(LABELS),
        splits=splits,
        lengths=PROFILES["esnli"],
        new_tokens=None,
        version=2,
        description="label",
    )
    # without a split named validation, evaluation of a mixture on it skips this task silently
    yield replace(reference, splits=("train", "validation", *splits[1:]), reference=reference)
    for part in ("matched", "mismatched"):
        asked = Template(formats.esnli, {"prefix": "explain nli"}, LABELS)
        yield _abstractive(f"mnli_explain_eval_{part}_v002", _EVALUATION, mnli(part), asked, lengths=PROFILES["esnli"])


def _extractive(
    name: str,
    splits: tuple[str, ...],
    source: Source,
    format: Format,
    options: Mapping[str, Any],
    *,
    field: str,
    classes: tuple[str, ...],
    scored: bool = True,
    rationales: bool = True,
    reference_prefix: str | None = None,
    tokenizer: str = "whitespace",
) -> Task:
    def task(mode: Mode) -> Task:
        parser = Extractive(mode, "spacy" if mode == "reference" else tokenizer)
        words = dict(options)
        if rationales:
            words["rationale_order"] = reference_order(mode)
        if mode == "reference" and reference_prefix is not None:
            words["prefix"] = reference_prefix
        first = mode == "reference" and field == "passage"
        template = Template(format, words, classes, field, first)
        metrics = extractive_metrics(parser, question_answering=field == "passage") if scored else ()
        return Task(
            name=name,
            source=source,
            format=template,
            parse=parser,
            metrics=metrics,
            splits=splits,
            lengths=PROFILES["eraser_multi_rc" if field == "passage" else "movie_rationales"],
            new_tokens=None,
            version=2,
            description="label" if words.get("drop_explanations") else "label and spans of the text",
        )

    return replace(task("fixed"), reference=task("reference"))


def _movie_tasks() -> Iterator[Task]:
    task = partial(
        _extractive, source=MOVIES, format=formats.extractive_explanations, field="review", classes=SENTIMENTS
    )
    explained = {"prefix": "explain sentiment"}
    label_only = {"prefix": "sentiment", "drop_explanations": True}
    yield task("movie_rationales_v010", _ALL, options=explained)
    yield task("movie_rationales_v010_no_expl", _ALL, options=label_only, scored=False)
    for count in MOVIE_COUNTS:
        taken = task(f"movie_rationales_explanations_take{count}_v010", _TRAIN, options=explained, scored=False)
        # the authors' code drops these explanations but still requests them
        rest = task(
            f"movie_rationales_labels_skip{count}_v010",
            _TRAIN,
            options=label_only,
            scored=False,
            reference_prefix="explain sentiment",
        )
        yield from _take_and_skip(taken, rest, count)
    yield task("movie_rationales_eval_v010", _EVALUATION, options=explained)


def _multirc_tasks() -> Iterator[Task]:
    task = partial(_extractive, source=MULTIRC, format=formats.eraser_multi_rc, field="passage", classes=TRUTHS)
    explained = {"prefix": "explain multirc"}
    label_only = {"prefix": "multirc", "drop_explanations": True}
    yield task("eraser_multi_rc_v011", _ALL, options=explained)
    for count in MULTIRC_COUNTS:
        taken = task(f"eraser_multi_rc_explanations_take{count}_v011", _TRAIN, options=explained, scored=False)
        rest = task(
            f"eraser_multi_rc_labels_skip{count}_v011",
            _TRAIN,
            options=label_only,
            scored=False,
            reference_prefix="explain multirc",
        )
        yield from _take_and_skip(taken, rest, count)
    yield task("eraser_multi_rc_eval_v011", _EVALUATION, options=explained)


def _review_tasks() -> Iterator[Task]:
    def labels(name: str, source: Source, format: Format, splits: tuple[str, ...]) -> Task:
        return Task(
            name=name,
            source=source,
            format=Template(format, {"prefix": "sentiment"}, SENTIMENTS),
            parse=ClassId(SENTIMENTS),
            metrics=class_metrics(SENTIMENTS),
            splits=splits,
            lengths=PROFILES["movie_rationales"],
            new_tokens=None,
            version=2,
            description="label",
        )

    asked = partial(
        _extractive, options={"prefix": "explain sentiment"}, classes=SENTIMENTS, rationales=False, tokenizer="spacy"
    )
    yield labels("imdb_reviews_v100", IMDB, formats.imdb_reviews, ("train", "test"))
    yield asked("imdb_reviews_eval_v100", ("test",), IMDB, formats.imdb_reviews, field="text")
    for category, name in zip(AMAZON_CATEGORIES, _AMAZON, strict=True):
        source = amazon(category)
        yield labels(f"amazon_reviews_{name}_v010", source, formats.amazon_reviews, _TRAIN_VALIDATION)
        yield asked(f"amazon_reviews_{name}_eval_v010", ("validation",), source, formats.amazon_reviews, field="review")


def _take_and_skip(taken: Task, rest: Task, count: int) -> Iterator[Task]:
    """Restrict one task to the first `count` records and the other to the remaining records, in both modes."""
    for task, name in ((taken, "take"), (rest, "skip")):
        subset: dict[str, Any] = {name: count}
        reference = None if task.reference is None else replace(task.reference, **subset)
        yield replace(task, reference=reference, **subset)


def _few(name: str, taken: str, rest: str, evaluated: str, count: int, size: int) -> Mixture:
    rates = {taken: count, rest: size - count, evaluated: size}
    return Mixture(name, rates, f"{count} explained examples, all others with the label alone")


def _mixtures() -> Iterator[Mixture]:
    for count in COS_E_COUNTS:
        names = (f"cos_e_explanations_take{count}_v001", f"cos_e_labels_skip{count}_v001", "cos_e_eval_v001")
        yield _few(f"cos_e_{count}_explanations", *names, count, COS_E_SIZE)
    asked = {f"mnli_explain_eval_{part}_v002": MNLI_VALIDATION_SIZE for part in ("matched", "mismatched")}
    for count in ESNLI_COUNTS:
        names = (f"esnli_explanations_take{count}_v010", f"esnli_labels_skip{count}_v010", "esnli_eval_v010")
        few = _few(f"esnli_{count}_explanations", *names, count, ESNLI_SIZE)
        yield few
        rates = {**few.rates, "mnli_v002": MNLI_SIZE, **asked}
        yield Mixture(f"esnli_mnli_{count}_explanations", rates, f"{few.description}, with MNLI")
    everything = dict.fromkeys(("esnli_v010", "mnli_v002", *asked), SIZE)
    yield Mixture("esnli_mnli_all_explanations", everything, "e-SNLI explained, MNLI with its label alone")
    for choices in ("", "_with_choices"):
        rates = {
            f"esnli_v010{choices}": ESNLI_SIZE,
            f"esnli_v010_0_expln{choices}": ESNLI_SIZE,
            "cos_e_v001_0_expln_like_esnli": COS_E_SIZE,
            "cos_e_eval_v001_like_esnli": COS_E_VALIDATION_SIZE,
        }
        name = "esnli_cos_e_transfer" + ("_choices" if choices else "")
        yield Mixture(name, rates, "explained e-SNLI, CoS-E with its label alone in the format of e-SNLI")
    for count in MOVIE_COUNTS:
        stem = "movie_rationales"
        names = (f"{stem}_explanations_take{count}_v010", f"{stem}_labels_skip{count}_v010", f"{stem}_eval_v010")
        yield _few(f"{stem}_{count}_explanations", *names, count, MOVIE_SIZE)
    for count in MULTIRC_COUNTS:
        stem = "eraser_multi_rc"
        names = (f"{stem}_explanations_take{count}_v011", f"{stem}_labels_skip{count}_v011", f"{stem}_eval_v011")
        yield _few(f"{stem}_rationales_{count}_explanations", *names, count, MULTIRC_SIZE)
    yield from _review_mixtures()


def _review_mixtures() -> Iterator[Mixture]:
    imdb = ("imdb_reviews_v100", "movie_rationales_v010", "imdb_reviews_eval_v100")
    yield Mixture("imdb_reviews_movie_rationales", dict.fromkeys(imdb, SIZE), "explained movies, IMDb with labels")
    trained = [f"amazon_reviews_{name}_v010" for name in _AMAZON]
    asked = [f"amazon_reviews_{name}_eval_v010" for name in _AMAZON]
    movies = "movie_rationales_v010"
    yield Mixture("amazon_reviews", dict.fromkeys(trained, SIZE), "Amazon reviews with labels")
    everything = dict.fromkeys((*trained, *asked, movies), SIZE)
    yield Mixture("amazon_reviews_movie_rationales", everything, "explained movies, Amazon with labels")
    books = ("amazon_reviews_books_v1_00_v010", movies, "amazon_reviews_books_v1_00_eval_v010")
    yield Mixture("amazon_books_movies_equal", dict.fromkeys(books, 1), "explained movies and books, drawn equally")
    some = [f"amazon_reviews_{name}_eval_v010" for name in _AMAZON_EVALUATED]
    for factor in AMAZON_FACTORS:
        members = dict.fromkeys((*trained, *some), SIZE)
        share = factor * AMAZON_SIZE
        text = f"a movie is drawn {factor} times as often as an Amazon review"
        yield Mixture(f"amazon_reviews_movies_r{factor}", {**members, movies: share}, text)
        halves = {movies: share / 2, "movie_rationales_v010_no_expl": share / 2}
        yield Mixture(
            f"amazon_reviews_movies_transfer_r{factor}", {**members, **halves}, f"{text}, half without an explanation"
        )


TASKS: Mapping[str, Task] = {
    task.name: task
    for family in (_cos_e_tasks, _esnli_tasks, _mnli_tasks, _movie_tasks, _review_tasks, _multirc_tasks)
    for task in family()
}
"""Every task of the paper, by name."""

MIXTURES: Mapping[str, Mixture] = {mixture.name: mixture for mixture in _mixtures()}
"""Every mixture of the paper, by name."""
