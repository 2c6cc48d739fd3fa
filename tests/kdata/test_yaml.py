"""YAML of strangers: recipes and settings with bombs, depth, long numbers, dates, tags."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from kdata.config import MAX_YAML_DEPTH, apply_settings, parse_yaml, read_yaml
from kdata.errors import ConfigError, KdataError
from tests.campaigns.mutations import YAML_TEXTS

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
)
MERGES = "a0: &a0 {k0: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 14))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "values"),
        (MERGES, "values"),
        ("a: &x [*x]", "alias"),
        ("[" * 100_000, "inside of each other"),
        ("- " * (MAX_YAML_DEPTH + 10), "inside of each other"),
        ("k: " + "9" * 6000, "6,000 digits"),
        ("k: 99999999999999999999", "18 digits"),
        ("a: 1\na: 2", "'a' is repeated"),
        ("? [a]\n: b", "key of a mapping"),
        ("1: a", "not text"),
        ("a: .inf", "finite"),
        ("a: !!python/object/apply:os.system [ls]", "tag"),
        ("a: !!binary zz", "tag"),
        ("a: !!timestamp 2026-02-31", "tag"),
        ("x" * (2 << 20), "bytes"),
        ("a: \x00", "character"),
        ("a: *nothing", "undefined alias"),
    ],
    ids=lambda value: str(value)[:12].strip(),
)
def test_a_hostile_text_is_refused_in_seconds(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    begun = time.process_time()
    with pytest.raises(ConfigError, match=reason) as caught:
        read_yaml(tmp_path / "recipe.yaml")
    assert time.process_time() - begun < 5 and len(str(caught.value)) < 1000
    with pytest.raises(ConfigError):
        apply_settings({}, [f"a={text}"])


@pytest.mark.parametrize("text", YAML_TEXTS, ids=range(len(YAML_TEXTS)))
def test_every_text_of_the_campaign_is_read_or_refused(text: str) -> None:
    try:
        parse_yaml(text)
    except KdataError as error:
        assert str(error)


@pytest.mark.parametrize("name", ["quickstart", "gemma"])
def test_an_ordinary_recipe_is_read_as_yaml_reads_it(name: str) -> None:
    path = Path(__file__).parents[2] / "pipelines" / f"{name}.yaml"
    assert read_yaml(path) == yaml.safe_load(path.read_text("utf-8"))


def test_a_date_stays_text_and_aliases_work() -> None:
    assert parse_yaml("a: 2026-02-31\nb: 2026-01-02") == {"a": "2026-02-31", "b": "2026-01-02"}
    assert parse_yaml("a: &x {k: 1}\nb: {<<: *x, l: 2}\nc: *x") == {"a": {"k": 1}, "b": {"k": 1, "l": 2}, "c": {"k": 1}}
