"""Options in groups: a dataclass of options is one parameter of a command, and its fields are options in --help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer takes it: where a parameter is a dataclass, the options of its fields.

    A field is annotated as a parameter would be, and spells its option out: two groups may have fields of one name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _options(parameter.name, groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))

    @wraps(command)
    def flattened(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(f"{name}_{field.name}") for field in fields(group)})
        command(**values)

    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    flattened.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer looks at
    return flattened


def _options(name: str, group: type[Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield inspect.Parameter(
            f"{name}_{field.name}", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )
