"""Arguments of public functions: each is what its annotation says, or the call is refused before it does anything.

`validated` is the one rule. pydantic reads every argument by the annotation of its parameter: a mapping becomes the settings
class that stands there, a text a path, an array a list of its values. What cannot be read so is a ConfigError that names the
parameter, what came, what it takes, and an example.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import BaseModel, BeforeValidator, InstanceOf, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from kdata.config import shown
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
    type(None): ("None", "None"),
}
LISTS = (list, Sequence, Iterable, tuple)
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
        where = parameter + "".join(f"[{part}]" for part in problem["loc"] if isinstance(part, int))
        example = _example(annotation)
        if isinstance(value, str) and example == f"[{PLAIN[str][1]}]":
            example = repr([value])
        raise ConfigError(
            f"{where} is {shown(problem['input'])} ({type(problem['input']).__name__}); {parameter} takes "
            f"{_words(annotation)}{f', for instance {parameter}={example}' if example else ''}"
        ) from error


def _readable(annotation: Any) -> Any:
    """An annotation as pydantic should read it: classes of ours and of libraries as they are, settings also as mappings."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[(_readable(inner[0]), *inner[1:])]
    if origin in UNIONS:
        return Union[tuple(_readable(one) for one in inner)]  # noqa: UP007
    if origin in LISTS:
        return Annotated[origin[tuple(_readable(one) for one in inner)], BeforeValidator(_as_list)]
    if isinstance(annotation, TypeVar):
        return _readable(annotation.__bound__)
    if getattr(annotation, "_is_protocol", False):
        return Any  # whatever has its members
    instance = Annotated[annotation, InstanceOf()]
    if annotation is np.ndarray:
        return Annotated[instance, BeforeValidator(_as_array)]
    if origin is not None or annotation in PLAIN:
        return annotation
    if issubclass(annotation, BaseModel):
        return Annotated[instance, BeforeValidator(partial(_as_settings, annotation))]
    return instance


def _as_settings(model: type[BaseModel], value: Any) -> Any:
    return model(**{str(key): one for key, one in value.items()}) if isinstance(value, Mapping) else value


def _as_array(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, list | tuple | range) else value


def _as_list(value: Any) -> Any:
    """The values of an array or a column of numpy, pandas, pyarrow or polars; anything else as it is."""
    if isinstance(value, Sequence):
        return value
    listed = getattr(value, "tolist", None) or getattr(value, "to_list", None)
    return listed() if callable(listed) else value


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
        return PLAIN[dict if origin not in (None, Callable) else annotation][0]
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
        return PLAIN[dict if origin is not None else annotation][1]
    if issubclass(annotation, BaseModel):
        needed = ((name, one) for name, one in annotation.model_fields.items() if one.is_required())
        return f"{annotation.__name__}({', '.join(f'{name}={_example_of(one)}' for name, one in needed)})"
    return ""


def _example_of(field: FieldInfo) -> str:
    return repr(field.examples[0]) if field.examples else _example(field.annotation)
