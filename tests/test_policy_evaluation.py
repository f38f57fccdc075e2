"""Evaluations: graded, measured and written by the real engine; summaries by hand."""

import json
import re
import sys

import pytest
import torch
from test_engine import QUESTIONS, RecordingEngine, changed_policy, sampling
from tiny import REPOSITORY, FakeEvaluator, read_lines, tiny_arguments, write_lines

import policy_evaluation
from plainrl.cli import load_config
from plainrl.config import SFTConfig
from plainrl.data import derive_seed, load_validation_set, validation_subset
from plainrl.engine import load_policy_into_vllm_instance, sample_responses
from plainrl.policy import score_responses
from plainrl.records import Response, UserError
from plainrl.run_folder import RunFolder
from policy_evaluation import Evaluator, choose_scored, evaluate_vllm, log_generations, main, summarize_examples
from SFT_helper import encode_prompt


def test_evaluate_vllm_grades_measures_and_writes(engine, tiny_model_folder, tokenizer, tmp_path):
    policy = changed_policy(tiny_model_folder, 7)
    load_policy_into_vllm_instance(policy, engine)
    path = tmp_path / "samples.jsonl"

    def reward_fn(response, truth):
        assert "Think step by step" not in response  # the response alone is graded, not the prompt
        has_format = float(len(response) % 2)
        return {
            "format_reward": has_format,
            "answer_reward": has_format * float(truth),
            "reward": has_format * float(truth),
        }

    metrics, examples = evaluate_vllm(
        engine, reward_fn, QUESTIONS, sampling(min_tokens=4), ["1", "0"] * 3, policy=policy, output_path=path
    )
    assert [json.loads(line) for line in path.read_text().splitlines()] == examples
    assert set(examples[0]) == {
        "question",
        "sample",
        "prompt",
        "response",
        "ground_truth",
        "format_reward",
        "answer_reward",
        "reward",
        "token_entropy",
        "response_length",
        "finish_reason",
    }
    assert metrics["num_examples"] == 6
    right = sum(example["answer_reward"] for example in examples)
    formatted = sum(example["format_reward"] for example in examples)
    assert metrics["num_format_1_answer_1"] == right
    assert metrics["num_format_1_answer_0"] == formatted - right
    assert metrics["num_format_0"] == 6 - formatted
    assert metrics["truncated_fraction"] == sum(e["finish_reason"] == "length" for e in examples) / 6
    prompt_ids = [encode_prompt(question, tokenizer) for question in QUESTIONS]
    seeds = [derive_seed(0, "evaluation", index) for index in range(6)]
    responses = sample_responses(engine, prompt_ids, sampling(min_tokens=4), seeds)
    assert [response.text for response in responses] == [example["response"] for example in examples]
    all_entropies = torch.cat([score["token_entropy"] for score in score_responses(policy, responses, 0, 6)])
    assert metrics["token_entropy"] == pytest.approx(all_entropies.mean().item(), rel=1e-5)
    assert metrics["num_entropy_responses"] == 6
    with pytest.raises(ValueError, match="6 prompts and 1 ground truths"):
        evaluate_vllm(engine, reward_fn, QUESTIONS, sampling(), ["1"])
    assert not any("_at_" in name for name in metrics)

    # Three samples: the first of each question is the one above, the others differ from it and from each other.
    settings = {"policy": policy, "num_samples": 3, "output_path": path}
    several, samples = evaluate_vllm(engine, reward_fn, QUESTIONS, sampling(min_tokens=4), ["1", "0"] * 3, **settings)
    assert [json.loads(line) for line in path.read_text().splitlines()] == samples
    assert [(row["question"], row["sample"]) for row in samples] == [(i, j) for i in range(6) for j in range(3)]
    assert [{**row, "token_entropy": None} for row in samples[::3]] == [
        {**row, "token_entropy": None} for row in examples
    ]
    assert [row["token_entropy"] for row in samples[::3]] == pytest.approx([row["token_entropy"] for row in examples])
    assert [(row["prompt"], row["ground_truth"]) for row in samples[4::3]] == [
        (row["prompt"], row["ground_truth"]) for row in examples[1:]
    ]
    assert all(len({row["response"] for row in samples[i : i + 3]}) == 3 for i in range(0, 18, 3))
    seeds = [derive_seed(0, "evaluation", index, 2) for index in range(6)]
    responses = sample_responses(engine, prompt_ids, sampling(min_tokens=4), seeds)
    assert [response.text for response in responses] == [row["response"] for row in samples[2::3]]
    assert several["num_examples"] == 6 and several["num_format_0"] == sum(not row["format_reward"] for row in samples)
    rights = [sum(row["answer_reward"] for row in samples[i : i + 3]) for i in range(0, 18, 3)]
    assert several["answer_reward"] == pytest.approx(sum(rights) / 18) == several["pass_at_1"]
    assert several["pass_at_3"] == sum(right > 0 for right in rights) / 6
    assert several["pass_at_1_low"] < several["pass_at_1"] < several["pass_at_1_high"]
    assert several["majority_at_3"] is None  # a function of one's own does not say what the answer is
    assert [row["ground_truth"] for row in examples] == ["1", "0"] * 3
    for row in (*examples, *samples):
        rewards = reward_fn(row["response"], row["ground_truth"])
        assert {name: row[name] for name in rewards} == rewards


def right(response, truth):
    return {"format_reward": 1.0, "answer_reward": 1.0, "reward": 1.0}


def test_entropies_of_a_sample_of_the_responses(engine, tiny_model, tmp_path, monkeypatch):
    """The policy scores the sample alone. The others have null, and the mean is over the sample's tokens."""
    scored = []

    def count(policy, responses, *settings):
        scored.append(len(responses))
        return score_responses(policy, responses, *settings)

    monkeypatch.setattr(policy_evaluation, "score_responses", count)

    def evaluate(**options):
        path = tmp_path / "samples.jsonl"
        metrics, _ = evaluate_vllm(
            engine, right, QUESTIONS, sampling(), ["1"] * 6, policy=tiny_model, output_path=path, **options
        )
        return metrics, read_lines(path)

    whole, every = evaluate()
    metrics, rows = evaluate(num_entropy_responses=2)
    chosen = [index for index, row in enumerate(rows) if row["token_entropy"] is not None]
    assert len(chosen) == metrics["num_entropy_responses"] == 2
    lengths, entropies = ([every[index][key] for index in chosen] for key in ("response_length", "token_entropy"))
    assert [rows[index]["token_entropy"] for index in chosen] == pytest.approx(entropies, rel=1e-5)
    expected = (lengths[0] * entropies[0] + lengths[1] * entropies[1]) / (lengths[0] + lengths[1])
    assert metrics["token_entropy"] == pytest.approx(expected, rel=1e-5)
    own = {"token_entropy", "num_entropy_responses", "sampled_tokens_per_second"}
    assert {key: metrics[key] for key in metrics.keys() - own} == {key: whole[key] for key in whole.keys() - own}
    none, rows = evaluate(num_entropy_responses=0)
    assert (none["token_entropy"], none["num_entropy_responses"]) == (None, 0)
    assert evaluate(num_entropy_responses=7)[0]["token_entropy"] == whole["token_entropy"]
    assert scored == [6, 2, 0, 6]


@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_first_questions_are_shown_before_the_others_are_sampled(num_samples, engine, tiny_model, monkeypatch):
    """In float32 the samples are those of one call: a seed depends on the question's place alone."""
    events = []

    def count(llm, prompt_ids, *settings):
        events.append(len(prompt_ids))
        return sample_responses(llm, prompt_ids, *settings)

    monkeypatch.setattr(policy_evaluation, "sample_responses", count)
    load_policy_into_vllm_instance(tiny_model, engine)
    asked = [f"{question} Again." for question in QUESTIONS] + QUESTIONS
    settings = {"policy": tiny_model, "num_samples": num_samples, "num_entropy_responses": 5}

    def odd(response, truth):  # it depends on both, and after the eighth question the truths are others
        return dict.fromkeys(("format_reward", "answer_reward", "reward"), float(len(response + truth) % 2))

    def evaluate(num_asked, show_first=None):
        truths = ["1" * (1 + index // 8) for index in range(num_asked)]
        arguments = (engine, odd, asked[:num_asked], sampling(), truths)
        metrics, examples = evaluate_vllm(*arguments, show_first=show_first, **settings)
        return {name: metrics[name] for name in metrics if name != "sampled_tokens_per_second"}, examples

    whole = evaluate(12)
    assert evaluate(12, events.append) == whole
    assert events.pop(2) == [{**row, "token_entropy": None} for row in whole[1][: 8 * num_samples]]
    assert events == [12 * num_samples, 8 * num_samples, 4 * num_samples]
    del events[:]
    evaluate(8, events.append)  # all of them are its result
    assert events == [8 * num_samples]


@pytest.mark.parametrize(
    ("num_printed", "steps", "num_first", "num_texts"), [(1, [0, 2], 1, 1), (0, [0], 1, 0), (1, [2], 0, 0)]
)
def test_a_run_prints_its_first_result_before_its_first_step_alone(
    num_printed, steps, num_first, num_texts, engine, tiny_model_folder, tiny_model, tokenizer, tmp_path, capsys
):
    settings = {"num_printed_examples": num_printed, "num_eval_examples": 10, "num_eval_samples": 2}
    settings["extra_validation_data"] = "{more: arithmetic:4}"
    config = load_config(SFTConfig, REPOSITORY / "config.yaml", tiny_arguments(tiny_model_folder, tmp_path, **settings))
    with RunFolder.create(config, "sft") as run:
        evaluator = FakeEvaluator(config, run, tokenizer, validation_subset(load_validation_set(config), config))
        evaluator.llm = engine
        capsys.readouterr()
        for step in steps:
            Evaluator.evaluate(evaluator, tiny_model, eval_step=step)
        Evaluator.evaluate_finally(evaluator, tiny_model, 0, evaluator.examples)
        row = read_lines(evaluator.samples_path(steps[0]))[0]
    printed = capsys.readouterr().out
    scores = "answer reward 0.000, format reward 0.000, response length 16 tokens, truncated 1.00"
    assert printed.count(f"first 8 of 10 questions: {scores}\n") == printed.count("first ") == num_first
    assert printed.count(f"    truth     {row['ground_truth']}\n") == printed.count("    response") == num_texts


def test_the_sample_is_the_same_in_every_evaluation_and_spread_over_the_questions():
    chosen = choose_scored(1024, 256, seed=0)
    assert chosen == choose_scored(1024, 256, seed=0) == sorted(set(chosen)) != choose_scored(1024, 256, seed=1)
    assert len(chosen) == 256
    quarters = [sum(index // 256 == quarter for index in chosen) for quarter in range(4)]
    assert min(quarters) > 40  # 64 are expected in each, with a standard deviation of 6
    assert choose_scored(256, 256, seed=0) == choose_scored(256, "all", seed=0) == list(range(256))


def test_a_run_computes_as_many_entropies_as_it_is_asked_for(
    engine, tiny_model_folder, tiny_model, tokenizer, tmp_path
):
    arguments = tiny_arguments(tiny_model_folder, tmp_path, num_entropy_responses=3)
    config = load_config(SFTConfig, REPOSITORY / "config.yaml", arguments)
    questions = load_validation_set(config)[:8]
    with RunFolder.create(config, "sft") as run:
        evaluator = FakeEvaluator(config, run, tokenizer, questions)
        evaluator.llm = engine
        metrics = Evaluator.evaluate(evaluator, tiny_model, eval_step=0)
    rows = read_lines(evaluator.samples_path(0))
    assert sum(row["token_entropy"] is not None for row in rows) == metrics["num_entropy_responses"] == 3
    assert read_lines(run.path / "metrics.jsonl")[0]["eval/num_entropy_responses"] == 3
    with pytest.raises(UserError, match="num_entropy_responses = -1: must be at least 0, or all"):
        load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=laptop", "num_entropy_responses=-1"])


def example(format_reward, answer_reward, length, entropy=1.0, finish_reason="stop"):
    response = Response([1], "text", [7] * length, [0.0] * length, finish_reason)
    reward = {"format_reward": format_reward, "answer_reward": answer_reward, "reward": answer_reward}
    return log_generations(["p"], [response], ["t"], [reward], [entropy])[0]


def test_summary_by_hand():
    examples = [
        example(1, 1, 10, 0.5),
        example(1, 1, 20, 1.0),
        example(1, 0, 40, 2.0),
        example(0, 0, 30, 0.0, "length"),
    ]
    metrics = summarize_examples(examples)
    assert metrics["reward"] == metrics["answer_reward"] == 0.5
    assert metrics["format_reward"] == 0.75
    assert (
        metrics["num_format_1_answer_1"],
        metrics["num_format_1_answer_0"],
        metrics["num_format_0"],
    ) == (2, 1, 1)
    assert metrics["response_length"] == 25
    assert metrics["response_length_correct"] == 15
    assert metrics["response_length_incorrect"] == 35
    assert metrics["truncated_fraction"] == 0.25
    assert metrics["token_entropy"] == pytest.approx((10 * 0.5 + 20 * 1.0 + 40 * 2.0) / 100)
    assert metrics["num_entropy_responses"] == 4
    unscored = summarize_examples([*examples, example(1, 1, 50, None)])
    assert unscored["token_entropy"] == metrics["token_entropy"] and unscored["num_entropy_responses"] == 4


def test_a_mean_over_nothing_is_none_not_zero():
    metrics = summarize_examples([example(0, 0, 5, None)])
    assert metrics["response_length_correct"] is None
    assert metrics["token_entropy"] is None


def test_empty_responses_have_no_entropy_and_do_not_spoil_the_mean(tmp_path):
    path = tmp_path / "samples.jsonl"
    empty, other = Response([1], "", [], [], "stop"), Response([1], "a", [7, 8], [0.0, 0.0], "stop")
    rewards = [{"format_reward": 0.0, "answer_reward": 0.0, "reward": 0.0}] * 2
    examples = log_generations(["p", "p"], [empty, other], ["t", "t"], rewards, [None, 0.5], path)
    metrics = summarize_examples(examples)
    assert (metrics["token_entropy"], metrics["num_entropy_responses"]) == (0.5, 1)
    assert json.loads(path.read_text().splitlines()[0])["token_entropy"] is None


def test_the_script_shows_pass_at_k_and_samples_at_the_evaluations_temperature(
    engine, answering_model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(policy_evaluation, "init_vllm", lambda *_, **__: engine)
    for name, settings in (
        ("several", {"num_eval_samples": 6, "num_eval_examples": 16}),
        ("greedy", {"eval_sampling_temperature": 0, "validation_fraction": 0.5}),
        ("again", {"eval_sampling_temperature": 0, "validation_fraction": 0.5, "sampling_top_p": 0.5}),
    ):
        main(tiny_arguments(answering_model_folder, tmp_path, run_name=name, **settings))
    several, greedy, _ = re.split(r"(?m)^all examples: .*$", capsys.readouterr().out)[:3]
    metrics = json.loads((tmp_path / "several/metrics.jsonl").read_text())
    rows = read_lines(tmp_path / "several/samples/eval_000000.jsonl")
    assert len(rows) == 96 and metrics["eval/num_examples"] == 16
    assert metrics["eval/pass_at_1"] == pytest.approx(metrics["eval/answer_reward"])
    assert metrics["eval/majority_at_1"] == pytest.approx(metrics["eval/pass_at_1"])
    assert 0 < metrics["eval/pass_at_1"] < metrics["eval/pass_at_2"] < metrics["eval/pass_at_6"] <= 1
    assert re.search(r"^\S+ on 50 % of arithmetic, prompt ", greedy, re.M)  # of which the questions were held out
    assert "6 responses per question:" in several and "pass_at" not in several
    shown = [line.split() for line in several.splitlines() if re.match(r" +\d+ +\d\.\d{3} \(", line)]
    assert [line[0] for line in shown] == ["1", "2", "4", "6"]
    assert [float(line[1]) for line in shown] == pytest.approx(
        [metrics[f"eval/pass_at_{k}"] for k in (1, 2, 4, 6)], abs=5e-4
    )
    members = re.findall(r"=== .*: (\d+) of 96 ===", several)
    assert sum(map(int, members)) == 96
    assert several.count("--- question: ") == sum(min(10, int(number)) for number in members)
    truths = re.findall(r"--- question: What is (.*)\?\n    truth: (\S+) ", several)
    assert truths and all(eval(question) == int(truth) for question, truth in truths)
    assert "responses per question" not in greedy
    one, other = (read_lines(tmp_path / name / "samples/eval_000000.jsonl") for name in ("greedy", "again"))
    assert [row["response"] for row in one] == [row["response"] for row in other]


@pytest.mark.usefixtures("cpu_engine")
def test_a_further_set_alone_is_no_evaluation(tiny_model_folder, tmp_path, monkeypatch):
    """All questions of the validation data itself are too long, and are left out before the engine starts."""
    monkeypatch.delattr(policy_evaluation, "init_vllm")
    for name, question in (("long", "long " * 500), ("short", "What?")):
        write_lines(tmp_path / f"{name}.jsonl", [{"problem": f"{question} {i}", "answer": str(i)} for i in range(4)])
    data = {
        "validation_data": tmp_path / "long.jsonl",
        "extra_validation_data": f"{{short: {tmp_path / 'short.jsonl'}}}",
        "drop_long_examples": "true",
    }
    with pytest.raises(UserError, match=r"^validation data, .*long.jsonl: no question is left; raise max_context_"):
        main(tiny_arguments(tiny_model_folder, tmp_path, run_name="run", **data))


@pytest.mark.parametrize("value", ["auto", "runs/x"])
def test_an_evaluation_is_not_resumed(value, tmp_path):
    with pytest.raises(UserError, match="^resume: an evaluation is not gone on with; start it again$"):
        main(["preset=laptop", f"runs_dir={tmp_path}", f"resume={value}"])


@pytest.mark.usefixtures("cpu_engine")
def test_a_run_name_that_is_taken_offers_no_resume(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    taken = f"run_name = mine: {tmp_path / 'mine'} exists already; give another run_name, or remove it"
    with pytest.raises(UserError, match=f"^{re.escape(taken)}$"):
        main(["preset=laptop", f"runs_dir={tmp_path}", "run_name=mine", "wandb_mode=disabled"])


def test_help_knows_data_by_its_short_name(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help", "data"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("validation_data   (")


def test_the_final_evaluation_stands_at_the_step_where_the_run_ended():
    """A run may end early, by its clock."""
    asked, evaluator = [], Evaluator.__new__(Evaluator)
    evaluator.examples, evaluator._last_step = [], sys.maxsize
    evaluator._evaluate = lambda policy, step, examples, prefix: asked.append((step, prefix)) or {}
    evaluator.evaluate(None, 3)
    evaluator.evaluate_finally(None, 100, [])
    assert asked == [(3, "eval"), (3, "eval_all")]


@pytest.mark.usefixtures("cpu_engine")
def test_the_seed_of_a_run_does_not_reach_its_evaluations(monkeypatch, tokenizer, tmp_path):
    seen = []
    monkeypatch.setattr(policy_evaluation, "evaluate_vllm", lambda *_, **given: seen.append(given["seed"]) or ({}, []))
    for seed in (0, 1):
        evaluator = Evaluator.__new__(Evaluator)
        evaluator.config, evaluator.llm, evaluator.tokenizer = SFTConfig(seed=seed), None, tokenizer
        evaluator._measure(None, [], tmp_path / "x")
    assert seen == [0, 0]


def test_evaluations_ask_for_no_log_probs(tokenizer, monkeypatch):
    """They take the engine's time, and nothing here reads them."""
    asked = []

    def sample(llm, prompt_ids, params, seeds, with_log_probs=True):
        asked.append(with_log_probs)
        return [Response(ids, "", [5], [], "stop") for ids in prompt_ids]

    def reward_fn(response, truth):
        return dict.fromkeys(("format_reward", "answer_reward", "reward"), 0.0)

    monkeypatch.setattr("policy_evaluation.sample_responses", sample)
    evaluate_vllm(None, reward_fn, QUESTIONS, None, ["1"] * 6, tokenizer=tokenizer)
    assert asked == [False]


def test_the_engine_gets_the_runs_settings_and_sleeps_where_it_shares_the_gpu(monkeypatch, tokenizer):
    started = []
    monkeypatch.setattr(policy_evaluation, "init_vllm", lambda _, **given: started.append(given) or RecordingEngine())
    values = {"gpu_memory_utilization": 0.35, "engine_dtype": "bfloat16", "engine_eager": False, "seed": 5}
    values |= {"float32_output_layer": True, "max_context_tokens": 384, "sampling_max_tokens": 16}
    for policy_device, calls in (("cuda:0", ["sleep 2"]), ("cuda:1", [])):
        config = SFTConfig(policy_device=policy_device, evaluator_device="cuda:0", **values)
        assert Evaluator(config, None, tokenizer, []).llm.calls == calls
        assert started.pop() == {
            **{"device": "cuda:0", "seed": 5, "gpu_memory_utilization": 0.35, "dtype": "bfloat16"},
            **{"max_model_len": 384, "cpu_cache_gib": config.engine_cache_gib, "enforce_eager": False},
            **{"float32_output_layer": True, "tensor_parallel_size": 1, "in_own_process": False},
            "enable_sleep_mode": bool(calls),
        }
