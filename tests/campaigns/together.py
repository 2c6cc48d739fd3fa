"""Pairs of commands that start at the same time, on one folder and one target.

Each of the two must do its work, or end with one error: another process holds the folder, the target is taken, or the
dataset has changed meanwhile. No traceback, no hang. Afterwards the dataset is whole, and what was refused works when it is
alone (or finds its target taken, or the dataset no longer what it asks for).

    python -m tests.campaigns.together --seed 0 --count 500
"""

from __future__ import annotations

import itertools
import random
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import kdata
from kdata.check.verify import verify
from kdata.errors import KdataError
from tests.campaigns.campaign import Campaign, Child, Outcome, main
from tests.campaigns.commands import SMALL, STUDENT, TEACHER, TOPK, Bench, difference, in_folder, state

OTHER = ("--backend", "transformers")


@dataclass(frozen=True)
class Act:
    """A command on the folder `d`; its target, if it has one, is `out`. writes: whether it may change d."""

    arguments: tuple[str, ...]
    writes: bool = False
    has_target: bool = False


ACTS: dict[str, Act] = {
    "capture": Act(("capture", "d", *TEACHER, "--corpus", "SHARED/corpus.jsonl", *TOPK, *SMALL), writes=True),
    "capture, corpus changed": Act(
        ("capture", "d", *TEACHER, "--corpus", "SHARED/changed.jsonl", *TOPK, *SMALL), writes=True
    ),
    "capture more": Act(
        ("capture", "d", *TEACHER, "--corpus", "SHARED/second.jsonl", *TOPK, *SMALL, "--set", "name=more"), writes=True
    ),
    "generate": Act(
        (
            "generate",
            "d",
            *TEACHER,
            "--prompts",
            "SHARED/prompts.jsonl",
            "--text-column",
            "text",
            *TOPK,
            "--max-tokens",
            "4",
            "--set",
            "unit_prompts=2",
        ),
        writes=True,
    ),
    "score": Act(("score", "d", "--model", "SHARED/other", *OTHER, "--name", "new"), writes=True),
    "score from a file": Act(("score", "d", "--from", "SHARED/marks.parquet", "--name", "marks"), writes=True),
    "select": Act(("select", "d", "--method", "difference"), writes=True),
    "select sql": Act(
        ("select", "d", "--name", "difference", "--sql", "select id from rows where num_tokens > 5"), writes=True
    ),
    "repair": Act(("repair", "d"), writes=True),
    "train": Act(("train", "d", "--out", "out", *STUDENT), has_target=True),
    "evaluate": Act(("evaluate", "SHARED/student/model", "d", "--save", "out.json")),
    "reread": Act(("reread", "d", "out", "--teacher", "SHARED/other", *OTHER), has_target=True),
    "combine": Act(("combine", "d", "SHARED/reread", "out", "--weights", "0.7,0.3"), has_target=True),
    "import": Act(
        ("import", "SHARED/plain.parquet", "out", "--format", "plain", "--tokenizer", "SHARED/teacher", *SMALL),
        has_target=True,
    ),
    "export": Act(("export", "d", "out.parquet"), has_target=True),
    "merge": Act(("merge", "d", "SHARED/second", "out"), has_target=True),
    "split": Act(("split", "d", "out"), has_target=True),
    "head": Act(("head", "d", "out", "-n", "5"), has_target=True),
    "push": Act(("push", "d", "out"), has_target=True),
    "verify": Act(("verify", "d", "--deep")),
    "info": Act(("info", "d")),
    "sql": Act(("sql", "d", "select count(*), sum(num_tokens) from rows")),
    "status": Act(("status", "d")),
    "plan show": Act(("plan", "show", "d", "half")),
}
# One of these must be in the error of a command that was refused.
REFUSALS = {
    "held": r"being written by another process|another process|is held by|holds",
    "taken": r"exists|not an empty folder|already|holds other things|begun with other settings|is (not )?a dataset",
    "changed": r"has changed|changed while|another state|rows were added|again|does not cover|not the one|not the same rows"
    r"|is not complete|both have a row with id|has ids that d does not have",
}


class Together(Campaign):
    """Start two commands on one folder at the same time."""

    name = "together"

    def prepare(self, folder: Path, seed: int) -> None:
        """See `Campaign.prepare`."""
        self.bench = Bench(folder)
        self.pairs = list(itertools.combinations_with_replacement(ACTS, 2))
        random.Random(seed).shuffle(self.pairs)

    def close(self) -> None:
        """See `Campaign.close`."""
        self.bench.close()

    def run(self, number: int, rng: random.Random, folder: Path) -> Outcome:
        """See `Campaign.run`. Pairs come in turn; each further round has other delays."""
        pair = self.pairs[number % len(self.pairs)]
        first, second = (ACTS[name] for name in pair)
        kind = " and ".join(pair)
        arguments = {name: self.bench.arguments(ACTS[name].arguments) for name in pair}
        self.bench.copy("first", folder / "d")
        before = state(folder / "d")
        children = []
        for name, delay in ((pair[0], 0.0), (pair[1], rng.choice((0.0, 0.0, rng.uniform(0, 0.6))))):
            time.sleep(delay)
            children.append(Child(in_folder, str(folder), arguments[name]))
        ended = [one.wait(30) for one in children]
        refused = []
        for name, end in zip(pair, ended, strict=True):
            complaint = end.complaint()
            if complaint is not None:
                return Outcome(kind, f"{name}: {complaint}")
            if end.status != 0:
                why = [reason for reason, pattern in REFUSALS.items() if re.search(pattern, end.stderr)]
                if not why:
                    return Outcome(kind, f"{name} was refused for another reason: {end.stderr[-700:]}")
                refused.append(name)
        if len(refused) == 2:
            return Outcome(kind, f"both were refused: {[end.stderr[-300:] for end in ended]}")
        problem = _whole(folder, before, writes=first.writes or second.writes)
        if problem is not None:
            return Outcome(kind, f"refused: {refused or 'none'}; {problem}")
        for name in refused:
            again = Child(in_folder, str(folder), arguments[name]).wait(30)
            taken = re.search(REFUSALS["taken"], again.stderr) and ACTS[name].has_target
            changed = re.search(REFUSALS["changed"], again.stderr) and difference(before, state(folder / "d"))
            if again.complaint() is not None or (again.status != 0 and not taken and not changed):
                return Outcome(kind, f"{name}, refused at first, alone: {again.status} {again.stderr[-700:]}")
        problem = _whole(folder, before, writes=first.writes or second.writes)
        return Outcome(kind, problem and f"after the second try: {problem}")


def _whole(folder: Path, before: Mapping[str, str], *, writes: bool) -> str | None:
    """What is wrong with the folder, and with each dataset in the target; None where nothing is."""
    if not writes:
        wrong = difference(before, state(folder / "d"))
        if wrong is not None:
            return f"a folder that nobody writes has changed: {wrong}"
    roots = [folder / "d", *(path.parent for path in sorted(folder.glob("out*/**/dataset.json")))]
    for root in roots:
        try:
            problems = verify(kdata.open(root), deep=True)
        except KdataError as error:
            return f"{root.name} does not open: {error}"
        if problems:
            return f"{root.name} is not whole: {problems[:3]}"
    left = [p.name for p in folder.rglob("*") if p.name.endswith(".tmp")]
    return f"left over: {left[:5]}" if left else None


if __name__ == "__main__":
    sys.exit(main(Together))
