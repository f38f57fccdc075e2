"""One process or many: what the processes that torchrun starts (ranks) do together.

    torchrun --nproc-per-node 8 GRPO_train.py preset=eight-gpu

Every rank runs the same script on the same data, and comes to the same decisions. Three things are divided:

    requests       over the engines, one in each rank, or one for every `engine_tensor_parallel` ranks
    microbatches   over the ranks
    weights        over the ranks, block by block, with their gradients and moments (FSDP2)

What was computed of a share is gathered at once, so that everything else is computed on every rank alike. Only the
first rank writes files and prints. Other modules ask here how many processes there are. startup.py, cli.py and
devices.py read torchrun's variables themselves, because they run before torch is imported. With one process, each
function here returns what it was given.

Losses are divided by the counts of the whole batch. Gradients are therefore added over the ranks, and not averaged.

Source: Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, 2023.
"""

from plainrl.startup import end_with_parent, print_nothing

import datetime
import os
import pickle
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from plainrl.records import UserError, first_line

if TYPE_CHECKING:  # only the types are needed: a table of runs should not wait for the import
    from transformers import PreTrainedModel

    from plainrl.config import RunConfig

Item = TypeVar("Item")
Result = TypeVar("Result")
SPARE_SECONDS = 120  # a rank waits for the others so much longer than a phase may last; the phase's limit ends it first
PATIENCE = datetime.timedelta(days=2)  # for what has no limit, such as a warm start
# What torchrun puts into the environment of a rank. A child that is to run alone must not find it.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # of torchrun: each start of the ranks gets a store of its own
SECONDS_TO_COME = 10.0
RANK_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


@dataclass
class _World:
    """What `join` learns of the other ranks."""

    objects: Any = None  # a process group of its own, so that objects never mix with FSDP's tensors
    patient: Any = None  # another one, for what may take longer than any phase
    timeout: datetime.timedelta = PATIENCE  # of all other groups
    ranks_per_engine: int = 1


_world = _World()


def join(config: "RunConfig") -> None:
    """Meet the other ranks, if torchrun started several. vLLM would make a group of its own if it started before.

    Args:
        config: the devices, how many ranks share an engine, and the limits of the phases, beyond which no rank waits.

    Raises:
        UserError: several ranks cannot do what the configuration asks for.
    """
    num_started = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        return
    _require_divisible(config, num_started)
    if num_started == 1:
        return
    end_with_parent()  # startup.py has done so already, but only in this project's own programs
    uses_gpu = config.policy_device != "cpu"
    if uses_gpu:
        torch.cuda.set_device(config.policy_device)
    longest = max(value for name, value in config if name.startswith("max_") and name.endswith("_seconds"))
    _world.timeout = datetime.timedelta(seconds=longest + SPARE_SECONDS)
    dist.init_process_group("cpu:gloo,cuda:nccl" if uses_gpu else "gloo", timeout=_world.timeout)
    _world.objects = dist.new_group(backend="gloo", timeout=_world.timeout)
    _world.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    _world.ranks_per_engine = config.engine_tensor_parallel
    require_alike(config.model_dump_json(), "configuration")
    if rank():
        print_nothing()  # startup.py has done so already in this project's own programs
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def _require_divisible(config: "RunConfig", num_started: int) -> None:
    """Raise a UserError for settings that this number of ranks does not support."""
    for name in ("engine_tensor_parallel", "num_replicas"):
        divisor = getattr(config, name)
        if num_started % divisor:
            raise UserError(
                f"{name} = {divisor} does not divide the number of ranks, {num_started}: choose one that does, or "
                "start more ranks by torchrun"
            )
    if num_started == 1:
        return
    # The restarted ranks would find the addresses of the ended ones in torchrun's store (PyTorch issue 135712).
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise UserError(
            f"--max-restarts: restarted ranks would not meet; set {OWN_STORE}=1 in torchrun's environment, and use "
            "--rdzv-backend c10d"
        )
    found = {
        "lora_rank": "adapters are trained in one process: leave it out, or start without torchrun",
        "dropout": "the ranks would draw the same noise: leave it out, or start without torchrun",
    }
    for name, advice in found.items():
        if getattr(config, name, 0):
            raise UserError(f"{name} = {getattr(config, name)} with {num_started} ranks: {advice}")
    if config.samples_ahead and config.engine_tensor_parallel > 1:
        raise UserError(
            f"rollouts_ahead = 1 with engine_tensor_parallel = {config.engine_tensor_parallel}: an engine that samples "
            "ahead belongs to one rank; leave one of them out"
        )
    if config.evaluator_device != config.policy_device and not config.samples_ahead:
        raise UserError(
            f"policy_device = {config.policy_device} and evaluator_device = {config.evaluator_device}: each rank has "
            "one GPU for both; use cuda:0 for both, as in preset=eight-gpu, or rollouts_ahead = 1 with two for each"
        )


def environment_of_one_process(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment without what torchrun put there, for a program that is to run alone."""
    return {
        name: value
        for name, value in environment.items()
        if name not in RANK_VARIABLES and not name.startswith(RANK_PREFIXES)
    }


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def engine_number() -> int:
    """Return the number of the engine that this rank belongs to, from 0."""
    return rank() // _world.ranks_per_engine


def deal(items: Sequence[Item], hand: int = 1) -> list[Item]:
    """Return the share of this rank's engine, of items that all ranks have alike.

    The engines take turns, `hand` neighbours at a time.
    """
    return _deal(items, hand, engine_number(), num_ranks() // _world.ranks_per_engine)


def gather(share: Sequence[Item], hand: int = 1) -> list[Item]:
    """Return the shares of all engines, in the order that `deal` took them from."""
    shares = exchange(list(share))[:: _world.ranks_per_engine]
    longest = max(map(len, shares))
    return [item for first in range(0, longest, hand) for part in shares for item in part[first : first + hand]]


def exchange(value: Item, is_long: bool = False) -> list[Item]:
    """Return the values of all ranks, by rank. They travel as pickled objects.

    A rank waits for the others a little longer than a phase may last; with `is_long` for two days.
    """
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value, group=_world.patient if is_long else _world.objects)
    return values


def deal_microbatches(plan: Sequence[Item]) -> list[tuple[Item, float]]:
    """Return the microbatches of this rank, and the weight of each.

    Each forward and backward pass gathers weights from all ranks, so that all need the same number of passes. Where
    microbatches are short, the last one is repeated with weight 0.

    >>> deal_microbatches([[0, 1], [2]])
    [([0, 1], 1.0), ([2], 1.0)]
    """
    repeated = list(plan[-1:]) * (-len(plan) % num_ranks())
    weighted = [(part, 1.0) for part in plan] + [(part, 0.0) for part in repeated]
    return _deal(weighted, 1, rank(), num_ranks())


def add_up(sums: Mapping[str, Any]) -> dict[str, float]:
    """Return the sums of all ranks' sums, numbers or tensors of one, by name. Of names in `_max` it is the largest."""
    total: dict[str, float] = {}
    for part in exchange({name: float(value) for name, value in sums.items()}):
        for name, value in part.items():
            add_to(total, name, value)
    return total


def add_to(sums: dict[str, Any], name: str, value: Any) -> None:
    """Add a value to the sum of that name. Of a name in `_max` keep the largest."""
    sums[name] = max(sums.get(name, value), value) if name.endswith("_max") else sums.get(name, 0.0) + value


def largest(value: float) -> float:
    """Return the largest of all ranks' values."""
    return max(exchange(value))


def first_on_machine() -> int:
    """Return the number of the first rank on this rank's machine."""
    names = exchange(socket.gethostname())
    return names.index(names[rank()])


def on_first(call: Callable[[], Result], is_long: bool = False) -> Result:
    """Let the first rank do something. Its result, or its error, is that of all ranks; `is_long` as in `exchange`."""
    return cast(Any, exchange(together(lambda: call() if rank() == 0 else None, is_long))[0])


def require_alike(value: str, name: str) -> None:
    """Raise a UserError if the ranks do not have the same value, without which their decisions would differ."""
    values = exchange(value)
    for number, other in enumerate(values):
        if other != values[0]:
            raise UserError(
                f"rank {number} has another {name} than the first: give all the same files and arguments, no pipes"
            )


def together(call: Callable[[], Result], is_long: bool = False) -> Result:
    """Let every rank do something that must not fail on some of them alone. If it fails on any, all raise its error."""
    if num_ranks() == 1:
        return call()
    result: Any = None
    error: Exception | None = None
    try:
        result = call()
    except Exception as failure:  # raised below, on every rank
        error = _portable(failure)
    for failure in exchange(error, is_long):
        if failure is not None:
            raise failure
    return result


def load_shares(tensors: dict[str, Any], reader: Any) -> None:
    """Read what belongs to this rank of tensors, by PyTorch's distributed checkpoint. No limit of a phase holds here.

    Raises:
        OSError: a file cannot be read. All ranks raise alike.
    """
    from torch.distributed.checkpoint import CheckpointException, load

    try:
        load(tensors, storage_reader=reader, process_group=_world.patient)
    except CheckpointException as error:  # which is no Exception, and holds those of all ranks
        causes = [failure for failure, _ in error.failures.values()]
        signals = [cause for cause in causes if isinstance(cause, KeyboardInterrupt)]
        raise (signals or [OSError(first_line(causes[0]))])[0] from error


def all_are_here() -> bool:
    """Return whether every rank comes to this point within SECONDS_TO_COME. If one does not, the run cannot go on.

    A rank that waits in a collective cannot be asked. Each therefore leaves a note in the store that they met by.
    """
    if num_ranks() == 1:
        return True
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"plainrl/here/{rank()}", "")
        keys = [f"plainrl/here/{number}" for number in range(num_ranks())]
        store.wait(keys, datetime.timedelta(seconds=SECONDS_TO_COME))
    except RuntimeError:  # not in time, or torchrun has ended
        return False
    return True


def speaks_for_all(seconds: float) -> bool:
    """Return whether this rank has to say what all ranks met. It is the first, or another one if that is silent.

    What was said is noted in the store that the ranks met by. Only one of them is told to speak, and only once.

    Args:
        seconds: how long to wait for the first rank. torchrun, which ends all when one has ended, has to wait, too.
    """
    number = int(os.environ.get("RANK", "0"))
    if not dist.is_initialized():
        return number == 0
    if number and threading.current_thread() is threading.main_thread():
        for stop_signal in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(stop_signal, signal.SIG_IGN)
    key = f"plainrl/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    deadline = time.monotonic() + (seconds if number else 0.0)
    try:
        store = dist.distributed_c10d._get_default_store()
        while time.monotonic() < deadline and not store.check([key]):
            time.sleep(0.1)
        return store.add(key, 1) == 1
    except RuntimeError:  # the store ended with the first rank or with torchrun
        return number <= 1


def divide_weights(policy: "PreTrainedModel", device: str, compute_dtype: str, num_replicas: int = 1) -> None:
    """Divide a policy's weights over the ranks, in place. The ranks, also a single one, are a process group.

    Each block is gathered when it computes, and divided again afterwards. With a 16-bit compute dtype it is gathered in
    that dtype. What is divided stays float32: weights, gradients and moments.

    Args:
        policy: with float32 weights, the same on all ranks, or without any yet (on PyTorch's meta device).
        device: the policy's, such as `cuda:0`.
        compute_dtype: `float32`, `bfloat16` or `float16`.
        num_replicas: how many times the weights exist. Between nodes, 1 replica each spares the slow network: gradients
            alone cross it.
    """
    # Imported here, because it takes two seconds.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # that a view is returned: nobody changes it in place
    sizes = {"replicate": num_replicas, "shard": num_ranks() // num_replicas}
    if num_replicas == 1:
        del sizes["replicate"]
    mesh = dist.init_device_mesh(torch.device(device).type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for group in mesh.get_all_groups():  # those of replicas are new, with PyTorch's own timeout
        dist.distributed_c10d._set_pg_timeout(_world.timeout, group)
    half = None if compute_dtype == "float32" else getattr(torch, compute_dtype)
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for module in [*divided_blocks(policy), policy]:
        sharded = cast(Any, fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True))
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    cast(Any, policy).call_with_weights = MethodType(lambda model, function, *args: function(model, *args), policy)
    register_fsdp_forward_method(policy, "call_with_weights")


def divided_blocks(policy: "PreTrainedModel") -> list[torch.nn.Module]:
    """Return the blocks that are divided, and gathered, one by one. The rest of the policy is gathered together."""
    names = policy._no_split_modules or ()
    return [module for module in policy.modules() if type(module).__name__ in names]


def call_with_weights(model: torch.nn.Module, function: Callable[..., Result], *arguments: Any) -> Result:
    """Return function(model, *arguments). Inside, a divided model's weights are there as in its forward pass."""
    if hasattr(model, "call_with_weights"):
        return cast(Any, model).call_with_weights(function, *arguments)
    return function(model, *arguments)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered if it is divided. All ranks have to ask for the same ones, in the same order."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in its own memory. Of one that is not divided it is the tensor."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def read_share(stored: Any, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor in a safetensors file, divided as another one is, and on its device.

    Args:
        stored: what `get_slice` of the open file returned. Only the part is read.
        like: another tensor of that shape.
    """
    if not hasattr(like, "placements"):
        return stored[:].to(like.device)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
    part = stored[tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))].to(like.device)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def _portable(error: Exception) -> Exception:
    """Return an error that can travel to other ranks as a pickled object: itself, or one that says the same.

    >>> _portable(ValueError("it"))
    ValueError('it')
    >>> _portable(type("Torn", (Exception,), {})("disk full"))
    RuntimeError('Torn: disk full')
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # the class cannot be imported, or made from its arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def is_lost_rank(error: BaseException | None) -> bool:
    """Return whether an error only says that another rank has ended, or has not come in time."""
    signs = ("closed by peer", "connection reset", "timed out waiting", "broken pipe", "socket", "nccl")
    return num_ranks() > 1 and isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def _deal(items: Sequence[Item], hand: int, player: int, num_players: int) -> list[Item]:
    """Return what a player gets if players take turns, `hand` neighbours at a time.

    >>> [_deal("abcde", 2, player, 2) for player in (0, 1)]
    [['a', 'b', 'e'], ['c', 'd']]
    """
    hands = range(player * hand, len(items), num_players * hand)
    return [item for first in hands for item in items[first : first + hand]]
