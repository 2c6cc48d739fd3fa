"""What `kdata hygiene`, `kdata select --where` and `kdata plan show` print of texts that are left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdata.pipelines.cli.main import call
from tests.fakes import write_jsonl
from tests.kdata.selection.plans import Row, dataset_of

TEXTS = {
    "a": "The people of the small village walked home along the river before the night came and the rain began to fall.",
    "b": "THE PEOPLE of the small village walked home along the river before the night came and the rain began to fall.",
    "c": "Write to jane.roe@acme-mail.org today, said the old man to the child who was with him in the house.",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    dataset_of(tmp_path / "data", [Row(name, text=text) for name, text in TEXTS.items()])
    write_jsonl(tmp_path / "c.jsonl", [{"id": name, "domain": "a", "text": text} for name, text in TEXTS.items()])
    write_jsonl(tmp_path / "exam.jsonl", [{"id": "q", "text": TEXTS["c"]}, {"id": "short", "text": "two words"}])
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_dataset_gets_scores_and_a_plan_shows_what_it_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["hygiene", "data", "--set", "workers=1", "--set", "overlap.exam=exam.jsonl", "--set", "ngram=12"]) == 0
    out = said(capsys)
    for line in (
        "scores.duplicates covers 3 rows of data",
        "overlap: 1 items of exam have no text of 12 words, and are not searched for",
        "duplicates: 1 rows repeat a text, 0 more are near duplicates, 2 stay",
        "overlap: 1 rows share text with exam",
        "language: 3 en",
        "personal: 1 rows with any, 1 email",
    ):
        assert line in out, line
    conditions = ["--where", "duplicates.near_keep", "--where", "overlap.exam_share = 0"]
    assert call(["select", "data", "--method", "all", "--name", "clean", *conditions]) == 0
    assert "1 of 3 rows meet the conditions duplicates.near_keep: leaves out 1 (1 that no other does)" in said(capsys)
    assert call(["plan", "show", "data", "clean"]) == 0
    out = said(capsys)
    assert "Rows that were left out, for example" in out and "jane.roe@acme-mail.org" in out and "THE PEOPLE" in out


def test_a_corpus_gets_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["hygiene", "c.jsonl", "--out", "h.parquet", "--set", "workers=1", "--where", "duplicates.near_keep"]
    for checks in ([], ["--checks", "duplicates"]):
        assert call([*command, *checks]) == 0
        out = said(capsys)
        assert "h.parquet has the columns of 3 rows of c.jsonl" in out and "2 of 3 rows pass" in out
        assert "THE PEOPLE" in out and ("language: 3 en" in out) == (not checks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["c.jsonl"], "is not a dataset; for a corpus name the file to write: --out FILE.parquet"),
        (["data", "--where", "true"], "are for a corpus: name a file to write with --out"),
        (["c.jsonl", "--out", "h.csv"], "does not end in .parquet"),
        (["c.jsonl", "--out", "no/h.parquet"], "no does not exist"),
        (["c.jsonl", "--out", "h.parquet", "--where", "nll >"], "is not SQL"),
        (["c.jsonl", "--out", "h.parquet", "--where", "nothing > 1"], "nothing"),
        (["c.jsonl", "--out", "h.parquet", "--where", "lanugage.code = 'en'"], "did you mean 'language'"),
        (["c.jsonl", "--out", "h.parquet", "--where", "duplicates.near_kept"], "near_kept"),
        (["data", "--out", "h.parquet"], "data is a dataset: leave --out away"),
        (["data", "--set", "phone_region=XX"], "'XX' is no country with phone numbers"),
        (["data", "--checks", "language", "--set", "overlap.exam=exam.jsonl"], "add --checks overlap"),
        (["data", "--set", "overlap.exam=nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_a_bad_call_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call(["hygiene", *arguments, "--set", "workers=1"]) in (1, 2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
    assert not Path("h.parquet").exists()
