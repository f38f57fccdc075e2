"""Evaluations: graded, measured and written by the real engine; summaries by hand."""

import json
import re

import pytest
import torch
from test_engine import QUESTIONS, changed_policy, sampling

from plainrl.data import derive_seed
from plainrl.engine import load_policy_into_vllm_instance, sample_responses
from plainrl.policy import score_responses
from plainrl.records import Response, UserError
from policy_evaluation import evaluate_vllm, log_generations, main, summarize_examples
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
    with pytest.raises(ValueError, match="6 prompts and 1 ground truths"):
        evaluate_vllm(engine, reward_fn, QUESTIONS, sampling(), ["1"])


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


def test_a_mean_over_nothing_is_none_not_zero():
    metrics = summarize_examples([example(0, 0, 5, None)])
    assert metrics["response_length_correct"] is None
    assert metrics["token_entropy"] is None


def test_empty_responses_have_no_entropy_and_do_not_spoil_the_mean(tmp_path):
    path = tmp_path / "samples.jsonl"
    empty, other = Response([1], "", [], [], "stop"), Response([1], "a", [7, 8], [0.0, 0.0], "stop")
    rewards = [{"format_reward": 0.0, "answer_reward": 0.0, "reward": 0.0}] * 2
    examples = log_generations(["p", "p"], [empty, other], ["t", "t"], rewards, [None, 0.5], path)
    assert summarize_examples(examples)["token_entropy"] == 0.5
    assert json.loads(path.read_text().splitlines()[0])["token_entropy"] is None


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
