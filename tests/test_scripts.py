"""The scripts: for real on a tiny model with a real engine, their mistakes in one line, the documented commands."""

import json
import math
import os
import re
import shlex
import signal
import sys
import tomllib

import pytest
import torch
import yaml
from tiny import (
    REPOSITORY,
    FakeEvaluator,
    expert_iteration_arguments,
    grpo_arguments,
    read_lines,
    run_python,
    run_script,
    tiny_arguments,
    tracked_files,
    train_rows,
    write_lines,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import GRPO_train
import SFT_train
from experiments import expert_iteration
from experiments.benchmark.turns import TURNS
from plainrl.cli import load_config, run_main
from plainrl.config import ExpertIterationConfig, GRPOConfig, SFTConfig
from plainrl.data import load_sft_examples
from plainrl.records import UserError
from plainrl.supplement_config import BenchmarkConfig, DPOConfig


def run_sft(background):
    """Run SFT_train.py: 3 steps, evaluated at 0, 2 and 3; then look at final/ in another process (see FRESH_ENGINE)."""
    runs_dir, start = background.new_folder("runs"), background.start
    arguments = tiny_arguments(background.tiny_model, runs_dir, run_name="tiny")
    result = run_script("SFT_train.py", *arguments, start=start)
    path = runs_dir / "tiny"
    arguments = [*tiny_arguments(path / "final", runs_dir, run_name="again"), "data=arithmetic"]
    environment = os.environ | {"CXX": "no-compiler"}
    return path, result, run_python("-c", FRESH_ENGINE, path, *arguments, start=start, env=environment)


# What stands in final/ is the trained policy: first no weights are copied into the engine, then the script does it.
FRESH_ENGINE = """
import json, runpy, sys
from pathlib import Path
from transformers import AutoTokenizer
from plainrl import engine
from plainrl.cli import read_yaml
from plainrl.config import SFTConfig
from plainrl.data import derive_seed, load_validation_set, validation_subset
from policy_evaluation import VALIDATION_SAMPLING_SEED
from SFT_helper import encode_prompt
folder = Path(sys.argv[1])
config = SFTConfig.model_validate(read_yaml(folder / "config.yaml"))
examples = validation_subset(load_validation_set(config), config)
tokenizer = AutoTokenizer.from_pretrained(folder / "final")
llm = engine.init_vllm(str(folder / "final"), "cpu", 0, dtype="float32", max_model_len=384)
ids = [encode_prompt(example.prompt, tokenizer) for example in examples]
seeds = [derive_seed(VALIDATION_SAMPLING_SEED, "evaluation", index) for index in range(len(ids))]
responses = engine.sample_responses(llm, ids, engine.sampling_params(config), seeds)
(folder / "without_sync.json").write_text(json.dumps([response.text for response in responses]))
engine.init_vllm = lambda *_, **__: llm
sys.argv = ["policy_evaluation.py", *sys.argv[2:]]
runpy.run_path("policy_evaluation.py", run_name="__main__")
"""


@pytest.fixture
def sft_run(background):
    """The folder of a whole run of SFT_train.py, and what it printed."""
    path, result, _ = background.result(run_sft)
    assert result.returncode == 0, result.stderr
    return path, result


needs_sft_run = pytest.mark.background(job=run_sft)


@needs_sft_run
def test_sft_run_leaves_everything_in_its_folder(sft_run, background):
    path, result = sft_run
    lines = result.stdout.splitlines()
    assert "24 taken" in result.stdout
    start, started = (lines.index(line) for line in lines if "vLLM" in line)
    assert started == start + 1 and lines[start] == f"starting vLLM on cpu: {background.tiny_model} in float32"
    cache = "its key-value cache of 1.0 GiB holds 2,097,152 tokens, enough for 5,461.3 contexts of 384 tokens"
    assert re.fullmatch(rf"vLLM started in \d+ s; {cache}", lines[started])  # and nothing of its own
    assert re.match(r"validation answer reward: last \d\.\d+ \(step 3\), best .*, on 8 held-out questions; ", lines[-2])
    assert re.search(r"; after the last step on 12: \d\.\d+ \(temperature 1\)$", lines[-2])
    assert str(path) in lines[-1]
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "training.png", "report.html"):
        assert (path / name).stat().st_size > 0
    assert sorted(file.name for file in (path / "samples").iterdir()) == [
        *(f"eval_{step:06d}.jsonl" for step in (0, 2, 3)),
        "eval_all_000003.jsonl",
    ]
    saved = SFTConfig.model_validate(yaml.safe_load((path / "config.yaml").read_text()))
    assert (saved.learning_rate, saved.run_name) == (1e-3, "tiny")


SFT_METRICS = {
    *("train/loss", "train/loss_per_token", "train/token_entropy", "train/num_response_tokens", "train/grad_norm"),
    *("train/loss_scale", "train/learning_rate", "train/epoch", "time/step", "time/tokens_per_second"),
    "memory/peak_gib",
}


@needs_sft_run
def test_sft_run_logs_every_metric_at_every_step(sft_run):
    rows = [json.loads(line) for line in (sft_run[0] / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if "train_step" in row]
    assert [row["train_step"] for row in train] == [1, 2, 3]
    assert [row["eval_step"] for row in rows if "eval/num_examples" in row] == [0, 2, 3]
    assert [row["eval_step"] for row in rows if "eval_all/num_examples" in row] == [3]
    for row in train:
        assert set(row) == SFT_METRICS | {"train_step"}
        assert all(value is not None for value in row.values())
    assert train[-1]["train/loss_per_token"] < train[0]["train/loss_per_token"]
    for row in rows:
        if "eval/num_examples" in row:
            assert 1 <= row["eval/sync_multiplicative_error"] < 1.001
            assert row["eval/num_examples"] == 8


@needs_sft_run
def test_final_folder_loads_and_gives_the_evaluated_score_again(sft_run, background):
    """In float32 the same seeds give the same tokens in a fresh process and engine, not only a like score."""
    final = sft_run[0] / "final"
    AutoTokenizer.from_pretrained(final)
    assert AutoModelForCausalLM.from_pretrained(final).dtype == torch.float32
    result = background.result(run_sft)[2]
    assert result.returncode == 0, result.stderr
    for heading in ("format 1, answer 1", "format 1, answer 0", "format 0"):
        assert f"=== {heading}: " in result.stdout
    assert re.search(r"answer_reward +\d", result.stdout)
    first, again = (
        [row["response"] for row in read_lines(path)]
        for path in (
            sft_run[0] / "samples/eval_000003.jsonl",
            sft_run[0].with_name("again") / "samples/eval_000000.jsonl",
        )
    )
    assert first == again


@needs_sft_run
def test_final_folder_loads_in_a_fresh_engine_without_a_sync(sft_run, background):
    """What stands in the folder is the trained policy: no weights are copied here, and the tokens are the same.

    Also where there is no C++ compiler, which the engine otherwise uses for a helper of its sampler.
    """
    result = background.result(run_sft)[2]
    assert result.returncode == 0, result.stderr
    evaluated = [row["response"] for row in read_lines(sft_run[0] / "samples/eval_000003.jsonl")]
    assert json.loads((sft_run[0] / "without_sync.json").read_text()) == evaluated


@pytest.fixture
def without_engine(monkeypatch):
    monkeypatch.setattr(SFT_train, "Evaluator", FakeEvaluator)


def select(config):
    return SFT_train.select_examples(load_sft_examples(config), config)


@pytest.mark.usefixtures("cpu_engine")
def test_the_same_seed_gives_the_same_run_and_another_one_another(without_engine, tiny_model_folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name=name, seed=seed, examples_seed=0))
    weights = [(tmp_path / name / "final/model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("length_normalization", ["sum", "token_mean"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_gradient_accumulation_does_not_change_the_step(
    tiny_model, tiny_model_folder, tokenizer, steps, length_normalization
):
    settings = {"gradient_accumulation_steps": steps, "length_normalization": length_normalization}
    config = load_config(SFTConfig, REPOSITORY / "config.yaml", tiny_arguments(tiny_model_folder, "", **settings))
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


def test_the_loss_per_token_is_what_token_mean_trains_on(tiny_model, tiny_model_folder, tokenizer):
    """Its gradient is that of the sum, times rows over tokens; also in expert iteration, which has the key too."""
    found = {}
    for name in ("sum", "token_mean"):
        arguments = expert_iteration_arguments(tiny_model_folder, "", length_normalization=name)
        config = load_config(ExpertIterationConfig, REPOSITORY / "experiments/expert_iteration.yaml", arguments)
        sft = load_config(SFTConfig, REPOSITORY / "config.yaml", tiny_arguments(tiny_model_folder, ""))
        train_set = SFT_train.tokenize_examples(select(sft), tokenizer, sft)[:8]
        metrics = SFT_train.accumulate_gradients(tiny_model, train_set, 0, config)
        found[name] = metrics, torch.cat([p.grad.flatten() for p in tiny_model.parameters()])
        tiny_model.zero_grad()
    metrics, gradient = found["token_mean"]
    assert metrics["train/loss"] == pytest.approx(metrics["train/loss_per_token"], rel=1e-6)
    expected = found["sum"][1] * len(train_set) / metrics["train/num_response_tokens"]
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


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


@pytest.mark.usefixtures("cpu_engine")
def test_weights_that_went_bad_are_not_called_good(without_engine, tiny_model_folder, tmp_path, capsys):
    """The first update ruins the weights: nothing is saved, the last checkpoint (here there is none) stands."""
    with pytest.raises(UserError, match=r"step 2: loss nan.*arithmetic train, question \d+"):
        SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name="bad", learning_rate="1e38"))
    assert "nothing newer than the last checkpoint" in capsys.readouterr().err
    assert [row["train_step"] for row in train_rows(tmp_path / "bad")] == [1]
    assert not (tmp_path / "bad/checkpoints").exists()


@pytest.mark.usefixtures("cpu_engine")
def test_weights_that_are_no_numbers_never_become_a_checkpoint(without_engine, tiny_model_folder, tmp_path, capsys):
    """Else the good one before them would be removed for it."""
    arguments = tiny_arguments(
        tiny_model_folder, tmp_path, run_name="bad", learning_rate="1e39", checkpoint_interval=1, eval_interval=50
    )
    with pytest.raises(UserError, match="infinite or NaN after step 1: they are not saved"):
        SFT_train.main(arguments)
    assert "nothing newer than the last checkpoint" in capsys.readouterr().err
    assert list((tmp_path / "bad").glob("checkpoints/*")) == []


@pytest.mark.usefixtures("cpu_engine")
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


@pytest.mark.usefixtures("cpu_engine")
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


@pytest.mark.usefixtures("cpu_engine")
def test_a_start_that_fails_leaves_the_name_free(tiny_model_folder, tmp_path, monkeypatch):
    class NoEngine:
        def __init__(self, *_):
            raise UserError("no engine")

    monkeypatch.setattr(SFT_train, "Evaluator", NoEngine)
    for _ in range(2):
        with pytest.raises(UserError, match="no engine"):
            SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name="again"))


@pytest.mark.usefixtures("cpu_engine")
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
    assert len(train_rows(tmp_path / "stopped")) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "stopped/checkpoints/step_000001/model")
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.usefixtures("cpu_engine")
def test_out_of_memory_on_a_gpu_saves_and_names_what_reduces_it(
    without_engine, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    original = SFT_train.accumulate_gradients

    def third_step_is_too_large(*arguments):
        if len(train_rows(tmp_path / "oom")) == 2:
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


@pytest.mark.usefixtures("cpu_engine")
def test_steps_override_epochs_and_epochs_may_be_fractions(without_engine, tiny_model_folder, tmp_path):
    for name, overrides, num_steps in (
        ("steps", {"max_steps": 5}, 5),
        ("epochs", {"num_epochs": 1.5}, 5),
        ("half", {"num_epochs": 0.5}, 2),
    ):
        SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name=name, **overrides))
        rows = train_rows(tmp_path / name)
        assert len(rows) == num_steps
        assert rows[-1]["train/epoch"] == pytest.approx(num_steps * 8 / 24)


@pytest.mark.usefixtures("cpu_engine")
def test_the_optimizer_takes_the_rate_of_its_step(without_engine, tiny_model_folder, tmp_path, monkeypatch):
    rates, original = [], SFT_train.prepare_training

    def watched(policy, config):
        optimizer = original(policy, config)
        optimizer.register_step_pre_hook(lambda one, *_: rates.append({group["lr"] for group in one.param_groups}))
        return optimizer

    monkeypatch.setattr(SFT_train, "prepare_training", watched)
    settings = {"lr_schedule": "cosine", "warmup_fraction": 0.34}
    SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name="a", **settings))
    assert rates == [{row["train/learning_rate"]} for row in train_rows(tmp_path / "a")]
    assert len({max(rate) for rate in rates}) == len(rates) > 1


def test_learning_rate_schedules_by_hand():
    config = SFTConfig(learning_rate=1.0, lr_schedule="cosine", warmup_fraction=0.2)
    rates = [SFT_train.learning_rate_at(step, 10, config) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[5] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert SFT_train.learning_rate_at(1, 10, SFTConfig(learning_rate=0.5)) == 0.5


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
    config = SFTConfig(train_data=write_lines(tmp_path / "sft.jsonl", records))
    rows = SFT_train.tokenize_examples(load_sft_examples(config), tokenizer, config)
    assert [row.response_ids[-1] == tokenizer.eos_token_id for row in rows] == [False, True]
    assert [row.response_ids.count(tokenizer.eos_token_id) for row in rows] == [0, 1]


@pytest.mark.parametrize(
    ("response", "wanted"),
    [
        ("It is 2.", "It is 2.<eos>"),
        ("It is 2.<eos>", "It is 2.<eos>"),
        ("It is 2.<eos>\n", "It is 2.<eos>"),
        ("It is 2.<eos><eos> ", "It is 2.<eos>"),
        (" 2 </think> <answer> 2 </answer><eos>", " 2 </think> <answer> 2 </answer><eos>"),
        (" 2 </think> <answer> 2 </answer>", " 2 </think> <answer> 2 </answer>"),
        (" 2 </think> <answer> 2 </answer>\n", " 2 </think> <answer> 2 </answer>\n<eos>"),
        ("It is <eos> 2.", "It is <eos> 2.<eos>"),
    ],
)
def test_a_response_ends_in_one_eos(response, wanted, tokenizer, tmp_path):
    records = [{"prompt": "1 + 1?", "response": response}]
    config = SFTConfig(train_data=write_lines(tmp_path / "sft.jsonl", records))
    (row,) = SFT_train.tokenize_examples(load_sft_examples(config), tokenizer, config)
    assert tokenizer.decode(row.response_ids) == wanted
    assert row.response_ids.count(tokenizer.eos_token_id) == wanted.count("<eos>")


def test_responses_over_the_sampling_limit_are_counted(tokenizer, tmp_path, capsys):
    config = SFTConfig(
        train_data=write_lines(tmp_path / "sft.jsonl", [TRACE]), sampling_max_tokens=4, sampling_min_tokens=1
    )
    SFT_train.tokenize_examples(load_sft_examples(config), tokenizer, config)
    assert "1 of 1 training responses are longer than sampling_max_tokens = 4" in capsys.readouterr().out


def test_long_examples_are_never_cut(tokenizer, tmp_path, capsys):
    records = [TRACE, TRACE | {"problem": "long " * 200}]
    config = SFTConfig(
        train_data=write_lines(tmp_path / "sft.jsonl", records), max_context_tokens=160, sampling_max_tokens=16
    )
    examples = select(config)
    with pytest.raises(
        UserError, match=r"1 of 2 training examples exceed max_context_tokens = 160, .*sft.jsonl, line 2"
    ):
        SFT_train.tokenize_examples(examples, tokenizer, config)
    kept = SFT_train.tokenize_examples(examples, tokenizer, config.model_copy(update={"drop_long_examples": True}))
    assert len(kept) == 1
    assert "left out: 1 of 2" in capsys.readouterr().out


SCRIPTS = (
    (SFT_train, tiny_arguments, {"num_sft_examples": "all"}),
    (GRPO_train, grpo_arguments, {}),
    (expert_iteration, expert_iteration_arguments, {}),
)


@pytest.mark.usefixtures("cpu_engine")
@pytest.mark.parametrize(("script", "arguments", "overrides"), SCRIPTS)
def test_long_examples_are_left_out_by_every_script(
    script, arguments, overrides, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    """One long question among the training data, one among the validation data."""
    asked = []

    class NoEngine:
        def __init__(self, config, run, tokenizer, examples):
            asked.extend(example.question for example in examples)
            raise UserError("no engine")

    monkeypatch.setattr(script, "Evaluator", NoEngine)
    traces = [TRACE | {"problem": f"{i} + 1?" if i % 9 else "long " * 400 + str(i)} for i in range(18)]
    data = {
        "train_data": write_lines(tmp_path / "train.jsonl", traces[:9]),
        "validation_data": write_lines(tmp_path / "validation.jsonl", traces[9:]),
    }
    given = overrides | data | {"num_eval_examples": "all"}
    for key, wanted in (
        ("false", "1 of 9 training .* at .*train.jsonl, line 1; .* leave them out with drop_long_examples=true"),
        ("true", "no engine"),
    ):
        with pytest.raises(UserError, match=wanted):
            script.main(arguments(tiny_model_folder, tmp_path, **given, drop_long_examples=key))
    output = capsys.readouterr().out
    assert re.search(r"left out: 1 of 9 training .* the longest with \d+ tokens at .*train.jsonl, line 1\n", output)
    assert re.search(r"left out: 1 of 9 validation prompts .*validation.jsonl, line 1\n", output)
    assert "evaluations ask 8 questions during training, and 8 at the end\n" in output
    assert asked == [f"{i} + 1?" for i in range(10, 18)]
    short = write_lines(tmp_path / "short.jsonl", traces[1:9])
    with pytest.raises(UserError, match="1 of 9 validation prompts .* leave them out with drop_long_examples=true"):
        script.main(arguments(tiny_model_folder, tmp_path, **given | {"train_data": short}))


@pytest.mark.usefixtures("cpu_engine")
@pytest.mark.parametrize(("script", "arguments", "overrides"), SCRIPTS)
def test_every_script_looks_ahead_before_the_engine_starts(
    script, arguments, overrides, tiny_model_folder, tmp_path, monkeypatch
):
    def preflight(policy, tokenizer, folder, config):
        assert folder == tmp_path / "x" and config.run_name == "x" and folder.is_dir()
        assert policy.config.hidden_size == 64 and tokenizer.eos_token == "<eos>"
        raise UserError("it cannot be saved")

    monkeypatch.setattr(script, "preflight", preflight)
    monkeypatch.setattr(script, "Evaluator", None)
    with pytest.raises(UserError, match="it cannot be saved"):
        script.main(arguments(tiny_model_folder, tmp_path, run_name="x"))
    assert not (tmp_path / "x").exists()


ONE_EACH = {"num_sft_examples": "all", "num_eval_examples": 1}


BAD_INPUTS = {
    "missing file": ({"train_data": "none.jsonl"}, "none.jsonl does not exist"),
    "empty file": ({"train_data": "empty.jsonl"}, "empty.jsonl is empty"),
    "broken line": ({"train_data": "broken.jsonl"}, "broken.jsonl, line 2: broken JSON"),
    "missing fields": ({"validation_data": "fields.jsonl"}, "fields.jsonl, line 2: fields ['text'] fit no known"),
    "long prompt": (
        {"validation_data": "long.jsonl"} | ONE_EACH,
        "1 of 1 validation prompts are longer than max_context_tokens - ",
    ),
    "long example": ({"max_context_tokens": 64}, "training examples exceed max_context_tokens = 64"),
    "nothing left": (
        {"train_data": "wrong.jsonl", "filter_correct": "true"} | ONE_EACH,
        "accepts none of the 1 traces",
    ),
    "unknown model": ({"model": "Qwen/Nothing-0B"}, "hf download Qwen/Nothing-0B`"),
    "no cuda": ({"preset": "one-gpu"}, "0 CUDA devices are visible; use preset=laptop"),
    "no cuda for vllm": ({"evaluator_device": "cuda:0"}, "the CPU build of vLLM is installed"),
}


@pytest.mark.usefixtures("cpu_engine")
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


@pytest.mark.usefixtures("cpu_engine")
def test_gsm8k_layout_trains_by_changing_data_keys_only(without_engine, tiny_model_folder, tmp_path, capsys):
    train, validation = (
        write_lines(tmp_path / name, [GSM8K | {"question": f"{i} cats?"} for i in numbers])
        for name, numbers in (("train.jsonl", range(26)), ("test.jsonl", range(24, 40)))
    )
    data = {"train_data": train, "validation_data": validation}
    SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, run_name="gsm8k", **data))
    assert len(train_rows(tmp_path / "gsm8k")) == 3
    assert "left out: 2 of 26 training examples have their question in" in capsys.readouterr().out
    with pytest.raises(UserError, match="train_data = .*: 16 of 16 training examples have their question in"):
        SFT_train.main(tiny_arguments(tiny_model_folder, tmp_path, **data | {"train_data": validation}))


def run_with_a_mistake(background):
    return run_script("SFT_train.py", "preset=laptop", "learning_rat=1e-5", start=background.start)


@pytest.mark.background(job=run_with_a_mistake)
def test_mistakes_end_in_one_line_without_a_traceback(background):
    result = background.result(run_with_a_mistake)
    assert result.returncode == 2
    assert result.stderr == "error: unknown key learning_rat (command line): did you mean learning_rate?\n"


def documentation():
    """Every page that a user reads."""
    return {path.name: path.read_text() for path in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"))}


def documented_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", "\n".join(documentation().values()), re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if "python " in line]


ARGUMENTS = {  # of what is no script with a configuration
    "tests/kill_and_resume.py": {"--kills", "20", "10", "--ranks", "2", "--other-ranks", "--soak", "200"},
    "experiments.sweep": {
        "--dry-run",
        "--gpus",
        "0,1",
        "keep_weights",
        "seeds",
        "--variant",
        "--rerun",
        "my_sweep.yaml",
        "compare_recipes.yaml",
    },
    "experiments.chat": {"question", "answer", "num_samples"},
    "experiments.benchmark": {*TURNS, "all", "gpu", "results_dir"},
    "experiments.pass_at_k": {"warm start", "GRPO", "--results"},
    "experiments.runs": {"compare", "report", "runs/A", "runs/B", "other_runs"},
    "tests/grader_report.py": {"pairs.tsv", "--math-verify"},
    "tests/grading_pairs.py": {"answers.jsonl"},
}


def test_readme_commands_exist():
    commands = [re.split("[#>|]", command)[0].strip() for command in documented_commands()]
    assert "pip install -q uv && uv run python SFT_train.py" in commands
    schemas = (SFTConfig, GRPOConfig, ExpertIterationConfig, DPOConfig, BenchmarkConfig)
    for command in commands:
        script, *arguments = shlex.split(command.partition("python ")[2])
        if script == "-m":
            script, *arguments = arguments
            path = REPOSITORY / script.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), command
        else:
            assert (REPOSITORY / script).is_file() or "my_" in script, command  # one of the user's own
        keys = {"data", "config", "--help", "--show"}.union(*(schema.model_fields for schema in schemas))
        keys |= ARGUMENTS.get(script, set())
        for argument in arguments:
            key = argument.partition("=")[0]
            is_sweep = key.startswith("experiments/sweeps/") and (REPOSITORY / key).is_file()
            assert key in keys or is_sweep, command


def test_readme_sets_up_what_the_project_and_its_presets_name():
    """`uv sync` groups exist; `hf download` brings the model, and the folder of data, that the GPU presets name."""
    text = "\n".join(documentation().values())
    groups = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["dependency-groups"]
    assert set(re.findall(r"--(?:no-)?group (\w+)", text)) == {"cpu", "gpu", "flash"} <= set(groups)
    for file in ("config.yaml", "grpo_train.yaml", "experiments/expert_iteration.yaml"):
        for preset in ("one-gpu", "two-gpu"):
            values = yaml.safe_load((REPOSITORY / file).read_text())["presets"][preset]
            assert f"hf download {values['model']}\n" in text
            assert values["train_data"].startswith("data/sft-reason/")
    assert "hf download garg-aayush/sft-cs336-assign5-datasets --repo-type=dataset --local-dir data\n" in text


def test_readme_names_files_that_exist():
    """In docs/, a name may leave out the folder; NAME stands for a name of the user's own."""
    assert "pip install -q uv && uv run pytest" in documentation()["README.md"]
    known = {path.name for path in tracked_files()}
    for page, text in documentation().items():
        assert "@@" not in text
        for name in re.findall(r"`([\w/]+\.(?:py|yaml|prompt|md))`", text):
            is_known = page != "README.md" and (name in known or name.startswith("NAME"))
            assert (REPOSITORY / name).is_file() or is_known, f"{page}: {name}"


def test_each_fault_in_the_readme_has_its_test():
    """The table "What happens when..." names a test in each row, and the test exists."""
    table = documentation()["running.md"].partition("## What happens when...\n")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 27
    tests = "".join(path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py"))
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert names and all(f"def {name}(" in tests for name in names), row
