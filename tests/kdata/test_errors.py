"""Secrets are shown nowhere: in messages, in causes of errors, in settings."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import Field

from kdata.config import Strict, parse_config
from kdata.errors import (
    ConfigError,
    CorruptError,
    DataError,
    StorageError,
    first_line,
    never_show,
    public_environment,
    redacted,
)
from kdata.format.records import RowError
from kdata.store.url import Store
from kdata.teachers.config import ServerConfig

TOKEN = "hf_" + "aBcDeFgHiJ" * 3
SERVER = {"endpoints": ["http://127.0.0.1:8000"]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://someone:hush@host/x", "https://***@host/x"),
        ("https://hush@host/x", "https://***@host/x"),
        ("s3:/someone:hush@host/x", "s3:/***@host/x"),  # as a path writes it
        ("https://host/x?token=hush&b=2", "https://host/x?token=***&b=2"),
        ("https://host/x?b=2&X-Amz-Signature=hush", "https://host/x?b=2&X-Amz-Signature=***"),
        ("https://host/x?api_key=hush'", "https://host/x?api_key=***'"),
        (f"model {TOKEN!r}", "model '***'"),
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer ***"),
        ("sk-proj-" + "a1" * 20, "***"),
        ("AKIA" + "A2B3" * 4, "***"),
    ],
)
def test_a_secret_is_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown
    error = CorruptError(f"before {text} behind")
    assert str(error) == f"before {shown} behind" and text not in repr(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    "text",
    ["https://host/x?page=2&kind=a", "me@example.com", "a token of the tokenizer", "OWNER/NAME@main", "hf://OWNER/NAME@v1",
     "hf_model", "sk-learn", "12:30 @ home", "the file /a/b@c:d"],
)  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    assert redacted(text) == text


def test_values_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "plain-value-123")
    monkeypatch.setenv("TOKEN_PATH", "/home/me/token")
    assert str(DataError("got plain-value-123 from /home/me/token")) == "got *** from /home/me/token"
    error = RowError("form", "plain-value-123")
    assert error.detail == "***" and error.reason == "form"
    assert "MY_API_KEY" not in public_environment() and "PATH" in public_environment()


def test_a_secret_of_this_process_is_hidden() -> None:
    never_show("sesame-4711-sesame")
    assert str(StorageError("sent sesame-4711-sesame")) == "sent ***"


class Settings(Strict):
    model: str = ""
    options: dict[str, Any] = Field({})


@pytest.mark.parametrize(
    "values",
    [
        {"model": TOKEN},
        {"model": "https://someone:hush-hush@host/x"},
        {"options": {"a": [{"b": f"https://host/?token={TOKEN}"}]}},
        {"options": {TOKEN: 1}},
        {TOKEN: 1},
    ],
)
def test_a_setting_that_holds_a_secret_is_refused_without_repeating_it(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="looks like a password or a token") as caught:
        parse_config(Settings, values, "settings")
    assert TOKEN not in str(caught.value) and "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["plainSecretValue", TOKEN, "AKIA" + "A2B3" * 4, "my-token-value", "A" * 65])
def test_a_token_in_place_of_a_variable_s_name_is_refused_without_repeating_it(name: str) -> None:
    with pytest.raises(ConfigError, match=r"auth_env") as caught:
        parse_config(ServerConfig, {**SERVER, "auth_env": name}, "server")
    assert name not in str(caught.value)
    assert ServerConfig.model_validate({**SERVER, "auth_env": "MY_TOKEN"}).auth_env == "MY_TOKEN"


@pytest.mark.parametrize("url", ["https://host/x?token=hush-hush", "memory://a:hush-hush@host/x"])
def test_a_dataset_s_url_holds_no_secret(url: str) -> None:
    with pytest.raises(ConfigError, match="no password and no token") as caught:
        Store(url)
    assert "hush" not in str(caught.value)


def test_an_error_without_words_is_named_by_its_kind() -> None:
    assert first_line(EOFError()) == "EOFError" and first_line(ValueError("\n")) == "ValueError"
    assert first_line(ValueError("\na b\nc")) == "a b"
