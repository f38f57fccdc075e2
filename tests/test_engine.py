"""The real vLLM engine on the CPU: the log-probabilities of Transformers, synced weights, sampling by seeds."""

import json
import math
import os

import pytest
import torch
from tiny import run_python
from transformers import AutoModelForCausalLM

from plainrl.config import GRPOConfig, SFTConfig
from plainrl.engine import (
    SyncError,
    _start_and_tell,
    _start_vllm,
    check_policy_sync,
    init_vllm,
    load_policy_into_vllm_instance,
    register_model_class,
    require_small_sync_error,
    sample_responses,
    sampling_params,
    sleep_vllm_instance,
)
from plainrl.policy import score_responses
from plainrl.precision import add_working_copy
from plainrl.records import Example, Response, Rollout, UserError
from plainrl.rollouts import measure_gap
from SFT_helper import encode_prompt

QUESTIONS = [f"User: What is {i} + {i * i}? Think step by step, please, and then give the answer." for i in range(1, 7)]
KEPT = []  # engines that live until the process ends


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


def test_log_probs_at_a_temperature_are_those_of_transformers_at_it(engine, tiny_model_folder, prompt_ids):
    """So the rollouts check the weight sync at any temperature. Scores at temperature 1 would be far off."""
    policy = changed_policy(tiny_model_folder, seed=1)
    load_policy_into_vllm_instance(policy, engine)
    responses = sample_responses(engine, prompt_ids, sampling(temperature=0.6), seeds=range(6))
    rewards = dict.fromkeys(("reward", "format_reward", "answer_reward"), 0.0)
    rollouts = [Rollout(Example("q", "p", "1", None, "s"), response, rewards, 0.0) for response in responses]
    config, gaps = GRPOConfig(sampling_temperature=0.6, sampling_min_tokens=0), {}
    assert config.rollouts_check_sync
    for temperature in (config.sampling_temperature, 1.0):
        scores = score_responses(policy, responses, padding_id=0, batch_size=4, temperature=temperature)
        log_probs = torch.cat([score["log_probs"] for score in scores])
        gaps[temperature] = measure_gap(rollouts, log_probs, config)["gap_max"]
    assert gaps[0.6] < 1e-4 < 1e-1 < gaps[1.0]


def test_an_output_layer_in_float32_rounds_no_logit(engine, tiny_model_folder, prompt_ids):
    """In a 16-bit engine. The layer is tied to the embeddings, and follows the weight sync.

    bfloat16 has 8 bits, so that differences of rounded logits are multiples of a power of two: here of 1/64 at least,
    because the likeliest logits are above 4.
    """
    settings = {"dtype": "bfloat16", "max_model_len": 384}
    # Kept, because an engine that ends takes what `engine` needs of this process with it.
    KEPT.append(init_vllm(tiny_model_folder, "cpu", 0, **settings, float32_output_layer=True))
    policy = changed_policy(tiny_model_folder, seed=1)
    add_working_copy(policy, "bfloat16")
    load_policy_into_vllm_instance(policy, KEPT[0])
    check_policy_sync(policy, KEPT[0], prompt_ids, 0, num_tokens=16, max_error=1.1)
    prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
    entries = [
        entry
        for output in KEPT[0].generate(prompts, sampling(logprobs=2), use_tqdm=False)
        for entry in output.outputs[0].logprobs
    ]
    likeliest = [sorted((token.logprob for token in entry.values()), reverse=True)[:2] for entry in entries]
    differences = 64 * torch.tensor(likeliest).diff()
    assert ((differences - differences.round()).abs() < 0.01).float().mean() < 0.5


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
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            policy.get_output_embeddings().weight[0, 0] = value
        with pytest.raises(UserError, match="^the policy's log-probs of sampled tokens are infinite or NaN") as error:
            check(policy, engine, prompt_ids)
        assert not isinstance(error.value, SyncError) and "sync" not in str(error.value)


def test_numbers_that_overflow_in_the_engine_are_not_blamed_on_the_sync():
    require_small_sync_error(1.1, 1.1)
    for error, cause in (
        (1.2, "weights that did not arrive"),
        (math.inf, "weights that did not"),
        (math.nan, "overfl"),
    ):
        with pytest.raises(SyncError, match=rf"\(max_sync_error = 1.1\): .*{cause}"):
            require_small_sync_error(error, 1.1)


def test_sampling_follows_the_seeds_whatever_else_is_in_the_batch(engine, prompt_ids):
    together = sample_responses(engine, prompt_ids, sampling(), seeds=range(6))
    reversed_order = sample_responses(engine, prompt_ids[::-1], sampling(), seeds=range(6)[::-1])[::-1]
    alone = [sample_responses(engine, [ids], sampling(), seeds=[seed])[0] for seed, ids in enumerate(prompt_ids)]
    tokens = [response.token_ids for response in together]
    assert tokens == [response.token_ids for response in reversed_order] == [response.token_ids for response in alone]
    without = sample_responses(engine, prompt_ids, sampling(), seeds=range(6), with_log_probs=False)
    assert without == [response._replace(log_probs=[]) for response in together]
    other = sample_responses(engine, prompt_ids, sampling(), seeds=range(6, 12))
    assert tokens != [response.token_ids for response in other]


def test_no_token_is_decoded_by_itself_for_its_log_prob(engine, prompt_ids, monkeypatch):
    """Texts are those of whole responses. vLLM would also give one for each log-prob."""

    def decode(*_):
        raise AssertionError("a token was decoded")

    monkeypatch.setattr("vllm.v1.engine.logprobs.convert_ids_list_to_tokens", decode)
    assert all(response.log_probs for response in sample_responses(engine, prompt_ids, sampling(), seeds=range(6)))


def test_more_prompts_than_one_prefill_takes(engine, tokenizer):
    """A prefill in pieces kills seeded requests on the CPU in vLLM 0.32; 60 long prompts would need one."""
    ids = [encode_prompt(f"{i} " + "What is it? " * 60, tokenizer) for i in range(60)]
    assert sum(map(len, ids)) > 8192
    responses = sample_responses(engine, ids, sampling(max_tokens=4), seeds=range(60))
    assert len(responses) == 60
    assert all(1 <= len(response.token_ids) <= 4 for response in responses)


@pytest.mark.usefixtures("cpu_engine")
def test_settings_that_vllm_refuses_end_in_one_line(tiny_model_folder):
    with pytest.raises(UserError, match=r"vLLM did not start on cpu .*look at gpu_memory_utilization"):
        init_vllm(tiny_model_folder, "cpu", seed=0, dtype="float32", max_model_len=100_000)


@pytest.mark.usefixtures("engine")
def test_no_second_process_is_started_to_look_at_the_class_of_a_model(tmp_path, monkeypatch):
    from vllm.model_executor.models import registry

    asked = []
    cache = staticmethod(lambda: tmp_path / "cache")  # empty, as on a fresh machine
    monkeypatch.setattr(registry._LazyRegisteredModel, "_get_cache_dir", cache)
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: asked.append(look) or look())
    known = {"Here": "vllm.model_executor.models.llama", "Broken": "vllm.no_such_module"}
    for architecture, module in known.items():
        entry = registry._LazyRegisteredModel(module, "LlamaForCausalLM")
        monkeypatch.setitem(registry.ModelRegistry.models, architecture, entry)
    registry.ModelRegistry.models["Here"].inspect_model_cls()
    assert len(asked) == 1  # what vLLM does by itself
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Here", "Broken", "Unknown"]}))
    register_model_class(str(tmp_path))
    assert registry.ModelRegistry.models["Here"].inspect_model_cls().is_text_generation_model
    assert len(asked) == 1
    assert registry.ModelRegistry.models["Broken"] is entry  # its error is vLLM's to tell
    assert "Unknown" not in registry.ModelRegistry.models


@pytest.mark.parametrize(
    "error", [RuntimeError("Found no\nC compiler"), AssertionError("Error in memory"), ValueError("No room\nfor cache")]
)
def test_an_engine_that_does_not_start_on_a_gpu_ends_in_one_line(error, monkeypatch, capsys):
    """Triton and vLLM raise these there. The first two may be bugs, and show their traceback before the line.

    On the CPU they are bugs, and end the program with their traceback. Settings are refused by ValueError alone.
    """

    def fail(**options):
        raise error

    monkeypatch.setattr("vllm.LLM", fail)
    monkeypatch.setattr("plainrl.engine.register_model_class", lambda folder: None)
    with pytest.raises(
        UserError, match=r"vLLM did not start on cuda:0 \((Found no C|Error in memory|No room for cache)"
    ):
        _start_vllm("cuda:0", {"model": "m"})
    printed, is_of_settings = capsys.readouterr(), isinstance(error, ValueError)
    assert printed.out == "" and printed.err.count("Traceback (most recent call last)") == (not is_of_settings)
    with pytest.raises(UserError if is_of_settings else type(error)):
        _start_vllm("cpu", {"model": "m"})


def test_a_rank_that_waited_for_a_lost_one_blames_no_setting(monkeypatch):
    """On a GPU the ranks wait for each other in vLLM's warm-up. The one that was lost says why."""
    error = RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:3")
    monkeypatch.setattr("vllm.LLM", lambda **options: (_ for _ in ()).throw(error))
    monkeypatch.setattr("plainrl.engine.register_model_class", lambda folder: None)
    monkeypatch.setattr("plainrl.distributed.num_ranks", lambda: 2)
    with pytest.raises(RuntimeError, match="closed by peer"):
        _start_vllm("cuda:0", {"model": "m"})


@pytest.mark.parametrize(
    ("device", "is_eager", "expected"),
    [
        ("cpu", True, ""),
        ("cpu", False, "; the first start compiles, which takes minutes"),
        ("cuda:0", False, "; the first start compiles, which takes minutes; vLLM's own messages follow"),
    ],
)
def test_the_start_and_the_size_of_the_cache_are_told(device, is_eager, expected, engine, monkeypatch, capsys):
    """A token takes 2 (key, value) x 2 layers x 1 head x 32 numbers x 4 bytes = 512 bytes of 1 GiB."""
    monkeypatch.setattr("plainrl.engine._start_vllm", lambda device, options, in_own_process: engine)
    _start_and_tell(device, {"model": "m", "dtype": "bfloat16", "enforce_eager": is_eager})
    assert capsys.readouterr().out == (
        f"starting vLLM on {device}: m in bfloat16{expected}\nvLLM started in 0 s; "
        "its key-value cache of 1.0 GiB holds 2,097,152 tokens, enough for 5,461.3 contexts of 384 tokens\n"
    )


# The engine is replaced, and vLLM's own logger is not. The replacement writes what the engine writes as it starts.
NOISY_START = """
import logging, sys, types
class LLM:
    def __init__(self, **options):
        from vllm.config.logging import LoggingConfig
        from vllm.logger import configure_logging
        configure_logging(LoggingConfig())
        logging.getLogger("vllm.v1").info("compiling")
        logging.getLogger("vllm.v1").warning("memory is short")
        print("capturing: 100%", file=sys.stderr)
module = types.ModuleType("vllm.entrypoints.llm")
module.LLM = LLM
sys.modules[module.__name__] = module
from plainrl.engine import _start_vllm
_start_vllm(sys.argv[1], {})
logging.getLogger("vllm.v1").info("falling asleep")
logging.getLogger("vllm.v1").warning("out of blocks")
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").warning("RotaryEmbedding: Failed")
"""


def test_on_a_gpu_vllm_says_what_it_does_while_it_starts():
    """Afterwards only its warnings are shown: else it would speak in every step."""
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_LOGGING_LEVEL"}
    result = run_python("-c", NOISY_START, "cuda:0", env=environment)
    assert result.returncode == 0, result.stderr
    shown = result.stdout + result.stderr
    assert all(message in shown for message in ("compiling", "memory is short", "capturing: 100%", "out of blocks"))
    assert "falling asleep" not in shown and "RotaryEmbedding" not in shown  # a false alarm at each weight sync


class RecordingEngine:
    """Stands in for a sleeping GPU engine, to hold the order of calls that its sleep mode needs."""

    def __init__(self):
        self.calls = []
        self.is_asleep = False
        self.gives_up_its_cache = True
        self.llm_engine = self.engine_core = self
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
    sleep_vllm_instance(engine)
    load_policy_into_vllm_instance(tiny_model, engine)
    woken = ["wake weights", "reload_weights", "wake kv_cache", "reset_prefix_cache"]
    assert engine.calls == ["reload_weights", "reset_prefix_cache", "sleep 2", *woken]


def test_a_prefix_cache_that_stays_is_an_error(tiny_model):
    engine = RecordingEngine()
    engine.gives_up_its_cache = False
    with pytest.raises(SyncError, match="kept keys and values of the old weights"):
        load_policy_into_vllm_instance(tiny_model, engine)


@pytest.mark.usefixtures("cpu_engine")
def test_the_engine_samples_with_the_settings_of_the_run():
    numbers = {"sampling_temperature": 0.7, "sampling_top_p": 0.8, "sampling_min_tokens": 3, "sampling_max_tokens": 9}
    found = sampling_params(SFTConfig(stop_string="END", **numbers))
    assert (found.temperature, found.top_p, found.min_tokens, found.max_tokens) == (0.7, 0.8, 3, 9)
    assert found.stop == ["END"] and found.include_stop_str_in_output
    assert not sampling_params(SFTConfig(stop_string="")).stop


@pytest.mark.usefixtures("cpu_engine")
def test_one_engine_of_several_that_is_not_the_policy_is_named(monkeypatch):
    """The mean over all of them is below the limit."""
    good = Response([1], "", [2] * 4, [-1.0] * 4, "length")
    bad = good._replace(log_probs=[-1.5] * 4)
    monkeypatch.setattr("plainrl.engine.stream_responses", lambda *_: iter([(0, good)]))
    monkeypatch.setattr("plainrl.engine.exchange", lambda own: [own] * 7 + [[bad]])
    monkeypatch.setattr(
        "plainrl.engine.score_responses", lambda policy, rows, *_: [{"log_probs": torch.full((4,), -1.0)} for _ in rows]
    )
    with pytest.raises(SyncError, match="the engine of rank 7 and policy disagree"):
        check_policy_sync(None, None, [[1]], 0, num_tokens=4, max_error=1.1)
