"""Domain weights from a file: brought as a table, regressed on small runs (RegMix), or partly reused (Olmix)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from pydantic import Field

from kdata.errors import ConfigError, DataError, MissingError, first_line, nearest
from kdata.format.files import file_info
from kdata.selection.apportion import as_written, exact
from kdata.selection.mixtures import Mixture, units_of
from kdata.selection.session import DomainSizes, Session


def _read_csv(path: Path) -> pa.Table:
    """A CSV in which a domain is text, also where it looks like a number or a date."""
    return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types={"domain": pa.string()}))


READERS = {".parquet": pq.read_table, ".csv": _read_csv, ".jsonl": pyarrow.json.read_json}


def read_table(file: str) -> pa.Table:
    """A small table. Raises MissingError where there is no such file, DataError for other endings and unreadable content."""
    path = Path(file)
    if path.suffix not in READERS:
        raise DataError(f"{file} is none of {', '.join(READERS)}; write the table in one of these formats")
    if not path.is_file():
        raise MissingError(f"{file} does not exist; name a table ({', '.join(READERS)})")
    try:
        table = READERS[path.suffix](path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error
    if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
        raise DataError(f"{file} has the column {twice[0]!r} twice; keep one")
    return table


def numbers_of(table: pa.Table, column: str, file: str) -> list[float]:
    """A column as finite floats. Raises DataError for anything else."""
    if column not in table.column_names:
        raise DataError(
            f"{file} has no column {column!r}{nearest(column, table.column_names)}; it has {table.column_names}"
        )
    values = table[column].to_pylist()
    if bad := [
        v for v in values if isinstance(v, bool) or not isinstance(v, int | float | Decimal) or not math.isfinite(v)
    ]:
        raise DataError(f"{file}: column {column!r} holds {bad[0]!r}; every line needs a finite number")
    return [float(v) for v in values]


def weights_in(file: str) -> dict[str, float]:
    """The weights, >= 0, of a table with the columns `domain` and `weight`. Raises DataError, MissingError."""
    table = read_table(file)
    weights = numbers_of(table, "weight", file)
    if "domain" not in table.column_names:
        raise DataError(f"{file} has no column 'domain'; it has {table.column_names}")
    names = [None if value is None else str(value) for value in table["domain"].to_pylist()]
    if not names:
        raise DataError(f"{file} has no line; write a line with domain and weight for each domain")
    for number, name in enumerate(names):
        if name is None:
            raise DataError(f"{file} names no domain in line {number + 1} of its weights; write its name")
        if name in names[:number]:
            raise DataError(f"{file} names the domain {name!r} twice; give each domain one line")
    return {str(name): weight for name, weight in zip(names, weights, strict=True)}


class Table(Mixture):
    """The shares in a table with the columns `domain` and `weight`. A domain without a line gets none."""

    CHOOSES: ClassVar[str] = "weights from a file"

    method: Literal["table"] = "table"
    file: str = Field(examples=["weights.csv"], description="The table: .parquet, .csv or .jsonl.")

    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        weights, every = weights_in(self.file), sorted(session.domains())
        for name in weights:
            if name not in every:
                near = nearest(name, every)
                raise DataError(f"{self.file} names the domain {name!r}{near}; the dataset has the domains {every}")
        return weights, {"table": file_info(Path(self.file)).model_dump()}


LOSS = "loss"  # the column of small runs with what they lost


class Regression(Mixture):
    """Weights from a linear regression on small runs: the simpler of the two regressions of RegMix."""

    candidates: int = Field(100_000, ge=1, le=10_000_000, description="Mixtures whose loss is predicted.")
    best: int = Field(100, ge=1, description="Of them, the mixtures of least loss that are averaged.")
    concentration: float = Field(
        10.0,
        gt=0,
        le=1e6,
        description="Sum of the Dirichlet's parameters: larger keeps closer to the dataset's shares.",
    )

    def fitted(self, file: str, units: Mapping[str, int]) -> tuple[dict[str, float], dict[str, Any]]:
        """The best weights of these names by the runs in a table, and parameters to record.

        Args:
            units: what the dataset holds of each name; the table has a column for each, and `loss`.
        Raises:
            DataError: the table lacks a column or has others, or its runs are too few or do not vary enough.
            ConfigError: a name is that of the column of losses.
        """
        names, table = sorted(units), read_table(file)
        if LOSS in names:
            raise ConfigError(
                f"a domain that is fitted is called {LOSS!r}, as the column of the runs' losses; rename it"
            )
        loss_R = np.array(numbers_of(table, LOSS, file))
        weight_RN = np.array([numbers_of(table, name, file) for name in names]).T
        if unknown := sorted(set(table.column_names) - {*names, LOSS}):
            raise DataError(
                f"{file} has a column {unknown[0]!r}, which is no domain to choose from: {names}; remove it"
            )
        if len(loss_R) < len(names) + 2:
            raise DataError(f"{file} has {len(loss_R)} runs for {len(names)} domains; make at least {len(names) + 2}")
        total_R = weight_RN.sum(1)
        if (weight_RN < 0).any() or not total_R.all():
            raise DataError(f"{file}: weights must be >= 0 and not all 0 in a run")
        share_N = np.array([units[name] for name in names]) / sum(units.values())
        weights, slope_N = regression_weights(
            weight_RN / total_R[:, None], loss_R, share_N * self.concentration, self.candidates, self.best, self.seed
        )
        parameters = {"slopes": dict(zip(names, np.round(slope_N, 9).tolist(), strict=True)), "num_runs": len(loss_R)}
        return dict(zip(names, np.round(weights, 9).tolist(), strict=True)), {
            **parameters,
            "table": file_info(Path(file)).model_dump(),
        }


class RegMix(Regression):
    """RegMix (arXiv 2407.01492): fit the loss of small runs to their domain weights, and take the weights that are best.

    The regression is linear: loss = sum of c[i] w[i]. Candidates are drawn from a Dirichlet distribution around the dataset's
    shares, and the best of them are averaged. The paper makes some 500 runs.
    """

    CHOOSES: ClassVar[str] = "domains by small runs"
    SOURCE: ClassVar[str] = "arXiv 2407.01492"

    method: Literal["regmix"] = "regmix"
    runs: str = Field(
        examples=["runs.csv"],
        description="Table of the runs (.parquet, .csv or .jsonl): a column for each domain with its weight, and `loss`. "
        "At least two runs more than domains.",
    )

    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        return self.fitted(self.runs, units_of(domains, self.count_by))


REUSED = "reused"  # the column of small runs with the weight of all domains that did not change


class Olmix(Regression):
    """Mixture reuse (Olmix, arXiv 2602.12237): former weights where domains did not change, new small runs for the others.

    Domains of the former table keep their ratios to each other, and count together as one domain of the small runs, `reused`.
    All others (added, or parts of one that was split) and those in `changed` are fitted. Former domains that the dataset does
    not have any more are left out. The regression is RegMix's, linear, and not the paper's, which we could not read.
    """

    CHOOSES: ClassVar[str] = "former weights reused"
    SOURCE: ClassVar[str] = "arXiv 2602.12237"

    method: Literal["olmix"] = "olmix"
    former: str = Field(
        examples=["former.csv"],
        description="Table of the former weights: .parquet, .csv or .jsonl with `domain` and `weight`.",
    )
    changed: list[str] = Field(
        [], description="Domains of the former table whose text is another now; their weights are fitted anew."
    )
    runs: str | None = Field(
        None,
        description="Table of small runs: a column for each domain that is fitted, one named `reused` for all others, and "
        "`loss`. null: no domain was added or changed.",
    )

    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`. Raises DataError, ConfigError where table, runs and domains do not fit."""
        former = weights_in(self.former)
        for name in self.changed:
            if name not in former or name not in domains:
                where = "former table" if name not in former else "domains to choose from"
                near = nearest(name, sorted(set(former) & set(domains)))
                raise ConfigError(f"changed names {name!r}{near}, which is not among the {where}")
        reused = {n: as_written(w) for n, w in former.items() if n in domains and n not in self.changed}
        fitted = sorted(set(domains) - set(reused))
        exact(former)
        whole = sum(reused.values())
        if not whole:
            raise DataError(
                f"no domain to choose from has a weight above 0 in {self.former} to reuse: {sorted(domains)}; use the "
                "method regmix"
            )
        table = {"former": file_info(Path(self.former)).model_dump(), "fitted": fitted}
        if not fitted and self.runs is not None:
            raise ConfigError(
                "runs would be ignored: no domain was added or changed; leave runs out, or name `changed`"
            )
        if not fitted:
            return {name: float(share / whole) for name, share in reused.items()}, table
        if self.runs is None:
            raise ConfigError(f"domains {fitted} have no former weight to reuse: fit them on small runs (runs)")
        if REUSED in fitted:
            raise ConfigError(f"a domain that is fitted is called {REUSED!r}, as the column of all others; rename it")
        units = units_of(domains, self.count_by)
        own = {REUSED: sum(units[name] for name in reused), **{name: units[name] for name in fitted}}
        weights, parameters = self.fitted(self.runs, own)
        rest = weights.pop(REUSED)
        kept = {name: round(rest * float(share / whole), 12) for name, share in reused.items()}
        return {**kept, **weights}, {**parameters, **table, "reused_weight": rest}


def regression_weights(
    weight_RN: np.ndarray, loss_R: np.ndarray, alpha_N: np.ndarray, candidates: int, best: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the `best` candidate mixtures by a linear fit, and its slopes c.

    Args:
        weight_RN: float [R runs, N domains], rows sum to 1. loss_R: float [R].
        alpha_N: parameters of the Dirichlet distribution of the candidates.
    Raises:
        DataError: the runs do not vary enough to tell the domains apart.
    """
    slope_N, _, rank, _ = np.linalg.lstsq(weight_RN, loss_R, rcond=None)
    if rank < len(alpha_N):
        raise DataError("the runs' weights do not tell the domains apart; vary every domain's weight in some run")
    rng = np.random.default_rng(seed)
    draw_CN = rng.dirichlet(alpha_N, candidates)
    order_C = np.argsort(draw_CN @ slope_N, kind="stable")
    return draw_CN[order_C[:best]].mean(0), slope_N
