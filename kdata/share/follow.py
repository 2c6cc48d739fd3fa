"""Share a dataset while it is written: each state that is whole goes to the Hub or to a URL."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from kdata.errors import ConfigError, MissingError
from kdata.format.files import lock_of
from kdata.format.manifest import manifest_line
from kdata.share.fitness import About
from kdata.share.push import publish, push, refuse_destination
from kdata.store.dataset import Dataset
from kdata.store.open import open_dataset

POLL_SEC = 0.5  # our default: how often the lock is looked at


def push_while_written(
    place: Path,
    destination: str,
    *,
    every_sec: float,
    public: bool = False,
    about: About | None = None,
    tag: str | None = None,
    hidden: bool = False,
    sent: Callable[[Dataset], None] = lambda dataset: None,
) -> str:
    """Push what is committed, again and again until no process writes to the dataset, and then all of it.

    Each time the manifest names the shards that go with it and no others, so that a reader sees a whole dataset. Killed and
    called again, it goes on. Arguments, errors and result as `kdata.share.push.push`.

    Args:
        place: folder of the dataset, where a process may just have begun to write.
        destination: hf://OWNER/NAME or a URL.
        every_sec: seconds between two pushes, at least.
        tag: a name for the last version.
        sent: called after each push but the last one.
    """
    about = about or About()
    refuse_destination(destination, tag)
    if "://" not in destination:
        raise ConfigError(
            f"{destination}: --while pushes to hf://OWNER/NAME or a URL; push to a folder when all is written"
        )
    shards, last = 0, -every_sec
    while lock_of(place).holder() is not None:
        if time.monotonic() - last >= every_sec and (state := _state(place)) is not None:
            dataset, own = state
            if len(dataset.manifest) > shards:
                publish(dataset, destination, public=public, about=about, tag=tag, own=own, is_last=False)
                shards, last = len(dataset.manifest), time.monotonic()
                sent(dataset)
        time.sleep(min(POLL_SEC, every_sec))
    return push(open_dataset(place), destination, public=public, about=about, tag=tag, hidden=hidden)


def _state(place: Path) -> tuple[Dataset, dict[str, bytes]] | None:
    """A dataset as it is now, and its files that change while it is written; None where it is just changing."""
    try:
        info = (place / "dataset.json").read_bytes()
        dataset = open_dataset(place)
        if not dataset.manifest or (place / "dataset.json").read_bytes() != info:
            return None
    except (FileNotFoundError, MissingError):
        return None
    for entry in dataset.manifest:
        for kind in ("data", "index"):
            dataset.checked_file(entry, kind)  # read once in this process
    return dataset, {
        "dataset.json": info,
        "manifest.jsonl": b"".join(manifest_line(entry) for entry in dataset.manifest),
    }
