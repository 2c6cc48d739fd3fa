"""A stand-in for the store of large files behind the Hub (xet): what its client, hf_xet, asks for.

Written: xorbs (compressed chunks that belong together), and shards (which chunks of which xorbs make up a file). Read: how a
file is put together, and ranges of bytes of xorbs. It knows no chunk before it came here: the question whether somebody else
has sent one is answered with no.
Source: https://huggingface.co/docs/xet, and openapi/ and xet_core_structures/ of github.com/huggingface/xet-core.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

FOOTER = b"XETBLOB"  # what may follow the chunks of a xorb begins so
HEADER, ENTRY = 48, 48  # bytes of a shard's header, and of everything in its list of files
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30
END_OF_FILES = "f" * 64


class Chunk(NamedTuple):
    """One chunk of a xorb: where it begins there, with its header, and ends, and its size as a part of a file."""

    first: int
    end: int
    size: int


class Term(NamedTuple):
    """Chunks [first, end) of a xorb, as a part of a file."""

    xorb: str
    first: int
    end: int


class XetStore:
    """The xorbs by their hash, and the files by theirs. `hash_of`: a file's hash by its SHA-256."""

    def __init__(self) -> None:
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Term]] = {}
        self.hash_of: dict[str, str] = {}
        self._chunks: dict[str, list[Chunk]] = {}

    def add_xorb(self, name: str, content: bytes) -> bool:
        """Take a xorb; False where it was there."""
        is_new = name not in self.xorbs
        self.xorbs[name], self._chunks[name] = content, list(_chunks(content))
        return is_new

    def add_shard(self, shard: bytes) -> dict[str, bytes]:
        """Take files; their content by SHA-256. Raises KeyError where a xorb is missing, ValueError for a wrong one."""
        contents, place = {}, HEADER
        while (name := _hex(shard[place : place + 32])) != END_OF_FILES:
            flags, count = struct.unpack_from("<2I", shard, place + 32)
            entries = [shard[place + ENTRY * n :][:ENTRY] for n in range(1, count + 1)]
            terms = [Term(_hex(one[:32]), *struct.unpack_from("<2I", one, 40)) for one in entries]
            place += ENTRY * (1 + count + (count if flags & HAS_VERIFICATION else 0))
            content = b"".join(self._unpacked(term) for term in terms)
            assert flags & HAS_METADATA, "the client says the SHA-256, which is the name in the commit"
            sha256 = _hex(shard[place : place + 32])
            place += ENTRY
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError(f"the chunks of {name} do not make up its content")
            self.files[name], self.hash_of[sha256], contents[sha256] = terms, name, content
        return contents

    def reconstruction(self, name: str, first: int, last: int | None, address: str) -> dict[str, Any] | None:
        """How the bytes [first, last] of a file are put together; None where it ends before them.

        address: of xorbs, before their hash.
        """
        begin, offset = 0, 0
        parts: list[tuple[Term, int]] = []
        for term in self.files[name]:
            kept = []
            for number in range(term.first, term.end):
                end = begin + self._chunks[term.xorb][number].size
                if end > first and (last is None or begin <= last):
                    offset = first - begin if not parts and not kept else offset
                    kept.append(number)
                begin = end
            if kept:
                size = sum(self._chunks[term.xorb][number].size for number in kept)
                parts.append((Term(term.xorb, kept[0], kept[-1] + 1), size))
        if first >= begin > 0:
            return None
        xorbs: dict[str, list[dict[str, Any]]] = {}
        for term in dict.fromkeys(term for term, _ in parts):
            chunks = self._chunks[term.xorb][term.first : term.end]
            where = {"start": chunks[0].first, "end": chunks[-1].end - 1}
            ranges = [{"chunks": {"start": term.first, "end": term.end}, "bytes": where}]
            xorbs.setdefault(term.xorb, []).append({"url": address + term.xorb, "ranges": ranges})
        terms = [
            {"hash": term.xorb, "unpacked_length": size, "range": {"start": term.first, "end": term.end}}
            for term, size in parts
        ]
        return {"offset_into_first_range": offset, "terms": terms, "xorbs": xorbs}

    def _unpacked(self, term: Term) -> bytes:
        chunks = self._chunks[term.xorb][term.first : term.end]
        return b"".join(_unpacked(self.xorbs[term.xorb][chunk.first : chunk.end]) for chunk in chunks)


def _hex(digest: bytes) -> str:
    """A hash as it is written: four numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def _header(chunk: bytes) -> tuple[int, int, int]:
    """Size in the xorb, way of compression, and size as a part of a file."""
    return int.from_bytes(chunk[1:4], "little"), chunk[4], int.from_bytes(chunk[5:8], "little")


def _chunks(xorb: bytes) -> list[Chunk]:
    chunks, place = [], 0
    while place < len(xorb) and not xorb.startswith(FOOTER, place):
        packed, _, size = _header(xorb[place : place + 8])
        chunks.append(Chunk(place, place + 8 + packed, size))
        place += 8 + packed
    return chunks


def _unpacked(chunk: bytes) -> bytes:
    """The content of a chunk: as it is, by LZ4, or by LZ4 with every fourth byte together."""
    _, way, size = _header(chunk)
    content = chunk[8:]
    if way == 0:
        return content
    grouped = bytes(pa.decompress(content, decompressed_size=size, codec="lz4"))
    if way == 1:
        return grouped
    mixed, place = np.empty(size, np.uint8), 0
    for n in range(4):
        count = len(mixed[n::4])
        mixed[n::4] = np.frombuffer(grouped, np.uint8, count, place)
        place += count
    return mixed.tobytes()
