"""Secrets in texts: every form is recognized wherever it stands, look-alikes are not, and nothing repeats the secret."""

from __future__ import annotations

import json
import random
import string
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdata
from kdata.check.secret_texts import ANY_FORM, TOKENS, forms_in, refuse_secrets, secrets_of
from kdata.errors import CorruptError, DataError
from kdata.format.records import Record, Reject, UnitResult
from kdata.format.schema import SourceInfo
from kdata.share.fitness import About
from kdata.share.push import push
from kdata.store.writer import Writer
from tests.kdata.share.test_card import make_dataset, record

ALNUM, BASE32 = string.ascii_letters + string.digits, string.ascii_uppercase + "234567"
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "v1"


def letters(rng: random.Random, count: int, alphabet: str = ALNUM) -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


def planted(rng: random.Random) -> dict[str, list[str]]:
    """Secrets of every form, with random letters where the real ones have them."""

    def own(count: int, alphabet: str = ALNUM) -> str:
        return letters(rng, count, alphabet)

    body = "\n".join(own(64, ALNUM + "+/") for _ in range(4))
    return {
        "AWS access key": [f"AKIA{own(16, BASE32)}", f"ASIA{own(16, BASE32)}"],
        "Anthropic key": [f"sk-ant-api03-{own(93, ALNUM + '_-')}AA"],
        "Azure storage key": [f"AccountKey={own(86, ALNUM + '+/')}=="],
        "GitHub token": [f"ghp_{own(36)}", f"gho_{own(36)}", f"ghr_{own(76)}", f"github_pat_{own(22)}_{own(59)}"],
        "GitLab token": [f"glpat-{own(20)}"],
        "Google API key": [f"AIza{own(34)}Q"],
        "Hugging Face token": [f"hf_{own(34, string.ascii_letters)}", f"api_org_{own(34, string.ascii_letters)}"],
        "npm token": [f"npm_{own(36)}"],
        "OpenAI key": [f"sk-{own(20)}T3BlbkFJ{own(20)}", f"sk-proj-{own(60)}_{own(20)}T3BlbkFJ{own(60)}"],
        "PyPI token": [f"pypi-AgEIcHlwaS5vcmc{own(120, ALNUM + '_')}"],
        "SendGrid key": [f"SG.{own(22)}.{own(43)}"],
        "Slack address": [f"https://hooks.slack.com/services/T{own(8, BASE32)}/B{own(8, BASE32)}/{own(24)}"],
        "Slack token": [f"xoxb-{own(12, string.digits)}-{own(12, string.digits)}-{own(24)}"],
        "Stripe key": [f"sk_live_{own(24)}", f"rk_live_{own(60)}"],
        "private key": [
            f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----",
            f"-----BEGIN OPENSSH PRIVATE KEY-----\r\n{body}",
            f"-----BEGIN PRIVATE KEY-----\n{body}",
            f"-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,{own(32)}\n\n{body}",
            f"-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2\n\n{body}",
        ],
    }


AROUND = (
    "{}",
    "export TOKEN='{}'",
    "key: {}\nnext line",
    "url?key={}&b=1",
    "({})",
    "`{}`, and so on",
    "a\t{}\n",
    "é{}é",
)


def matches(text: str) -> bool:
    """Whether DuckDB's first look returns a row with this text."""
    [[answer]] = duckdb.execute("select regexp_matches($text, $form)", {"text": text, "form": ANY_FORM}).fetchall()
    return bool(answer)


@pytest.mark.parametrize("form", [*TOKENS, "private key"])
def test_each_form_is_recognized_wherever_it_stands(form: str) -> None:
    rng = random.Random(form)
    for _ in range(5):
        for secret in planted(rng)[form]:
            for around in AROUND:
                text = around.format(secret)
                chat = json.dumps([{"role": "user", "content": f"mine:\n{text}"}, {"role": "user", "content": secret}])
                escaped = json.dumps([{"role": "user", "content": f"\n{secret}\u00e9"}])  # a letter stands before it
                for one in (text, chat, escaped):
                    assert form in forms_in(one) and matches(one), (form, around)


def test_every_form_is_tested() -> None:
    assert set(planted(random.Random(0))) == {*TOKENS, "private key"}


LOOK_ALIKES = [
    "AKIAIOSFODNN7EXAMPLE",  # of the manual of AWS
    "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "hf_XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX",
    "sk-abcdefghijklmnopqrstuvwxyz0123456789",
    "glpat-aaaaaaaaaaaaaaaaaaaa",
    "sk-1234567890abcdef1234567890abcdef",
    "ghp_tooShortToBeOne",
    "hf_transfer, hf_hub_download_with_a_long_name_of_a_function_x",
    "the class sk-learn-is-a-library-with-a-long-name-and-hyphens",
    "sk-circle-fade-dot-animation-delay-of-a-style-sheet-that-is-long",
    "risk-0123fedcba9876543210fedcba98765432",  # the end of a word
    "myghp_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5",
    "TAKIA" + "QWERTZUIOPASDFGH",
    "AKIA" + "QWERTZUIOPASDFGHJKLYXCVBNM",  # longer
    "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAqz0aGzQdJmYk7Xh1",
    "-----BEGIN CERTIFICATE-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAqz0aGzQdJmYk7Xh1",
    'if line.startswith("-----BEGIN RSA PRIVATE KEY-----"):\n    raise ValueError("a key")',
    "-----BEGIN RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----",
    "commit 3f786850e387550fdab836ed7e6dc881de23001b, 123e4567-e89b-12d3-a456-426614174000",
    "xoxb-your-token-here",
    "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
    "sk_test_4eC39HqLyjWDarjtT1zdp7dc",  # of a test account
]


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_a_look_alike_is_none(text: str) -> None:
    assert forms_in(text) == set() and forms_in(json.dumps({"content": f"\n{text}"})) == set()


def test_a_secret_beside_a_placeholder_is_recognized() -> None:
    secret = planted(random.Random(1))["GitHub token"][0]
    assert forms_in(f"{LOOK_ALIKES[1]} {secret}") == {"GitHub token"}


PIECES = st.sampled_from([secret for secrets in planted(random.Random(2)).values() for secret in secrets] + LOOK_ALIKES)
BETWEEN = st.sampled_from(["", " ", "\n", "\\n", '"', "-", "_", "x", "/", "é", "\\u00e9", "="])


@given(st.lists(st.tuples(BETWEEN, PIECES), max_size=6), BETWEEN)
def test_the_first_look_misses_nothing(parts: list[tuple[str, str]], end: str) -> None:
    text = "".join(between + piece for between, piece in parts) + end
    assert matches(text) or not forms_in(text)


# ------------------------------------------------------------------------------------------------------- of a dataset


def dataset_with(root: Path, records: list[Record], rejects: tuple[Reject, ...] = ()) -> kdata.Dataset:
    """A dataset of these rows, beside 24 that hold nothing."""
    info = make_dataset(root, {"code": 2.0}, rejects=rejects).info
    with Writer(root, info, "more", SourceInfo(kind="capture", settings={}, num_units=None)) as writer:
        writer.commit(UnitResult(0, records))
    return kdata.open(root)


def plain(name: str) -> Record:
    return record(name, "code", 2.0, np.random.default_rng(0))


@pytest.mark.parametrize("column", ["text", "messages", "tools", "prompt", "origin", "license", "rejects"])
def test_a_planted_secret_stops_the_push_and_is_not_repeated(
    tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hush-hush-hush")  # a push without a token is refused before the texts are read
    secret = planted(random.Random(3))["Hugging Face token"][0]
    value = json.dumps([{"role": "user", "content": f"mine:\n{secret}"}]) if column in ("messages", "tools") else secret
    if column == "rejects":
        dataset = dataset_with(tmp_path / "d", [plain("a")], (Reject("odd", "code", "chat", f"{value} is no role"),))
    else:
        dataset = dataset_with(tmp_path / "d", [plain("a"), replace(plain("odd"), **{column: value})])
    with pytest.raises(DataError) as caught:
        push(dataset, tmp_path / "shared")
    assert "1 with a Hugging Face token ('odd')" in str(caught.value) and "--allow-secrets" in str(caught.value)
    assert secret not in str(caught.value) and secret[4:20] not in str(caught.value)
    assert not (tmp_path / "shared").exists()
    with pytest.raises(DataError, match="Nothing was shared"):  # before the Hub is asked
        push(dataset, "hf://me/logits", public=True)
    push(dataset, tmp_path / "shared", about=About(skip=("secrets",)))
    assert kdata.open(tmp_path / "shared").content_digest == dataset.content_digest


def test_rows_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    rng = random.Random(4)
    rows = [replace(plain(f"r{n}"), text=f"key {planted(rng)['AWS access key'][0]}") for n in range(5)]
    both = f"{planted(rng)['AWS access key'][1]} {planted(rng)['private key'][0]}"
    secret_id = planted(rng)["GitHub token"][0]
    rows += [replace(plain("both"), text=both), plain(secret_id)]
    dataset = dataset_with(tmp_path / "d", rows)
    assert {form: (one.rows, len(one.ids)) for form, one in secrets_of(dataset).items()} == {
        "AWS access key": (6, 3),
        "GitHub token": (1, 1),
        "private key": (1, 1),
    }
    with pytest.raises(DataError) as caught:
        refuse_secrets(dataset)
    assert "6 with an AWS access key ('r0', 'r1', 'r2', ...); 1 with a GitHub token ('***')" in str(caught.value)
    assert secret_id not in str(caught.value)


def test_a_dataset_without_secrets_is_shared(tmp_path: Path) -> None:
    rows = [replace(plain(f"r{n}"), text=text) for n, text in enumerate(LOOK_ALIKES)]
    push(dataset_with(tmp_path / "d", rows), tmp_path / "shared")
    assert kdata.open(tmp_path / "shared").num_rows == 24 + len(rows)


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_datasets_of_every_version_can_be_searched(name: str) -> None:
    assert secrets_of(kdata.open(GOLDEN / name)) == {}


def test_a_damaged_index_is_not_searched(tmp_path: Path) -> None:
    dataset = dataset_with(tmp_path / "d", [plain("a")])
    path = tmp_path / "d" / "index" / "more-00000.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptError):
        secrets_of(dataset)
