"""The model to measure with: the preset's, or a random one of the same shape where that one is not on this machine."""

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from experiments.benchmark.settings import BenchmarkConfig
from plainrl.data import load_prompt_template
from plainrl.model_files import resolve_model
from plainrl.records import UserError
from plainrl.shared_config import EMBEDDED_DATA

QWEN = "Qwen/Qwen2.5-Math-1.5B"
RANDOM_MODEL = "random-1.5b"
EOS = "<|endoftext|>"  # as Qwen2 calls it: Transformers would add it beside another
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # a character for each byte; \u0120 stands for a space
QWEN_SHAPE = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def choose_model(config: BenchmarkConfig) -> BenchmarkConfig:
    """Return the configuration with the embedded data and a model that exists on this machine.

    If the preset's model is not in the local hub cache, a random one of Qwen2.5-Math-1.5B's shape replaces it. It is
    as fast. But its answers are never right, so GRPO has nothing to learn from.
    """
    config = config.model_copy(update={"train_data": EMBEDDED_DATA, "validation_data": EMBEDDED_DATA})
    if needs_random_model(config):
        folder = Path(config.runs_dir) / RANDOM_MODEL
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a benchmark that was stopped
            make_random_model(unfinished)
            unfinished.rename(folder)
        return config.model_copy(update={"model": str(folder)})
    return config


def needs_random_model(config: BenchmarkConfig) -> bool:
    """Return whether the preset's model is not on this machine."""
    if config.model != QWEN:
        return False
    try:
        resolve_model(config.model)
    except UserError:
        return True
    return False


def make_random_model(
    folder: Path, tokenizer: Tokenizer | None = None, shape: Qwen2Config = QWEN_SHAPE, device: str = "cpu"
) -> None:
    """Save a model with random weights, in bfloat16, and its tokenizer.

    Args:
        folder: where to.
        tokenizer: by default one that is trained on the prompt.
        shape: of the model, by default that of Qwen2.5-Math-1.5B.
        device: where the weights are drawn. A GPU is faster.
    """
    tokenizer = tokenizer or train_tokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)


def train_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer that is trained on the prompt. Of a large vocabulary it knows the first part."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=[EOS], initial_alphabet=ALPHABET)
    _work_on_bytes(tokenizer).train_from_iterator([load_prompt_template("r1_zero")] * 100, trainer)
    return tokenizer


def number_tokenizer(num_tokens: int) -> Tokenizer:
    """Return a tokenizer in which every token id has a text: the single bytes, then numbers. It merges nothing.

    >>> tokenizer = number_tokenizer(300)
    >>> tokenizer.encode("2+3").ids == [1 + ALPHABET.index(character) for character in "2+3"]
    True
    >>> tokenizer.decode([257, 299])
    ' 257 299'
    """
    texts = [EOS, *ALPHABET, *(f"\u0120{number}" for number in range(1 + len(ALPHABET), num_tokens))]
    tokenizer = Tokenizer(models.BPE({text: index for index, text in enumerate(texts)}, []))
    tokenizer.add_special_tokens([EOS])
    return _work_on_bytes(tokenizer)


def _work_on_bytes(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
