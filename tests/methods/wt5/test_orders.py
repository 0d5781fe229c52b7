"""Orders of label and explanation: targets are read back, constrained, scored and weighted as they are defined."""

import math

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

from graftwork.core.example import AUXILIARY, Examples
from graftwork.demo import shipped_model
from graftwork.errors import ConfigError
from graftwork.evaluation.prediction import predict_records
from graftwork.grafting.conversion import convert, converted_of
from graftwork.grafting.formatting import formatted_rows
from graftwork.methods.wt5 import WT5, WT5Config
from graftwork.methods.wt5.decoding import GrammarProcessor, label_probabilities, lead_of
from graftwork.methods.wt5.grammar import grammar_of
from graftwork.methods.wt5.orders import ordered
from graftwork.methods.wt5.own_data import OwnFormat
from graftwork.methods.wt5.parsing import abstractive_explanations
from graftwork.methods.wt5.phases import FinetuneExplanations, tokens_before
from graftwork.methods.wt5.reading import read_answer
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.tasks import get_task
from graftwork.tasks.sources import Record
from graftwork.training.batching import BatchSize
from graftwork.training.encoding import EncodedExamples, PadBatch
from tiny_models import tiny_model
from tokenizer_layouts import layout

TEXTS = {
    "plain": ("the pace drags . the plot drags badly", ((4, 14), (21, 37))),
    "punctuation": ("Stay home. A lazy sequel.", ((13, 24),)),
    "marks": ("the label: is torn , explanation: none is given", ((4, 18), (21, 38))),
    "control token": ("a film </s> that ends <pad> before it begins .", ((2, 16),)),
    "no span": ("a joy to watch", ()),
}
ORDERS = ("label_first", "reason_first", "separate")
SETTINGS = EvaluationSettings(max_input_tokens=96, max_new_tokens=24, batch_size=4)


@pytest.fixture(scope="module", params=["shipped", "byt5", "llama3"])
def tokenizer(request):
    if request.param == "byt5":
        return ByT5Tokenizer()
    return layout("llama3") if request.param == "llama3" else shipped()


def shipped():
    return AutoTokenizer.from_pretrained(shipped_model("encoder_decoder"))


def movie(name, key="a"):
    text, spans = TEXTS[name]
    return get_task("movie_rationales_v010").format(Record(key, {"review": text, "label": 1, "span_offsets": spans}))


def question(reasons=("trunks carry spares",), key="q"):
    form = OwnFormat(("boot", "pond", "label: attic"), spans=False)
    return form(Record(key, {"text": "where is the spare ?", "label": "boot", "explanations": reasons}))


def prompts(row, order, **options):
    """The example of a training in an order, and its second one."""
    first = ordered(row, order, training=True, **options)
    return first, first.metadata.get(AUXILIARY)


def test_targets_of_the_three_orders():
    row = question(("trunks carry spares", "it is dry"))
    assert row.target == "boot explanation: trunks carry spares explanation: it is dry"
    reasoned, none = prompts(row, "reason_first")
    assert (reasoned.target, reasoned.input, none) == (
        "explanation: trunks carry spares explanation: it is dry label: boot",
        row.input,
        None,
    )
    label, reason = prompts(row, "separate")
    assert (label.input, label.target) == ("classify text: where is the spare ?", "boot")
    assert (reason.input, reason.target) == (row.input, "trunks carry spares explanation: it is dry")
    # without an explanation, there is a label only
    label, reason = prompts(question(()), "separate")
    assert (label.target, reason) == ("boot", None)
    assert prompts(question(()), "reason_first")[0].target == "label: boot"


def test_an_answer_has_an_explanation_on_request_only():
    row = question()
    assert AUXILIARY not in ordered(row, "separate", training=False).metadata
    assert AUXILIARY not in ordered(row, "separate", training=False, explain=False).metadata
    assert ordered(row, "separate", training=False, explain=True).metadata[AUXILIARY].input == row.input
    plain = OwnFormat(("boot", "pond"), spans=False)(Record("p", {"text": "t", "label": "boot", "explain": False}))
    assert AUXILIARY not in ordered(plain, "separate", training=True).metadata
    assert ordered(plain, "reason_first", training=True) == plain


def test_a_conversation_has_the_target_of_its_order():
    form = OwnFormat(("bad", "good"), spans=True, chat=True)
    row = form(Record("a", {"text": "a lazy film", "label": "bad", "spans": ((2, 6),)}))
    assert prompts(row, "reason_first")[0].metadata["turns"] == (
        ("user", "explain classify text: a lazy film"),
        ("assistant", "explanation: lazy label: bad"),
    )
    label, reason = prompts(row, "separate")
    assert label.metadata["turns"] == (("user", "classify text: a lazy film"), ("assistant", "bad"))
    assert reason.metadata["turns"] == (("user", row.input), ("assistant", "lazy"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("both", [True, False])
def test_every_target_is_read_back(tokenizer, order, both):
    rows = [*map(movie, TEXTS), question(), question(("label: of the boot", "dry")), question(())]
    for row in rows:
        found = {}
        for part in filter(None, prompts(row, order)):
            lead = lead_of(part, encoder_decoder=both)
            data = EncodedExamples([part], tokenizer, encoder_decoder=both, max_input_tokens=300, max_target_tokens=300)
            ids = [token for token in data[0]["labels"] if token != -100]
            read = read_answer(tokenizer, grammar_of(tokenizer, part, lead=lead), part, ids)
            found = {**read, "label": found["label"]} if found else dict(read)
        metadata = row.metadata
        assert found["label"] == metadata["label"]
        assert found.get("spans", []) == [list(span) for span in metadata.get("spans", ())]
        assert found["explanations"] == list(metadata["explanations"])
        assert found.get("unmatched", 0) == 0


@pytest.mark.parametrize("order", ["reason_first", "separate"])
def test_constrained_answers_are_complete_within_the_limit(tokenizer, order):
    asked = [*map(movie, TEXTS), question()]
    spans = 0
    for number in range(24):
        row = ordered(asked[number % len(asked)], order, training=False, explain=True)
        for part in (row, row.metadata.get(AUXILIARY)):
            if part is None:
                continue
            grammar = grammar_of(tokenizer, part)
            shortest = len(max(grammar.labels, key=len)) + sum(map(len, grammar.marks)) + len(grammar.opening) + 12
            limit = shortest + number
            generator = torch.Generator().manual_seed(number)
            processor = GrammarProcessor([grammar], limit)
            ids = torch.zeros(1, 1, dtype=torch.long)
            while (ids.shape[1] <= limit and ids[0, -1] not in grammar.ends) or ids.shape[1] == 1:
                wishes = torch.rand(1, len(tokenizer), generator=generator)
                wishes[0, grammar.end] *= 0.9
                ids = torch.cat([ids, processor(ids, wishes).argmax(-1, keepdim=True)], dim=1)
            read = read_answer(tokenizer, grammar, part, ids[0, 1:].tolist())
            if grammar.order != "rationale":
                assert read["label"] in row.metadata["choices"]
            assert ids[0, -1] in grammar.ends or grammar.order == "rationale"
            assert read.get("unmatched", 0) == 0
            spans += len(read.get("spans", ()))
    assert spans


@pytest.mark.parametrize(
    ("text", "order", "label", "reasons"),
    [
        ("explanation: it rains label: wet", "reason_first", "wet", ["it rains"]),
        ("it rains label: wet", "reason_first", "wet", ["it rains"]),
        ("explanation: the label: is torn label: wet", "reason_first", "wet", ["the label: is torn"]),
        ("explanation: it rains", "reason_first", "", ["it rains"]),
        ("wet", "reason_first", "wet", []),
        ("label: wet", "reason_first", "wet", []),
        ("explanation: a explanation:  label: wet", "reason_first", "wet", ["a"]),
        ("it rains explanation: it pours", "rationale", "", ["it rains", "it pours"]),
        ("wet explanation: it rains label: dry", "label_first", "wet", ["it rains label: dry"]),
    ],
)
def test_texts_are_parsed_in_their_order(text, order, label, reasons):
    assert abstractive_explanations(text, order=order) == {"label": label, "explanations": reasons}


def batch_of(rows, tokenizer, both=True):
    data = EncodedExamples(rows, tokenizer, encoder_decoder=both, max_input_tokens=96, max_target_tokens=48)
    return PadBatch(0)([data[index] for index in range(len(rows))])


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_loss_of_two_prompts_is_that_of_distilling_step_by_step(kind):
    tokenizer = shipped()
    model = tiny_model(kind, vocab_size=len(tokenizer)).float()
    both = kind == "t5"
    rows = [prompts(row, "separate")[0] for row in (question(), movie("plain"), movie("punctuation"), question(()))]
    batch = batch_of(rows, tokenizer, both)
    # as the original: two batches, each with the model's own loss
    second = batch_of([row.metadata[AUXILIARY] for row in rows[:3]], tokenizer, both)
    labels = {name: value for name, value in batch.items() if not name.startswith("auxiliary_")}
    expected = 0.3 * model(**labels).loss + 0.7 * model(**second).loss
    phase = FinetuneExplanations(alpha=0.3)
    phase.prepare(model, tokenizer)
    found = phase.step(model, batch)["loss"]
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(phase.validate(model, batch)["loss"], found)
    # an estimate of memory counts both prompts
    sizes = {name: value.shape for name, value in phase.sample_batch(model, BatchSize(2, 8, 4)).items()}
    assert sizes["auxiliary_labels"] == sizes["labels"]
    assert not any("auxiliary" in name for name in FinetuneExplanations().sample_batch(model, BatchSize(2, 8, 4)))


def test_explanations_before_a_label_have_the_weight_of_explanations():
    labels = torch.tensor([[7, 8, 5, 6, 3, 1, -100], [3, 1, -100, -100, -100, -100, -100], [5, 6, 9, 5, 6, 3, 1]])
    expected = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
    assert torch.equal(tokens_before(labels, (5, 6)), expected)
    segments = torch.tensor([[1, 1, 2, 2, 2, 2, 0], [1, 2, 0, 0, 0, 0, 0], [1, 1, 2, 2, 2, 2, 2]])
    packed = torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
    assert torch.equal(tokens_before(labels, (5, 6), segments), packed)
    tokenizer = shipped()
    model = tiny_model("t5", vocab_size=len(tokenizer)).float()
    batch = batch_of([prompts(question(), "reason_first")[0]], tokenizer)
    each = torch.nn.functional.cross_entropy(model(**batch).logits[0], batch["labels"][0], reduction="none")
    count = len(tokenizer("explanation: trunks carry spares label:", add_special_tokens=False)["input_ids"])
    phase = FinetuneExplanations(2.0, reason_first=True)
    phase.prepare(model, tokenizer)
    weights = torch.tensor([2.0] * count + [1.0] * (len(each) - count))
    torch.testing.assert_close(phase.step(model, batch)["loss"], (each * weights).sum() / weights.sum())


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_probabilities_of_a_label_after_its_explanation(kind):
    tokenizer = shipped()
    model = tiny_model(kind, vocab_size=len(tokenizer)).float().eval()
    both = kind == "t5"
    row = prompts(question(), "reason_first")[0]
    reasons = ("trunks carry spares",)
    options = {"batch_size": 2, "max_input_tokens": 96}
    found = label_probabilities(model, tokenizer, [row], explanations=[reasons], **options)[0]
    scores = []
    for label in row.metadata["choices"]:
        target = f"explanation: {reasons[0]} label: {label}"
        ids = tokenizer(target if both else f" {target}", add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        source = tokenizer(row.input, add_special_tokens=both)["input_ids"]
        if both:
            logits = model(input_ids=torch.tensor([source]), labels=torch.tensor([ids])).logits[0]
        else:
            start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            logits = model(input_ids=torch.tensor([start + source + ids])).logits[0]
            logits = logits[len(start + source) - 1 : -1]
        own = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        scores.append(own.sum())
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.stack(scores).softmax(0).detach())
    others = label_probabilities(model, tokenizer, [row], **options)[0]
    assert others != found


@pytest.mark.parametrize("order", ORDERS)
def test_answers_are_predicted_scored_and_examined(order):
    tokenizer = shipped()
    model = tiny_model("t5", vocab_size=len(tokenizer)).float().eval()
    held = convert(
        converted_of(model, tokenizer),
        WT5(explanation_order=order, constrained=True, faithfulness=True, samples=2 if order == "separate" else None),
    )
    task = get_task("movie_rationales_eval_v010")
    rows = [task.format(Record(str(n), {"review": text, "label": 1, "span_offsets": spans}))
            for n, (text, spans) in enumerate([TEXTS["plain"], TEXTS["no span"]])]  # fmt: skip
    asked = formatted_rows(held, rows, explain=True)
    records = predict_records(held, asked, SETTINGS, digest="")
    assert all(record["answer"]["label"] in ("negative", "positive") for record in records)
    assert any(record["answer"]["spans"] for record in records) or order == "label_first"
    examined = held.methods[-1].examine(model, tokenizer, task, asked, records, SETTINGS)
    for entry, record in zip(examined.rows, records, strict=True):
        assert [list(span) for span in entry["characters"]] == record["answer"]["spans"]
        assert sum(entry["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert entry.get("order", "label_first") == order
        if len(entry["characters"]) == 1:
            assert entry["span_faithfulness"] == [[entry["comprehensiveness"], entry["sufficiency"]]]
        assert len(entry.get("span_faithfulness", [])) == len(entry["characters"])
    explained = sum(bool(record["answer"]["spans"]) for record in records)
    assert examined.scores.get("faithfulness_n", 0) == explained
    assert len(examined.rows[0].get("token_scores", range(8))) == 8
    scores = task.evaluate(
        [record["prediction"] for record in records],
        Examples(task.name, "validation", tuple(rows), len(rows), 0, "made"),
        located=[record["answer"] for record in records],
    )
    assert scores["parsed_rate"] == 100
    assert scores["spans_found"] == 100 or not explained
    if order == "separate":
        plain = formatted_rows(held, rows)
        short = predict_records(held, plain, SETTINGS, digest="")
        assert [one["prediction"] for one in short] == [record["answer"]["label"] for record in records]
        with pytest.raises(ConfigError, match="faithfulness is True, and no answer has an explanation"):
            held.methods[-1].examine(model, tokenizer, task, plain, short, SETTINGS)
        unasked = WT5(explanation_order=order).examine(model, tokenizer, task, plain, short, SETTINGS)
        assert math.isnan(unasked.scores["token_f1"])
        assert "accuracy" not in unasked.scores


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.5}, "alpha is 0.5, which has an effect with explanation_order separate only"),
        ({"alpha": 0.5, "explanation_order": "reason_first"}, "separate only"),
        ({"alpha": 1.5, "explanation_order": "separate"}, "alpha is 1.5. Expected a number from 0 to 1"),
        ({"explanation_weight": 2.0, "explanation_order": "separate"}, "explanation_weight is 2.0, which has no"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        WT5Config(**settings)


def test_the_authors_code_has_one_order():
    tokenizer = shipped()
    held = convert(converted_of(tiny_model("t5"), tokenizer), WT5(explanation_order="reason_first"))
    with pytest.raises(ConfigError, match="mode is reference, and wt5 changes the examples"):
        formatted_rows(held, [question()], mode="reference")
