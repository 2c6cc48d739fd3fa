"""Domain weights from a file: brought as a table, or regressed on small runs (RegMix)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from pydantic import Field

from kdata.errors import DataError, MissingError, nearest
from kdata.format.files import file_info
from kdata.selection.mixtures import Mixture, units_of
from kdata.selection.session import DomainSizes, Session

READERS = {".parquet": pq.read_table, ".csv": pyarrow.csv.read_csv, ".jsonl": pyarrow.json.read_json}


def read_table(file: str) -> pa.Table:
    """A small table. Raises MissingError where there is no such file, DataError for other endings and unreadable content."""
    path = Path(file)
    if path.suffix not in READERS:
        raise DataError(f"{file} is none of {', '.join(READERS)}; write the table in one of these formats")
    if not path.is_file():
        raise MissingError(f"{file} does not exist; name a table ({', '.join(READERS)})")
    try:
        return READERS[path.suffix](path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error


def numbers_of(table: pa.Table, column: str, file: str) -> list[float]:
    """A column as finite floats. Raises DataError for anything else."""
    if column not in table.column_names:
        raise DataError(
            f"{file} has no column {column!r}{nearest(column, table.column_names)}; it has {table.column_names}"
        )
    values = table[column].to_pylist()
    if bad := [v for v in values if isinstance(v, bool) or not isinstance(v, (int, float)) or not np.isfinite(v)]:
        raise DataError(f"{file}: column {column!r} holds {bad[0]!r}; every line needs a finite number")
    return [float(v) for v in values]


class Table(Mixture):
    """The shares in a table with the columns `domain` and `weight`. A domain without a line gets none."""

    method: Literal["table"] = "table"
    file: str = Field(description="The table: .parquet, .csv or .jsonl.")

    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        table = read_table(self.file)
        weights = numbers_of(table, "weight", self.file)
        if "domain" not in table.column_names:
            raise DataError(f"{self.file} has no column 'domain'; it has {table.column_names}")
        names = table["domain"].to_pylist()
        every = sorted(session.domains())
        for number, name in enumerate(names):
            if name not in every:
                near = nearest(str(name), every)
                raise DataError(f"{self.file} names the domain {name!r}{near}; the dataset has the domains {every}")
            if name in names[:number]:
                raise DataError(f"{self.file} names the domain {name!r} twice; give each domain one line")
        return dict(zip(names, weights, strict=True)), {"table": file_info(Path(self.file)).model_dump()}


class RegMix(Mixture):
    """RegMix (arXiv 2407.01492): fit the loss of small runs to their domain weights, and take the weights that are best.

    The regression is linear, the simpler of the two in the paper: loss = sum of c[i] w[i]. Candidates are drawn from a
    Dirichlet distribution around the dataset's shares, and the best of them are averaged. The paper makes some 500 runs.
    """

    SOURCE: ClassVar[str] = "arXiv 2407.01492"

    method: Literal["regmix"] = "regmix"
    runs: str = Field(
        description="Table of the runs (.parquet, .csv or .jsonl): a column for each domain with its weight, and `loss`. "
        "At least two runs more than domains."
    )
    candidates: int = Field(100_000, ge=1, le=10_000_000, description="Mixtures whose loss is predicted.")
    best: int = Field(100, ge=1, description="Of them, the mixtures of least loss that are averaged.")
    concentration: float = Field(
        10.0,
        gt=0,
        le=1e6,
        description="Sum of the Dirichlet's parameters: larger keeps closer to the dataset's shares.",
    )

    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        names, table = sorted(domains), read_table(self.runs)
        loss_R = np.array(numbers_of(table, "loss", self.runs))
        weight_RN = np.array([numbers_of(table, name, self.runs) for name in names]).T
        if unknown := sorted(set(table.column_names) - {*names, "loss"}):
            raise DataError(
                f"{self.runs} has a column {unknown[0]!r}, which is no domain to choose from: {names}; remove it"
            )
        if len(loss_R) < len(names) + 2:
            raise DataError(
                f"{self.runs} has {len(loss_R)} runs for {len(names)} domains; make at least {len(names) + 2}"
            )
        total_R = weight_RN.sum(1)
        if (weight_RN < 0).any() or not total_R.all():
            raise DataError(f"{self.runs}: weights must be >= 0 and not all 0 in a run")
        units = units_of(domains, self.count_by)
        share_N = np.array([units[name] for name in names]) / sum(units.values())
        weights, slope_N = regression_weights(
            weight_RN / total_R[:, None], loss_R, share_N * self.concentration, self.candidates, self.best, self.seed
        )
        parameters = {"slopes": dict(zip(names, np.round(slope_N, 9).tolist(), strict=True)), "num_runs": len(loss_R)}
        return dict(zip(names, np.round(weights, 9).tolist(), strict=True)), {
            **parameters,
            "table": file_info(Path(self.runs)).model_dump(),
        }


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
