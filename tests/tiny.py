"""Tiny models, the arguments of whole runs of the scripts on them, and what several tests share."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plainrl.checkpoint import TrainingState, fingerprint
from plainrl.grading.rewards import REWARD_FUNCTIONS
from plainrl.prompting import PROMPTS_FOLDER, format_response
from plainrl.sources import arithmetic_records
from policy_evaluation import Evaluator

REPOSITORY = Path(__file__).parent.parent


def tracked_files(pattern="*"):
    """The files that git knows, if they match the pattern. A user may have others beside them."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("no git here")
    result = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    names = [name for name in result.stdout.splitlines() if Path(name).match(pattern)]
    found = [path for name in names if (path := REPOSITORY / name).exists()]
    assert found, pattern
    return found


def make_tiny_model(folder):
    """Save a random Llama of 2 layers, width 64, tied embeddings, with a byte-level BPE of the embedded data."""
    records = arithmetic_records("train", (2, 3), 20)[:200]
    texts = [(PROMPTS_FOLDER / "r1_zero.prompt").read_text()] * 20
    reward = REWARD_FUNCTIONS["r1_zero"]
    texts += [
        f"{record.question}{format_response(record.reasoning, record.ground_truth, reward)}" for record in records
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
    from plainrl.log_probs import get_masked_response_log_probs
    from SFT_helper import tokenize_prompt_and_output

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
        "gradient_checkpointing": "false",
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
    return without_sft_keys(tiny_arguments(model, runs_dir, **(values | overrides)))


def expert_iteration_arguments(model, runs_dir, **overrides):
    """The arguments of a run of expert iteration: 2 steps of 8 questions x 16 responses, 2 passes over the kept."""
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
    return without_sft_keys(tiny_arguments(model, runs_dir, **(values | overrides)))


def without_sft_keys(arguments):
    """The arguments without those that SFT alone has."""
    return [argument for argument in arguments if not argument.startswith("num_sft_examples")]


def run_script(name, *arguments, folder=REPOSITORY, start=subprocess.Popen):
    """Run a script of the repository to its end."""
    return run_python(str(REPOSITORY / name), *arguments, folder=folder, start=start)


def run_python(*arguments, folder=REPOSITORY, start=subprocess.Popen, **options):
    """Run Python with arguments to its end; `start` starts the process."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = start([sys.executable, *map(str, arguments)], cwd=folder, **pipes, **options)
    try:
        stdout, stderr = process.communicate(timeout=1800)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def replace_engine(monkeypatch, stream_responses):
    """Let rollouts come from a function (llm, prompt_ids, sampling_params, seeds, with_log_probs=...)."""

    def submit(llm, prompt_ids, sampling_params, seeds, with_log_probs=True):
        return (prompt_ids, sampling_params, seeds), with_log_probs

    def collect(llm, submitted):
        return stream_responses(llm, *submitted[0], with_log_probs=submitted[1])

    monkeypatch.setattr("plainrl.rollouts.submit", submit)
    monkeypatch.setattr("plainrl.rollouts.collect", collect)


class FakeEvaluator(Evaluator):
    """An evaluator without an engine, for tests of the training loops alone. Every score is zero."""

    def __init__(self, config, run, tokenizer, examples):
        self.config, self.run, self.tokenizer, self.examples = config, run, tokenizer, examples

    def sync(self, policy, with_probes=True):
        return {}

    def sleep(self):
        pass

    def evaluate(self, policy, eval_step):
        return self._log(eval_step, "eval")

    def evaluate_finally(self, policy, num_steps, examples):
        self._log(num_steps, "eval_all")

    def _log(self, eval_step, prefix):
        metrics = {"answer_reward": 0.0, "format_reward": 0.0, "response_length": 1.0, "truncated_fraction": 0.0}
        metrics["num_examples"] = 8
        self.run.log({"eval_step": eval_step} | {f"{prefix}/{name}": value for name, value in metrics.items()})
        return metrics


def new_state(model, tokenizer, data="data"):
    """The state of a training that has not begun."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return TrainingState(model, tokenizer, optimizer, fingerprint([data]))


def take_step(state, step):
    """One step of a training that draws from all global generators."""
    noise = torch.randn(()).item() + random.random() + np.random.rand()
    ids = torch.randint(0, 512, (2, 8))
    (state.policy(ids).logits.square().mean() * (1 + noise)).backward()
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.complete_step(step, metrics_bytes=10 * step)


def write_lines(path, records):
    """Write records, or lines that are none, to a JSON-lines file; return its path as a text."""
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return str(path)


def read_lines(path):
    """The objects in a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_rows(folder):
    """The rows of a run's metrics that belong to optimizer steps."""
    return [row for row in read_lines(folder / "metrics.jsonl") if "train_step" in row]
