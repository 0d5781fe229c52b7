"""The page of answers with reasons: what is marked, what is escaped, and how it is filtered."""

import json
import shutil
import subprocess

import pytest

from graftwork.reporting.explanations import marked_text, write_explanations
from graftwork.run_folder import RunFolder

SOURCE = "a b .\n\nc <b>d</b> e"


def entry(**changes):
    values = {
        "id": "1", "input": "explain x", "target": "t", "prediction": "negative", "label": "negative",
        "gold_label": "negative", "right": True, "explanations": [], "gold_explanations": [],
    }  # fmt: skip
    return {**values, **changes}


def write(folder, *entries, name="movies.converted"):
    path = folder / "predictions" / f"{name}.details.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in entries))
    return write_explanations(RunFolder(folder), folder)


def test_marks_of_gold_and_model_are_told_apart():
    pieces = marked_text({"source": SOURCE, "spans": [[1, 4]], "gold_spans": [[3, 6]]})
    assert pieces == (
        ("", "a "), ("extra", "b ."), ("", "\n\n"), ("both", "c"), ("", " "), ("missed", "<b>d</b> e"),
    )  # fmt: skip
    assert "".join(text for _, text in pieces) == SOURCE
    assert marked_text({"source": "a b", "spans": [], "gold_spans": []}) == (("", "a b"),)


def test_texts_are_escaped(tmp_path):
    spans = {"source": SOURCE, "spans": [[4, 5]], "gold_spans": [[4, 5]], "unmatched": 1}
    page = write(tmp_path, entry(**spans, label="<i>", prediction="<script>x</script>")).read_text()
    assert '<mark class="both">&lt;b&gt;d&lt;/b&gt;</mark>' in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert page.count("<script>") == 1


def test_free_reasons_stand_beside_those_of_people_and_numbers_are_shown(tmp_path):
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


def test_a_run_without_reasons_has_no_page(tmp_path):
    assert write_explanations(RunFolder(tmp_path), tmp_path) is None


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
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "<title>" not in outcome.stdout:
        pytest.skip("the browser does not start here")
    assert "<title>2 true true 2 of 3</title>" in outcome.stdout
