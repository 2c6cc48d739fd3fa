"""Datasets with one damage each: flipped bits, cuts, holes, swaps, strays, foreign files, over every kind of file.

The dataset holds two sources, rejects, a sidecar, a plan and a tokenizer. Two things must hold:

- `verify(deep=True)` finds the damage, or the dataset does not open. Declared exceptions: the card (README.md, which a
  person may edit) and hidden files (names that begin with a dot, which file managers leave).
- Whoever reads (rows, index, SQL, plan, batches of the trainer) gets the undamaged values, or one of kdata's errors.

    python -m tests.campaigns.damage --seed 0 --count 20000
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import kdata
from kdata.check.verify import verify
from kdata.errors import KdataError
from kdata.format.schema import canonical_json
from kdata.loader.batches import Batches, BatchesConfig
from kdata.selection.plan import make_plan, open_plan
from kdata.selection.score_file import bring
from tests.campaigns.campaign import Campaign, Outcome, child, main
from tests.fakes import StandInTeacher, rows_of_text, run_capture, run_generate, save_tokenizer, write_jsonl


def make(root: Path, place: Path, *, salt: str = "", source: str = "both") -> None:
    """A dataset with everything that a dataset may have, by the stand-in teacher."""
    rows = rows_of_text(14)
    rows[3]["text"] = ""
    corpus = write_jsonl(place / "corpus.jsonl", rows)
    teacher = StandInTeacher(salt)
    if source == "both":
        run_generate(root, write_jsonl(place / "prompts.jsonl", rows[:5]), place / "tokenizer", teacher=teacher)
    run_capture(root, corpus, place / "tokenizer", teacher=teacher, unit_tokens=60)
    dataset = kdata.open(root)
    ids = dataset.index(["id"])["id"].to_pylist()
    pq.write_table(pa.table({"id": ids, "mark": [float(n) for n in range(len(ids))]}), place / "marks.parquet")
    bring(dataset, place / "marks.parquet", "judge")
    chosen = make_plan(
        dataset, "half", ids[::2], method="by hand", parameters={}, repeats=np.arange(1, 1 + len(ids[::2]))
    )
    chosen.save(root / "plans")
    (root / "README.md").write_text("a card\n")


def _digest(*values: object) -> str:
    return hashlib.sha256("\0".join(repr(value) for value in values).encode()).hexdigest()


def _rows(dataset: kdata.Dataset) -> str:
    values = []
    for row in dataset:
        values += [array.tobytes() for array in vars(row.sequence).values() if array is not None]
    return _digest(*values)


def _batches(dataset: kdata.Dataset) -> str:
    batches = Batches(
        dataset,
        open_plan(dataset, "half").rows(dataset),
        BatchesConfig(context_tokens=64, batch_rows=4, prefetch_batches=0),
    )
    values = []
    for _, batch in zip(range(6), batches, strict=False):
        values += [array.tobytes() for array in vars(batch).values() if isinstance(array, np.ndarray)]
    return _digest(*values)


def _sql(query: str) -> Callable[[kdata.Dataset], str]:
    return lambda dataset: _digest(dataset.sql(query).to_pylist())


READINGS: dict[str, Callable[[kdata.Dataset], str]] = {
    # Lines that change places are the same values in another order.
    "info": lambda dataset: _digest(
        canonical_json(dataset.info.model_dump()), dataset.content_digest, dataset.num_tokens
    ),
    "index": lambda dataset: _digest(dataset.index().to_pylist()),
    "rows": _rows,
    "batches": _batches,
    "sql rows": _sql("select * from rows order by id"),
    "sql rejects": _sql("select * from rejects order by id"),
    "sql scores": _sql("select * from scores.judge order by id"),
    "sql plans": _sql("select * from plans.half order by id"),
    "sql join": _sql("select domain, sum(mark), count(*) from rows join scores.judge using (id) group by 1 order by 1"),
    "plan": lambda dataset: _digest(open_plan(dataset, "half").rows(dataset).tolist()),
}


def examine(roots: list[str]) -> int:
    """In a child: print a line of JSON for each dataset: problems of verify, and what each reading gives."""
    for root in roots:
        answer: dict[str, object] = {}
        try:
            answer["verify"] = [f"{p.path}: {p.what}" for p in verify(kdata.open(root), deep=True)]
        except KdataError as error:
            answer["verify"] = [f"refused: {error}"]
        readings = {}
        for name, reading in READINGS.items():
            try:
                readings[name] = reading(kdata.open(root))
            except KdataError as error:
                readings[name] = f"refused: {type(error).__name__}"
            except Exception as error:  # any other error is what this campaign looks for
                readings[name] = f"TRACEBACK {type(error).__name__}: {error}"
        print(json.dumps({"verify": answer["verify"], "readings": readings}), flush=True)
    return 0


def kind_of(relative: str) -> str:
    """What a file of a dataset is, for counting."""
    folder, _, name = relative.partition("/")
    return (
        folder
        if not name
        else f"{folder}/*{Path(name).suffix}"
        if "/" not in name
        else f"{folder}/*/*{Path(name).suffix}"
    )


class Damage(Campaign):
    """Damage one file of a dataset, verify it and read it."""

    name = "damage"
    shares = True
    examine = staticmethod(examine)  # what a child does with a damaged dataset

    def __init__(self, damages: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.damages = damages or tuple(DAMAGES)

    def prepare(self, folder: Path, seed: int) -> None:
        """See `Campaign.prepare`."""
        save_tokenizer(folder / "tokenizer")
        make(folder / "whole", folder)
        for name, options in (("sibling", {"source": "capture"}), ("other", {"salt": "another"})):
            (folder / f"{name}-files").mkdir()
            shutil.copytree(folder / "tokenizer", folder / f"{name}-files" / "tokenizer")
            make(folder / name, folder / f"{name}-files", **options)
        self.folder, self.whole = folder, folder / "whole"
        files = [p.relative_to(self.whole).as_posix() for p in sorted(self.whole.rglob("*")) if p.is_file()]
        self.files = [name for name in files if name != "README.md" and not name.startswith(".")]
        self.kinds = sorted({kind_of(name) for name in self.files})
        ended = child(examine, [str(self.whole)], seconds=60)
        assert ended.status == 0, ended.stderr
        answer = json.loads(ended.stdout)
        assert answer["verify"] == [] and not any(":" in text for text in answer["readings"].values()), answer
        self.expected = answer["readings"]
        self.first = functools.partial(examine, [str(self.whole)])
        self.times = self._times()

    def _times(self) -> list[int]:
        """When each file of the original was last changed."""
        return [(self.whole / name).stat().st_mtime_ns for name in self.files]

    def run(self, number: int, rng: random.Random, folder: Path) -> Outcome:
        """See `Campaign.run`."""
        root = folder / "d"
        self._link(root)
        # Kinds of files in turn, so that small ones come as often as those of which there are many.
        name = rng.choice([n for n in self.files if kind_of(n) == self.kinds[number % len(self.kinds)]])
        how = rng.choice(self.damages)
        what = DAMAGES[how](rng, root, name, self)
        while what is None:  # it changed nothing, such as a hole where there were zeros
            shutil.rmtree(root)
            self._link(root)
            how = rng.choice(self.damages)
            what = DAMAGES[how](rng, root, name, self)
        kind = f"{how}, {kind_of(name)}"
        ended = self.child(self.examine, [str(root)])
        complaint = ended.complaint()
        if complaint is not None:
            return Outcome(kind, f"{what}: {complaint}")
        answer = json.loads(ended.stdout)
        problems = []
        if not answer["verify"]:
            problems.append("verify finds nothing")
        for reading, seen in answer["readings"].items():
            if seen.startswith("TRACEBACK"):
                problems.append(f"{reading}: {seen}")
            elif seen != self.expected[reading] and not seen.startswith("refused"):
                problems.append(f"{reading} gives other values without an error")
        if self._times() != self.times:
            raise AssertionError(
                f"{what}: a reader changed a file of the dataset, and of the original, which is no more whole"
            )
        return Outcome(kind, f"{what}: {'; '.join(problems)}" if problems else None)

    def _link(self, root: Path) -> None:
        """A copy of the original with hard links in place of files, which `_write` replaces."""
        shutil.copytree(self.whole, root, copy_function=os.link)


def _flip(rng: random.Random, root: Path, name: str, campaign: Damage) -> str:
    content = bytearray((root / name).read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
    return _write(root, name, bytes(content), f"bits flipped in {name}, the last at byte {place}")


def _byte(rng: random.Random, root: Path, name: str, campaign: Damage) -> str | None:
    content = bytearray((root / name).read_bytes())
    place, before = rng.randrange(len(content)), bytes(content)
    content[place] = rng.choice((0, 255, ord("0"), ord('"'), ord(" "), rng.randrange(256)))
    return None if content == before else _write(root, name, bytes(content), f"another byte {place} in {name}")


def _cut(rng: random.Random, root: Path, name: str, campaign: Damage) -> str:
    content = (root / name).read_bytes()
    size = rng.choice((0, 1, len(content) - 1, rng.randrange(len(content))))
    return _write(root, name, content[:size], f"{name} cut to {size} of {len(content)} bytes")


def _hole(rng: random.Random, root: Path, name: str, campaign: Damage) -> str | None:
    content = (root / name).read_bytes()
    start = rng.randrange(len(content))
    size = min(rng.choice((1, 8, 512, 4096)), len(content) - start)
    changed = content[:start] + bytes(size) + content[start + size :]
    return None if changed == content else _write(root, name, changed, f"{size} zero bytes at {start} of {name}")


def _longer(rng: random.Random, root: Path, name: str, campaign: Damage) -> str:
    content = (root / name).read_bytes()
    more = rng.choice((b"\0", b"\n", b" ", content, content[-100:], b"{}\n"))
    return _write(root, name, content + more, f"{len(more)} bytes appended to {name}")


def _missing(rng: random.Random, root: Path, name: str, campaign: Damage) -> str:
    (root / name).unlink()
    return f"{name} deleted"


def _swapped(rng: random.Random, root: Path, name: str, campaign: Damage) -> str | None:
    others = [other for other in campaign.files if kind_of(other) == kind_of(name) and other != name]
    if not others:
        return None
    other = rng.choice(others)
    one, two = (root / name).read_bytes(), (root / other).read_bytes()
    if one == two:
        return None
    _write(root, other, one, "")
    return _write(root, name, two, f"{name} and {other} swapped")


def _foreign(rng: random.Random, root: Path, name: str, campaign: Damage) -> str | None:
    """The file of the same name from another dataset, or any file of the same kind."""
    place = campaign.folder / rng.choice(("sibling", "other"))
    source = place / name
    if not source.is_file():
        return None
    content = source.read_bytes()
    return None if content == (root / name).read_bytes() else _write(root, name, content, f"{name} from {place.name}")


def _stray(rng: random.Random, root: Path, name: str, campaign: Damage) -> str:
    path = root / name
    names = ("copy-{name}", "{stem}-2{suffix}", "{name}.tmp", "{name}~", "{stem} (1){suffix}", "new-{stem}{suffix}")
    target = path.with_name(rng.choice(names).format(name=path.name, stem=path.stem, suffix=path.suffix))
    shutil.copyfile(path, target)
    return f"a copy of {name} as {target.name}"


def _stray_folder(rng: random.Random, root: Path, name: str, campaign: Damage) -> str:
    path = root / name
    place = path.parent / rng.choice(("backup", "new", "x.tmp"))
    place.mkdir()
    shutil.copyfile(path, place / path.name)
    return f"a copy of {name} in {place.name}/ beside it"


def _link(rng: random.Random, root: Path, name: str, campaign: Damage) -> str:
    """A link to a changed file outside of the dataset."""
    outside = root.parent / "outside"
    content = bytearray((root / name).read_bytes())
    content[len(content) // 2] ^= 1
    outside.write_bytes(content)
    (root / name).unlink()
    os.symlink(outside, root / name)
    return f"{name} is a link to a changed file outside"


def _folder_instead(rng: random.Random, root: Path, name: str, campaign: Damage) -> str:
    (root / name).unlink()
    (root / name).mkdir()
    return f"{name} is a folder"


def _line(rng: random.Random, root: Path, name: str, campaign: Damage) -> str | None:
    """Lines of a text file in another order, one of them missing, or one of them a second time.

    Lines of the manifest may stand in any order.
    """
    lines = (root / name).read_bytes().splitlines(keepends=True)
    if len(lines) < 2 or Path(name).suffix not in (".json", ".jsonl"):
        return None
    changed = list(lines)
    one, two = rng.sample(range(len(lines)), 2)
    how = rng.choice(("missing", "repeated") if name == "manifest.jsonl" else ("swapped", "missing", "repeated"))
    if how == "swapped":
        changed[one], changed[two] = changed[two], changed[one]
    elif how == "missing":
        del changed[one]
    else:
        changed.insert(two, changed[one])
    return None if changed == lines else _write(root, name, b"".join(changed), f"line {one + 1} of {name} {how}")


def _write(root: Path, name: str, content: bytes, what: str) -> str:
    (root / name).unlink()  # the original has another name for it
    (root / name).write_bytes(content)
    return what


DAMAGES: dict[str, Callable[[random.Random, Path, str, Damage], str | None]] = {
    "flip": _flip,
    "byte": _byte,
    "cut": _cut,
    "hole": _hole,
    "longer": _longer,
    "missing": _missing,
    "swap": _swapped,
    "foreign file": _foreign,
    "stray": _stray,
    "stray folder": _stray_folder,
    "link": _link,
    "folder instead": _folder_instead,
    "line": _line,
}


if __name__ == "__main__":
    sys.exit(main(Damage))
