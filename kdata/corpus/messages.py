"""Chats as a row of a corpus holds them: messages and tools, checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kdata.errors import DataError


@dataclass(frozen=True)
class Chat:
    """Messages as {"role", "content", ...} and the tools that the assistant may call, or None."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def content(self) -> str:
        """All of it as one text, whatever the order of keys."""
        return json.dumps([self.messages, self.tools], sort_keys=True)


def as_json(value: Any) -> str:
    """JSON text as the index keeps it: readable, keys in their order."""
    return json.dumps(value, ensure_ascii=False)


def parse_chat(messages: Any, tools: Any, where: str) -> Chat:
    """Check a row's messages and tools, each a list or a list as JSON text.

    A key that is null counts as absent, except `content`: templates expect it, so it is always there, and may be null beside
    tool calls only. Arguments of tool calls that are JSON text become objects, as templates expect them.

    Raises:
        DataError: naming `where`, and what is wrong.
    """
    checked = [_message(m, f"{where}, message {n}") for n, m in enumerate(_list(messages, f"{where}: messages"))]
    functions = None if tools is None else _list(tools, f"{where}: tools")
    if functions is not None and not all(isinstance(tool, dict) for tool in functions):
        raise DataError(f"{where}: each of the tools must be an object, the JSON Schema of a function")
    return Chat(checked, functions or None)


def _list(value: Any, what: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{what} is text, but not JSON: {error}") from error
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{what} must be a list, not {type(value).__name__}")
    return value


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} must be an object with a role (text) and a content")
    checked = {key: value for key, value in message.items() if value is not None or key == "content"}
    content = checked.setdefault("content", None)
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise DataError(f"{where} has a part that is not text; kdata reads text only")
    elif not isinstance(content, str | None):
        raise DataError(f"{where} has {type(content).__name__} as content")
    if checked.get("tool_calls"):
        checked["tool_calls"] = [
            _tool_call(call, where) for call in _list(checked["tool_calls"], f"{where}: tool_calls")
        ]
    elif content is None:
        raise DataError(f"{where} has neither content nor tool calls")
    return checked


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call must be an object with a function that has a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: arguments of {function['name']} are text, but not JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments if arguments is not None else {}}}
