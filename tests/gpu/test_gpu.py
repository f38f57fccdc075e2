"""The GPU check: what only a GPU can show. `uv run --no-sync pytest -m gpu` takes minutes and downloads nothing.

The model is a random Qwen2 of four layers. It has what Qwen2.5-Math-1.5B has: heads of 128, grouped heads, biases, a
tied output layer. The engine is that of preset one-gpu: compiled, with CUDA graphs, and it can sleep. With two GPUs the
policy also trains on the second, as in preset two-gpu.

Without vLLM, the cases of the engine and of whole runs are skipped. GPU_CHECK_DEVICE=cpu runs all that needs no GPU.
GPU_CHECK_JSONL=file writes a line for each case, with the errors that it measured.
"""

import json
import math
import os
from functools import partial

import pytest
import torch
from tiny import grpo_arguments, run_script, tiny_arguments

import GRPO_train
import SFT_train
from GRPO_helper import grpo_microbatch_train_step
from plainrl.checkpoint import load_optimizer_tensors, optimizer_tensors
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.devices import can_compile, check_engine_device, has_module
from plainrl.engine import (
    check_policy_sync,
    init_vllm,
    load_policy_into_vllm_instance,
    sample_responses,
    sleep_vllm_instance,
)
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.lora import adapted_layers, add_adapters, merged_state_dict
from plainrl.policy import autocast, compile_blocks, compute_clipped_gradient, prepare_training, score_responses
from plainrl.prefix_tree import share_prefixes
from plainrl.records import Response, Rollout, TokenizedExample, UserError
from SFT_helper import get_response_log_probs, join_prompt_and_response_ids

DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda:0")
ON_GPU = DEVICE != "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device")]
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
GIB = 2**30
TEMPLATE = list(range(100, 160))
PROBES = [[*TEMPLATE, 200 + index] for index in range(8)]


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory, tiny_model_folder):
    """A random Qwen2, with the tokenizer of the tiny model."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "qwen"
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.02,  # rounding to bfloat16 then gives sync errors of 1.004, another policy 1.4
        sliding_window=2048,
        use_sliding_window=False,  # as in Qwen2.5-Math's own configuration
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def load(folder, device=DEVICE, dtype=torch.float32, sharing=True, attention="sdpa"):
    """The model on a device. It computes shared prefixes once, unless told otherwise."""
    from transformers import AutoModelForCausalLM

    if device != "cpu":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as load_policy does
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(device).eval()
    assert not sharing or share_prefixes(model)
    return model


@pytest.fixture
def policy(qwen_folder):
    return load(qwen_folder)


def make_rows():
    """Two groups and a row alone. A response occurs twice. Some lengths are 64 more than a multiple of 128."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count):
        return torch.randint(5, 500, (count,), generator=generator).tolist()

    first, second = [*TEMPLATE, *tokens(40)], [*TEMPLATE, *tokens(7)]
    same = tokens(30)
    prompts = [first, first, first, second, second, TEMPLATE[:50]]
    return prompts, [tokens(92), same, same, tokens(125), tokens(1), tokens(270)]


def make_batch():
    return join_prompt_and_response_ids(*make_rows(), padding_id=0)


def take_rows(batch, rows):
    """Some rows of a batch, without needless padding, on the device."""
    width = int(batch["response_mask"][rows].nonzero()[:, 1].max()) + 1
    return {name: tensor[rows, :width].to(DEVICE) for name, tensor in batch.items()}


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.fixture(scope="session")
def reference(qwen_folder):
    """Scores and gradients in float64 on the CPU, row by row."""
    batch = make_batch()
    plain = load(qwen_folder, "cpu", torch.float64, sharing=False)
    expected = get_response_log_probs(plain, batch["input_ids"], batch["labels"])["log_probs"]
    expected = expected.masked_fill(~batch["response_mask"], 0)
    weights = torch.linspace(-1, 1, len(expected))[:, None]
    (expected * weights).sum().backward()
    return expected.detach(), [parameter.grad for parameter in plain.parameters()], weights


# --- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4, 5]], [[5], [3, 4], [0, 1, 2]]], ids=["one tree", "three"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_scores_and_gradients_are_those_of_float64(
    qwen_folder, reference, attention, parts, dtype, checkpointing, record_property
):
    """The attention that a GPU takes for prefix trees, in each dtype. Among the trees is one without a trunk."""
    if attention == "flash_attention_2" and (dtype == "float32" or not ON_GPU or not has_module("flash_attn")):
        pytest.skip("needs flash-attn, a GPU and 16 bits")
    batch, (expected, gradients, weights) = make_batch(), reference
    policy = load(qwen_folder, attention=attention)
    if checkpointing:
        policy.gradient_checkpointing_enable()
    policy.train()
    found = torch.zeros_like(expected)
    for part in parts:
        piece = take_rows(batch, part)
        with autocast(policy, dtype):
            scores = get_masked_response_log_probs(policy, **piece)["log_probs"]
        (scores * weights[part].to(DEVICE)).sum().backward()
        found[part, : scores.shape[1]] = scores.detach().double().cpu()
    found_gradients = [parameter.grad.double().cpu() for parameter in policy.parameters()]
    difference = norm(ours - theirs for ours, theirs in zip(found_gradients, gradients, strict=True))
    record_property("score_error_max", float((found - expected).abs().max()))
    record_property("score_error_mean", float((found - expected).abs().sum() / batch["response_mask"].sum()))
    record_property("gradient_error", difference / norm(gradients))
    score_limit, gradient_limit = (2e-4, 2e-4) if dtype == "float32" else (0.15, 0.05)
    assert (found - expected).abs().max() < score_limit
    assert difference < gradient_limit * norm(gradients)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found_gradients)


@only_on_gpu
def test_a_microbatch_leaves_no_memory_behind(policy):
    """Ten times the same microbatch has the same peak each time. Only the gradients stay."""
    policy.train()
    batch = take_rows(make_batch(), list(range(6)))
    peaks, kept = [], []
    for _ in range(10):
        torch.cuda.reset_peak_memory_stats(DEVICE)
        with autocast(policy, "bfloat16"):
            scores = get_masked_response_log_probs(policy, **batch, return_token_entropy=True)
        advantages = torch.ones(6, 1, device=DEVICE)
        grpo_microbatch_train_step(
            scores["log_probs"], batch["response_mask"], 1, "reinforce_with_baseline", advantages=advantages
        )
        del scores
        kept.append(torch.cuda.memory_allocated(DEVICE))
        peaks.append(torch.cuda.max_memory_allocated(DEVICE))
    assert len(set(kept[1:])) == 1 and len(set(peaks[1:])) == 1, (kept, peaks)


def test_a_resumed_optimizer_takes_the_same_step(qwen_folder, tmp_path):
    """Fused AdamW keeps its step count on the GPU. Saved and loaded, it takes the same step bit for bit."""
    from safetensors.torch import load_file, save_file

    def policy_and_optimizer():
        policy = load(qwen_folder)
        return policy, prepare_training(policy, SFTConfig(policy_device=DEVICE, learning_rate=1e-3))

    def step(policy, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(DEVICE)
        optimizer.step()

    first, optimizer = policy_and_optimizer()
    step(first, optimizer, 1)
    save_file(optimizer_tensors(first, optimizer), tmp_path / "optimizer.safetensors")
    second, resumed = policy_and_optimizer()
    second.load_state_dict(first.state_dict())
    load_optimizer_tensors(load_file(tmp_path / "optimizer.safetensors"), second, resumed)
    step(first, optimizer, 2)
    step(second, resumed, 2)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def make_rollouts(policy, with_old_log_probs):
    """Rollouts whose log-probs are the policy's own, as those of an engine in step with it. One has no advantage."""
    responses = [
        Response(prompt, "", answer, [0.0] * len(answer), "stop") for prompt, answer in zip(*make_rows(), strict=True)
    ]
    scores = score_responses(policy, responses, 0, 4, "bfloat16")
    rollouts = []
    for index, (response, score) in enumerate(zip(responses, scores, strict=True)):
        response = response._replace(log_probs=score["log_probs"].tolist())
        old = score["log_probs"] if with_old_log_probs else None
        rollouts.append(Rollout(None, response, {"reward": float(index % 2)}, 1.0 - 2 * (index % 2), None, old))
    rollouts[2].advantage = 0.0
    return rollouts


@pytest.mark.parametrize("loss_type", ["reinforce_with_baseline", "grpo_clip"])
def test_a_grpo_update_moves_the_policy_and_checks_the_sync(policy, loss_type, record_property):
    """update_policy, called as a run calls it. Its log-probs differ from those of the rollouts by rounding only."""
    is_off_policy = loss_type == "grpo_clip"
    config = GRPOConfig(
        policy_device=DEVICE,
        compute_dtype="bfloat16",
        loss_type=loss_type,
        rollout_batch_size=6,
        group_size=3,
        train_batch_size=6,
        epochs_per_rollout_batch=2 if is_off_policy else 1,
        gradient_accumulation_steps=1,
        microbatch_tokens=256,
        learning_rate=1e-4,
        max_sync_error=1.05,
        sampling_min_tokens=0,
    )
    optimizer = prepare_training(policy, config)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    rows = GRPO_train.update_policy(policy, optimizer, make_rollouts(policy, is_off_policy), 0, 1, config)
    record_property("metrics", rows)
    assert len(rows) == 1 + is_off_policy
    assert rows[0]["rollout/log_prob_gap_multiplicative"] < 1.05
    for row in rows:
        assert math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0 and row["train/num_trained_rows"] == 5
    if is_off_policy:
        assert abs(rows[0]["train/ratio_mean"] - 1) < 0.02 and rows[1]["train/ratio_max"] > 1
    assert any(not torch.equal(one, other) for one, other in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sft_steps_lower_the_loss(policy, dtype, record_property):
    """Four steps on the same batch, with checkpointing. In float16 the loss is scaled."""
    config = SFTConfig(
        policy_device=DEVICE,
        compute_dtype=dtype,
        train_batch_size=6,
        gradient_accumulation_steps=1,
        microbatch_tokens=256,
        learning_rate=1e-3,
        loss_scale=256.0,
        gradient_checkpointing=True,
        normalize_constant=100.0,
    )
    optimizer = prepare_training(policy, config)
    batch = [TokenizedExample(None, prompt, answer) for prompt, answer in zip(*make_rows(), strict=True)]
    losses = []
    for _ in range(4):
        accumulate = partial(SFT_train.accumulate_gradients, policy, batch, 0, config)
        metrics, grad_norm, _ = compute_clipped_gradient(policy, accumulate, config)
        assert math.isfinite(grad_norm)
        losses.append(metrics["train/loss_per_token"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    record_property("losses", losses)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1


def with_adapters(policy, dtype):
    """The policy with adapters that are no longer zero, on its device, as preset small-gpu trains it."""
    add_adapters(policy, SFTConfig(lora_rank=8, lora_alpha=16.0, compute_dtype=dtype))
    generator = torch.Generator().manual_seed(3)
    for layer in adapted_layers(policy).values():
        layer.lora_b.data = 0.02 * torch.randn(layer.lora_b.shape, generator=generator)
    return policy.to(DEVICE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adapters_have_the_scores_and_gradients_of_the_merged_model(qwen_folder, dtype, record_property):
    """In float64 row by row: W' = W + 2 B A in the plain model, and dA = 2 B^T dW', dB = 2 dW' A^T."""
    policy = with_adapters(load(qwen_folder, "cpu"), dtype)
    policy.gradient_checkpointing_enable()
    policy.train()
    batch = make_batch()
    with autocast(policy, dtype):
        found = get_masked_response_log_probs(policy, **take_rows(batch, list(range(6))))["log_probs"]
    found.sum().backward()
    plain = load(qwen_folder, "cpu", torch.float64, sharing=False)
    plain.load_state_dict({name: tensor.cpu() for name, tensor in merged_state_dict(policy)})
    expected = get_response_log_probs(plain, batch["input_ids"], batch["labels"])["log_probs"]
    expected = expected.masked_fill(~batch["response_mask"], 0)
    expected.sum().backward()
    of_weights = {name.removesuffix(".weight"): part.grad for name, part in plain.named_parameters()}
    found_gradients, gradients = [], []
    for name, layer in adapted_layers(policy).items():
        a, b = layer.lora_a.detach().double().cpu(), layer.lora_b.detach().double().cpu()
        gradients += [2 * b.T @ of_weights[name], 2 * of_weights[name] @ a.T]
        found_gradients += [layer.lora_a.grad.double().cpu(), layer.lora_b.grad.double().cpu()]
    scores = found.detach().double().cpu()
    difference = norm(one - other for one, other in zip(found_gradients, gradients, strict=True))
    record_property("score_error_max", float((scores - expected).abs().max()))
    record_property("gradient_error", difference / norm(gradients))
    score_limit, gradient_limit = (2e-4, 2e-4) if dtype == "float32" else (0.15, 0.05)
    assert (scores - expected).abs().max() < score_limit and difference < gradient_limit * norm(gradients)


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def needs_engine():
    try:
        check_engine_device(DEVICE)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def gpu_engine(needs_engine, qwen_folder):
    """The engine as in preset one-gpu. A process can have one engine only."""
    return init_vllm(
        qwen_folder,
        DEVICE,
        seed=0,
        gpu_memory_utilization=0.2,
        dtype="bfloat16",
        max_model_len=1024,
        enforce_eager=not ON_GPU,
        enable_sleep_mode=ON_GPU,
    )


def sync_error(policy, engine):
    return check_policy_sync(policy, engine, PROBES, 0, 64, 1e9, "bfloat16")["sync_multiplicative_error"]


def disturb(policy, seed):
    """Change every tensor of the policy by random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(noise * 0.3 * max(float(parameter.std()), 0.01))


def test_each_sync_makes_the_engine_the_policy_also_after_sleep(gpu_engine, policy, record_property):
    """Every tensor arrives: biases, fused projections, the tied output layer. CUDA graphs see the new weights."""
    errors = []
    for cycle in range(3):
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
    for cycle in range(2):
        if ON_GPU and cycle:
            sleep_vllm_instance(gpu_engine)
        load_policy_into_vllm_instance(policy, gpu_engine)
        assert sync_error(policy, gpu_engine) < 1.02
    for layer in adapted_layers(policy).values():
        layer.lora_b.data.zero_()
    assert sync_error(policy, gpu_engine) > 1.05


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
    """A chi-squared test of 2,048 first tokens against the policy's probabilities. Each has a seed of its own."""
    from vllm import SamplingParams

    load_policy_into_vllm_instance(policy, gpu_engine)
    params = SamplingParams(temperature=1.0, max_tokens=1, ignore_eos=True)
    responses = sample_responses(gpu_engine, [PROBES[0]] * 2048, params, range(2048))
    with torch.inference_mode():
        logits = policy(torch.tensor([PROBES[0]], device=DEVICE)).logits[0, -1]
    expected = 2048 * logits.double().softmax(-1).cpu()
    observed = torch.bincount(torch.tensor([row.token_ids[0] for row in responses]), minlength=512).double()
    is_rare = expected < 5  # counted together
    observed = torch.cat([observed[~is_rare], observed[is_rare].sum()[None]])
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    statistic = float(((observed - expected).square() / expected.clamp(min=1e-9)).sum())
    freedom = len(expected) - 1
    record_property("chi_squared", [statistic, freedom])
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


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


def on_device(policy_device):
    """Settings of a run with the policy on one device, and the engine on the device of the check."""
    return {
        "policy_device": policy_device,
        "evaluator_device": DEVICE,
        "compute_dtype": "bfloat16",
        "engine_dtype": "bfloat16",
        "gpu_memory_utilization": 0.2,
        "max_sync_error": 1.05,
        "max_context_tokens": 384,
    }


def metrics_of(process, runs_dir):
    assert process.returncode == 0, process.stderr[-3000:]
    path = next(runs_dir.glob("*/metrics.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("policy_device", [DEVICE, "cuda:1"])
def test_a_grpo_run(needs_engine, qwen_folder, tmp_path, policy_device):
    """Steps, evaluations, a checkpoint. The engine sleeps and wakes in between. The rollouts check each sync."""
    if policy_device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    (tmp_path / "rewards.py").write_text(  # a random model is never right, so another reward must vary
        "def odd_length(response, ground_truth):\n"
        "    return {'reward': len(response) % 2, 'format_reward': 0.0, 'answer_reward': 0.0}\n"
    )
    settings = on_device(policy_device) | {"reward": f"{tmp_path}/rewards.py:odd_length"}
    arguments = grpo_arguments(qwen_folder, tmp_path / "runs", **settings)
    rows = metrics_of(run_script("GRPO_train.py", *arguments), tmp_path / "runs")
    assert sum("eval/reward" in row for row in rows) == 3
    gaps = [row["rollout/log_prob_gap_multiplicative"] for row in rows if "train_step" in row]
    assert len(gaps) == 2 and all(1 < gap < 1.05 for gap in gaps)


def test_an_sft_run(needs_engine, qwen_folder, tmp_path):
    arguments = tiny_arguments(qwen_folder, tmp_path, **on_device(DEVICE), checkpoint_interval=1)
    rows = metrics_of(run_script("SFT_train.py", *arguments), tmp_path)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]


# --- last, because it takes longest -----------------------------------------------------------------------------------


def test_compiled_blocks_compute_the_same(qwen_folder, record_property):
    """compile_policy, on trees of several sizes: the same scores and gradients as without it, but for rounding."""
    if not can_compile(DEVICE):
        pytest.skip("needs a compiler and Python's headers")
    from torch._dynamo.utils import counters

    counters.clear()
    batch, scores, gradients = make_batch(), [], []
    for is_compiled in (False, True):
        policy = load(qwen_folder)
        if is_compiled:
            compile_blocks(policy)
        policy.train()
        found = []
        for part in ([0, 1, 2, 3, 4, 5], [5], [3, 4], [0, 1, 2], [0, 4]):
            with autocast(policy, "bfloat16"):
                result = get_masked_response_log_probs(policy, **take_rows(batch, part))["log_probs"]
            result.sum().backward()
            found.append(result.detach().flatten())
        scores.append(torch.cat(found))
        gradients.append([parameter.grad for parameter in policy.parameters()])
    difference = norm(one - other for one, other in zip(*gradients, strict=True))
    record_property("score_difference_max", float((scores[0] - scores[1]).abs().max()))
    record_property("gradient_difference", difference / norm(gradients[0]))
    record_property("counters", {name: dict(counters[name]) for name in ("stats", "recompiles")})
    assert (scores[0] - scores[1]).abs().max() < 0.15 and difference < 0.05 * norm(gradients[0])
