"""Every preset of every YAML file is valid; settings that are seldom meant are said."""

import pytest
import yaml
from tiny import REPOSITORY

from plainrl.cli import load_config
from plainrl.config import ExpertIterationConfig, GRPOConfig, SFTConfig
from plainrl.supplement_config import BenchmarkConfig, DPOConfig

SCHEMAS = {
    "config.yaml": SFTConfig,
    "grpo_train.yaml": GRPOConfig,
    "experiments/expert_iteration.yaml": ExpertIterationConfig,
    "supplement/instruction_sft.yaml": SFTConfig,
    "supplement/dpo_train.yaml": DPOConfig,
    "supplement/evaluate_benchmark.yaml": BenchmarkConfig,
}
OF_MATH = list(SCHEMAS)[:3]  # trained and evaluated on MATH
OF_TRAINING = list(SCHEMAS)[:-1]


def presets_of(path):
    return list(yaml.safe_load((REPOSITORY / path).read_text())["presets"])


@pytest.mark.parametrize("preset", presets_of("grpo_train.yaml"))
@pytest.mark.parametrize("recipe", ["assignment", "dr_grpo", "dapo", "gspo", "cispo", "olmo3"])
def test_every_recipe_changes_the_method_alone(recipe, preset):
    """Sizes, lengths and learning rate stay those of the preset."""
    path = REPOSITORY / "grpo_train.yaml"
    plain = load_config(GRPOConfig, path, [f"preset={preset}"]).model_dump()
    config = load_config(GRPOConfig, path, [f"preset={preset}", f"recipe={recipe}"]).model_dump()
    block = yaml.safe_load(path.read_text())["recipes"][recipe]
    assert {key: config[key] for key in block} == block
    assert {key for key in plain if plain[key] != config[key]} <= {"recipe", *block}
    kept = {"learning_rate", "train_batch_size", "rollout_batch_size", "group_size", "sampling_max_tokens", "model"}
    assert not kept & block.keys()


@pytest.mark.parametrize(("path", "preset"), [(path, preset) for path in SCHEMAS for preset in presets_of(path)])
def test_every_preset_is_valid(path, preset):
    config = load_config(SCHEMAS[path], REPOSITORY / path, [f"preset={preset}"])
    assert config.preset == preset
    assert ("cuda" in config.policy_device) == ("gpu" in preset or "nodes" in preset)


def test_every_yaml_file_has_the_presets():
    found = [path for folder in (".", "experiments", "supplement") for path in REPOSITORY.glob(f"{folder}/*.yaml")]
    assert {str(path.relative_to(REPOSITORY)) for path in found} == set(SCHEMAS)
    for path in SCHEMAS:
        assert {"laptop", "one-gpu", "two-gpu", "small-gpu"} <= set(presets_of(path))
    for path in OF_MATH:
        assert {"eight-gpu", "two-nodes"} <= set(presets_of(path))


def test_gpu_presets():
    one, two = (load_config(SFTConfig, REPOSITORY / "config.yaml", [f"preset={p}"]) for p in ("one-gpu", "two-gpu"))
    assert one.model == two.model == "Qwen/Qwen2.5-Math-1.5B"
    assert one.compute_dtype == two.compute_dtype == "bfloat16"
    assert one.shares_gpu and not two.shares_gpu
    assert (two.policy_device, two.evaluator_device) == ("cuda:1", "cuda:0")


@pytest.mark.parametrize(("preset", "num_replicas"), [("eight-gpu", 1), ("two-nodes", 2)])
def test_presets_of_several_ranks_share_each_card_with_the_engine(preset, num_replicas):
    for path in OF_MATH:
        config = load_config(SCHEMAS[path], REPOSITORY / path, [f"preset={preset}"])
        assert config.shares_gpu and config.policy_device == "cuda:0" and config.num_replicas == num_replicas
        assert config.model == "Qwen/Qwen2.5-Math-7B"


def test_gpu_presets_name_files_that_the_author_of_the_data_documents():
    """Two files of traces, all and filtered, and one of validation questions, in the folder sft-reason/."""
    traces, filtered, validation = (
        f"data/sft-reason/{name}.jsonl" for name in ("sft_gpt-oss-120b", "sft_gpt-oss-120b_filtered", "val")
    )
    train_data = dict(zip(OF_MATH, (filtered, traces, traces), strict=True))
    for path in OF_MATH:
        for preset in ("one-gpu", "two-gpu", "small-gpu"):
            config = load_config(SCHEMAS[path], REPOSITORY / path, [f"preset={preset}"])
            assert (config.train_data, config.validation_data) == (train_data[path], validation), (path, preset)


@pytest.mark.parametrize("path", OF_TRAINING)
def test_the_preset_for_small_cards_trains_adapters_at_ten_times_the_learning_rate(path):
    small, one = (
        load_config(SCHEMAS[path], REPOSITORY / path, [f"preset={name}"]) for name in ("small-gpu", "one-gpu")
    )
    assert small.lora_rank > 0 == one.lora_rank and small.gradient_checkpointing
    assert (
        small.shares_gpu == small.needs_engine == (path != "supplement/dpo_train.yaml")
    )  # whose pairs ask no question
    assert small.learning_rate == pytest.approx(10 * one.learning_rate)
    assert small.warnings() == one.warnings() == []


@pytest.mark.parametrize("path", OF_MATH)
def test_every_prompt_of_math_fits_the_gpu_presets(path):
    """The longest of 12,500, in the r1_zero template: 1,747 tokens of Qwen2.5-Math, which has a context of 4,096."""
    config = load_config(SCHEMAS[path], REPOSITORY / path, ["preset=one-gpu"])
    assert 1747 + config.sampling_max_tokens <= config.max_context_tokens <= 4096


def test_an_engine_that_leaves_the_policy_no_room_is_said(capsys):
    for share, is_said in (("0.35", False), ("0.85", True)):
        load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=one-gpu", f"gpu_memory_utilization={share}"])
        assert (f"gpu_memory_utilization = {share}: the policy" in capsys.readouterr().out) == is_said


def test_training_on_one_task_and_evaluating_on_another_is_said(capsys):
    load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=laptop", "train_data=mine.jsonl"])
    assert "trained on mine.jsonl, but evaluated on embedded arithmetic" in capsys.readouterr().out
    load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=laptop", "validation_data=mine.jsonl"])
    assert "warning" not in capsys.readouterr().out


def test_validation_does_not_change_values():
    values = {"learning_rate": 1e-4, "train_batch_size": 64, "num_epochs": 2.0}
    dumped = SFTConfig.model_validate(values).model_dump()
    assert {name: dumped[name] for name in values} == values


@pytest.mark.parametrize("schema", [SFTConfig, ExpertIterationConfig])
def test_a_constant_that_has_no_effect_is_said(schema):
    said = "normalize_constant = 100.0 has no effect with length_normalization = token_mean"
    assert said in schema(normalize_constant=100, length_normalization="token_mean").warnings()
    for settings in ({"normalize_constant": 100}, {"length_normalization": "token_mean"}, {}):
        assert not any("normalize_constant" in text for text in schema(**settings).warnings())


@pytest.mark.parametrize(
    ("schema", "settings", "said"),
    [
        (SFTConfig, {"warmup_fraction": 0.1}, "warmup_fraction = 0.1 has no effect with lr_schedule = constant"),
        (SFTConfig, {"lora_alpha": 16}, "lora_alpha = 16.0 has no effect without lora_rank"),
        (
            GRPOConfig,
            {"advantage_eps": 1e-4, "use_std_normalization": False},
            "advantage_eps = 0.0001 has no effect without use_std_normalization",
        ),
        (
            GRPOConfig,
            {"engine_correction": "sequence_mean_mask"},
            "engine_correction_cap = 2 masks no mean over a response: use 1.001 to 1.1",
        ),
    ],
)
def test_idle_keys_are_said(schema, settings, said):
    assert said in schema(**settings).warnings()
    needed = {"lr_schedule": "cosine", "lora_rank": 4} if schema is SFTConfig else {}
    needed |= {"use_std_normalization": True} if "advantage_eps" in settings else {}
    needed |= {"engine_correction_cap": 1.01} if "engine_correction" in settings else {}
    assert said.partition(" ")[0] not in " ".join(schema(**(settings | needed)).warnings())


def test_the_temperature_of_evaluations():
    assert SFTConfig(sampling_temperature=0.7).evaluation_temperature == 0.7
    greedy = GRPOConfig(eval_sampling_temperature=0)  # which sampling_temperature may not be, in GRPO
    assert (greedy.evaluation_temperature, greedy.sampling_temperature) == (0, 1)
    with pytest.raises(ValueError, match="num_eval_samples = 4 samples the same response each time at temperature 0"):
        GRPOConfig(eval_sampling_temperature=0, num_eval_samples=4)
    assert SFTConfig(sampling_temperature=0, eval_sampling_temperature=1, num_eval_samples=4)
    for value in (-1, 0.001, 3):
        with pytest.raises(ValueError, match="eval_sampling_temperature"):
            SFTConfig(eval_sampling_temperature=value)
