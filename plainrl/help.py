"""What `--help` and docs/configuration.md say: the keys by group, and one key explained.

`uv run python -m plainrl.help > docs/configuration.md` writes the page again; a test compares it with the schema.
"""

import difflib
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from plainrl.config import LOSSES, ExpertIterationConfig, GRPOConfig, RunConfig, SFTConfig
from plainrl.devices import run_command
from plainrl.records import UserError
from plainrl.reward_names import REWARD_FUNCTIONS
from plainrl.supplement_config import BenchmarkConfig, DPOConfig

# The algorithm's own keys first. Every key of every schema stands in exactly one group.
GROUPS = {
    "SFT": (
        *("num_sft_examples", "examples_seed", "filter_correct", "loss_on", "packing", "seq_length"),
        *("dropout", "arithmetic_corrupt_fraction"),
    ),
    "DPO": ("beta", "num_pairs", "num_validation_pairs"),
    "SFT and DPO": ("num_epochs", "max_steps", "lr_schedule", "warmup_fraction"),
    "supplement's evaluations": ("tasks", "benchmark_data", "num_questions", "generator"),
    "GRPO": (
        *("n_grpo_steps", "rollout_batch_size", "epochs_per_rollout_batch"),
        *("recipe", "loss_type", "cliprange", "cliprange_high", "cliprange_dual", "ratio_cap", "ratio_level"),
        *("kl_coefficient", "kl_estimator", "entropy_coefficient", "engine_correction", "engine_correction_cap"),
        *("use_std_normalization", "advantage_eps", "mask_truncated_responses", "overlong_cache_tokens"),
        *("dynamic_sampling", "max_resampling_rounds", "drop_solved_questions", "solved_pass_rate", "solved_visits"),
    ),
    "expert iteration": ("n_ei_steps", "ei_batch_size", "ei_epochs", "keep_correct"),
    "first policy, rollouts": ("warm_start", "group_size", "max_sampled_tokens", "num_logged_groups"),
    "batch and optimizer": (
        *("train_batch_size", "gradient_accumulation_steps", "microbatch_tokens"),
        *("length_normalization", "normalize_constant"),
        *("optimizer", "learning_rate", "adam_betas", "weight_decay", "max_grad_norm", "loss_scale"),
        *("lora_rank", "lora_alpha"),
    ),
    "model, prompt, reward, data": (
        *("model", "prompt", "fill_prompts", "reward", "train_data", "validation_data", "extra_validation_data"),
        *("validation_fraction", "validation_seed", "question_field", "answer_field", "trace_field"),
        *("arithmetic_terms", "arithmetic_max_term", "max_context_tokens", "drop_long_examples"),
    ),
    "sampling": (
        *("sampling_temperature", "sampling_top_p", "sampling_min_tokens", "sampling_max_tokens", "stop_string"),
    ),
    "evaluation": (
        *("eval_interval", "num_eval_examples", "num_final_eval_examples", "num_eval_samples"),
        *("eval_sampling_temperature", "num_entropy_responses", "num_printed_examples"),
    ),
    "devices and precision": (
        *("policy_device", "evaluator_device", "compute_dtype", "engine_dtype", "attn_implementation"),
        *("float32_output_layer", "gradient_checkpointing", "compile_policy", "scoring_batch_size"),
    ),
    "engine": (
        *("gpu_memory_utilization", "engine_cache_gib", "engine_eager", "max_sync_error", "num_sync_tokens"),
        "rollouts_ahead",
    ),
    "several ranks": ("num_replicas", "engine_tensor_parallel"),
    "run": (
        *("preset", "seed", "run_name", "runs_dir", "checkpoint_interval", "keep_last", "keep_best", "resume"),
        *("resume_with_changes", "wandb_mode", "wandb_project"),
    ),
    "time limits": (
        "max_training_hours",
        *(
            "max_rollout_seconds",
            "max_grade_seconds",
            "max_reward_seconds",
            "max_train_seconds",
            "max_evaluate_seconds",
            "max_save_seconds",
        ),
    ),
}
# Keys that take a name of a table. The names are printed by `--help`, so that a new one needs no other change.
TABLES: dict[str, Mapping[str, Any]] = {"loss_type": LOSSES, "reward": REWARD_FUNCTIONS}
BLOCKS: dict[str, tuple[str, ...]] = {"preset": ("auto",), "recipe": ()}  # keys that name a block of the YAML file
FLAGS = {"--help", "-h", "--show"}  # what a command line may ask of any script
SCHEMAS = {  # schema -> command, YAML file
    SFTConfig: ("SFT_train.py", "config.yaml"),
    GRPOConfig: ("GRPO_train.py", "grpo_train.yaml"),
    ExpertIterationConfig: ("-m experiments.expert_iteration", "experiments/expert_iteration.yaml"),
    DPOConfig: ("-m supplement.DPO_train", "supplement/dpo_train.yaml"),
    BenchmarkConfig: ("-m supplement.evaluate_benchmark", "supplement/evaluate_benchmark.yaml"),
}


def help_text(
    schema: type[RunConfig],
    yaml_path: str | Path,
    command: str,
    values: Mapping[str, Any] | None = None,
    yaml_values: Mapping[str, Any] | None = None,
) -> str:
    """Return every key of a schema with its value, choices and meaning, by group.

    Args:
        schema: the script's configuration.
        yaml_path: its YAML file.
        command: how the script is started, after `python`.
        values: the values of the preset that would be taken. Without them the defaults are shown alone.
        yaml_values: the content of the YAML file, whose presets and recipes are named.
    """
    program = f"{run_command('python')} {command}"
    lines = [
        f"usage: {program} [key=value ...]",
        f"       {program} --help KEY    explains one key",
        f"       {program} --show [key=value ...]    tells where each value is from",
        "",
        f"Values come from the defaults, then {Path(yaml_path).name}, its preset, its recipe, each config=FILE,",
        "the command line. The last counts.",
    ]
    if values:
        lines.append(f"Below are those of preset {values['preset']}; --help preset=NAME shows another's.")
    for group, keys in keys_by_group(schema).items():
        lines += ["", f"{group}:"]
        for key in keys:
            default, choices = default_of(schema, key), names_of(schema, key, yaml_values or {}, yaml_path)
            shown = as_yaml((values or {}).get(key, schema.model_fields[key].default))
            lines += [
                f"  {key}={shown}" + (f"   (default {default or 'empty'})" if shown != default else ""),
                _indented(f"{schema.model_fields[key].description}{f' (choices: {choices})' if choices else ''}", 6),
            ]
    return "\n".join(lines)


def show_text(config: RunConfig, sources: Mapping[str, str], notes: Sequence[str] = ()) -> str:
    """Return a resolved configuration as YAML, notes first. A comment says where each value comes from."""
    values, here = config.model_dump(mode="json"), f"{Path.cwd()}/"
    lines = []
    for group, keys in keys_by_group(type(config)).items():
        lines += ["", f"# {group}"] if lines else [f"# {group}"]
        lines += [
            f"{f'{key}: {as_yaml(values[key])}':<50}  # {sources.get(key, 'default').removeprefix(here)}"
            for key in keys
        ]
    return "\n".join([*(f"# {note}" for note in notes), *lines])


def explain(schema: type[RunConfig], yaml_path: str | Path, key: str, yaml_values: Mapping[str, Any]) -> str:
    """Return what one key means, its type and default, and its values in the YAML file.

    Raises:
        UserError: there is no such key; names the nearest one.
    """
    if key == "config":
        return f"config\n  a YAML file whose values go over those of {Path(yaml_path).name}; of several the last counts"
    if key not in schema.model_fields:
        near = difflib.get_close_matches(key, schema.model_fields, n=1, cutoff=0.5)
        raise UserError(f"--help {key}: no such key; {f'did you mean {near[0]}?' if near else '--help lists them'}")
    group = next(group for group, keys in keys_by_group(schema).items() if key in keys)
    lines = [
        f"{key}   ({group})",
        _indented(schema.model_fields[key].description, 2),
        f"  type      {type_of(schema, key)}",
        f"  default   {default_of(schema, key)}",
    ]
    if key in (*TABLES, *BLOCKS):
        lines.append(f"  names     {names_of(schema, key, yaml_values, yaml_path)}")
    if key in yaml_values:
        lines.append(f"  {Path(yaml_path).name}   {as_yaml(yaml_values[key])}")
    for kind in ("presets", "recipes"):
        for name, values in blocks_of(yaml_values, kind, yaml_path).items():
            if key in values:
                lines.append(f"  {kind[:-1]} {name}   {as_yaml(values[key])}")
    return "\n".join(lines)


def names_of(schema: type[RunConfig], key: str, yaml_values: Mapping[str, Any], yaml_path: str | Path) -> str:
    """Return the names that a key takes, in words: `choices_of`, or the presets or recipes of the YAML file."""
    if key not in BLOCKS:
        return choices_of(schema, key)
    return ", ".join([*BLOCKS[key], *blocks_of(yaml_values, f"{key}s", yaml_path)]) if yaml_values else ""


def blocks_of(yaml_values: Mapping[str, Any], kind: str, yaml_path: str | Path) -> dict[str, dict[str, Any]]:
    """Return the blocks of settings of a YAML file by name: its `presets`, or its `recipes`.

    Raises:
        UserError: they are not blocks of settings.
    """
    blocks = yaml_values.get(kind) or {}
    if not isinstance(blocks, dict) or not all(isinstance(block, dict) for block in blocks.values()):
        raise UserError(f"{yaml_path}: {kind} must hold one block of `key: value` lines per name")
    return blocks


def configuration_page() -> str:
    """Return docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Every key, its default and its meaning. This page is generated:",
        "",
        "```bash",
        "uv run python -m plainrl.help > docs/configuration.md",
        "```",
        "",
        "Values come from the defaults below, then the YAML file, its preset, its recipe if one is named, then each",
        "`config=FILE`, then `key=value` arguments. The last counts. FILE is YAML of your own; there may be several.",
        "Presets and recipes stand in the YAML files. `--help KEY` shows what they give to a key.",
        "",
        "| script | YAML file |",
        "|---|---|",
    ]
    lines += [f"| `{command}` | `{path}` |" for command, path in SCHEMAS.values()]
    for group in GROUPS:
        lines += ["", f"## {group[0].upper()}{group[1:]}", "", "| key | default | meaning |", "|---|---|---|"]
        for key in GROUPS[group]:
            owners = [schema for schema in SCHEMAS if key in schema.model_fields]
            defaults: dict[str, str] = {}  # default -> the first script that has it
            meanings: dict[str, str] = {}
            for schema in owners:
                defaults.setdefault(f"`{default_of(schema, key) or '(empty)'}`", SCHEMAS[schema][0])
                meanings.setdefault(str(schema.model_fields[key].description).replace("|", "\\|"), SCHEMAS[schema][0])
            shown = [
                ", ".join(f"{text} ({command})" if len(texts) > 1 else text for text, command in texts.items())
                for texts in (defaults, meanings)
            ]
            lines.append(f"| `{key}` | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def keys_by_group(schema: type[RunConfig]) -> dict[str, list[str]]:
    """Return the keys of a schema by group; those of no group come first, as `other`."""
    grouped = {group: [key for key in keys if key in schema.model_fields] for group, keys in GROUPS.items()}
    known = {key for keys in GROUPS.values() for key in keys}
    other = [key for key in schema.model_fields if key not in known]
    return {group: keys for group, keys in {"other": other, **grouped}.items() if keys}


def default_of(schema: type[RunConfig], key: str) -> str:
    """Return the default of a key as it would be written on the command line."""
    return as_yaml(schema.model_fields[key].default)


def type_of(schema: type[RunConfig], key: str) -> str:
    """Return the type of a key, or its choices.

    >>> type_of(GRPOConfig, "length_normalization"), type_of(GRPOConfig, "adam_betas")
    ('masked_mean, masked_normalize or token_mean', 'tuple[float, float]')
    """
    if key in TABLES:
        return "a name below, or file.py:function"
    annotation = typing.get_type_hints(schema)[key]  # without the limits of its values
    plain = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
    return choices_of(schema, key) or plain


def choices_of(schema: type[RunConfig], key: str) -> str:
    """Return the names that a key takes, in words. It is empty if the key takes more than names.

    >>> choices_of(GRPOConfig, "use_std_normalization"), choices_of(GRPOConfig, "num_eval_examples")
    ('true, false, batch or mean', '')
    """
    if key in TABLES:
        return ", ".join(TABLES[key])
    annotation = schema.model_fields[key].annotation
    parts = [annotation] if typing.get_origin(annotation) is typing.Literal else typing.get_args(annotation)
    choices: list[typing.Any] = [
        choice for part in parts for choice in (("true", "false") if part is bool else typing.get_args(part) or [None])
    ]
    if not choices or not all(isinstance(choice, str) for choice in choices):
        return ""
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def as_yaml(value: Any) -> str:
    """Return a value in YAML, in one line.

    >>> as_yaml((0.9, 0.95)), as_yaml(1e-05), as_yaml(None)
    ('[0.9, 0.95]', '1.0e-05', 'null')
    """
    if isinstance(value, tuple):
        value = list(value)
    if value == "":
        return ""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("\n...")


def _indented(text: str | None, num_spaces: int) -> str:
    return textwrap.fill(str(text), 100, initial_indent=" " * num_spaces, subsequent_indent=" " * num_spaces)


if __name__ == "__main__":
    from plainrl.cli import run_main  # it imports this module

    run_main(lambda arguments: print(configuration_page(), end=""))
