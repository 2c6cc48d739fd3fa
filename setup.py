"""The wheel has one top-level name, `kdata`. Its parts `pipelines`, `trainer`, `schemas` stand beside it in the repository.

So a user's `trainer.py` or `schemas/` does not hide ours, and ours does not hide theirs. The rest is in pyproject.toml.
"""

from setuptools import find_packages, setup

BESIDE = ("pipelines", "schemas", "trainer")

setup(
    packages=find_packages(include=["kdata", "kdata.*"])
    + [f"kdata.{name}" for part in BESIDE for name in (part, *(f"{part}.{p}" for p in find_packages(part)))],
    package_dir={f"kdata.{part}": part for part in BESIDE},
)
