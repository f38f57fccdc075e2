"""Checkpoints: the state of a training run after a step, such that a resumed run is the run that would have been.

    step_*/  model/                 policy and tokenizer, Transformers format, float32 weights
             optimizer.safetensors  AdamW's moments and step counts, by parameter name
             state.json             step, size of metrics.jsonl, random states, configuration, fingerprint of the data
             manifest.json          size and SHA-256 of every file above, checked before anything is loaded

What follows from these is not stored again: learning rate and position in the data from the step and the seed, the best
score from metrics.jsonl. A checkpoint is written under another name, flushed to the disk, then renamed: it is whole, or
it is not there. No pickle is read.
"""

import base64
import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from run_config import UserError

if TYPE_CHECKING:  # only the types: listing runs should not wait for the library
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "manifest.json"
SPARE_BYTES = 64 * 2**20  # for the tokenizer, the metrics and samples to come


def random_states() -> dict[str, Any]:
    """Return the states of every global random generator, as JSON: Python, NumPy, torch on the CPU and on each GPU."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    gpu_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in gpu_states],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the global random generators into states that `random_states` returned.

    A run resumed with fewer GPUs leaves the states of the missing ones out, with more the seeded ones as they are.
    """
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_decode(states["torch"]))
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(_decode(state), device)


def seed_everything(seed: int) -> None:
    """Seed every global random generator. What is drawn by this project has generators of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass
class TrainingState:
    """What training changes: the policy, its optimizer, and how far they have come.

    `is_whole` says whether the weights are those after `step`. The first `optimizer.step()` of the next step makes
    them something in between, until `complete_step` is called. `is_being_saved` holds while a checkpoint is written.
    """

    policy: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    optimizer: torch.optim.Optimizer
    data_fingerprint: str
    step: int = 0
    metrics_bytes: int = 0
    is_whole: bool = True
    is_being_saved: bool = False
    generators: dict[str, Any] = field(default_factory=random_states)

    def __post_init__(self) -> None:
        """Let the optimizer tell when it moves the weights."""
        self.optimizer.register_step_pre_hook(self._weights_move)

    def complete_step(self, step: int, metrics_bytes: int) -> None:
        """Take note that a step is over and its metrics are written: from here on it can be saved."""
        self.step, self.metrics_bytes, self.generators, self.is_whole = step, metrics_bytes, random_states(), True

    def can_be_saved(self) -> bool:
        """Whether the weights are those after `step`, and all of them are numbers."""
        extremes = (torch.stack(torch.aminmax(tensor.detach())) for tensor in self.policy.parameters())  # NaN wins
        return self.is_whole and all(bool(torch.isfinite(pair).all()) for pair in extremes)

    def _weights_move(self, *_: object) -> None:
        self.is_whole = False


def fingerprint(items: Iterable[object]) -> str:
    """Return a SHA-256 of training data: a step's position means something only in the same data."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def write_checkpoint(path: Path, state: TrainingState, record: Mapping[str, Any]) -> None:
    """Write a checkpoint: a new folder that is whole when it appears.

    Args:
        path: the folder to make.
        state: what is saved; `state.is_whole` must hold.
        record: what else belongs to it, as JSON: configuration, wandb run.

    Raises:
        UserError: the disk has no room, or weights are not finite; earlier checkpoints are left as they were.
    """
    if not state.is_whole:
        raise RuntimeError(f"the weights are between step {state.step} and the next: nothing to save")
    if not state.can_be_saved():
        raise UserError(
            f"weights are infinite or no numbers after step {state.step}: they are not saved, earlier checkpoints are "
            "as they were; start a new run with a lower learning_rate"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = checkpoint_bytes(state)
    _require_space(path, num_bytes)
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    state.is_being_saved = True
    try:
        state.policy.save_pretrained(unfinished / "model")
        state.tokenizer.save_pretrained(unfinished / "model")
        save_file(optimizer_tensors(state.policy, state.optimizer), unfinished / "optimizer.safetensors")
        step = {"step": state.step, "metrics_bytes": state.metrics_bytes, "data_fingerprint": state.data_fingerprint}
        (unfinished / "state.json").write_text(json.dumps(step | dict(record) | {"random_states": state.generators}))
        (unfinished / MANIFEST).write_text(json.dumps(describe_files(unfinished), indent=2))
        for file in [*unfinished.rglob("*"), unfinished]:
            flush_to_disk(file)
        unfinished.rename(path)
        flush_to_disk(path.parent)
    except Exception as error:  # each library wraps the system's error in one of its own
        shutil.rmtree(unfinished, ignore_errors=True)
        if not is_disk_full(error):
            raise
        _require_space(path, num_bytes)
        raise UserError(f"the disk of {path.parent} is full: {error}") from error
    finally:
        state.is_being_saved = False


def checkpoint_bytes(state: TrainingState) -> int:
    """Return about how many bytes a checkpoint of this state takes."""
    tensors = [*state.policy.parameters(), *optimizer_tensors(state.policy, state.optimizer).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + SPARE_BYTES


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file in a folder but its manifest, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor(2) as threads:
        digests = threads.map(_sha256, files)
        return {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, digests, strict=True)
        }


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint (a file that is missing, cut or altered), or None if it is whole."""
    try:
        expected = dict(json.loads((path / MANIFEST).read_text()))
        found = describe_files(path)
    except (FileNotFoundError, ValueError, TypeError) as error:  # another OSError says nothing of the checkpoint
        return f"{MANIFEST} or a file it names cannot be read: {error}"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not in {MANIFEST}"
        if found[name] != expected[name]:
            return f"{name} is not what was written: {found[name]} instead of {expected[name]}"
    return None


def newest_whole_checkpoint(paths: Sequence[Path]) -> Path | None:
    """Return the last checkpoint of an ordered list that is whole; damaged ones after it are named and set aside."""
    for path in reversed(paths):
        damage = find_damage(path)
        if damage is None:
            return path
        aside = path.with_name(f"damaged_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        print(f"{path} is damaged and passed over ({damage}); it is {path.rename(aside)} from here on")
    return None


def read_record(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json."""
    return json.loads((path / "state.json").read_text())


def restore(path: Path, state: TrainingState) -> None:
    """Put the optimizer, the random generators and the step into the state of a whole checkpoint.

    The policy has been loaded from the checkpoint's `model/` before.

    Raises:
        UserError: the training data are not those that the checkpoint was made with.
    """
    record = read_record(path)
    if record["data_fingerprint"] != state.data_fingerprint:
        raise UserError(
            f"{path} was made with other training data (another file content, tokenizer or number of examples): "
            "start a new run, with model = its model/ folder if its weights are wanted"
        )
    load_optimizer_tensors(load_file(path / "optimizer.safetensors"), state.policy, state.optimizer)
    set_random_states(record["random_states"])
    state.complete_step(record["step"], record["metrics_bytes"])


def optimizer_tensors(policy: "PreTrainedModel", optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return an optimizer's state as named tensors: `exp_avg.<parameter>` and so on; empty before its first step."""
    return {
        f"{key}.{name}": value.detach().contiguous()
        for name, parameter in policy.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    tensors: Mapping[str, torch.Tensor], policy: "PreTrainedModel", optimizer: torch.optim.Optimizer
) -> None:
    """Put tensors that `optimizer_tensors` returned into an optimizer of the same parameters."""
    indices = {name: index for index, (name, _) in enumerate(policy.named_parameters())}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        state.setdefault(indices[name], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_durably(path: Path, text: str) -> None:
    """Write a text file such that, whenever the process or the machine stops, it holds the old text or the new one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    flush_to_disk(unfinished)
    unfinished.replace(path)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until the disk holds what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process has left in a run's folder: halves of checkpoints, dumps that never came.

    A dump that did come gets a name that the next phase to hang does not write to.
    """
    for path in [*folder.glob("checkpoints/.step_*"), *folder.glob(".final.unfinished")]:
        shutil.rmtree(path)
    for path in folder.glob("stacks_*.txt"):
        if path.stat().st_size == 0:
            path.unlink()
        else:
            path.rename(path.with_name(f"earlier_{path.stem}_{int(path.stat().st_mtime)}.txt"))


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; should that be interrupted, no half of it is left under its name."""
    removed = path.with_name(f".{path.name}.removed")
    path.rename(removed)
    shutil.rmtree(removed)


def is_disk_full(error: Exception) -> bool:
    """Whether an error says that there is no room left, or no quota."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    texts = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    return is_full or any(text in str(error) for text in texts)  # libraries wrap the system's error


def _require_space(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise UserError(
            f"no room for {path}: it takes {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free, "
            f"{(num_bytes - free) / 1e9:.2f} GB are missing; earlier checkpoints are as they were"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
