"""Web page: one question answered in three ways side by side, with its passages. Loads nothing from other sites."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.methods.regrad.text.requests import PASSAGES
from graftwork.retrieval.retriever import Passage
from graftwork.serving.auth import PAGE_PATH
from graftwork.serving.queued_request import Completion, Delta
from graftwork.serving.schemas import AnswerRequest, NewPassage
from graftwork.serving.service import Service
from graftwork.serving.texts import parse

if TYPE_CHECKING:
    from fastapi import FastAPI

    from graftwork.methods.regrad.text.requests import Question
    from graftwork.serving.tenants import Tenants

    Event = Delta | Completion | GraftworkError

TITLE = "Documents retrieved as gradients"
WAYS = ("Pretrained model", "Passages in the prompt (RAG)", "Passages as gradients (ReGrad)")
_HEADERS = ["id", "title", "text", "score"]
# system fonts, so that no font is downloaded
_FONTS = ["system-ui", "sans-serif"]
_MONOSPACED = ["ui-monospace", "monospace"]
# gradio's orange buttons, placeholders and bounds of sliders have a contrast below 4.5 : 1
_COLOURS = {
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "button_primary_background_fill": "#0b5f85",
    "button_primary_background_fill_dark": "#0b5f85",
    "button_primary_background_fill_hover": "#084a68",
    "button_primary_background_fill_hover_dark": "#084a68",
}
_STYLE = ".min_value, .max_value { color: var(--body-text-color) !important; }"


@dataclass(frozen=True)
class PageActions:
    """Actions of the page's buttons."""

    service: Service

    async def ask(self, text: str, ids: str, top_k: float, strength: float) -> AsyncGenerator[list[Any]]:
        """Yield the three answers as they grow, each followed by its summary or its error, and the passage table.

        Raises:
            GraftworkError: If the request itself is invalid; errors of one answer are in its summary.
        """
        names = [name.strip() for name in ids.split(",") if name.strip()]
        asked = parse(
            AnswerRequest,
            {"question": text, "passage_ids": names or None, "top_k": int(top_k), "strength": float(strength)},
        )
        gradients = self.service.question(
            asked.question,
            passage_ids=asked.passage_ids,
            top_k=asked.top_k,
            strength=asked.strength,
            adapter=True,
            blind=True,
        )
        in_prompt = replace(gradients, adapter=False, context=True)
        pretrained = replace(gradients, adapter=False, passages=())
        has_texts = self.service.answerer.gradient_retriever.retriever is not None
        questions = {0: pretrained, 1: in_prompt, 2: gradients} if has_texts else {0: pretrained, 2: gradients}
        shown: list[Any] = ["", "", "", "There is no index to read the passages' text from.", "", "", _table(None)]
        for number in questions:
            shown[2 * number + 1] = "…"
        async for number, event in _merged({number: self._events(one) for number, one in questions.items()}):
            if isinstance(event, Delta):
                shown[2 * number] += event.text
            elif isinstance(event, Completion):
                shown[2 * number : 2 * number + 2] = [event.answer.text, _summary(event)]
                if number == max(questions):
                    shown[-1] = _table(event, gradients)
            else:
                shown[2 * number + 1] = _one_line(event)
            yield list(shown)

    async def _events(self, question: Question) -> AsyncGenerator[Event]:
        """Yield the parts of one answer and its completion, or its error."""
        try:
            async with aclosing(self.service.stream([question])) as events:
                async for _, event in events:
                    yield event
        except GraftworkError as error:
            yield error

    async def add(self, id: str, title: str, text: str) -> str:
        """Add a passage; return a status line or the error."""
        try:
            self._complete(id, text)
            new = parse(NewPassage, {"id": id.strip(), "text": text.strip(), "title": title.strip()})
            done = await self.service.add([Passage(new.id, new.text, new.title)])
        except GraftworkError as error:
            return _one_line(error)
        known = not done["written"] and not done["aliased"]
        return await self._status(f"{id.strip()!r} exists already." if known else f"Added {id.strip()!r}.")

    async def delete(self, id: str, *, erase: bool = False) -> str:
        """Delete a passage, or erase it from the files; return a status line or the error."""
        try:
            record = await self.service.delete(id.strip(), erase=erase)
        except GraftworkError as error:
            return _one_line(error)
        if record is None:
            return await self._status(f"Deleted {id.strip()!r}.")
        return await self._status(f"Erased {id.strip()!r}; searched {record['files']} files for its bytes.")

    async def _status(self, done: str) -> str:
        return f"{done} The bank holds {(await self.service.stats())['ids']} passages."

    def _complete(self, id: str, text: str) -> None:
        if not id.strip() or not text.strip():
            raise ConfigError("Found a passage without an id or without text; expected both.")


async def _merged(streams: Mapping[int, AsyncGenerator[Event]]) -> AsyncGenerator[tuple[int, Event]]:
    """Yield the events of several answers as they arrive."""
    events: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()

    async def forward(number: int, stream: AsyncGenerator[Event]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    events.put_nowait((number, event))
        finally:
            events.put_nowait((number, None))

    tasks = [asyncio.ensure_future(forward(number, one)) for number, one in streams.items()]
    try:
        left = len(tasks)
        while left:
            number, event = await events.get()
            if event is None:
                left -= 1
            else:
                yield number, event
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def mount_page(app: FastAPI, tenants: Tenants) -> None:
    """Mount the page on a server at `PAGE_PATH`.

    Args:
        app: The server.
        tenants: Services of questions and passages; their tokens are passwords of the page's login.

    Raises:
        MissingExtraError: If gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise MissingExtraError("gradio", "serve") from None

    gradio.mount_gradio_app(  # pyright: ignore[reportUnknownMemberType]
        app,
        _page(tenants),
        PAGE_PATH,
        auth=None if tenants.token is None else tenants.log_in,
        auth_message=(
            "Enter the name of your bank, and its token as the password."
            if tenants.others
            else "Enter any user name, and the server's token as the password."
        ),
        theme=_theme(),
        css=_STYLE,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        max_file_size=tenants.main.settings.max_body_bytes,
    )


def _theme() -> Any:
    """Theme with readable colours, untyped because gradio's annotations are incomplete."""
    from gradio.themes import Default

    theme: Any = Default(font=_FONTS, font_mono=_MONOSPACED)
    return theme.set(**_COLOURS)


def _page(tenants: Tenants) -> Any:
    import gradio

    with gradio.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gradio.Markdown(f"# {TITLE}\n`{tenants.main.name}`")
        _add_question(tenants)
        _add_passages(tenants)
    return blocks


def _add_question(tenants: Tenants) -> None:
    """Question form, three answers, and table of passages."""
    import gradio

    config, most = tenants.main.answerer.config, tenants.main.settings.max_passages
    question = gradio.Textbox(label="Question", elem_id="question")
    with gradio.Row():
        ids = gradio.Textbox(
            label="Passages",
            placeholder="comma-separated ids; empty retrieves passages",
            elem_id="passages",
        )
        top_k = gradio.Slider(1, min(most, 16), value=config.passages or PASSAGES, step=1, label="Passages to retrieve")
        strength = gradio.Slider(0.0, 3.0, value=config.strength, step=0.05, label="Strength of the gradient step")
    button = gradio.Button("Ask", variant="primary", elem_id="ask")
    outputs: list[Any] = []
    with gradio.Row():
        for number, way in enumerate(WAYS):
            with gradio.Column():
                outputs.append(gradio.Textbox(label=way, interactive=False, elem_id=f"answer-{number}"))
                outputs.append(
                    gradio.Textbox(
                        label="Time and tokens", show_label=False, interactive=False, elem_id=f"about-{number}"
                    )
                )
    outputs.append(
        gradio.Dataframe(
            headers=_HEADERS,
            datatype="str",
            interactive=False,
            wrap=True,
            label="Passages of the answer",
            elem_id="found",
            column_widths=["14%", "18%", "52%", "16%"],
        )
    )

    async def ask(text: str, ids: str, top_k: float, strength: float, request: Any) -> AsyncGenerator[list[Any]]:
        try:
            async for shown in _actions(tenants, request).ask(text, ids, top_k, strength):
                yield shown
        except GraftworkError as error:
            raise gradio.Error(_one_line(error), print_exception=False) from None

    # gradio passes the request to arguments with this annotation
    ask.__annotations__ = {"request": gradio.Request}
    inputs = [question, ids, top_k, strength]
    options: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    button.click(ask, inputs, outputs, **options)
    question.submit(ask, inputs, outputs, **options)


def _add_passages(tenants: Tenants) -> None:
    """Form to add, delete and erase passages."""
    import gradio

    async def add_passage(id: str, title: str, text: str, request: Any) -> str:
        return await _actions(tenants, request).add(id, title, text)

    async def delete_passage(id: str, request: Any) -> str:
        return await _actions(tenants, request).delete(id)

    async def erase_passage(id: str, request: Any) -> str:
        return await _actions(tenants, request).delete(id, erase=True)

    for action in (add_passage, delete_passage, erase_passage):
        action.__annotations__ = {"request": gradio.Request}

    with gradio.Row():
        id = gradio.Textbox(label="Id", scale=1, elem_id="id")
        title = gradio.Textbox(label="Title", scale=1, elem_id="title")
        text = gradio.Textbox(label="Text", scale=4, elem_id="text")
    with gradio.Row():
        add = gradio.Button("Add passage", elem_id="add")
        delete = gradio.Button("Delete passage by id", elem_id="delete")
        erase = gradio.Button("Erase passage by id", elem_id="erase")
    done = gradio.Textbox(label="Bank", interactive=False, elem_id="done")
    options: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    add.click(add_passage, [id, title, text], done, **options)
    delete.click(delete_passage, id, done, **options)
    erase.click(erase_passage, id, done, **options)


def _actions(tenants: Tenants, request: Any) -> PageActions:
    """Actions on the bank of the user that has logged in."""
    return PageActions(tenants.named(getattr(request, "username", None)))


def _summary(completion: Completion) -> str:
    """Times, token counts and length of the step of one answer."""
    seconds = {"wait": completion.waited, "first token": completion.first_token, **completion.answer.seconds}
    parts = [f"{name} {1000 * spent:.1f} ms" for name, spent in seconds.items()]
    parts.append(f"{completion.prompt_tokens} prompt tokens, {completion.answer.tokens} new tokens")
    if completion.answer.update_norm:
        parts.append(f"step of length {completion.answer.update_norm:.3g}")
    return " · ".join(parts)


def _table(completion: Completion | None, question: Question | None = None) -> Sequence[Sequence[str]]:
    if completion is None or question is None:
        return [[""] * len(_HEADERS)]
    scored = question.passages is None
    rows = [
        [hit.id, hit.title, hit.text, f"{hit.score:.3f}" if scored else "named"] for hit in completion.answer.passages
    ]
    # gradio keeps the previous rows if the new table is empty
    return rows or [[""] * len(_HEADERS)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
