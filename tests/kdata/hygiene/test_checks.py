"""Each check on single texts, against values worked out by hand or a plain form of the same rule; and hostile texts."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdata.config import parse_config
from kdata.errors import ConfigError, DataError, MissingError
from kdata.hygiene.checks import CHECKS, HygieneConfig, check_texts
from kdata.hygiene.language import language_of
from kdata.hygiene.overlap import EvaluationSet, open_set, overlap_of
from kdata.hygiene.personal import personal_of
from kdata.hygiene.quality import COLUMNS, quality_of
from kdata.hygiene.words import hashed, ngrams, normal_form, repeated, words_of
from tests.fakes import write_jsonl


def words(text: str) -> list[str]:
    return words_of(normal_form(text))


# ------------------------------------------------------------------------------------------------------------ words


def test_a_normal_form_ignores_case_width_and_white_space() -> None:
    assert normal_form("so\u00adft \u200bzero\u2060-width\ufeff \u202eturned\u202c") == "soft zero-width turned"
    assert normal_form("cafe\u200d\u0301") == "caf\u00e9" and normal_form("\u1112\u200b\u1161") == "\ud558"
    assert words_of(normal_form("new\u00adspaper \u200b \ufe0f")) == ["newspaper"]
    assert normal_form("\u0390") == normal_form("\u0399\u0308\u0301")  # which folds into three characters
    assert normal_form("  Ｓtraße\u00a0\n\tÉCOLE ") == normal_form("STRASSE e\u0301cole") == "strasse école"


def test_where_a_script_has_no_spaces_each_character_is_a_word() -> None:
    assert words("Das (erste) Wort, 日本語です. x_1") == ["das", "erste", "wort", *"日本語です", "x_1"]
    assert words("စာ။ ทั่ว・") == ["စာ", "ทั่", "ว"]  # with its marks; punctuation is none


@pytest.mark.parametrize("word", ["हिन्दी", "தமிழ்", "مُحَمَّد", "שָׁלוֹם", "q\u0307x", "\U00011013\U00011038\U00011013"])
def test_a_word_holds_its_vowel_signs_and_accents(word: str) -> None:
    assert words(f"{word}, {word}।") == [normal_form(word)] * 2


@given(st.lists(st.text(st.characters(whitelist_categories=("L", "Nd")), min_size=1), max_size=30), st.integers(1, 8))
def test_runs_have_equal_hashes_where_they_are_equal(some: list[str], n: int) -> None:
    hashes_W, chars_W = hashed(some)
    assert chars_W.tolist() == [len(word) for word in some]
    runs = [tuple(some[a : a + n]) for a in range(max(1, len(some) - n + 1))] if some else []
    own = ngrams(hashes_W, n)
    assert len(own) == len(runs)
    for a, run in enumerate(runs):
        assert [bool(equal) for equal in own == own[a]] == [other == run for other in runs]


def plain_repeated(some: list[str]) -> list[int]:
    """What datatrove computes, in plain Python; the most frequent run counts where it occurs twice."""
    result = []
    for n in range(2, 11):
        runs = ["\n".join(some[a : a + n]) for a in range(len(some) - n + 1)]
        if n < 5:
            counts = Counter(runs)
            most = max(counts.values(), default=0)
            lengths = [len(run.replace("\n", "")) * most for run, count in counts.items() if count == most]
            result.append(max(lengths) if most > 1 else 0)
            continue
        seen, chars, place = set[str](), 0, 0
        while place < len(runs):
            if runs[place] in seen:
                chars, place = chars + len(runs[place].replace("\n", "")), place + n
            else:
                seen.add(runs[place])
                place += 1
        result.append(chars)
    return result


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "é"]), max_size=60))
def test_repeated_runs_are_counted_as_datatrove_counts_them(some: list[str]) -> None:
    assert repeated(*hashed(some)).tolist() == plain_repeated(some)


# ---------------------------------------------------------------------------------------------------------- quality


def quality(text: str) -> dict[str, object]:
    signals = quality_of(text, *hashed(words(text)))
    assert set(signals) == set(COLUMNS)
    return signals


def test_signals_of_a_small_text() -> None:
    signals = quality("The cat sat.\n\n- and the dog...\n\nThe cat sat.\n#1 2 Ü\ufffd")
    assert {key: signals[key] for key in ("chars", "words", "lines", "stop_words")} == {
        "chars": 52, "words": 12, "lines": 4, "stop_words": 2,
    }  # fmt: skip
    assert signals["alpha_words"] == pytest.approx(10 / 12)
    assert signals["bullet_lines"] == signals["ellipsis_lines"] == 0.25
    assert signals["terminal_lines"] == 0.75
    assert signals["repeated_lines"] == 0.25
    assert signals["repeated_line_chars"] == pytest.approx(12 / 52)
    assert signals["digits"] == pytest.approx(2 / 52)
    assert signals["broken"] == pytest.approx(1 / 52)
    assert signals["symbols_per_word"] == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    ("text", "column", "rule"),
    [
        ("word " * 20, "gopher", "words"),
        ("the cat of that house was with the dog " * 30, "gopher", "repeated_10grams"),
        ("xylograph quixotic zephyr " * 30, "gopher", "stop_words"),
        ("- a\n- b\n- c", "gopher", "bullet_lines"),
        ("function() { return 1; }", "c4", "curly_bracket"),
        ("We use cookies. Read our Privacy Policy.", "c4", "policy"),
        ("Lorem ipsum dolor", "c4", "lorem_ipsum"),
        ("Home\nShop\nAbout us\nContact", "fineweb", "short_lines"),
        ("Home\nShop\nAbout us\nContact", "fineweb", "terminal_lines"),
    ],
)
def test_a_text_fails_the_rule_that_it_breaks(text: str, column: str, rule: str) -> None:
    assert rule in str(quality(text)[column]).split(", ")


def test_a_good_text_fails_no_rule() -> None:
    rng = random.Random(0)
    some = [f"{''.join(rng.choices('abcdefghij', k=6))}" for _ in range(300)]
    text = "\n".join(f"The {' '.join(some[a : a + 12])} of that." for a in range(0, 300, 12))
    signals = quality(text)
    assert (signals["gopher"], signals["c4"], signals["fineweb"]) == ("", "", "")


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_a_text_is_as_good_whatever_ends_its_lines(end: str) -> None:
    text = "\n\n".join(["The first paragraph of that house.\nIt is to be with you."] * 8)
    assert quality(text.replace("\n", end)) == {**quality(text), "chars": len(text.replace("\n", end))}


def test_mojibake_is_broken_and_umlauts_are_not() -> None:
    assert quality("Übergröße")["broken"] == 0
    assert quality("Übergröße".encode().decode("cp1252"))["broken"] > 0.3  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------------- personal data


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Write to jane.o-roe+x@mail.acme-corp.co.uk, please.", [("email", "jane.o-roe+x@mail.acme-corp.co.uk")]),
        ("a@b, a@b..c, @name, user@example.com, me@x.test", []),
        ("IBAN DE89 3704 0044 0532 0130 00 OK", [("iban", "DE89 3704 0044 0532 0130 00")]),
        ("GB82WEST12345698765432, DE89370400440532013001", [("iban", "GB82WEST12345698765432")]),
        (
            "Card 4111-1111-1111-1111 and 378282246310005.",
            [("card", "4111-1111-1111-1111"), ("card", "378282246310005")],
        ),
        ("4111 1111 1111 1112, 0000000000000000, ISBN 9783161484100", []),
        ("From 8.8.8.8, not 192.168.1.1, 127.0.0.1, 1.2.3 or 8.8.8.8.8", [("ip", "8.8.8.8")]),
        ("At 12:30:45 host 2001:4860:4860::8888 said fe80::1", [("ip", "2001:4860:4860::8888")]),
        (
            "Call +1 (650) 253-0000 or 0049 30 901820 today",
            [("phone", "+1 (650) 253-0000"), ("phone", "0049 30 901820")],
        ),
        ("Call 030 901820 or 2024-05-06, +999 1234567", []),
        ("key ghp_" + "aB3dE5fG7h" * 4, [("secret", "ghp_" + "aB3dE5fG7h" * 4)]),
        ("key ghp_" + "x" * 40, []),
        ("card 4111 1111 1111 1111 12/27", [("card", "4111 1111 1111 1111")]),
        ("4111111111111111 5500000000000004", [("card", "4111111111111111"), ("card", "5500000000000004")]),
        (
            "no. 12 4111 1111 1111 1111 and 3782 822463 10005 9",
            [("card", "4111 1111 1111 1111"), ("card", "3782 822463 10005")],
        ),
        ("41111 11111 111111", [("card", "41111 11111 111111")]),
        ("serial 12-4111-1111-1111-1111 or 4111-1111-1111-1111-5", []),
        ("+1 650-253-0000 2024", [("phone", "+1 650-253-0000")]),
        ("+49 30 901820 17 Uhr, 0049 30 901820 9 Uhr", [("phone", "+49 30 901820"), ("phone", "0049 30 901820")]),
        (
            "+33 1 42 68 53 00 (+1 650-253-0000 0049 30 901820)",
            [("phone", "+33 1 42 68 53 00"), ("phone", "+1 650-253-0000"), ("phone", "0049 30 901820")],
        ),
        (
            "8.8.8.8:53, ip:8.8.4.4 and [2001:4860:4860::8888]:443",
            [("ip", "8.8.8.8"), ("ip", "8.8.4.4"), ("ip", "2001:4860:4860::8888")],
        ),
        (
            "::ffff:8.8.8.8 ip:2001:4860:4860::8888: ::ffff:192.168.1.1",
            [("ip", "::ffff:8.8.8.8"), ("ip", "2001:4860:4860::8888")],
        ),
        # Between words that no space parts, and before particles; with spaces and hyphens that do not break; in other digits.
        (
            "电话+8613800138000谢谢 号码4111111111111111です ที่8.8.8.8ครับ 계좌DE89370400440532013000로",
            [
                ("phone", "+8613800138000"),
                ("card", "4111111111111111"),
                ("ip", "8.8.8.8"),
                ("iban", "DE89370400440532013000"),
            ],
        ),
        ("é8.8.8.8, 4111111111111111ж", []),
        (
            "DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000; 4111\u202f1111\u202f1111\u202f1111; "
            "+49\u201130\u2011901820",
            [
                ("iban", "DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000"),
                ("card", "4111\u202f1111\u202f1111\u202f1111"),
                ("phone", "+49\u201130\u2011901820"),
            ],
        ),
        ("＋４９ ３０ ９０１８２０", [("phone", "＋４９ ３０ ９０１８２０")]),
        ("+٩٦٦ ٥٠ ١٢٣ ٤٥٦٧", [("phone", "+٩٦٦ ٥٠ ١٢٣ ٤٥٦٧")]),
        # A dash is a hyphen in a number, and parts words.
        (
            "+49 30\u2013901820 Contact\u2013jane@acme.org\u2013or joe\u2010roe@acme.org; AKIAIOSFODNN7QXAMPLZ\u2013x",
            [
                ("phone", "+49 30\u2013901820"),
                ("email", "jane@acme.org"),
                ("email", "joe\u2010roe@acme.org"),
                ("secret", "AKIAIOSFODNN7QXAMPLZ"),
            ],
        ),
        ("ที่jane@acme.org, पताjoe@acme.org", [("email", "jane@acme.org"), ("email", "joe@acme.org")]),
        ("dead::beef, a::b, 239.255.255.250", []),
        (
            "YE15CBYE0001018861234567891234, HN88CABF00000000000250005469",
            [("iban", "YE15CBYE0001018861234567891234"), ("iban", "HN88CABF00000000000250005469")],
        ),
        ("jürgen.müller@gmail.com", [("email", "jürgen.müller@gmail.com")]),
        (
            "“jane@acme.org” — メールはjoe@acme.orgです。ивáн@почта.рф",
            [("email", "jane@acme.org"), ("email", "joe@acme.org")],
        ),
        (
            "DE89370400440532013000 GB82WEST12345698765432",
            [("iban", "DE89370400440532013000"), ("iban", "GB82WEST12345698765432")],
        ),
        (
            "XX12 DE89 3704 0044 0532 0130 00 GB82 WEST 1234 5698 7654 32",
            [("iban", "DE89 3704 0044 0532 0130 00"), ("iban", "GB82 WEST 1234 5698 7654 32")],
        ),
    ],
)
def test_personal_data_is_found_where_it_is(text: str, found: list[tuple[str, str]]) -> None:
    spans = personal_of(text)
    assert [(span.kind, text[span.start : span.end]) for span in spans] == found


def test_each_of_many_numbers_in_one_text_is_found() -> None:
    for one, count in (("4111111111111111", 3_000), ("DE89370400440532013000", 3_000), ("+49 30 901820", 300)):
        assert len(personal_of(f"{one} " * count)) == count


def test_numbers_of_a_region_need_no_country_code() -> None:
    assert [span.kind for span in personal_of("Ruf 030 901820 an", "DE")] == ["phone"]
    assert personal_of("Ruf 030 901820 an") == []
    assert [span[1:] for span in personal_of("030 901820 17 Uhr", "DE")] == [(0, 10)]
    two = personal_of("(650) 253-0000 (650) 253-0001 2024", "US")
    assert [span[1:] for span in two] == [(0, 14), (15, 29)]


@pytest.mark.parametrize(
    ("region", "text", "found"),
    [
        ("DE", "2019 2020 2021 2022 2023 2024 2025", []),
        ("DE", "1234 5678 9012 3456 7890 1234 5678 9012", []),
        ("DE", "7 06131 90 18 20 3 4 5 6 7 8 9 1 2 3", []),
        ("DE", "030 901820 040 123456", ["030 901820", "040 123456"]),
        ("US", "212-736-5000 10 20 30 40 50 60 70 80 90 11 12", ["212-736-5000"]),
        ("US", "212 7365 000 10 20 30 40 50 60 70 80 90 11 12", []),
        ("US", "212 7365 000", ["212 7365 000"]),
    ],
)
def test_in_a_row_of_numbers_a_number_of_a_region_has_its_country_s_groups(
    region: str, text: str, found: list[str]
) -> None:
    assert [text[span.start : span.end] for span in personal_of(text, region)] == found


@given(st.text(st.sampled_from("a1@.:+- (DEé/\x00\n47"), max_size=80))
def test_spans_are_in_order_and_do_not_overlap(text: str) -> None:
    spans = personal_of(text, "US")
    places = [place for span in spans for place in (span.start, span.end)]
    assert places == sorted(places)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)


# ---------------------------------------------------------------------------------------------------------- overlap


def found(text: str, evaluation: EvaluationSet) -> dict[str, object]:
    own = words(text)
    values = overlap_of(own, hashed(own)[0], evaluation)
    return {key.removeprefix("exam_"): value for key, value in values.items()}


def test_overlap_is_counted_in_runs_of_words(tmp_path: Path) -> None:
    items = [
        {"id": "one", "question": "a b c d e f", "choices": ["x", "p q r s"]},
        {"question": {"text": "b c d e z"}, "id": None},
        {"id": "short", "question": "a b"},
    ]
    evaluation = open_set("exam", write_jsonl(tmp_path / "exam.jsonl", items), 3)
    assert (evaluation.n, evaluation.num_skipped) == (3, 1)
    # abc, bcd and pqr of ten runs; abc, bcd, cde, def, pqr and qrs are the first item's.
    values = found("A, b c. D! 1 2 3 4 p q r 5", evaluation)
    assert values == {"share": pytest.approx(3 / 10), "item": "one", "item_share": 0.5, "shown": "a b c"}
    values = found("c d e z", evaluation)
    assert values == {"share": 1.0, "item": "row 1", "item_share": pytest.approx(2 / 3), "shown": "c d e"}
    nothing = {"share": 0.0, "item": None, "item_share": 0.0, "shown": None}
    assert found("f x p q", evaluation) == found("a b", evaluation) == found("", evaluation) == nothing


def test_a_run_is_as_long_as_short_items_allow(tmp_path: Path) -> None:
    for length, n in ((5, None), (8, 8), (10, 10), (40, 13)):
        file = write_jsonl(tmp_path / "exam.jsonl", [{"q": " ".join(map(str, range(length)))}] * 3)
        if n is None:
            with pytest.raises(DataError, match=r"no row .* has a text of 8 words"):
                open_set("exam", file)
        else:
            assert open_set("exam", file).n == n


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlap": {"a-b": "x.jsonl"}}, "no name of an evaluation set"),
        ({"overlap": {"a": "x.jsonl", "A": "y.jsonl"}}, "differ in case"),
        ({"checks": ["overlap"]}, "needs a set"),
        ({"checks": ["quality", "quality"]}, "twice"),
        ({"checks": ["qualty"]}, "quality"),
        ({"jaccard": 1.5}, "less than or equal to 1"),
        ({"phone_region": "Germany"}, "phone_region"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(HygieneConfig, values, "hygiene settings")


def test_a_set_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"nowhere\.jsonl"):
        HygieneConfig(overlap={"exam": str(tmp_path / "nowhere.jsonl")}).settings("overlap")


# ------------------------------------------------------------------------------------------------- language, hostile


def test_a_text_without_letters_has_no_language() -> None:
    assert language_of("") == language_of("123 456 !!") == language_of("abc") == (None, None)
    code, confidence = language_of("Вечером дети вернулись домой и долго рассказывали бабушке о том, что видели.")
    assert code == "ru" and confidence is not None and confidence > 0.9


LONG = 1_000_000  # characters
HOSTILE = {
    "letters": "a" * LONG,
    "at signs": "a@" * (LONG // 2),
    "dots": "a." * (LONG // 2),
    "digits": "1 " * (LONG // 2),
    "colons": ":" * LONG,
    "plus": "+1-" * (LONG // 3),
    "groups": "DE12 " * (LONG // 5),
    "lines": "\n" * LONG,
    "nul": "\x00" * LONG,
    "marks": "e\u0301" * (LONG // 2),
    "wide": "日" * LONG,
    "key": "-----BEGIN PRIVATE KEY-----" * (LONG // 27),
    "spaces": " " * LONG,
    "mails": "a.b@c.de " * (LONG // 9),
    "cards": "4111111111111111 " * 300_000,
    "no card": "4111 " * (LONG // 5),
    "fours": "4 " * (LONG // 2),
    "ibans": "DE89370400440532013000 " * (LONG // 23),
    "phones": "+49 30 901820 17 " * (LONG // 170),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_long_texts_take_no_more_than_they_are_long(name: str) -> None:
    """A pattern that tries every way would not end here."""
    checked = check_texts([HOSTILE[name], None], HygieneConfig(checks=[c for c in CHECKS if c != "overlap"]))
    for column in checked.columns.values():
        assert column.to_pylist()[1] is None
    assert checked.chars == [len(HOSTILE[name]), None]


def test_spans_of_one_text_are_bounded_and_their_number_is_not() -> None:
    [values] = check_texts(["a.b@c.de " * 5_000], HygieneConfig(checks=["personal"])).columns["personal"].to_pylist()
    assert (values["total"], values["email"], len(values["spans"])) == (5_000, 5_000, 1_000)


@given(st.lists(st.text(max_size=60), max_size=4))
def test_any_text_has_values(texts: list[str]) -> None:
    texts = [text.encode(errors="replace").decode() for text in texts]
    checked = check_texts(texts, HygieneConfig())
    assert [len(column) for column in checked.columns.values()] == [len(texts)] * 3
    assert len(checked.sketches) == len(texts)
    assert all(np.isfinite(row["compressed"] or 0) for row in checked.columns["quality"].to_pylist())
