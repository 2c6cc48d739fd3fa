"""The files of a dataset at a URL: a reader sees a whole dataset at every moment, which grows shard by shard.

A store has no change of several files at once. So dataset.json first says that its sources are not complete, the manifest
names more and more shards that are there, and what else belongs to the dataset and the last dataset.json come at the end.
What would need a change of several files at once, other shards in place of those there, is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from kdata.check.verify import FOLDERS, PAGES
from kdata.errors import ConfigError
from kdata.format.files import lock_of, temporary_folder
from kdata.format.manifest import manifest_line, read_info, read_manifest, write_info
from kdata.format.schema import DatasetInfo, ManifestEntry
from kdata.share.hub_push import left_over
from kdata.store.url import Store, copy_of

LINES = 16  # our default: shards that are sent before the manifest names them
_BEGUN = {*FOLDERS, *PAGES}  # what a push that broke off may have left


def push_to_url(
    url: str, info: DatasetInfo, manifest: list[ManifestEntry], files: Mapping[str, Path | bytes], *, lines: int = LINES
) -> int:
    """Make a dataset the one at a URL: a new one, or one that is there and has grown.

    Shards that the manifest there names are not sent again, nor other files with the same bytes. Each file is written under a
    temporary name and moved. Called again after an interruption, it sends the rest. A score, a plan or the card that is
    replaced by one of the same name is another for a moment than the file that describes it, and then refused.

    Args:
        info, manifest: of the dataset.
        files: relative path to content of all its files.
        lines: how many shards are sent before the manifest names them.
    Returns:
        How many files were sent, not counting dataset.json and manifest.jsonl.
    Raises:
        ConfigError: the place holds another dataset, other shards or other files, or it can only be read (http://).
        CorruptError, FormatError: what is there is damaged.
        StorageError: the store refused, or a process of this user is writing there.
    """
    store = Store(url)
    if not store.has_listings:
        raise ConfigError(
            f"{store.url}: a web server is only read; push to a store such as s3://, or copy a folder there"
        )
    with lock_of(copy_of(store.canonical, "writing"), shown=store.url):
        there = _there(store, info, manifest)
        names = {entry.name for entry in there}
        new = [entry for entry in manifest if entry.name not in names]
        shards = {path for entry in manifest for path in entry.files}
        sent = _send_others(store, {path: c for path, c in files.items() if path.startswith("tokenizer/")})
        if new:
            _send_info(store, _begun(info, there))
        for start in range(0, len(new), lines):
            for entry in new[start : start + lines]:
                sent += sum(_send(store, path, files[path]) for path in entry.files)
                names.add(entry.name)
            known = [manifest_line(entry) for entry in manifest if entry.name in names]
            _send(store, "manifest.jsonl", b"".join(known))
        own = ("dataset.json", "manifest.jsonl")
        sent += _send_others(store, {path: c for path, c in files.items() if path not in shards and path not in own})
        for path in reversed(own):
            _send_others(store, {path: files[path]})
        for path in left_over(store.files(), files):
            store.remove(path)
    return sent


def _there(store: Store, info: DatasetInfo, manifest: list[ManifestEntry]) -> list[ManifestEntry]:
    """Shards that are there. Raises ConfigError where the dataset is not what is there, or more of it."""
    about = store.read("dataset.json")
    if about is None:
        if unknown := sorted(name for name in set(store.names()) - _BEGUN if not name.endswith(".tmp")):
            raise ConfigError(
                f"{store.url} is not a dataset and holds other things ({unknown[0]!r}); name a new folder"
            )
        return []
    with temporary_folder("push") as folder:
        (folder / "dataset.json").write_bytes(about)
        (folder / "manifest.jsonl").write_bytes(store.read("manifest.jsonl") or b"")
        former, there = read_info(folder), read_manifest(folder, heal=True)
    if former.identity_digest != info.identity_digest:
        raise ConfigError(f"{store.url} holds another dataset (other teacher or settings); name a new folder")
    same = {entry.name: entry.files for entry in manifest}
    if changed := [entry.name for entry in there if same.get(entry.name) != entry.files]:
        raise ConfigError(
            f"{store.url} holds other rows (shard {changed[0]}), which cannot be replaced while somebody may read them; name "
            "a new folder"
        )
    return there


def _begun(info: DatasetInfo, there: list[ManifestEntry]) -> DatasetInfo:
    """What a dataset is before all of its shards are there."""
    known = {entry.source for entry in there}
    sources = {
        name: source if name in known and source.num_units == sum(e.source == name for e in there)
        else source.model_copy(update={"num_units": None})
        for name, source in info.sources.items()
    }  # fmt: skip
    return info.model_copy(update={"sources": sources})


def _send_info(store: Store, info: DatasetInfo) -> None:
    with temporary_folder("push") as folder:
        write_info(folder, info)
        store.replace(folder / "dataset.json", "dataset.json")


def _send_others(store: Store, files: Mapping[str, Path | bytes]) -> int:
    """Send those that are not there: parts of scores and plans before the JSON that names them."""
    present = set(store.files())
    return sum(
        _send(store, path, files[path])
        for path in sorted(files, key=lambda path: (path.endswith(".json"), path))
        if path not in present or not _is_same(store, path, files[path])
    )


def _is_same(store: Store, path: str, content: Path | bytes) -> bool:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if store.size(path) != size:
        return False
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha256(store.read(path) or b"").digest() == hashlib.sha256(data).digest()


def _send(store: Store, path: str, content: Path | bytes) -> int:
    """Send one file; 1, to be counted."""
    if isinstance(content, Path):
        store.replace(content, path)
        return 1
    with temporary_folder("push") as folder:
        (folder / "content").write_bytes(content)
        store.replace(folder / "content", path)
    return 1
