"""The scripts: for real on a tiny model with a real engine, their mistakes in one line, the README's commands."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tomllib

import pytest
import torch
import yaml
from tiny import REPOSITORY, run_script, tiny_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer

import benchmark
import SFT_train
from math_data import load_sft_examples
from policy_evaluation import Evaluator
from run_config import ExpertIterationConfig, GRPOConfig, SFTConfig, UserError, load_config, run_main

MODULES = [
    "SFT_helper",
    "GRPO_helper",
    "policy_evaluation",
    "SFT_train",
    "GRPO_train",
    "expert_iteration",
    "run_checkpoint",
    "run_config",
    "run_directory",
    "run_guard",
    "run_results",
    "sweep",
    "plot_results",
    "prefix_tree",
    "benchmark",
    "math_data",
    "math_equality",
    "math_estimate",
    "math_reward",
    "math_worker",
]


@pytest.fixture(scope="module")
def sft_run(tiny_model_folder, tmp_path_factory):
    """One whole run of SFT_train.py: 3 steps, evaluated at 0, 2 and 3."""
    runs_dir = tmp_path_factory.mktemp("runs")
    result = run_script("SFT_train.py", *tiny_arguments(tiny_model_folder, runs_dir, run_name="tiny"))
    assert result.returncode == 0, result.stderr
    return runs_dir / "tiny", result


def test_sft_run_leaves_everything_in_its_folder(sft_run):
    path, result = sft_run
    lines = result.stdout.splitlines()
    assert "24 taken" in result.stdout
    assert re.match(r"validation answer reward: last \d\.\d+ \(step 3\), best .*, on 8 held-out questions; ", lines[-2])
    assert re.search(r"; after the last step on 12: \d\.\d+ \(temperature 1\)$", lines[-2])
    assert str(path) in lines[-1]
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "training.png"):
        assert (path / name).stat().st_size > 0
    assert sorted(file.name for file in (path / "samples").iterdir()) == [
        *(f"eval_{step:06d}.jsonl" for step in (0, 2, 3)),
        "eval_all_000003.jsonl",
    ]
    saved = SFTConfig.model_validate(yaml.safe_load((path / "config.yaml").read_text()))
    assert (saved.learning_rate, saved.run_name) == (1e-3, "tiny")


def test_sft_run_logs_every_metric_at_every_step(sft_run):
    rows = [json.loads(line) for line in (sft_run[0] / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if "train_step" in row]
    assert [row["train_step"] for row in train] == [1, 2, 3]
    assert [row["eval_step"] for row in rows if "eval/num_examples" in row] == [0, 2, 3]
    assert [row["eval_step"] for row in rows if "eval_all/num_examples" in row] == [3]
    documented = set(re.findall(r"(?:train|time|memory)/\w+", SFT_train.__doc__))
    for row in train:
        assert set(row) == documented | {"train_step"}
        assert all(value is not None for value in row.values())
    assert train[-1]["train/loss_per_token"] < train[0]["train/loss_per_token"]
    for row in rows:
        if "eval/num_examples" in row:
            assert 1 <= row["eval/sync_multiplicative_error"] < 1.001
            assert row["eval/num_examples"] == 8


def test_final_folder_loads_and_gives_the_evaluated_score_again(sft_run, tmp_path):
    """In float32 the same seeds give the same tokens in a fresh process and engine, not only a like score."""
    final = sft_run[0] / "final"
    AutoTokenizer.from_pretrained(final)
    assert AutoModelForCausalLM.from_pretrained(final).dtype == torch.float32
    result = run_script("policy_evaluation.py", *tiny_arguments(final, tmp_path, run_name="again"), "data=arithmetic")
    assert result.returncode == 0, result.stderr
    for heading in ("format 1, answer 1", "format 1, answer 0", "format 0"):
        assert f"=== {heading}: " in result.stdout
    assert re.search(r"answer_reward +\d", result.stdout)
    first, again = (
        path.read_text()
        for path in (sft_run[0] / "samples/eval_000003.jsonl", tmp_path / "again/samples/eval_000000.jsonl")
    )
    responses = [[json.loads(line)["response"] for line in text.splitlines()] for text in (first, again)]
    assert responses[0] == responses[1]


def test_final_folder_loads_in_a_fresh_engine_without_a_sync(sft_run):
    """What stands in the folder is the trained policy: no weights are copied here, and the tokens are the same.

    Also where there is no C++ compiler, which the engine otherwise uses for a helper of its sampler.
    """
    code = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from math_data import load_validation_set, validation_subset
from policy_evaluation import VALIDATION_SAMPLING_SEED, derive_seed, init_vllm, sample_responses, sampling_params
from run_config import SFTConfig, read_yaml
from SFT_helper import encode_prompt
folder = Path(sys.argv[1])
config = SFTConfig.model_validate(read_yaml(folder / "config.yaml"))
examples = validation_subset(load_validation_set(config), config)
tokenizer = AutoTokenizer.from_pretrained(folder / "final")
llm = init_vllm(str(folder / "final"), "cpu", 0, dtype="float32", max_model_len=384)
ids = [encode_prompt(example.prompt, tokenizer) for example in examples]
seeds = [derive_seed(VALIDATION_SAMPLING_SEED, "evaluation", index) for index in range(len(ids))]
for response in sample_responses(llm, ids, sampling_params(config), seeds):
    print(repr(response.text))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(sft_run[0])],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"CXX": "no-compiler"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    evaluated = (sft_run[0] / "samples/eval_000003.jsonl").read_text().splitlines()
    assert result.stdout.splitlines()[-len(evaluated) :] == [repr(json.loads(row)["response"]) for row in evaluated]


class FakeEvaluator(Evaluator):
    """An evaluator without an engine, for tests of the training loop alone."""

    def __init__(self, config, run, tokenizer, examples):
        self.config, self.run, self.tokenizer = config, run, tokenizer

    def evaluate(self, policy, eval_step, examples=None, prefix="eval"):
        metrics = {"answer_reward": 0.0, "format_reward": 0.0, "response_length": 1.0, "truncated_fraction": 0.0}
        metrics["num_examples"] = 8
        self.run.log({"eval_step": eval_step} | {f"{prefix}/{name}": value for name, value in metrics.items()})
        return metrics


@pytest.fixture
def without_engine(monkeypatch):
    monkeypatch.setattr(SFT_train, "Evaluator", FakeEvaluator)


def select(config):
    return SFT_train.select_examples(load_sft_examples(config), config)


def metrics_of(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train_step" in row]


def test_the_same_seed_gives_the_same_run_and_another_one_another(without_engine, tiny_model_folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name=name, seed=seed))
    weights = [(tmp_path / name / "final/model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_gradient_accumulation_does_not_change_the_step(tiny_model, tiny_model_folder, tokenizer, steps):
    config = load_config(
        SFTConfig, REPOSITORY / "config.yaml", tiny_arguments(tiny_model_folder, "", gradient_accumulation_steps=steps)
    )
    train_set = SFT_train.tokenize_examples(select(config), tokenizer, config)[:8]
    metrics = SFT_train.accumulate_gradients(tiny_model, train_set, 0, config)
    gradient = torch.cat([p.grad.flatten() for p in tiny_model.parameters()])
    tiny_model.zero_grad()
    whole = config.model_copy(update={"gradient_accumulation_steps": 1})
    whole_metrics = SFT_train.accumulate_gradients(tiny_model, train_set, 0, whole)
    whole_gradient = torch.cat([p.grad.flatten() for p in tiny_model.parameters()])
    assert (gradient - whole_gradient).norm() < 1e-6 * whole_gradient.norm()
    assert metrics == pytest.approx(whole_metrics, rel=1e-5)


def test_per_token_metrics_cover_every_microbatch(tiny_model, tiny_model_folder, tokenizer):
    from SFT_helper import compute_entropy

    config = load_config(SFTConfig, REPOSITORY / "config.yaml", tiny_arguments(tiny_model_folder, ""))
    train_set = SFT_train.tokenize_examples(select(config), tokenizer, config)[:8]
    metrics = SFT_train.accumulate_gradients(tiny_model, train_set, 0, config)
    log_probs, entropies, per_row = [], [], []
    for row in train_set:
        logits = tiny_model(torch.tensor([row.prompt_ids + row.response_ids])).logits[0, len(row.prompt_ids) - 1 : -1]
        scores = logits.log_softmax(-1).gather(-1, torch.tensor(row.response_ids)[:, None])[:, 0]
        log_probs.append(scores)
        per_row.append(-scores.sum())
        entropies.append(compute_entropy(logits))
    assert metrics["train/loss_per_token"] == pytest.approx(-torch.cat(log_probs).mean().item(), rel=1e-5)
    assert metrics["train/token_entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)
    assert metrics["train/loss"] == pytest.approx(torch.stack(per_row).mean().item(), rel=1e-5)
    assert metrics["train/num_response_tokens"] == sum(len(row.response_ids) for row in train_set)


def test_gradient_checkpointing_does_not_change_the_gradient(tiny_model, tiny_model_folder, tokenizer):
    config = load_config(SFTConfig, REPOSITORY / "config.yaml", tiny_arguments(tiny_model_folder, ""))
    batch = SFT_train.tokenize_examples(select(config), tokenizer, config)[:8]
    gradients, num_layer_runs = [], []
    tiny_model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: num_layer_runs.append(None))
    tiny_model.train()
    for is_on in (False, True):
        tiny_model.zero_grad()
        num_layer_runs.clear()
        if is_on:
            tiny_model.gradient_checkpointing_enable()
        SFT_train.accumulate_gradients(tiny_model, batch, 0, config)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in tiny_model.parameters()]))
    assert len(num_layer_runs) == 2 * config.gradient_accumulation_steps  # forward, and again in backward
    assert (gradients[0] - gradients[1]).norm() < 2e-6 * gradients[0].norm()


def test_weights_that_went_bad_are_not_called_good(without_engine, tiny_model_folder, tmp_path, capsys):
    """The first update ruins the weights: nothing is saved, the last checkpoint (here there is none) stands."""
    with pytest.raises(UserError, match=r"step 2: loss nan.*arithmetic train, question \d+"):
        SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name="bad", learning_rate="1e38"))
    assert "nothing newer than the last checkpoint" in capsys.readouterr().err
    assert [row["train_step"] for row in metrics_of(tmp_path / "bad")] == [1]
    assert not (tmp_path / "bad/checkpoints").exists()


def test_weights_that_are_no_numbers_never_become_a_checkpoint(without_engine, tiny_model_folder, tmp_path, capsys):
    """Else the good one before them would be removed for it."""
    arguments = tiny_arguments(
        tiny_model_folder, tmp_path, run_name="bad", learning_rate="1e39", checkpoint_interval=1, eval_interval=50
    )
    with pytest.raises(UserError, match="infinite or no numbers after step 1: they are not saved"):
        SFT_train.main(arguments)
    assert "nothing newer than the last checkpoint" in capsys.readouterr().err
    assert list((tmp_path / "bad").glob("checkpoints/*")) == []


def test_a_loss_that_is_no_number_keeps_the_last_good_weights(
    without_engine, tiny_model_folder, tokenizer, tmp_path, monkeypatch, capsys
):
    """A batch of step 3 has no finite loss, the weights are fine: those after step 2 are kept."""
    original, calls = SFT_train.accumulate_gradients, []

    def third_batch_is_bad(*arguments):
        calls.append(None)
        metrics = original(*arguments)
        return metrics | {"train/loss": float("inf")} if len(calls) == 3 else metrics

    monkeypatch.setattr(SFT_train, "accumulate_gradients", third_batch_is_bad)
    with pytest.raises(UserError, match=r"step 3: loss inf.*arithmetic train, question \d+(?: and|, )"):
        SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name="bad", eval_interval=50))
    monkeypatch.undo()
    saved = tmp_path / "bad/checkpoints/step_000002"
    assert f"state after step 2 saved: {saved}" in capsys.readouterr().err
    config = load_config(SFTConfig, REPOSITORY / "config.yaml", tiny_arguments(tiny_model_folder, ""))
    batch = SFT_train.tokenize_examples(select(config), tokenizer, config)[:8]
    policy = AutoModelForCausalLM.from_pretrained(saved / "model")
    assert math.isfinite(original(policy, batch, 0, config)["train/loss"])


def test_an_evaluation_that_fails_loses_nothing(without_engine, tiny_model_folder, tmp_path, monkeypatch):
    def evaluate(self, policy, eval_step):
        if eval_step == 2:
            raise UserError("the engine is not the policy")
        return evaluate_fake(self, policy, eval_step)

    evaluate_fake = FakeEvaluator.evaluate
    monkeypatch.setattr(FakeEvaluator, "evaluate", evaluate)
    with pytest.raises(UserError, match="the engine is not the policy"):
        SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name="stopped"))
    assert (tmp_path / "stopped/checkpoints/step_000002/model/model.safetensors").exists()


def test_a_start_that_fails_leaves_the_name_free(tiny_model_folder, tmp_path, monkeypatch):
    class NoEngine:
        def __init__(self, *_):
            raise UserError("no engine")

    monkeypatch.setattr(SFT_train, "Evaluator", NoEngine)
    for _ in range(2):
        with pytest.raises(UserError, match="no engine"):
            SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name="again"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_finish_and_saves(
    number, status, without_engine, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    original = SFT_train.accumulate_gradients

    def with_signal(*arguments):
        os.kill(os.getpid(), number)
        return original(*arguments)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(SFT_train, "accumulate_gradients", with_signal)
    monkeypatch.setattr(sys, "argv", ["SFT_train.py", *tiny_arguments(tiny_model_folder, tmp_path, run_name="stopped")])
    with pytest.raises(SystemExit) as caught:
        run_main(SFT_train.main)
    assert caught.value.code == status
    assert "state after step 1 saved" in capsys.readouterr().err
    assert len(metrics_of(tmp_path / "stopped")) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "stopped/checkpoints/step_000001/model")
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


def test_out_of_memory_on_a_gpu_saves_and_names_what_reduces_it(
    without_engine, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    original = SFT_train.accumulate_gradients

    def third_step_is_too_large(*arguments):
        if len(metrics_of(tmp_path / "oom")) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(*arguments)

    monkeypatch.setattr(SFT_train, "accumulate_gradients", third_step_is_too_large)
    monkeypatch.setattr(sys, "argv", ["SFT_train.py", *tiny_arguments(tiny_model_folder, tmp_path, run_name="oom")])
    with pytest.raises(SystemExit) as caught:
        run_main(SFT_train.main)
    assert caught.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "Tried to allocate 2.00 GiB" in line and "gradient_checkpointing=true" in line
    assert (tmp_path / "oom/checkpoints/step_000002").is_dir()


def test_steps_override_epochs_and_epochs_may_be_fractions(without_engine, tiny_model_folder, tmp_path):
    for name, overrides, num_steps in (
        ("steps", {"max_steps": 5}, 5),
        ("epochs", {"num_epochs": 1.5}, 5),
        ("half", {"num_epochs": 0.5}, 2),
    ):
        SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name=name, **overrides))
        rows = metrics_of(tmp_path / name)
        assert len(rows) == num_steps
        assert rows[-1]["train/epoch"] == pytest.approx(num_steps * 8 / 24)


def test_learning_rate_schedules_by_hand():
    config = SFTConfig(learning_rate=1.0, lr_schedule="cosine", warmup_fraction=0.2)
    rates = [SFT_train.learning_rate_at(step, 10, config) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[5] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert SFT_train.learning_rate_at(1, 10, SFTConfig(learning_rate=0.5)) == 0.5


def write_lines(path, records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return path


GSM8K = {"question": "How many legs have 3 cats?", "answer": "3*4=<<3*4=12>>12\n#### 12"}
TRACE = {"problem": "1 + 1?", "reasoning_trace": " 2 </think> <answer> 2 </answer>", "expected_answer": "2"}


def test_filter_correct_keeps_what_the_reward_function_accepts(tmp_path, capsys):
    data = write_lines(tmp_path / "sft.jsonl", [TRACE, TRACE | {"expected_answer": "3", "problem": "1 + 2?"}])
    config = SFTConfig(train_data=str(data), filter_correct=True)
    assert [example.ground_truth for example in select(config)] == ["2"]
    assert "kept 1 of 2 traces" in capsys.readouterr().out


def test_examples_are_drawn_from_the_filtered_ones(tmp_path):
    """Half of the traces are wrong: asking for as many as are right gives exactly those."""
    records = [TRACE | {"problem": f"1 + {i}?", "expected_answer": str(2 + i % 2)} for i in range(20)]
    data = write_lines(tmp_path / "sft.jsonl", records)
    config = SFTConfig(train_data=str(data), filter_correct=True, num_sft_examples=10)
    assert len(select(config)) == 10
    with pytest.raises(UserError, match="has 10 unique examples left after filter_correct; ask for at most that"):
        select(config.model_copy(update={"num_sft_examples": 11}))


def test_a_response_is_taught_to_end(tokenizer, tmp_path):
    """With the stop string at its end, or else with EOS."""
    records = [TRACE, {"prompt": "1 + 1?", "response": "It is \\boxed{2}."}]
    config = SFTConfig(train_data=str(write_lines(tmp_path / "sft.jsonl", records)))
    rows = SFT_train.tokenize_examples(load_sft_examples(config), tokenizer, config)
    assert [row.response_ids[-1] == tokenizer.eos_token_id for row in rows] == [False, True]
    assert [row.response_ids.count(tokenizer.eos_token_id) for row in rows] == [0, 1]


def test_responses_over_the_sampling_limit_are_counted(tokenizer, tmp_path, capsys):
    config = SFTConfig(
        train_data=str(write_lines(tmp_path / "sft.jsonl", [TRACE])), sampling_max_tokens=4, sampling_min_tokens=1
    )
    SFT_train.tokenize_examples(load_sft_examples(config), tokenizer, config)
    assert "1 of 1 training responses are longer than sampling_max_tokens = 4" in capsys.readouterr().out


def test_long_examples_are_never_cut(tokenizer, tmp_path, capsys):
    records = [TRACE, TRACE | {"problem": "long " * 200}]
    config = SFTConfig(
        train_data=str(write_lines(tmp_path / "sft.jsonl", records)), max_context_tokens=160, sampling_max_tokens=16
    )
    examples = select(config)
    with pytest.raises(
        UserError, match=r"1 of 2 training examples exceed max_context_tokens = 160, .*sft.jsonl, line 2"
    ):
        SFT_train.tokenize_examples(examples, tokenizer, config)
    kept = SFT_train.tokenize_examples(examples, tokenizer, config.model_copy(update={"drop_long_examples": True}))
    assert len(kept) == 1
    assert "left out: 1 of 2" in capsys.readouterr().out


ONE_EACH = {"num_sft_examples": "all", "num_eval_examples": 1}
BAD_INPUTS = {
    "missing file": ({"train_data": "none.jsonl"}, "none.jsonl does not exist"),
    "empty file": ({"train_data": "empty.jsonl"}, "empty.jsonl is empty"),
    "broken line": ({"train_data": "broken.jsonl"}, "broken.jsonl, line 2: broken JSON"),
    "missing fields": ({"validation_data": "fields.jsonl"}, "fields.jsonl, line 2: fields ['text'] fit no known"),
    "long prompt": ({"validation_data": "long.jsonl"} | ONE_EACH, "1 prompts are longer than max_context_tokens - "),
    "long example": ({"max_context_tokens": 64}, "training examples exceed max_context_tokens = 64"),
    "nothing left": (
        {"train_data": "wrong.jsonl", "filter_correct": "true"} | ONE_EACH,
        "accepts none of the 1 traces",
    ),
    "unknown model": ({"model": "Qwen/Nothing-0B"}, "run `hf download Qwen/Nothing-0B`"),
    "no cuda": ({"preset": "one-gpu"}, "0 CUDA devices are visible; use preset=laptop"),
    "no cuda for vllm": ({"evaluator_device": "cuda:0"}, "the CPU build of vLLM is installed"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_and_status_2(case, tiny_model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "broken.jsonl", [TRACE, '{"problem": \n'])
    write_lines(tmp_path / "empty.jsonl", [])
    write_lines(tmp_path / "fields.jsonl", [TRACE, {"text": "x"}])
    write_lines(tmp_path / "wrong.jsonl", [TRACE | {"expected_answer": "3"}])
    write_lines(tmp_path / "long.jsonl", [{"problem": "long " * 400, "answer": "1"}])
    overrides, message = BAD_INPUTS[case]
    monkeypatch.setattr(
        sys,
        "argv",
        ["SFT_train.py", *tiny_arguments(**({"model": tiny_model_folder, "runs_dir": tmp_path / "runs"} | overrides))],
    )
    with pytest.raises(SystemExit) as caught:
        run_main(SFT_train.main)
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    assert error.startswith("error: ") and message in error


def test_gsm8k_layout_trains_by_changing_data_keys_only(without_engine, tiny_model_folder, tmp_path, capsys):
    train, validation = (
        write_lines(tmp_path / name, [GSM8K | {"question": f"{i} cats?"} for i in numbers])
        for name, numbers in (("train.jsonl", range(26)), ("test.jsonl", range(24, 40)))
    )
    data = {"train_data": train, "validation_data": validation}
    SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name="gsm8k", **data))
    assert len(metrics_of(tmp_path / "gsm8k")) == 3
    assert "left out: 2 of 26 training examples have their question in" in capsys.readouterr().out
    with pytest.raises(UserError, match="train_data = .*: 16 of 16 training examples have their question in"):
        SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, **data | {"train_data": validation}))


def test_mistakes_end_in_one_line_without_a_traceback():
    result = run_script("SFT_train.py", "preset=laptop", "learning_rat=1e-5")
    assert result.returncode == 2
    assert result.stderr == "error: unknown key learning_rat (command line): did you mean learning_rate?\n"


def test_importing_a_module_is_light():
    """No import parses arguments, starts CUDA, or brings in vLLM or wandb."""
    code = (
        f"import sys; sys.argv.append('nonsense')\nfor name in {MODULES!r}: __import__(name)\n"
        "import torch; assert not torch.cuda.is_initialized(); assert not {'vllm', 'wandb'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert result.returncode == 0, result.stderr


def test_no_module_shadows_a_library():
    import importlib.metadata

    taken = set(sys.stdlib_module_names) | {name.lower() for name in importlib.metadata.packages_distributions()}
    assert not {path.stem.lower() for path in REPOSITORY.glob("*.py")} & taken


def readme_commands():
    text = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if "python " in line]


def test_readme_commands_exist():
    commands = readme_commands()
    assert "pip install -q uv && uv run python SFT_train.py" in commands
    for command in commands:
        script, *arguments = command.split("#")[0].partition("python ")[2].split()
        assert (REPOSITORY / script).is_file(), command
        for argument in arguments:
            key = argument.partition("=")[0]
            schemas = (SFTConfig, GRPOConfig, ExpertIterationConfig)
            keys = {"data", "config", "--help", "--report"}.union(*(schema.model_fields for schema in schemas))
            keys |= {"sweep.py": {"--dry-run"}, "benchmark.py": set(benchmark.TURNS) | {"all"}}.get(script, set())
            is_sweep = key.startswith("sweeps/") and (REPOSITORY / key).is_file()
            assert key in keys or is_sweep, command


def test_readme_sets_up_what_the_project_and_its_presets_name():
    """`uv sync` groups exist; `hf download` brings the model, and the folder of data, that the GPU presets name."""
    text = (REPOSITORY / "README.md").read_text()
    groups = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["dependency-groups"]
    assert set(re.findall(r"--(?:no-)?group (\w+)", text)) == {"cpu", "gpu", "flash"} <= set(groups)
    for file in ("config.yaml", "grpo_train.yaml", "expert_iteration.yaml"):
        for preset in ("one-gpu", "two-gpu"):
            values = yaml.safe_load((REPOSITORY / file).read_text())["presets"][preset]
            assert f"hf download {values['model']}\n" in text
            assert values["train_data"].startswith("data/sft-reason/")
    assert "hf download garg-aayush/sft-cs336-assign5-datasets --repo-type=dataset --local-dir data\n" in text


def test_readme_names_files_that_exist():
    text = (REPOSITORY / "README.md").read_text()
    assert "pip install -q uv && uv run pytest" in text
    assert "@@" not in text
    for name in re.findall(r"`([\w/]+\.(?:py|yaml|prompt|md))`", text):
        assert (REPOSITORY / name).is_file(), name


def test_each_fault_in_the_readme_has_its_test():
    """The table "What happens when..." names a test in each row, and the test exists."""
    table = (REPOSITORY / "README.md").read_text().partition("### What happens when")[2].partition("\n\n`uv run")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 15
    tests = "".join(path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py"))
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert names and all(f"def {name}(" in tests for name in names), row


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_documented(name):
    module = importlib.import_module(name)
    for attribute, value in vars(module).items():
        if (
            not attribute.startswith("_")
            and getattr(value, "__module__", None) == name
            and callable(value)
            and attribute != "RewardFunction"
        ):
            assert value.__doc__, f"{name}.{attribute}"
