"""A shard of version 3 of the codec packed, read by the text of schemas/README.md (section 3), with nothing of kdata."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import pyarrow as pa

FAR = ("logprob", "rank", "entropy", "num_exact", "num_drawn", "token_bytes")


def ids_by_number(file: pa.ipc.RecordBatchFileReader) -> list[int]:
    """The id of each number."""
    vocab = int(file.schema.metadata[b"kdata.vocab_size"])
    count, text = file.metadata[b"kdata.common_ids"].split(b":")
    size = int(count)
    planes = pa.decompress(base64.b64decode(text), 4 * size, "zstd", asbytes=True)
    steps = np.zeros(size, np.int64)
    for number in range(4):
        steps |= np.frombuffer(planes[number * size : (number + 1) * size], np.uint8).astype(np.int64) << 8 * number
    common = np.cumsum(steps.astype(np.int32), dtype=np.int64).tolist()
    others = set(range(vocab)) - set(common)
    return [*common, *sorted(others)]


def tail_masses() -> list[float]:
    """m(c) of each code."""
    a = math.asin(2 ** (-53 / 16))
    b = (math.pi / 2 - 2 * a) / 144
    small = [2 ** (-24 + (c - 1) / 4) for c in range(1, 71)]
    middle = [math.sin(a + b * (c - 70.5)) ** 2 for c in range(71, 215)]
    return [0.0, *small, *middle, *(1 - 2 ** (-16 + (252 - c) / 4) for c in range(215, 253)), 1.0, math.nan]


class Bits:
    """Reads numbers from a row's bits."""

    def __init__(self, content: list[int]) -> None:
        self.value, self.at = int.from_bytes(bytes(content), "little"), 0

    def number(self, code: int) -> int:
        """The number of a code."""
        if code < 128:
            return code
        q, r = (code - 128) // 8, (code - 128) % 8
        e = (self.value >> self.at) & ((1 << (q + 4)) - 1)
        self.at += q + 4
        return int((1 << (q + 7)) + r * (1 << (q + 4)) + e)


def plain_row(row: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """The row with the columns of earlier versions, but `exact_ids` and `draw_ids` for their byte planes."""
    far = {name: iter([]) for name in FAR}
    for number, name in enumerate(FAR):
        far[name] = iter([v for c, v in zip(row["far_columns"], row["far_values"], strict=True) if c == number])

    def numbers(name: str) -> list[Any]:
        real = name in ("logprob", "entropy")
        found = []
        for code in row[f"{name}_codes"]:
            if code == 255:
                listed = next(far[name])
                found.append(float(np.int32(listed).view(np.float32)) if real else listed)
            elif real:
                found.append(
                    math.nan if code == 254 else -((code / 32) ** 2) if name == "logprob" else (code / 64) ** 2
                )
            else:
                found.append(code)
        return found

    masses = tail_masses()
    plain = {name: row[name] for name in ("id", "input_ids", "target_mask", "log_z", "exact_gaps", "draw_counts")}
    plain |= {name: row[name] for name in ("draw_logprobs", "draw_weights")}
    plain |= {name: numbers(name) for name in FAR if row[f"{name}_codes"] is not None}
    logs = [math.log(masses[c]) if masses[c] else -math.inf for c in row["tail_codes"]]
    plain["log_tail"] = np.array(logs, np.float32).tolist()
    assert all(next(rest, None) is None for rest in far.values()), "every listed number has its place"
    bits, codes = Bits(row["entry_bits"]), iter(row["exact_codes"])
    exact = []
    for token, code, count in zip(row["input_ids"], row["rank_codes"], plain["num_exact"], strict=True):
        for place in range(1, count + 1):
            exact.append(token if place == code <= 253 else ids[bits.number(next(codes))])
    assert next(codes, None) is None
    draws, steps = [], iter(row["draw_codes"] or [])
    for count in plain["num_drawn"]:
        number, own = -1, []
        for _ in range(count):
            number += bits.number(next(steps)) + 1
            own.append(ids[number])
        draws += sorted(own)
    assert next(steps, None) is None
    assert len(row["entry_bits"]) == (bits.at + 7) // 8
    return {**plain, "exact_ids": exact, "draw_ids": draws}
