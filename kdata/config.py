"""From YAML or `--set key=value` to a typed model, with errors that name the key, the value and the nearest known key."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdata.errors import ConfigError, MissingError, nearest, secret_path

# Limits of a YAML text; a recipe has a few hundred values, at most six deep.
MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 64
MAX_YAML_VALUES = 20_000  # aliases counted as what they stand for
MAX_DIGITS = 25  # of a number, before it is read
MAX_SHOWN = 200  # characters of a wrong value in a message
MAX_PROBLEMS = 20  # in a message
MAX_WHOLE = 2**63  # integers: what everything that is written holds


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation, on one line."""
    problem = error.errors()[0]
    return f"{'.'.join(str(part) for part in problem['loc']) or 'value'}: {problem['msg']}"


class _CalledFromPython(type(BaseModel)):  # type: ignore[misc]
    """Turns what pydantic says of a call into a ConfigError, and a Path into its text, as it will be recorded.

    What is validated inside of a model stays pydantic's.
    """

    def __call__(cls, *args: Any, **values: Any) -> Any:
        values = {key: as_written(value) for key, value in values.items()}
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise _refused(cls, error, cls.__name__, in_python=True) from error


def as_written(value: Any) -> Any:
    """A value with texts for paths and Python's whole numbers for numpy's, in tables and lists too.

    pydantic would read the latter as float64, which has not all of 64 bits.
    """
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    if type(value) is dict:
        return {key: as_written(inner) for key, inner in value.items()}
    return [as_written(inner) for inner in value] if type(value) is list else value


if TYPE_CHECKING:
    Settings = BaseModel
else:  # a type checker knows pydantic's own metaclass alone

    class Settings(BaseModel, metaclass=_CalledFromPython):
        """A model whose call with wrong values raises ConfigError, as `parse_config` does.

        It takes no True or False for a number, as pydantic does: `share: on` is True in YAML, and would be 1, all rows.
        """

        @model_validator(mode="before")
        @classmethod
        def _no_truth_for_a_number(cls, values: Any) -> Any:
            for key, value in values.items() if isinstance(values, dict) else ():
                leaves = _leaves(cls.model_fields[key].annotation) if key in cls.model_fields else set()
                if leaves & {int, float} and not leaves & {bool, Any} and _has_truth(value):
                    raise ValueError(f"{key} takes a number, and True and False are none (got {shown(value)})")
            return values


def _leaves(annotation: Any) -> set[Any]:
    """The types that an annotation is made of; the class of each value of a literal."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    inner = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return {leaf for one in inner for leaf in _leaves(one)} if inner else {annotation}


def _has_truth(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(_has_truth(one) for one in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool)


class WithoutSecrets(Settings):
    """A model that refuses passwords and tokens in its values: they would be recorded and shown."""

    @model_validator(mode="before")
    @classmethod
    def _no_secret(cls, values: Any) -> Any:
        if (path := secret_path(values)) is not None:
            raise ValueError(
                f"{'.'.join(path) or 'a key'} holds what looks like a password or a token (not repeated here), and settings "
                "are recorded and shown; put it into an environment variable, or where its program looks for it"
            )
        return values


class Strict(WithoutSecrets):
    """A model that refuses keys it does not know, numbers that are not finite, and passwords and tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RowsConfig(Strict):
    """What every command that reads rows takes."""

    strict: bool = Field(
        False,
        description="A row that cannot be used ends the work with an error that names row and reason; false puts it aside in "
        "the dataset's rejects and goes on.",
    )


VERSION = "0.1.0"  # of this package, as in pyproject.toml
Model = TypeVar("Model", bound=BaseModel)
NEVER_REPEATED = ("auth_env",)  # keys where people put a token itself
TAGS = ("kind", "method", "rule")  # keys that choose one model of a union


def parse_config(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """Validate `values` as `model`. Raises ConfigError: one problem on one line, or several, a line each."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _refused(model, error, where) from error


def _refused(model: type[BaseModel], error: ValidationError, where: str, *, in_python: bool = False) -> ConfigError:
    problems = error.errors()
    lines = [_problem(model, problem, in_python) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"and {len(problems) - MAX_PROBLEMS:,} more")
    listing = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
    return ConfigError(f"{where}:{listing}")


def _problem(model: type[BaseModel], problem: Any, in_python: bool) -> str:
    path, models = _follow(model, [_short(str(part)) for part in problem["loc"]])
    key, known = ".".join(path), sorted({name for m in models for name in m.model_fields})
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(path[-1], known)}; known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key!r} is missing{_meaning(models, path, in_python)}"
    if problem["type"] == "union_tag_not_found":
        return f"{'.'.join([*path, problem['ctx']['discriminator'].strip(chr(39))])!r} is missing"
    if problem["type"] == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in problem["ctx"]["expected_tags"].split(",")]
        tag, name = _short(problem["ctx"]["tag"]), problem["ctx"]["discriminator"].strip("'")
        return f"{key + '.' if key else ''}{name}: {tag!r} is none of {', '.join(tags)}{nearest(tag, tags)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(problem["input"], str) and path and path[-1] in NEVER_REPEATED:
        return f"{key}: {message}"
    # What a rule about several keys refuses is the whole mapping, and the message names the keys.
    value = (
        ""
        if problem["type"] == "value_error" and isinstance(problem["input"], dict)
        else f" (got {shown(problem['input'])})"
    )
    return f"{key + ': ' if key else ''}{message}{value}"


def _short(key: str) -> str:
    return key if len(key) <= MAX_SHOWN else f"{key[: MAX_SHOWN - 3]}..."


def shown(value: Any) -> str:
    """A value for a message; of one that would fill a page, such as a table, its type."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN and "\n" not in text else f"a {type(value).__name__}"


def _meaning(models: list[type[BaseModel]], path: list[str], in_python: bool) -> str:
    """What a setting means, and how it is set where its field has an example."""
    field = next((m.model_fields[path[-1]] for m in models if path[-1] in m.model_fields), None)
    if field is None or not field.description:
        return ""
    text = f". {field.description.rstrip('.')}"
    if not field.examples:
        return text
    example = field.examples[0]
    if in_python:
        return f"{text}. For instance: {path[-1]}={example!r}"
    value = example if isinstance(example, str) else json.dumps(example)
    return f"{text}. For instance: --set {shlex.quote('.'.join(path) + '=' + value)}"


def _follow(model: type[BaseModel], location: list[str]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys of a location in a model, and the models that may have the last one.

    Where `kind`, `method` or `rule` chooses one of several models, pydantic adds its value to the location, although it is
    not a key.
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
    return [*path, *location[-1:]], models


def _inner(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation such as `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _inner(inner)]


class _Loader(yaml.SafeLoader):
    """YAML of JSON's values only: no dates (they stay text), no sets, no binary values, no tags of its own."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in some if not tag.endswith(":timestamp")]
    for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge", "value")
}


def parse_yaml(text: bytes | str) -> Any:
    """The value of a YAML text: what JSON can hold, within the limits of this module.

    Raises:
        ConfigError: it is not YAML, a key is repeated, or it is beyond a limit: bytes, depth, number of values (aliases count
            as what they stand for), digits of a number.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(f"it has more than {MAX_YAML_BYTES:,} bytes")
    try:
        _check_events(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node, {}, ())
            value = loader.construct_document(node)
        finally:
            loader.dispose()
        _check_values(value)
        return value
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # a number with thousands of digits, bytes that are not text
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def _check_events(text: bytes | str) -> None:
    """Refuse what is too deep or too long before anything is built of it."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, _Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH or count > 2 * MAX_YAML_VALUES:
            raise ConfigError(
                f"it has more than {MAX_YAML_VALUES:,} values, or more than {MAX_YAML_DEPTH} inside of each other"
            )


def _check_node(node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Number of values in a node, aliases counted as what they stand for."""
    if id(node) in above:
        raise ConfigError("an alias stands for something that holds the alias")
    if node.tag not in _TAGS:
        raise ConfigError(
            f"it has a value with the tag {node.tag[:80]!r}; write text, numbers, true, false, null, lists, mappings"
        )
    if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
        raise ConfigError(f"it has a number of {len(node.value):,} digits")
    if id(node) not in sizes:
        count, inside = 1, (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(keys) < len(node.value):
                raise ConfigError("a key of a mapping is a list or a mapping; write text")
            if twice := [key for key, times in Counter(keys).items() if times > 1 and key != "<<"]:
                raise ConfigError(f"the key {twice[0][:80]!r} is repeated")
            count += sum(_check_node(value, sizes, inside) for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            count += sum(_check_node(value, sizes, inside) for value in node.value)
        sizes[id(node)] = count
    if sizes[id(node)] > MAX_YAML_VALUES:
        raise ConfigError(f"it has more than {MAX_YAML_VALUES:,} values, counted with what its aliases stand for")
    return sizes[id(node)]


def _check_values(value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"the key {str(key)[:80]} is not text; put it in quotes")
            _check_values(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner)
    elif isinstance(value, int) and not -MAX_WHOLE <= value < MAX_WHOLE:
        raise ConfigError("it has a number of more than 18 digits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError("it has a number that is not finite (.inf or .nan)")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises MissingError or ConfigError."""
    if not path.is_file():
        raise MissingError(f"{path} does not exist; name a file of settings")
    try:
        with path.open("rb") as file:
            values = parse_yaml(file.read(MAX_YAML_BYTES + 1))
    except ConfigError as error:
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
            value = parse_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"--set {key}: {text[:200]!r} is not a YAML value ({error})") from error
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
