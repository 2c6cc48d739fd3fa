"""What the page shows of a dataset, as JSON values: what it is, its rows, a histogram, and one row token by token.

Whatever a person types (a condition in SQL, a column, the number of a row) is checked here, and its query runs as those of
`kdata sql` do: it reads the views of the dataset and nothing else, and writes nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdata.errors import ConfigError, CorruptError, KdataError, MissingError
from kdata.format.schema import index_schema
from kdata.pipelines.view.overview import domains_of, histogram_of, overview_query
from kdata.store.conditions import check_condition
from kdata.store.dataset import Dataset
from kdata.store.kept_counts import kept_lines
from kdata.store.listed import PLANS, SCORES, Kind
from kdata.store.open import open_dataset
from kdata.store.queryable import is_name
from kdata.store.row import Row
from kdata.store.sql import literal
from kdata.store.token_scores import has_tokens
from kdata.store.tokens import REPLACED

MOST_ROWS = 200  # in one answer
MOST_TOKENS = 2_000
SNIPPET = 160  # characters
NUMBERS = ("nll", "mean_entropy", "kept_mass", "num_tokens", "num_target_tokens")
TEXTS = ("text", "messages", "tools", "prompt")  # as long as a row; the tokens show them
RANDOM = "random"
MINUS = " - "
SHOWN = ("id", "domain", "shard", "row", "num_tokens", "nll", "mean_entropy")


class View:
    """A dataset, and perhaps another one of the same rows beside it, as values of a page. Safe for several threads.

    beside: read by another teacher, or by a student (`kdata reread`); rows are matched by their ids.
    """

    def __init__(self, dataset: Dataset, beside: Dataset | None = None) -> None:
        self.dataset, self.beside = _absolute(dataset), None if beside is None else _absolute(beside)
        self._lock = threading.Lock()
        self._first = dict(zip((e.name for e in dataset.manifest), dataset.shard_starts.tolist(), strict=False))

    @property
    def state(self) -> str:
        """Which rows it shows: another one where a row was added or changed since."""
        return "-".join(one.content_digest[:16] for one in (self.dataset, self.beside) if one is not None)

    def newest(self) -> View:
        """The view of what is there now, because another process may write to the dataset; this one where nothing changed.

        Raises what opening the dataset raises.
        """
        newer = View(_again(self.dataset), None if self.beside is None else _again(self.beside))
        return self if newer.state == self.state else newer

    def check_beside(self) -> None:
        """Raise ConfigError where the dataset beside has none of the rows."""
        if self.beside is None:
            return
        theirs = pa.array(self.beside.index(["id"])["id"].to_pylist(), pa.string())
        if not pc.any(pc.is_in(self.dataset.index(["id"])["id"], theirs)).as_py():
            raise ConfigError(
                f"{self.beside.place} has no row of {self.dataset.place}, by id; name a dataset of the same rows (reread)"
            )

    def about(self) -> dict[str, Any]:
        """What the dataset is, and what can be chosen: numbers to sort by, domains, plans, scores of tokens."""
        with self._lock:
            dataset = self.dataset
            dataset.fetch_listed()
            plans, broken = self._plans()
            return {
                "state": self.state,
                "name": dataset.place.rstrip("/").rpartition("/")[2],
                "teacher": dataset.info.teacher.model,
                "kept": dataset.info.codec.kind,
                "positions": list(kept_lines(dataset)) if dataset.info.codec.keeps_some_positions else [],
                "draws": dataset.info.tail == "draws",
                "vocab_size": dataset.info.vocab_size,
                "rows": dataset.num_rows,
                "tokens": dataset.num_tokens,
                "rejected": sum(entry.rejected for entry in dataset.manifest),
                "domains": dataset.sql(
                    "select domain, count(*) as n, sum(num_tokens)::bigint as tokens, round(avg(nll), 9) as nll from rows "
                    "group by domain order by domain"
                ).to_pylist(),
                "numbers": self._numbers(),
                "plans": plans,
                "left_out": broken,
                "token_scores": self._token_scores(),
                "piece": MOST_TOKENS,
                "beside": None
                if self.beside is None
                else {
                    "name": self.beside.place.rstrip("/").rpartition("/")[2],
                    "teacher": self.beside.info.teacher.model,
                },
            }

    def rows(
        self,
        *,
        where: str = "",
        plan: str = "",
        outside: bool = False,
        order: str = "",
        descending: bool = False,
        offset: int = 0,
        limit: int = 50,
    ) -> dict[str, Any]:
        """A stretch of the rows that a condition and a plan leave, and how many these are.

        Args:
            where: condition in SQL over the columns of `rows`, and of scores as NAME.COLUMN. Empty: all rows.
            plan: only rows that this plan takes; with `outside`, only those that it leaves out.
            order: one of the numbers in `about`; "random": the order of the MD5 of ids. Empty: the order of the dataset.
        Raises:
            QueryError: DuckDB refused the condition.
            ConfigError, MissingError: it is no condition on one row (`check_condition`), there is no such number or plan, or
                offset or limit cannot be.
        """
        if offset < 0 or not 0 < limit <= MOST_ROWS:
            raise ConfigError(f"rows {offset} to {offset + limit} cannot be asked for; take 1 to {MOST_ROWS} from 0 on")
        with self._lock:
            if where.strip() or plan or order:
                chosen = self._chosen(where, plan, outside, order)
                places = self._places(chosen, order, descending, offset, limit)
                [total] = self.dataset.sql(f"select count(*) as n from {chosen}")["n"].to_pylist()
            else:
                total = self.dataset.num_rows
                places = [{"number": number} for number in range(offset, min(offset + limit, total))]
            rows = self._listed(places)
        return {"total": total, "rows": [{key: _value(value) for key, value in row.items()} for row in rows]}

    def _places(self, chosen: str, order: str, descending: bool, offset: int, limit: int) -> list[dict[str, Any]]:
        """Numbers of a stretch of rows, each with its `value` where that is what orders them. No text is read for them."""
        value = self._number(order) if order not in ("", RANDOM) else ""
        by = f"{value} {'desc' if descending else 'asc'} nulls last, " if value else "md5(id), " if order else ""
        places: list[dict[str, Any]] = self.dataset.sql(
            f"select shard, row{f', {value}::double as value' if value else ''} from {chosen} "
            f"order by {by} shard, row limit {limit} offset {offset}"
        ).to_pylist()
        for place in places:
            place["number"] = self._first[place.pop("shard")] + place.pop("row")
        return places

    def _listed(self, places: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows as the list shows them. The index of other shards is not read, as each part has one value of `shard`."""
        numbers = np.array([place["number"] for place in places], np.int64)
        shards = np.searchsorted(self.dataset.shard_starts, numbers, side="right") - 1
        names = [literal(self.dataset.manifest[shard].name) for shard in shards.tolist()]
        if not names:
            return []
        local = (numbers - self.dataset.shard_starts[shards]).tolist()
        pairs = ", ".join(f"({name}, {row})" for name, row in zip(names, local, strict=True))
        table = self.dataset.sql(
            f"select {', '.join(SHOWN)}, left(coalesce(text, messages, prompt, ''), {SNIPPET}) as snippet from rows "
            f"where shard in ({', '.join(sorted(set(names)))}) and (shard, row) in ({pairs})"
        )
        found = {self._first[row.pop("shard")] + row.pop("row"): row for row in table.to_pylist()}
        if missing := sorted(set(numbers.tolist()) - set(found)):
            raise CorruptError(f"{self.dataset.place}: the index lacks row {missing[0]}; restore it from a copy")
        return [found[place["number"]] | place for place in places]

    def histogram(self, column: str, *, where: str = "", plan: str = "", outside: bool = False) -> dict[str, Any]:
        """How often which values of a number are: of all rows, and of those that condition and plan leave.

        Returns: what `histogram_of` returns.
        Raises as `rows`.
        """
        with self._lock:
            source = self._flagged(where, plan, outside, column)
            number, whole = self._number(column), self._whole(column)
            found = self.dataset.sql(overview_query(source, [number], [whole], by_domain=False)).to_pylist()
        return histogram_of(found, 0, whole=whole)

    def overview(self, *, where: str = "", plan: str = "", outside: bool = False) -> dict[str, Any]:
        """Domains, and histograms of lengths, NLL and differences: of all rows, and of those that condition and plan leave.

        A difference is the NLL of a score less that of the teacher; see `kdata.selection.ranked.Difference`. One query, which
        reads these columns of the index, and ids where a score or a plan is joined.

        Returns: `domains` with rows, tokens and mean nll of `all` and `chosen`; the tokens of `chosen` count as often as the
            plan takes them. `histograms`: those of `histogram`, each with its column.
        Raises as `rows`.
        """
        with self._lock:
            columns = ["num_tokens", "nll", *self._differences()]
            source = self._flagged(where, plan, outside, *columns)
            numbers, whole = [self._number(column) for column in columns], [self._whole(column) for column in columns]
            found = self.dataset.sql(overview_query(source, numbers, whole, by_domain=True)).to_pylist()
        histograms = [
            {"column": column, **histogram_of(found, place, whole=whole[place])} for place, column in enumerate(columns)
        ]
        return {"domains": domains_of(found), "histograms": histograms}

    def row(self, number: int, *, begin: int = 0) -> dict[str, Any]:
        """One row, and its tokens from `begin` on, `MOST_TOKENS` at most; of `beside` the row of the same id.

        Raises:
            OutOfRangeError: there is no such row.
            ConfigError: there is no such token.
        """
        with self._lock:
            row = self.dataset[number]
            if not 0 <= begin < max(len(row), 1):
                raise ConfigError(f"row {row.id!r} has {len(row):,} tokens; there is no token {begin}")
            shown = _tokens(row, begin)
            shown["number"] = number
            shown["scores"], shown["problem"] = self._scores_of(number, begin)
            columns = {key: value for key, value in row.columns.items() if key not in TEXTS and value is not None}
            shown["columns"] = {key: _value(value) for key, value in columns.items()}
            shown["plans"] = self._plans_of(row.id)
            shown["beside"] = None if self.beside is None else self._row_beside(row, begin)
            return shown

    def rejects(self) -> dict[str, Any]:
        """What was refused: how many for each reason, and the first of them."""
        with self._lock:
            counts = self.dataset.sql(
                "select reason, count(*) as n from rejects group by reason order by n desc, reason"
            )
            first = self.dataset.sql(f"select id, domain, reason, detail from rejects order by id limit {MOST_ROWS}")
        return {"counts": counts.to_pylist(), "first": first.to_pylist()}

    def _chosen(self, where: str, plan: str, outside: bool, *texts: str) -> str:
        """A table to select from: the columns of `rows`, and each score that a text names as a struct."""
        conditions = []
        if plan:
            self._check_plan(plan)
            conditions.append(f'id {"not " if outside else ""}in (select id from plans."{plan}")')
        if where.strip():
            # On lines of their own, so that a comment ends in it.
            conditions.append(f"(\n{where}\n)")
        condition = f" where {' and '.join(conditions)}" if conditions else ""
        return f"(select * from ({self._joined(where, *texts)}){condition})"

    def _flagged(self, where: str, plan: str, outside: bool, *texts: str) -> str:
        """Every row as `_chosen` has it, with `is_chosen` and with `times`, how often the plan takes it."""
        condition, times, join = "true", "1", ""
        if plan:
            self._check_plan(plan)
            join = f' left join (select id as plan_id, repeats as plan_repeats from plans."{plan}") on plan_id = id'
            condition = f"plan_id is {'' if outside else 'not '}null"
            times = "1" if outside else "plan_repeats"
        if where.strip():
            condition += f" and coalesce((\n{where}\n), false)"
        return f"(select *, {condition} as is_chosen, {times} as times from ({self._joined(where, *texts)}){join})"

    def _joined(self, where: str, *texts: str) -> str:
        """A query: the columns of `rows`, and each score that a condition or a number names as a struct."""
        named = {
            *(check_condition(where) if where.strip() else ()),
            *(text.partition(".")[0].lower() for text in texts),
        }
        names = [name for name in self._usable(SCORES) if name.lower() in named]
        scores = "".join(f', "{name}"' for name in names)
        joins = "".join(f' left join scores."{name}" as "{name}" on "{name}".id = rows.id' for name in names)
        return f"select rows.*{scores} from rows{joins}"

    def _check_plan(self, plan: str) -> None:
        if not is_name(plan) or plan not in self.dataset.listed(PLANS):
            raise MissingError(f"there is no plan {plan!r}; the plans are {self.dataset.listed(PLANS)}")

    def _number(self, name: str) -> str:
        """A number to sort by, quoted. Raises ConfigError where there is none of the name."""
        known = self._numbers()
        if name not in known:
            raise ConfigError(f"there is no number {name!r}; the numbers are {', '.join(known)}")
        terms = (".".join(f'"{part}"' for part in term.split(".")) for term in name.split(MINUS))
        return f"({MINUS.join(terms)})"

    def _whole(self, name: str) -> bool:
        """Whether a number of `_numbers` is a whole one of every row: a length, a mark, true or false."""
        if name in NUMBERS:
            return name.startswith("num_")
        if MINUS in name:
            return False
        score, column = name.split(".")
        kind = self.dataset.sql(f'select "{column}" from scores."{score}" limit 0').schema.field(0).type
        return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))

    def _numbers(self) -> list[str]:
        """What can be sorted by: columns of `rows`, NAME.COLUMN of scores, and differences."""
        return [*NUMBERS, *self._score_columns(), *self._differences()]

    def _differences(self) -> list[str]:
        """Of each score with an NLL its difference from the teacher's."""
        return [f"{column}{MINUS}nll" for column in self._score_columns() if column.endswith(".nll")]

    def _usable(self, kind: Kind) -> list[str]:
        """Names of the scores or plans that belong to the dataset as it is now, and can be columns beside its own."""
        return [name for name in self.dataset.listed(kind) if self._problem(kind, name) is None]

    def _problem(self, kind: Kind, name: str) -> str | None:
        """Why a score or a plan is left out; None where it is not."""
        if not is_name(name):
            return f"{kind.noun} {name!r} has a name that SQL needs quoted"
        if kind is SCORES and name.lower() in {"rows", *(column.lower() for column in index_schema().names)}:
            return f"score {name!r} has the name of a column of rows, and cannot be told from it here"
        try:
            self.dataset.listing(kind, name)
        except KdataError as error:
            return str(error)
        return None

    def _score_columns(self) -> list[str]:
        """Numbers, and what is true or false, of each score, as NAME.COLUMN."""
        found = []
        for name in self._usable(SCORES):
            try:
                schema = self.dataset.sql(f'select * from scores."{name}" limit 0').schema
            except KdataError:  # a part is damaged; a condition that names it says so
                continue
            found += [f"{name}.{f.name}" for f in schema if is_name(f.name) and _is_number(f.type)]
        return found

    def _token_scores(self) -> list[str]:
        return [name for name in self._usable(SCORES) if has_tokens(self.dataset, name)]

    def _plans(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Plans of the dataset as it is now, and why scores and plans were left out."""
        plans = []
        broken = [p for kind in (PLANS, SCORES) for n in self.dataset.listed(kind) if (p := self._problem(kind, n))]
        for name in self._usable(PLANS):
            try:
                [n] = self.dataset.sql(f'select count(*) as n from plans."{name}"')["n"].to_pylist()
                plans.append({"name": name, "rows": n})
            except KdataError as error:
                broken.append(str(error))
        return plans, broken

    def _plans_of(self, row_id: str) -> dict[str, int]:
        """How often each plan takes a row."""
        found = {}
        for name in self._usable(PLANS):
            with suppress(KdataError):  # a damaged table; `about` says so
                table = self.dataset.sql(f'select repeats from plans."{name}" where id = ?', [row_id])
                found[name] = int(table["repeats"][0].as_py()) if len(table) else 0
        return found

    def _scores_of(self, number: int, begin: int) -> tuple[dict[str, list[float | None]], str]:
        """Numbers of each token by each score that has some; and why there are none, where a part is damaged."""
        names = self._token_scores()
        if not names:
            return {}, ""
        columns = ", ".join(f'"nll_{name}"' for name in names)
        try:
            table = self.dataset.sql(
                f"select {columns} from tokens where global_row = {number} and position >= {begin} and "
                f"position < {begin + MOST_TOKENS} order by position"
            )
        except KdataError as error:
            return {}, str(error)
        return {name: _numbers(table[f"nll_{name}"].to_pylist()) for name in names}, ""

    def _row_beside(self, row: Row, begin: int) -> dict[str, Any]:
        assert self.beside is not None
        try:
            [number] = self.beside.rows_of([row.id]).tolist()
        except MissingError:
            return {"missing": True}
        other = self.beside[number]
        same = np.array_equal(other.token_ids, row.token_ids)
        return {"missing": False, "same_tokens": same, **_tokens(other, begin if same else 0)}


def _absolute(dataset: Dataset) -> Dataset:
    """The dataset by a place that stays the same when the process changes its folder."""
    if "://" in dataset.place or Path(dataset.place).is_absolute():
        return dataset
    return open_dataset(Path(dataset.place).absolute(), check=dataset.check)


def _again(dataset: Dataset) -> Dataset:
    return open_dataset(dataset.place, check=dataset.check)


def _tokens(row: Row, begin: int) -> dict[str, Any]:
    """The tokens of a row from `begin` on: what each is, what the teacher believed, and the kept entries of all in a line.

    whole: the tokens with whole characters (`Row.whole_tokens`), where these are others.
    num_kept and num_exact say how many entries are a token's, exact ones first. probability: of a draw its weight.
    """
    end = min(begin + MOST_TOKENS, len(row))
    first, last = (int(row.entry_offsets[place]) for place in (begin, end))
    ids = row.entry_ids[first:last]
    distinct, where = np.unique(ids, return_inverse=True)
    try:
        tokens, names, has_tokenizer = row.tokens[begin:end], row.texts_of(distinct), True
        whole = row.whole_tokens[begin:end] if any(REPLACED in token for token in tokens) else tokens
    except MissingError:  # imported without a tokenizer: ids are all there is
        tokens = whole = [f"[{number}]" for number in row.token_ids[begin:end].tolist()]
        names, has_tokenizer = [f"[{number}]" for number in distinct.tolist()], False
    return {
        "id": row.id,
        "domain": row.domain,
        "num_tokens": len(row),
        "begin": begin,
        "has_tokenizer": has_tokenizer,
        "tokens": tokens,
        "whole": None if whole == tokens else whole,
        "token_ids": row.token_ids[begin:end].tolist(),
        "target": row.target_mask[begin:end].tolist(),
        "logprob": _numbers(row.logprob[begin:end].tolist()),
        "rank": row.rank[begin:end].tolist(),
        "entropy": _numbers(row.entropy[begin:end].tolist()),
        "tail": _numbers(np.exp(row.log_tail[begin:end].astype(np.float64)).tolist()),
        "num_kept": row.num_kept[begin:end].tolist(),
        "num_exact": row.num_exact[begin:end].tolist(),
        "names": names,
        "entry": where.tolist(),
        "entry_id": ids.tolist(),
        "probability": _numbers(np.exp(row.entry_logprobs[first:last].astype(np.float64)).tolist()),
    }


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _numbers(values: Iterable[float | None]) -> list[float | None]:
    """Numbers to five digits; None where there is none."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.5g}") for value in values]


def _value(value: Any) -> Any:
    """A value of a cell as JSON: no NaN, and text for what JSON lacks."""
    if isinstance(value, float):
        return _numbers([value])[0]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
