"""Reads YAML as nested lists and dictionaries of strings. The type of a key decides how its string is converted."""

import itertools
import json
import math
from typing import Any

import yaml

_MOST_VALUES = 100_000


class _Plain(yaml.SafeLoader):
    """YAML loader that returns all scalars as strings, since their type depends on the key: 007 may be a name.

    Without YAML's implicit types, 010 is ten instead of eight, 1:30 is not a number of seconds, and 1e-3 is a number.
    """

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"more than {_MOST_VALUES} values, or an alias within its own anchor")
        return node


def _written_out(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Number of nodes of a tree with all aliases expanded."""
    if node not in known:
        known[node] = math.inf  # for aliases of a node within itself
        values = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        children = () if isinstance(node, yaml.ScalarNode) else values
        known[node] = 1 + sum(_written_out(child, known) for child in children)
    return known[node]


_Plain.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str | bytes) -> Any:
    """Reads YAML: nested lists and dictionaries of strings; null, ~ and an empty value are None.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    try:
        value = _Plain(text).get_single_data()
        json.dumps(value, skipkeys=True)  # refuses bytes, dates and sets, which YAML's tags create
    except yaml.YAMLError:
        raise
    except Exception as error:  # a tag on an unsuitable value raises errors of many classes
        raise yaml.YAMLError(str(error)) from None
    return value
