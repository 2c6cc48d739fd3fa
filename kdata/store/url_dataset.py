"""A dataset at a URL or on the Hub, read where it is: each file is copied here when its bytes are first needed.

Any URL that fsspec opens, and hf:// at one commit. Opening copies dataset.json and the manifest into the cache. A query
reads ranges of bytes: a Parquet footer, then the column chunks that it names. Rows are decoded from whole shards, which are
copied one by one. Scores and plans that are made here are written into the copy.

Every file that is copied is compared with its digest in the manifest before use. The ranges that a query reads are not,
because only a whole file has a digest; `Dataset.unchecked` then names the view. With check="whole" a query reads copies.
Columns of the index that plan and loader need (ids, lengths, ...) are read as ranges, too, and compared with the copy of a
shard's index, which is made before any row of the shard is read. So no row is trained on that was not compared.

Copies of payloads are bounded in size, and a loader has them made ahead of its use: see `kdata.store.cache`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from kdata.calls import validated
from kdata.errors import ConfigError, CorruptError, MismatchError, MissingError, StorageError, first_line
from kdata.format.files import inside, lock_of, matches, temporary_folder, write_atomically
from kdata.format.json_text import read_json
from kdata.format.schema import FileInfo, ManifestEntry, index_schema
from kdata.store.background import Background, ctrl_c_first, interruptible
from kdata.store.cache import LIMIT_VARIABLE, THREADS, Ahead, cache_limit, keep_all
from kdata.store.dataset import Dataset
from kdata.store.hub import HubStore
from kdata.store.index import read_index, replaced
from kdata.store.listed import COPIED, PLANS, SCORES, Kind, Listing, read_listing
from kdata.store.queryable import Check
from kdata.store.ranges import KeptRanges, Ranges, key_of, place_of
from kdata.store.sql import CONNECTIONS, Values, files_view, unglobbed
from kdata.store.sql_errors import refuse_storage
from kdata.store.url import Store, copy_of, mirror

SCHEME = "kdata-index"
FOOTER = 16384  # bytes that DuckDB reads first, of the end of a file
FAILURES = (OSError, ValueError)  # of an answer that is no part of the file
# Columns of the index that are read whole, with the file, because they are most of it.
LONG = {"text", "messages", "tools", "prompt"}
# Columns that plan, loader and trainer need: read together, because each reading of a file begins with its footer.
SHORT = ["id", "domain", "num_tokens", "num_target_tokens", "nll", "mean_entropy", "kept_mass"]


class Footers:
    """Footers that are fetched before DuckDB asks for them, which it does one file after the other.

    At most two for each connection are under way or wait for DuckDB. So little is fetched in vain where a query ends early,
    and a process that ends does not wait for the rest.

    Args:
        fetch: fetches the footer of a file; False where it cannot, and then no others are until `stop`.
    """

    def __init__(self, fetch: Callable[[str, FileInfo], bool]) -> None:
        self._fetch, self._lock = fetch, threading.Lock()
        self._threads = Background(CONNECTIONS, "footer")
        self._wanted: dict[str, FileInfo] = {}
        self._waiting: dict[str, FileInfo] = {}
        self._coming: dict[str, Future[None]] = {}
        self._failed, self._queries = False, 0

    @contextmanager
    def query(self) -> Iterator[None]:
        """While a query runs. When the last one ends, however it does, nothing more is fetched ahead."""
        with self._lock:
            self._queries += 1
        try:
            yield
        finally:
            with self._lock:
                self._queries -= 1
                is_last = self._queries == 0
            if is_last:
                self.stop()

    def want(self, relative: str, info: FileInfo) -> None:
        """Fetch it soon, once."""
        with self._lock:
            if self._wanted.get(relative) != info:
                self._wanted[relative] = self._waiting[relative] = info
                self._begin()

    def wait(self, relative: str) -> None:
        """Return when a footer that is under way is here; one that was not begun is the caller's."""
        with self._lock:
            self._waiting.pop(relative, None)
            coming = self._coming.pop(relative, None)
            self._begin()
        if coming is not None:
            with suppress(CancelledError):
                coming.result()

    def stop(self) -> None:
        """Begin no more of those that were wanted so far."""
        with self._lock:
            for relative in self._waiting:
                self._wanted.pop(relative, None)
            for relative, coming in self._coming.items():
                if coming.cancel():
                    self._wanted.pop(relative, None)
            self._waiting, self._coming, self._failed = {}, {}, False

    def _begin(self) -> None:
        while self._waiting and len(self._coming) < 2 * CONNECTIONS:
            relative = next(iter(self._waiting))
            self._coming[relative] = self._threads.submit(self._work, relative, self._waiting.pop(relative))

    def _work(self, relative: str, info: FileInfo) -> None:
        if not self._failed and not self._fetch(relative, info):
            self._failed = True  # others would wait in vain; DuckDB's own reading says what is wrong


class RangeFiles(AbstractFileSystem):
    """The files of one store as DuckDB opens them, SCHEME://PATH, each read being one range."""

    protocol = SCHEME
    cachable = False

    def __init__(self, store: Store, ranges: Ranges) -> None:
        super().__init__()
        self._store, self._ranges, self._place = store, ranges, place_of(store)
        self._known: dict[str, FileInfo] = {}
        self._own: tuple[int, Footers] | None = None  # with the process: a fork has no threads

    def know(self, relative: str, info: FileInfo) -> str:
        """Say what a file is by its manifest, so that its parts are kept in the cache; its name here.

        Its footer is fetched from now on.
        """
        self._known[relative] = info
        self._footers().want(relative, info)
        return f"{SCHEME}://{relative}"

    def _footers(self) -> Footers:
        if self._own is None or self._own[0] != os.getpid():
            self._own = os.getpid(), Footers(self._fetch_footer)
        return self._own[1]

    def _fetch_footer(self, relative: str, info: FileInfo) -> bool:
        begin = max(info.bytes - FOOTER, 0)
        if self._ranges.read(self._key(info), begin, info.bytes) is not None:
            return True
        failures: tuple[type[BaseException], ...] = (*FAILURES, *self._store.client_errors())
        try:
            with self._opened(relative, info) as file:
                file.seek(begin)
                file.read()
        except failures:
            return False
        return True

    def query(self) -> AbstractContextManager[None]:
        """See `Footers.query`."""
        return self._footers().query()

    def forget(self) -> None:
        """Remove the kept parts of the files that were read, because something was wrong with one of them."""
        self._footers().stop()
        for info in self._known.values():
            self.drop(info)

    def drop(self, info: FileInfo) -> None:
        """Remove the kept parts of a file, because all of it was fetched and compared."""
        self._ranges.forget(self._key(info))

    def _key(self, info: FileInfo) -> str:
        return key_of(self._place, info.sha256)

    def _relative(self, path: str) -> str:
        """The path inside the store. Raises PermissionError where it leaves it."""
        pure = PurePosixPath(str(self._strip_protocol(path)))
        if pure.is_absolute() or ".." in pure.parts:
            raise PermissionError(f"{path} lies outside of {self._store.url}")
        return str(pure)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        relative = self._relative(path)
        info = self._known.get(relative)
        if info is None:
            return self._store.open_ranges(relative)
        self._footers().wait(relative)
        return self._opened(relative, info)

    def _opened(self, relative: str, info: FileInfo) -> Any:
        kept = {
            "ranges": self._ranges,
            "key": self._key(info),
            "errors": partial(self._store.errors, "read", relative),
        }
        return self._store.open_ranges(relative, size=info.bytes, cache_type=KeptRanges.name, cache_options=kept)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Size and kind of a file."""
        relative = self._relative(path)
        size = self._known[relative].bytes if relative in self._known else self._store.size(relative)
        return {"name": relative, "size": size, "type": "file"}

    def glob(self, path: str, **options: Any) -> list[str]:
        """The file itself: names come in full, and a web server has no listings."""
        return [f"{SCHEME}://{self._strip_protocol(path)}"]

    def modified(self, path: str) -> datetime:
        """Always the same: what is committed does not change."""
        return datetime(2000, 1, 1, tzinfo=UTC)


class RemoteDataset(Dataset):
    """A dataset at a URL or on the Hub. `path` is the copy in the cache, with those files that were needed so far.

    Args:
        address: for instance s3://BUCKET/NAME, https://HOST/NAME, hf://OWNER/NAME or hf://OWNER/NAME@REVISION.
        commit: of the Hub's repository; None takes the newest commit of the revision.
    Raises:
        MissingError: there is no dataset.
        CorruptError, StorageError: see `kdata.store.url.mirror`.
    """

    def __init__(self, address: str, commit: str | None = None, check: Check = "first") -> None:
        ranges = Ranges()  # first, because it may refuse the settings
        self._store = HubStore(address, commit) if address.startswith("hf://") else Store(address)
        root = copy_of(self._store.url, "datasets")
        root.parent.mkdir(parents=True, exist_ok=True)
        # Readers wait for each other, not for a scoring; another one would change the copy while it is read.
        with lock_of(root.with_name(f"{root.name}.copy"), wait=True):
            while True:
                if not mirror(self._store, root, ()):
                    raise MissingError(f"{address} is not a kdata dataset: it has no dataset.json")
                try:
                    super().__init__(root, check)
                except CorruptError:
                    if self._store.read("dataset.json") == (root / "dataset.json").read_bytes():
                        raise
                    continue  # a writer has replaced both between the two reads
                break
        self.place = address
        # Files of the copy, with the digest that they have, and what they were when they were compared.
        self._copies: dict[tuple[str, str], tuple[int, int]] = {}
        self._files = RangeFiles(self._store, ranges)
        self._payloads = {self.file_name(entry, "data"): entry for entry in self.manifest}
        self._ahead = Ahead(self._copy_payload, self._payload_place)
        self._columns: dict[str, pa.ChunkedArray] = {}  # of the index, read as ranges
        self._compared: dict[str, int] = {}  # shards, with the number of those columns that were compared
        self._keeper: int | None = None

    def __del__(self) -> None:
        if getattr(self, "_keeper", None) is not None:
            os.close(self._keeper)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[type[Dataset], tuple[Any, ...]]:
        return RemoteDataset, (self.place, self._store.commit, self.check)

    def shard_file(self, entry: ManifestEntry, folder: str) -> Path:
        """See `Dataset.shard_file`; it is copied at first use."""
        relative = self.file_name(entry, folder)
        try:
            if folder == "data":
                self._ahead.get(relative)
                return inside(self.path, relative)
            path = self._copied(relative, entry.files[relative])
        except CorruptError:
            self._refuse_replaced(entry)
            raise
        if folder == "index":
            self._compare_columns(entry, path)
        return path

    def _copied(self, relative: str, info: FileInfo) -> Path:
        """Path of a copy of a file that has the digest in `info`."""
        path = inside(self.path, relative)
        if not self._is_as_compared(relative, info):
            self._store.fetch(relative, path, info)
            self._files.drop(info)
            about = path.stat()
            self._copies[relative, info.sha256] = about.st_ino, about.st_mtime_ns
        return path

    def _is_as_compared(self, relative: str, info: FileInfo) -> bool:
        """Whether the copy was compared, and is the same file still: others may remove or replace it."""
        try:
            about = inside(self.path, relative).stat()
        except FileNotFoundError:
            return False
        return self._copies.get((relative, info.sha256)) == (about.st_ino, about.st_mtime_ns)

    def _copy_payload(self, relative: str) -> None:
        """And the shard's index: it is compared before a row is read, and a step would wait for it."""
        entry = self._payloads[relative]
        for name in (relative, self.file_name(entry, "index")):
            self._copied(name, entry.files[name])

    def _payload_place(self, relative: str) -> tuple[Path, int]:
        return inside(self.path, relative), self._payloads[relative].files[relative].bytes

    @property
    def commit(self) -> str | None:
        """See `Dataset.commit`."""
        return self._store.commit

    def listings(self, kind: Kind) -> dict[str, Listing] | None:
        """See `Dataset.listings`: those at the URL."""
        if not self._store.has_listings:
            return None
        listings = {}
        with temporary_folder("listings") as folder:
            (folder / kind.folder).mkdir()
            for name in self._names(kind.folder):
                path = folder / kind.folder / f"{name}.json"
                path.write_bytes(self._store.read(f"{kind.folder}/{name}.json") or b"")
                listings[name] = read_listing(path, kind)[0]
        return listings

    def copy_to(self, root: Path, copied: Callable[[int], None]) -> None:
        """Copy everything to a folder; what is there with the right digest stays. dataset.json and the manifest come last.

        Args:
            copied: is called with the bytes of each file of a shard that is there now, from any thread.
        Raises:
            MismatchError: the dataset has changed since it was opened.
            CorruptError, StorageError: see `kdata.store.url.Store.fetch`.
        """
        of_shards = {path: info for entry in self.manifest for path, info in entry.files.items()}
        files = {f"tokenizer/{name}": info for name, info in self.info.tokenizer_files.items()} | of_shards
        small: dict[str, bytes] = {"README.md": self._store.read("README.md") or b""}
        for kind in (SCORES, PLANS):
            for name, listing in (self.listings(kind) or {}).items():
                small[f"{kind.folder}/{name}.json"] = self._store.read(f"{kind.folder}/{name}.json") or b""
                files |= listing.files_of(kind)
        for relative in ("manifest.jsonl", "dataset.json"):
            small[relative] = self._store.read(relative) or b""

        def fetch(file: tuple[str, FileInfo]) -> None:
            self._store.fetch(file[0], inside(root, file[0]), file[1])
            self._files.drop(file[1])
            if file[0] in of_shards:
                copied(file[1].bytes)

        threads = Background(THREADS, "copy")
        futures = [threads.submit(fetch, file) for file in files.items()]
        try:
            for future in futures:
                future.result()
        except Exception:
            threads.close()
            for future in futures:  # under way: the folder's lock is about to be let go
                with suppress(CancelledError):
                    future.exception()
            raise
        finally:  # at Ctrl-C what waits is not begun, and nothing is waited for, because the process ends
            threads.close()
        for path in [path for path in root.rglob("*") if path.is_file()]:
            if path.relative_to(root).as_posix() not in {*files, *small}:
                path.unlink()
        for relative, content in small.items():
            if content:
                inside(root, relative).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(inside(root, relative), content)
        there = Dataset(root)
        if there.info != self.info or there.manifest != self.manifest:
            raise MismatchError(f"{self.place} has changed since it was opened; run the same command again")

    @property
    def streams(self) -> bool:
        """See `Dataset.streams`."""
        return True

    @property
    def num_waits(self) -> int:
        """How often a reader had to wait for a payload that was not copied yet."""
        return self._ahead.waits

    def copy_ahead(self, shards: Iterable[int]) -> None:
        """See `Dataset.copy_ahead`. Payloads of other shards may be removed from the cache from now on."""
        numbers = list(shards)
        for shard in [number for number in self._readers if number not in numbers]:
            del self._readers[shard]  # an open file that is removed keeps its place on the disk
        self._ahead.want(self.file_name(self.manifest[number], "data") for number in numbers)

    @validated
    def index(self, columns: list[str] | None = None) -> pa.Table:
        """See `Dataset.index`. Short columns are read as ranges; they are compared when a row of their shard is read."""
        if columns is None or self.check == "whole" or not self.manifest or not LONG.isdisjoint(columns):
            return super().index(columns)
        if unknown := sorted(set(columns) - set(index_schema().names)):
            raise ConfigError(f"the index has no column {unknown[0]!r}; it has {index_schema().names}")
        missing = [name for name in dict.fromkeys(columns) if name not in self._columns]
        if missing:
            missing = [name for name in dict.fromkeys([*missing, *SHORT]) if name not in self._columns]
            table = self.index_ranges(self.manifest, missing)
            self._columns |= dict(zip(missing, table.columns, strict=True))
        schema = pa.schema([index_schema().field(name) for name in columns])
        return pa.table([self._columns[name] for name in columns], schema=schema)

    def index_ranges(self, entries: list[ManifestEntry], columns: list[str]) -> pa.Table:
        """See `Dataset.index_ranges`: of files at the URL, the ranges of bytes that hold these columns."""
        files = [self.sql_file(entry, "index") for entry in entries]
        schema = pa.schema([index_schema().field(name) for name in columns])
        with self._files.query(), ctrl_c_first(), duckdb.connect() as connection:
            connection.execute("set enable_progress_bar = false")
            connection.register_filesystem(self._files)
            connection.execute("set parquet_metadata_cache = true")
            connection.execute(f"set threads = {max(CONNECTIONS, os.cpu_count() or 1)}")
            try:
                files_view(connection, "part", files, index_schema())
                there = connection.table("part").columns
                # A column that all parts lack, because they are older, is null.
                names = ", ".join(f'"{name}"' if name in there else f'null as "{name}"' for name in columns)
                query = f"select {names} from part"
                table = interruptible(connection, lambda: connection.sql(query).to_arrow_table()).cast(schema)
            except (duckdb.Error, pa.ArrowException, ValueError) as error:
                if isinstance(error, duckdb.Error):
                    refuse_storage(self, error)
                self._files.forget()
                for entry in entries:
                    self._refuse_replaced(entry)
                raise StorageError(
                    f"{self.place}: columns {columns} of the index cannot be read: {first_line(error)}; try "
                    "again, and see `kdata verify` where that does not help"
                ) from error
        if table.num_rows != sum(entry.rows for entry in entries):
            self._files.forget()
            raise CorruptError(
                f"{self.place}: the index has {table.num_rows:,} rows, and the manifest says "
                f"{sum(entry.rows for entry in entries):,}; restore it from a copy"
            )
        return table

    def _compare_columns(self, entry: ManifestEntry, path: Path) -> None:
        """Compare columns that were read as ranges with those of a shard's index file, which has the right digest."""
        if self._compared.get(entry.name) == len(self._columns):
            return
        names = list(self._columns)
        start = int(self.shard_starts[self.manifest.index(entry)])
        theirs = read_index(path, names)
        for name in names:
            if not _equal(self._columns[name].slice(start, entry.rows), theirs[name]):
                self._files.forget()
                raise CorruptError(
                    f"{self.place}: column {name} of the index of shard {entry.name} was read with other values than {path} "
                    "has, whose digest is right; the store or the network changed bytes. Run the same command again"
                )
        self._compared[entry.name] = len(names)

    def _refuse_replaced(self, entry: ManifestEntry) -> None:
        """See `Dataset._refuse_replaced`: the manifest at the URL decides, the copy is that of when it was opened."""
        content = self._store.read("manifest.jsonl")
        if content is not None and any(info.sha256.encode() not in content for info in entry.files.values()):
            raise replaced(self.place, entry.name)

    @property
    def tokenizer_dir(self) -> Path | None:
        """See `Dataset.tokenizer_dir`; its files are copied at first use."""
        for name, info in self.info.tokenizer_files.items():
            self._copied(f"tokenizer/{name}", info)
        return super().tokenizer_dir

    def fetch(self) -> None:
        """See `Dataset.fetch`. Scores and plans are copied where the store can list them (a web server cannot).

        Raises StorageError where the payloads do not fit into the cache.
        """
        size = sum(self._payload_place(relative)[1] for relative in self._payloads)
        if size > cache_limit():
            raise StorageError(
                f"{self.place}: its payloads take {size:,} bytes, and the cache has {cache_limit():,}; raise "
                f"{LIMIT_VARIABLE}, or copy it to a folder with `kdata pull`"
            )
        if self._keeper is None:
            self._keeper = keep_all(self.path)
        for entry in self.manifest:
            for relative, info in entry.files.items():
                self._copied(relative, info)
        _ = self.tokenizer_dir
        for name in self._names("scores"):
            self.fetch_sidecar(name)
            for relative, info in read_listing(self.path / "scores" / f"{name}.json", SCORES)[0].files.items():
                self.score_part(relative, info)
        for name in self._names("plans"):
            self.fetch_plan(name)

    def _names(self, folder: str) -> list[str]:
        return sorted(name.removesuffix(".json") for name in self._store.names(folder) if name.endswith(".json"))

    def sql(
        self, query: str, parameters: list[Any] | dict[str, Any] | None = None, *, values: Values = "arrow"
    ) -> pa.Table:
        """See `Dataset.sql`."""
        with self._files.query():
            return super().sql(query, parameters, values=values)

    @contextmanager
    def sql_stream(
        self, query: str, parameters: list[Any] | dict[str, Any] | None = None, *, values: Values = "arrow"
    ) -> Iterator[pa.RecordBatchReader]:
        """See `Dataset.sql_stream`."""
        with self._files.query(), super().sql_stream(query, parameters, values=values) as batches:
            yield batches

    @property
    def sql_filesystem(self) -> Any:
        """See `Dataset.sql_filesystem`."""
        return self._files

    def sql_file(self, entry: ManifestEntry, folder: str, *, compare: bool = True) -> str:
        """See `Dataset.sql_file`; a file that stays at the URL is not compared."""
        if self.check == "whole":
            return super().sql_file(entry, folder)
        relative = self.file_name(entry, folder)
        return self._located(relative, entry.files[relative], "rows" if folder == "index" else folder)

    def _located(self, relative: str, info: FileInfo, view: str) -> str:
        """The name by which DuckDB opens a file of a view: the copy, if there is a good one, else the file at the URL."""
        if self._has_copy(relative, info):
            return unglobbed(inside(self.path, relative).resolve())
        self.unchecked.add(view)
        return self._files.know(relative, info)

    def _has_copy(self, relative: str, info: FileInfo) -> bool:
        """Whether there is a copy with the digest in `info`, or a file that was made in its place."""
        path = inside(self.path, relative)
        if not self._is_as_compared(relative, info) and path.is_file() and matches(path, info):
            about = path.stat()
            self._copies[relative, info.sha256] = about.st_ino, about.st_mtime_ns
        return self._is_as_compared(relative, info)

    def _listed_file(self, relative: str, info: FileInfo, kind: Kind, compare: bool) -> str:
        """See `Dataset.listed_files`; the parts of a score stay at the URL, a plan was copied."""
        if kind is SCORES and self.check != "whole":
            return self._located(relative, info, f"scores.{PurePosixPath(relative).parts[1]}")
        if kind is SCORES and not self._has_copy(relative, info):
            self.score_part(relative, info)
        return super()._listed_file(relative, info, kind, compare)

    def score_part(self, relative: str, info: FileInfo) -> Path:
        """See `Dataset.score_part`; it is copied at first use."""
        path = inside(self.path, relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / COPIED).touch()
        return self._copied(relative, info)

    def fetch_hidden(self, name: str) -> None:
        """See `Dataset.fetch_hidden`. What was made in the copy stays, if it belongs to the dataset as it is now."""
        if not self._is_current(f"hidden/{name}.json"):
            self._copy_small(f"hidden/{name}.json")

    def hidden_part(self, relative: str, info: FileInfo) -> Path:
        """See `Dataset.hidden_part`; it is copied at first use."""
        return self._copied(relative, info)

    def fetch_sidecar(self, name: str) -> None:
        """See `Dataset.fetch_sidecar`. One that was made in the copy stays, if it belongs to the dataset as it is now."""
        folder = self.path / "scores" / name
        made_here = folder.is_dir() and not (folder / COPIED).exists()
        if not (made_here and self._is_current(f"scores/{name}.json")):
            self._copy_small(f"scores/{name}.json")

    def fetch_plan(self, name: str) -> None:
        """See `Dataset.fetch_plan`. A plan in the copy stays, if it belongs to the dataset as it is now."""
        if not self._is_current(f"plans/{name}.json"):
            self._copy_small(f"plans/{name}.parquet")
            self._copy_small(f"plans/{name}.json")

    def fetch_listed(self) -> None:
        """See `Dataset.fetch_listed`."""
        for name in self._names("scores"):
            self.fetch_sidecar(name)
        for name in self._names("plans"):
            self.fetch_plan(name)

    def _is_current(self, relative: str) -> bool:
        """Whether the copy has a score or plan that belongs to the dataset as it is now."""
        path = self.path / relative
        try:
            return path.is_file() and read_json(path)["dataset_fingerprint"] == self.content_digest
        except (ValueError, KeyError, TypeError):  # damaged
            return False

    def _copy_small(self, relative: str) -> None:
        """Copy a file that the manifest does not name, if it exists."""
        content = self._store.read(relative)
        if content is not None:
            (self.path / relative).parent.mkdir(exist_ok=True)
            write_atomically(self.path / relative, content)

    def check_index(self) -> None:
        """See `Dataset.check_index`. The index stays at the URL, where only a whole file has a digest, but for "whole"."""
        if self.check == "whole":
            super().check_index()


def _equal(first: pa.ChunkedArray, second: pa.ChunkedArray) -> bool:
    """Whether two columns of one type have the same values; NaN equals NaN."""
    if pa.types.is_floating(first.type):
        ours, theirs = first.to_numpy(), second.to_numpy()
        same_nulls = bool(first.is_null().equals(second.is_null()))
        return same_nulls and bool(np.array_equal(ours, theirs, equal_nan=True))
    return bool(first.equals(second))
