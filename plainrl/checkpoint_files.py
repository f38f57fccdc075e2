"""The files of a checkpoint: their sizes and hashes, and whether all are what was written.

Of several ranks each hashes its share of the files. Within a rank, threads do.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from plainrl.distributed import exchange, num_ranks, on_first, rank, together
from plainrl.records import UserError

MANIFEST, RECORD = "manifest.json", "state.json"
RECORD_KEYS = {"step", "metrics_bytes", "data_fingerprint", "random_states"}  # without these nothing can go on
REMOVED = "removed.txt"  # in final/: a sweep has removed the weights, and leaves this
MOST_THREADS = 16  # that compute hashes


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, the newest last."""
    found = [path for path in (folder / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was made, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def policy_of_run(folder: Path, label: str) -> Path:
    """Return the folder of a finished run's policy: final/, or best/ if a sweep has left that alone.

    Raises:
        UserError: a sweep has removed both.
    """
    if not (folder / "final" / REMOVED).exists():
        return folder / "final"
    if (folder / "best" / "config.json").is_file():
        return folder / "best"
    raise UserError(f"{label}: a sweep has removed the weights of {folder}; run it again with keep_weights=last")


def newest_whole_checkpoint(paths: Sequence[Path]) -> Path | None:
    """Return the newest complete checkpoint of a list ordered by step, or None. Rename damaged newer ones.

    All ranks have to call it, with the same list.
    """

    def set_aside(path: Path, damage: str) -> None:
        aside = path.with_name(f"damaged_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        print(f"{path} is damaged and passed over ({damage}); it is renamed to {path.rename(aside)}")

    for path in reversed(paths):
        damage = find_damage(path)
        if damage is None:
            return path
        on_first(partial(set_aside, path, damage))
    return None


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is complete. A file may be missing, cut or altered.

    All ranks have to call it.
    """
    try:
        expected = on_first(lambda: dict(json.loads((path / MANIFEST).read_text())))
        found = describe_files_by_ranks(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, TypeError, RecursionError) as error:
        # Any other OSError is not the checkpoint's fault.
        return f"{MANIFEST} or a file it names cannot be read: {error}"
    foreign = {name for name in found if name not in expected and _is_foreign(Path(name))}
    for name in sorted(expected.keys() | found.keys() - foreign):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not in {MANIFEST}"
        if found[name] != expected[name]:
            return f"{name} is not what was written: {found[name]} instead of {expected[name]}"
    if RECORD not in found or not on_first(lambda: read_record(path).keys() >= RECORD_KEYS):
        return f"{RECORD} lacks one of {', '.join(sorted(RECORD_KEYS))}"
    return None


def read_record(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json."""
    return json.loads((path / RECORD).read_text())


def describe_files_by_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file in a folder, as `describe_files` does. All ranks have to call it.

    The first rank lists the files, from the largest to the smallest, and each reads its share. On a network file system
    another one might not see all of them yet.
    """
    files = on_first(lambda: list_files(folder))
    described = exchange(together(lambda: describe_files(folder, files[rank() :: num_ranks()])))
    return dict(sorted((name, value) for share in described for name, value in share.items()))


def list_files(folder: Path) -> list[Path]:
    """Return the files in a folder and below it, the largest first. The manifest is left out."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return sorted(found, key=lambda path: (-path.stat().st_size, path))


def describe_files(folder: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of files in a folder, by relative path."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as threads:
        digests = threads.map(_sha256, files)
        return {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, digests, strict=True)
        }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_foreign(name: Path) -> bool:
    """Return whether a file is one that other programs leave in folders, and that nothing here would read."""
    return name.name == "README.md" or any(part.startswith(".") for part in name.parts)
