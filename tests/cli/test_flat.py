"""A dataclass of options as one parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from spillway.cli.flat import flat


@dataclass(frozen=True)
class Reading:
    path: Annotated[str, typer.Option("--from")]
    limit: Annotated[int, typer.Option("--limit", min=1)] = 10


@dataclass(frozen=True)
class Writing:
    path: Annotated[str, typer.Option("--to")] = "-"


app = typer.Typer()


@app.command()
@flat
def copy(
    *,
    names: Annotated[list[str], typer.Argument()],
    reading: Reading,
    loud: Annotated[bool, typer.Option("--loud")] = False,
    writing: Writing,
) -> None:
    """Copy names."""
    print(names, reading, loud, writing)


def said(*arguments: str) -> str:
    return CliRunner().invoke(app, arguments).output


def test_each_group_gets_its_fields_whatever_their_names_and_order() -> None:
    assert said("a", "--to", "there", "--from", "here", "b").strip() == (
        "['a', 'b'] Reading(path='here', limit=10) False Writing(path='there')"
    )


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [(("a",), "--from"), (("a", "--from", "x", "--limit", "0"), "--limit")],
)
def test_wrong_options_are_named_as_people_write_them(arguments: tuple[str, ...], wrong: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert wrong in result.output


def test_help_has_them_beside_the_others() -> None:
    text = said("--help")
    assert all(word in text for word in ("Copy names.", "--from", "--limit", "--loud", "--to"))
