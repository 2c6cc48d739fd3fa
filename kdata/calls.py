"""Arguments of public functions: each is what its annotation says, or the call is refused before it does anything.

`validated` is the one rule. pydantic reads every argument by the annotation of its parameter: a mapping becomes the settings
class that stands there, a text a path, an array a list of its values. What cannot be read so is a ConfigError that names the
parameter, what came, what it takes, and an example. A number is no text and no bool, and whole numbers of numpy and torch are
read exactly; pydantic by itself reads "3" and True, and numpy's int64 as a float64.
"""

from __future__ import annotations

import inspect
import operator
import os
import types
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from functools import cache, partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field, InstanceOf, Strict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from kdata.config import MAX_SHOWN, shown
from kdata.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])
# What pydantic reads by itself: how a message calls it, and an example of it.
PLAIN: dict[Any, tuple[str, str]] = {
    Path: ("a path", "'FOLDER'"),
    str: ("text", "'TEXT'"),
    bool: ("True or False", "True"),
    int: ("a whole number", "1"),
    float: ("a number", "0.5"),
    dict: ("a mapping", "{'KEY': 'VALUE'}"),
    np.ndarray: ("an array", "[0, 1]"),
    Any: ("any value", "'VALUE'"),
    Callable: ("a function", ""),
    type(None): ("None", "None"),
}
LISTS = (list, Sequence, Iterable)
UNIONS = (Union, types.UnionType)


def validated(function: Function) -> Function:
    """Have a function or method take its arguments by its annotations; see the module.

    Raises:
        ConfigError: by the function, where an argument is not what its parameter takes.
        TypeError: by the function, as Python's own: an argument is missing, or there is no parameter of its name.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's message names the function
        problems: list[ConfigError] = []
        for name, read in _parameters(function).items():
            if name in bound.arguments:
                try:
                    bound.arguments[name] = read(bound.arguments[name])
                except ConfigError as problem:
                    problems.append(problem)
        if problems:
            first = next(iter(bound.arguments.values()))
            title = type(first).__name__ if function.__name__ == "__init__" else function.__qualname__
            listing = f" {problems[0]}" if len(problems) == 1 else "".join(f"\n  {one}" for one in problems)
            raise ConfigError(f"{title}:{listing}") from problems[0].__cause__
        return function(*bound.args, **bound.kwargs)

    return cast(Function, call)


@cache
def _parameters(function: Callable[..., Any]) -> dict[str, Callable[[Any], Any]]:
    """How each annotated parameter of a function reads its argument. At the first call: annotations may name later code."""
    kinds = {name: one.kind for name, one in inspect.signature(function).parameters.items()}
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = {name: text for name, text in function.__annotations__.items() if kinds.get(name, several[0]) not in several}
    hints = get_type_hints(types.SimpleNamespace(__annotations__=own), function.__globals__, include_extras=True)
    return {name: partial(_read, name, hint, TypeAdapter(_readable(hint))) for name, hint in hints.items()}


def _read(parameter: str, annotation: Any, adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        problem = max(error.errors(), key=lambda one: sum(isinstance(part, int) for part in one["loc"]))
        own = problem.get("ctx", {}).get("error")
        if isinstance(own, ConfigError):  # of a settings class
            raise ConfigError(f"{parameter}: {own}") from error
        where = parameter + "".join(f"[{part}]" for part in _keys(value, problem["loc"]))
        example = _example(annotation)
        if isinstance(value, str) and len(value) <= MAX_SHOWN and example == f"[{PLAIN[str][1]}]":
            example = repr([value])
        raise ConfigError(
            f"{where} is {_shown(problem['input'])} ({type(problem['input']).__name__}); {parameter} takes "
            f"{_words(annotation)}{f', for instance {parameter}={example}' if example else ''}"
        ) from error


def _keys(value: Any, location: tuple[int | str, ...]) -> Iterator[str]:
    """Where in an argument a problem is, as it is written in code: numbers of lists, keys of mappings."""
    for part in location:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
            yield repr(part)
        elif isinstance(part, int):
            value = None
            yield str(part)


def _shown(value: Any) -> str:
    """A value that does not fit; of a mapping its keys alone, because what stands there may be secret, such as a token."""
    if not isinstance(value, Mapping):
        return shown(value)
    keys = ", ".join(f"{key!r}: ..." for key in value)
    return f"{{{keys}}}" if len(keys) <= MAX_SHOWN else f"a {type(value).__name__}"


def _readable(annotation: Any) -> Any:
    """An annotation as pydantic should read it: classes of ours and of libraries as they are, settings also as mappings."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[(_readable(inner[0]), *inner[1:])]
    if origin in UNIONS:
        if np.ndarray in inner and any(get_origin(one) in LISTS for one in inner):
            rest = tuple(_readable(one) for one in inner if one is not np.ndarray)  # an array stays one
            return Annotated[Union[(_ARRAY, *rest)], IN_ORDER]
        return Union[tuple(_readable(one) for one in inner)]  # noqa: UP007
    if origin in LISTS:
        return Annotated[list[_readable(inner[0])], Field(fail_fast=True), BeforeValidator(_as_list)]  # type: ignore[misc]
    if isinstance(annotation, TypeVar):
        return _readable(annotation.__bound__)
    if getattr(annotation, "_is_protocol", False):
        return Any  # whatever has its members
    if annotation in READ:
        return READ[annotation]
    if annotation is np.ndarray:
        return Annotated[_ARRAY, BeforeValidator(_as_array)]
    if origin in (dict, Mapping):
        return origin[tuple(_readable(one) for one in inner)]
    if origin is not None or annotation in PLAIN:
        return annotation
    instance = Annotated[annotation, InstanceOf()]
    if issubclass(annotation, BaseModel):
        return Annotated[instance, BeforeValidator(partial(_as_settings, annotation))]
    return instance


def _as_settings(model: type[BaseModel], value: Any) -> Any:
    return model(**{str(key): one for key, one in value.items()}) if isinstance(value, Mapping) else value


def _as_array(value: Any) -> Any:
    """Lists, tensors and columns of other libraries as an array; anything else as it is. Raises ValueError for 1 and True."""
    if isinstance(value, np.generic) or not (isinstance(value, list | tuple | range) or hasattr(value, "__array__")):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, RuntimeError):  # a tensor on another device, or one with a gradient
        return value
    if array.dtype != bool and isinstance(value, list | tuple) and any(isinstance(one, bool) for one in value):
        raise ValueError("numpy would take True for 1")
    return array


def _as_list(value: Any) -> Any:
    """The values of an array or a column of numpy, pandas, pyarrow or polars, or of an iterator; others as they are.

    Raises ValueError for a set: it has another order in every process, and the order of rows counts.
    """
    if isinstance(value, list | str | bytes | bytearray):
        return value
    if isinstance(value, set | frozenset):
        raise ValueError("a set has no order")
    for method in ("tolist", "to_list", "to_pylist", "as_py"):
        if callable(listed := getattr(value, method, None)):
            return listed()
    return list(value) if isinstance(value, Sequence | Iterator | KeysView | ValuesView) else value


def _as_path(value: Any) -> Any:
    """What names a file by itself as a path. Raises ValueError for a URL: as a path it would be a folder here."""
    if isinstance(value, str) and "://" in value:
        raise ValueError("a URL")
    name = os.fspath(value) if isinstance(value, os.PathLike) and not isinstance(value, Path) else None
    return Path(name) if isinstance(name, str) else value


def _as_truth(value: Any) -> Any:
    if isinstance(value, str | bytes | float):
        raise ValueError("pydantic would take 'no' for False")
    return value


def _as_whole(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        raise ValueError("a bool is no number")
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError("not a whole number") from error


def _as_number(value: Any) -> Any:
    if isinstance(value, bool | np.bool_ | str | bytes):
        raise ValueError("not a number")
    return value


IN_ORDER = Field(union_mode="left_to_right")
_ARRAY = Annotated[np.ndarray, InstanceOf()]
# Python's own numbers first, without a call of Python for each: lists of them are long.
READ: dict[Any, Any] = {
    Path: Annotated[Path, BeforeValidator(_as_path)],
    str: Annotated[str, Strict()],  # no bytes
    bool: Annotated[bool, BeforeValidator(_as_truth)],
    int: Annotated[Annotated[int, Strict()] | Annotated[int, BeforeValidator(_as_whole)], IN_ORDER],
    float: Annotated[Annotated[float, Strict()] | Annotated[float, BeforeValidator(_as_number)], IN_ORDER],
}


def _words(annotation: Any) -> str:
    """What a parameter takes."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(inner[0])
    if origin in UNIONS:
        return " or ".join(dict.fromkeys(_words(one) for one in inner))
    if origin is Literal:
        return "one of " + ", ".join(repr(one) for one in inner)
    if origin in LISTS:
        return f"a list ({_words(inner[0])} each)"
    if isinstance(annotation, TypeVar):
        return _words(annotation.__bound__)
    if origin is not None or annotation in PLAIN:
        return PLAIN[_kind(annotation)][0]
    name = str(annotation.__name__)
    return f"{name} or a mapping of its settings" if issubclass(annotation, BaseModel) else name


def _example(annotation: Any) -> str:
    """One value that a parameter takes, as code; '' where it takes what only other code makes, such as a model."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = [one.examples[0] for one in inner[1:] if isinstance(one, FieldInfo) and one.examples]
        return repr(own[0]) if own else _example(inner[0])
    if origin in UNIONS:
        examples = [one for one in map(_example, inner) if one not in ("", "None")]
        return next((one for one in examples if one == PLAIN[Path][1]), examples[0] if examples else "")
    if origin is Literal:
        return repr(inner[0])
    if origin in LISTS:
        return f"[{_example(inner[0])}]"
    if isinstance(annotation, TypeVar):
        return _example(annotation.__bound__)
    if origin is not None or annotation in PLAIN:
        return PLAIN[_kind(annotation)][1]
    if issubclass(annotation, BaseModel):
        needed = ((name, one) for name, one in annotation.model_fields.items() if one.is_required())
        return f"{annotation.__name__}({', '.join(f'{name}={_example_of(one)}' for name, one in needed)})"
    return ""


def _example_of(field: FieldInfo) -> str:
    return repr(field.examples[0]) if field.examples else _example(field.annotation)


def _kind(annotation: Any) -> Any:
    """The key of PLAIN."""
    origin = get_origin(annotation)
    return annotation if origin is None else origin if origin is Callable else dict
