"""The model to measure with: the preset's, or a random one of the same shape where that one is not on this machine."""

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
    if config.model != QWEN:
        return config
    try:
        resolve_model(config.model)
    except UserError:
        folder = Path(config.runs_dir) / RANDOM_MODEL
        if not folder.is_dir():
            make_random_model(folder)
        return config.model_copy(update={"model": str(folder)})
    return config


def is_random(config: BenchmarkConfig) -> bool:
    """Whether the model is the random one."""
    return Path(config.model).name == RANDOM_MODEL


def make_random_model(folder: Path) -> None:
    """Save a model of Qwen2.5-Math-1.5B's shape with random weights, and a tokenizer trained on the prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<eos>"], initial_alphabet=alphabet)
    template = load_prompt_template("r1_zero")
    tokenizer.train_from_iterator([template] * 100, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(QWEN_SHAPE, dtype=torch.bfloat16).save_pretrained(folder)
