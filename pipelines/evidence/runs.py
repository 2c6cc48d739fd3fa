"""Named settings x seeds, each measured once and stored: one file per run, so that work continues where it stopped.

Several processes may call `run_all` on the same folder. A run that another process is measuring is skipped; its lock ends
with that process, however that ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from kdata.errors import ConfigError, CorruptError, MismatchError, settings_difference

T = TypeVar("T")
Figures = dict[str, float | None]
"""What one run measured, by name; None: not measured in this run."""


def by_name(settings: Mapping[str, T], name: str) -> T:
    """A setting by its name. Raises ConfigError if there is none."""
    if name not in settings:
        raise ConfigError(f"there is no setting {name!r}; the settings are {', '.join(settings)}")
    return settings[name]


def run_all(
    folder: Path,
    runs: Iterable[tuple[str, int]],
    measure: Callable[[str, int], Figures],
    identity: Mapping[str, Any],
    *,
    describe: Callable[[str], Mapping[str, Any]] = lambda setting: {},
    keep_going: Callable[[], bool] = lambda: True,
) -> int:
    """Measure the runs that are not measured yet, in the order of `runs`.

    Args:
        folder: folder of the run files, created if absent.
        runs: (setting, seed) of each run.
        measure: trains and measures one run.
        identity: settings that all runs share (steps, sizes, data), as JSON values; stored with each run.
        describe: the content of a setting, by its name, as JSON values; stored with its runs.
        keep_going: called before each run; False stops.
    Returns:
        Number of runs that this call measured.
    Raises:
        MismatchError: a run in the folder has another identity, or is of another setting with the same name.
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
                    _check(path, identity, describe(setting))
                    continue
                content = {
                    "setting": setting,
                    "seed": seed,
                    "told": describe(setting),
                    "identity": identity,
                    "figures": measure(setting, seed),
                }
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
                os.replace(temporary, path)
                done += 1
        except Timeout:
            continue  # another process is measuring it
    return done


def load_runs(folder: Path, settings: Sequence[str]) -> dict[str, dict[int, Figures]]:
    """Figures of the runs in the folder, by setting (in the order of `settings`) and seed.

    Raises:
        CorruptError: a file is damaged.
        MismatchError: the runs do not all have the same identity.
    """
    by_setting: dict[str, dict[int, Figures]] = {name: {} for name in settings}
    first: tuple[Path, Any] | None = None
    for path in sorted(folder.glob("*.json")):
        content = _read(path)
        first = first or (path, content["identity"])
        if content["identity"] != first[1]:
            _refuse(path, first[1], content["identity"])
        if content["setting"] in by_setting:
            by_setting[content["setting"]][content["seed"]] = content["figures"]
    return {name: dict(sorted(seeds.items())) for name, seeds in by_setting.items() if seeds}


def identity_of(folder: Path) -> dict[str, Any]:
    """The settings that the runs in a folder share, by its first file; empty if there is none. Raises CorruptError."""
    return next((dict(_read(path)["identity"]) for path in sorted(folder.glob("*.json"))), {})


def path_of(folder: Path, setting: str, seed: int) -> Path:
    """File of one run, named by the letters and digits of the setting and by the seed."""
    return folder / f"{''.join(c if c.isalnum() else '-' for c in setting)}.{seed}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return run
    except ValueError as error:
        raise CorruptError(f"{path} is damaged: {error}; delete it, and the run is measured again") from error


def _check(path: Path, identity: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    content = _read(path)
    before = {**content["identity"], "setting": content.get("told", {})}
    now = {**identity, "setting": description}
    if before != json.loads(json.dumps(now)):
        _refuse(path, before, now)


def _refuse(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    raise MismatchError(
        f"{path} was measured with other settings (before -> now):\n{settings_difference(before, after)}\n"
        "Runs of one folder are compared, so they must share everything except setting and seed: use another folder"
    )
