"""Chats as a row of a corpus holds them: messages and tools, checked.

Three forms are known: messages with role and content (OpenAI), with from and value (ShareGPT), and the columns instruction,
input and output (Alpaca).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdata.corpus.values import plain
from kdata.errors import DataError
from kdata.format.json_text import parse_row


@dataclass(frozen=True)
class Chat:
    """Messages as {"role", "content", ...} and the tools that the assistant may call, or None."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def content(self) -> str:
        """All of it as one text, whatever the order of keys."""
        return json.dumps([self.messages, self.tools], sort_keys=True)


SHAREGPT, ALPACA = "conversations", "instruction"  # what their columns are called
# Further columns that belong to a chat, by the name of its column.
COMPANIONS = {SHAREGPT: ("system",), ALPACA: ("input", "output", "system", "history")}
# Who speaks in a ShareGPT message, and the role that chat templates know.
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "function", "ipython"), "tool"),
    "function_call": "function_call",
    "tool_call": "function_call",
}


def as_json(value: Any) -> str:
    """JSON text as the index keeps it: readable, keys in their order."""
    return json.dumps(value, ensure_ascii=False)


def chat_of_row(row: Mapping[str, Any], messages_column: str, tools_column: str | None, where: str) -> Chat:
    """The chat of a row: of its column with messages, or of the columns of Alpaca. Raises as `parse_chat`."""
    messages, tools = row.get(messages_column), row.get(tools_column) if tools_column else None
    if messages_column == ALPACA and not isinstance(messages, list):
        return parse_chat(_alpaca(row, where), tools, where)
    messages = _list(messages, f"{where}: messages")
    is_sharegpt = any(isinstance(message, dict) and message.get("from") is not None for message in messages)
    chat = parse_chat(messages, tools, where)
    system = row.get("system") if messages_column == SHAREGPT and is_sharegpt else None
    _refuse_other_than_text("system", system, where)
    if not system or (chat.messages and chat.messages[0]["role"] == "system"):
        return chat
    return Chat([{"role": "system", "content": system}, *chat.messages], chat.tools)


def _alpaca(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Messages of a row of Alpaca: the instruction with the input below it, and the output as the answer, if it has one."""
    texts = {name: row.get(name) for name in (ALPACA, "input", "output", "system")}
    for name, value in texts.items():
        _refuse_other_than_text(name, value, where)
    history = _list(row.get("history"), f"{where}: history")
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DataError(f"{where}: history must be a list of pairs, a question and its answer")
    asked = "\n".join(text for text in (texts[ALPACA], texts["input"]) if text)
    said = [("system", texts["system"])] if texts["system"] else []
    for question, answer in history:
        said += [("user", question), ("assistant", answer)]
    said.append(("user", asked))
    if texts["output"] is not None:
        said.append(("assistant", texts["output"]))
    return [{"role": role, "content": content} for role, content in said]


def _refuse_other_than_text(column: str, value: Any, where: str) -> None:
    if not isinstance(value, str | None):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, not text")


def parse_chat(messages: Any, tools: Any, where: str) -> Chat:
    """Check a row's messages and tools, each a list or a list as JSON text.

    Messages with from and value become messages with role and content; see `ROLES`.

    A key that is null counts as absent, except `content`: templates expect it, so it is always there, and may be null beside
    tool calls only. Arguments of tool calls that are JSON text become objects, as templates expect them. Times, decimals and
    bytes, which JSON does not have, become text.

    Raises:
        DataError: naming `where`, and what is wrong.
    """
    checked = [_message(m, f"{where}, message {n}") for n, m in enumerate(_list(messages, f"{where}: messages"))]
    functions = None if tools is None else _list(tools, f"{where}: tools")
    if functions is not None and not all(isinstance(tool, dict) for tool in functions):
        raise DataError(f"{where}: each of the tools must be an object, the JSON Schema of a function")
    return Chat(plain(checked), plain(functions) or None)


def _list(value: Any, what: str) -> list[Any]:
    if isinstance(value, str | bytes):
        try:
            value = parse_row(value)
        except DataError as error:
            raise DataError(f"{what} is text, but not JSON: {error}") from error
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{what} must be a list, not {type(value).__name__}")
    return value


def _sharegpt(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message with from and value as one with role and content; what a function_call writes becomes tool calls."""
    speaker = message["from"]
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"{where} is from {speaker!r}; known are {', '.join(ROLES)}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    content = message.get("value", message.get("content"))
    if role != "function_call":
        return {"role": role, "content": content, **rest}
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, str) and content.lstrip().startswith("{"):
        content = f"[{content}]"
    calls = _list(content, f"{where}: the function call")
    if not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}: a function call must be an object with a name and arguments")
    functions = [call.get("function", call) for call in calls]
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": function} for function in functions],
        **rest,
    }


def _message(message: Any, where: str) -> dict[str, Any]:
    if isinstance(message, dict) and message.get("from") is not None and message.get("role") is None:
        message = _sharegpt(message, where)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} must be an object with a role (text) and a content, or with from and value")
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
            arguments = parse_row(arguments)
        except DataError as error:
            raise DataError(f"{where}: arguments of {function['name']} are text, but not JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments if arguments is not None else {}}}
