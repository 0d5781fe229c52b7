"""OpenAPI document of one server: limits, model name and token of its settings are part of the schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI

from graftwork.serving.auth import OPEN_PATHS

if TYPE_CHECKING:
    from graftwork.serving.service import Service

Schema = dict[str, Any]


def install_document(app: FastAPI, service: Service, *, token: bool) -> None:
    """Complete the OpenAPI document of an application.

    Args:
        app: Application with all its routes.
        service: Source of the limits and of the model's name.
        token: True if requests need a bearer token.
    """
    generate = app.openapi
    documents: list[Schema] = []

    def document() -> Schema:
        if not documents:
            found = generate()
            _add_limits(found["components"]["schemas"], service)
            if token:
                _add_token(found)
            documents.append(found)
        return documents[0]

    app.openapi = document


def links_to_deletion(*operations: str) -> Mapping[str, Any]:
    """OpenAPI links from an added passage to its deletion.

    Args:
        operations: Ids of the operations that delete a passage by the parameter `id`.
    """
    added = "$request.body#/passages/0/id"
    return {"links": {one: {"operationId": one, "parameters": {"id": added}} for one in operations}}


def _add_limits(schemas: Mapping[str, Schema], service: Service) -> None:
    limits = service.settings
    for name in ("AnswerRequest", "AnswerOptions"):
        options = schemas[name]["properties"]
        options["choices"]["items"]["maxLength"] = limits.max_question_characters
        _value(options["passage_ids"])["maxItems"] = limits.max_passages
        _limit_number(options["top_k"], limits.max_passages)
    answer = schemas["AnswerRequest"]["properties"]
    answer["question"]["maxLength"] = limits.max_question_characters
    _limit_number(answer["max_new_tokens"], limits.max_new_tokens)
    schemas["AddPassagesRequest"]["properties"]["passages"]["maxItems"] = limits.max_passages
    for part in ("text", "title"):
        schemas["NewPassage"]["properties"][part]["maxLength"] = limits.max_passage_characters
    for name in ("ChatRequest", "CompletionRequest"):
        schemas[name]["properties"]["model"]["enum"] = [service.name]
        _limit_number(schemas[name]["properties"]["n"], limits.max_choices)
    for prompt in schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]:
        text = prompt.get("items", prompt)
        text["maxLength"] = limits.max_question_characters
        if "items" in prompt:
            prompt["maxItems"] = limits.max_choices
    question = "where does e101 live ?"
    schemas["AnswerRequest"]["examples"] = [{"question": question}, {"question": question, "passage_ids": []}]
    schemas["AddPassagesRequest"]["examples"] = [{"passages": [{"id": "news-1", "text": "e190 lives in c4 ."}]}]
    schemas["CompletionRequest"]["examples"] = [{"model": service.name, "prompt": "e101 lives in", "max_tokens": 2}]
    schemas["ChatRequest"]["examples"] = [{"model": service.name, "messages": [{"role": "user", "content": question}]}]


def _value(optional: Schema) -> Schema:
    """Schema of an optional field when it is not null."""
    return cast(Schema, optional["anyOf"][0])


def _limit_number(optional: Schema, most: int) -> None:
    value = _value(optional)
    value.pop("exclusiveMaximum", None)
    value["maximum"] = most


def _add_token(document: Schema) -> None:
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN_PATHS else [{"token": []}]
