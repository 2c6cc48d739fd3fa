"""Commands that write, ended by SIGKILL: before each call that changes the disk, inside it, at random times, and again while
they go on.

After the last kill the same command runs undisturbed. It must end well, and leave the files of a run that nobody disturbed,
to the last byte and no others. Between kills every dataset must open, whole but for files that no manifest line names, and
hold every row that was committed before; folders that the command only reads must not change.

    python -m tests.campaigns.kills --seed 0 --count 3000
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import kdata
from kdata.check.verify import verify
from kdata.errors import KdataError
from tests.campaigns.campaign import Campaign, Outcome, main
from tests.campaigns.commands import COMMANDS, Bench, Command, difference, state
from tests.faults import CHANGES, Fault

HANG_SEC = 10.0


class Kills(Campaign):
    """Kill every command that writes, at every place, and start it again."""

    name = "kills"

    def __init__(self, commands: tuple[str, ...] = tuple(COMMANDS)) -> None:
        super().__init__()
        self.commands = commands

    def prepare(self, folder: Path, seed: int) -> None:
        """See `Campaign.prepare`."""
        self.bench, self.seed = Bench(folder), seed

    def close(self) -> None:
        """See `Campaign.close`."""
        self.bench.close()

    def place(self, number: int) -> tuple[str, int]:
        """The command of a case, and the call at which something happens. Commands come in turn, calls in a drawn order."""
        name = self.commands[number % len(self.commands)]
        calls = list(range(1, self.bench.whole(name).calls + 1))
        random.Random(f"{self.seed} {name}").shuffle(calls)
        return name, calls[number // len(self.commands) % len(calls)]

    def run(self, number: int, rng: random.Random, folder: Path) -> Outcome:
        """See `Campaign.run`."""
        name, at = self.place(number)
        command, whole = COMMANDS[name], self.bench.whole(name)
        how = rng.choice(("before a call", "inside a call", "inside a call", "at a time", "again and again"))
        self.bench.begin(command, folder)
        before, rows = self.inputs(command, folder), set[str]()
        kind, patient = f"{how}, {name}", HANG_SEC + 3 * whole.seconds
        for attempt in range(rng.randint(2, 4) if how == "again and again" else 1):
            call = rng.randint(1, whole.calls) if attempt else at
            if how == "at a time":
                outcome = self.bench.run(command, folder, None, rng.uniform(0, whole.seconds), exactly=True)
            else:
                fault = Fault("kill" if how == "before a call" else "kill inside", at=call, calls=CHANGES)
                outcome = self.bench.run(command, folder, fault, patient)
                if outcome.state == "hung":
                    return Outcome(kind, f"no end after {patient:.0f} s")
            problem = self.between(command, folder, before, rows)
            if problem is not None:
                return Outcome(kind, f"after a kill at call {call}: {problem}")
        outcome = self.bench.run(command, folder, None, patient)
        if outcome.result and " exists" in outcome.output and difference(whole.state, state(folder)) is None:
            return Outcome(kind)  # killed after the last rename: the target is whole, and is said to be there
        if outcome.state != "done" or outcome.result != 0:
            ended = f"{outcome.state} {outcome.output[-900:]} {outcome.text[-900:]}"
            return Outcome(kind, f"after a kill at call {call} the same command ends: {ended}")
        wrong = difference(whole.state, state(folder))
        return Outcome(kind, wrong and f"killed at call {call}, then finished: {wrong}")

    def inputs(self, command: Command, folder: Path) -> dict[str, dict[str, str]]:
        """The state of each input that the command may only read."""
        return {name: state(folder / name) for name in command.inputs if name not in command.changes}

    def between(self, command: Command, folder: Path, before: dict[str, dict[str, str]], rows: set[str]) -> str | None:
        """What is wrong after a kill; `rows` are ids that must be there, and gets those that are."""
        for name, expected in before.items():
            wrong = difference(expected, state(folder / name))
            if wrong is not None:
                return f"the input {name} has changed: {wrong}"
        if command.dataset is None or command.arguments[0] == "repair":
            return None
        root = folder / command.dataset
        if not (root / "dataset.json").exists():
            return "dataset.json is gone" if command.dataset in command.changes or rows else None
        try:
            dataset = kdata.open(root)
            # What a kill leaves: files that nothing names yet, and a sidecar or plan that is not complete.
            problems = [p for p in verify(dataset, deep=True) if "killed run" not in p.what]
            ids = set(dataset.index(["id"])["id"].to_pylist())
        except KdataError as error:
            return f"the dataset does not open: {error}"
        if problems:
            return f"the dataset is not whole: {problems[:3]}"
        if rows - ids and command.arguments[0] != "capture":
            return f"committed rows are gone: {sorted(rows - ids)[:3]}"
        rows.update(ids)
        return None


if __name__ == "__main__":
    sys.exit(main(Kills))
