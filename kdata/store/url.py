"""Files at a URL: s3://, gs://, az:// and whatever else fsspec opens.

A dataset at a URL has the names and bytes of a local one. A writer keeps a local copy of the small files (dataset.json,
manifest, index, tokenizer), which it copies from the URL when it starts. So any machine can continue where another
stopped. A shard belongs to the dataset once the manifest at the URL names it. Reading is in `kdata.store.url_dataset`.

An object store has no locks, so only one process may write to a URL at a time. A second one with the same cache (of the
same user of a machine, unless KDATA_CACHE differs) is refused when it starts, by the lock of the writer's copy. Any other is
refused as soon as the manifest is not the one that it wrote last.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kdata.errors import (
    ConfigError,
    CorruptError,
    DependencyError,
    FormatError,
    KdataError,
    MissingError,
    StorageError,
    causes,
    has_secret,
    never_show,
)
from kdata.format.files import REMEDIES, file_info, inside, storage_errors, temporary_folder
from kdata.format.manifest import read_info, read_manifest
from kdata.format.schema import DatasetInfo, FileInfo

SIZED = ("hf://", "http://", "https://")  # files of these clients can be opened without a question, by their size
WAIT = "too much was asked of it in a short time: wait some minutes"
DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
}  # of this machine, not the store
# What a connection failed for, the plainest cause first: errors, and names of those that clients have of their own.
CONNECTIONS_FAIL: list[tuple[tuple[type[BaseException], ...], str, str]] = [
    ((socket.gaierror,), "DNSError", "no such server is known: check the URL and the network"),
    ((ssl.SSLError,), "SSLError", "no secure connection: check the URL, this machine's clock and its certificates"),
    ((ConnectionRefusedError,), "(?!)", "no server listens there: check the URL, or wait until it runs"),
    ((TimeoutError,), "Timeout", "the server did not answer in time: check the network, or wait a moment"),
    (
        (ConnectionError,),
        "^(ReadError|WriteError|RemoteProtocolError|IncompleteRead|ClientPayloadError|ChunkedEncodingError|"
        "ConnectionClosedError)$",
        "the connection broke: check the network",
    ),
]
ABANDONED_SEC = 600  # a temporary file that nobody wrote to for so long was left by a process that ended
STAGING = "units-"  # prefix of the folders, at the URL, in which shards wait
# Errors of the stores' own clients that are no OSError.
CLIENT_ERRORS = {
    "aiohttp": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
}


def is_url(place: str | Path) -> bool:
    """Whether `place` is a URL to which a dataset can be written; hf:// is read only (`kdata push` writes there)."""
    return "://" in str(place) and not str(place).startswith("hf:")


def cache_dir() -> Path:
    """Where copies of datasets, and built-in corpora and models, are kept: KDATA_CACHE, or ~/.cache/kdata."""
    return Path(os.environ.get("KDATA_CACHE") or Path.home() / ".cache" / "kdata")


class Store:
    """One folder of a file system that fsspec opens; paths are relative to it.

    Args:
        url: for instance s3://BUCKET/NAME. Credentials come from where the store's client looks for them, never from the
            URL: that is shown and logged.
    Raises:
        ConfigError: an unknown kind of URL, or a password in it.
        DependencyError: the package for such URLs is not installed.
    """

    commit: str | None = None  # of a repository on the Hub

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        parts = urlsplit(url)
        if parts.password or has_secret(url):
            raise ConfigError(
                f"{parts.scheme}://...@{parts.hostname}{parts.path}: a URL is shown and logged, so it must hold no password "
                "and no token; put credentials where the store's client looks for them (environment, configuration file)"
            )
        if (
            len(parts.username or "") >= 8
        ):  # may be a token, and clients repeat it without its URL; shorter ones are words
            never_show(str(parts.username))
        try:
            self.fs, self._root = url_to_fs(self.url)
        except ImportError as error:
            raise DependencyError(f"{parts.scheme}:// needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{self.url}: {error}") from error

    @property
    def canonical(self) -> str:
        """One spelling for all URLs of this folder that fsspec or, for file://, this machine's disk takes for the same."""
        from fsspec.implementations.local import LocalFileSystem

        root = os.path.realpath(self._root) if isinstance(self.fs, LocalFileSystem) else self._root
        url: str = self.fs.unstrip_protocol(root.rstrip("/"))
        return url

    def _path(self, relative: str) -> str:
        return f"{self._root}/{relative}"

    def read(self, relative: str) -> bytes | None:
        """Content of a file; None where the file does not exist."""
        with self._errors("read", relative):
            try:
                content: bytes = self.fs.cat_file(self._path(relative))
                return content
            except FileNotFoundError:
                return None

    @property
    def is_file(self) -> bool:
        """Whether the URL is that of one file."""
        with self._errors("read", ""):
            return bool(self.fs.isfile(self._root))

    def size(self, relative: str) -> int:
        """Size of a file in bytes; 0 where the file does not exist."""
        with self._errors("read", relative):
            try:
                return int(self.fs.info(self._path(relative))["size"])
            except FileNotFoundError:
                return 0

    def open_ranges(
        self,
        relative: str,
        *,
        size: int | None = None,
        cache_type: str = "none",
        cache_options: dict[str, Any] | None = None,
    ) -> Any:
        """A file opened for reading; each read fetches exactly its range of bytes, but for what the cache keeps.

        Args:
            size: of the file, where it is known; clients whose files need no more than that then ask for nothing here.
            cache_type, cache_options: name of a cache of fsspec, and its arguments.
        """
        known = {} if size is None or not self.url.startswith(SIZED) else {"size": size}
        options = {"cache_type": cache_type, "cache_options": cache_options or {}, **known}
        with self._errors("read", relative):
            return self.fs.open(self._path(relative), "rb", **options)

    @property
    def has_listings(self) -> bool:
        """Whether it can say which files there are; a web server cannot."""
        return urlsplit(self.url).scheme not in ("http", "https")

    def open_on(self, relative: str, block: int) -> Any:
        """A file opened to be read from its beginning on, `block` bytes ahead."""
        with self._errors("read", relative):
            return self.fs.open(self._path(relative), "rb", cache_type="readahead", block_size=block)

    def token(self, relative: str) -> str:
        """What the store says of a file's version: it differs where the file was written again."""
        with self._errors("read", relative):
            return str(self.fs.ukey(self._path(relative)))

    def names(self, folder: str = "") -> list[str]:
        """Names in a folder; none on a web server, which has no listings."""
        if not self.has_listings:
            return []
        with self._errors("read", folder):
            try:
                paths = self.fs.ls(self._path(folder).rstrip("/"), detail=False)
                return [str(path).rstrip("/").rpartition("/")[2] for path in paths]
            except FileNotFoundError:
                return []

    def files(self) -> list[str]:
        """Relative paths of all files, in order. Raises StorageError where the store cannot be read."""
        with self._errors("read", ""):
            root = self._root.rstrip("/") + "/"
            return sorted(str(path).removeprefix(root) for path in self.fs.find(self._root))

    def get(self, relative: str, target: Path) -> None:
        """Copy a file as it is, without a check of its bytes. Raises StorageError where it cannot be read."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._errors("read", relative):
            self.fs.get_file(self._path(relative), str(target))

    def put(self, source: Path, relative: str) -> None:
        """Copy a local file to a name that nobody reads yet."""
        self._write(self.fs.put_file, str(source), relative)

    def replace(self, source: Path, relative: str) -> None:
        """Copy a local file to a temporary name, then move it, so that readers see the old bytes or the new ones."""
        self.put(source, f"{relative}.tmp")
        self.move(f"{relative}.tmp", relative)

    def move(self, source: str, target: str, place: Store | None = None) -> None:
        """Rename a file and replace the target, which may be in another folder of the same file system.

        Where a store cannot rename, fsspec copies and deletes.
        """
        (place or self)._write(self.fs.mv, self._path(source), target)

    def _write(self, action: Callable[[str, str], object], source: str, relative: str) -> None:
        """Put or move a file; make its folder first where the store has folders."""
        path = self._path(relative)
        with self._errors("write", relative):
            try:
                action(source, path)
            except FileNotFoundError:
                # Only now, because clients of object stores would make a bucket from a mistyped name.
                if not self.fs.exists("/" if path.startswith("/") else path.split("/")[0]):
                    raise
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                action(source, path)

    def fetch(self, relative: str, target: Path, info: FileInfo) -> None:
        """Copy a file to `target`, unless `target` has this digest. Raises CorruptError where the file has another."""
        if target.is_file() and file_info(target) == info:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            with self._errors("read", relative):
                try:
                    self.fs.get_file(self._path(relative), str(temporary))
                except FileNotFoundError as error:
                    raise CorruptError(
                        f"{self.url}/{relative} is missing, but the manifest names it; restore it from a copy"
                    ) from error
            if file_info(temporary) != info:
                raise CorruptError(
                    f"{self.url}/{relative} is damaged: its SHA-256 is not the one in the manifest; restore it from a copy"
                )
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, relative: str) -> None:
        """Delete a file, or a folder with its content."""
        with self._errors("write", relative):
            self.fs.rm(self._path(relative), recursive=True)

    def client_errors(self) -> tuple[type[BaseException], ...]:
        """What the store's client raises beside OSError."""
        return _client_errors()

    def forget_listings(self) -> None:
        """Make the client list again at the next read, because other processes write too."""
        self.fs.invalidate_cache()

    @contextmanager
    def _errors(self, what: str, relative: str) -> Iterator[None]:
        if what == "read":
            self.forget_listings()
        with self.errors(what, relative):
            yield

    def _remedy(self, error: BaseException, what: str) -> str:
        """Of this machine's disk where a local file that is not the store's was refused, else of the store."""
        for cause in causes(error):
            place = str(getattr(cause, "filename", ""))
            is_own = what == "read" and place.startswith(self._path(""))
            if isinstance(cause, OSError) and cause.errno in REMEDIES and os.path.isabs(place) and not is_own:
                return REMEDIES[cause.errno]
        return remedy_of(error, what)

    @contextmanager
    def errors(self, what: str, relative: str) -> Iterator[None]:
        """Raise what the store's client raises as StorageError, in one line with cause and remedy.

        Args:
            what: "read" or "write", for the message.
        """
        failures: tuple[type[BaseException], ...] = (OSError, *self.client_errors())
        try:
            yield
        except failures as error:
            if isinstance(error, KdataError):
                raise
            said = re.sub(r" For more (information|details),? (check:|see) \S+", "", " ".join(str(error).split()))
            reason = f"{type(error).__name__}: {said}"
            raise StorageError(
                f"cannot {what} {self.url}/{relative}: {reason}; {self._remedy(error, what)}, then run the same command "
                "again. What was committed is intact."
            ) from error


def is_limit(error: BaseException) -> bool:
    """Whether a server refused because too much was asked of it in a short time (429)."""
    return _status_of(error) == 429


def _status_of(error: BaseException) -> int:
    """The status of HTTP with which a server answered; 0 where it did not, or the client does not say."""
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else 0


def remedy_of(error: BaseException, what: str) -> str:
    """What a person can do about an error of a store's client at a "read" or "write"."""
    status, chain = _status_of(error), [*causes(error)]
    if status == 429:
        return WAIT
    if status in (401, 403) or isinstance(error, PermissionError):
        return "access is refused: check the credentials (HF_TOKEN on the Hub) and the name"
    if what == "write" and (status in (404, 410) or isinstance(error, FileNotFoundError)):
        return "there is no such place: check the name, and make the bucket first"
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return "it is not there, or not any more: check the name, and open the newest version"
    if status >= 500:
        return "the server failed: wait a moment"
    numbers = [cause.errno for cause in chain if isinstance(cause, OSError) and cause.errno in DISK]
    if numbers:
        return REMEDIES[numbers[0]]
    for kinds, names, remedy in CONNECTIONS_FAIL:
        if any(isinstance(cause, kinds) or re.search(names, type(cause).__name__) for cause in chain):
            return remedy
    return "check the URL, the network and the credentials"


def _client_errors() -> tuple[type[BaseException], ...]:
    """The errors of those clients that are loaded."""
    loaded = [(sys.modules[name], kinds) for name, kinds in CLIENT_ERRORS.items() if name in sys.modules]
    return tuple(getattr(module, kind) for module, kinds in loaded for kind in kinds if hasattr(module, kind))


def copy_of(url: str, purpose: str) -> Path:
    """Folder of a local copy in the cache. Readers and writers have copies of their own (`purpose`)."""
    key = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return cache_dir() / purpose / key / url.rstrip("/").rpartition("/")[2]


def mirror(store: Store, root: Path, folders: tuple[str, ...]) -> bool:
    """Bring the copy in `root` up to date: its JSON files, and the files in `folders` ("index", "tokenizer", ...).

    Files of the copy that the manifest does not name are removed; those in other folders stay without a check. Sidecars
    and plans of the copy stay, unless the store now has another dataset.

    Returns:
        False where the store has no dataset; the copy is removed then.
    Raises:
        CorruptError: a file at the store is not what was committed.
        StorageError: the store cannot be read.
    """
    about, lines = store.read("dataset.json"), store.read("manifest.jsonl")
    if about is None:
        shutil.rmtree(root, ignore_errors=True)
        if lines is not None:
            raise CorruptError(f"{store.url} has a manifest but no dataset.json; restore it from a copy of the dataset")
        return False
    with storage_errors(root), temporary_folder("mirror") as folder:
        (folder / "dataset.json").write_bytes(about)
        (folder / "manifest.jsonl").write_bytes(lines or b"")
        info, manifest = read_info(folder), read_manifest(folder, heal=True)
        if _another(root, info):
            shutil.rmtree(root)
        named = {f"tokenizer/{name}": about for name, about in info.tokenizer_files.items()}
        named |= {path: about for entry in manifest for path, about in entry.files.items()}
        for path in [p for f in ("data", "index", "rejects", "tokenizer") for p in (root / f).glob("*")]:
            if path.relative_to(root).as_posix() not in named and not _is_coming(path):
                path.unlink(missing_ok=True)
        for relative, file in named.items():
            if relative.split("/")[0] in folders:
                store.fetch(relative, inside(root, relative), file)
        root.mkdir(parents=True, exist_ok=True)
        for name in ("manifest.jsonl", "dataset.json"):
            shutil.copyfile(folder / name, root / name)
    return True


def is_abandoned(path: Path, about: os.stat_result) -> bool:
    """Whether this is half a copy, left by a process that ended."""
    return path.suffix == ".tmp" and time.time() - about.st_mtime > ABANDONED_SEC


def _is_coming(path: Path) -> bool:
    """Whether another process may be copying this file right now, under a temporary name."""
    try:
        return path.suffix == ".tmp" and not is_abandoned(path, path.stat())
    except FileNotFoundError:
        return False


def _another(root: Path, info: DatasetInfo) -> bool:
    """Whether `root` holds a copy of another dataset, or something else."""
    try:
        return root.exists() and read_info(root).identity_digest != info.identity_digest
    except (MissingError, CorruptError, FormatError):
        return True
