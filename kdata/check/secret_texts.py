"""Secrets in the texts of a dataset, by well-known forms: private keys, and tokens that begin with a name of their own.

One query of DuckDB reads the columns with text once, with one pattern (RE2), and only the rows that it returns are looked at
again. A form is searched for, not a likelihood: a password in a sentence is not recognized, nor a token of no known form.

Why no library: detect-secrets (Apache-2.0; needs requests and PyYAML) knows the same forms, and applies them in Python line
by line, at 2.7 MB/s of text on a core where this does 200, reading included. Its further detectors, by entropy and by words
such as "password", are for files of settings, and find something in every text.

Sources of the forms: the documents of the services, and the rules of gitleaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from kdata.errors import DataError
from kdata.store.dataset import Dataset

# What DuckDB (RE2) and Python understand alike.
PRIVATE_KEY = r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,2}PRIVATE KEY(?: BLOCK)?-----[\s\S]{0,200}?[A-Za-z0-9+/]{40}"
TOKENS = {
    "AWS access key": r"A[KS]IA[A-Z2-7]{16}",
    "Anthropic key": r"sk-ant-[a-z0-9]{2,12}-[A-Za-z0-9_-]{80,}",
    "Azure storage key": r"AccountKey=[A-Za-z0-9+/]{86}==",
    "GitHub token": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
    "GitLab token": r"glpat-[A-Za-z0-9_-]{20,}",
    "Google API key": r"AIza[A-Za-z0-9_-]{35}",
    "Hugging Face token": r"(?:hf|api_org)_[A-Za-z0-9]{34}",
    "npm token": r"npm_[A-Za-z0-9]{36}",
    "OpenAI key": r"sk-(?:(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40,}|[A-Za-z0-9]{32,})",
    "PyPI token": r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,}",
    "SendGrid key": r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",
    "Slack address": r"hooks\.slack\.com/services/T[A-Z0-9]{6,12}/B[A-Z0-9]{6,12}/[A-Za-z0-9]{24}",
    "Slack token": r"xox[abeoprs]-[0-9]{6,14}-[A-Za-z0-9-]{20,}",
    "Stripe key": r"[rs]k_live_[A-Za-z0-9]{24,}",
}
# Around a token. In JSON, as chats are stored, a letter before it may be the end of an escape such as \n.
_RE2_BEFORE, _RE2_AFTER = r"(?:^|[^A-Za-z0-9_-]|\\[bfnrt]|\\u[0-9A-Fa-f]{4})", r"(?:[^A-Za-z0-9_-]|$)"
_BEFORE, _AFTER = r"(?:(?<![A-Za-z0-9_-])|(?<=\\[bfnrt])|(?<=\\u[0-9A-Fa-f]{4}))", r"(?![A-Za-z0-9_-])"
ANY_FORM = f"{PRIVATE_KEY}|{_RE2_BEFORE}(?:{'|'.join(TOKENS.values())}){_RE2_AFTER}"  # for RE2
_FORMS = {name: re.compile(f"{_BEFORE}(?:{form}){_AFTER}") for name, form in TOKENS.items()}
_PRIVATE_KEY = re.compile(PRIVATE_KEY)
# What manuals write in place of a secret, as AWS does with AKIA...EXAMPLE.
_PLACEHOLDER = re.compile(r"example|12345678|abcdefgh|x{8}|0{8}", re.IGNORECASE)
_LEAST_CHARACTERS = 8  # different ones that a secret has
FIRST = 3  # ids that are named


@dataclass
class Found:
    """Rows that hold a secret of one form: how many, and the ids of the first FIRST."""

    rows: int = 0
    ids: list[str] = field(default_factory=list)


def spans_in(text: str) -> Iterator[tuple[str, int, int]]:
    """Form, begin and end, in characters, of each secret that a text holds, placeholders left out. A key may be cut short."""
    for name, form in _FORMS.items():
        yield from ((name, *match.span()) for match in form.finditer(text) if _is_secret(match[0]))
    yield from (("private key", *match.span()) for match in _PRIVATE_KEY.finditer(text))


def forms_in(text: str) -> set[str]:
    """Names of the forms of secrets that a text holds, placeholders left out."""
    return {name for name, _, _ in spans_in(text)}


def _is_secret(match: str) -> bool:
    return len(set(match)) >= _LEAST_CHARACTERS and _PLACEHOLDER.search(match) is None


def secrets_of(dataset: Dataset) -> dict[str, Found]:
    """What is in the columns with text (prompts, chats, ids, origins, ...) of rows, and of inputs that were refused, by form.

    Raises:
        CorruptError: a part of the index or of the rejects is not what was committed.
    """
    found: dict[str, Found] = {}
    for view in ("rows", "rejects"):
        schema = dataset.sql(f"select * from {view} limit 0").schema  # older datasets have fewer
        columns = [column.name for column in schema if pa.types.is_string(column.type)]
        condition = " or ".join(f"regexp_matches({column}, $form)" for column in columns)
        query = f"select {', '.join(columns)} from {view} where {condition}"
        with dataset.sql_stream(query, {"form": ANY_FORM}) as batches:
            for row_id, texts in _texts_of(batches):
                for form in set().union(*map(forms_in, texts)):
                    one = found.setdefault(form, Found())
                    one.rows += 1
                    if len(one.ids) < FIRST:
                        one.ids.append(row_id)
    return dict(sorted(found.items()))


def _texts_of(batches: pa.RecordBatchReader) -> Iterator[tuple[str, list[str]]]:
    """Id and texts of each row."""
    for batch in batches:
        for row in batch.to_pylist():
            yield row["id"], [text for text in row.values() if text is not None]


def refuse_secrets(dataset: Dataset) -> None:
    """Raise DataError where the texts of a dataset hold what looks like a secret; it names forms and ids, not the secret."""
    found = secrets_of(dataset)
    if not found:
        return
    listing = "; ".join(
        f"{one.rows:,} with {'an' if form[0] in 'AO' else 'a'} {form} ({', '.join(map(repr, one.ids))}"
        f"{', ...' if one.rows > len(one.ids) else ''})"
        for form, one in found.items()
    )
    raise DataError(
        f"{dataset.place}: rows hold what looks like a secret: {listing}. Nothing was shared. Revoke what is real, and leave "
        "these rows out (`kdata select --sql`, then `kdata split --by plan`); where none is a secret, go on with "
        "--allow-secrets"
    )
