"""Fields of choices, whatever the choices are of."""

import dataclasses
from typing import Literal

import pytest

from matu_jax import fields
from matu_jax.fields import field


@dataclasses.dataclass(frozen=True)
class Engine:
    power: float = field(1.0, above=0, at_most=10)
    fuel: Literal["wind", "sun"] = "wind"


@dataclasses.dataclass(frozen=True)
class Ship:
    masts: int = field(2, at_least=1)
    names: tuple[str, ...] = ()
    engine: Engine = Engine()

    def conflicts(self, where):
        if self.masts > len(self.names):
            yield f"{where}.names: too few."


def problems(block):
    with pytest.raises(ValueError, match="ship") as error:
        fields.checked(block, "ship")
    return str(error.value).splitlines()


def test_conflicts_are_told_where_the_fields_are_right_one_by_one():
    assert problems(Ship()) == ["ship.names: too few."]
    wrong = Engine(fuel="coal")  # type: ignore
    assert problems(Ship(0, engine=wrong)) == [
        "ship.masts: found 0, expected at least 1.",
        "ship.engine.fuel: found 'coal', an unknown choice. Choices: sun, wind.",
    ]
    right = Ship(1, ("Ada",), Engine(power=2))
    assert fields.checked(right, "ship") == right


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Ship(engine={"power": 3}), "found {'power': 3}, expected Engine(...)."),  # type: ignore
        (Ship(engine=Engine), "expected Engine(...)."),  # type: ignore
        (Ship(masts=True), "found True (bool), expected int."),
        (Ship(engine=Engine(fuel=3)), "found 3 (int), expected str."),  # type: ignore
        (Ship(engine=Engine(power=float("nan"))), "found nan, expected more than 0."),
    ],
)
def test_values_of_another_type_are_named(block, words):
    assert words in problems(block)[0]


def test_a_block_of_another_type_is_named_before_a_field_in_it_is_set():
    broken = Ship(engine={"power": 3})  # type: ignore
    with pytest.raises(ValueError, match=r"ship\.engine: found .*, expected Engine"):
        fields.with_fields(broken, {"engine.power": 2}, "ship")


def test_a_field_that_could_not_be_read_back_is_refused_where_it_is_made():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        crew: dict = dataclasses.field(default_factory=dict)

    with pytest.raises(TypeError, match=r"Odd\.crew: found .*, expected bool, int, float"):
        fields.checked(Odd(), "odd")
