"""The page: one question answered three ways side by side, and the passages behind it. Needs no network."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.methods.regrad.text.requests import PASSAGES
from graftwork.retrieval.retriever import Passage
from graftwork.serving.auth import PAGE_PATH
from graftwork.serving.service import Service

if TYPE_CHECKING:
    from fastapi import FastAPI

    from graftwork.methods.regrad.text.requests import Question
    from graftwork.serving.request_queue import Completion

TITLE = "Documents recalled as gradients"
WAYS = ("Pretrained model", "Passages in the prompt (RAG)", "Passages as gradients (ReGrad)")
_HEADERS = ["id", "title", "text", "score"]
# none of these is fetched from anywhere
_FONTS = ["system-ui", "sans-serif"]
_MONOSPACED = ["ui-monospace", "monospace"]


@dataclass(frozen=True)
class PageActions:
    """What the buttons of the page do."""

    service: Service

    async def ask(self, text: str, ids: str, top_k: float, strength: float) -> list[Any]:
        """The three answers, a line about each, and the passages."""
        named = [name.strip() for name in ids.split(",") if name.strip()]
        update = self.service.question(
            text, passage_ids=named or None, top_k=int(top_k), strength=float(strength), adapter=True, blind=True
        )
        shown = replace(update, adapter=False, context=True)
        bare = replace(update, adapter=False, passages=())
        can_show = self.service.answerer.gradient_retriever.retriever is not None
        questions = [bare, shown, update] if can_show else [bare, update]
        served = await self.service.answer(questions)
        if not can_show:
            served.insert(1, served[0])
        told = [part for one in served for part in (one.answer.text, _told(one))]
        if not can_show:
            told[2:4] = ["", "There is no index to read the passages' text from."]
        return [*told, _table(served[2], questions[-1])]

    async def add(self, id: str, title: str, text: str) -> str:
        """Add a passage, or say why not."""
        try:
            self._complete(id, text)
            done = await self.service.add([Passage(id.strip(), text.strip(), title.strip())])
        except GraftworkError as error:
            return _words(error)
        known = not done["written"] and not done["aliased"]
        return await self._counted(f"{id.strip()!r} was there already." if known else f"Added {id.strip()!r}.")

    async def delete(self, id: str) -> str:
        """Delete a passage, or say why not."""
        try:
            await self.service.delete(id.strip())
        except GraftworkError as error:
            return _words(error)
        return await self._counted(f"Deleted {id.strip()!r}.")

    async def _counted(self, done: str) -> str:
        return f"{done} The bank holds {(await self.service.stats())['ids']} passages."

    def _complete(self, id: str, text: str) -> None:
        if not id.strip() or not text.strip():
            raise ConfigError("Found a passage without an id or without text; expected both.")


def mount_page(app: FastAPI, service: Service, token: str | None) -> None:
    """Put the page on a server.

    Args:
        app: The server.
        service: Answers, adds and deletes.
        token: Asked for before the page is shown; None shows it to everyone.

    Raises:
        MissingExtraError: If gradio is not installed.
    """
    try:
        import gradio
        from gradio.themes import Default
    except ImportError:
        raise MissingExtraError("gradio", "serve") from None

    def allowed(name: str, password: str) -> bool:
        return token is not None and secrets.compare_digest(password.encode(), token.encode())

    gradio.mount_gradio_app(
        app,
        _page(PageActions(service)),
        PAGE_PATH,
        auth=None if token is None else allowed,
        auth_message="Any name, and the server's token as the password.",
        theme=Default(font=_FONTS, font_mono=_MONOSPACED),
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        max_file_size=service.settings.max_body_bytes,
    )


def _page(actions: PageActions) -> Any:
    import gradio

    with gradio.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gradio.Markdown(f"# {TITLE}\n`{actions.service.name}`")
        _add_question(actions)
        _add_passages(actions)
    return blocks


def _add_question(actions: PageActions) -> None:
    """The question, its three answers, and its passages."""
    import gradio

    config, most = actions.service.answerer.config, actions.service.settings.max_passages
    question = gradio.Textbox(label="Question", elem_id="question")
    with gradio.Row():
        ids = gradio.Textbox(
            label="Passages", placeholder="ids, separated by commas; empty to retrieve", elem_id="passages"
        )
        top_k = gradio.Slider(1, min(most, 16), value=config.passages or PASSAGES, step=1, label="Passages to retrieve")
        strength = gradio.Slider(0.0, 3.0, value=config.strength, step=0.05, label="Strength of the step")
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
            column_widths=["15%", "20%", "55%", "10%"],
        )
    )

    async def ask(*given: Any) -> list[Any]:
        try:
            return await actions.ask(*given)
        except GraftworkError as error:
            raise gradio.Error(_words(error), print_exception=False) from None

    inputs = [question, ids, top_k, strength]
    options: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    button.click(ask, inputs, outputs, **options)
    question.submit(ask, inputs, outputs, **options)


def _add_passages(actions: PageActions) -> None:
    """Adding and deleting."""
    import gradio

    with gradio.Row():
        id = gradio.Textbox(label="Id", scale=1, elem_id="id")
        title = gradio.Textbox(label="Title", scale=1, elem_id="title")
        text = gradio.Textbox(label="Text of a passage", scale=4, elem_id="text")
    with gradio.Row():
        add = gradio.Button("Add the passage", elem_id="add")
        delete = gradio.Button("Delete the passage of this id", elem_id="delete")
    done = gradio.Textbox(label="Bank", interactive=False, elem_id="done")
    options: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    add.click(actions.add, [id, title, text], done, **options)
    delete.click(actions.delete, id, done, **options)


def _told(served: Completion) -> str:
    seconds = {"wait": served.waited, **served.answer.seconds}
    parts = [f"{name} {1000 * spent:.1f} ms" for name, spent in seconds.items()]
    parts.append(f"{served.prompt_tokens} tokens read, {served.answer.tokens} written")
    if served.answer.update_norm:
        parts.append(f"step of length {served.answer.update_norm:.3g}")
    return " · ".join(parts)


def _table(served: Completion, question: Question) -> Sequence[Sequence[str]]:
    scored = question.passages is None
    rows = [[hit.id, hit.title, hit.text, f"{hit.score:.3f}" if scored else "named"] for hit in served.answer.passages]
    # a table without any row would show the last one's
    return rows or [[""] * len(_HEADERS)]


def _words(error: Exception) -> str:
    return " ".join(str(error).split())
