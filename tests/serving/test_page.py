"""The page in a headless browser: ask, add, ask, delete, ask; no request leaves the server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reporting.html_rules import axe_core
from serving.servers import ENTITIES, eventually, listening, open_toy

pytest.importorskip("gradio", reason="the page's package is not installed: pip install 'graftwork[serve]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no driver for browsers: pip install playwright")

TOKEN = "a-secret-of-the-tests"
ANSWERS, ABOUT = range(3), "#about-2 textarea, #about-2 input"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser; install one of: {', '.join(names)}")
    with playwright.sync_playwright() as driver:
        # the browser's sandbox does not work for root
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        opened = driver.chromium.launch(executable_path=path, args=[*sandbox, "--disable-dev-shm-usage"])
        yield opened
        opened.close()


def field(page: Any, name: str) -> Any:
    return page.locator(f"#{name} textarea, #{name} input").first


def ask(page: Any, question: str) -> list[str]:
    """Ask, wait, and return the three answers."""
    before = field(page, "about-2").input_value()
    field(page, "question").fill(question)
    page.click("#ask")
    # it contains times, which differ at every request
    # an ellipsis is in its place while the answer is generated
    done = "([path, old]) => ![old, '…'].includes(document.querySelector(path).value)"
    page.wait_for_function(done, arg=[ABOUT, before])
    return [field(page, f"answer-{number}").input_value() for number in ANSWERS]


def press(page: Any, name: str) -> str:
    """Click add or delete, and return the status line."""
    before = field(page, "done").input_value()
    page.click(f"#{name}")
    eventually(lambda: field(page, "done").input_value() != before)
    return field(page, "done").input_value()


@pytest.mark.slow
def test_page_answers_change_with_an_added_passage_and_back_after_deletion(toy, browser, tmp_path: Path):
    service = open_toy(toy.copy(tmp_path))
    elsewhere, broken = [], []
    with listening(service) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((address, "data:", "blob:")) else elsewhere.append(request.url)
            ),
        )
        page.on("console", lambda message: broken.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(address)
        base, shown, guessed = ask(page, "e161")
        assert "nothing" not in field(page, "about-2").input_value()
        city = "c1" if "c1" not in (base, shown, guessed) else "c2"
        field(page, "id").fill("home")
        field(page, "title").fill('<b id="evil">bold</b>')
        field(page, "text").fill(f"e161 lives in {city} .")
        assert press(page, "add") == f"Added 'home'. The bank holds {len(ENTITIES) + 1} passages."
        with_passage = ask(page, "e161")
        page.screenshot(path=str(tmp_path / "added.png"), full_page=True)
        assert with_passage[2] == city != guessed
        # the pretrained model is unaffected by the passage, but its prompt with passages changes
        assert with_passage[0] == base
        assert with_passage[1] != shown
        assert "step of length" in field(page, "about-2").input_value()
        assert "home" in page.inner_text("#found")
        assert '<b id="evil">' in page.inner_text("#found")
        assert page.locator("#evil").count() == 0
        assert press(page, "delete") == f"Deleted 'home'. The bank holds {len(ENTITIES)} passages."
        assert ask(page, "e161") == [base, shown, guessed]
        assert press(page, "delete").startswith("Found no passage 'home'")
        field(page, "question").fill(" ")
        page.click("#ask")
        page.get_by_text("question: found no text").wait_for()
        page.close()
    assert elsewhere == []
    assert broken == []
    assert (tmp_path / "added.png").stat().st_size > 10_000


def log_in(page: Any, password: str) -> None:
    page.get_by_test_id("textbox").fill("me")
    page.get_by_test_id("password").fill(password)
    page.get_by_role("button", name="Login").click()


@pytest.mark.slow
def test_page_requires_the_token(toy, browser, tmp_path: Path):
    with listening(open_toy(toy.copy(tmp_path)), TOKEN) as address:
        for path in ("/page/config", "/page/gradio_api/info"):
            assert httpx.get(address + path).status_code == 401
        asked = {"data": ["e101", "", 1, 1], "fn_index": 0, "session_hash": "a"}
        assert httpx.post(f"{address}/page/gradio_api/queue/join", json=asked).status_code == 401
        page = browser.new_page()
        page.goto(address)
        log_in(page, "wrong-token")
        page.get_by_text("Incorrect").wait_for()
        log_in(page, TOKEN)
        page.locator("#ask").wait_for()
        page.close()


@pytest.mark.long
def test_axe_finds_nothing_on_the_page_with_answers(toy, browser, tmp_path: Path):
    axe = axe_core()
    if axe is None:
        pytest.skip("no axe-core; run `npm install --no-save axe-core`, or set AXE_CORE to its axe.min.js")
    with listening(open_toy(toy.copy(tmp_path))) as address:
        for width in (1400, 400):
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page.goto(address)
                ask(page, "e161")
                page.evaluate(axe.read_text())
                found = page.evaluate("axe.run().then(found => found.violations.map(one => one.id))")
                assert found == [], (width, scheme)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                page.close()
