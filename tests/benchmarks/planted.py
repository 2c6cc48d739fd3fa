"""Synthetic documents with planted duplicates, test questions, personal data, languages and boilerplate, and their truth."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SENTENCES = {
    "de": "Der Zug nach Hamburg fährt heute wegen eines Sturmes erst am späten Abend, sagte die Sprecherin der Bahn.",
    "fr": "Le marché du village ouvre chaque samedi matin et les habitants y achètent du pain, du fromage et des fleurs.",
    "es": "Los niños juegan en la plaza mientras sus abuelos hablan tranquilamente de la cosecha de este año.",
    "ru": "Вечером дети вернулись домой и долго рассказывали бабушке о том, что видели в лесу у реки.",
    "zh": "昨天晚上我们一起去了城里的图书馆，借了几本关于历史和音乐的书。",
}
_COMMON = (
    "the of and to in that was with his from they this have which been were their would there about could other into more "
    "some time people water house year place work great little world never under night after small found every "
    "country"
)
COMMON = tuple(_COMMON.split())

# Addresses and what looks like one: a text, and kind and characters of the address in it, or None where it is nobody's.
ADDRESSES: tuple[tuple[str, tuple[str, str] | None], ...] = (
    ("Write to Ana.Lopez+news@Firma-Nord.org, please.", ("email", "Ana.Lopez+news@Firma-Nord.org")),
    ("Schreib an jürgen@firma.org!", ("email", "jürgen@firma.org")),
    ("邮箱zhang@firma.org联系", ("email", "zhang@firma.org")),
    ("Send it to name@example.com for instance.", None),  # RFC 2606
    ("See user@host in the manual, and @name in the chat.", None),
    ("The resolver 8.8.4.4:53 answers.", ("ip", "8.8.4.4")),
    ("Ping 2001:4860:4860::8888 once.", ("ip", "2001:4860:4860::8888")),
    ("The router has 192.168.0.1.", None),
    ("Release 1.8.12.4.2 is out.", None),
    ("Section 8.1.2.345 follows.", None),
    ("Build 8.1.2.3b of the driver.", None),
)


@dataclass
class Truth:
    """What was planted, by id.

    Attributes:
        exact: copies that say the same, and the id of what they copy. near: those with some words changed.
        overlap: documents with a test question, and its id.
        personal: characters of each planted span, by kind: id -> [(kind, text)].
        language: documents in other languages than English, and their code.
        repeated: documents that repeat a few words or lines.
    """

    exact: dict[str, str] = field(default_factory=dict)
    near: dict[str, str] = field(default_factory=dict)
    overlap: dict[str, str] = field(default_factory=dict)
    personal: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    language: dict[str, str] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)


class Planted:
    """A generator of documents: half of them plain, a tenth each of exact and near copies, and so on.

    Args:
        words: words of a document, on average.
    """

    def __init__(self, seed: int = 0, words: int = 300) -> None:
        self._rng, self._words = random.Random(seed), words
        letters = "aaeeiioouutttnnnsssrrrlllddhhccmmpgfbvwyk"
        self._rare = ["".join(self._rng.choices(letters, k=self._rng.randint(4, 10))) for _ in range(20_000)]
        self.truth = Truth()
        self.items = [
            {"id": f"q{number}", "question": self.prose(24, 12), "answer": self._rng.choice(self._rare)}
            for number in range(100)
        ]

    def prose(self, count: int, line: int = 14) -> str:
        """Sentences of `line` words, four to a paragraph."""
        words = [self._rng.choice(COMMON if self._rng.random() < 0.5 else self._rare) for _ in range(count)]
        sentences = [" ".join(words[a : a + line]).capitalize() + "." for a in range(0, count, line)]
        return "\n\n".join("\n".join(sentences[a : a + 4]) for a in range(0, len(sentences), 4))

    def documents(self, count: int) -> Iterator[dict[str, Any]]:
        """`count` documents with id, domain and text; `truth` says what was planted in those that were taken."""
        rng, recent = self._rng, list[tuple[str, str]]()
        for number in range(count):
            name, draw = f"doc-{number:08d}", rng.random()
            text = self.prose(rng.randint(self._words // 2, self._words * 3 // 2))
            if draw < 0.1 and recent:
                original, old = rng.choice(recent)
                self.truth.exact[name] = original
                text = rng.choice([old, old.upper(), "  " + old.replace(" ", "  ", 3)])
            elif draw < 0.2 and recent:
                original, old = rng.choice(recent)
                self.truth.near[name] = original
                text = self._changed(old)
            elif draw < 0.23:
                item = rng.choice(self.items)
                self.truth.overlap[name] = item["id"]
                text = f"{text}\n{item['question']}\n{self.prose(40)}"
            elif draw < 0.28:
                planted = self._personal()
                self.truth.personal[name] = planted
                text = "\n".join([text, *(f"Kontakt {value} bitte." for _, value in planted)])
            elif draw < 0.32:
                code = rng.choice(list(SENTENCES))
                self.truth.language[name] = code
                parts = list(SENTENCES[code]) if code == "zh" else SENTENCES[code].split()
                text = ("" if code == "zh" else " ").join(rng.choices(parts, k=60))
            elif draw < 0.36:
                self.truth.repeated.add(name)
                text = "\n".join([" ".join(rng.choices(self._rare, k=6))] * 40)
            elif len(text.split()) > 60:
                recent = [*recent[-999:], (name, text)]
            yield {"id": name, "domain": "web", "text": text}

    def _changed(self, text: str) -> str:
        """The text with a word of every sixty replaced: the Jaccard similarity of runs of 5 words is 0.84 or more."""
        words = text.split(" ")
        places = self._rng.sample(range(len(words)), max(1, len(words) // 60))
        for place in places:
            words[place] = "changed"
        return " ".join(words)

    def _personal(self) -> list[tuple[str, str]]:
        rng = self._rng
        digits = "".join(rng.choices("0123456789", k=14))
        card = "4" + digits
        card += str(-sum(_doubled(card + "0")) % 10)
        account = "".join(rng.choices("0123456789", k=18))
        check = 98 - int(account + "131400") % 97
        every = [
            ("email", f"{rng.choice(self._rare)}.{rng.choice(self._rare)}@{rng.choice(self._rare)}.org"),
            ("card", " ".join(card[a : a + 4] for a in range(0, 16, 4))),
            ("iban", f"DE{check:02d}{account}"),
            ("phone", f"+49 30 {rng.randint(2_000_000, 9_999_999)}"),
            ("ip", f"8.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}"),
            ("secret", "ghp_" + "".join(rng.choices("abcdefghijkmnpqrstuvwyzABCDEFGHJKLMNPQRSTUVWYZ23456789", k=36))),
        ]
        return rng.sample(every, rng.randint(1, 3))


def _doubled(digits: str) -> list[int]:
    """The summands of Luhn's sum."""
    numbers = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return [number - 9 * (number > 9) for number in numbers]


def pairs_of_every_similarity(count: int, words: int) -> tuple[list[dict[str, str]], dict[tuple[str, str], float]]:
    """Pairs of documents, the second with some words of the first replaced.

    Returns:
        The documents, and for each pair of ids the Jaccard similarity of their runs of 5 words.
    """
    source, rng = Planted(seed=1, words=words), random.Random(1)
    rows, similarity = list[dict[str, str]](), dict[tuple[str, str], float]()
    for number in range(count):
        first = source.prose(words)
        second = first.split(" ")
        for place in rng.sample(range(len(second)), round(rng.random() * len(second) / 10)):
            second[place] = "changed"
        names = (f"{number:06d}-a", f"{number:06d}-b")
        texts = (first, " ".join(second))
        rows += [{"id": name, "domain": "web", "text": text} for name, text in zip(names, texts, strict=True)]
        own, other = (set(zip(*(one.lower().split()[a:] for a in range(5)), strict=False)) for one in texts)
        similarity[names] = len(own & other) / len(own | other)
    return rows, similarity


@dataclass(frozen=True)
class Score:
    """How many were planted and found, and what of the found was planted."""

    planted: int
    found: int
    both: int

    @property
    def precision(self) -> float:
        """Share of what was found that was planted; 1 where nothing was found."""
        return self.both / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Share of what was planted that was found; 1 where nothing was planted."""
        return self.both / self.planted if self.planted else 1.0


def scored(planted: set[Any], found: set[Any]) -> Score:
    """Compare what was planted with what was found."""
    return Score(len(planted), len(found), len(planted & found))


def scores(truth: Truth, rows: list[dict[str, Any]], texts: dict[str, str]) -> dict[str, Score]:
    """Precision and recall of each check.

    Args:
        rows: of the file that `kdata hygiene` wrote, with an evaluation set named `exam`.
        texts: of the documents, for the spans.
    """
    spans = {
        (row["id"], span["kind"], texts[row["id"]][span["start"] : span["end"]])
        for row in rows
        for span in row["personal"]["spans"]
    }
    exact = {row["id"] for row in rows if row["duplicates"]["exact_rows"] > 1}
    originals = set(truth.exact.values())
    overlapping = {(r["id"], r["overlap"]["exam_item"]) for r in rows if r["overlap"]["exam_share"]}
    return {
        "exact duplicates": scored(set(truth.exact) | originals, exact),
        **near_scores(truth, {row["id"]: row["duplicates"]["near_id"] for row in rows}),
        "overlap": scored(set(truth.overlap.items()), overlapping),
        "documents of overlap": scored(set(truth.overlap), {name for name, _ in overlapping}),
        "personal data": scored({(name, *one) for name, own in truth.personal.items() for one in own}, spans),
        **address_scores(truth, spans),
        "language": scored(
            set(truth.language.items()), {(r["id"], r["language"]["code"]) for r in rows if r["id"] in truth.language}
        ),
        "repetition": scored(truth.repeated, {r["id"] for r in rows if r["quality"]["repeated_line_chars"] > 0.2}),
    }


def near_scores(truth: Truth, member: dict[str, str]) -> dict[str, Score]:
    """Precision and recall of groups of near duplicates: which documents are in one of several, and in which.

    Args:
        member: of each document one of its group, the same for the whole group; itself where it is alone.
    """
    root = {**truth.exact, **truth.near}
    group = {name: root.get(name, name) for name in member}
    planted, found = Counter(group.values()), Counter(member.values())
    # Of several groups with copies of one document the largest is that document's; the others are apart from it.
    largest = {root.get(one, one): one for one in sorted(found, key=lambda one: (found[one], one))}
    own = {one: root.get(one, one) if largest[root.get(one, one)] == one else f"apart: {one}" for one in found}
    return {
        "near duplicates": scored(
            {name for name in member if planted[group[name]] > 1}, {name for name in member if found[member[name]] > 1}
        ),
        "groups": scored(set(group.items()), {(name, own[one]) for name, one in member.items()}),
    }


def addresses_told_apart(found: list[list[tuple[str, str]]]) -> tuple[int, int, list[str]]:
    """Of ADDRESSES, how many addresses were taken, how many look-alikes were left, and the texts with another verdict.

    Args:
        found: kind and characters of what was found in each text.
    """
    right = [set(own) == ({wanted} if wanted else set()) for (_, wanted), own in zip(ADDRESSES, found, strict=True)]
    of_kind = [(one, wanted is not None) for one, (_, wanted) in zip(right, ADDRESSES, strict=True)]
    wrong = [text for one, (text, _) in zip(right, ADDRESSES, strict=True) if not one]
    return of_kind.count((True, True)), of_kind.count((True, False)), wrong


def address_scores(truth: Truth, spans: set[tuple[str, str, str]]) -> dict[str, Score]:
    """Precision and recall of the kinds of personal data that datatrove replaces; spans are (id, kind, characters)."""
    planted = {(name, *one) for name, own in truth.personal.items() for one in own}
    return {
        f"personal data: {kind}": scored(*({one for one in every if one[1] == kind} for every in (planted, spans)))
        for kind in ("email", "ip")
    }


def peer_scores(truth: Truth, ids: list[str], finds: dict[str, Any]) -> dict[str, Score]:
    """The same of what datatrove finds, see `tests.benchmarks.peer_finds.found`; of duplicates for each layout of bands."""
    result = {}
    for layout, clusters in finds["near"].items():
        first: dict[int, str] = {}
        for name in sorted(clusters):
            first.setdefault(clusters[name], name)
        near = near_scores(truth, {name: first[clusters[name]] if name in clusters else name for name in ids})
        result.update({f"{what}, {layout}": score for what, score in near.items()})
    if "language" in finds:
        codes = {(name, finds["language"][name]) for name in truth.language}
        result["language"] = scored(set(truth.language.items()), codes)
    for what, names in finds.get("overlap", {}).items():
        result[f"documents of overlap: {what}"] = scored(set(truth.overlap), set(names))
    spans = {(name, *one) for name, own in finds["personal"].items() for one in own}
    result.update(address_scores(truth, spans))
    result["repetition"] = scored(truth.repeated, set(finds["lines"]))
    return result
