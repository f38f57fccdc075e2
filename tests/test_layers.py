"""Configuration as people expect it: files overlay, the last key wins, --show and --help say where values come from."""

import contextlib
import os
import subprocess
import sys

import pytest
import yaml
from tiny import REPOSITORY

from plainrl.cli import load_config
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.help import choices_of
from plainrl.lookup import TableOf
from plainrl.records import UserError

GRPO_YAML = REPOSITORY / "grpo_train.yaml"
PROGRAMS = (
    *(["GRPO_train.py"], ["SFT_train.py"], ["policy_evaluation.py"], ["-m", "experiments.expert_iteration"]),
    *(["-m", "supplement.DPO_train"], ["-m", "supplement.evaluate_benchmark"], ["-m", "experiments.chat"]),
)


def write(path, text):
    path.write_text(text)
    return f"config={path}"


def test_a_file_with_one_key_overlays_the_preset(tmp_path):
    own = write(tmp_path / "mine.yaml", "learning_rate: 3.0e-5\n")
    plain = load_config(GRPOConfig, GRPO_YAML, ["preset=laptop"]).model_dump()
    changed = load_config(GRPOConfig, GRPO_YAML, ["preset=laptop", own]).model_dump()
    assert {key for key in plain if plain[key] != changed[key]} == {"learning_rate"}
    assert (plain["n_grpo_steps"], changed["n_grpo_steps"], changed["warm_start"]) == (24, 24, "warm-start")


def test_later_files_and_the_command_line_win(tmp_path):
    first = write(tmp_path / "a.yaml", "seed: 1\ncliprange: 0.1\ntrain_batch_size: 32\n")
    second = write(tmp_path / "b.yaml", "seed: 2\ncliprange: 0.3\n")
    config = load_config(GRPOConfig, GRPO_YAML, ["preset=laptop", first, "seed=3", second])
    assert (config.seed, config.cliprange, config.train_batch_size) == (3, 0.3, 32)


def test_a_file_may_bring_presets_and_recipes_of_its_own(tmp_path):
    text = "preset: mine\nrecipe: short\npresets:\n  mine: {seed: 4}\n  laptop: {seed: 5}\n"
    own = write(tmp_path / "mine.yaml", text + "recipes:\n  short: {sampling_max_tokens: 32}\n")
    config = load_config(GRPOConfig, GRPO_YAML, [own])
    assert (config.preset, config.seed, config.recipe, config.sampling_max_tokens) == ("mine", 4, "short", 32)
    assert config.n_grpo_steps == GRPOConfig().n_grpo_steps  # of no preset of the script
    config = load_config(GRPOConfig, GRPO_YAML, [own, "preset=laptop", "recipe=dapo"])
    assert (config.seed, config.n_grpo_steps, config.dynamic_sampling, config.sampling_max_tokens) == (5, 24, True, 64)
    with pytest.raises(UserError, match=r"^preset = two: .*grpo_train.yaml and .*mine.yaml have laptop, .*, mine$"):
        load_config(GRPOConfig, GRPO_YAML, [own, "preset=two"])


def test_a_file_that_is_named_twice_counts_where_it_stands_last(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"seed: {seed}\n")
    arguments = ["preset=laptop", *(f"config={tmp_path / name}.yaml" for name in "aba")]
    assert load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", arguments).seed == 1


def test_a_mistake_in_an_overlay_names_its_file(tmp_path):
    own = write(tmp_path / "mine.yaml", "sed: 1\n")
    with pytest.raises(UserError, match=r"^unknown key sed \(.*mine.yaml\): did you mean seed\?$"):
        load_config(GRPOConfig, GRPO_YAML, ["preset=laptop", own])


def test_of_a_key_that_is_given_twice_the_last_counts():
    config = load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=laptop", "seed=1", "seed=2"])
    assert config.seed == 2


def shown_by(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(GRPOConfig, GRPO_YAML, arguments)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_show_prints_the_configuration_with_the_source_of_each_value(tmp_path, capsys):
    own = write(tmp_path / "mine.yaml", "cliprange: 0.3\n")
    arguments = ["preset=laptop", "recipe=dapo", own, "seed=7"]
    text = shown_by(["--show", *arguments], capsys)
    config = load_config(GRPOConfig, GRPO_YAML, arguments)
    loaded = write(tmp_path / "shown.yaml", text)  # it can be given as a file
    assert load_config(GRPOConfig, GRPO_YAML, [loaded]) == config
    sources = {line.partition(":")[0]: line.partition("  # ")[2] for line in text.splitlines() if "  # " in line}
    assert sources.keys() == GRPOConfig.model_fields.keys()
    expected = {
        "seed": "command line",
        "cliprange": f"{tmp_path}/mine.yaml",
        "dynamic_sampling": f"{GRPO_YAML}, recipe dapo",
        "n_grpo_steps": f"{GRPO_YAML}, preset laptop",
        "group_size": f"{GRPO_YAML}",
        "kl_estimator": "default",
    }
    here = f"{os.getcwd()}/"
    assert {key: sources[key] for key in expected} == {k: v.removeprefix(here) for k, v in expected.items()}


def test_help_shows_choices_and_the_values_of_the_preset(capsys):
    text = shown_by(["--help", "preset=one-gpu"], capsys)
    lines = text.splitlines()
    preset = yaml.safe_load(GRPO_YAML.read_text())["presets"]["one-gpu"]
    assert preset["sampling_max_tokens"] == 1024 and preset["eval_interval"] == 5
    assert "  eval_interval=5   (default 50)" in lines and "  sampling_max_tokens=1024" in lines
    assert "Below are those of preset one-gpu; --help preset=NAME shows another's." in lines
    words = " ".join(text.split())
    for choices in (
        "(choices: no_baseline, reinforce_with_baseline, grpo_clip, grpo_no_clip, cispo)",
        "(choices: r1_zero, question_only)",
        "(choices: masked_mean, masked_normalize or token_mean)",
        "(choices: true, false, batch or mean)",
    ):
        assert choices in words
    assert choices_of(SFTConfig, "lr_schedule") == "constant or cosine"
    blocks = yaml.safe_load(GRPO_YAML.read_text())
    assert f"(choices: auto, {', '.join(blocks['presets'])})" in words
    assert f"(choices: {', '.join(blocks['recipes'])})" in words
    assert f"  names     {', '.join(blocks['recipes'])}\n" in shown_by(["--help", "recipe"], capsys)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("seed=fast", "^seed = 'fast' \\(command line\\): "),
        ("sed: 1\n", r"^unknown key sed \(.*mine.yaml\): did you mean seed\?$"),
    ],
)
def test_a_typo_is_named_before_torch_is_asked_for_gpus(monkeypatch, tmp_path, argument, message):
    """Where there is a driver, `preset: auto` waits for torch. What no preset can mend is said before."""
    monkeypatch.setattr("plainrl.cli.has_gpu_driver", lambda: True)
    monkeypatch.setattr("plainrl.cli.choose_preset", lambda: pytest.fail("asked"))
    given = argument if "=" in argument else write(tmp_path / "mine.yaml", argument)
    with pytest.raises(UserError, match=message):
        load_config(GRPOConfig, GRPO_YAML, [given])


def test_what_a_preset_can_mend_is_no_typo(monkeypatch):
    """The default of gradient_accumulation_steps, 128, would not divide this batch; that of the preset does."""
    monkeypatch.setattr("plainrl.cli.has_gpu_driver", lambda: True)
    monkeypatch.setattr("plainrl.cli.choose_preset", lambda: ("laptop", "as if"))
    assert load_config(GRPOConfig, GRPO_YAML, ["train_batch_size=32"]).preset == "laptop"


def test_help_asks_no_gpu(monkeypatch, capsys):
    """Else it would wait for torch; the preset that it shows is named."""
    monkeypatch.setattr("plainrl.devices.has_gpu_driver", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: pytest.fail("asked"))
    assert "Below are those of preset one-gpu;" in shown_by(["--help"], capsys)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("GRPO_helper", name) for name in ("LOSSES", "LENGTH_NORMALIZATIONS", "ADVANTAGE_SCALES")),
        *(("plainrl.corrections", name) for name in ("ENGINE_CORRECTIONS", "KL_ESTIMATORS", "RATIO_LEVELS")),
        ("SFT_helper", "LENGTH_NORMALIZATIONS"),
        ("plainrl.grading.rewards", "REWARD_FUNCTIONS"),
    ],
)
def test_the_names_of_a_table_in_the_source_are_those_of_the_table(module, name, monkeypatch):
    import importlib

    table = getattr(importlib.import_module(module), name)
    monkeypatch.delitem(sys.modules, module)
    named = TableOf(module, name)
    assert list(named) == list(table) and len(named) == len(table) and module not in sys.modules


def run_without_torch(arguments, tmp_path, piped=""):
    """Run a script where torch cannot be imported; return status, output, error and the seconds of CPU time."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    output, error = tmp_path / "output", tmp_path / "error"
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=output.open("w"),
        stderr=error.open("w"),
        text=True,
    )
    with contextlib.suppress(BrokenPipeError), process.stdin:  # most programs read nothing
        process.stdin.write(piped)
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone: other threads of the tests have theirs
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, output.read_text(), error.read_text(), usage.ru_utime + usage.ru_stime


def answer_within(limit, arguments, tmp_path):
    """Return status, output and error of a script that answers within a limit in seconds of CPU time.

    It has three tries. Programs beside the tests slow a core down, and what compiles bytecode first takes longer. An
    idle core takes about 0.6 s for most, and a busy one counts up to twice as much.
    """
    tries = []
    while not tries or (len(tries) < 3 and min(tries) >= limit):
        status, output, error, seconds = run_without_torch(arguments, tmp_path)
        tries.append(seconds)
    assert min(tries) < limit, f"{arguments} took {tries} seconds of CPU time"
    return status, output, error


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[-1])
def test_a_typo_and_help_are_answered_in_under_a_second(program, tmp_path):
    """Nothing large is imported before the arguments are read."""
    answers = {
        "sed=1": (2, "error: unknown key sed (command line): did you mean seed?\n"),
        "seed=fast": (2, "error: seed = 'fast' (command line): input should be a valid integer, "),
        "--help": (0, ""),
        "--show": (0, ""),
    }
    for argument, (status, message) in answers.items():
        returned, output, error = answer_within(1, [*program, argument], tmp_path)
        assert returned == status and error.startswith(message), error
        assert bool(output) == (status == 0)


def test_a_configuration_from_a_pipe_is_left_to_the_script(tmp_path):
    """It could not be read a second time."""
    arguments = ["SFT_train.py", "config=/dev/stdin"]
    assert run_without_torch(arguments, tmp_path, piped="sed: 1")[:3] == (1, "", "torch was imported\n")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["sweep", "--help"], 0, ""),
        (["sweep", "--dryrun"], 2, "usage: "),
        (["sweep", "gone.yaml"], 2, "error: config = gone.yaml: "),
        (["sweep", "experiments/sweeps/prompt.yaml", "sed=1"], 2, "error: experiments/sweeps/prompt.yaml, "),
        (["sweep", "experiments/sweeps/prompt.yaml", "--variant", "x"], 2, "error: --variant x: experiments/sweeps/"),
        (["runs", "--help"], 2, "error: usage: "),
        (["runs", "compare", "a"], 2, "error: usage: "),
        (["pass_at_k", "a"], 2, "error: usage: "),
    ],
)
def test_a_wrong_argument_of_a_program_without_configuration_is_answered_at_once(arguments, status, message, tmp_path):
    program, *others = arguments
    limit = 1.5  # a sweep resolves the settings of each of its runs
    returned, output, error = answer_within(limit, ["-m", f"experiments.{program}", *others], tmp_path)
    assert (returned, bool(output)) == (status, status == 0) and error.startswith(message), error


def test_the_programs_of_others_are_left_alone(tmp_path):
    """A program that is not in the list reads its own arguments."""
    status, _, error, _ = run_without_torch(["-m", "experiments.plot_results", "lerning_rate=1"], tmp_path)
    assert (status, error) == (1, "torch was imported\n")
