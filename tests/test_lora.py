"""Adapters: the right gradient, the merged model everywhere else, a run that can be resumed, nothing else changed."""

import shutil
from functools import partial

import pytest
import torch
from kill_and_resume import find_differences, start
from safetensors.torch import load_file
from tiny import FakeEvaluator, expert_iteration_arguments, grpo_arguments, tiny_arguments
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import GRPO_train
import SFT_train
from experiments import expert_iteration
from plainrl.checkpoint import TrainingState, checkpoint_bytes, optimizer_tensors, write_checkpoint
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.engine import check_policy_sync, load_policy_into_vllm_instance
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.lora import (
    ADAPTERS,
    LoRALinear,
    adapted_layers,
    add_adapters,
    fingerprint_frozen,
    load_adapters,
    merged_model,
    merged_state_dict,
    save_adapters,
)
from plainrl.model_files import resolve_model
from plainrl.policy import compute_clipped_gradient, load_policy, prepare_training
from plainrl.precision import add_working_copy, working_copy
from plainrl.prefix_tree import share_prefixes, shares_prefixes
from plainrl.records import UserError
from SFT_helper import join_prompt_and_response_ids

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "compute_dtype": "float32"}


def make_qwen():
    """A random Qwen2: biases, and an output layer of its own."""
    torch.manual_seed(1)
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(params=["llama", "qwen2"])
def base(request, tiny_model):
    """A plain model: a tied Llama without biases, an untied Qwen2 with them."""
    return tiny_model if request.param == "llama" else make_qwen()


def with_adapters(model, is_trained=True, **settings):
    """The model itself with adapters, which are no longer zero if they are `trained`."""
    add_adapters(model, SFTConfig(**(LORA | settings)))
    share_prefixes(model)
    if is_trained:
        torch.manual_seed(2)
        for layer in adapted_layers(model).values():
            torch.nn.init.normal_(layer.lora_b, std=0.05)
    return model


def make_rows():
    generator = torch.Generator().manual_seed(0)
    prompts = [[5, 6, 7], [5, 6, 7], [8, 9]]
    responses = [torch.randint(1, 500, (length,), generator=generator).tolist() for length in (6, 4, 9)]
    return join_prompt_and_response_ids(prompts, responses, padding_id=0)


def scores_of(model):
    return get_masked_response_log_probs(working_copy(model), **make_rows())["log_probs"]


def test_the_equation_by_hand():
    """W = [[1, 2], [3, 4]], bias (1, 0), A = [[1, -1]], B = [[2], [0]], alpha / r = 3: y = W x + bias + 3 B (A x)."""
    linear = torch.nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 0.0])
    layer = LoRALinear(linear, rank=1, alpha=3.0, generator=torch.Generator().manual_seed(0))
    assert layer.lora_a.abs().max() <= 2**-0.5 and not layer.lora_b.any()
    layer.lora_a.data, layer.lora_b.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.0]])
    x = torch.tensor([[5.0, 1.0]])
    assert layer(x).tolist() == [[5 + 2 + 1 + 3 * 2 * 4, 15 + 4]]
    assert layer.merged_weight().tolist() == [[1 + 6, 2 - 6], [3, 4]]


def test_every_linear_layer_of_the_blocks_is_adapted_and_nothing_else_is_trained(base):
    names = {name for name, module in base.base_model.named_modules() if isinstance(module, torch.nn.Linear)}
    prefix = base.base_model_prefix
    with_adapters(base)
    assert {name.removeprefix(f"{prefix}.") for name in adapted_layers(base)} == names and len(names) == 2 * 7
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{part}" for name in adapted_layers(base) for part in ("lora_a", "lora_b")}
    optimizer = prepare_training(base, SFTConfig(**LORA))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(parameter) for parameter in base.parameters() if parameter.requires_grad
    }


def test_gradients_equal_finite_differences(base):
    """In float64, through shared prefixes and the loss: along a random direction of all A, and of all B."""
    policy = with_adapters(base).double()
    for block in policy.model.layers:  # Transformers' norms compute in float32
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(block, name, torch.nn.RMSNorm(64, eps=1e-6, dtype=torch.float64))
    policy.model.norm = torch.nn.RMSNorm(64, eps=1e-6, dtype=torch.float64)
    assert shares_prefixes(policy)
    scores_of(policy).sum().backward()
    for part in ("lora_a", "lora_b"):
        parameters = [parameter for name, parameter in policy.named_parameters() if name.endswith(part)]
        directions = [torch.randn_like(parameter) for parameter in parameters]
        expected = sum((p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True))
        sums = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += step * direction
                sums.append(scores_of(policy).sum().item())
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += 1e-5 * direction
        assert (sums[0] - sums[1]) / 2e-5 == pytest.approx(expected, rel=1e-6)
        assert abs(expected) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_0_is_the_model(base, dtype):
    """Exactly: in 16 bits, too, if the model was published in 16 bits."""
    for parameter in base.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    share_prefixes(base)
    add_working_copy(base, dtype)
    expected = scores_of(base)
    assert torch.equal(scores_of(with_adapters(base, is_trained=False, compute_dtype=dtype)), expected)


def test_the_merged_model_has_the_same_scores_and_loads_in_plain_transformers(base, tmp_path):
    names = list(base.state_dict())
    policy = with_adapters(base)
    assert [name for name, _ in merged_state_dict(policy)] == names
    states = torch.get_rng_state()
    merged_model(policy).save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), states)  # a resumed run would else draw other numbers
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and type(loaded) is type(policy) and loaded.dtype == torch.float32
    assert list(loaded.state_dict()) == names and not adapted_layers(loaded)
    assert (scores_of(loaded) - scores_of(policy)).abs().max() < 2e-5
    without = {name: part for name, part in policy.state_dict().items() if "lora" not in name}
    assert any((without[name] - part).abs().max() > 0.01 for name, part in loaded.state_dict().items())


def test_in_16_bits_the_policy_computes_with_exactly_the_weights_that_the_engine_gets(base, tmp_path):
    """The policy's scores are those of the plain model with the merged weights, in its working copy: bit for bit."""
    policy = with_adapters(base, compute_dtype="bfloat16")
    merged_model(policy).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    share_prefixes(plain)
    add_working_copy(plain, "bfloat16")
    assert torch.equal(scores_of(policy), scores_of(plain))
    for layer in adapted_layers(policy).values():  # a change smaller than any rounding error changes neither
        layer.lora_b.data *= 1 + 1e-7
    assert torch.equal(scores_of(policy), scores_of(plain))


def test_the_gradient_in_16_bits_is_near_that_in_float32(tiny_model_folder):
    gradients = []
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        policy = with_adapters(model, compute_dtype=dtype)
        scores_of(policy).sum().backward()
        assert all(part.grad.dtype == torch.float32 for part in policy.parameters() if part.requires_grad)
        gradients.append(torch.cat([part.grad.flatten() for part in policy.parameters() if part.requires_grad]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert gradients[1].norm() == pytest.approx(gradients[0].norm().item(), rel=0.1)


def test_frozen_weights_are_held_in_16_bits_and_saved_in_32(tiny_model, tmp_path):
    policy = with_adapters(tiny_model, compute_dtype="bfloat16")
    dtypes = {name.rpartition(".")[2]: part.dtype for name, part in policy.model.layers[0].mlp.named_parameters()}
    assert dtypes == {"weight": torch.bfloat16, "lora_a": torch.float32, "lora_b": torch.float32}
    assert policy.get_input_embeddings().weight.dtype == policy.lm_head.weight.dtype == torch.bfloat16
    assert policy.model.norm.weight.dtype == policy.dtype == torch.bfloat16
    merged_model(policy).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {part.dtype for part in saved.values()} == {torch.float32}
    layer = policy.model.layers[1].self_attn.q_proj
    expected = layer.weight.float() + 2 * layer.lora_b @ layer.lora_a
    assert torch.allclose(saved["model.layers.1.self_attn.q_proj.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("with_tree", [True, False])
def test_gradients_arrive_with_checkpointing(tiny_model, with_tree):
    """Nothing before the first adapter has a gradient, so that a checkpoint's inputs have none."""
    policy = with_adapters(tiny_model)
    if not with_tree:
        policy.set_attn_implementation("sdpa")
    gradients = []
    for checkpointing in (False, True):
        prepare_training(policy, SFTConfig(**LORA, gradient_checkpointing=checkpointing))
        scores_of(policy).sum().backward()
        gradients.append([part.grad.clone() for part in policy.parameters() if part.requires_grad])
        policy.zero_grad(set_to_none=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) and a.any() for a, b in zip(*gradients, strict=True))


def test_a_is_drawn_from_the_seed_alone(tiny_model_folder):
    drawn = []
    for global_seed, seed in ((0, 5), (1, 5), (0, 6)):
        torch.manual_seed(global_seed)
        states = torch.get_rng_state()
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        add_adapters(model, SFTConfig(**LORA, seed=seed))
        assert torch.equal(torch.get_rng_state(), states)
        drawn.append(model.model.layers[1].mlp.down_proj.lora_a)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].abs().max() <= 128**-0.5 and drawn[0].abs().max() > 0.9 * 128**-0.5


def test_a_model_without_linear_layers_is_refused_in_one_line(tmp_path, tiny_model_folder, tokenizer):
    shape = {"vocab_size": 512, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    small = {"max_context_tokens": 256, "sampling_max_tokens": 8}
    with pytest.raises(
        UserError, match=r"^lora_rank = 4: GPT2LMHeadModel has no torch.nn.Linear .*lora_rank=0"
    ) as error:
        load_policy(SFTConfig(**LORA, **small, model=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_step_without_rows_gives_adapters_alone_a_gradient_of_zero(tiny_model):
    policy = with_adapters(tiny_model)
    config = GRPOConfig(**LORA, train_batch_size=8, gradient_accumulation_steps=2, rollout_batch_size=8)
    prepare_training(policy, config)
    accumulate = partial(GRPO_train.accumulate_gradients, policy, [], 0, config)
    sums, norm, _ = compute_clipped_gradient(policy, accumulate, config)
    assert sums["num_trained_rows"] == 0 and norm == 0
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None and not parameter.grad.any()) == name.endswith(("lora_a", "lora_b"))


def test_without_adapters_nothing_changes(tiny_model, tokenizer, tmp_path):
    """The same parameters in the optimizer, the same tensors to the engine, the same files."""
    assert merged_model(tiny_model) is tiny_model
    plain = tiny_model.state_dict()
    for (name, tensor), expected in zip(merged_state_dict(tiny_model), plain, strict=True):
        assert name == expected and tensor.data_ptr() == plain[name].data_ptr() and tensor.dtype == plain[name].dtype
    optimizer = prepare_training(tiny_model, SFTConfig())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in tiny_model.parameters()}
    state = TrainingState(tiny_model, tokenizer, optimizer, "data")
    write_checkpoint(tmp_path / "step_000000", state, {})
    assert not (tmp_path / "step_000000" / ADAPTERS).exists()
    load_adapters(tiny_model, tmp_path / "step_000000")


def train_with(policy, config, num_steps=3):
    """A few optimizer steps as in SFT_train."""
    optimizer = prepare_training(policy, config)
    for _ in range(num_steps):
        (-scores_of(policy).sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def test_frozen_weights_stay_and_a_checkpoint_is_as_large_as_said(base, tokenizer, tmp_path):
    frozen = {name: part.detach().clone() for name, part in base.state_dict().items()}
    policy = with_adapters(base, is_trained=False)
    digest = fingerprint_frozen(policy)
    optimizer = train_with(policy, SFTConfig(**LORA, learning_rate=1e-2))
    assert fingerprint_frozen(policy) == digest
    assert all(torch.equal(part, policy.state_dict()[name]) for name, part in frozen.items())
    assert all(layer.lora_a.any() and layer.lora_b.any() for layer in adapted_layers(policy).values())
    state = TrainingState(policy, tokenizer, optimizer, "data")
    write_checkpoint(tmp_path / "step_000003", state, {})
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "step_000003").rglob("*.safetensors"))
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    num_trained = sum(parameter.numel() for parameter in base.parameters() if parameter.requires_grad)
    assert checkpoint_bytes(state) - 64 * 2**20 == 4 * (num_parameters + 2 * num_trained + 28)  # 28 step counts
    assert 0 <= num_bytes - 4 * (num_parameters + 2 * num_trained) < 20_000  # the files' headers
    assert len(optimizer_tensors(policy, optimizer)) == 14 * 2 * 3


def test_adapters_that_do_not_fit_are_refused_in_one_line(tiny_model_folder, tiny_model, tmp_path):
    save_adapters(with_adapters(tiny_model), tmp_path)

    def load(**settings):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        if settings.pop("is_other", False):
            model.model.norm.weight.data[3] *= 1.0001
        if settings.get("lora_rank", 4):
            with_adapters(model, is_trained=False, **settings)
        load_adapters(model, tmp_path)
        return model

    assert torch.equal(scores_of(load()), scores_of(tiny_model))
    for settings, message in (
        ({"lora_rank": 8}, r"^lora_rank=8 lora_alpha=8: \S* was made with lora_rank=4 lora_alpha=8; go on with"),
        ({"lora_alpha": 4.0}, r"^lora_rank=4 lora_alpha=4: \S* was made with lora_rank=4 lora_alpha=8; go on with"),
        ({"lora_rank": 0}, r"^lora_rank=0: \S* was made with lora_rank=4 lora_alpha=8; go on with"),
        ({"is_other": True}, "was trained beside other frozen weights than model and compute_dtype name now"),
        ({"compute_dtype": "bfloat16"}, "was trained beside other frozen weights"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load(**settings)
        assert "\n" not in str(error.value)
    (tmp_path / ADAPTERS).unlink()
    with pytest.raises(UserError, match=r"^lora_rank=4 lora_alpha=8: \S* was made with lora_rank=0;"):
        load()


def test_the_engine_gets_the_merged_weights(engine, tiny_model_folder):
    policy, _ = load_policy(SFTConfig(**LORA, model=tiny_model_folder, max_context_tokens=384, sampling_max_tokens=8))
    train_with(policy, SFTConfig(**LORA, learning_rate=3e-2), num_steps=5)
    policy.eval()
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    load_policy_into_vllm_instance(policy, engine)
    metrics = check_policy_sync(policy, engine, prompts, 0, num_tokens=16, max_error=1.0001)
    assert metrics["sync_multiplicative_error"] < 1.0001
    for layer in adapted_layers(policy).values():
        layer.lora_b.data.zero_()  # the base model: what the engine would sample from without the merge
    with pytest.raises(UserError, match="engine and policy disagree"):
        check_policy_sync(policy, engine, prompts, 0, num_tokens=16, max_error=1.0001)


def leave_as_after_a_kill(folder, copy, step):
    """Copy a finished run's folder, without what came after a step's checkpoint but for the metrics."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "final")
    for path in copy.glob("checkpoints/step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("name", ["SFT", "SFT in bfloat16", "GRPO", "EI"])
def test_a_resumed_run_is_the_run_that_would_have_been(
    name, engine, tiny_model_folder, answering_model_folder, tmp_path, monkeypatch
):
    """Bit for bit, with the scripts. The model loads in plain Transformers, and training has changed it."""
    script, arguments_of, model, settings = {
        "SFT": (SFT_train, tiny_arguments, tiny_model_folder, {}),
        "SFT in bfloat16": (SFT_train, tiny_arguments, tiny_model_folder, {"compute_dtype": "bfloat16"}),
        "GRPO": (
            GRPO_train,
            grpo_arguments,
            answering_model_folder,
            {"n_grpo_steps": 3, "rollout_batch_size": 32, "train_batch_size": 32},
        ),
        "EI": (expert_iteration, expert_iteration_arguments, answering_model_folder, {}),
    }[name]
    settings |= {"lora_rank": 4, "lora_alpha": 8, "learning_rate": "1e-2", "checkpoint_interval": 1, "keep_last": 9}
    monkeypatch.setattr("SFT_train.Evaluator", FakeEvaluator)  # the other two sample, so that they need the engine
    monkeypatch.setattr("policy_evaluation.init_vllm", lambda *_, **__: engine)
    script.main(arguments_of(model, tmp_path, run_name="straight", **settings))
    leave_as_after_a_kill(tmp_path / "straight", tmp_path / "killed", step=1)
    script.main([f"resume={tmp_path / 'killed'}"])
    differences = find_differences(tmp_path / "straight", tmp_path / "killed")
    # Without an engine there are no samples.
    assert differences == (["samples/* differ"] if script is SFT_train else [])
    checkpoints = sorted((tmp_path / "straight").glob("checkpoints/step_*"))
    assert len(checkpoints) == (2 if name == "EI" else 3)
    for checkpoint in checkpoints:
        for file in (ADAPTERS, "optimizer.safetensors", "model/model.safetensors"):
            other = tmp_path / "killed" / "checkpoints" / checkpoint.name / file
            assert (checkpoint / file).read_bytes() == other.read_bytes()
    assert (tmp_path / "killed" / "environment_resumed_000001.json").exists()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "killed" / "final").state_dict()
    first = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert trained.keys() == first.keys()
    assert any(not torch.equal(trained[name], first[name]) for name in first)

    shutil.rmtree(tmp_path / "killed" / "final")
    with pytest.raises(UserError, match="was made with lora_rank=4"):
        script.main([f"resume={tmp_path / 'killed'}", "lora_rank=8", "resume_with_changes=true"])


def train_the_embedded_model(background):
    """Two steps of SFT without an engine, and the same run as it was after the first, resumed."""
    folder = background.new_folder("lora")
    settings = {"run_name": "straight", "max_steps": 2, "eval_interval": 2, "checkpoint_interval": 1, "keep_last": 9}
    settings |= {"lora_rank": 4, "lora_alpha": 8, "learning_rate": "1e-3", "train_batch_size": 2}

    def run(*arguments):  # 0: it is not killed
        return start("tests/gpu/train_without_engine.py", ["0", *arguments], folder / "log", background.start).wait()

    statuses = [run(*tiny_arguments("smollm2-135m", folder, **settings))]
    leave_as_after_a_kill(folder / "straight", folder / "killed", step=1)
    return folder, [*statuses, run(f"resume={folder / 'killed'}")]


@pytest.mark.background(job=train_the_embedded_model)
def test_the_embedded_model_is_trained_resumed_and_loaded_by_transformers(background):
    """Of the checkpoint's frozen weights some have changed by the adapters: those of the blocks' linear layers."""
    folder, statuses = background.result(train_the_embedded_model)
    log = (folder / "log").read_text()
    assert statuses == [0, 0] and "going on after step 1" in log, log[-3000:]
    assert find_differences(folder / "straight", folder / "killed") == ["samples/* differ"]  # there are none
    first, trained = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).state_dict()
        for name in (resolve_model("smollm2-135m"), folder / "killed/final")
    )
    changed = {name for name in first if not torch.equal(first[name], trained[name])}
    assert first.keys() == trained.keys() and changed
    assert all(name.startswith("model.layers.") and name.endswith("_proj.weight") for name in changed)
    shutil.rmtree(folder)  # some GB
