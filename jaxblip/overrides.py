"""Fields of a config that are set by name, as on the command line."""

from __future__ import annotations

import ast
import copy
import difflib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxblip.data.eval_sections import check_field
from jaxblip.data.mixture import WEIGHT, check_section
from jaxblip.errors import UserError


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets fields of a locked config, each given as `config.field=value`."""
    for override in overrides:
        _apply_override(config, override)
    names = [override.partition("=")[0].removeprefix("config.") for override in overrides]
    # An attribute of the object, and no field: it says how the config was made, not what it is.
    object.__setattr__(config, "_overridden", overridden_fields(config) | frozenset(names))


def overridden_fields(config: ConfigDict) -> frozenset[str]:
    """Dotted names of the fields that `apply_overrides` has set on this very object."""
    return vars(config).get("_overridden", frozenset())


def copied(config: ConfigDict) -> ConfigDict:
    """A copy that still knows its `overridden_fields`."""
    copy_of = config.copy_and_resolve_references()
    object.__setattr__(copy_of, "_overridden", overridden_fields(config))
    return copy_of


def _apply_override(config: ConfigDict, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"The override --{name} has no value: write --{name}=VALUE.")
    *sections, field = name.removeprefix("config.").split(".")
    if sections[:2] == ["data", "mixture"] and len(sections) > 2:
        _add_to_mixture(config, sections[2], [*sections, field][3])
    if sections[:2] == ["eval", "set"] and len(sections) > 2:
        _add_evaluation(config, sections[2], [*sections, field][3])
    owner = config
    for section in [*sections, field]:
        if not isinstance(owner, ConfigDict) or section not in owner:
            raise UserError(_unknown_field(config, name.removeprefix("config.")))
        owner, parent = owner[section], owner
    if name == "config.task":
        raise UserError(
            "config.task cannot be overridden, because the other fields follow from it: take a "
            "config file of that task."
        )
    if isinstance(owner, ConfigDict):
        raise UserError(
            f"--{name} is a section; its fields are {', '.join(sorted(owner))}: set one of them."
        )
    parent[field] = _parse(name, text, owner)


def _add_to_mixture(config: ConfigDict, name: str, field: str) -> None:
    """Makes a field of a source of the mixture, with the value that it has for all sources."""
    check_section(name, [field])
    data = config.data
    if field not in (*data, WEIGHT):
        raise UserError(_unknown_field(config, f"data.{field}"))
    with data.mixture.unlocked():
        if name not in data.mixture:
            data.mixture[name] = ConfigDict()
        if field not in data.mixture[name]:
            value = 1.0 if field == WEIGHT else copy.deepcopy(data[field])
            data.mixture[name][field] = value


def _add_evaluation(config: ConfigDict, name: str, field: str) -> None:
    """Makes a field of an evaluation, with the value that it has for all."""
    check_field(config, name, field)
    sections = config.eval.set
    with sections.unlocked():
        if name not in sections:
            sections[name] = ConfigDict()
        if field not in sections[name]:
            owner = config.eval if field in config.eval else config.data
            sections[name][field] = copy.deepcopy(owner[field])


def _parse(name: str, text: str, current: Any) -> Any:
    """`text` as a value of the type of `current`."""
    if isinstance(current, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if isinstance(current, tuple):
        return _parse_tuple(name, text, value, current)
    if isinstance(current, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(current):
        raise UserError(
            f"--{name}={text} is no {type(current).__name__}, which this field is; "
            f"its value in the config is {current!r}."
        )
    return value


def _parse_tuple(name: str, text: str, literal: Any, current: tuple) -> tuple:
    """`a,b`, `(a, b)` and `a` alone; numbers keep their count, names may be any number.

    Names in quotes, as in `'a, b','c'`, may have commas themselves.
    """
    kind = current[0] if current else ""
    if isinstance(kind, str) and isinstance(literal, tuple) and literal:
        if all(isinstance(part, str) for part in literal):
            return literal
    parts = [part.strip(" '\"") for part in text.strip("()[] ").split(",")]
    value = tuple(_parse(name, part, kind) for part in parts if part)
    if not isinstance(kind, str) and len(value) != len(current):
        raise UserError(
            f"--{name}={text} has {len(value)} values; this field has {len(current)}, as in "
            f"{','.join(map(str, current))}."
        )
    return value


def field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all fields."""
    names = []
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            names += field_names(value, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _unknown_field(config: ConfigDict, name: str) -> str:
    known = field_names(config)
    section, _, field = name.rpartition(".")
    # People misplace a field more often than they misspell it, and then its section is right.
    same_field = [other for other in known if other.split(".")[-1] == field]
    same_section = [other for other in known if section and other.startswith(section + ".")]
    candidates = same_field or same_section or known
    nearest = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)[0]
    return (
        f"The config has no field {name!r}; the nearest is --config.{nearest}="
        f"{_get(config, nearest)!r}."
    )


def _get(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config
