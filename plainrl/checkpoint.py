"""Checkpoints: the state of a training run after a step. A resumed run continues as if it had never stopped.

    step_*/  model/                 policy and tokenizer, Transformers format, float32 weights
             adapters.safetensors   with `lora_rank` alone, what `model/` does not tell, see plainrl/lora.py
             optimizer.safetensors  AdamW's moments and step counts, by parameter name
             state.json             step, size of metrics.jsonl, random states, configuration, fingerprint of the data;
                                    in GRPO the position in the questions, and which are solved
             manifest.json          size and SHA-256 of every file above, checked before anything is loaded

What follows from this state is not stored again. The learning rate follows from the step, the order of the data from
the seed, and the best score from metrics.jsonl.

A checkpoint is written under another name, flushed to the disk, then renamed. It is therefore complete, or it is not
there. No pickle is read.

Several ranks write one file of weights and one of moments each. Every tensor in them is whole, so that any number of
ranks can read them, and Transformers too. Tensors are gathered one at a time: a rank holds its share and one more. Each
rank hashes its share of the files, when they are written and before they are read.
"""

import base64
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from plainrl.checkpoint_files import MANIFEST, RECORD, describe_files_by_ranks, read_record
from plainrl.devices import free_bytes
from plainrl.distributed import exchange, local, num_ranks, on_first, rank, read_share, together, whole
from plainrl.faults import is_disk_full
from plainrl.lora import merged_model, save_adapters
from plainrl.records import UserError

if TYPE_CHECKING:  # only the types are needed: a table of runs should not wait for the import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARE_BYTES = 64 * 2**20  # for the tokenizer, and for metrics and samples that are written later


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

    If there are fewer GPUs than before, the states of the missing ones are left out. If there are more, the additional
    ones keep the state that the seed gave them.
    """
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_decode(states["torch"]))
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(_decode(state), device)


def seed_everything(seed: int) -> None:
    """Seed every global random generator. This project's own draws use private generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Resumable(Protocol):
    """What decides which data come next, where they do not follow from the step: see selection.QuestionOrder."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state as JSON. It stays as it is when the object moves on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from a state after `step`. An older checkpoint has an empty one."""
        ...


@dataclass
class TrainingState:
    """What training changes: the policy, its optimizer, and the step that they have reached.

    Args:
        data_fingerprint: SHA-256 of the training data, see `fingerprint`.
        step: the last complete step.
        metrics_bytes: size of metrics.jsonl after that step, in bytes.
        is_whole: whether the weights are those after `step`. The first `optimizer.step()` of the next step makes it
            false, and `complete_step` makes it true again.
        is_being_saved: whether a checkpoint is being written.
        generators: the states of the global random generators after that step.
        order: of the data. None: they follow from the step.
        order_state: its state after that step.
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
    order: Resumable | None = None
    order_state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Register a hook, so that `is_whole` is false as soon as the optimizer changes the weights."""
        self.optimizer.register_step_pre_hook(self._weights_move)

    def complete_step(self, step: int, metrics_bytes: int) -> None:
        """Record that a step is complete and its metrics are written. From here on it can be saved."""
        self.is_whole = False  # a signal may stop the run between two of these lines
        self.step, self.metrics_bytes, self.generators = step, metrics_bytes, random_states()
        self.order_state = self.order.state_dict() if self.order else {}
        self.is_whole = True

    def can_be_saved(self) -> bool:
        """Return whether the weights are those after `step` and all of them are finite. All ranks have to ask."""
        # Of several ranks each looks at its shares: not all have one of each tensor, and a minimum may hide a NaN.
        own = self.is_whole and all(is_finite(local(tensor.detach())) for tensor in self.policy.parameters())
        return all(exchange(own))

    def _weights_move(self, *_: object) -> None:
        self.is_whole = False


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers are finite. A sum, which takes a third of the time, shows that first."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def fingerprint(items: Iterable[object]) -> str:
    """Return a SHA-256 of training data. A resumed run needs the same data, because its position counts in them."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def write_checkpoint(path: Path, state: TrainingState, record: Mapping[str, Any]) -> None:
    """Write a checkpoint into a new folder, which appears only once it is complete.

    Args:
        path: the folder to make.
        state: what is saved. Its `is_whole` must be true.
        record: what state.json holds besides: configuration, wandb run.

    Raises:
        RuntimeError: the weights are between two steps.
        UserError: there is too little free disk space, or weights are infinite or NaN. Earlier checkpoints are kept.
    """
    if not state.is_whole:
        raise RuntimeError(f"the weights are between step {state.step} and the next: nothing to save")
    if not state.can_be_saved():
        raise UserError(
            f"weights are infinite or NaN after step {state.step}: they are not saved, and earlier checkpoints "
            "are kept; start a new run with a lower learning_rate"
        )
    num_bytes = checkpoint_bytes(state)
    unfinished = path.with_name(f".{path.name}.unfinished")

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_space(path, num_bytes)
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "model").mkdir(parents=True)
        step = {"step": state.step, "metrics_bytes": state.metrics_bytes, "data_fingerprint": state.data_fingerprint}
        positions = {"data_order": state.order_state, "random_states": state.generators}
        (unfinished / RECORD).write_text(json.dumps(step | dict(record) | positions))

    def end() -> None:
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for file in [*unfinished.rglob("*"), unfinished]:
            flush_to_disk(file)
        unfinished.rename(path)
        flush_to_disk(path.parent)

    state.is_being_saved = True
    try:
        on_first(begin)
        together(lambda: save_share(state, unfinished))
        manifest = describe_files_by_ranks(unfinished)
        on_first(end)
    except Exception as error:  # of any type, because each library wraps the system's error in its own
        shutil.rmtree(unfinished, ignore_errors=True)
        if not is_disk_full(error):
            raise
        _require_space(path, num_bytes)
        raise UserError(f"the disk of {path.parent} is full ({error}); free disk space, then resume the run") from error
    finally:
        state.is_being_saved = False


def save_share(state: TrainingState, folder: Path) -> None:
    """Write this rank's share of the policy and of the optimizer's state; the first rank also writes the tokenizer."""
    moments = optimizer_tensors(state.policy, state.optimizer)
    if num_ranks() == 1:
        merged_model(state.policy).save_pretrained(folder / "model")
        save_adapters(state.policy, folder)
        save_file(moments, folder / "optimizer.safetensors")
    else:
        write_share(saved_tensors(state.policy), folder / "model", "model")
        write_share(moments, folder, "optimizer")
        if rank() == 0:
            state.policy.config.save_pretrained(folder / "model")
            if state.policy.generation_config is not None:
                state.policy.generation_config.save_pretrained(folder / "model")
    if rank() == 0:
        state.tokenizer.save_pretrained(folder / "model")


def saved_tensors(policy: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """Return what the files of a model hold, by name: parameters, tied ones once, and the buffers that are saved."""
    saved = policy.state_dict().keys()
    buffers = {name: buffer for name, buffer in policy.named_buffers() if name in saved}
    return {name: weight.detach() for name, weight in policy.named_parameters()} | buffers


def write_share(tensors: Mapping[str, torch.Tensor], folder: Path, stem: str) -> None:
    """Write this rank's share of tensors into `folder`/`stem`-0000k-of-0000n.safetensors, and an index of all.

    Every tensor is whole and in one file. The shares are of about equal size.
    """
    sizes, owners = [0] * num_ranks(), {}
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        owners[name] = sizes.index(min(sizes))
        sizes[owners[name]] += tensor.numel()
    share = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())  # by all ranks, and kept by one
        if owners[name] == rank():
            share[name] = gathered.cpu().contiguous()
    files = [f"{stem}-{number + 1:05d}-of-{num_ranks():05d}.safetensors" for number in range(num_ranks())]

    def write() -> None:
        save_file(share, folder / files[rank()], {"format": "pt"})
        if rank() == 0:
            index = {"metadata": {}, "weight_map": {name: files[owner] for name, owner in owners.items()}}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))

    together(write)  # a disk may be full for one rank alone, while the others go on to gather the next tensors


def checkpoint_bytes(state: TrainingState) -> int:
    """Return about how many bytes a checkpoint of this state takes on disk."""
    tensors = [*state.policy.parameters(), *optimizer_tensors(state.policy, state.optimizer).values()]
    return sum(tensor.numel() * 4 for tensor in tensors) + SPARE_BYTES  # all are float32 on disk


def restore(path: Path, state: TrainingState) -> None:
    """Restore the optimizer, the random generators and the step from a complete checkpoint.

    The policy must already have been loaded from the checkpoint.

    Raises:
        UserError: the checkpoint was made with other training data.
    """
    record = read_record(path)
    if record["data_fingerprint"] != state.data_fingerprint:
        raise UserError(
            f"{path} was made with other training data (another file content, tokenizer or number of examples): "
            "start a new run; to keep the weights, name its model/ folder as model"
        )
    load_optimizer_files(path.glob("optimizer*.safetensors"), state.policy, state.optimizer)
    set_random_states(record["random_states"])
    if state.order is not None:
        state.order.load_state_dict(record.get("data_order", {}), record["step"])
    state.complete_step(record["step"], record["metrics_bytes"])


def optimizer_tensors(policy: "PreTrainedModel", optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return an optimizer's state as tensors named `exp_avg.<parameter>` and so on. It is empty before a first step.

    Their order is always the same, also after a restore: all ranks gather them in it.
    """
    return {
        f"{key}.{name}": value.detach().contiguous()
        for name, parameter in policy.named_parameters()
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
    }


def load_optimizer_files(files: Iterable[Path], policy: "PreTrainedModel", optimizer: torch.optim.Optimizer) -> None:
    """Load files of tensors that `optimizer_tensors` returned into an optimizer of the same parameters.

    Each rank reads its share alone, one tensor at a time.
    """
    parameters = dict(policy.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    indices = {name: index for index, name in enumerate(ordered)}  # the optimizer counts through its groups
    state: dict[int, dict[str, torch.Tensor]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for full_name in tensors.keys():  # noqa: SIM118  # the file is no dictionary
                key, _, name = full_name.partition(".")
                stored = tensors.get_slice(full_name)
                is_number = not stored.get_shape()  # the count of steps
                part = tensors.get_tensor(full_name) if is_number else read_share(stored, parameters[name])
                state.setdefault(indices[name], {})[key] = part
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_durably(path: Path, text: str) -> None:
    """Write a text file so that it holds the old text or the new one, even if the machine stops meanwhile."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    flush_to_disk(unfinished)
    unfinished.replace(path)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until the disk holds the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left in a run's folder: unfinished checkpoints and empty stack dumps.

    A dump with content is renamed, so that the next phase that hangs does not overwrite it.
    """
    for path in [*folder.glob("checkpoints/.step_*"), *folder.glob(".final.*"), *folder.glob(".preflight")]:
        shutil.rmtree(path)
    for path in folder.glob("stacks_*.txt"):
        if path.stat().st_size == 0:
            path.unlink()
        else:
            path.rename(path.with_name(f"earlier_{path.stem}_{int(path.stat().st_mtime)}.txt"))


def discard_after(folder: Path, step: int) -> None:
    """Remove what a run that goes on after a step makes anew: final/, and the samples of what followed that step.

    The evaluation after the step itself is one of these: it follows the checkpoint.
    """
    if (folder / "final").is_dir():
        remove_checkpoint(folder / "final")
    for path in folder.glob("samples/**/*.jsonl"):
        match = re.fullmatch(r"(?:(rollouts)|eval|eval_all)_(\d{6,})", path.stem)
        if match and int(match[2]) >= step + bool(match[1]):
            path.unlink()


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that an interruption leaves no partial checkpoint under its name."""
    removed = path.with_name(f".{path.name}.removed")
    path.rename(removed)
    shutil.rmtree(removed)


def _require_space(path: Path, num_bytes: int) -> None:
    free = free_bytes(path.parent)
    if free is not None and free < num_bytes:
        raise UserError(
            f"too little free disk space for {path}: it takes {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free, "
            f"{(num_bytes - free) / 1e9:.2f} GB are missing; earlier checkpoints are kept; free disk space, then resume"
        )


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
