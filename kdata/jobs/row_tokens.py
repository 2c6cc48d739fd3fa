"""The tokens of a row on both sides, the teacher's and those of another tokenizer, and which of their bytes are compared.

Of a chat only what the assistant said is compared. Each model's template writes a text of its own around the messages, which
the other model never read, so nothing of it is a target; but where each turn ends with one mark, the two marks stand for each
other, and a student learns where to stop. What the teacher believed, it believed after the same messages in its own template,
as in every cross-tokenizer distillation of chats (TRL's GOLD compares the text of the completion, too). So both texts have to
hold every message whole: a template that cuts, rewrites or drops one has its row refused.

Where a message stands in the teacher's text follows from its targets, and needs no template: they are the assistant's turns,
or the last one, and in a turn the message is what it begins with, or what stands in it once.

Shapes: T tokens of the teacher, S of the student, N of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kdata.corpus.chat_template import ChatEncoder, ChatError, EncodedChat
from kdata.corpus.messages import Chat
from kdata.format.json_text import parse_row
from kdata.format.records import RowError
from kdata.jobs.payloads import InputSequence

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class RowTokens:
    """Tokens of one side: ids int32 [N], bytes of what is compared that each stands for int64 [N], special bool [N] (those
    that stand for none of it), and whether the last one ends the sequence."""

    ids: np.ndarray
    num_bytes: np.ndarray
    special: np.ndarray
    ends: bool


@dataclass(frozen=True)
class Compared:
    """Both sides of a row.

    text, token_bytes: the student's text, and uint16 [S] bytes of it for each token. closed_T, closed_S: bool, tokens that
    reach out of what is compared. marks: pairs of tokens, of teacher and student, that end the same. turns_S: bool [S],
    tokens of a chat that would count in one that was captured with the student's template; None of a text. prompt: text.
    """

    text: str
    theirs: RowTokens
    own: RowTokens
    token_bytes: np.ndarray
    closed_T: np.ndarray
    closed_S: np.ndarray
    marks: list[tuple[int, int]]
    turns_S: np.ndarray | None
    prompt: str | None


@dataclass(frozen=True)
class ChatRows:
    """Chats, compared. encoder: of the student. theirs, own: bytes of ids. their_marks, own_marks: ids of special tokens."""

    encoder: ChatEncoder
    theirs: list[bytes | None]
    own: list[bytes | None]
    their_marks: np.ndarray
    own_marks: np.ndarray

    def compared(self, row: InputSequence) -> Compared:
        """A row that is a chat. Raises RowError where it cannot be aligned exactly."""
        chat, their_text, lengths_T = _stored(row)
        runs = _runs(row.target_mask)
        turns = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if not turns or len(runs) not in (1, len(turns)):
            raise RowError(
                "targets",
                f"the assistant has {len(turns)} turns, and {len(runs)} stretches of the teacher's tokens count: they are "
                "not its turns or its last one; capture it with targets assistant or last_assistant",
            )
        turns, is_all = turns[-len(runs) :], len(runs) == len(turns)
        _check_before(chat, their_text, np.cumsum(lengths_T)[[first - 1 for first, _ in runs]].tolist(), turns)
        own = self._encoded(chat, last=not is_all)
        _check_whole(chat, their_text, own.text)
        own_runs = _runs(own.target_mask)
        if len(own_runs) != len(runs):
            raise RowError("template", f"the student's template writes {len(own_runs)} turns for {len(runs)}")
        said = [_said(chat.messages[n]).encode() for n in turns]
        own_text, lengths_S = own.text.encode(), own.token_bytes.astype(np.int64)
        their_spans = _messages(their_text, lengths_T, runs, said, "teacher")
        own_spans = _messages(own_text, lengths_S, own_runs, said, "student")
        theirs, closed_T = _tokens(row.token_ids, lengths_T, their_text, their_spans, self.theirs, self.their_marks)
        ours, closed_S = _tokens(own.token_ids, lengths_S, own_text, own_spans, self.own, self.own_marks)
        their_ends = _ends_of_turns(row.token_ids, lengths_T, runs, their_spans, self.their_marks)
        own_ends = _ends_of_turns(own.token_ids, lengths_S, own_runs, own_spans, self.own_marks)
        marks = [(t, s) for t, s in zip(their_ends, own_ends, strict=True) if t is not None and s is not None]
        prompt = None
        if row.prompt is not None:
            prompt = self.encoder.prompt(Chat(chat.messages[: turns[-1]], chat.tools)).text
        return Compared(own.text, theirs, ours, own.token_bytes, closed_T, closed_S, marks, own.target_mask, prompt)

    def _encoded(self, chat: Chat, *, last: bool) -> EncodedChat:
        try:
            return self.encoder.whole(chat, "last_assistant" if last else "assistant")
        except ChatError as error:
            raise RowError("template", f"with the student's template: {error}") from error


def _stored(row: InputSequence) -> tuple[Chat, bytes, np.ndarray]:
    """The chat, the teacher's text of it, and bytes of the text for each token, int64 [T]."""
    assert row.messages is not None
    messages: Any = parse_row(row.messages)
    tools: Any = None if row.tools is None else parse_row(row.tools)
    if row.text is None or row.token_bytes is None:
        raise RowError("not_spelled", "the dataset does not hold the text of the chat, or the bytes of its tokens")
    text, lengths = row.text.encode(), row.token_bytes.astype(np.int64)
    if int(lengths.sum()) != len(text):
        raise RowError("not_spelled", "the teacher's tokens do not spell the text of the chat")
    return Chat(messages, tools), text, lengths


def _runs(mask: np.ndarray) -> Spans:
    """Stretches of tokens in a mask: first, and behind the last."""
    steps = np.diff(mask.astype(np.int8), prepend=0, append=0)
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True))


def _said(message: dict[str, Any]) -> str:
    """The content of a message without white space around it, which some templates remove."""
    content = message["content"] or ""
    return (content if isinstance(content, str) else "\n".join(part["text"] for part in content)).strip()


def _check_whole(chat: Chat, their_text: bytes, own_text: str) -> None:
    for number, message in enumerate(chat.messages):
        said = _said(message)
        for who, text in (("teacher", their_text), ("student", own_text.encode())):
            if said.encode() not in text:
                raise RowError("template", f"the {who}'s template does not write message {number} as it is")


def _check_before(chat: Chat, text: bytes, begins: list[int], turns: list[int]) -> None:
    """Refuse turns that do not begin behind all messages before them, as where every token counts.

    Args:
        begins: bytes of the teacher's text before each turn. turns: numbers of these messages.
    """
    place, number = 0, 0
    for begin, turn in zip(begins, turns, strict=True):
        for message in chat.messages[number:turn]:
            said = _said(message).encode()
            place = text.find(said, place, begin)
            if place < 0:
                raise RowError("targets", f"what counts is not message {turn} alone; capture it with targets assistant")
            place += len(said)
        number = turn


def _messages(text: bytes, lengths: np.ndarray, runs: Spans, said: list[bytes], who: str) -> Spans:
    """Bytes of each message in a text.

    Args:
        runs: tokens of each turn. said: the messages.
    """
    ends, spans = np.concatenate(([0], np.cumsum(lengths))), []
    for (first, behind), message in zip(runs, said, strict=True):
        begin, end = int(ends[first]), int(ends[behind])
        turn = text[begin:end]
        place = len(turn) - len(turn.lstrip())
        if not turn.startswith(message, place):
            if turn.count(message) != 1:
                raise RowError("template", f"where a message stands in its turn, of the {who}'s text, is not certain")
            place = turn.find(message)
        place = place if message else 0
        spans.append((begin + place, begin + place + len(message)))
    return spans


def _tokens(
    ids: np.ndarray, lengths: np.ndarray, text: bytes, spans: Spans, table: list[bytes | None], marks: np.ndarray
) -> tuple[RowTokens, np.ndarray]:
    """The tokens of one side, and those that reach over the border of a message, bool [N]."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    num_bytes, plain, closed = np.zeros(len(ids), np.int64), np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    for begin, end in spans:
        is_inside = (begins >= begin) & (ends <= end) & (begins < end)
        across = (begins < end) & (ends > begin) & ~is_inside
        num_bytes[across] += np.minimum(ends, end)[across] - np.maximum(begins, begin)[across]
        closed |= across
        inside = np.flatnonzero(is_inside)
        if not len(inside):
            continue
        if np.isin(ids[inside], marks).any():
            raise RowError("special_tokens", "a message spells out special tokens, and they were read as such")
        part = text[begins[inside[0]] : ends[inside[-1]]]
        num_bytes[inside], spelled = without_space_before(
            *spelled_by(ids[inside], np.zeros(len(inside), bool), table), part
        )
        if spelled != part:
            raise RowError("not_spelled", "the tokens of a message do not spell it: a tokenizer changes the text")
        plain |= is_inside
    return RowTokens(ids, num_bytes, ~(plain | closed), ends=False), closed


def _ends_of_turns(
    ids: np.ndarray, lengths: np.ndarray, runs: Spans, spans: Spans, marks: np.ndarray
) -> list[int | None]:
    """The token that ends each turn, where nothing else stands between it and the message; else None."""
    begins = np.cumsum(lengths) - lengths
    found: list[int | None] = []
    for (_, behind), (_, end) in zip(runs, spans, strict=True):
        is_end = begins[behind - 1] == end and bool(np.isin(ids[behind - 1], marks))
        found.append(behind - 1 if is_end else None)
    return found


def spelled_by(ids: np.ndarray, special: np.ndarray, table: list[bytes | None]) -> tuple[np.ndarray, bytes]:
    """Bytes of each token, int64 [N], and all of them; special tokens around a text have none.

    Raises RowError where the bytes of a token are not known.
    """
    size = len(table)  # a head may have more rows than there are tokens
    contents = [
        b"" if around else table[number] if number < size else None
        for number, around in zip(ids.tolist(), special.tolist(), strict=True)
    ]
    known = [content for content in contents if content is not None]
    if len(known) < len(contents):
        raise RowError("not_spelled", f"it is not known which bytes token {ids[contents.index(None)]} stands for")
    return np.array([len(content) for content in known], np.int64), b"".join(known)


def without_space_before(num_bytes: np.ndarray, spelled: bytes, text: bytes) -> tuple[np.ndarray, bytes]:
    """Bytes of each token and all of them, without the space that a tokenizer puts before every text."""
    if spelled.startswith(text) or not spelled.startswith(b" " + text):
        return num_bytes, spelled
    shorter = num_bytes.copy()
    shorter[np.flatnonzero(num_bytes)[0]] -= 1
    return shorter, spelled[1:]
