"""A raw corpus with a known answer: clean text, and beside it what a crawl brings along, at most 60 % of it good.

The clean documents are those of another corpus. The rest is made from them, from the teacher, and from files that installed
packages carry (message catalogs in other languages, licences, C++ headers, tables of fonts), so nothing is downloaded. Files
differ between machines; `counts` and the digest in raw.json say what was used.

A method sees id, domain and text: ids are digests, documents stand in their order, and what is not made of a document of some
domain gets a domain at random, as if it had been crawled with it. The judge's file beside the corpus has the origin of every
document. Of a document and its duplicates one copy is good, whichever is kept.
"""

from __future__ import annotations

import gettext
import hashlib
import json
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from kdata.errors import DataError
from kdata.store.checkpoint_kind import refuse_kernels_of
from kdata.store.gguf import model_folder
from kdata.store.pretrained import without_bars
from kdata.teachers.model import load_tokenizer

GOOD = "clean"
# Share of the tokens of each origin. They sum to 1, and duplicates are not good, so 55 % is.
SHARES: Mapping[str, float] = {
    GOOD: 0.55, "exact duplicate": 0.06, "near duplicate": 0.06, "boilerplate": 0.05, "lists and tables": 0.05,
    "shuffled words": 0.04, "repeated n-grams": 0.03, "other languages": 0.05, "broken encoding": 0.03,
    "teacher's own": 0.03, "code dump": 0.03, "benchmark": 0.02,
}  # fmt: skip
DUPLICATES = ("exact duplicate", "near duplicate")
MAX_CHARACTERS = 20_000  # longer clean documents are left out: a single one would be a tenth of the corpus
LENGTH = (600, 1800)  # characters of a document that is not made of another one: the lengths of most clean ones
PROMPT_TOKENS = 12  # of a document; the teacher writes on from there
BATCH = 32  # texts that the teacher writes together


class Document(NamedTuple):
    """A document; `of` is the id of the clean document that it is a copy of, and None of any other."""

    id: str
    domain: str
    text: str
    of: str | None = None


@dataclass(frozen=True)
class Material:
    """What texts are made of.

    clean: good documents of the corpus. spare: others of the same kind, not in the corpus. benchmark: the leaked part of the
    held-out text. write: the teacher, greedily, from the beginnings of texts.
    """

    clean: list[Document]
    spare: list[Document]
    benchmark: list[Document]
    write: Callable[[list[str]], list[str]]


def write_raw(
    clean: Path,
    benchmark: Path,
    teacher: str,
    tokens: int,
    folder: Path,
    *,
    context_tokens: int = 256,
    bos: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Mapping[str, int]:
    """Write folder/train.parquet (id, domain, text), origins.parquet (id, origin, of) and raw.json (what it was made of).

    Args:
        clean, benchmark: Parquet files with id, domain and text, of different documents.
        teacher: folder of the model that writes and whose tokenizer counts.
        tokens: in all.
        bos, dtype: see `TeacherConfig`; how the teacher writes.
    Returns:
        Tokens of each origin.
    Raises:
        DataError: a source has too little text for its share.
    """
    tokenizer = load_tokenizer(teacher)
    rng = random.Random(0)
    documents = [d for d in _read(clean) if len(d.text) <= MAX_CHARACTERS]
    good, spare = _first_tokens(documents, tokens * SHARES[GOOD], tokenizer)
    writer = _Writer(teacher, load_tokenizer(teacher, bos=bos), context_tokens, dtype)
    material = Material(good, spare, _read(benchmark), writer.write)
    domains = [d.domain for d in good]
    rows: list[tuple[str, Document]] = [(GOOD, d) for d in good]
    for origin, make in MAKERS.items():
        wanted, held = tokens * SHARES[origin], 0
        for made in make(material, random.Random(origin)):
            rows.append((origin, made if made.domain else made._replace(domain=rng.choice(domains))))
            held += len(tokenizer(made.text)["input_ids"])
            if held >= wanted:
                break
        else:
            raise DataError(f"{origin}: {held} tokens of text and {wanted:.0f} are needed; set fewer train_tokens")
    return _save(rows, tokenizer, folder)


def _save(rows: list[tuple[str, Document]], tokenizer: PreTrainedTokenizerBase, folder: Path) -> Mapping[str, int]:
    ids = [hashlib.sha256(f"{n}:{d.text}".encode()).hexdigest()[:16] for n, (_, d) in enumerate(rows)]
    new_id = {d.id: own for own, (origin, d) in zip(ids, rows, strict=True) if origin == GOOD}
    frame = pl.DataFrame(
        {
            "id": ids,
            "domain": [d.domain for _, d in rows],
            "text": [d.text for _, d in rows],
            "origin": [origin for origin, _ in rows],
            "of": [
                own if origin == GOOD else new_id.get(d.of or "") for own, (origin, d) in zip(ids, rows, strict=True)
            ],
            "tokens": [len(tokenizer(d.text)["input_ids"]) for _, d in rows],
        }
    ).sort("id")
    folder.mkdir(parents=True, exist_ok=True)
    frame.select("id", "domain", "text").write_parquet(folder / "train.parquet")
    frame.select("id", "origin", "of").write_parquet(folder / "origins.parquet")
    counts = dict(frame.group_by("origin").agg(pl.sum("tokens")).sort("origin").iter_rows())
    digest = hashlib.sha256("\0".join(frame["text"]).encode()).hexdigest()
    (folder / "raw.json").write_text(json.dumps({"tokens": counts, "sha256": digest}, indent=1), encoding="utf-8")
    return counts


def _read(file: Path) -> list[Document]:
    frame = pl.read_parquet(file, columns=["id", "domain", "text"])
    return [Document(*row) for row in frame.iter_rows()]


def _first_tokens(
    documents: list[Document], tokens: float, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Document], list[Document]]:
    """The first documents that together have at least `tokens` tokens, and the rest. Of equal texts, the first alone."""
    unique = list({d.text: d for d in reversed(documents)}.values())[::-1]
    total = 0
    for number, document in enumerate(unique):
        total += len(tokenizer(document.text)["input_ids"])
        if total >= tokens:
            return unique[: number + 1], unique[number + 1 :]
    raise DataError(f"clean: {total} tokens of text and {tokens:.0f} are needed; set fewer train_tokens")


class _Writer:
    """The teacher, writing greedily."""

    def __init__(
        self, teacher: str, tokenizer: PreTrainedTokenizerBase, context_tokens: int, dtype: torch.dtype
    ) -> None:
        self._teacher, self._tokenizer, self._dtype = teacher, tokenizer, dtype
        self._tokens = context_tokens - PROMPT_TOKENS - 2

    @cached_property
    def _model(self) -> Any:
        with without_bars():
            refuse_kernels_of(folder := model_folder(self._teacher))
            return AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype).eval()

    @torch.inference_mode()
    def write(self, texts: list[str]) -> list[str]:
        """What follows the first PROMPT_TOKENS tokens of each text; texts that have fewer are left out."""
        ids = [self._tokenizer(text)["input_ids"][:PROMPT_TOKENS] for text in texts]
        prompts = torch.tensor([row for row in ids if len(row) == PROMPT_TOKENS])
        whole = self._model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=self._tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return [str(self._tokenizer.decode(row, skip_special_tokens=True)) for row in whole]


# ------------------------------------------------------------------------------------------------- what is not good


def _exact(material: Material, rng: random.Random) -> Iterator[Document]:
    """Copies of good documents: up to four of one."""
    for document in rng.sample(material.clean, len(material.clean)):
        for _ in range(rng.randint(1, 4)):
            yield document._replace(of=document.id)


def _near(material: Material, rng: random.Random) -> Iterator[Document]:
    """Copies of good documents with a few words dropped, doubled or in capitals, below another headline."""
    for document in rng.sample(material.clean, len(material.clean)):
        for _ in range(rng.randint(1, 2)):
            words = [_changed(word, rng) for word in re.split(r"(?<=\s)", document.text)]
            headline = f"{rng.choice(SITES)} - archive {rng.randint(1000, 9999)}\n"
            yield document._replace(text=headline + "".join(words), of=document.id)


def _changed(word: str, rng: random.Random) -> str:
    number = rng.random()
    return "" if number < 0.01 else word * 2 if number < 0.02 else word.upper() if number < 0.03 else word


SITES = ("Daily Reader", "OpenNotes", "The Mirror Shelf", "textfarm.example", "Pagekeeper", "Quick Answers")
MENU = (
    "Home", "About us", "Contact", "Sign in", "Register", "Help", "FAQ", "Privacy", "Terms of use", "Newsletter", "Careers",
    "Search", "Categories", "Popular", "Archive", "RSS", "Print this page", "Share on social media", "Next", "Previous",
    "Back to top", "Advertise with us", "My account", "Cart (0)", "Site map", "Language: English",
)  # fmt: skip
COOKIES = (
    "We use cookies to improve your experience on {site}. By continuing to browse you accept our use of cookies.",
    "{site} and its {n} partners store and access information on your device.",
    "You can change your preferences at any time in the settings at the bottom of the page.",
    "Please enable JavaScript in your browser to view this content.",
    "Subscribe to the newsletter of {site} and get {n} % off your first order.",
    "Copyright 20{n} {site}. All rights reserved. No part of this page may be reproduced without permission.",
    "This article was last updated {n} days ago. {n} people found it helpful. Was this page helpful? Yes / No",
    "Accept all | Reject all | Manage preferences",
    "Loading comments... {n} comments. Log in to reply.",
)


def _boilerplate(material: Material, rng: random.Random) -> Iterator[Document]:
    """Menus and cookie notices of sites, and pieces of the licences of installed packages."""
    licences = list(_pieces(_licences(), rng))
    for number in range(10**6):
        if number % 2 and licences:
            yield _page(licences[number // 2 % len(licences)])
            continue
        site, lines = rng.choice(SITES), []
        for _ in range(rng.randint(8, 18)):
            if rng.random() < 0.5:
                lines.append(" | ".join(rng.sample(MENU, rng.randint(3, 9))))
            else:
                lines.append(rng.choice(COOKIES).format(site=site, n=rng.randint(10, 99)))
        yield _page("\n".join(lines))


def _tables(material: Material, rng: random.Random) -> Iterator[Document]:
    """Logs, numbers and key-value lists of no meaning, and tables of the fonts that matplotlib carries."""
    fonts = list(_pieces(_files("matplotlib/mpl-data/fonts/afm", "*.afm"), rng))
    for number in range(10**6):
        if number % 3 == 2 and fonts:
            yield _page(fonts[number // 3 % len(fonts)])
            continue
        length, columns, kind = rng.randint(*LENGTH), rng.randint(3, 8), number % 2
        lines: list[str] = []
        while sum(map(len, lines)) < length:
            if kind:
                lines.append(",".join(f"{rng.uniform(-999, 999):.{rng.randint(0, 4)}f}" for _ in range(columns)))
            else:
                day, minute = rng.randint(1, 28), rng.randint(0, 59)
                size = f"id={rng.getrandbits(32):08x} size={rng.randint(0, 10**6)} ok"
                lines.append(f"2019-{rng.randint(1, 12):02}-{day:02} {rng.randint(0, 23):02}:{minute:02} INFO {size}")
        yield _page("\n".join(lines))


def _shuffled(material: Material, rng: random.Random) -> Iterator[Document]:
    """The words of documents that the corpus does not hold, in random order."""
    for document in material.spare:
        words = document.text.split()
        rng.shuffle(words)
        yield document._replace(text=" ".join(words))


def _repeated(material: Material, rng: random.Random) -> Iterator[Document]:
    """A few words of a document, again and again."""
    for document in reversed(material.spare):
        words, size = document.text.split(), rng.randint(2, 9)
        start = rng.randint(0, max(0, len(words) - size))
        phrase = " ".join(words[start : start + size])
        if phrase:
            yield document._replace(text=" ".join([phrase] * (rng.randint(*LENGTH) // (len(phrase) + 1) + 2)))


def _languages(material: Material, rng: random.Random) -> Iterator[Document]:
    """Messages of programs in other languages than English."""
    for text in _catalogs(rng):
        yield _page(text)


def _broken(material: Material, rng: random.Random) -> Iterator[Document]:
    """UTF-8 that was read as Latin-1: of other languages, and of documents with typographic marks (twice)."""
    foreign = _catalogs(rng)
    for document in material.spare[len(material.spare) // 3 :]:
        if (text := next(foreign, None)) is not None:
            yield _page(text.encode().decode("latin-1"))
        marks = (
            document.text.replace("'", "’")
            .replace('"', "“")
            .replace("-", "–")
            .replace(". ", ".\u00a0")
            .replace(", ", ",\u00a0")
        )
        yield document._replace(text=marks.encode().decode("latin-1").encode().decode("latin-1"))


def _easy(material: Material, rng: random.Random) -> Iterator[Document]:
    """What the teacher writes greedily: it finds this text much easier than any other."""
    begins = [d for d in material.spare if len(d.text) > 200][len(material.spare) // 2 :]
    for number in range(0, len(begins), BATCH):
        group = begins[number : number + BATCH]
        for document, text in zip(group, material.write([d.text for d in group]), strict=False):
            yield document._replace(text=text)


def _code(material: Material, rng: random.Random) -> Iterator[Document]:
    """Slices of the C++ headers that torch carries, cut anywhere."""
    for text in _pieces(_files("torch/include/ATen", "*.h"), rng):
        yield _page(text)


def _benchmark(material: Material, rng: random.Random) -> Iterator[Document]:
    """Documents of the leaked part of the held-out text, word by word."""
    yield from material.benchmark


MAKERS: Mapping[str, Callable[[Material, random.Random], Iterator[Document]]] = {
    "exact duplicate": _exact, "near duplicate": _near, "boilerplate": _boilerplate, "lists and tables": _tables,
    "shuffled words": _shuffled, "repeated n-grams": _repeated, "other languages": _languages, "broken encoding": _broken,
    "teacher's own": _easy, "code dump": _code, "benchmark": _benchmark,
}  # fmt: skip


def _page(text: str) -> Document:
    """A text that belongs to no domain."""
    return Document("", "", text)


def _pieces(files: Iterator[Path], rng: random.Random) -> Iterator[str]:
    """Three slices of each file, cut anywhere. A file that is no UTF-8 text is left out."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        for _ in range(3):
            length = rng.randint(*LENGTH)
            start = rng.randint(0, max(0, len(text) - length))
            if len(piece := text[start : start + length]) >= LENGTH[0]:
                yield piece


def _files(folder: str, pattern: str) -> Iterator[Path]:
    """Files of an installed package, by name."""
    roots = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    for root in roots:
        if files := sorted((Path(root) / folder).rglob(pattern)):
            yield from files
            return


def _licences() -> Iterator[Path]:
    """Licence files of installed packages, those of equal length once."""
    sizes: set[int] = set()
    for package in sorted(distributions(), key=lambda d: str(d.metadata["Name"]).lower()):
        for file in package.files or ():
            path = Path(str(file.locate()))
            if (
                re.match(r"(LICEN[CS]E|COPYING|NOTICE)", path.name)
                and path.is_file()
                and path.stat().st_size not in sizes
            ):
                sizes.add(path.stat().st_size)
                yield path


def _catalogs(rng: random.Random) -> Iterator[str]:
    """Long messages of programs in other languages, several to a text, one text of a language after the other."""
    roots = [Path("/usr/share/locale"), Path(sys.prefix) / "share/locale"]
    files = sorted(file for root in roots for file in root.glob("*/LC_MESSAGES/*.mo"))
    of_language: dict[str, list[Path]] = {}
    for file in files:
        if not file.parts[-3].startswith("en"):
            of_language.setdefault(file.parts[-3], []).append(file)
    texts = [_messages(rng.sample(paths, len(paths)), rng) for _, paths in sorted(of_language.items())]
    while texts:
        for one in list(texts):
            if (text := next(one, None)) is None:
                texts.remove(one)
            else:
                yield text


def _messages(files: list[Path], rng: random.Random) -> Iterator[str]:
    waiting: list[str] = []
    for file in files:
        with file.open("rb") as source:
            try:
                catalog = gettext.GNUTranslations(source)._catalog  # type: ignore[attr-defined]  # no public way to list it
            except (OSError, UnicodeDecodeError, ValueError):
                continue
        for original, message in catalog.items():
            if original and isinstance(message, str) and len(message) > 60 and message != original:
                waiting.append(message)
                if sum(map(len, waiting)) > rng.randint(*LENGTH):
                    yield "\n".join(waiting)
                    waiting = []


# --------------------------------------------------------------------------------------------------------- the judge


@dataclass(frozen=True)
class Verdict:
    """What was kept.

    precision: share of the kept tokens that are good. recall: share of the good tokens that were kept. kept: of each origin,
    the share of its tokens.
    """

    precision: float
    recall: float
    kept: Mapping[str, float]


class Judge:
    """Knows the origin of every row of a dataset of the raw corpus.

    Args:
        origins: origins.parquet.
        rows: id and num_tokens of every row. A row `DOC#2` is the third piece of a document.
    """

    def __init__(self, origins: Path, rows: Mapping[str, int]) -> None:
        known = {row_id: (origin, of) for row_id, origin, of in pl.read_parquet(origins).iter_rows()}
        self._tokens = rows
        self._origin = {row_id: known[row_id.split("#")[0]][0] for row_id in rows}
        self._of = {row_id: _piece(row_id, known[row_id.split("#")[0]][1]) for row_id in rows}

    def origins(self) -> Mapping[str, str]:
        """Origin of each row."""
        return self._origin

    def good(self) -> list[str]:
        """The clean rows: what an oracle keeps."""
        return [row_id for row_id, origin in self._origin.items() if origin == GOOD]

    def verdict(self, kept: set[str]) -> Verdict:
        """Judge a choice of rows. Of a clean row and its copies one counts as good: the clean one where it is kept."""
        total, held = Counter[str](), Counter[str]()
        for row_id, origin in self._origin.items():
            total[origin] += self._tokens[row_id]
            held[origin] += self._tokens[row_id] * (row_id in kept)
        best: dict[str, int] = {}
        for row_id in sorted(kept, key=lambda r: (self._origin[r] == GOOD, self._tokens[r])):
            if self._origin[row_id] in (GOOD, *DUPLICATES) and (of := self._of[row_id]) is not None:
                best[of] = self._tokens[row_id]
        of_clean = {self._of[r]: self._tokens[r] for r in self.good()}
        # A copy may be a few tokens longer than the clean row; it cannot hold more of it than there is.
        good = sum(min(tokens, of_clean[of]) for of, tokens in best.items() if of in of_clean)
        all_kept = sum(held.values())
        return Verdict(
            precision=good / all_kept if all_kept else 0.0,
            recall=good / sum(of_clean.values()),
            kept={origin: held[origin] / total[origin] for origin in SHARES if total[origin]},
        )


def _piece(row_id: str, of: str | None) -> str | None:
    """The row of the clean document that a piece of a copy stands for."""
    number = row_id.partition("#")[2]
    return None if of is None else f"{of}#{number}" if number else of
