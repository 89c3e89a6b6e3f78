"""Recipes as YAML: safe, without duplicate keys, with numbers as people write them; and ``field=value`` overrides."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_text


class _RecipeLoader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys and reads ``3e-4`` as a number (YAML 1.1 wants ``3.0e-4``)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key_node.value}' stands here a second time", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_RecipeLoader.yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """The value of one YAML document.

    Raises:
        TokenFormerError: not valid YAML, or a key stands twice; with line and column.
    """
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise TokenFormerError(f"{source}: invalid YAML{place}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise TokenFormerError(f"{source}: invalid YAML: {error}") from error


def read_yaml(path: Path | str, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; ``what`` says in an error message what the file was expected to be."""
    return parse_mapping(read_text(path, what), str(path), what)


def parse_mapping(text: str, source: str, what: str) -> dict[str, Any]:
    """The mapping that a YAML document holds."""
    value = parse_yaml(text, source)
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise TokenFormerError(f"{source}: found {found}, expected a mapping: {what}")
    return value


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``values`` with each ``place=value`` put in; places are dotted, list entries by index.

    Raises:
        TokenFormerError: no ``=``, or a place that leads through something that is no section.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        place, equals, text = override.partition("=")
        if not equals or not place.strip():
            raise TokenFormerError(f"{override}: expected field=value, such as optimizer.lr=3e-4")
        _put(values, place.strip().split("."), parse_yaml(text, override), override)
    return values


def _put(values: dict[str, Any], names: list[str], value: Any, override: str) -> None:
    here: Any = values
    for name, following in zip(names, [*names[1:], None], strict=True):
        key = _key(here, name, override)
        if following is None:
            here[key] = value
            return
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        here = here[key]


def _key(here: Any, name: str, override: str) -> str | int:
    if isinstance(here, dict):
        return name
    if not isinstance(here, list):
        raise TokenFormerError(f"{override}: '{name}' is looked for inside {here!r}, which is no section")
    if not name.isdecimal() or int(name) >= len(here):
        raise TokenFormerError(f"{override}: found '{name}', expected an index from 0 to {len(here) - 1}")
    return int(name)
