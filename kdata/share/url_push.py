"""The files of a dataset at a URL: a reader sees a whole dataset at every moment, which grows shard by shard.

A store has no change of several files at once. So dataset.json first says that its sources are not complete, the manifest
names more and more shards that are there, and what else belongs to the dataset and the last dataset.json come at the end.
What would need a change of several files at once, other shards in place of those there, is refused. A score or plan that is
replaced has no JSON meanwhile, and so is not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kdata.check.verify import FOLDERS, PAGES
from kdata.errors import ConfigError, CorruptError
from kdata.format.files import file_info, lock_of, temporary_folder
from kdata.format.manifest import manifest_line, read_info, read_manifest, write_info
from kdata.format.schema import DatasetInfo, ManifestEntry
from kdata.share.hub_push import left_over
from kdata.store.listed import KINDS, read_listing
from kdata.store.url import Store, copy_of

LINES = 16  # our default: shards that are sent before the manifest names them
_BEGUN = {*FOLDERS, *PAGES}  # what a push that broke off may have left


def push_to_url(
    url: str,
    info: DatasetInfo,
    manifest: list[ManifestEntry],
    files: Mapping[str, Path | bytes],
    sha256: Mapping[str, str],
    *,
    lines: int = LINES,
) -> int:
    """Make a dataset the one at a URL: a new one, or one that is there and has grown.

    Shards that the manifest there names are not sent again, nor other files with the same bytes; parts of scores, plans and
    hidden states are compared by the digests in the JSON beside them, and read only where there is none yet. Each file is
    written under a temporary name and moved. Called again after an interruption, it sends the rest.

    Args:
        info, manifest: of the dataset.
        files: relative path to content of all its files.
        sha256: digests of some of the files, in hexadecimal; the others are read.
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
        there, listed = _there(store, info, manifest), _listed(store)

        def send_others(*paths: str) -> int:
            return _send_others(store, {path: files[path] for path in paths}, sha256, listed)

        names = {entry.name for entry in there}
        new = [entry for entry in manifest if entry.name not in names]
        shards = {path for entry in manifest for path in entry.files}
        sent = send_others(*(path for path in files if path.startswith("tokenizer/")))
        if new:
            _send_info(store, _begun(info, there))
        for start in range(0, len(new), lines):
            for entry in new[start : start + lines]:
                sent += sum(_send(store, path, files[path]) for path in entry.files)
                names.add(entry.name)
            known = [manifest_line(entry) for entry in manifest if entry.name in names]
            _send(store, "manifest.jsonl", b"".join(known))
        own = ("dataset.json", "manifest.jsonl")
        sent += send_others(*(path for path in files if path not in shards and path not in own))
        for path in reversed(own):
            send_others(path)
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


def _listed(store: Store) -> dict[str, tuple[str, str]]:
    """Of the files of scores, plans and hidden states that are there: SHA-256, and path of the JSON that says so."""
    digests: dict[str, tuple[str, str]] = {}
    with temporary_folder("push") as folder:
        for kind in KINDS:
            for name in [name for name in store.names(kind.folder) if name.endswith(".json")]:
                (folder / name).write_bytes(store.read(f"{kind.folder}/{name}") or b"")
                with suppress(CorruptError):  # a damaged one says nothing, and is replaced
                    about = read_listing(folder / name, kind)[0].files_of(kind)
                    digests |= {path: (file.sha256, f"{kind.folder}/{name}") for path, file in about.items()}
    return digests


def _send_others(
    store: Store, files: Mapping[str, Path | bytes], sha256: Mapping[str, str], listed: Mapping[str, tuple[str, str]]
) -> int:
    """Send those that are not there: parts of scores and plans before the JSON that names them."""
    present, sent = set(store.files()), 0
    for path in sorted(files, key=lambda path: (path.endswith(".json"), path)):
        theirs, beside = listed.get(path, (None, ""))
        if path in present and _is_same(store, path, files[path], sha256.get(path), theirs):
            continue
        if beside in present:  # it would name another file than the one that is there
            store.remove(beside)
            present.remove(beside)
        sent += _send(store, path, files[path])
    return sent


def _is_same(store: Store, path: str, content: Path | bytes, ours: str | None, theirs: str | None) -> bool:
    """ours, theirs: digests in the JSON beside the file, here and there; None where there is no such JSON."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if store.size(path) != size:
        return False
    if ours is None:
        ours = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_info(content).sha256
    return ours == (theirs or hashlib.sha256(store.read(path) or b"").hexdigest())


def _send(store: Store, path: str, content: Path | bytes) -> int:
    """Send one file; 1, to be counted."""
    if isinstance(content, Path):
        store.replace(content, path)
        return 1
    with temporary_folder("push") as folder:
        (folder / "content").write_bytes(content)
        store.replace(folder / "content", path)
    return 1
