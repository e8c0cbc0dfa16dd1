"""YAML as people write it, for pools and settings.

Numbers are those of JSON and YAML 1.2, so `1e-4` is a number. Plain text that YAML 1.1 would turn into something else
stays text: `on`, `no`, `010` (8 in YAML 1.1), `12:30` (750) and `2024-01-31`.
"""

import re
from typing import Any

import yaml

_INT = r"[-+]?(?:0|[1-9][0-9]*)"
_FLOAT = rf"(?:{_INT}(?:\.[0-9]*)?|[-+]?\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_KINDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (_INT, list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
    "merge": (r"<<", ["<"]),
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # pyright: ignore[reportGeneralTypeIssues]
    yaml_implicit_resolvers = {}  # without the rules of YAML 1.1  # noqa: RUF012


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # pyright: ignore[reportGeneralTypeIssues]
    """Puts text in quotes that this reader, or one of YAML 1.1, would take for something else."""


for _class in (_Loader, _Dumper):
    for _kind, (_pattern, _first) in _KINDS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)


MOST_NODES = 10**6
"""Largest number of values in a text, each counted as often as it is referred to."""


def load(text: str | bytes) -> Any:
    """The value of a YAML text. It has plain types only.

    Raises yaml.YAMLError, also if references swell it, or if a mapping has a key twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_NODES:
            raise yaml.YAMLError(f"references to itself, or more than {MOST_NODES} values with them")
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("lists or keys are nested too deeply") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for. One that holds itself counts as too many. Raises for a key given twice."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # what is met again before it is counted holds itself
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    met: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in met:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            met.add((key.tag, key.value))


def dump(value: Any) -> str:
    """The YAML text of a value of plain types. Keys keep their order, and `load` gives the value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
