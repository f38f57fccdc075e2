"""The real vLLM engine on the CPU: same log-probabilities as Transformers, synced weights, honest metrics."""

import json
import re
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import policy_evaluation
from policy_evaluation import (
    Response,
    SyncError,
    check_policy_sync,
    evaluate_vllm,
    init_vllm,
    load_policy_into_vllm_instance,
    log_generations,
    resolve_model,
    sample_responses,
    score_responses,
    summarize_examples,
)
from run_config import RunConfig, UserError
from SFT_helper import encode_prompt

QUESTIONS = [f"User: What is {i} + {i * i}? Think step by step, please, and then give the answer." for i in range(1, 7)]


@pytest.fixture
def prompt_ids(tokenizer):
    ids = [encode_prompt(question, tokenizer) for question in QUESTIONS]
    assert min(map(len, ids)) > 33  # longer than a cache block, so that a stale prefix cache can show
    return ids


def sampling(**options):
    from vllm import SamplingParams

    return SamplingParams(**({"temperature": 1.0, "max_tokens": 24} | options))


def changed_policy(folder, seed):
    """The tiny model with other weights in every tensor, the tied output layer included."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
    return policy


def check(policy, engine, prompt_ids):
    return check_policy_sync(policy, engine, prompt_ids, padding_id=0, num_tokens=16, max_error=1.0001)


def test_synced_engine_gives_the_log_probs_of_transformers(engine, tiny_model_folder, prompt_ids):
    policy = changed_policy(tiny_model_folder, seed=1)
    load_policy_into_vllm_instance(policy, engine)
    responses = sample_responses(engine, prompt_ids, sampling(), seeds=range(6))
    scores = score_responses(policy, responses, padding_id=0, batch_size=4)
    for response, score in zip(responses, scores, strict=True):
        assert len(response.token_ids) == len(response.log_probs) > 0
        torch.testing.assert_close(torch.tensor(response.log_probs), score["log_probs"], atol=1e-4, rtol=0)


def test_sync_check_passes_after_each_of_several_syncs(engine, tiny_model_folder, prompt_ids):
    for seed in (2, 3):
        policy = changed_policy(tiny_model_folder, seed)
        load_policy_into_vllm_instance(policy, engine)
        assert check(policy, engine, prompt_ids)["sync_multiplicative_error"] < 1.0001


def test_sync_check_fails_without_the_sync(engine, tiny_model_folder, prompt_ids):
    load_policy_into_vllm_instance(changed_policy(tiny_model_folder, 2), engine)
    with pytest.raises(SyncError, match="max_sync_error = 1.0001"):
        check(changed_policy(tiny_model_folder, 4), engine, prompt_ids)


def test_sync_check_fails_with_named_parameters(engine, tiny_model_folder, prompt_ids, monkeypatch):
    load_policy_into_vllm_instance(changed_policy(tiny_model_folder, 2), engine)
    policy = changed_policy(tiny_model_folder, 5)
    monkeypatch.setattr(policy, "state_dict", lambda: dict(policy.named_parameters()))
    load_policy_into_vllm_instance(policy, engine)
    with pytest.raises(SyncError, match="tied output layer"):
        check(policy, engine, prompt_ids)


def test_sync_check_fails_without_resetting_the_prefix_cache(engine, tiny_model_folder, prompt_ids, monkeypatch):
    before = changed_policy(tiny_model_folder, 2)
    load_policy_into_vllm_instance(before, engine)
    check(before, engine, prompt_ids)  # leaves the probe prompts in the cache
    policy = changed_policy(tiny_model_folder, 6)
    monkeypatch.setattr(engine, "reset_prefix_cache", lambda: True)
    load_policy_into_vllm_instance(policy, engine)
    with pytest.raises(SyncError, match="prefix cache that was not reset"):
        check(policy, engine, prompt_ids)
    monkeypatch.undo()
    load_policy_into_vllm_instance(policy, engine)
    check(policy, engine, prompt_ids)


def test_sync_check_fails_on_weights_that_are_not_numbers(engine, tiny_model_folder, prompt_ids):
    policy = changed_policy(tiny_model_folder, 2)
    load_policy_into_vllm_instance(policy, engine)
    with torch.no_grad():
        policy.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(SyncError):
        check(policy, engine, prompt_ids)


def test_sampling_follows_the_seeds_whatever_else_is_in_the_batch(engine, prompt_ids):
    together = sample_responses(engine, prompt_ids, sampling(), seeds=range(6))
    reversed_order = sample_responses(engine, prompt_ids[::-1], sampling(), seeds=range(6)[::-1])[::-1]
    alone = [sample_responses(engine, [ids], sampling(), seeds=[seed])[0] for seed, ids in enumerate(prompt_ids)]
    tokens = [response.token_ids for response in together]
    assert tokens == [response.token_ids for response in reversed_order] == [response.token_ids for response in alone]
    other = sample_responses(engine, prompt_ids, sampling(), seeds=range(6, 12))
    assert tokens != [response.token_ids for response in other]


def test_more_prompts_than_one_prefill_takes(engine, tokenizer):
    """A prefill in pieces kills seeded requests on the CPU in vLLM 0.32; 60 long prompts would need one."""
    ids = [encode_prompt(f"{i} " + "What is it? " * 60, tokenizer) for i in range(60)]
    assert sum(map(len, ids)) > 8192
    responses = sample_responses(engine, ids, sampling(max_tokens=4), seeds=range(60))
    assert len(responses) == 60
    assert all(1 <= len(response.token_ids) <= 4 for response in responses)


def test_scores_do_not_depend_on_batching(tiny_model):
    responses = [Response([5] * (3 + i), "", list(range(10, 12 + 2 * i)), [], "stop") for i in range(5)]
    together = score_responses(tiny_model, responses, padding_id=0, batch_size=5)
    apart = score_responses(tiny_model, responses, padding_id=0, batch_size=1)
    for a, b, response in zip(together, apart, responses, strict=True):
        assert a["log_probs"].shape == a["token_entropy"].shape == (len(response.token_ids),)
        torch.testing.assert_close(a["log_probs"], b["log_probs"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a["token_entropy"], b["token_entropy"], atol=1e-5, rtol=1e-5)


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
    seeds = [policy_evaluation.derive_seed(0, "evaluation", index) for index in range(6)]
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


def test_scoring_leaves_the_policy_in_its_mode(tiny_model):
    tiny_model.train()
    score_responses(tiny_model, [Response([5], "", [6, 7], [], "stop")], padding_id=0, batch_size=1)
    assert tiny_model.training


def test_unknown_model_says_how_to_download(tmp_path):
    with pytest.raises(UserError, match=re.escape("run `hf download Qwen/Nothing-0B`")):
        resolve_model("Qwen/Nothing-0B")
    with pytest.raises(UserError, match="no config.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="neither a folder nor a downloaded hub model"):
        resolve_model("no such folder/at/all")


def test_incomplete_model_folders_are_refused(tiny_model_folder, tmp_path):
    for missing in ("model.safetensors", "tokenizer.json"):
        folder = tmp_path / missing
        shutil.copytree(tiny_model_folder, folder)
        (folder / missing).unlink()
        with pytest.raises(UserError, match="it needs config, weights and tokenizer"):
            policy_evaluation.load_policy(RunConfig(model=str(folder), max_context_tokens=256, sampling_max_tokens=8))


def test_a_model_that_changes_its_logits_is_refused(tiny_model_folder, tmp_path):
    folder = tmp_path / "scaled"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logits_scaling": 8.0}))
    with pytest.raises(UserError, match=r"it changes its logits \(logits_scaling\)"):
        policy_evaluation.load_policy(RunConfig(model=str(folder), max_context_tokens=256, sampling_max_tokens=8))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file/reasoning-from-scratch/.* set XDG_CACHE_HOME to a folder with room"):
        policy_evaluation.resolve_model("smollm2-135m")


def test_settings_that_vllm_refuses_end_in_one_line(tiny_model_folder):
    with pytest.raises(UserError, match=r"vLLM did not start on cpu .*look at gpu_memory_utilization"):
        init_vllm(tiny_model_folder, "cpu", seed=0, dtype="float32", max_model_len=100_000)


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="policy_device = cuda:0: 0 CUDA devices are visible"):
        policy_evaluation.check_devices(RunConfig(policy_device="cuda:0"))
    with pytest.raises(UserError, match="uv sync --no-group cpu --group gpu"):
        init_vllm("model", "cuda:0", seed=0)
    with pytest.raises(UserError, match="order the GPUs with CUDA_VISIBLE_DEVICES"):
        init_vllm("model", "cuda:1", seed=0)
    monkeypatch.setattr(policy_evaluation, "_is_installed", lambda name: False)
    with pytest.raises(UserError, match="no CUDA device is visible"):
        init_vllm("model", "cuda:0", seed=0)
    with pytest.raises(UserError, match="needs the CPU build of vLLM"):
        init_vllm("model", "cpu", seed=0)


def test_a_driver_too_old_for_torch_is_named(monkeypatch):
    """The driver counts the GPUs all the same."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for devices in ({"policy_device": "cuda:0"}, {"evaluator_device": "cuda:0"}):
        with pytest.raises(UserError, match="a GPU is there, but does not run CUDA .* newer NVIDIA driver"):
            policy_evaluation.check_devices(RunConfig(**devices))


def test_compiling_for_the_cpu_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    policy_evaluation.check_devices(RunConfig())
    with pytest.raises(UserError, match=r"^compile_policy = true: needs g\+\+ and Python's headers on the CPU"):
        policy_evaluation.check_devices(RunConfig(compile_policy=True))
    with pytest.raises(UserError, match=r"^compile_policy = true and engine_eager = false: needs g\+\+"):
        policy_evaluation.check_devices(RunConfig(compile_policy=True, engine_eager=False))
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    policy_evaluation.check_devices(RunConfig(compile_policy=True))


def test_context_longer_than_the_models_is_refused(tiny_model_folder):
    with pytest.raises(UserError, match="max_context_tokens = 2048: .* has a context of 512 tokens"):
        policy_evaluation.load_policy(RunConfig(model=tiny_model_folder))


def test_attention_choice(monkeypatch):
    on_gpu = RunConfig(policy_device="cuda:0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert policy_evaluation.choose_attention(on_gpu) == "sdpa"
    with pytest.raises(UserError, match="flash_attention_2 needs the package flash-attn"):
        policy_evaluation.choose_attention(on_gpu.model_copy(update={"attn_implementation": "flash_attention_2"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert policy_evaluation.choose_attention(on_gpu) == "flash_attention_2"
    assert policy_evaluation.choose_attention(RunConfig(policy_device="cuda:0", compute_dtype="float32")) == "sdpa"
    assert policy_evaluation.choose_attention(RunConfig()) == "sdpa"
    needs = "needs a CUDA policy_device and compute_dtype = bfloat16 or float16; or use auto"
    with pytest.raises(UserError, match=needs):
        policy_evaluation.choose_attention(RunConfig(attn_implementation="flash_attention_2", compute_dtype="float32"))
    assert policy_evaluation.choose_attention(RunConfig(attn_implementation="eager")) == "eager"


class RecordingEngine:
    """Stands in for a sleeping GPU engine, to hold the order of calls that its sleep mode needs."""

    def __init__(self):
        self.calls = []
        self.is_asleep = False
        self.gives_up_its_cache = True
        self.llm_engine = self
        self.vllm_config = self.model_config = self
        self.dtype = torch.bfloat16

    def is_sleeping(self):
        return self.is_asleep

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.is_asleep = True

    def wake_up(self, tags):
        self.calls.append(f"wake {tags[0]}")

    def collective_rpc(self, method, kwargs):
        weights = dict(kwargs["weights_iterator"])
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        assert "lm_head.weight" in weights
        self.calls.append(method)

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return self.gives_up_its_cache


def test_a_sleeping_engine_is_woken_in_the_right_order(tiny_model):
    engine = RecordingEngine()
    load_policy_into_vllm_instance(tiny_model, engine)
    policy_evaluation.sleep_vllm_instance(engine)
    load_policy_into_vllm_instance(tiny_model, engine)
    woken = ["wake weights", "reload_weights", "wake kv_cache", "reset_prefix_cache"]
    assert engine.calls == ["reload_weights", "reset_prefix_cache", "sleep 2", *woken]


def test_a_prefix_cache_that_stays_is_an_error(tiny_model):
    engine = RecordingEngine()
    engine.gives_up_its_cache = False
    with pytest.raises(SyncError, match="did not give up its prefix cache"):
        load_policy_into_vllm_instance(tiny_model, engine)
