"""Selection: choose which sequences to train on, and how often. A step chooses from a dataset, or from one of its plans, and
writes a plan.

To add a method:

1. Choose the base class: `Ranked` (ranked.py) gives every row a number and chooses the rows with the largest; `Windowed`
   (windowed.py) chooses by a window query over such numbers; `Mixture` (mixtures.py) gives every domain a share; `Step`
   (step.py) is for anything else.
2. Write a subclass with its settings as pydantic fields (each with a description) and `method: Literal["NAME"] = "NAME"`.
3. Implement what it lacks: `values()` of `Ranked` returns a query with a column `value`, `shares()` of `Mixture` returns a
   share of each domain, `choose()` of `Step` fills the table `chosen`.
4. Add a line to METHODS below, and run `python -m tests.schemas.tables`, which writes the recipe's JSON Schema.
5. Test it on numbers worked out by hand in tests/kdata/selection/test_select_methods.py, and name it in kdata/README.md.

The work is done out of core, and DuckDB writes the plan: a plan of 100 million rows needs no more memory than one of a
million.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

from kdata.config import MAX_SHOWN, parse_config, shown
from kdata.errors import ConfigError, CorruptError, DataError, MissingError, nearest
from kdata.format.files import remove_leftover, removed_on_failure, require_writable, settle, without_hidden
from kdata.selection.band import Band
from kdata.selection.choose_positions import choose_positions
from kdata.selection.confidence import Confidence, Margin
from kdata.selection.curriculum import Curriculum
from kdata.selection.ddk import Ddk
from kdata.selection.mixtures import Cap, Proportional, Static, Temperature, Uniform
from kdata.selection.plan import (
    ConditionInfo,
    ConditionsInfo,
    DomainChoice,
    Plan,
    PositionsInfo,
    domain_choices,
    open_plan,
    plan_files,
    plan_info,
    plan_schema,
    positions_info,
    write_plan_info,
)
from kdata.selection.position_base import PositionRule, TokenReader
from kdata.selection.position_rules import Gap
from kdata.selection.prune import Prune
from kdata.selection.query import Sql
from kdata.selection.ranked import All, Difference, Random
from kdata.selection.robust import Robust
from kdata.selection.session import Conditions, DomainSizes, Pool, Session, open_session
from kdata.selection.sidecar import checked_score_digest, refuse_missing_column
from kdata.selection.step import Chosen, Counts, Step
from kdata.selection.tables import Olmix, RegMix, Table
from kdata.store.conditions import EXAMPLES, check_condition
from kdata.store.dataset import Dataset
from kdata.store.listed import MARGINS, SCORES
from kdata.store.queryable import check_new_name
from kdata.store.sql import Room, literal

METHODS: dict[str, type[Step]] = {
    "difference": Difference,
    "random": Random,
    "all": All,
    "prune": Prune,
    "band": Band,
    "confidence": Confidence,
    "margin": Margin,
    "robust": Robust,
    "curriculum": Curriculum,
    "sql": Sql,
    "static": Static,
    "uniform": Uniform,
    "proportional": Proportional,
    "temperature": Temperature,
    "table": Table,
    "ddk": Ddk,
    "regmix": RegMix,
    "olmix": Olmix,
    "cap": Cap,
}
DEFAULT = "all"  # what won in our evidence: every row that passes the conditions of hygiene (`where`)


def _with_method(values: Any) -> Any:
    return {"method": DEFAULT, **values} if isinstance(values, dict) else values


if TYPE_CHECKING:
    SelectConfig = Step
else:  # for pydantic: the settings of any method, told apart by `method`
    SelectConfig = Annotated[
        Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")],  # noqa: UP007
        BeforeValidator(_with_method),
    ]


def parse_step(values: dict[str, Any], where: str = "select settings") -> Step:
    """The settings of a method from a mapping with `method`. Raises ConfigError naming keys, values and the nearest key."""
    method = values.get("method", DEFAULT)
    for key in values.keys() - All.model_fields.keys() if "method" not in values else ():
        if takers := [name for name, one in METHODS.items() if key in one.model_fields]:
            raise ConfigError(f"{where}: {key} needs a method that takes it: add one of {', '.join(takers)} as method")
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(repr(name) for name in METHODS)
        close = nearest(str(method)[:MAX_SHOWN], list(METHODS))
        raise ConfigError(f"{where}: method: Input should be one of {known}{close} (got {shown(method)})")
    return parse_config(METHODS[method], values, f"{where}, method {method}" if "method" in values else where)


def select(
    dataset: Dataset,
    config: Step,
    room: Room | None = None,
    *,
    reader: TokenReader | None = None,
    pool: Pool | None = None,
) -> Plan:
    """Do one step and save its plan at `plans/NAME.parquet` of the dataset.

    Args:
        config: settings of one of METHODS, for instance `Difference(share=0.5)`.
        room: memory and threads that DuckDB may use; the result does not depend on them.
        reader: the model of the rule `gap`; `kdata.select` opens it.
        pool: what reads index and scores for a ranking of the whole dataset, in place of this process. The plan is the same.
    Raises:
        ConfigError: method and settings do not fit.
        DataError: no row is chosen, a target cannot be met, or a score does not cover the rows.
        MissingError, MismatchError: a score or a plan is missing, or is of another state of the dataset.
        QueryError: DuckDB refused the query.
        CorruptError: the index or a sidecar is not what was committed.
        StorageError: memory or disk do not suffice, or another process is writing.
    """
    name = config.name or config.method
    check_new_name("plan", name, (path.stem for path in without_hidden(dataset.path, "plans/*.parquet")))
    if config.parent == name:
        raise ConfigError(f"plan {name!r} cannot be its own parent; give the new plan another name (--name)")
    require_writable(dataset.path / "plans" / name)
    parent = None if config.parent is None else open_plan(dataset, config.parent)
    if isinstance(config.positions, Gap) and reader is None:
        raise ConfigError("the rule 'gap' reads the text with a model; call kdata.select, which opens it")
    if parent is not None and parent.info.positions is not None and config.positions is None:
        raise ConfigError(
            f"plan {config.parent!r} chooses positions, and a plan of rows from it would lose them; choose rows first and "
            "positions last, or name a rule (--positions) that chooses among its positions"
        )
    conditions = _conditions(dataset, config)
    read = {"scores": [], "plans": []} if config.positions is None else config.positions.mentions(dataset)
    names = dict.fromkeys([*config.sidecars(dataset), *read["scores"], *conditions.scores])
    for score, column in config.score_columns().items():
        refuse_missing_column(dataset, score, column, config.method)
    scores = {score: checked_score_digest(dataset, score) for score in names}
    dataset.check_index()
    reads = config.reads(dataset) | {f"scores.{score}".lower() for score in conditions.scores}
    with open_session(dataset, parent, f"select {name}", reads, room, conditions, pool) as session:
        domains = session.domains()
        if not domains:
            raise DataError(f"{dataset.path} has no rows to choose from; capture or generate some first")
        left_out = _left_out(session, name) if conditions.texts else None
        chosen, parameters = config.choose(session, domains)
        read_plans = [open_plan(dataset, other) for other in chosen.parents]
        if config.positions is None:
            _refuse_lost_positions(session, read_plans)
        parents = [*([] if parent is None else [parent]), *read_plans]
        choices, positions = _by_domain(domains, chosen), None
        if config.positions is not None:
            parents += [open_plan(dataset, other) for other in read["plans"]]
            choices, positions = _choose_positions(session, config.positions, choices, reader)
        info = plan_info(
            choices,
            dataset,
            name=name,
            method=config.method,
            parameters=parameters,
            sql=chosen.sql,
            scores=scores,
            parents={plan.info.name: plan.plan_digest for plan in parents},
            count_by=chosen.count_by,
            requested=None if chosen.requested is None else sum(chosen.requested.values()),
            where=left_out,
            positions=positions,
        )
        path = _write(session, dataset.path / "plans" / name, positions)
        return Plan(path, info, write_plan_info(path, info))


def _conditions(dataset: Dataset, config: Step) -> Conditions:
    """The conditions of a step, and the scores that they name. Raises ConfigError, and MissingError for an unknown score."""
    known = {name.lower(): name for name in dataset.listed(SCORES)}
    scores: dict[str, None] = {}
    for text in config.where:
        for name in check_condition(text):
            if name not in known and name != "rows":
                how = MARGINS if name == "margin" else "kdata hygiene` or `kdata score"
                raise MissingError(
                    f"condition {text!r}: there is no score {name!r}{nearest(name, sorted(known.values()))}; write it with "
                    f"`{how}`"
                )
            scores.update({known[name]: None} if name != "rows" else {})
    return Conditions(tuple(config.where), tuple(scores))


def _left_out(session: Session, name: str) -> ConditionsInfo:
    """What the conditions leave out.

    Raises:
        DataError: they leave nothing.
        CorruptError: a score has an id twice, so that a row would be chosen twice.
    """
    rows, passed, *each = session.left_out()
    if rows != (session.dataset.num_rows if session.parent is None else session.parent.info.num_rows):
        names = ", ".join(session.conditions.scores)
        raise CorruptError(f"scores {names}: one has an id twice; remove it, and run the command that wrote it again")
    infos = []
    for number, text in enumerate(session.conditions.texts):
        left_out, unknown, alone, examples = each[4 * number : 4 * number + 4]
        first = sorted(examples, key=lambda row_id: (hashlib.md5(row_id.encode()).hexdigest(), row_id))[:EXAMPLES]
        infos.append(ConditionInfo(condition=text, left_out=left_out, unknown=unknown, alone=alone, examples=first))
    if not passed:
        each_text = "; ".join(f"{one.condition!r} leaves out {one.left_out:,}" for one in infos)
        raise DataError(f"plan {name!r}: no row of {rows:,} meets the conditions: {each_text}. Loosen one of them")
    return ConditionsInfo(rows=rows, passed=passed, conditions=infos)


def _refuse_lost_positions(session: Session, plans: list[Plan]) -> None:
    """Raise ConfigError where a query takes whole rows of a plan that chooses positions of them: which count is not said."""
    for name in (plan.info.name for plan in plans if plan.info.positions is not None):
        if session.fetch(f'select 1 from chosen semi join plans."{name}" using (id) where repeats > 0 limit 1'):
            raise ConfigError(
                f"plan {name!r} chooses positions, and the query takes whole rows of it, so the new plan would lose them. "
                f"Choose among its positions with --parent {name} and a rule (--positions RULE); or have every target of the "
                "rows count, with --positions random --positions-share 1"
            )


def _choose_positions(
    session: Session, rule: PositionRule, choices: dict[str, DomainChoice], reader: TokenReader | None
) -> tuple[dict[str, DomainChoice], PositionsInfo]:
    """Choose positions of the chosen rows, and show them in the view `picked`, which lacks rows without one.

    Returns:
        What is left of each domain, and how the positions were chosen.
    """
    dataset = session.dataset
    table = session.table("select id, repeats from chosen where repeats > 0")
    rows = dataset.rows_of(table["id"].to_pylist())
    parent = None if session.parent is None else session.parent.choice(dataset)[1]
    picked = choose_positions(dataset, rule, rows, parent, session.folder, reader, session.read)
    info = positions_info(
        dataset, rows, picked.counts,
        rule=rule.rule, parameters=picked.parameters, sql=rule.query, weighted=picked.weighted,
    )  # fmt: skip
    session.show_file("picked", picked.file, plan_schema(positions=True, weights=picked.weighted))
    kept = picked.counts > 0
    left = domain_choices(dataset, rows[kept], table["repeats"].to_numpy()[kept])
    return {name: left[name].model_copy(update={"requested": choices[name].requested}) for name in choices}, info


def _by_domain(domains: DomainSizes, chosen: Chosen) -> dict[str, DomainChoice]:
    requested = chosen.requested if chosen.requested is not None and chosen.by_domain else {}
    choices = {}
    for domain, size in domains.items():
        counts = chosen.domains.get(domain, Counts(0, 0, 0))
        choices[domain] = DomainChoice(
            dataset_sequences=size.sequences,
            dataset_tokens=size.tokens,
            requested=requested.get(domain),
            **counts._asdict(),
        )
    return choices


def _write(session: Session, base: Path, positions: PositionsInfo | None) -> Path:
    """Write the table `chosen`, and what is in `picked`, as the plan's Parquet, best first, whole or not at all."""
    more = ", positions" + ", weights" * positions.weighted if positions is not None else ""
    join = "join picked using (id) " if positions is not None else ""
    path, _ = plan_files(base)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    remove_leftover(temporary)
    with removed_on_failure(temporary):
        session.execute(
            f"copy (select id, repeats{more} from chosen {join}where repeats > 0 order by value desc, id) "
            f"to {literal(str(temporary.resolve()))} (format parquet, compression zstd)"
        )
        settle(temporary, path)
    return path
