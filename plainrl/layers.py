"""Where the values of a configuration come from: YAML files, their presets and recipes, the command line.

    the script's YAML file    values for all presets, its preset, its recipe
    each config=FILE          likewise, over all of the above
    the command line          over everything; of a key that is given twice the last value counts

A preset or recipe may stand in any of the files. If several have one of that name, a later file overrides single keys.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plainrl.config import ConfigType, RunConfig
from plainrl.help import SCHEMAS, blocks_of
from plainrl.records import UserError
from plainrl.yaml_files import YamlError, load_yaml

Files = Mapping[Path, Mapping[str, Any]]  # the content of each YAML file, in the order in which they overlay


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file: see plainrl/yaml_files.py.

    Raises:
        UserError: the file is missing, is not UTF-8, is not YAML (the message names the line) or is not a mapping.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"config = {path}: {error.strerror or error}; name a YAML file that can be read") from None
    try:
        values = load_yaml(content.decode("utf-8"), text_keys(*SCHEMAS))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    except YamlError as error:
        raise UserError(f"{path}, line {error.line}: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{path}, line 1: expected `key: value` lines, found {found}; write them, or name another file")
    return values


def text_keys(*schemas: type[RunConfig]) -> set[str]:
    """Return the keys that take any text, which is then taken as it is written."""
    return {key for schema in schemas for key, field in schema.model_fields.items() if field.annotation is str}


def parse_arguments(arguments: Sequence[str], schema: type[RunConfig]) -> dict[str, Any]:
    """Return what the command line gives, by key. Of a key that is given twice the last value counts.

    Raises:
        UserError: an argument is no `key=value`, or the schema has no such key.
    """
    as_written = text_keys(schema)
    overrides: dict[str, Any] = {}
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):  # bytes that Python could not decode
            raise UserError(f"argument {argument!r}: not UTF-8 text; name it in UTF-8")
        key, separator, text = argument.partition("=")
        if not separator or not key.isidentifier():
            raise UserError(f"argument {argument!r}: write key=value; --help lists the keys")
        if key == "config":
            overrides.setdefault(key, []).append(text)
            continue
        try:
            overrides[key] = text if key in as_written else load_yaml(text)
        except YamlError as error:
            raise UserError(f"{key} = {text!r} (command line): {error}") from None
        if key not in schema.model_fields:
            raise UserError(describe_unknown_key(key, schema, " (command line)"))
    return overrides


def without_files(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the command line gives, without the files `config=FILE` that it names."""
    return {key: value for key, value in overrides.items() if key != "config"}


def named_last(key: str, layers: Sequence[Mapping[str, Any]], default: str) -> str:
    """Return the value of a key in the last layer that has it, as text; the default if none has.

    >>> named_last("preset", [{"preset": "laptop"}, {"seed": 1}], default="auto")
    'laptop'
    """
    return next((str(layer[key]) for layer in reversed(layers) if key in layer), default)


def check_block(kind: str, name: str, files: Files, needs_blocks: bool) -> None:
    """Raise a UserError unless a file has a preset or recipe of that name.

    Args:
        kind: `preset` or `recipe`.
        name: its name.
        files: the YAML files.
        needs_blocks: whether it is also a mistake if no file has any.
    """
    known = [known for path, values in files.items() for known in blocks_of(values, f"{kind}s", path)]
    paths = " and ".join(map(str, files))
    have = "have" if len(files) > 1 else "has"
    if not known and needs_blocks and kind == "preset":
        raise UserError(f"preset = {name}: {paths} {have} no presets; leave preset out, or add the block")
    if name not in known and (known or needs_blocks):
        raise UserError(f"{kind} = {name}: {paths} {have} {', '.join(dict.fromkeys(known)) or 'none'}")


def layers_of(files: Files, preset: str, given: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the layers of the YAML files by their sources: the values of each, its preset's, its recipe's.

    Raises:
        UserError: no file has the recipe that is named, or a file sets `resume`.
    """
    plain = {
        path: {k: v for k, v in values.items() if k not in ("presets", "recipes")} for path, values in files.items()
    }
    of_preset = {path: blocks_of(values, "presets", path).get(preset, {}) for path, values in files.items()}
    named = [*(layer for path in files for layer in (plain[path], of_preset[path])), given]
    recipe = named_last("recipe", named, default="")
    if recipe:
        check_block("recipe", recipe, files, needs_blocks=True)
    layers: dict[str, Mapping[str, Any]] = {}
    for path, values in files.items():
        if plain[path].get("resume") or of_preset[path].get("resume"):
            raise UserError(f"resume ({path}): it is read from the command line alone; give it there")
        layers[str(path)] = plain[path]
        layers[f"{path}, preset {preset}"] = of_preset[path]
        layers[f"{path}, recipe {recipe}"] = blocks_of(values, "recipes", path).get(recipe, {})
    return layers


def layers_over(saved: Mapping[str, Any], files: Files) -> dict[str, Mapping[str, Any]]:
    """Return what files give over the saved configuration of a run, whose preset and recipe it keeps, by source."""
    layers: dict[str, Mapping[str, Any]] = {}
    for path, values in files.items():
        own = {key: value for key, value in values.items() if key not in ("presets", "recipes", "preset", "recipe")}
        for kind in ("preset", "recipe"):
            own |= blocks_of(values, f"{kind}s", path).get(str(saved.get(kind, "")), {})
        layers[str(path)] = own
    return layers


def validate(
    schema: type[ConfigType], layers: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, Any]
) -> tuple[ConfigType, dict[str, str]]:
    """Return the validated configuration, and the source of each value that is no default.

    Each layer is named by its source, and later layers override earlier ones.
    """
    merged, sources = _merge(layers)
    try:
        return schema.model_validate(merged | dict(fixed)), sources
    except ValidationError as error:
        raise UserError(describe_problems(error, schema, sources)) from None


def find_typos(schema: type[RunConfig], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise a UserError for a key or a single value that is wrong with every preset, while the preset is not known."""
    merged, sources = _merge(layers)
    try:
        schema.model_validate(merged)
    except ValidationError as error:
        if any(item["loc"] for item in error.errors()):  # else several values together, which a preset may change
            raise UserError(describe_problems(error, schema, sources)) from None


def _merge(layers: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, values in layers.items():
        merged |= values
        sources |= dict.fromkeys(values, source)
    return merged, sources


def describe_problems(error: ValidationError, schema: type[RunConfig], sources: Mapping[str, str]) -> str:
    """Return in one line what is wrong with the values, each with its source."""
    problems: dict[str, str] = {}
    for item in error.errors():
        if not item["loc"]:
            problems[item["msg"]] = item["msg"].removeprefix("Value error, ")
            continue
        key = str(item["loc"][0])
        where = f" ({sources[key]})" if key in sources else ""
        if item["type"] == "extra_forbidden":
            problems[key] = describe_unknown_key(key, schema, where)
        else:
            message = item["msg"].removeprefix("Value error, ")
            if message.startswith(f"{key} = "):  # ours, which names the value already
                problems[key] = f"{message}{where}"
                continue
            message = message[0].lower() + message[1:]
            previous = f"{problems[key]}, or " if key in problems else f"{key} = {item['input']!r}{where}: "
            problems[key] = previous + message
    return "; ".join(problems.values())


def describe_unknown_key(key: str, schema: type[RunConfig], where: str) -> str:
    """Return the message about a key that a schema does not have, with the nearest that it has."""
    near = difflib.get_close_matches(key, schema.model_fields, n=1, cutoff=0.5)
    return f"unknown key {key}{where}: {f'did you mean {near[0]}?' if near else '--help lists the keys'}"
