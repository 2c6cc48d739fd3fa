"""From YAML or `--set key=value` to a typed model, with errors that name the key, the value and the nearest known key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdata.errors import ConfigError, MissingError, nearest


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation, on one line."""
    problem = error.errors()[0]
    return f"{'.'.join(str(part) for part in problem['loc']) or 'value'}: {problem['msg']}"


class Strict(BaseModel):
    """A model that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RowsConfig(Strict):
    """What every command that reads rows takes."""

    strict: bool = Field(
        False,
        description="A row that cannot be used ends the work with an error that names row and reason; false puts it aside in "
        "the dataset's rejects and goes on.",
    )


VERSION = "0.1.0"  # of this package, as in pyproject.toml
Model = TypeVar("Model", bound=BaseModel)
TAGS = ("kind", "method")  # keys that choose one model of a union


def parse_config(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """Validate `values` as `model`. Raises ConfigError: one problem on one line, or several, a line each."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_problem(model, problem) for problem in error.errors()]
        listing = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
        raise ConfigError(f"{where}:{listing}") from error


def _problem(model: type[BaseModel], problem: Any) -> str:
    path, known = _follow(model, [str(part) for part in problem["loc"]])
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(path[-1], known)}; known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    # What a rule about several keys refuses is the whole mapping, and the message names the keys.
    value = (
        ""
        if problem["type"] == "value_error" and isinstance(problem["input"], dict)
        else f" (got {problem['input']!r})"
    )
    return f"{key + ': ' if key else ''}{message}{value}"


def _follow(model: type[BaseModel], location: list[str]) -> tuple[list[str], list[str]]:
    """The keys of a location in a model, and the keys that are known where the last one stands.

    Where `kind` or `method` chooses one of several models, pydantic adds its value to the location, although it is not a key.
    """
    path, models = [], [model]
    for part in location[:-1]:
        tagged = [m for m in models if any(k in m.model_fields and m.model_fields[k].default == part for k in TAGS)]
        if tagged and len(models) > 1:
            models = tagged
            continue
        path.append(part)
        models = [
            i for m in models if part in m.model_fields for i in _inner(m.model_fields[part].annotation)
        ] or models
    return [*path, *location[-1:]], sorted({key for m in models for key in m.model_fields})


def _inner(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation such as `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _inner(inner)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises MissingError or ConfigError."""
    if not path.is_file():
        raise MissingError(f"{path} does not exist; name a file of settings")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return values


def apply_settings(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Return a copy of `values` with each `dotted.key=value` set (the value is read as YAML)."""
    result = _copy(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {setting!r}: write it as key=value, for instance --set capture.k=32")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {key}: {text!r} is not a YAML value ({error})") from error
        inner = result
        *parents, last = key.strip().split(".")
        for part in parents:
            if not isinstance(inner.setdefault(part, {}), dict):
                inner[part] = {}
            inner = inner[part]
        inner[last] = value
    return result


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in values.items()}
