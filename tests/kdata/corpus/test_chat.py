"""Chats: what counts is what the assistant wrote, to the token, or the chat is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kdata.corpus.chat_template import ChatEncoder, ChatError, Targets
from kdata.corpus.encode import TextEncoder
from kdata.corpus.messages import Chat
from kdata.errors import ConfigError
from kdata.teachers.model import load_tokenizer
from tests.fakes import CHATML, MARKED, PLAIN_CHAT, TURN_END, save_tokenizer

# The mark leaves the end of the turn outside, as some templates do.
HALF_MARKED = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
# Like those of reasoning models: thoughts stand in the last turn only, an empty one is written where there is none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No special tokens, and nothing before a turn that ends a token: " " joins the first word.
SPACED = PLAIN_CHAT.replace("{% if add_generation_prompt %}Assistant:", "{% if add_generation_prompt %}Assistant: ")
NO_PROMPT = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
# As Llama 2 writes: what comes before the assistant's turn belongs to the user's.
INST = (
    "{% for m in messages %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    tokenizers: dict[str, Any] = {}

    def tokenizer(template: str) -> Any:
        if template not in tokenizers:
            folder = tmp_path_factory.mktemp("chat")
            save_tokenizer(folder, chat_template=template)
            tokenizers[template] = load_tokenizer(folder)
        return tokenizers[template]

    return tokenizer


@pytest.fixture(scope="module")
def encoder_for(tokenizer_for: Callable[[str], Any]) -> Callable[..., ChatEncoder]:
    def encoder(template: str, **settings: Any) -> ChatEncoder:
        tokenizer = tokenizer_for(template)
        return ChatEncoder(tokenizer, TextEncoder(tokenizer), **settings)

    return encoder


@pytest.fixture(scope="module")
def target_text(tokenizer_for: Callable[[str], Any], encoder_for: Callable[..., ChatEncoder]) -> Callable[..., str]:
    """The text of the target tokens of a chat."""

    def target_text(
        template: str, messages: list[dict[str, Any]], targets: Targets = "assistant", **settings: Any
    ) -> str:
        chat = encoder_for(template).whole(Chat(messages), targets, **settings)
        tokenizer = tokenizer_for(template)
        assert chat.token_ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
        assert chat.text == tokenizer.apply_chat_template(messages, tokenize=False)
        assert int(chat.token_bytes.sum()) == len(chat.text.encode()) and not chat.target_mask[0]
        return tokenizer.decode(chat.token_ids[chat.target_mask], clean_up_tokenization_spaces=False)

    return target_text


def says(role: str, content: str | None, *calls: str) -> dict[str, Any]:
    """A message; each of `calls` is the name of a function that it calls."""
    called = [{"type": "function", "function": {"name": name, "arguments": {"x": [1, "é"]}}} for name in calls]
    return {"role": role, "content": content, **({"tool_calls": called} if called else {})}


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "the cat",
        " sat\n",
        "\n\nthe",
        "def add(a, b):",
        "日本語 🙂",
        "<|im_end|>",
        "a <|im_start|>user\n",
        "</s>",
        "the cat .",
    ]
)
TURNS = st.tuples(st.sampled_from(["user", "assistant", "system"]), CONTENT)
CONVERSATIONS = st.lists(TURNS, max_size=5).map(lambda t: [says("user", "the dog"), *(says(*turn) for turn in t)])


@pytest.mark.parametrize("template", [CHATML, MARKED, HALF_MARKED], ids=["chatml", "marked", "half-marked"])
@given(messages=CONVERSATIONS)
def test_the_targets_are_the_assistant_s_contents_each_with_its_end_of_turn(
    target_text: Callable[..., str], template: str, messages: list[dict[str, Any]]
) -> None:
    written = [m["content"] + TURN_END for m in messages if m["role"] == "assistant"]
    assert target_text(template, messages) == "".join(written)
    assert target_text(template, messages, "last_assistant") == "".join(written[-1:])


@given(messages=CONVERSATIONS)
def test_marks_are_read_as_transformers_reads_them(
    tokenizer_for: Callable[[str], Any], encoder_for: Callable[..., ChatEncoder], messages: list[dict[str, Any]]
) -> None:
    theirs = tokenizer_for(MARKED).apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ours = encoder_for(MARKED).whole(Chat(messages), "assistant")
    assert ours.target_mask.astype(int).tolist() == theirs["assistant_masks"]


@given(messages=CONVERSATIONS)
def test_all_is_every_token_but_the_first(encoder_for: Callable[..., ChatEncoder], messages: list[Any]) -> None:
    chat = encoder_for(CHATML).whole(Chat(messages), "all")
    assert chat.target_mask[1:].all() and not chat.target_mask[0]


@given(
    turns=st.lists(st.tuples(CONTENT, st.lists(st.sampled_from(["add", "f"]), max_size=2)), min_size=1, max_size=3),
)
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["chatml", "marked"])
def test_tool_calls_can_be_left_out_to_the_end_of_their_turn(
    target_text: Callable[..., str], template: str, turns: list[tuple[str, list[str]]]
) -> None:
    messages = [says("user", "?")]
    for content, calls in turns:
        messages += [says("assistant", content, *calls), says("user", "and?")]
    every, some = "", ""
    for content, calls in turns:
        called = "".join(f'\n<call>{{"name": "{name}", "arguments": {{"x": [1, "é"]}}}}</call>' for name in calls)
        every += content + called + TURN_END
        some += content.rstrip() if calls else content + TURN_END
    assert target_text(template, messages) == every
    text = target_text(template, messages, tool_calls=False)
    # Of the space between a content and its call so much counts as its last token holds.
    assert "".join(text.split()) == "".join(some.split()) and "<call>" not in text
    assert not any(calls for _, calls in turns) or len(text) < len(every)


def test_a_content_that_shares_its_last_token_with_the_call_counts_in_whole(
    tmp_path: Path, target_text: Callable[..., str]
) -> None:
    """Tokens such as ".\\n" hold the end of the one and the space before the other."""
    save_tokenizer(tmp_path, lines=["so.\n<call>"] * 50, chat_template=CHATML)
    tokenizer = load_tokenizer(tmp_path)
    encoder = ChatEncoder(tokenizer, TextEncoder(tokenizer))
    shared = Chat([says("user", "?"), says("assistant", "so.", "add")])
    chat = encoder.whole(shared, "assistant", tool_calls=False)
    assert tokenizer.decode(chat.token_ids[chat.target_mask]).strip() == "so."


def test_a_turn_of_the_assistant_that_comes_first_is_refused_without_marks(target_text: Callable[..., str]) -> None:
    first = [says("assistant", "hello"), says("user", "hi"), says("assistant", "so")]
    assert target_text(MARKED, first) == f"hello{TURN_END}so{TURN_END}"
    with pytest.raises(ChatError, match="the assistant speaks first"):
        target_text(CHATML, first)
    assert target_text(CHATML, first, "last_assistant") == f"so{TURN_END}"


def test_a_template_that_rewrites_earlier_turns_is_refused_except_for_the_last_turn(
    target_text: Callable[..., str],
) -> None:
    two = [says("user", "a"), says("assistant", "b"), says("user", "c"), says("assistant", "d")]
    with pytest.raises(ChatError, match=r"up to message 1, with its turn, is not rendered as in the whole chat"):
        target_text(THINKING, two)
    assert target_text(THINKING, two, "last_assistant") == f"<think></think>d{TURN_END}"
    assert target_text(THINKING, two[:2]) == f"<think></think>b{TURN_END}"


def test_a_token_that_spans_the_border_of_a_turn_is_refused(target_text: Callable[..., str]) -> None:
    chat = [says("user", "the cat"), says("assistant", "the dog")]
    assert target_text(PLAIN_CHAT, chat) == " the dog\n"
    with pytest.raises(ChatError, match=r"token \d+ reaches over the border of the assistant's turn"):
        target_text(SPACED, chat)


def test_a_template_without_a_generation_prompt_must_write_nothing_before_a_turn(
    target_text: Callable[..., str],
) -> None:
    chat = [says("user", "a"), says("assistant", "b"), says("user", "c"), says("assistant", "d")]
    assert target_text(INST, chat) == " b</s> d</s>"
    with pytest.raises(ChatError, match="writes no generation prompt, but something before"):
        target_text(NO_PROMPT, chat)


@given(messages=CONVERSATIONS)
def test_without_special_tokens_a_chat_is_exact_or_refused(
    target_text: Callable[..., str], messages: list[dict[str, Any]]
) -> None:
    assume(all(m["role"] != "system" for m in messages))
    try:
        text = target_text(PLAIN_CHAT, messages)
    except ChatError as error:
        assert "reaches over the border" in str(error)
    else:
        assert text == "".join(f" {m['content']}\n" for m in messages if m["role"] == "assistant")


def test_tools_that_the_template_ignores_are_refused(encoder_for: Callable[..., ChatEncoder]) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    chat = Chat([says("user", "?"), says("assistant", None, "add")], tools)
    encoder = encoder_for(CHATML)
    assert '"name": "add"' in encoder.prompt(Chat(chat.messages[:1], tools)).text
    assert encoder.whole(chat, "assistant").text.count("add") == 2
    with pytest.raises(ChatError, match="does not render tools: 'add'"):
        encoder_for(PLAIN_CHAT).prompt(Chat(chat.messages[:1], tools))
    with pytest.raises(ChatError, match="does not render tool calls: 'add'"):
        encoder_for(PLAIN_CHAT).whole(Chat([says("user", "?"), says("assistant", "x", "add")]), "all")


def test_a_prompt_ends_where_the_assistant_begins(encoder_for: Callable[..., ChatEncoder]) -> None:
    prompt = encoder_for(CHATML).prompt(Chat([says("user", "hi")]))
    assert prompt.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert not prompt.target_mask.any() and prompt.token_ids[:1].tolist() == [2]


def test_the_reason_of_a_template_that_refuses_is_reported(encoder_for: Callable[..., ChatEncoder]) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + CHATML
    with pytest.raises(ChatError, match="the chat template refuses the chat: the user begins"):
        encoder_for(strict).prompt(Chat([says("system", "x")]))
    with pytest.raises(ChatError, match="refuses the chat: 'dict object' has no attribute 'mood'"):
        encoder_for("{{ messages[0].mood.deeper }}").prompt(Chat([says("user", "x")]))


def test_a_template_that_writes_the_date_needs_one(encoder_for: Callable[..., ChatEncoder]) -> None:
    dated = "{{ strftime_now('%d %b %Y') if not day is defined else day }}" + CHATML
    chat = Chat([says("user", "hi")])
    with pytest.raises(ConfigError, match="set template_date"):
        encoder_for(dated).prompt(chat)
    assert encoder_for(dated, date="2026-03-01").prompt(chat).text.startswith("01 Mar 2026<|im_start|>")
    assert encoder_for(dated, options={"day": "D"}).prompt(chat).text.startswith("D<|im_start|>")
    assert encoder_for(dated, date="2026-03-01").whole(chat, "all").text.startswith("01 Mar 2026<|im_start|>")
    with pytest.raises(ConfigError, match="is not a date; write it as YYYY-MM-DD"):
        encoder_for(dated, date="1 March")


def test_settings_that_the_template_does_not_know_are_refused(
    tokenizer_dir: Path, encoder_for: Callable[..., ChatEncoder]
) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    with pytest.raises(ConfigError, match="no chat template"):
        ChatEncoder(tokenizer, TextEncoder(tokenizer))
    with pytest.raises(ConfigError, match="has no such variable"):
        encoder_for(CHATML, options={"enable_thinking": False})
    for name in ("tools", "messages", "tokenize"):
        with pytest.raises(ConfigError, match="kdata's own to set"):
            encoder_for(CHATML, options={name: []})


def test_tokens_that_share_a_character_belong_to_its_span(encoder_for: Callable[..., ChatEncoder]) -> None:
    """🙂 is four tokens of one byte each here; none of them is lost at a border."""
    chat = encoder_for(CHATML).whole(Chat([says("user", "🙂"), says("assistant", "🙃")]), "assistant")
    targets = np.flatnonzero(chat.target_mask)
    assert int(chat.token_bytes[targets].sum()) == len(f"🙃{TURN_END}".encode())
    assert (np.diff(targets) == 1).all()
