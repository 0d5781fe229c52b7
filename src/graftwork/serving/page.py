"""Web page: one question answered in three ways side by side, with its passages. Loads nothing from other sites."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.methods.regrad.text.requests import PASSAGES
from graftwork.retrieval.retriever import Passage
from graftwork.serving.auth import PAGE_PATH
from graftwork.serving.schemas import AnswerRequest, NewPassage
from graftwork.serving.service import Service
from graftwork.serving.texts import parse

if TYPE_CHECKING:
    from fastapi import FastAPI

    from graftwork.methods.regrad.text.requests import Question
    from graftwork.serving.request_queue import Completion

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

    async def ask(self, text: str, ids: str, top_k: float, strength: float) -> list[Any]:
        """Return the three answers, each followed by its summary, and the rows of the passage table."""
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
        questions = [pretrained, in_prompt, gradients] if has_texts else [pretrained, gradients]
        completions = await self.service.answer(questions)
        fields = [[one.answer.text, _summary(one)] for one in completions]
        if not has_texts:
            fields.insert(1, ["", "There is no index to read the passages' text from."])
        return [*(text for pair in fields for text in pair), _table(completions[-1], questions[-1])]

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

    async def delete(self, id: str) -> str:
        """Delete a passage; return a status line or the error."""
        try:
            await self.service.delete(id.strip())
        except GraftworkError as error:
            return _one_line(error)
        return await self._status(f"Deleted {id.strip()!r}.")

    async def _status(self, done: str) -> str:
        return f"{done} The bank holds {(await self.service.stats())['ids']} passages."

    def _complete(self, id: str, text: str) -> None:
        if not id.strip() or not text.strip():
            raise ConfigError("Found a passage without an id or without text; expected both.")


def mount_page(app: FastAPI, service: Service, token: str | None) -> None:
    """Mount the page on a server at `PAGE_PATH`.

    Args:
        app: The server.
        service: Handles questions and passages.
        token: Password of the page's login; None needs no login.

    Raises:
        MissingExtraError: If gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise MissingExtraError("gradio", "serve") from None

    def allowed(name: str, password: str) -> bool:
        return token is not None and secrets.compare_digest(password.encode(), token.encode())

    gradio.mount_gradio_app(  # pyright: ignore[reportUnknownMemberType]
        app,
        _page(PageActions(service)),
        PAGE_PATH,
        auth=None if token is None else allowed,
        auth_message="Enter any user name, and the server's token as the password.",
        theme=_theme(),
        css=_STYLE,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        max_file_size=service.settings.max_body_bytes,
    )


def _theme() -> Any:
    """Theme with readable colours, untyped because gradio's annotations are incomplete."""
    from gradio.themes import Default

    theme: Any = Default(font=_FONTS, font_mono=_MONOSPACED)
    return theme.set(**_COLOURS)


def _page(actions: PageActions) -> Any:
    import gradio

    with gradio.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gradio.Markdown(f"# {TITLE}\n`{actions.service.name}`")
        _add_question(actions)
        _add_passages(actions)
    return blocks


def _add_question(actions: PageActions) -> None:
    """Question form, three answers, and table of passages."""
    import gradio

    config, most = actions.service.answerer.config, actions.service.settings.max_passages
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

    async def ask(*given: Any) -> list[Any]:
        try:
            return await actions.ask(*given)
        except GraftworkError as error:
            raise gradio.Error(_one_line(error), print_exception=False) from None

    inputs = [question, ids, top_k, strength]
    options: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    button.click(ask, inputs, outputs, **options)
    question.submit(ask, inputs, outputs, **options)


def _add_passages(actions: PageActions) -> None:
    """Form to add and delete passages."""
    import gradio

    with gradio.Row():
        id = gradio.Textbox(label="Id", scale=1, elem_id="id")
        title = gradio.Textbox(label="Title", scale=1, elem_id="title")
        text = gradio.Textbox(label="Text", scale=4, elem_id="text")
    with gradio.Row():
        add = gradio.Button("Add passage", elem_id="add")
        delete = gradio.Button("Delete passage by id", elem_id="delete")
    done = gradio.Textbox(label="Bank", interactive=False, elem_id="done")
    options: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    add.click(actions.add, [id, title, text], done, **options)
    delete.click(actions.delete, id, done, **options)


def _summary(completion: Completion) -> str:
    """Times, token counts and length of the step of one answer."""
    seconds = {"wait": completion.waited, **completion.answer.seconds}
    parts = [f"{name} {1000 * spent:.1f} ms" for name, spent in seconds.items()]
    parts.append(f"{completion.prompt_tokens} prompt tokens, {completion.answer.tokens} new tokens")
    if completion.answer.update_norm:
        parts.append(f"step of length {completion.answer.update_norm:.3g}")
    return " · ".join(parts)


def _table(completion: Completion, question: Question) -> Sequence[Sequence[str]]:
    scored = question.passages is None
    rows = [
        [hit.id, hit.title, hit.text, f"{hit.score:.3f}" if scored else "named"] for hit in completion.answer.passages
    ]
    # gradio keeps the previous rows if the new table is empty
    return rows or [[""] * len(_HEADERS)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
