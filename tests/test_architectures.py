"""Random tiny models of many architectures: loaded, scored, trained with the real engine, saved, loaded again.

`pytest -m architectures` runs all of them, in some minutes. Those in FAST run with every other test.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import grpo_arguments, read_lines, run_script
from transformers import AutoConfig, AutoModelForCausalLM

from GRPO_train import accumulate_gradients, score_old_log_probs
from plainrl import divided_weights
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.policy import load_policy, prepare_training
from plainrl.prefix_tree import shares_prefixes
from plainrl.preflight import check_scores
from plainrl.records import Example, Response, Rollout, UserError
from SFT_helper import get_response_log_probs, join_prompt_and_response_ids, sft_loss

IDS = {"vocab_size": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
ONE_ID = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
SMALL = SIZES | IDS | {"intermediate_size": 128, "initializer_range": 0.2}
GROUPED = SMALL | {"num_key_value_heads": 1}
HEADS = GROUPED | {"head_dim": 32}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.2} | IDS
OPT = SIZES | ONE_ID | {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Name: the type in config.json, its values, and whether the rows share prefixes. If they do not, they are padded.
SERVED = {
    "Llama": ("llama", HEADS | {"tie_word_embeddings": True}, True),
    "untied heads": ("llama", HEADS | {"tie_word_embeddings": False}, True),
    "sharded": ("llama", HEADS, True),
    "Qwen2": ("qwen2", GROUPED, True),
    "Qwen3": ("qwen3", HEADS, True),
    "Mistral": ("mistral", HEADS | {"sliding_window": None}, True),
    "Mistral, sliding": ("mistral", HEADS | {"sliding_window": 64}, False),
    "Gemma": ("gemma", HEADS, True),
    "Gemma 3": ("gemma3_text", HEADS | {"sliding_window": 64}, False),
    "Phi": ("phi", SMALL, True),
    "Phi-3": ("phi3", GROUPED, True),
    "GPT-2": ("gpt2", GPT2, True),
    "OPT": ("opt", OPT, True),
    "GPT-NeoX": ("gpt_neox", SMALL, True),
    "SmolLM3": ("smollm3", HEADS, True),
    "OLMo 2": ("olmo2", GROUPED, True),
    "StarCoder2": ("starcoder2", GROUPED, True),
    "Falcon": ("falcon", SIZES | IDS | {"initializer_range": 0.2}, False),
    "Falcon, ALiBi": ("falcon", SIZES | IDS | {"initializer_range": 0.2, "alibi": True}, False),
    "Nemotron": ("nemotron", GROUPED, False),
}
REFUSED = {
    "Mixtral": ("mixtral", HEADS | EXPERTS, r"mixtral is a mixture of experts \(num_local_experts = 4\)"),
    "Qwen3-MoE": (
        "qwen3_moe",
        HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "qwen3_moe is a mixture of experts",
    ),
    "JetMoE": (
        "jetmoe",
        SIZES | IDS | EXPERTS | {"num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 64},
        "jetmoe is a mixture of experts",
    ),
    "Mamba": ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8} | IDS, "mamba carries a state"),
    "RecurrentGemma": ("recurrent_gemma", GROUPED | {"lru_width": 64, "num_hidden_layers": 3}, "carries a state"),
    "LFM2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}, r"lfm2 carries a state .*\(conv\)"),
    "Gemma 2": ("gemma2", HEADS, r"it changes its logits \(final_logit_softcapping\)"),
    "Cohere": ("cohere", GROUPED, r"it changes its logits \(logit_scale\)"),
}
LOADED_WHOLE = ("GPT-NeoX", "Falcon, ALiBi")  # files call a tensor otherwise; what is computed depends on values
FAST = ("GPT-2", "OPT", "SmolLM3")
HAS_DROPOUT = {"GPT-2": "resid_pdrop = 0.1, embd_pdrop = 0.1, attn_pdrop = 0.1", "OPT": "dropout = 0.1"}
PROMPT = list(range(100, 140))
PROMPTS = [[*PROMPT, 5, 6, 7]] * 3 + [[*PROMPT, 8]] * 2 + [[*PROMPT, 9, 10, 11, 12]]
RESPONSES = [[20, 21], [20, 22, 23, 24], [20, 21], [25], [26, 27, 28, 29, 30], [31, 32]]
REWARD = '''"""A reward that differs between the responses of a random model."""


def odd(response, ground_truth):
    """Give 1 for a response of an odd number of characters."""
    reward = float(len(response) % 2)
    return {"format_reward": 1.0, "answer_reward": reward, "reward": reward}
'''


def of_set(names):
    """The names of a set as parameters; those that are not fast are marked."""
    return [pytest.param(n, marks=[] if n in FAST else pytest.mark.architectures) for n in names]


def make_model(folder, tiny_model_folder, kind, values, **options):
    """Save a random model of an architecture, with the tiny model's tokenizer."""
    shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(Path(tiny_model_folder) / "tokenizer_config.json", folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).save_pretrained(folder, **options)


def make_served(folder, tiny_model_folder, name):
    kind, values, _ = SERVED[name]
    make_model(folder, tiny_model_folder, kind, values, max_shard_size="100KB" if name == "sharded" else "5GB")
    return str(folder)


def config_of(folder, schema=GRPOConfig, **values):
    return schema(model=folder, max_context_tokens=384, sampling_max_tokens=16, compute_dtype="float32", **values)


def gradient_of(policy, log_probs, mask):
    policy.zero_grad()
    sft_loss(log_probs, mask, 1.0, num_step_rows=len(RESPONSES)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("name", of_set(SERVED))
def test_scores_and_gradients_are_those_of_the_plain_model(name, tiny_model_folder, tmp_path, capsys):
    """In training mode, with dropout in config.json; saved and loaded again, the model and its config are the same."""
    folder = make_served(tmp_path / "model", tiny_model_folder, name)
    shares = SERVED[name][2]
    policy, tokenizer = load_policy(config_of(folder))
    printed = capsys.readouterr().out
    assert ("rows are padded and share no prefix" in printed) == (not shares) == (not shares_prefixes(policy))
    assert f"dropout is off ({HAS_DROPOUT[name]})" in printed if name in HAS_DROPOUT else "dropout" not in printed
    check_scores(policy, config_of(folder))
    policy.train()
    batch = join_prompt_and_response_ids(PROMPTS, RESPONSES, padding_id=0)
    mask = batch["response_mask"]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = get_response_log_probs(plain, batch["input_ids"], batch["labels"])["log_probs"]
    scores = get_masked_response_log_probs(policy, **batch)["log_probs"]
    torch.testing.assert_close(scores[mask], expected[mask], atol=1e-5, rtol=1e-5)
    gradient, expected_gradient = gradient_of(policy, scores, mask), gradient_of(plain, expected, mask)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()

    for part in (policy, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    reread, _ = load_policy(config_of(str(tmp_path / "saved")))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), reread.parameters(), strict=True))
    assert torch.equal(get_masked_response_log_probs(reread, **batch)["log_probs"], scores)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "saved")]
    assert len({json.dumps({key: value for key, value in c.items() if "drop" in key}) for c in configs}) == 1


@pytest.mark.parametrize("name", of_set(SERVED))
def test_weights_read_into_shares_are_those_of_the_whole_model(name, tiny_model_folder, tmp_path, monkeypatch):
    """Here the share is everything; tests/test_distributed.py reads two. Buffers and ties must survive, too."""
    folder = make_served(tmp_path / "model", tiny_model_folder, name)
    whole = load_policy(config_of(folder))[0]
    monkeypatch.setattr(divided_weights, "num_ranks", lambda: 2)
    if name not in LOADED_WHOLE:
        monkeypatch.setattr("plainrl.policy.load_weights", None)
    policy = load_policy(config_of(folder))[0]
    assert shares_prefixes(policy) == shares_prefixes(whole)
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(whole, kind)())
        found = dict(getattr(policy, kind)())
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", of_set(SERVED))
def test_the_ratio_of_a_policy_that_did_not_move_is_1(name, compute_dtype, tiny_model_folder, tmp_path):
    """With the dropout of config.json, which is 0.1 by default in GPT-2 and OPT."""
    folder = make_served(tmp_path / "model", tiny_model_folder, name)
    sizes = {"rollout_batch_size": 6, "group_size": 3, "train_batch_size": 3, "gradient_accumulation_steps": 1}
    config = config_of(folder, loss_type="grpo_clip", scoring_batch_size=3, **sizes)
    config = config.model_copy(update={"compute_dtype": compute_dtype})
    policy, _ = load_policy(config)
    prepare_training(policy, config)
    rollouts = [
        Rollout(Example("q", "p", "1", None, "s"), Response(p, "", r, [-1.0] * len(r), "stop"), {"reward": 1.0}, 1.0)
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    score_old_log_probs(policy, rollouts, 0, config)
    for batch in (rollouts[:3], rollouts[3:]):
        sums = accumulate_gradients(policy, batch, 0, config)
        tolerance = 1e-4 if compute_dtype == "float32" else 0.02
        assert sums["train/ratio_mean"] / sums["num_tokens"] == pytest.approx(1, abs=tolerance)
        assert sums["train/ratio_max"] == pytest.approx(1, abs=tolerance)
        assert sums["train/clip_fraction_low"] == sums["train/clip_fraction_high"] == 0


@pytest.mark.parametrize("name", HAS_DROPOUT)
def test_dropout_in_sft_is_an_option(name, tiny_model_folder, tmp_path):
    """Rows that share a prefix would share its random numbers, so that they share none."""
    folder = make_served(tmp_path / "model", tiny_model_folder, name)
    batch = join_prompt_and_response_ids(PROMPTS, RESPONSES, padding_id=0)
    for dropout in (False, True):
        policy, _ = load_policy(config_of(folder, SFTConfig, dropout=dropout))
        assert shares_prefixes(policy) is not dropout
        check_scores(policy, config_of(folder, SFTConfig, dropout=dropout))
        policy.train()
        first, second = (get_masked_response_log_probs(policy, **batch)["log_probs"] for _ in range(2))
        assert torch.equal(first, second) is not dropout
        policy.eval()
        first, second = (get_masked_response_log_probs(policy, **batch)["log_probs"] for _ in range(2))
        assert torch.equal(first, second)


def grpo_run(background, name):
    """Two steps of GRPO with the real engine, whose rewards make the weights move."""
    folder = background.new_folder("architectures")
    (folder / "rewards.py").write_text(REWARD)
    model = make_served(folder / "model", background.tiny_model, name)
    settings = {"run_name": "run", "max_sync_error": 1.0001, "learning_rate": "1e-2", "num_final_eval_examples": 8}
    arguments = grpo_arguments(model, folder, reward=f"{folder}/rewards.py:odd", **settings)
    return folder, run_script("GRPO_train.py", *arguments, start=background.start)


JOBS = {name: functools.partial(grpo_run, name=name) for name in SERVED}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.background(job=job)]
            + ([] if name in ("GPT-2", "SmolLM3") else [pytest.mark.architectures]),
        )
        for name, job in JOBS.items()
    ],
)
def test_the_engine_takes_over_the_weights(name, background):
    """At each evaluation, before and after the weights have moved, engine and policy agree to float32's rounding."""
    folder, result = background.result(JOBS[name])
    assert result.returncode == 0, result.stderr
    rows = read_lines(folder / "run" / "metrics.jsonl")
    errors = [row["eval/sync_multiplicative_error"] for row in rows if "eval/sync_multiplicative_error" in row]
    assert len(errors) == 3 and max(errors) < 1.0001
    assert any(row.get("train/grad_norm") for row in rows)
    policy, _ = load_policy(config_of(str(folder / "run" / "final")))
    before = load_policy(config_of(str(folder / "model")))[0]
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters(), strict=True))
    (checkpoint,) = (folder / "run" / "checkpoints").glob("step_000002")
    saved = load_file(checkpoint / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in policy.state_dict().items() if name in saved)


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_be_trained_are_refused(name, tiny_model_folder, tmp_path):
    kind, values, message = REFUSED[name]
    make_model(tmp_path / "model", tiny_model_folder, kind, values)
    with pytest.raises(UserError, match=f"model = {tmp_path}/model: .*{message}.*; use another model$") as error:
        load_policy(config_of(str(tmp_path / "model")))
    assert "\n" not in str(error.value)
