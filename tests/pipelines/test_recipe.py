"""Recipes that could not end well are refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdata.errors import ConfigError
from kdata.pipelines.recipe import load_recipe


def test_an_objective_that_the_kept_targets_could_not_serve_is_refused() -> None:
    wanted = ["students.plan.objective.weights={jsd: 1.0}"]
    assert load_recipe(Path("quickstart"), wanted).keep.kind == "hybrid"
    with pytest.raises(ConfigError, match="jsd is not linear"):
        load_recipe(Path("quickstart"), [*wanted, "keep={kind: sampled, num_draws: 50}"])
    with pytest.raises(ConfigError, match=r"capture the text again|log-sum-exp"):
        load_recipe(Path("quickstart"), ["students.plan.objective.temperature=2.0"])


def test_settings_of_the_former_builtin_section_are_refused() -> None:
    """The built-in models ship trained, so a recipe that still sizes them is an error, not ignored."""
    with pytest.raises(ConfigError, match="builtin"):
        load_recipe(Path("quickstart"), ["builtin.teacher.steps=60"])
