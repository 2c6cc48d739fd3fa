"""Chat templates with limits: those that loop, take memory, or look for files; ordinary ones render as transformers does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from kdata.corpus import template_process
from kdata.corpus.template_process import NeedsDateError, TemplateLimitError, TemplateProcess, TemplateRefusal
from kdata.errors import ConfigError, KdataError
from tests.campaigns.mutations import TEMPLATES
from tests.fakes import CHATML, MARKED, PLAIN_CHAT

RENDERER = TemplateProcess(cpu_sec=0.5)


@pytest.fixture(scope="module", autouse=True)
def _process_ends() -> Iterator[None]:
    yield
    RENDERER.close()


MESSAGES = [{"role": "user", "content": "hé 🙂 \ud800"}, {"role": "assistant", "content": "yes", "tool_calls": []}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [None, 1.5]}}}]


def request(**fields: Any) -> dict[str, Any]:
    basic = {
        "messages": MESSAGES,
        "tools": None,
        "generation_prompt": False,
        "marked": False,
        "variables": {},
        "date": None,
    }
    return {**basic, **fields}


@pytest.mark.parametrize("template", [CHATML, MARKED, PLAIN_CHAT])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_ordinary_templates_render_as_transformers_renders_them(template: str, tools: Any, prompt: bool) -> None:
    marked = "generation %}" in template
    expected: Any = render_jinja_template(
        conversations=[MESSAGES], tools=tools, chat_template=template, add_generation_prompt=prompt,
        return_assistant_tokens_mask=marked, bos_token="<s>",
    )  # fmt: skip
    text, marks = RENDERER.render(
        template, request(tools=tools, generation_prompt=prompt, marked=marked, variables={"bos_token": "<s>"})
    )
    assert text == expected[0][0]
    assert marks == (expected[1][0] if marked else None)


def test_a_loop_without_end_is_ended_and_the_next_chat_rendered() -> None:
    begun = time.process_time()
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateLimitError, match="processor time"):
        RENDERER.render(endless, request())
    assert time.process_time() - begun < 5
    assert RENDERER.render(CHATML, request())[0].startswith("<|im_start|>user")


@pytest.mark.parametrize(
    "template",
    ["{{ 'a' * 3000000000 }}", "{% set n = namespace(x='a' * 1000) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}"
     "{% endfor %}{{ n.x }}", "{{ '{:>9999999999}'.format(1) }}"],
)  # fmt: skip
def test_a_text_of_gigabytes_is_refused(template: str) -> None:
    with pytest.raises(TemplateRefusal, match=r"memory|processor time"):  # whichever limit comes first
        RENDERER.render(template, request())


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_every_template_of_the_campaign_is_rendered_or_refused(template: str) -> None:
    try:
        text, _ = RENDERER.render(template, request())
        assert len(text) < template_process.LONGEST_TEXT
    except KdataError as error:
        assert str(error)


def test_the_date_comes_from_the_request_alone() -> None:
    with pytest.raises(NeedsDateError, match="template_date"):
        RENDERER.render("{{ strftime_now('%Y') }}", request())
    assert RENDERER.render("{{ strftime_now('%d %b %Y') }}", request(date="2026-01-02"))[0] == "02 Jan 2026"


def test_a_template_sees_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hush-hush-hush")
    process = TemplateProcess()
    assert process.render(PLAIN_CHAT, request(messages=MESSAGES[1:]))[0]
    assert process._process is not None
    with open(f"/proc/{process._process.pid}/environ", "rb") as file:
        assert b"hush-hush-hush" not in file.read()
    process.close()


def test_a_template_that_is_not_jinja_is_named() -> None:
    with pytest.raises(ConfigError, match=r"not valid Jinja \(line 1\)"):
        RENDERER.check("{% if %}")


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_every_template_of_the_campaign_is_filled_or_refused(template: str) -> None:
    try:
        text = RENDERER.fill(template, {"messages": MESSAGES, "text": "a"})
        assert len(text) < template_process.LONGEST_TEXT
    except KdataError as error:
        assert str(error)


def test_a_text_is_filled_with_its_values_alone() -> None:
    assert RENDERER.fill("{{ a.b }}: {{ c | join(', ') }}\n", {"a": {"b": "hé 🙂"}, "c": [1, 2]}) == "hé 🙂: 1, 2\n"
    with pytest.raises(TemplateRefusal, match="'d' is undefined"):
        RENDERER.fill("{{ d }}", {"a": 1})
