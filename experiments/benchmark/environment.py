"""environment.json: the machine, versions and settings that the figures were measured with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.settings import BenchmarkConfig, sft_settings
from plainrl.run_records import describe_environment

LEFT_OUT = ("command", "git_diff", "host")
MACHINE = ("cpu", "cpu_count", "cuda_devices")  # what tells one machine from another


def discard_another_machines(folder: Path) -> None:
    """Remove the figures of another machine from a folder; they must not be compared with those of this one."""
    path = folder / "environment.json"
    if path.exists():
        recorded, here = json.loads(path.read_text()), describe_environment()
        if any((recorded.get(name) or None) != (here[name] or None) for name in MACHINE):
            print(f"{folder}: figures of another machine ({recorded.get('cpu')}) are removed; results_dir= keeps them")
            path.unlink()
            (folder / "benchmark.csv").unlink(missing_ok=True)


def record_environment(path: Path, names: Sequence[str], config: BenchmarkConfig, trl: Mapping[str, Any]) -> None:
    """Write machine, versions and settings of both sides; those of benchmarks not measured now stay as they were.

    Args:
        path: environment.json.
        names: the benchmarks measured now.
        config: our settings.
        trl: the versions and settings of TRL's side.
    """
    record = {name: value for name, value in describe_environment().items() if name not in LEFT_OUT}
    before = json.loads(path.read_text()) if path.exists() else {}
    settings = {name: sft_settings(config) if name == "sft" else config for name in names}
    ours = {name: config.model_dump(mode="json", exclude={"results_dir"}) for name, config in settings.items()}
    record |= {"ours": before.get("ours", {}) | ours, "trl": trl_record(before) | dict(trl)}
    path.write_text(json.dumps(record, indent=2) + "\n")


def trl_record(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return what environment.json holds about TRL's side; older files call it `peer`.

    >>> trl_record({"peer": {"versions": {}}})
    {'versions': {}}
    """
    return environment.get("trl", environment.get("peer", {}))
