"""Recipes that could not end well are refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdata.errors import ConfigError, MismatchError
from kdata.pipelines.recipe import EvaluateStage, Recipe, load_recipe
from kdata.pipelines.run import Run
from kdata.selection.position_rules import Entropy
from kdata.selection.ranked import All


def test_an_objective_that_the_kept_targets_could_not_serve_is_refused() -> None:
    wanted = ["students.plan.objective.weights={jsd: 1.0}"]
    assert load_recipe(Path("quickstart"), wanted).keep.kind == "threshold"
    with pytest.raises(ConfigError, match="jsd is not linear"):
        load_recipe(Path("quickstart"), [*wanted, "keep={kind: sampled, num_draws: 50}"])
    with pytest.raises(ConfigError, match=r"capture the text again|log-sum-exp"):
        load_recipe(Path("quickstart"), ["students.plan.objective.temperature=2.0"])


def test_positions_are_a_part_of_selection() -> None:
    """Their settings are checked with the recipe; a weight elsewhere needs a student on a plan with positions."""
    positions = ["select.positions={rule: entropy, share: 0.2}"]
    recipe = load_recipe(Path("quickstart"), positions)
    assert isinstance(recipe.select.positions, Entropy) and recipe.settings()["select"]["positions"]["share"] == 0.2
    assert "positions" not in load_recipe(Path("quickstart"), []).settings()["select"]
    with pytest.raises(ConfigError, match=r"select\.positions\.share"):
        load_recipe(Path("quickstart"), ["select.positions={rule: entropy, share: 2}"])
    elsewhere = [f"students.{name}.objective.cross_entropy_elsewhere=0.1" for name in ("plan", "everything")]
    assert load_recipe(Path("quickstart"), [*positions, elsewhere[0]]).students["plan"].plan
    for settings in ([elsewhere[0]], [*positions, elsewhere[1]]):
        with pytest.raises(ConfigError, match="every target counts"):
            load_recipe(Path("quickstart"), settings)


def test_a_rule_that_reads_scores_reads_the_one_that_the_run_writes() -> None:
    """Difference sampling scores with the reference model, then token by token too."""
    positions = "select.positions={{rule: excess, share: 0.6, score: {}}}"
    recipe = load_recipe(Path("quickstart"), ["select.method=difference", positions.format("ref")])
    assert recipe.select.positions is not None and recipe.select.positions.token_scores() == ["ref"]
    for settings in (
        ["select.method=difference", positions.format("student")],
        ["select.method=random", positions.format("ref")],
    ):
        with pytest.raises(ConfigError, match=r"select\.positions reads the score '(student|ref)' of tokens"):
            load_recipe(Path("quickstart"), settings)


def test_a_query_that_names_a_score_of_tokens_is_such_a_rule(tmp_path: Path) -> None:
    positions = "select.positions={{rule: sql, sql: 'select id, position from tokens where nll_{} > 3'}}"
    recipe = load_recipe(Path("quickstart"), ["select.method=difference", positions.format("ref")])
    assert Run(recipe, tmp_path, {}).scores_tokens
    plain = "select.positions={rule: sql, sql: 'select id, position from tokens where logprob < -3'}"
    assert not Run(load_recipe(Path("quickstart"), ["select.method=difference", plain]), tmp_path, {}).scores_tokens
    with pytest.raises(ConfigError, match=r"select\.positions reads the score 'student' of tokens"):
        load_recipe(Path("quickstart"), ["select.method=difference", positions.format("student")])


def test_settings_of_the_former_builtin_section_are_refused() -> None:
    """The built-in models ship trained, so a recipe that still sizes them is an error, not ignored."""
    with pytest.raises(ConfigError, match="builtin"):
        load_recipe(Path("quickstart"), ["builtin.teacher.steps=60"])


def test_a_run_goes_on_whatever_memory_its_teacher_takes(tmp_path: Path) -> None:
    """Runs from before the cache was sized by the work recorded kv_cache_gib: 1, and no arguments of the engine."""
    from kdata.pipelines.runner import open_run

    def recipe(**teacher: Any) -> Recipe:
        student = {"label": "a", "objective": {"weights": {"cross_entropy": 1.0}}}
        return Recipe.model_validate({"name": "r", "teacher": teacher, "students": {"a": student}})

    out = tmp_path / "run"
    open_run(recipe(), out, "auto")
    state = json.loads((out / "run.json").read_text())
    for name in ("teacher", "reference"):
        state["settings"][name]["kv_cache_gib"] = 1
        del state["settings"][name]["engine_args"], state["settings"][name]["lora"]
    (out / "run.json").write_text(json.dumps(state))
    open_run(recipe(), out, "must")
    open_run(recipe(memory_fraction=0.5, engine_args={"max_num_seqs": 8}), out, "must")
    with pytest.raises(MismatchError, match=r"teacher\.engine_args: None -> \{'quantization': 'fp8'\}"):
        open_run(recipe(engine_args={"quantization": "fp8"}), out, "must")
    with pytest.raises(MismatchError, match=r"teacher\.lora: None -> 'adapter'"):
        open_run(recipe(lora="adapter"), out, "must")
    other = recipe().model_copy(update={"evaluate": EvaluateStage(samples=1)})
    assert open_run(other, out, "must").recipe == other, "nothing is evaluated yet"


def test_a_condition_names_scores_that_the_run_writes() -> None:
    where = "select.where=[\"duplicates.near_keep and language.code = 'en'\"]"
    recipe = load_recipe(Path("quickstart"), [where, "hygiene={}"])
    assert recipe.settings()["hygiene"]["jaccard"] == 0.8
    assert "hygiene" not in load_recipe(Path("gemma"), []).settings()
    for settings, message in (
        (["hygiene=null"], "reads the score 'duplicates', and the run writes none"),
        ([where, "hygiene.checks=[quality]"], "reads the score 'duplicates', and the run writes"),
        ([where, "hygiene.checks=[duplicates]"], "reads the score 'language'"),
        (["hygiene={}", "select.where=[nll >]"], "is not SQL"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe(Path("quickstart"), settings)


def test_without_a_method_a_recipe_takes_every_row_that_meets_its_conditions() -> None:
    """What won in the evidence; the demo does the same, with conditions of hygiene, and needs no reference model."""
    student = {"label": "a", "plan": True, "objective": {"weights": {"cross_entropy": 1.0}}}
    assert Recipe.model_validate({"name": "r", "students": {"a": student}}).select == All()
    demo = load_recipe(Path("quickstart"), [])
    assert isinstance(demo.select, All) and len(demo.select.where) == 4 and demo.hygiene is not None
    assert not Run(demo, Path("out"), {}).uses_score
