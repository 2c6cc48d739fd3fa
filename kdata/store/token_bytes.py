"""How many bytes of text the tokens of some rows stand for, read a record batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdata.errors import CorruptError


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of the UTF-8 of each token of R rows.

    rows: int64 [R], rising. starts: int64 [R], where each row begins in `sizes`; -1 where its bytes are not stored.
    counts: int64 [R], its tokens. sizes: uint16 [N].
    """

    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, columns: list[pa.ListArray]) -> TokenBytes:
        """Those of rows whose lists stand in these columns, one after the other; a null list is not known."""
        counts = [pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False) for column in columns]
        count_R = np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)
        length_R = count_R.clip(0)
        starts = np.where(count_R < 0, -1, np.cumsum(length_R) - length_R)
        sizes = [column.flatten().to_numpy() for column in columns]
        return cls(rows, starts, length_R, np.concatenate([np.zeros(0, np.uint16), *sizes]))

    def at(self, rows_M: np.ndarray, positions_M: np.ndarray) -> np.ndarray | None:
        """Bytes of single tokens, int64 [M]; None where those of one of the rows are not stored.

        Raises CorruptError where a row has fewer lengths than tokens.
        """
        place_M = np.searchsorted(self.rows, rows_M)
        if (self.starts[place_M] < 0).any():
            return None
        if (positions_M >= self.counts[place_M]).any():
            raise CorruptError("a row has fewer entries of token_bytes than tokens; run `kdata verify`")
        bytes_M: np.ndarray = self.sizes[self.starts[place_M] + positions_M].astype(np.int64)
        return bytes_M
