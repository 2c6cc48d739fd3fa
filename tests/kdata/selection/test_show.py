"""Plans as tables and pictures, and two of them side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

import kdata
from kdata.errors import ConfigError, KdataError, MismatchError, MissingError
from kdata.pipelines.cli.main import app
from kdata.pipelines.evidence.verdicts import LEGEND
from kdata.selection import show as plan_show
from kdata.selection.mixtures import Cap, Static, Uniform
from kdata.selection.plan import Plan, make_plan, open_plan
from kdata.selection.position_rules import RandomPositions, SqlPositions
from kdata.selection.ranked import All, Difference, Random
from kdata.selection.select import METHODS, select
from kdata.selection.show import Overlap, compare, comparison_table, draw, table_of
from tests.kdata.selection.plans import Row, dataset_of, score_with

RUNNER = CliRunner(env={"COLUMNS": "120"})


@pytest.fixture
def dataset(tmp_path: Path) -> kdata.Dataset:
    """Ten rows: code has r0 to r3 (2 tokens each), prose r4 to r9 (4 each); the difference of rN is N."""
    rows = [Row(f"r{n}", "code" if n < 4 else "prose", 2 if n < 4 else 4, 1.0) for n in range(10)]
    dataset = dataset_of(tmp_path / "d", rows)
    score_with(dataset, {f"r{n}": 1.0 + n for n in range(10)})
    return dataset


def test_a_table_shows_what_was_requested_and_chosen(dataset: kdata.Dataset) -> None:
    select(dataset, Difference(share=0.8))  # r2 to r9
    plan = select(dataset, Static(parent="difference", weights={"code": 1, "prose": 1}, size=30, max_repeats=4))
    shown = table_of(plan)
    assert shown.title == "plan static: 5 rows, 26 tokens"
    assert shown.columns == [
        "domain",
        "sequences",
        "tokens",
        "tokens requested",
        "rows chosen",
        "sequences chosen",
        "tokens chosen",
    ]
    rows = {row[0]: [cell.split() for cell in row[1:]] for row in shown.rows}
    assert rows["code"][:3] == [["4", "40.0%"], ["8", "25.0%"], ["15", "50.0%"]]
    assert rows["prose"][:3] == [["6", "60.0%"], ["24", "75.0%"], ["15", "50.0%"]]
    assert (
        rows["code"][3][0] == "2" and rows["code"][4][0] == "7" and rows["code"][5][0] == "14"
    )  # 3 passes of 2, and one
    assert rows["prose"][3:] == [["3", "60.0%"], ["3", "30.0%"], ["12", "46.2%"]]
    assert rows["all"] == [["10"], ["32"], ["30"], ["5"], ["10"], ["26"]]
    assert "requested 30 tokens, chose 26" in shown.notes
    assert any(note.startswith("from plan difference (") for note in shown.notes)


def test_of_many_domains_the_largest_have_lines_of_their_own(tmp_path: Path) -> None:
    """Thousands of lines would push what the plan says off the screen; the others are one line, and sums stay."""
    rows = [Row(f"r{n:03}", "" if n == 99 else f"d{n:02}", 2 + n, float(n)) for n in range(100)]
    data = dataset_of(tmp_path / "many", rows)
    plan = select(data, Random(name="a", share=0.5, by_domain=False))
    select(data, Static(name="b", weights={row.domain: 1 for row in rows}, size=100, count_by="sequences"))
    for shown in (table_of(plan), comparison_table(compare(data, "a", "b"))):
        names = [row[0] for row in shown.rows]
        assert len(names) == 42 and names[-2:] == ["60 others", "all"]
        assert "40 largest of 100 domains" in " ".join(shown.notes)
        own = [int(row[1].split()[0].replace(",", "")) for row in shown.rows]
        assert sum(own[:-1]) == own[-1]
    assert "(empty)" in [row[0] for row in table_of(plan).rows]
    weights = next(note for note in table_of(open_plan(data, "b")).notes if note.startswith("method static"))
    assert "88 others}" in weights


def test_the_picture_shows_shares_and_the_cut(dataset: kdata.Dataset, tmp_path: Path) -> None:
    plan = select(dataset, Difference(share=0.3))
    bars = plan_show._histogram(dataset, plan)
    assert bars is not None and (bars.low, bars.high) == (0.0, 9.0)
    assert bars.all.sum() == 10 and bars.chosen.sum() == 3 and bars.chosen[-1] == 1 and bars.chosen[0] == 0
    plain = imread(draw(dataset, select(dataset, Random(share=0.3)), tmp_path / "random.png"))
    cut = imread(draw(dataset, plan, tmp_path / "sub/difference.png"))
    assert cut.shape[0] > plain.shape[0] + 200 and cut.shape[1] == plain.shape[1]  # a panel more
    assert len(np.unique(cut.reshape(-1, cut.shape[2]), axis=0)) > 5
    for path in (tmp_path / "p.svg", tmp_path / "p.pdf"):
        assert draw(dataset, plan, path).stat().st_size > 1000
    with pytest.raises(ConfigError, match=r"a picture ends in \.png, \.svg, \.pdf"):
        draw(dataset, plan, tmp_path / "p.html")


def test_signs_that_the_font_lacks_are_one_line(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataset_of(tmp_path / "d", [Row("a", "\u4e2d\u6587", 2, 1.0), Row("b", "\u65e5\u672c", 2, 2.0)])
    plan = select(data, All())
    draw(data, plan, tmp_path / "a.png")
    assert capsys.readouterr().err.count("some are boxes") == 1 and not recwarn.list
    draw(data, plan, tmp_path / "a.svg")
    assert "\u4e2d\u6587" in (tmp_path / "a.svg").read_text() and "boxes" not in capsys.readouterr().err
    assert not recwarn.list


def test_no_histogram_where_the_plan_s_inputs_have_changed(dataset: kdata.Dataset, tmp_path: Path) -> None:
    plan = select(dataset, Difference(share=0.3))
    half = select(dataset, Difference(share=0.5, by_domain=True, name="half"))
    further = select(dataset, Difference(parent="half", share=0.5, name="further"))
    bars = plan_show._histogram(dataset, further)
    assert bars is not None and bars.all.sum() == 5 and bars.chosen.sum() == 3 and half.info.num_rows == 5
    select(dataset, Difference(share=0.6, by_domain=True, name="half"))  # another parent of that name
    assert plan_show._histogram(dataset, further) is None
    score_with(dataset, {f"r{n}": 1.5 for n in range(10)})
    assert plan_show._histogram(dataset, plan) is None
    assert draw(dataset, plan, tmp_path / "p.png").exists()


def test_two_plans_side_by_side(dataset: kdata.Dataset) -> None:
    select(dataset, Difference(share=0.6))  # r4 .. r9
    select(dataset, Difference(share=0.5, by_domain=True, name="each"))  # r2 r3, r7 r8 r9
    comparison = compare(dataset, "difference", "each")
    assert comparison.domains == {"code": Overlap(0, 0, 2, 0.0, 0.25), "prose": Overlap(3, 3, 0, 1.0, 0.75)}
    assert comparison.overall == Overlap(3, 3, 2, 1.0, 1.0)
    assert comparison.only_first_examples == ["r4"] and comparison.only_second_examples == ["r2"]
    shown = comparison_table(comparison)
    rows = {row[0]: row[1:] for row in shown.rows}
    assert rows["code"] == ["0", "0", "2", "0.000", "0.0%", "25.0%", "+25.0"]
    assert rows["prose"] == ["3", "3", "0", "0.500", "100.0%", "75.0%", "-25.0"]
    assert rows["all"][:4] == ["3", "3", "2", "0.375"]
    assert shown.notes == ["only in difference, for example: r4", "only in each, for example: r2"]
    same = {row[0]: row[1:] for row in comparison_table(compare(dataset, "each", "each")).rows}
    assert same["all"][:4] == ["0", "5", "0", "1.000"]
    with pytest.raises(MissingError, match="nobody"):
        compare(dataset, "each", "nobody")
    with pytest.raises(ConfigError, match="is not a valid plan name"):
        compare(dataset, "each", 'each" as x, "y')


def test_a_plan_of_another_state_is_not_shown(dataset: kdata.Dataset) -> None:
    select(dataset, Uniform())
    grown = dataset_of(dataset.path, [Row("new")], source="more")
    for call in (lambda: open_plan(grown, "uniform"), lambda: compare(grown, "uniform", "uniform")):
        with pytest.raises(MismatchError, match="Run `kdata select` again"):
            call()


def test_the_commands(dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        done = RUNNER.invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    root = dataset.path
    assert "plan all: 10 rows" in call("select", root), "the default"
    assert "plan difference: 5 rows" in call("select", root, "--method", "difference")
    call("select", root, "--method", "static", "--parent", "difference", "--weights", "code=0,prose=1", "--count-by",
         "sequences", "--size", 8, "--max-repeats", 2, "--name", "mixed", "--threads", 1, "--memory", "1GB")  # fmt: skip
    call(
        "select",
        root,
        "--method",
        "cap",
        "--parent",
        "mixed",
        "--size",
        4,
        "--set",
        "count_by=sequences",
        "--take",
        "first",
    )
    shown = call("plan", "show", root, "cap")
    assert "requested 4 sequences, chose 4" in shown and "from plan mixed" in shown
    assert Path("plan-cap.png").stat().st_size > 1000
    assert "only mixed" in call("plan", "compare", root, "mixed", "cap")
    comparison = json.loads(call("plan", "compare", root, "mixed", "cap", "--format", "json"))
    assert comparison == asdict(compare(dataset, "mixed", "cap"))
    assert (
        comparison["second"] == "cap"
        and comparison["overall"]["only_first"] > 0 == comparison["overall"]["only_second"]
    )
    query = "select id from rows where num_tokens = 4 limit 2"
    assert "plan sql: 2 rows" in call("select", root, "--sql", query)
    assert f"method sql: {query}" in call("plan", "show", root, "sql")
    assert all(method in call("select", "--help") for method in METHODS)
    listed = RUNNER.invoke(app, ["select", "--list"], env={"COLUMNS": "80"}).output.splitlines()
    assert all(len(line) <= 80 for line in listed) and all(line in listed for line in LEGEND)
    for name, about in METHODS.items():
        of = [line for line in listed if line.split(" ")[0] == name]
        assert len(of) == 1 and about.CHOOSES in of[0] and about.SOURCE.split(" ")[-1] in of[0]
    assert "scores.margin.margin covers 10 of 10 rows" in call("score", root, "--margins")
    assert "scores.sure.margin covers 10 of 10 rows" in call("score", root, "--margins", "--name", "sure")
    assert "plan random: 4 rows" in call(
        "select", root, "--method", "random", "--share", "0.4", "--by-domain", "--seed", 3
    )
    assert "plan temperature" in call("select", root, "--method", "temperature", "--temperature", 3)
    assert "plan ddk" in call("select", root, "--method", "ddk", "--score", "ref")
    for arguments, words in (
        (["--method", "all", "--share", "0.5"], "unknown key 'share'"),
        (["--method", "static", "--weights", "code"], "write it as DOMAIN=NUMBER"),
        (["--method", "static", "--weights", "code=x"], "write it as DOMAIN=NUMBER"),
        (["--method", "static", "--weights", "code=1,code=3"], "names 'code' twice"),
        (["--method", "differenc"], r"did you mean 'difference'"),
    ):
        done = RUNNER.invoke(app, ["select", str(root), *arguments])
        assert isinstance(done.exception, KdataError) and words in str(done.exception)


def test_the_share_of_positions_of_each_domain_is_shown(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """r0 to r3 have a target each, r4 to r9 three; the first token of every row but r0 is chosen."""
    sql = "select id, 1 as position, 0.5::double as weight from rows where id <> 'r0'"
    plan = select(dataset, All(name="few", positions=SqlPositions(sql=sql)))
    shown = table_of(plan)
    assert shown.title == "plan few: 9 rows, 30 tokens"
    assert shown.columns[-2:] == ["targets", "positions chosen"]
    cells = {row[0]: [cell.split() for cell in row[-2:]] for row in shown.rows}
    assert cells["code"] == [["4", "18.2%"], ["3", "33.3%"]] and cells["prose"] == [["18", "81.8%"], ["6", "66.7%"]]
    assert f"positions by rule sql: {sql}" in shown.notes
    assert (
        "9 of 22 target positions with weights (code 75.0%, prose 33.3%); 1 rows without any are left out"
        in shown.notes
    )
    printed = RUNNER.invoke(app, ["plan", "show", str(dataset.path), "few", "--picture", str(tmp_path / "few.png")])
    assert printed.exit_code == 0 and "positions by rule sql" in printed.output
    described = RUNNER.invoke(app, ["plan", "show", str(dataset.path), "few", "--format", "json"])
    assert json.loads(described.output)["positions"]["domains"]["code"] == {"targets": 4, "positions": 3}
    share = select(dataset, All(name="third", positions=RandomPositions(share=0.33)))
    assert any(
        note.startswith("positions by rule random: share 0.33, per dataset, seed 0") for note in table_of(share).notes
    )


def test_a_plan_names_its_parents_down_to_the_dataset(dataset: kdata.Dataset) -> None:
    """select, mix, cap: each JSON names its parents by their digests, down to the dataset."""
    select(dataset, Difference(share=0.8))
    select(dataset, Uniform(parent="difference", count_by="sequences", name="mix"))
    last = select(dataset, Cap(parent="mix", count_by="sequences", size=2))
    names = ["cap"]
    while open_plan(dataset, names[-1]).info.parents:
        [(parent, digest)] = open_plan(dataset, names[-1]).info.parents.items()
        assert open_plan(dataset, parent).plan_digest == digest
        names.append(parent)
    assert names == ["cap", "mix", "difference"] and last.info.num_rows == 2


def test_a_plan_records_its_settings_under_the_keys_of_older_plans(dataset: kdata.Dataset) -> None:
    """`count_by` is recorded as `unit`, as it always was, so that plans of any age read alike."""
    select(dataset, Difference(share=0.5, count_by="tokens"))
    content = json.loads((dataset.path / "plans/difference.json").read_text())
    assert content["unit"] == "tokens" == content["parameters"]["unit"]
    assert "count_by" not in content and "count_by" not in content["parameters"]
    older = Plan.load(dataset.path / "plans/difference").info
    assert older.count_by == "tokens"
    again = Difference.from_recorded(older.parameters)
    assert again == Difference(share=0.5, count_by="tokens")
    assert select(dataset, again).info == older


def test_tables_are_plain_parquet_for_polars(dataset: kdata.Dataset) -> None:
    """The example of kdata/README.md: rows and scores joined in Polars, a plan of it, and the plan read back."""
    root = dataset.path
    rows = pl.read_parquet(root / "index/*.parquet").join(
        pl.read_parquet(root / "scores/ref/*.parquet"), on="id", suffix="_ref"
    )
    chosen = rows.filter(pl.col("nll_ref") - pl.col("nll") > 5.5)["id"].to_list()
    make_plan(dataset, "mine", chosen, method="polars", parameters={"above": 5.5}).save(root / "plans")
    plan = open_plan(dataset, "mine")
    assert sorted(plan.ids) == ["r6", "r7", "r8", "r9"] and plan.info.parameters == {"above": 5.5}
    table = pl.read_parquet(root / "plans/mine.parquet")
    assert table["id"].to_list() == plan.ids and table["repeats"].to_list() == [1] * 4
    assert "method polars: above 5.5" in table_of(plan).notes
