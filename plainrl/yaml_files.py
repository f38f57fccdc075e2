"""Settings in YAML, read alike from a file and from the command line.

PyYAML reads YAML 1.1, where 010 is 8, 1:30 is 90, off is false, and the last of two equal keys wins silently. Here, as
in YAML 1.2, numbers are decimal, and only true and false are truth values. Everything else is text. Beyond that:

    a key                  is text, and stands once in its block; what `<<: *anchor` brings in may be overridden
    a key that takes text  takes it as it is written: `run_name: 010` is the run "010"
    an alias (*anchor)     may stand anywhere but inside what it names
    a tag (!name)          is refused, for it could ask for any type
"""

import re
from collections.abc import Collection
from typing import Any, NoReturn

import yaml

MAX_DEPTH = 20  # the settings of a sweep's variant are the deepest, with 4
MAX_VALUES = 10_000  # with those that an alias repeats: nine lines of aliases can stand for a billion values
TEXT_TAG, MERGE_TAG = yaml.resolver.Resolver.DEFAULT_SCALAR_TAG, "tag:yaml.org,2002:merge"
# What unquoted text means; the first that fits. Python reads no integer of over 4,300 digits: longer ones stay text.
SCALARS = {
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|",
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?[0-9]{1,1000}",
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
    MERGE_TAG: r"<<",
}


class YamlError(ValueError):
    """The text is not YAML, or uses what is not read here. The message is one line; `line` counts from 1."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


def load_yaml(text: str, text_keys: Collection[str] = ()) -> Any:
    """Return the value that a YAML text stands for.

    Args:
        text: one document.
        text_keys: keys whose value is taken as it is written.

    Raises:
        YamlError: names the line and the problem.

    >>> load_yaml("{seed: 010, learning_rate: 1e-5, wandb_mode: off, run_name: 010}", ["run_name"])
    {'seed': 10, 'learning_rate': 1e-05, 'wandb_mode': 'off', 'run_name': '010'}
    """
    loader = None
    try:
        loader = _Loader(text, text_keys)
        return loader.get_single_data()
    except yaml.reader.ReaderError as error:
        raise YamlError(text.count("\n", 0, error.position) + 1, f"character {error.character:#x}; remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).removeprefix("but ").split())
        raise YamlError(mark.line + 1 if mark else 1, f"not YAML: {problem}; correct that line") from None
    except (ValueError, OverflowError) as error:  # "\U00110000" is no character
        if isinstance(error, YamlError):
            raise
        raise YamlError(loader.line + 1 if loader else 1, f"not YAML: {error}; correct that line") from None


class _Loader(yaml.SafeLoader):
    """Composes nodes under the rules above; what becomes of them is PyYAML's business."""

    def __init__(self, text: str, text_keys: Collection[str]) -> None:
        super().__init__(text)
        self._text_keys = text_keys
        self._depth = self._num_values = 0
        self._sizes: dict[yaml.Node, int] = {}  # of each complete node, with what its aliases repeat

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        before = self._num_values
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self._sizes:
                _refuse(event, f"*{event.anchor} stands inside what it names; write the values out")
            self._num_values += self._sizes[node]
        else:
            self._depth += 1
            self._num_values += 1
            if event.tag is not None:
                tag = event.tag.replace("tag:yaml.org,2002:", "!!")
                _refuse(event, f"the tag {tag} is not read; write the value without it, text in quotes")
            if self._depth > MAX_DEPTH:
                _refuse(event, f"nested more than {MAX_DEPTH} deep; settings are lines of `key: value`")
            node = super().compose_node(parent, index)
            self._depth -= 1
            if node is not None:
                self._sizes[node] = self._num_values - before
        if self._num_values > MAX_VALUES:
            _refuse(event, f"more than {MAX_VALUES:,} values, with those that aliases repeat; leave some out")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for index, (key, value) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "a list or a block is no key; write `key: value`")
            if key.value in lines:
                _refuse(key, f"{key.value} stands here and in line {lines[key.value]}; keep one")
            lines[key.value] = key.start_mark.line + 1
            # New nodes, because an alias may have put the same node elsewhere, too.
            if key.tag != MERGE_TAG:
                key = _as_text(key)
            if key.value in self._text_keys and isinstance(value, yaml.ScalarNode):
                value = _as_text(value)
            node.value[index] = (key, value)
        return node

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(node.value)


_Loader.yaml_implicit_resolvers = {}  # instead of those of YAML 1.1
for _tag, _pattern in SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


def _as_text(node: yaml.ScalarNode) -> yaml.ScalarNode:
    return yaml.ScalarNode(TEXT_TAG, node.value, node.start_mark, node.end_mark)


def _refuse(place: yaml.Node | yaml.Event, problem: str) -> NoReturn:
    raise YamlError(place.start_mark.line + 1, problem)  # pyright: ignore[reportOptionalMemberAccess]
