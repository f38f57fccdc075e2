"""The engine beside the policy: weights, sleep, sampling, whole runs. Every case needs vLLM.

All share one engine in this process, as in preset one-gpu. The run that is killed has engines of its own.
"""

import json
import math

import pytest
import torch
from kill_and_resume import find_torn, kill, start, steps_of, wait_for
from small_qwen import DEVICE, GPU_CHECK, ON_GPU, TEMPLATE, VARIANTS, load, only_on_gpu, two_gpus, with_adapters
from tiny import grpo_arguments, tiny_arguments, train_rows

import GRPO_train
import SFT_train
from plainrl.engine import (
    check_policy_sync,
    load_policy_into_vllm_instance,
    sample_responses,
    sleep_vllm_instance,
)
from plainrl.lora import adapted_layers
from plainrl.precision import refresh_working_copy

pytestmark = [*GPU_CHECK, pytest.mark.engine]
GIB = 2**30
PROBES = [[*TEMPLATE, 200 + index] for index in range(8)]
NUM_PROBE_TOKENS, NUM_SAMPLES, NUM_CELLS = (64, 2048, 32) if ON_GPU else (16, 512, 32)


def sync_error(policy, engine):
    return check_policy_sync(policy, engine, PROBES, 0, NUM_PROBE_TOKENS, 1e9)["sync_multiplicative_error"]


def disturb(policy, seed):
    """Change every tensor of the policy by random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(noise * 0.3 * max(float(parameter.std()), 0.01))
    refresh_working_copy(policy)


def test_each_sync_makes_the_engine_the_policy_also_after_sleep(gpu_engine, policy, record_property):
    """Every tensor arrives: biases, fused projections, the tied output layer. CUDA graphs see the new weights."""
    errors = []
    for cycle in range(3 if ON_GPU else 2):
        disturb(policy, cycle)
        if ON_GPU and cycle:
            sleep_vllm_instance(gpu_engine)
        else:
            assert sync_error(policy, gpu_engine) > 1.1  # the check tells another policy
        load_policy_into_vllm_instance(policy, gpu_engine)
        errors.append(sync_error(policy, gpu_engine))
    record_property("sync_errors", errors)
    assert max(errors) < 1.02


def test_the_engine_gets_the_merged_weights(gpu_engine, qwen_folder):
    """Also after sleep. Without B, the policy is another one than the engine's."""
    policy = with_adapters(load(qwen_folder, "cpu"), "bfloat16")
    for is_asleep in (False, True) if ON_GPU else (False,):
        if is_asleep:
            sleep_vllm_instance(gpu_engine)
        load_policy_into_vllm_instance(policy, gpu_engine)
        assert sync_error(policy, gpu_engine) < 1.02
    for layer in adapted_layers(policy).values():
        layer.lora_b.data.zero_()
    assert sync_error(policy, gpu_engine) > 1.03


@only_on_gpu
def test_sleep_frees_the_engines_memory_and_nothing_leaks(gpu_engine, policy):
    """While the engine sleeps, the policy can have its memory. After four cycles as much is free as after one."""
    load_policy_into_vllm_instance(policy, gpu_engine)
    free = []
    for _ in range(4):
        torch.cuda.empty_cache()
        awake = torch.cuda.mem_get_info(DEVICE)[0]
        sleep_vllm_instance(gpu_engine)
        asleep, total = torch.cuda.mem_get_info(DEVICE)
        assert asleep - awake > 0.1 * total  # of the 0.2 that the engine was given
        taken = torch.empty(int(0.9 * (asleep - awake)), dtype=torch.uint8, device=DEVICE)
        del taken
        load_policy_into_vllm_instance(policy, gpu_engine)
        free.append(torch.cuda.mem_get_info(DEVICE)[0])
    assert max(free) - min(free) < 0.1 * GIB


def test_samples_follow_the_policys_distribution(gpu_engine, policy, record_property):
    """A chi-squared test of first tokens against the policy's probabilities. Each sample has a seed of its own.

    A cell holds sixteen tokens, those of similar probability. The same samples must fail the test of equal
    probabilities, which shows that it can fail.
    """
    from vllm import SamplingParams

    load_policy_into_vllm_instance(policy, gpu_engine)
    params = SamplingParams(temperature=1.0, max_tokens=1, ignore_eos=True)
    responses = sample_responses(gpu_engine, [PROBES[0]] * NUM_SAMPLES, params, range(NUM_SAMPLES))
    with torch.inference_mode():
        logits = policy(torch.tensor([PROBES[0]], device=DEVICE)).logits[0, -1].double().cpu()
    order = logits.argsort()
    tokens = torch.tensor([row.token_ids[0] for row in responses])
    observed = torch.bincount(tokens, minlength=512)[order].view(NUM_CELLS, -1).sum(-1)

    def statistic(probabilities):
        expected = NUM_SAMPLES * probabilities[order].view(NUM_CELLS, -1).sum(-1)
        return float(((observed - expected).square() / expected).sum())

    freedom = NUM_CELLS - 1
    of_policy, of_equal = statistic(logits.softmax(-1)), statistic(torch.full_like(logits, 1 / 512))
    record_property("chi_squared", [of_policy, of_equal, freedom])
    assert of_policy < freedom + 5 * math.sqrt(2 * freedom) < of_equal


def test_seeds_shortest_length_and_stop_string_hold(gpu_engine, policy, tokenizer):
    """On a GPU, vLLM has another model runner and sampler than on the CPU. Batches differ, so few samples may, too."""
    from vllm import SamplingParams

    load_policy_into_vllm_instance(policy, gpu_engine)
    params = SamplingParams(temperature=1.0, min_tokens=4, max_tokens=48, stop=["e"], include_stop_str_in_output=True)
    prompts = [[*TEMPLATE, 200 + index % 50] for index in range(64)]
    responses = sample_responses(gpu_engine, prompts, params, range(64))
    again = sample_responses(gpu_engine, prompts, params, range(64))
    assert sum(one.token_ids == other.token_ids for one, other in zip(responses, again, strict=True)) >= 56
    assert len({tuple(row.token_ids) for row in responses}) > 56
    for row in responses:
        assert 0 not in row.token_ids[:4] and len(row.log_probs) == len(row.token_ids)
        if row.finish_reason == "stop" and row.token_ids[-1] != 0:  # by the string, which stays
            assert len(row.token_ids) > 4 and row.text.endswith("e")
            assert "e" in tokenizer.decode(row.token_ids[-1:])
        else:
            assert row.token_ids[-1] == 0 or len(row.token_ids) == 48


# --- whole runs -------------------------------------------------------------------------------------------------------


def settings_of_run(policy_device, folder):
    """Settings of a run with the policy on one device, and the engine on the device of the check."""
    rewards = folder / "rewards.py"
    rewards.write_text(  # a random model is never right, so another reward must vary
        "def odd_length(response, ground_truth):\n"
        "    return {'reward': len(response) % 2, 'format_reward': 0.0, 'answer_reward': 0.0}\n"
    )
    return {
        "policy_device": policy_device,
        "evaluator_device": DEVICE,
        "compute_dtype": "bfloat16",
        "engine_dtype": "bfloat16",
        "gpu_memory_utilization": 0.2,
        "max_sync_error": 1.05,
        "max_context_tokens": 384,
        "reward": f"{rewards}:odd_length",
    }


@pytest.fixture
def in_this_process(gpu_engine, monkeypatch):
    """Runs take the engine that is there."""
    monkeypatch.setattr("policy_evaluation.init_vllm", lambda *_, **__: gpu_engine)


def check_grpo_steps(folder):
    """The rollouts were sampled from the policy in each of two steps, which follow each other."""
    gaps = [row["rollout/log_prob_gap_multiplicative"] for row in train_rows(folder)]
    assert len(gaps) == 2 and all(1 < gap < 1.05 for gap in gaps)
    assert steps_of(folder) == [1, 2]


@pytest.mark.parametrize("policy_device", [DEVICE, pytest.param("cuda:1", marks=two_gpus)])
def test_a_grpo_run(in_this_process, qwen_folder, tmp_path, policy_device):
    """Steps, evaluations, a checkpoint. The engine sleeps and wakes in between. The rollouts check each sync."""
    settings = settings_of_run(policy_device, tmp_path)
    GRPO_train.main(grpo_arguments(qwen_folder, tmp_path, run_name="run", **settings))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum("eval/reward" in row for row in rows) == 3
    check_grpo_steps(tmp_path / "run")


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_an_sft_run(in_this_process, qwen_folder, tmp_path, variant):
    settings = settings_of_run(DEVICE, tmp_path) | {"num_sft_examples": 8, "max_steps": 2} | variant
    SFT_train.main(tiny_arguments(qwen_folder, tmp_path, run_name="run", **settings))
    losses = [row["train/loss"] for row in train_rows(tmp_path / "run")]
    assert len(losses) == 2 and losses[1] < losses[0]


@pytest.mark.skipif(not ON_GPU, reason="tests/test_resume.py does this on a CPU, bit for bit")
def test_a_grpo_run_of_the_script_that_was_killed_goes_on(needs_engine, qwen_folder, tmp_path):
    """SIGKILL as soon as the first checkpoint is there, beside an engine of its own. What it held is free again."""
    settings = settings_of_run(DEVICE, tmp_path) | {"checkpoint_interval": 1, "run_name": "run", "resume": "auto"}
    arguments = grpo_arguments(qwen_folder, tmp_path, **settings)
    folder, log = tmp_path / "run", tmp_path / "log"
    killed = start("GRPO_train.py", arguments, log)
    wait_for(lambda: (folder / "checkpoints/step_000001").is_dir(), killed)
    kill(killed)
    assert killed.returncode == -9 and find_torn(folder) == []
    first = train_rows(folder)[0]
    assert start("GRPO_train.py", arguments, log).wait(timeout=300) == 0, log.read_text()[-3000:]
    check_grpo_steps(folder)
    assert train_rows(folder)[0] == first
