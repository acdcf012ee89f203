"""Options with a default, a rule and a help text, on the fields of frozen dataclasses: algorithms and evaluators have them.

The rules are those of `config.KEYS` too. Imports nothing heavy, so that errors come at once.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class ConfigError(ValueError):
    """A wrong setting; one line naming the key, its value, what is allowed and the remedy."""


class Rule(NamedTuple):
    """What a value must satisfy, and the same in words."""

    holds: Callable[[Any], bool]
    text: str


def at_least(low, multiple: int = 1) -> Rule:
    text = f">= {low}" + (f" and a multiple of {multiple}" if multiple > 1 else "")
    return Rule(lambda value: value >= low and (multiple == 1 or value % multiple == 0), text)


def between(low, high, *, ends: str = "[]") -> Rule:
    def holds(value):
        return (value > low if ends[0] == "(" else value >= low) and (value < high if ends[1] == ")" else value <= high)
    return Rule(holds, f"in {ends[0]}{low}, {high}{ends[1]}")


def one_of(*choices) -> Rule:
    return Rule(lambda value: value in choices, f"one of {', '.join(map(repr, choices))}")


ANY = Rule(lambda value: True, "")
POSITIVE = Rule(lambda value: value > 0, "> 0")
NOT_EMPTY = Rule(bool, "not empty")

TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", tuple: "a tuple of strings",
              dict: "a dict {name: ...}"}


def fail(name: str, value, text: str) -> None:
    raise ConfigError(f"config.{name}={value!r}: {text}")


def check(name: str, value, default, rule: Rule, help: str) -> None:
    """Checks type (that of the default) and rule of one value. Raises: ConfigError."""
    check_type(name, value, type(default))
    if not rule.holds(value):
        fail(name, value, f"must be {rule.text} ({help}); set --config.{name}=...")


def check_type(name: str, value, kind: type) -> None:
    if kind in (int, float):
        good = isinstance(value, (int, kind)) and not isinstance(value, bool)
    elif kind is tuple:
        good = isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value)
    else:
        good = isinstance(value, kind)
    if not good:
        fail(name, value, f"must be {TYPE_NAMES[kind]}")
    if kind is float and not math.isfinite(value):
        fail(name, value, "must be a finite number")


def nearest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of an error message: the nearest of the known words."""
    found = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else otherwise


# ------------------------------------------------------------------------------------------ options of a dataclass


def option(default, rule: Rule, help: str):
    """A field of a frozen dataclass that is set in the config."""
    metadata = {"rule": rule, "help": help, "default": default}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Option(NamedTuple):
    """What is known of one option."""

    name: str
    default: Any
    rule: Rule
    help: str


def options_of(cls: type) -> list[Option]:
    """The options of a dataclass, those of its parents first."""
    return [Option(field.name, **{key: field.metadata[key] for key in ("default", "rule", "help")})
            for field in dataclasses.fields(cls) if field.metadata]


def build(cls: type, values: Mapping | None, where: str):
    """An instance of a dataclass with these options, each checked.

    Args: where: dotted place in the config, for messages, e.g. "algorithm.grpo".
    Raises: ConfigError for an unknown option (naming the nearest), a missing one, a wrong type, or a value outside of its rule.
    """
    known, values = {each.name: each for each in options_of(cls)}, dict(values or {})
    for name in values:
        if name not in known:
            raise ConfigError(f"config.{where}.{name}: unknown option{nearest(name, known)}; known: {', '.join(known)}")
    for name, default, rule, help in known.values():  # defaults too: some must be given
        value = values.get(name, default)
        check(f"{where}.{name}", value, default, rule, help)
        values[name] = type(default)(value)
    return cls(**values)
