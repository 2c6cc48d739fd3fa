"""Rows of a dataset as tensors, in the shape that torch's DataLoader reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from kdata.errors import OutOfRangeError
from kdata.format.sequences import Sequences

if TYPE_CHECKING:
    import torch


class Rows(Protocol):
    """Rows that can be decoded by their numbers."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Sequences:
        """Decode rows, int64 [S]."""
        ...


class TorchRows:
    """A map-style dataset: item n is row n as a dict of tensors (`Sequences.to_torch`)."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= number < len(self):
            raise OutOfRangeError(f"the dataset has {len(self)} rows; there is no row {number}")
        return self.__getitems__([number % len(self)])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, torch.Tensor]]:
        """Several items, decoded in one go: DataLoader asks for a batch in this way."""
        sequences = self._rows.take(np.array(numbers, np.int64))
        return [sequences.one(number).to_torch() for number in range(len(sequences))]
