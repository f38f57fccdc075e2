"""A tiny random model with tied embeddings, its tokenizer, and a real vLLM engine that runs it on the CPU."""

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from math_data import PROMPTS_FOLDER, arithmetic_records, format_response

# Whoever imports the helpers from here on gets them with their annotated shapes and dtypes checked.
install_import_hook(["SFT_helper", "GRPO_helper"], "beartype.beartype")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> str:
    """A Llama of 2 layers, width 64, with a byte-level BPE trained on the embedded data."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    records = arithmetic_records("train", (2, 3), 20)[:200]
    texts = [(PROMPTS_FOLDER / "r1_zero.prompt").read_text()] * 20
    texts += [
        f"{record.question}{format_response(record.reasoning, record.ground_truth, 'r1_zero')}" for record in records
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_model_folder):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def tiny_model(tiny_model_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def engine(tiny_model_folder):
    """One float32 engine for all tests; a test that changes its weights puts them in by itself."""
    from policy_evaluation import init_vllm

    return init_vllm(tiny_model_folder, "cpu", seed=0, dtype="float32", max_model_len=512)
