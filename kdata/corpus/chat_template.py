"""Render chats with the model's own chat template, and find the tokens that the assistant wrote.

These tokens are determined exactly, or the chat is refused. If the template marks them (`{% generation %}`), the marks are
used. Otherwise the chat is rendered up to each turn of the assistant, once with the generation prompt and once with the
turn: both must be prefixes of the whole, and the text between them is the turn. The end-of-turn token belongs to the turn
and is a target, because a student has to learn to stop. A chat is refused where such a text is not a prefix (the template
rewrites earlier turns), or where a token spans the border of a turn.

Characters are mapped to tokens by the bytes of each token; nothing is decoded.
"""

from __future__ import annotations

import datetime
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from kdata.corpus.corpus import CorpusConfig
from kdata.corpus.encode import GUARD, TextEncoder, special_tokens
from kdata.corpus.messages import Chat
from kdata.corpus.template_process import RENDERER, Span, TemplateLimitError, TemplateRefusal
from kdata.errors import ConfigError, DataError


def chat_encoder(tokenizer: Any, corpus: CorpusConfig, vocab_size: int | None = None) -> ChatEncoder:
    """Chats of a corpus to token ids; vocab_size: rows of the teacher's head. Raises ConfigError as `ChatEncoder` does."""
    encoder = TextEncoder(tokenizer, vocab_size=vocab_size, special_tokens_in_text=corpus.spelled)
    return ChatEncoder(tokenizer, encoder, corpus.template_options, corpus.template_date, corpus.own_template())


Targets = Literal["all", "assistant", "last_assistant"]
MOST_LIMITS = 3  # chats in a row for which a template takes too much: then it is the template, not the chats
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ESCAPED_GUARD = re.compile(rf"\\u{ord(GUARD):04x}", re.IGNORECASE)
PROBE = "kdata"  # content of a message that asks a template what it writes before it


class ChatError(DataError):
    """One chat cannot be rendered, or its turns cannot be separated exactly."""


@dataclass(frozen=True)
class EncodedChat:
    """A rendered chat: its text, token ids int32 [T], bytes per token uint16 [T] and target mask bool [T].

    The bytes sum to those of the text, special tokens with their names; entry 0 of the mask is false. role_mask: bool [T],
    tokens of the messages of the roles that were asked for; None where none was.
    """

    text: str
    token_ids: np.ndarray
    token_bytes: np.ndarray
    target_mask: np.ndarray
    role_mask: np.ndarray | None = None


class ChatEncoder:
    """Chats to token ids with a model's chat template.

    Args:
        tokenizer: with a chat template.
        encoder: of that tokenizer.
        options: variables that the template takes.
        date: YYYY-MM-DD, for a template that writes today's date; None refuses such a one.
        template: takes the place of the tokenizer's; run in the same sandbox.
    Raises:
        ConfigError: there is no template, or it is not valid Jinja; an option that it does not know; no date.
    """

    def __init__(
        self,
        tokenizer: Any,
        encoder: TextEncoder,
        options: dict[str, Any] | None = None,
        date: str | None = None,
        template: str | None = None,
    ) -> None:
        self._tokenizer, self.texts, self._template = tokenizer, encoder, template
        known = template or getattr(tokenizer, "chat_template", None)
        if not known:
            raise ConfigError(
                "the model's tokenizer has no chat template, so chats cannot be read; set chat_template to a Jinja file, "
                "take the model's chat (instruct) version, or put the rendered text into a text column"
            )
        if template is not None:
            RENDERER.check(template)
        self._options = options or {}
        self._date = None if date is None else _date(date)
        reserved = inspect.signature(tokenizer.apply_chat_template).parameters
        for name in self._options:
            if name in reserved or name in ("messages", "strftime_now"):
                raise ConfigError(f"template_options.{name} is kdata's own to set")
            if name not in str(known):
                raise ConfigError(f"template_options.{name}: the model's chat template has no such variable")
        self._specials = tuple(special_tokens(tokenizer).values())
        self._special_tokens = {name: _plain(token) for name, token in tokenizer.special_tokens_map.items()}
        self._limits_in_a_row = 0

    def prompt(self, chat: Chat) -> EncodedChat:
        """A chat that the assistant is to continue, up to where it begins to write; nothing of it is a target.

        Raises ChatError where the template refuses it.
        """
        chat = self._prepared(chat)
        text = self._render(chat.messages, chat.tools, generation_prompt=True)
        _check_rendered(chat, text)
        text, ids, lengths, _ = self._encode(text, [])
        return EncodedChat(text, ids, lengths, np.zeros(len(ids), bool))

    def whole(self, chat: Chat, targets: Targets, *, tool_calls: bool = True, roles: Sequence[str] = ()) -> EncodedChat:
        """A chat that is read.

        Args:
            targets: all tokens; those that the assistant wrote (with its end of turn); or those of its last turn.
            tool_calls: those that call a tool (with the end of that turn) count; else what comes before them in a turn only.
            roles: whose messages `role_mask` marks. Of the assistant these are its turns; of others the whole message, with
                what the template writes around it.
        Raises:
            ChatError: the template refuses the chat, or its turns cannot be separated exactly.
        """
        chat = self._prepared(chat)
        rendered, marked = self._render_marked(chat)
        _check_rendered(chat, rendered)
        turns = [] if targets == "all" else self._assistant(chat, rendered, marked, targets)
        called = [] if tool_calls else [n for n, m in enumerate(chat.messages) if m.get("tool_calls")]
        calls = [self._call(chat, rendered, n) for n in called]
        of_roles = self._of_roles(chat, rendered, marked, roles)
        text, ids, lengths, spans = self._encode(rendered, [*turns, *calls, *of_roles])
        mask = np.ones(len(ids), bool)
        if targets != "all":
            mask = _tokens_of(spans[: len(turns)], text, lengths, "the assistant's turn")
        if calls:
            own = spans[len(turns) : len(turns) + len(calls)]
            mask &= ~_tokens_of(own, text, lengths, "a tool call", behind_space=True)
        mask[:1] = False
        own = spans[len(turns) + len(calls) :]
        role_mask = _tokens_of(own, text, lengths, "a message") if roles else None
        return EncodedChat(text, ids, lengths, mask, role_mask)

    def _prepared(self, chat: Chat) -> Chat:
        """The chat as the template gets it.

        Names of special tokens in it are counted, and with split broken by GUARD, so that they differ from those that the
        template writes. A content has the form that the template knows, a text or a list of parts.
        """
        if self._contents == "parts":
            chat = Chat([{**m, "content": _in_parts(m["content"])} for m in chat.messages], chat.tools)
        elif any(isinstance(m["content"], list) for m in chat.messages) and self._contents == "texts":
            chat = Chat([{**m, "content": _joined(m["content"])} for m in chat.messages], chat.tools)
        if not any(self.texts.spells_special_tokens(text) for text in _strings([chat.messages, chat.tools])):
            return chat
        self.texts.note_spelled()
        if self.texts.mode == "keep":
            return chat
        return Chat(_mapped(chat.messages, self.texts.guarded), _mapped(chat.tools, self.texts.guarded))

    def _encode(self, rendered: str, spans: list[Span]) -> tuple[str, np.ndarray, np.ndarray, list[Span]]:
        """The text without GUARD, its token ids and bytes per token, and where the spans are in it."""
        if GUARD not in rendered:
            if _ESCAPED_GUARD.search(rendered):
                raise ChatError("the chat template escapes characters, so special tokens in messages cannot be split")
            return rendered, *self.texts.literal(rendered), spans
        text = rendered.replace(GUARD, "")
        moved = [(a - rendered.count(GUARD, 0, a), b - rendered.count(GUARD, 0, b)) for a, b in spans]
        return text, *self.texts.literal(text, rendered), moved

    @cached_property
    def _contents(self) -> Literal["texts", "parts", "both"]:
        """What the template reads as the content of a message: a text, a list of parts, or either."""

        def reads(content: Any) -> bool:
            try:
                text = self._render([{"role": "user", "content": content}], None)
            except ChatError:
                return False
            return PROBE in text and not re.search("['\"]type['\"]", text)

        if not reads([{"type": "text", "text": PROBE}]):
            return "texts"
        return "both" if reads(PROBE) else "parts"

    @cached_property
    def _probe_content(self) -> Any:
        return _in_parts(PROBE) if self._contents == "parts" else PROBE

    # ------------------------------------------------------------------------------------------------ rendering

    def _template_of(self, tools: Any) -> str:
        """The template's text: a model may have another one for chats with tools."""
        try:
            template: str = self._tokenizer.get_chat_template(self._template, tools=tools)
        except ValueError as error:
            raise ChatError(f"the chat template cannot be determined: {error}") from error
        return template

    def _rendered(
        self, messages: list[dict[str, Any]], tools: Any, *, generation_prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[Span] | None]:
        """What `apply_chat_template` of transformers renders, in a process with limits; and the marks if asked for."""
        request = {
            "messages": messages,
            "tools": tools,
            "generation_prompt": generation_prompt,
            "marked": marked,
            "variables": {**self._special_tokens, **self._options},
            "date": None if self._date is None else self._date.isoformat(),
        }
        try:
            rendered = RENDERER.render(self._template_of(tools), request)
        except TemplateRefusal as error:
            self._limits_in_a_row += isinstance(error, TemplateLimitError)
            if self._limits_in_a_row >= MOST_LIMITS:
                raise ConfigError(
                    f"the chat template cannot be used: {error}, {MOST_LIMITS} times in a row; name another one "
                    "(chat_template), or another model"
                ) from error
            raise ChatError(f"the chat template refuses the chat: {error}") from error
        self._limits_in_a_row = 0
        return rendered

    def _render(self, messages: list[dict[str, Any]], tools: Any, *, generation_prompt: bool = False) -> str:
        if not messages:
            raise ChatError("the chat has no message")
        return self._rendered(messages, tools, generation_prompt=generation_prompt)[0]

    def _render_marked(self, chat: Chat) -> tuple[str, list[Span] | None]:
        """The text, and what the template marks as written by the assistant; None where it has no marks."""
        text = self._render(chat.messages, chat.tools)
        if not MARK.search(self._template_of(chat.tools)):
            return text, None
        # The token mask of `apply_chat_template(..., return_assistant_tokens_mask=True)` takes in a token that begins before
        # the mark; the characters do not leave that open.
        again, marks = self._rendered(chat.messages, chat.tools, marked=True)
        if again != text:
            raise ChatError("the chat template writes another text each time it is asked")
        return text, marks

    # ---------------------------------------------------------------------------------------------------- spans

    def _assistant(self, chat: Chat, text: str, marked: list[Span] | None, targets: Targets) -> list[Span]:
        """What the assistant wrote: each of its turns up to the end-of-turn token, or the last one."""
        numbers = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if targets == "last_assistant":
            numbers = numbers[-1:]
        if marked is None:
            return [self._without_space(text, self._begin(chat, text, n), self._end(chat, text, n)) for n in numbers]
        if targets == "last_assistant" and numbers:
            first = self._begin(chat, text, numbers[0])
            marked = [span for span in marked if span[0] >= first]
        ended = [(begin, end + len(self._end_of_turn(text[end:]))) for begin, end in marked]
        return [self._without_space(text, *span) for span in ended]

    def _of_roles(self, chat: Chat, text: str, marked: list[Span] | None, roles: Sequence[str]) -> list[Span]:
        """The turns of the assistant where it is one of the roles, and the messages of the others."""
        spans = self._assistant(chat, text, marked, "assistant") if "assistant" in roles else []
        for number, message in enumerate(chat.messages):
            if message["role"] in roles and message["role"] != "assistant":
                before = self._render(chat.messages[:number], chat.tools) if number else ""
                spans.append((self._prefix(before, text, number, "without it"), self._end(chat, text, number)))
        return spans

    def _begin(self, chat: Chat, text: str, number: int) -> int:
        """Where message `number`, of the assistant, begins: behind the generation prompt."""
        if number == 0:
            raise ChatError("the assistant speaks first: the text before its turn cannot be determined")
        before = chat.messages[:number]
        prompt = self._render(before, chat.tools, generation_prompt=True)
        begin = self._prefix(prompt, text, number, "with the prompt for its turn")
        if prompt == self._render(before, chat.tools):  # the template has no generation prompt, or passes over it
            probe = self._render([*before, {"role": "assistant", "content": self._probe_content}], chat.tools)
            if not (probe.startswith(prompt) and probe[begin:].lstrip().startswith(PROBE)):
                raise ChatError("the chat template writes no generation prompt, but something before a turn's content")
        return begin

    def _end(self, chat: Chat, text: str, number: int) -> int:
        if number == len(chat.messages) - 1:
            return len(text)
        turn = self._render(chat.messages[: number + 1], chat.tools)
        return self._prefix(turn, text, number, "with its turn")

    def _prefix(self, part: str, text: str, number: int, what: str) -> int:
        if not text.startswith(part):
            raise ChatError(
                f"the chat up to message {number}, {what}, is not rendered as in the whole chat: the template rewrites "
                "earlier turns. Take targets=last_assistant or all, or a template that marks the assistant's turns with "
                "{% generation %}"
            )
        return len(part)

    def _without_space(self, text: str, begin: int, end: int) -> Span:
        """A turn up to its end-of-turn token, where it has one, without the space that the template writes behind that."""
        turn = text[begin:end]
        if self._tail and turn.endswith(self._tail):  # as every turn ends: what the content ends with does not matter
            tail = self._tail.rstrip()
            return begin, end - (len(self._tail) - len(tail) if tail.endswith(self._specials) else 0)
        return (begin, begin + len(turn.rstrip())) if turn.rstrip().endswith(self._specials) else (begin, end)

    def _end_of_turn(self, behind: str) -> str:
        """The special token that ends a turn and that the template leaves outside its mark; '' where it has none there."""
        return self._unmarked_end if behind.startswith(self._unmarked_end) else ""

    @cached_property
    def _probed(self) -> tuple[str, list[Span] | None]:
        """The smallest chat: how the template ends a turn. Empty where it does not take such a one."""
        content = self._probe_content
        asked = Chat([{"role": "user", "content": content}, {"role": "assistant", "content": content}])
        try:
            return self._render_marked(asked)
        except ChatError:
            return "", None

    @cached_property
    def _tail(self) -> str:
        """What the template writes behind the content of a turn: "<|im_end|>\\n"."""
        return self._probed[0].rpartition(PROBE)[2]

    @cached_property
    def _unmarked_end(self) -> str:
        """What the template writes directly behind the mark of a turn, where that is a special token; else ''."""
        text, marks = self._probed
        behind = text[marks[-1][1] :] if marks else ""
        return max((special for special in self._specials if behind.startswith(special)), key=len, default="")

    def _call(self, chat: Chat, text: str, number: int) -> Span:
        """Where message `number` calls tools: from behind its content to the end of the turn.

        The turn is rendered without its calls: there the content is looked for, and up to its end both must be the same.
        """
        begin, end = self._begin(chat, text, number), self._end(chat, text, number)
        message = chat.messages[number]
        content = message["content"] or ""
        bare = {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}
        plain = self._render([*chat.messages[:number], bare], chat.tools)
        said = (content if isinstance(content, str) else "".join(part["text"] for part in content)).strip()
        place = begin
        if said:
            place += len(plain[begin:]) - len(plain[begin:].lstrip())
            if not plain.startswith(said, place):
                place = plain.find(said, begin) if plain.count(said, begin) == 1 else -1
        behind = place + len(said)
        if place < 0 or plain[:behind] != text[:behind]:
            raise ChatError(
                f"the border between the content of message {number} and its tool call cannot be determined exactly"
            )
        return behind, end


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"template_date {text!r} is not a date; write it as YYYY-MM-DD") from error


def _plain(token: Any) -> Any:
    """A special token as text; several of them as a list."""
    return [str(one) for one in token] if isinstance(token, list | tuple) else str(token)


def _joined(content: Any) -> Any:
    """A content of several parts as one text: a line for each, as vLLM's server writes it."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


def _in_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *_strings(item)) if isinstance(key, str) else _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value in which every text is changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _check_rendered(chat: Chat, text: str) -> None:
    """Refuse a template that silently ignores tools or tool calls."""
    calls = [call for message in chat.messages for call in message.get("tool_calls", ())]
    for what, functions in (("tools", chat.tools or []), ("tool calls", calls)):
        for function in functions:
            name = function.get("function", function).get("name")
            if name is not None and str(name) not in text:
                raise ChatError(f"the chat template does not render {what}: {name!r} is not in the text")


def _tokens_of(
    spans: list[Span], text: str, lengths: np.ndarray, what: str, *, behind_space: bool = False
) -> np.ndarray:
    """Tokens that lie inside spans of characters, bool [T]. Raises ChatError where one reaches over a border.

    Args:
        lengths: bytes per token [T]; their running sum says where in the text each token lies. A token of no byte, a part
            of a character that the next token ends, belongs where that character does.
        behind_space: a token may reach into the white space that a span begins with (".\\n" of "so.\\n<tool_call>"), and then
            lies outside.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    mask = np.zeros(len(lengths), bool)
    for span in spans:
        inside = text[slice(*span)]
        space = len(inside) - len(inside.lstrip()) if behind_space else 0
        first, behind, last = (
            len(text[:place].encode("utf-8", "surrogatepass")) for place in (span[0], span[0] + space, span[1])
        )
        for border in (behind, last):
            across = np.flatnonzero((begins < border) & (border < ends))
            if len(across):
                raise ChatError(
                    f"token {across[0]} reaches over the border of {what} (byte {border} of the text): the template "
                    "separates turns with nothing that stays a token of its own"
                )
        mask |= (begins >= first) & (ends <= last) & (begins < last)
    return mask
