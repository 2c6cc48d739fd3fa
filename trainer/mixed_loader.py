"""Documents drawn domain by domain, with weights that may change between steps.

A period is a number of steps with the same weights. Its documents are drawn when it begins, one after the other: first the
domain, at random by the weights, then the next document of that domain's queue, until their tokens fill the period. The
period is then read like a plan (`kdata.loader.batches`: packed, shuffled, whole documents). Packing is not perfect, so one or
two percent of the drawn documents are not reached when the period ends; they return to the front of their queues.

Properties: weights are shares of tokens, so a domain of long documents is drawn less often. A queue holds every document of
its domain once per cycle, in a new order each cycle; a domain that is exhausted starts again while the others continue. The
stream is a pure function of data, plan, seed, and the weights and lengths of the periods; the number of ranks and the
micro-batch do not matter. Its state is a few numbers per domain and the documents that returned.

Shapes: D documents of a period, N domains, P documents of a domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdata.config import first_problem
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError
from kdata.format.positions import ChosenPositions
from kdata.loader.batches import BatchesConfig
from kdata.loader.packing import Place, Shape, blocks_of, place_of, windows
from kdata.store.dataset import Dataset
from kdata.trainer.loader import Batch, Loader


@dataclass
class _Queue:
    """State of one domain's endless sequence: `num_drawn` documents have left it, the numbers in `back` returned."""

    num_drawn: int = 0
    back: list[int] = field(default_factory=list)

    def next(self, count: int) -> np.ndarray:
        """Numbers int64 [count] of the documents that leave next; the queue does not change."""
        returned = np.array(self.back[:count], np.int64)
        return np.concatenate([returned, np.arange(self.num_drawn, self.num_drawn + count - len(returned))])

    def after(self, count: int) -> _Queue:
        """The queue after `count` documents have left it."""
        returned = min(count, len(self.back))
        return _Queue(self.num_drawn + count - returned, self.back[returned:])


class _QueueState(BaseModel):
    """A queue in a checkpoint."""

    model_config = ConfigDict(strict=True, extra="forbid")

    num_drawn: int = Field(ge=0, lt=2**53)
    back: list[Annotated[int, Field(ge=0)]]

    @model_validator(mode="after")
    def _returned_were_drawn(self) -> _QueueState:
        if self.back and max(self.back) >= self.num_drawn:
            raise ValueError("a document returned that was never drawn")
        return self


class _State(BaseModel):
    """What of a loader's state this file reads from a checkpoint, beside the place."""

    model_config = ConfigDict(strict=True, extra="ignore")

    number: int = Field(ge=0, lt=2**31)
    queues: list[_QueueState]
    weights: dict[str, Annotated[float, Field(ge=0, le=1)]] | None
    num_rows: int | None = Field(ge=1, lt=2**31)


def _state(state: Mapping[str, Any], domains: list[str]) -> _State:
    """The values of a checkpoint, checked. Raises CorruptError."""
    try:
        own = _State.model_validate(dict(state))
    except ValidationError as error:
        raise CorruptError(f"the state of the mixture is damaged: {first_problem(error)}") from error
    has_period = own.weights is not None
    if len(own.queues) != len(domains) or has_period != (own.num_rows is not None) or has_period != (own.number > 0):
        raise CorruptError("the state of the mixture is damaged: its parts do not fit each other or the data's domains")
    if own.weights is not None and (set(own.weights) != set(domains) or not sum(own.weights.values())):
        raise CorruptError(f"the state of the mixture has weights of {sorted(own.weights)}, the data has {domains}")
    return own


@dataclass(frozen=True)
class _Period:
    """The drawn documents: domain, number in the domain's sequence and global row of each, int64 [D]."""

    weights: dict[str, float]
    num_rows: int
    domain_D: np.ndarray
    number_D: np.ndarray
    row_D: np.ndarray


class MixedLoader:
    """A resumable stream of batches, period after period. Call `begin` before iterating.

    Args:
        dataset, rows, config, rank, world_size, temperature, positions, elsewhere: see
            `kdata.trainer.loader.Loader`.
    Raises:
        DataError: there is nothing to read, or a document is longer than the context.
        ConfigError: the ranks cannot share a batch evenly.

    Attributes:
        domains: names of the domains that are drawn from, sorted.
        pools: global rows of each of them, int64 [P], repeats included.
        unread_domains: names of those that `rows` has too, and of which no row can be read: they keep no distribution, or
            have no token.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray | None,
        config: BatchesConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        temperature: float = 1.0,
        positions: ChosenPositions | None = None,
        elsewhere: bool = False,
    ) -> None:
        if config.shuffle_group_tokens:
            raise ConfigError(
                f"shuffle_group_tokens={config.shuffle_group_tokens} does not go with a mixture, which draws from all "
                "shards; leave it out"
            )
        config = config.model_copy(update={"shuffle_group_tokens": 0})
        every = Loader(  # checks the data
            dataset, rows, config, rank=rank, world_size=world_size, positions=positions, elsewhere=elsewhere
        )
        self.dataset, self.config, self.positions = dataset, config, positions
        self._elsewhere = elsewhere
        self._order_key = every.arrays.identity
        self._rank, self._world_size, self._temperature = rank, world_size, temperature
        self.identity = every.identity
        index = dataset.index(["domain", "num_tokens"])
        self._lengths = index["num_tokens"].to_numpy().astype(np.int64)
        names, domain_R = np.unique(np.array(index["domain"].to_pylist(), dtype=str), return_inverse=True)
        planned = every.arrays.rows
        present = np.unique(domain_R[planned])
        self.domains = [str(names[n]) for n in present]
        asked = np.unique(domain_R if rows is None else domain_R[rows])
        self.unread_domains = [str(names[n]) for n in np.setdiff1d(asked, present)]
        self.pools = [planned[domain_R[planned] == n] for n in present]
        self.lengths, self.rows = self._lengths[planned], planned  # of the planned documents, int64
        self._blocks = [blocks_of(pool, dataset.shard_starts, config.shuffle_block_rows) for pool in self.pools]
        self._queues = [_Queue() for _ in self.domains]
        self._number = 0  # of the period, counted from 1; 0 before the first
        self._period: _Period | None = None
        self._loader: Loader | None = None

    def begin(self, weights: Mapping[str, float], num_rows: int) -> None:
        """End the current period and draw the next one.

        Args:
            weights: share of the tokens of each domain; the shares sum to 1.
            num_rows: rows of `context_tokens` tokens, over all ranks, that will be read in the period.
        """
        self._queues = self._after_period()
        self._number += 1
        self._open({domain: float(weights[domain]) for domain in self.domains}, num_rows)

    def __iter__(self) -> Iterator[Batch]:
        """Batches of the period, from the current place. The caller decides when the period ends."""
        if self._loader is None:
            raise DataError("no period has begun; call begin(weights, num_rows) first")
        return iter(self._loader)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream: the queues when the period began, the period, and the place in it."""
        place = Place() if self._loader is None else self._loader.arrays.place
        return {
            "identity": self.identity,
            **self._order(),
            "number": self._number,
            "queues": [asdict(queue) for queue in self._queues],
            "weights": None if self._period is None else self._period.weights,
            "num_rows": None if self._period is None else self._period.num_rows,
            "place": asdict(place),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the place of another loader, on any rank.

        Raises:
            MismatchError: data or order differ.
            CorruptError: a value is not one that `state_dict` gives for this data.
        """
        here = {"identity": self.identity, **self._order()}
        different = [key for key, value in here.items() if value != state.get(key)]
        if different:
            raise MismatchError(
                f"the state of the mixture belongs to another {', '.join(different)}; resume with the same dataset, plan and "
                "loader settings, or train in another folder"
            )
        own = _state(state, self.domains)
        self._number, self._queues = own.number, [_Queue(q.num_drawn, list(q.back)) for q in own.queues]
        self._period = self._loader = None
        if own.weights is not None and own.num_rows is not None:
            self._open(own.weights, own.num_rows)
            assert self._loader is not None
            self._loader.arrays.place = place_of(state["place"], len(self._loader.arrays.rows))

    def _order(self) -> dict[str, Any]:
        """The settings that decide the order, beside the data."""
        return self.config.model_dump(exclude={"batch_rows", "prefetch_batches"})

    def _open(self, weights: dict[str, float], num_rows: int) -> None:
        """Draw a period from the queues and open a loader for it. The queues do not change before the period ends."""
        domain_D, number_D, row_D = self._draw(weights, num_rows * self.config.context_tokens)
        self._period = _Period(weights, num_rows, domain_D, number_D, row_D)
        self._loader = Loader(
            self.dataset,
            row_D,
            self.config,
            rank=self._rank,
            world_size=self._world_size,
            temperature=self._temperature,
            positions=self.positions,
            elsewhere=self._elsewhere,
        )

    def _draw(self, weights: Mapping[str, float], num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Domains, numbers and global rows of the documents that together hold `num_tokens` or a little more."""
        means = np.array([self._lengths[pool].mean() for pool in self.pools])
        chances = np.array([weights[domain] for domain in self.domains]) / means
        bounds = np.cumsum(chances) / chances.sum()
        source = np.random.PCG64(np.random.SeedSequence([*self._key(), self.config.seed, 0, self._number]))
        domain_D = np.zeros(0, np.int64)
        guess = int(num_tokens * chances.sum() / (chances * means).sum() * 1.05) + 16
        while True:
            uniform = (source.random_raw(guess) >> np.uint64(11)) * 2.0**-53
            more = np.searchsorted(bounds, uniform, side="right").clip(max=len(bounds) - 1)
            domain_D = np.concatenate([domain_D, more])
            number_D, row_D = np.zeros_like(domain_D), np.zeros_like(domain_D)
            for domain, queue in enumerate(self._queues):
                of_domain_D = domain_D == domain
                number_D[of_domain_D] = queue.next(int(of_domain_D.sum()))
                row_D[of_domain_D] = self._rows_of(domain, number_D[of_domain_D])
            ends = np.cumsum(self._lengths[row_D])
            if ends[-1] >= num_tokens:
                stop = int(np.searchsorted(ends, num_tokens)) + 1
                return domain_D[:stop], number_D[:stop], row_D[:stop]

    def _rows_of(self, domain: int, numbers: np.ndarray) -> np.ndarray:
        """Global rows of documents by their number in a domain's endless sequence: a new order in each cycle."""
        pool, rows = self.pools[domain], np.zeros_like(numbers)
        cycles, places = np.divmod(numbers, len(pool))
        for cycle in np.unique(cycles):
            seeds = np.random.SeedSequence([*self._key(), self.config.seed, 1 + domain, int(cycle)])
            keys = np.random.PCG64(seeds).random_raw(int(self._blocks[domain].max()) + 1)
            order = np.argsort(keys[self._blocks[domain]], kind="stable")
            here = cycles == cycle
            rows[here] = pool[order[places[here]]]
        return rows

    def _after_period(self) -> list[_Queue]:
        """The queues after the period: documents that were read have left, those that were not reached are back."""
        if self._period is None or self._loader is None:
            return self._queues
        period, arrays, c = self._period, self._loader.arrays, self.config
        shape = Shape(c.context_tokens, c.window_documents, c.window_tokens)
        blocks = blocks_of(period.row_D, self.dataset.shard_starts, c.shuffle_block_rows)
        stream = (row for w in windows(arrays.lengths, blocks, arrays.identity, c.seed, shape, Place()) for row, _ in w)
        unread_D = np.ones(len(period.row_D), bool)
        for documents in islice(stream, period.num_rows):
            unread_D[documents] = False
        queues = []
        for domain, queue in enumerate(self._queues):
            of_domain_D = period.domain_D == domain
            rest = queue.after(int(of_domain_D.sum()))
            rest.back = sorted([*rest.back, *period.number_D[of_domain_D & unread_D].tolist()])
            queues.append(rest)
        return queues

    def _key(self) -> list[int]:
        """The digest of data and rows as numbers, for seeds. The positions do not change the order."""
        return [int(self._order_key[i : i + 8], 16) for i in range(0, 32, 8)]
