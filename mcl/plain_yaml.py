"""YAML as nested lists and dictionaries of text: what a word means, the type of its key says."""

import itertools
import json
import math
from typing import Any

import yaml

_MOST_VALUES = 100_000


class _Plain(yaml.SafeLoader):
    """YAML whose words stay words, for what they mean depends on the key: 007 may be a name, and `no` one of a list.

    Without YAML's guesses, 010 is ten instead of eight, 1:30 no number of seconds, and 1e-3 a number.
    """

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"more than {_MOST_VALUES} values, or an alias within its own anchor")
        return node


def _written_out(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Nodes that a node stands for, all aliases written out."""
    if node not in known:
        known[node] = math.inf  # until it is known: for aliases within it
        values = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        children = () if isinstance(node, yaml.ScalarNode) else values
        known[node] = 1 + sum(_written_out(child, known) for child in children)
    return known[node]


_Plain.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str | bytes) -> Any:
    """Reads YAML: nested lists and dictionaries of text; None is null, ~ or nothing.

    Raises:
        yaml.YAMLError: it is none.
    """
    try:
        value = _Plain(text).get_single_data()
        json.dumps(value, skipkeys=True)  # no bytes, dates or sets, for which YAML has tags
    except yaml.YAMLError:
        raise
    except Exception as error:  # a tag on what it does not fit raises nearly anything
        raise yaml.YAMLError(str(error)) from None
    return value
