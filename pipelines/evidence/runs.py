"""Named settings x seeds, each measured once and kept: a file a run, so that work goes on where it stopped.

Several processes may call `run_all` on the same folder: a run that another one has under way is left to it, and its lock goes
with the process, however that ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdata.errors import CorruptError, MismatchError, settings_difference

Figures = dict[str, float | None]
"""What one run measured, by name; None: not measured there."""


def run_all(
    folder: Path,
    runs: Iterable[tuple[str, int]],
    measure: Callable[[str, int], Figures],
    identity: Mapping[str, Any],
    *,
    told: Callable[[str], Mapping[str, Any]] = lambda setting: {},
    keep_going: Callable[[], bool] = lambda: True,
) -> int:
    """Measure what is not measured yet, in the order given.

    Args:
        folder: where run files are, made when absent.
        runs: (setting, seed) each.
        measure: has one run done.
        identity: what all runs share (steps, sizes, data), as JSON values; stored with each.
        told: what a setting's name stands for, as JSON values; stored with its runs.
        keep_going: asked before each run; False stops here.
    Returns:
        Runs that this call did.
    Raises:
        MismatchError: a run there was made with another identity, or of another setting by the same name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for setting, seed in runs:
        path = path_of(folder, setting, seed)
        if not keep_going():
            break
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if path.exists():
                    _check(path, identity, told(setting))
                    continue
                content = {
                    "setting": setting,
                    "seed": seed,
                    "told": told(setting),
                    "identity": identity,
                    "figures": measure(setting, seed),
                }
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
                os.replace(temporary, path)
                done += 1
        except Timeout:
            continue  # another process is at it
    return done


def load_runs(folder: Path, settings: Sequence[str]) -> dict[str, dict[int, Figures]]:
    """Figures of the runs that are there, by setting (in the order given) and seed.

    Raises:
        CorruptError: a file is damaged.
        MismatchError: runs do not share one identity.
    """
    found: dict[str, dict[int, Figures]] = {name: {} for name in settings}
    first: tuple[Path, Any] | None = None
    for path in sorted(folder.glob("*.json")):
        content = _read(path)
        first = first or (path, content["identity"])
        if content["identity"] != first[1]:
            _refuse(path, first[1], content["identity"])
        if content["setting"] in found:
            found[content["setting"]][content["seed"]] = content["figures"]
    return {name: dict(sorted(seeds.items())) for name, seeds in found.items() if seeds}


def path_of(folder: Path, setting: str, seed: int) -> Path:
    """File of one run: letters and digits of the setting's name, and the seed."""
    return folder / f"{''.join(c if c.isalnum() else '-' for c in setting)}.{seed}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"{path} is damaged: {error}; delete it, and the run is done again") from error


def _check(path: Path, identity: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    found = _read(path)
    before = {**found["identity"], "setting": found.get("told", {})}
    now = {**identity, "setting": told}
    if before != json.loads(json.dumps(now)):
        _refuse(path, before, now)


def _refuse(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    raise MismatchError(
        f"{path} was made with other settings (before -> now):\n{settings_difference(before, after)}\n"
        "Runs of one folder are compared, so they share everything but setting and seed: name another folder"
    )
