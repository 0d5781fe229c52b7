"""Classification tasks: GLUE files, review folders and user tables, and models trained on them."""

import pytest
import torch
import transformers

from graftwork.core.example import Example, Examples
from graftwork.errors import ConfigError, DataError
from graftwork.evaluation.prediction import predict_texts as predict
from graftwork.grafting.converted import Converted
from graftwork.metrics.labels import ACCURACY, class_f1
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load_model
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.tasks import TASKS, get_task
from graftwork.tasks.naming import class_labels, named_tasks
from graftwork.training.encoding import PadBatch, encode
from tiny_models import tiny_model, word_tokenizer

# counts from the publisher's table
REAL = {("glue/sst2", "train"): 1200, ("glue/sst2", "dev"): 400, ("glue/qnli", "dev"): 1000}


@pytest.mark.parametrize(("name", "split"), REAL)
def test_real_files_of_glue_are_read_row_by_row(shared, name, split):
    task = get_task(name)
    examples = task.load(shared / "data" / "glue", split)
    assert len(examples.rows) == examples.size == REAL[name, split]
    assert examples.ignored == 0
    assert {row.target for row in examples.rows} == set(task.labels)
    assert all((row.pair is not None) == (name == "glue/qnli") for row in examples.rows)
    assert task.evaluate([row.target for row in examples.rows], examples) == {"accuracy": 100.0}


def test_the_first_real_rows_match(shared):
    first = get_task("glue/qnli").load(shared / "data" / "glue", "dev").rows[0]
    assert first.input == "Who was ABC Great States sold to in 1974?"
    assert first.pair is not None
    assert first.pair.startswith("Citing limited profitability")
    assert first.target == "entailment"
    assert get_task("glue/sst2").load(shared / "data" / "glue", "dev").rows[0].target == "negative"


def test_review_folders_follow_the_layout_of_the_imdb_archive(shared, tmp_path):
    whole = get_task("reviews/imdb").load(shared / "data" / "movie_reviews", "train")
    assert (len(whole.rows), whole.split) == (200, "all")
    assert [row.target for row in whole.rows] == ["negative"] * 100 + ["positive"] * 100
    for split, text in (("train", "good film"), ("test", "bad film")):
        for name in ("pos", "neg"):
            folder = tmp_path / "aclImdb" / split / name
            folder.mkdir(parents=True)
            (folder / "0_1.txt").write_text(f"{text} {name}\n")
    dev = get_task("reviews/imdb").load(tmp_path, "dev")
    assert dev.split == "test"
    assert [(row.key, row.input, row.target) for row in dev.rows] == [
        ("neg/0_1", "bad film neg", "negative"),
        ("pos/0_1", "bad film pos", "positive"),
    ]
    with pytest.raises(DataError, match="Found no train reviews"):
        get_task("reviews/imdb").load(tmp_path / "aclImdb" / "train" / "pos", "train")


def test_qqp_has_specific_columns_and_metrics(write):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    path = write("QQP/dev.tsv", header + '0\t1\t2\tWhat is "a?\tWhat is a?\t1\n1\t3\t4\tWhy?\tHow?\t0\nbroken line\n')
    task = get_task("glue/qqp")
    examples = task.load(path.parent.parent, "dev")
    assert [(row.input, row.pair, row.target) for row in examples.rows] == [
        ('What is "a?', "What is a?", "duplicate"),
        ("Why?", "How?", "not_duplicate"),
    ]
    assert examples.ignored == 1
    # accuracy: one of three rows is correct (one is malformed); class duplicate: 1 hit, 2 predicted, 1 expected
    scores = task.evaluate(["duplicate", "duplicate"], examples)
    assert scores == {"accuracy": pytest.approx(100 / 3), "f1": pytest.approx(200 / 3)}


def test_an_unknown_class_error_names_file_and_line(write):
    path = write("SST-2/train.tsv", "sentence\tlabel\na film\t1\nanother\t7\n")
    with pytest.raises(DataError, match=r"train.tsv, line 3: found the class '7'; expected one of negative, positive"):
        get_task("glue/sst2").load(path.parent.parent, "train")
    write("SST-2/test.tsv", "index\tsentence\n0\ta film\n")
    assert get_task("glue/sst2").load(path.parent.parent, "test").rows[0].answers == ()
    write("QNLI/dev.tsv", "sentence\tlabel\na film\t1\n")
    with pytest.raises(DataError, match="expected also question"):
        get_task("glue/qnli").load(path.parent.parent, "dev")


def test_scores_follow_their_definitions():
    rows = tuple(Example(str(i), "x", label, (label,)) for i, label in enumerate("aabb"))
    examples = Examples("t", "dev", rows, 4, 0, "here")
    predictions = ["a", "b", "a", "b"]
    assert ACCURACY.compute(predictions, examples) == 50.0
    assert class_f1("a")(predictions, examples) == 50.0
    assert class_f1("c")(predictions, examples) == 0.0


def test_a_user_table_becomes_a_task(write):
    path = write("mine.csv", 'label,sentence1,sentence2\nno,"a, b",c\nyes,d,e\n')
    [(task, split)] = named_tasks(str(path), "dev")
    examples = task.load(path.parent, split)
    assert (task.labels, split) == (("no", "yes"), "all")
    assert [(row.input, row.pair, row.target) for row in examples.rows] == [("a, b", "c", "no"), ("d", "e", "yes")]
    with pytest.raises(DataError, match="'label' beside one text column"):
        named_tasks(str(write("other.tsv", "text\tclass\na\tb\n")), "dev")
    [(other, _)] = named_tasks(str(write("third.tsv", "text\tlabel\na\tmaybe\nb\tno\n")), "dev")
    assert other.labels == ("maybe", "no")
    assert class_labels([str(path)], None) == ("no", "yes")
    with pytest.raises(ConfigError, match="tasks with different classes"):
        class_labels([str(path), "glue/sst2"], None)


def classifier(tmp_path, seed=0):
    tiny_model("bert", dtype=torch.float32).bert.save_pretrained(tmp_path / "encoder")
    word_tokenizer().save_pretrained(tmp_path / "encoder")
    return load_model(str(tmp_path / "encoder"), labels=("low", "high"), seed=seed)


def test_an_encoder_gets_a_head_for_the_classes_of_a_task(tmp_path):
    model, tokenizer = classifier(tmp_path)
    assert isinstance(model, transformers.BertForSequenceClassification)
    assert model.config.id2label == {0: "low", 1: "high"}
    again, other = classifier(tmp_path)[0], classifier(tmp_path, seed=1)[0]
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert not torch.equal(other.classifier.weight, model.classifier.weight)
    model.save_pretrained(tmp_path / "head")
    tokenizer.save_pretrained(tmp_path / "head")
    kept, _ = load_model(str(tmp_path / "head"), labels=("high", "low"))
    assert torch.equal(kept.classifier.weight, model.classifier.weight)
    assert kept.config.id2label == {0: "low", 1: "high"}
    with pytest.raises(ConfigError, match=r"has a head for (low, high|high, low), and the task has the classes a, b"):
        load_model(str(tmp_path / "head"), labels=("a", "b"))


def test_a_folder_with_only_a_configuration_gives_random_weights_only_if_asked_to(tmp_path, caplog):
    classifier(tmp_path)
    (tmp_path / "encoder" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="found a configuration without weights"):
        load_model(str(tmp_path / "encoder"), labels=("low", "high"))
    model, _ = load_model(str(tmp_path / "encoder"), labels=("low", "high"), random_weights=True)
    assert isinstance(model, transformers.BertForSequenceClassification)
    assert model.config.id2label == {0: "low", 1: "high"}
    assert "configuration without weights" in caplog.text


def test_pairs_are_segments_for_an_encoder_and_one_text_for_others(tmp_path):
    model, tokenizer = classifier(tmp_path)
    rows = [Example("0", "w4 w5", "high", ("high",), pair="w6"), Example("1", "w7", "low", ("low",), pair="w8 w9")]
    encoded = encode(rows, tokenizer, model, max_input_tokens=16, max_target_tokens=4)
    batch = PadBatch(0)([encoded[0], encoded[1]])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    t5 = tiny_model("t5", dtype=torch.float32)
    written = encode(rows, tokenizer, t5, max_input_tokens=16, max_target_tokens=4)[0]
    assert written["input_ids"][:3] == [4, 5, 6]
    with pytest.raises(DataError, match="Found the class 'none' in example 9"):
        encode([Example("9", "w4", "none")], tokenizer, model, max_input_tokens=16, max_target_tokens=4)
    with pytest.raises(ConfigError, match="gives it a classification head"):
        encode(rows, tokenizer, model.bert, max_input_tokens=16, max_target_tokens=4)


def test_a_classifier_answers_with_the_class_of_the_highest_score(tmp_path):
    model, tokenizer = classifier(tmp_path)
    rows = [Example(str(i), f"w{i} w{i + 1}", "low", ("low",)) for i in range(4, 20)]
    answers = predict(Converted(model, tokenizer=tokenizer), rows, EvaluationSettings(batch_size=5))
    with torch.no_grad():
        expected = [
            model.config.id2label[int(model(**tokenizer(row.input, return_tensors="pt")).logits.argmax())]
            for row in rows
        ]
    assert answers == expected


def test_an_untouched_classifier_is_evaluated_on_a_table(tmp_path, write):
    model, tokenizer = classifier(tmp_path)
    path = write("mine.csv", "sentence1,label\nw4 w5,low\nw6,high\n")
    results = evaluate(Converted(model, tokenizer=tokenizer), [str(path)])
    assert results.rows[0].scores["accuracy"] in (0.0, 50.0, 100.0)


def test_hub_variants_are_registered():
    assert {"glue/sst2_hub", "glue/qnli_hub", "glue/qqp_hub", "reviews/imdb_hub"} <= set(TASKS)
