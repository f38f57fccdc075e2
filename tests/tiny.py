"""Tiny models, and the arguments of whole runs of the scripts on them."""

import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from math_data import PROMPTS_FOLDER, arithmetic_records, format_response

REPOSITORY = Path(__file__).parent.parent


def make_tiny_model(folder):
    """Save a random Llama of 2 layers, width 64, tied embeddings, with a byte-level BPE of the embedded data."""
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


def make_answering_model(folder, tiny_model_folder):
    """Save a tiny model that keeps the format of r1_zero and guesses a digit: its rewards, and gradients, vary."""
    from SFT_helper import get_masked_response_log_probs, tokenize_prompt_and_output

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    template = (PROMPTS_FOLDER / "r1_zero.prompt").read_text()
    prompts = [
        template.replace("{question}", record.question) for record in arithmetic_records("train", (2, 3), 10)[:16]
    ]
    answers = [f" </think> <answer> {index % 10} </answer>" for index in range(16)]
    batch = tokenize_prompt_and_output(prompts, answers, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        (-get_masked_response_log_probs(model, **batch)["log_probs"].sum() / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def tiny_arguments(model, runs_dir, **overrides):
    """The arguments of a run of SFT_train.py: 3 steps, evaluated at 0, 2 and 3."""
    values = {
        "preset": "laptop",
        "model": model,
        "runs_dir": runs_dir,
        "wandb_mode": "disabled",
        "compute_dtype": "float32",
        "engine_dtype": "float32",
        "max_sync_error": 1.001,
        "num_sft_examples": 24,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": "1e-3",
        "eval_interval": 2,
        "num_eval_examples": 8,
        "num_final_eval_examples": 12,
        "sampling_max_tokens": 16,
        "max_context_tokens": 384,
    }
    return [f"{key}={value}" for key, value in (values | overrides).items()]


def grpo_arguments(model, runs_dir, **overrides):
    """The arguments of a run of GRPO_train.py: 2 steps of 2 questions x 4 responses, evaluated at 0, 1 and 2."""
    values = {
        "warm_start": "",
        "n_grpo_steps": 2,
        "rollout_batch_size": 8,
        "group_size": 4,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "eval_interval": 1,
        "num_logged_groups": 1,
    }
    return _without_sft_keys(tiny_arguments(model, runs_dir, **(values | overrides)))


def expert_iteration_arguments(model, runs_dir, **overrides):
    """The arguments of a run of expert_iteration.py: 2 steps of 8 questions x 16 responses, 2 passes over the kept."""
    values = {
        "warm_start": "",
        "n_ei_steps": 2,
        "ei_batch_size": 8,
        "group_size": 16,
        "ei_epochs": 2,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "eval_interval": 1,
    }
    return _without_sft_keys(tiny_arguments(model, runs_dir, **(values | overrides)))


def _without_sft_keys(arguments):
    return [argument for argument in arguments if not argument.startswith("num_sft_examples")]


def run_script(name, *arguments, folder=REPOSITORY):
    """Run a script of the repository to its end."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / name), *arguments], capture_output=True, text=True, cwd=folder, timeout=300
    )
