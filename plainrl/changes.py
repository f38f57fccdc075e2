"""Which settings differ between two configurations of a run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plainrl.config import RunConfig
from plainrl.records import UserError


def is_setting(key: str) -> bool:
    """Return whether a key changes what a run computes, and not only its name, start, time limits or log.

    >>> is_setting("seed"), is_setting("run_name"), is_setting("max_rollout_seconds"), is_setting("wandb_mode")
    (True, False, False, False)
    """
    names = r"run_name|runs_dir|resume|resume_with_changes|num_printed_examples|max_\w+_seconds|wandb_\w+"
    return not re.fullmatch(names, key)


def changes_since(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return `key old -> new` for each setting in which a run differs from what was saved, perhaps by an older schema.

    >>> from plainrl.config import SFTConfig
    >>> old = {key: value for key, value in SFTConfig().model_dump(mode="json").items() if key != "dropout"}
    >>> changes_since(old, SFTConfig(seed=1))
    ['seed 0 -> 1']
    """
    return describe_changes(with_defaults(saved, type(config)), config.model_dump(mode="json"))


def require_same_start(saved: Mapping[str, Any], config: RunConfig, checkpoint: Path) -> None:
    """Raise a UserError for another first policy, if the run goes on from a checkpoint and does not compare weights."""
    before = type(config).model_construct(**saved)  # if it needed them, the run has recorded its first weights
    if all(getattr(one, "needs_first_policy", False) for one in (before, config)):  # their folder may have moved
        return
    for key in ("model", "warm_start"):
        new = getattr(config, key, saved.get(key))
        if saved.get(key, new) != new:
            raise UserError(
                f"{key} = {new}: the run began with {saved[key]}, and goes on with the policy of {checkpoint}; leave "
                f"{key} out, or begin a new run"
            )


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `key old -> new` for each setting that differs between two resolved configurations.

    >>> describe_changes({"seed": 0, "run_name": "a"}, {"seed": 1, "run_name": "b"})
    ['seed 0 -> 1']
    """
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in changed_keys(old, new)]


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ between two resolved configurations.

    >>> changed_keys({"seed": 0, "run_name": "a"}, {"seed": 1, "run_name": "b"})
    ['seed']
    """
    return [key for key in {**old, **new} if is_setting(key) and old.get(key) != new.get(key)]


def with_defaults(values: Mapping[str, Any], schema: type[RunConfig]) -> dict[str, Any]:
    """Return a configuration with the keys that it lacks: an older version of the schema did not have them."""
    return schema.model_construct().model_dump(mode="json") | dict(values)
