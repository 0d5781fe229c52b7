"""Page of answers with explanations: marks, escaping and filters."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest

from graftwork.core.run_folder import RunFolder
from graftwork.metrics.results import ResultRow, Results, Sample
from graftwork.reporting.explanations import HIGHLIGHTS, explained_answers, marked_text, write_explanations
from graftwork.reporting.plots import explained_examples, plots_of
from graftwork.reporting.render import write_report

SOURCE = "a b .\n\nc <b>d</b> e"


def entry(**changes):
    values = {
        "id": "1",
        "input": "explain x",
        "target": "t",
        "prediction": "negative",
        "label": "negative",
        "gold_label": "negative",
        "right": True,
        "explanations": [],
        "gold_explanations": [],
    }
    return {**values, **changes}


def write(folder, *entries, name="movies.converted"):
    path = folder / "predictions" / f"{name}.details.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in entries))
    return write_explanations(RunFolder(folder), folder)


def test_gold_and_model_spans_are_marked_differently():
    pieces = marked_text({"source": SOURCE, "spans": [[1, 4]], "gold_spans": [[3, 6]]})
    assert pieces == (
        ("", "a "),
        ("extra", "b ."),
        ("", "\n\n"),
        ("both", "c"),
        ("", " "),
        ("missed", "<b>d</b> e"),
    )
    assert "".join(text for _, text in pieces) == SOURCE
    assert marked_text({"source": "a b", "spans": [], "gold_spans": []}) == (("", "a b"),)


def test_texts_are_escaped(tmp_path):
    spans = {"source": SOURCE, "spans": [[4, 5]], "gold_spans": [[4, 5]], "unmatched": 1}
    page = write(tmp_path, entry(**spans, label="<i>", prediction="<script>x</script>")).read_text()
    assert '<mark class="both">&lt;b&gt;d&lt;/b&gt;</mark>' in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert page.count("<script>") == 1


def test_free_text_explanations_are_shown_with_gold_ones_and_scores(tmp_path):
    page = write(
        tmp_path,
        entry(
            explanations=["because"], gold_explanations=["it is so"], probabilities={"negative": 0.75, "positive": 0.25}
        ),
        entry(id="2", right=False, comprehensiveness=0.5, sufficiency=0.75),
    ).read_text()
    assert "<li>because</li>" in page
    assert "<li>it is so</li>" in page
    assert "width: 75.0%" in page
    assert 'data-flags="right"' in page
    assert 'data-flags="wrong insufficient"' in page


def test_a_run_without_explanations_has_no_page(tmp_path):
    assert write_explanations(RunFolder(tmp_path), tmp_path) is None


def test_sections_have_the_order_of_the_results_and_unknown_files_come_last(tmp_path):
    rows = [ResultRow("movies", "dev", label, {"accuracy": 1.0}, size=1) for label in ("z", "a", "m")]
    Results("m", "wt5", rows=tuple(rows)).write(RunFolder(tmp_path).results_file)
    for label in ("a", "m", "other", "z"):
        write(tmp_path, entry(), name=f"movies.{label}")
    found = explained_answers(RunFolder(tmp_path))
    assert [(one.task, one.label) for one in found] == [
        ("movies", "z"),
        ("movies", "a"),
        ("movies", "m"),
        ("movies.other", ""),
    ]


def test_the_filters_work_in_a_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser to open the page in")
    long = " ".join(f"word{number}" for number in range(2000))
    review = {"source": long, "spans": [[5, 9]], "gold_spans": [[1500, 1510]], "unmatched": 1}
    path = write(tmp_path, entry(), entry(id="2", right=False, **review), entry(id="3", right=False))
    script = (
        "document.querySelector('[data-filter=wrong]').click();"
        "const shown = [...document.querySelectorAll('article')].filter(card => !card.hidden);"
        "const narrow = document.querySelector('.text').scrollWidth <= document.body.clientWidth;"
        "document.title = `${shown.length} ${shown.every(card => card.className === 'wrong')} ${narrow} "
        "${document.querySelector('#count').textContent}`;"
    )
    path.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    outcome = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "<title>" not in outcome.stdout:
        pytest.skip("the browser does not start here")
    assert "<title>2 true true 2 of 3</title>" in outcome.stdout


def mixed(count, accuracy, **settings):
    name = f"movie_rationales_{count}_explanations"
    label = ",".join([f"mixture={name}", *(f"{key}={value}" for key, value in settings.items())])
    return ResultRow(
        "movies",
        "validation",
        label,
        {"accuracy": accuracy, "token_f1": accuracy / 2, "spans_found": 90.0, "chance_token_f1": 10.0},
        size=2,
        settings={"train.mixture": name, **{f"method.{key}": value for key, value in settings.items()}},
    )


def test_the_report_shows_marked_answers_of_the_last_setting_and_links_to_all(tmp_path):
    rows = (mixed(1000, 90.0, constrained=True), mixed(100, 80.0), mixed(1000, 90.0))
    sample = Sample("movies", "explain x", ("t",), {"a": "negative"})
    Results("m", "wt5", rows=rows, samples=(sample,)).write(RunFolder(tmp_path).results_file)
    spans = {"source": SOURCE, "spans": [[0, 1]], "gold_spans": [[0, 1]]}
    for row in rows:
        below = tmp_path / row.label.removesuffix(",constrained=True")
        entries = [entry(**spans, id=f"{row.label}:{number}") for number in range(9)]
        wrong = entry(**spans, id=f"{row.label}:wrong", right=False)
        write(below, *entries, wrong, name=f"movies.{row.label}")
    _, page, answers = write_report([RunFolder(tmp_path)], formats=["md", "html"], output=None)
    text = page.read_text()
    shown = [line for line in text.splitlines() if "mixture=movie_rationales_1000_explanations:" in line]
    assert len(shown) == HIGHLIGHTS
    assert ":wrong" in shown[-1]
    assert "constrained=True:" not in text
    assert '<mark class="both">a</mark>' in text
    assert '<a href="explanations.html">' in text
    assert "Sample answers" not in text
    assert answers.read_text().count("<article") == 3 * 10


def test_label_and_explanation_scores_are_plotted_over_explained_examples():
    rows = (mixed(100, 80.0), mixed(1000, 90.0), mixed(1000, 90.0, constrained=True))
    assert [explained_examples(row) for row in rows] == [100, 1000, 1000]
    assert explained_examples(replace(rows[0], settings={})) is None
    title = "Labels and explanations against explained examples"
    assert plots_of(Results("m", "wt5", rows=rows))[title].png.startswith(b"\x89PNG")
    assert title not in plots_of(Results("m", "wt5", rows=rows[1:]))


def test_orders_prompts_spans_and_other_settings_of_one_example_are_shown(tmp_path):
    rows = tuple(ResultRow("movies", "dev", label, {"accuracy": 50.0}, 1) for label in ("separate", "first"))
    Results("m", "wt5", rows).write(RunFolder(tmp_path).results_file)
    asked = {"order": "separate", "input": "classify: a <b>", "second_input": "explain classify: a <b>"}
    write(tmp_path, entry(**asked, explanations=["it drags"], gold_explanations=["it is slow"]), name="movies.separate")
    source = {"source": "a lazy sequel", "characters": [[2, 6], [7, 13]], "gold_characters": [[2, 13]], "unmatched": 0}
    spans = {**source, "explanations": ["lazy", "sequel"], "span_faithfulness": [[0.25, 0.5], [0.125, -0.25]]}
    first = {"order": "reason_first", "label": "positive", "right": False, "label_without_explanation": "negative"}
    page = write(tmp_path, entry(**spans, **first), name="movies.first").read_text()
    for text in (
        "label and explanation by two prompts",
        "classify: a &lt;b&gt;</div>",
        "explain classify: a &lt;b&gt;</div>",
        "explanation before the label",
        "label without an explanation: negative",
        'lazy <span class="soft small">comprehensiveness 0.25, sufficiency 0.50</span>',
        'sequel <span class="soft small">comprehensiveness 0.12, sufficiency -0.25</span>',
        "<li>lazy sequel</li>",
        "<li>it is slow</li>",
    ):
        assert text in page
    # each answer names the one to the same example with the other setting
    assert page.count("<summary>the same example with other settings</summary>") == 2
    assert "positive (wrong) – lazy; sequel" in page
    assert "negative (right) – it drags" in page
