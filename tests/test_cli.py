"""Defaults, file, preset, command line: the later overrides; every mistake is one line that names field and fix."""

import os
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import yaml
from tiny import REPOSITORY

from plainrl.cli import load_config, newest_unfinished_run, run_main
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.folder_lock import lock_folder
from plainrl.grading.own_rewards import RewardError
from plainrl.records import UserError


@pytest.mark.parametrize(
    ("sizes", "preset", "reason"),
    [
        ([], "laptop", "0 CUDA devices present"),
        ([79.6], "one-gpu", "1 CUDA device present, memory 79.6 GiB"),
        ([39.5], "one-gpu", "1 CUDA device present, memory 39.5 GiB"),  # sold as 40 GB
        ([23.6], "small-gpu", "1 CUDA device present, memory 23.6 GiB"),
        ([44.4, 44.4], "two-gpu", "2 CUDA devices present, memory 44.4 and 44.4 GiB"),
        (
            [23.6, 23.6],
            "small-gpu",
            "2 CUDA devices present, cuda:0 samples and trains: docs/scaling.md, memory 23.6 and 23.6 GiB",
        ),
        (
            [79.6] * 8,
            "two-gpu",
            "8 CUDA devices present, cuda:0 samples, cuda:1 trains: docs/scaling.md, memory 79.6 and 79.6 GiB",
        ),
    ],
)
def test_auto_preset_follows_the_devices_and_says_so(monkeypatch, capsys, sizes, preset, reason):
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(sizes))
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(sizes))
    cards = [SimpleNamespace(total_memory=int(size * 2**30)) for size in sizes]
    monkeypatch.setattr("torch.cuda.get_device_properties", cards.__getitem__)
    assert load_config(SFTConfig, REPOSITORY / "config.yaml", []).preset == preset
    assert capsys.readouterr().out.startswith(f"preset: {preset} ({reason})\n")


def test_auto_preset_asks_no_card_that_cannot_be_used(monkeypatch):
    """With a driver that is too old, reading the memory would end in a traceback. `check_devices` names the driver."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: pytest.fail("asked"))
    assert load_config(SFTConfig, REPOSITORY / "config.yaml", []).preset == "one-gpu"


def test_order_of_precedence(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "seed: 1\nlearning_rate: 1e-5\ntrain_batch_size: 16\npresets:\n  laptop:\n    learning_rate: 2e-5\n"
    )
    config = load_config(SFTConfig, path, ["preset=laptop", "train_batch_size=024"])
    assert (config.seed, config.learning_rate, config.train_batch_size) == (1, 2e-5, 24)
    assert config.adam_betas == SFTConfig().adam_betas
    assert load_config(SFTConfig, path, ["preset=laptop", "learning_rate=3e-5"]).learning_rate == 3e-5


def test_a_recipe_overrides_the_preset_and_the_command_line_the_recipe(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "recipe: mine\ncliprange: 0.1\nlearning_rate: 1.0e-5\n"
        "recipes:\n  mine: {cliprange: 0.3, loss_type: grpo_clip}\n  other: {cliprange: 0.4}\n"
        "presets:\n  laptop: {cliprange: 0.2, learning_rate: 2.0e-5}\n"
    )

    def read(*arguments):
        config = load_config(GRPOConfig, path, ["preset=laptop", *arguments])
        return config.recipe, config.cliprange, config.loss_type, config.learning_rate

    assert read() == ("mine", 0.3, "grpo_clip", 2e-5)
    assert read("cliprange=0.25") == ("mine", 0.25, "grpo_clip", 2e-5)
    assert read("recipe=other") == ("other", 0.4, "reinforce_with_baseline", 2e-5)
    assert read("recipe=") == ("", 0.2, "reinforce_with_baseline", 2e-5)
    with pytest.raises(UserError, match=r"^recipe = dapo: .*own.yaml has mine, other$"):
        read("recipe=dapo")
    path.write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"^recipe = dapo: .*own.yaml has none$"):
        load_config(GRPOConfig, path, ["recipe=dapo"])
    with pytest.raises(UserError, match=r"^unknown key recipe \(command line\)"):
        load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=laptop", "recipe=dapo"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learning_rat=1"], "unknown key learning_rat (command line): did you mean learning_rate?"),
        (["learning_rate=true"], "learning_rate = True (command line): true and false are not numbers"),
        (["seed=on"], "seed = 'on' (command line): input should be a valid integer"),
        (["wandb_mode=off"], "wandb_mode = 'off' (command line): input should be 'auto', 'online', 'offline' or 'dis"),
        (["wandb_mode=false"], "wandb_mode = False (command line): input should be 'auto', 'online', 'offline' or"),
        (["lr_schedule=linear"], "lr_schedule = 'linear' (command line): input should be 'constant' or 'cosine'"),
        (
            ["engine_dtype=1"],
            "engine_dtype = 1 (command line): input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        (["arithmetic_terms=[2"], "arithmetic_terms = '[2' (command line): not YAML: "),
        (["run_name=a/b"], "run_name = 'a/b' (command line): the run's folder lies in runs_dir itself"),
        (["run_name=.."], "run_name = '..' (command line): the run's folder lies in runs_dir itself"),
        ([f"run_name={'é' * 120}"], "240 bytes are too many for the name of a folder: use at most 200"),
        ([f"seed={'9' * 5000}"], "(command line): input should be a finite number"),
        (["seed=20251126120000"], "seed = 20251126120000 (command line): input should be less than 4294967296"),
        (["zzzzzz=1"], "unknown key zzzzzz (command line): --help lists the keys"),
        (["learning_rate=fast"], "learning_rate = 'fast' (command line): input should be a valid number"),
        (["learning_rate=-1"], "learning_rate = -1 (command line): input should be greater than 0"),
        (["seed=2024-13-45"], "seed = '2024-13-45' (command line)"),
        (["num_epochs=.inf"], "num_epochs = inf (command line): input should be a finite number"),
        (["num_sync_tokens=5000"], "num_sync_tokens = 5000 leaves no tokens for a prompt"),
        (["prompt"], "argument 'prompt': write key=value"),
        (["preset=gpu"], "preset = gpu: "),
        (["config=none.yaml"], "config = none.yaml: No such file"),
        (
            ["train_batch_size=31", "gradient_accumulation_steps=2"],
            "= 31 is not a multiple of gradient_accumulation_steps = 2: train_batch_size = 30 or train_batch_size = 32",
        ),
        (["num_sft_examples=many"], "num_sft_examples = 'many'"),
        (["num_final_eval_examples=0"], "num_final_eval_examples = 0: must be at least 1, or all"),
        (["num_sft_examples=0"], "num_sft_examples = 0: must be at least 1, or all"),
        (["sampling_max_tokens=1024"], "sampling_max_tokens = 1024 leaves no tokens for a prompt"),
        (["sampling_min_tokens=65"], "sampling_min_tokens = 65 exceeds sampling_max_tokens = 64"),
        (["arithmetic_terms=[3,2]"], "arithmetic_terms = [3, 2]"),
        (["adam_betas=[0.9,1.0]"], "adam_betas = 1.0 (command line): input should be less than 1"),
        (["evaluator_device=cuda:1"], "evaluator_device = 'cuda:1'"),
        (["policy_device=gpu"], "policy_device = 'gpu'"),
    ],
)
def test_mistakes_are_named(arguments, message):
    arguments = arguments if any("preset" in a for a in arguments) else ["preset=laptop", *arguments]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_config(SFTConfig, REPOSITORY / "config.yaml", arguments)
    assert "\n" not in str(caught.value)


def test_text_stays_text():
    for text in ("on", "1", "1e-5", "null"):
        assert (
            load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=laptop", f"run_name={text}"]).run_name == text
        )


def test_mistakes_in_the_file_name_the_file(tmp_path):
    path = tmp_path / "my.yaml"
    for text, message in [
        ("seed: -1\n", f"seed = -1 ({path}): input should be greater than or equal to 0"),
        ("presets:\n  laptop:\n    sed: 1\n", f"unknown key sed ({path}, preset laptop): did you mean seed?"),
        ("- a\n", "expected `key: value` lines"),
        ("a: [1\n", ", line 2: not YAML: "),
        ("presets: 5\n", "presets must hold one block"),
        ("presets:\n  laptop: [seed]\n", "presets must hold one block"),
        ("seed: 1\n", "preset = laptop: "),
        ("seed: 1\nrun_name: \xe9\n", ", line 2: not UTF-8 text; save the file as UTF-8"),
        ("", ", line 1: expected `key: value` lines, found nothing"),
        ("resume: auto\n", f"resume ({path}): it is read from the command line alone; give it there"),
        ("resume: runs/x\n", f"resume ({path}): it is read from the command line alone; give it there"),
        ("presets:\n  laptop:\n    resume: auto\n", f"resume ({path}): it is read from the command line alone"),
    ]:
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=re.escape(message)):
            load_config(SFTConfig, path, ["preset=laptop"] if "presets" in text or "preset = " in message else [])


def test_help_lists_every_key_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(SFTConfig, "config.yaml", ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in SFTConfig.model_fields.items():
        assert re.search(rf"^  {name}=", text, re.MULTILINE)
        assert field.description and field.description in " ".join(text.split())


def test_run_main_turns_user_errors_into_one_line_and_keeps_real_bugs(monkeypatch, capsys):
    def user_mistake(arguments):
        raise UserError("seed = -1:\n  wrong")

    with pytest.raises(SystemExit) as caught:
        run_main(user_mistake)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: seed = -1: wrong\n"

    def interrupted(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_main(interrupted)
    assert caught.value.code == 130

    def bug(arguments):
        raise ValueError("shape mismatch")

    with pytest.raises(ValueError, match="shape mismatch"):
        run_main(bug)


@pytest.mark.parametrize("error", [UserError("the loss f returned int"), RewardError("the reward f returned 1")])
def test_a_users_function_that_returns_something_else_is_one_line(error, monkeypatch, capsys):
    def main(arguments):
        raise error

    monkeypatch.setattr("sys.argv", ["GRPO_train.py"])
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_listing_runs_executes_no_file_of_theirs(tmp_path):
    """`resume=auto` looks through the configurations of all runs, and executes no file that one of them names."""
    (tmp_path / "mine.py").write_text("raise SystemExit('executed')")
    for name, reward in (("other", f"{tmp_path}/mine.py:reward"), ("lost", "gone.py:reward")):
        folder = tmp_path / "runs" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "lock").touch()
        (folder / "config.yaml").write_text(f"reward: {reward}\n")
    config = SFTConfig(runs_dir=str(tmp_path / "runs"))
    assert newest_unfinished_run(SFTConfig, config) in (tmp_path / "runs/other", tmp_path / "runs/lost")


def test_auto_passes_over_a_run_in_progress(tmp_path):
    """If it is the only one, it is taken: opening it says who writes to it, instead of a new run beginning."""
    folders = [tmp_path / name for name in ("interrupted", "newer")]
    for age, folder in zip((10, 0), folders, strict=True):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "lock").touch()
        os.utime(folder / "lock", (time.time() - age,) * 2)
        (folder / "config.yaml").write_text("num_epochs: 1\n")
    config = SFTConfig(runs_dir=str(tmp_path))
    assert newest_unfinished_run(SFTConfig, config) == folders[1]
    with lock_folder(folders[1]):
        assert newest_unfinished_run(SFTConfig, config) == folders[0]
        shutil.rmtree(folders[0])
        assert newest_unfinished_run(SFTConfig, config) == folders[1]


def test_auto_names_the_runs_that_cannot_be_read(tmp_path, capsys):
    """A run of another script is passed over in silence. One that is damaged or has a wrong value is named."""
    wrong = "num_epochs: 1\nseed: -1\n"
    configs = {"torn": "seed: [1", "empty": "", "wrong": wrong, "grpo": "n_grpo_steps: 3\n", "own": "num_epochs: 1\n"}
    for name, text in configs.items():
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "lock").touch()
        (tmp_path / name / "config.yaml").write_text(text)
    assert newest_unfinished_run(SFTConfig, SFTConfig(runs_dir=str(tmp_path))) == tmp_path / "own"
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(" is passed over (")[0] for line in lines) == [
        f"resume = auto: {tmp_path / name}" for name in ("empty", "torn", "wrong")
    ]
    reason = "seed = -1: input should be greater than or equal to 0"
    assert f"resume = auto: {tmp_path / 'wrong'} is passed over ({reason})" in lines


@pytest.mark.parametrize("name", ["foreign", "auto"])
def test_a_foreign_configuration_is_not_resumed(tmp_path, name):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.yaml").write_text("n_grpo_steps: 3\nseed: 1\ngroup_size: 2\n")
    arguments = [f"resume={tmp_path / 'foreign'}"] if name == "foreign" else ["resume=auto", "run_name=foreign"]
    with pytest.raises(
        UserError, match=r"keys that this script does not know \(n_grpo_steps, group_size\); go on with"
    ):
        load_config(SFTConfig, REPOSITORY / "config.yaml", [*arguments, f"runs_dir={tmp_path}"])


def test_an_older_run_without_the_newest_keys_is_unchanged(tmp_path, capsys):
    """A key that a run's config.yaml lacks had its default; another value is a change."""
    values = SFTConfig(preset="laptop").model_dump(mode="json", exclude={"dropout", "drop_long_examples", "resume"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config = load_config(SFTConfig, "unused.yaml", [f"resume={tmp_path}"])
    assert (config.dropout, config.drop_long_examples) == (False, False)
    assert "changed" not in capsys.readouterr().out
    with pytest.raises(UserError, match="settings differ from the run's own: dropout False -> True; leave them out"):
        load_config(SFTConfig, "unused.yaml", [f"resume={tmp_path}", "dropout=true", "resume_with_changes=no"])
    assert load_config(
        SFTConfig, "unused.yaml", [f"resume={tmp_path}", "dropout=on", "resume_with_changes=yes"]
    ).dropout


def test_a_resumed_run_takes_no_other_preset_and_no_other_recipe(tmp_path):
    path = REPOSITORY / "grpo_train.yaml"
    begun = load_config(GRPOConfig, path, ["preset=laptop", "recipe=dapo"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(begun.model_dump(mode="json", exclude={"resume"})))
    same = load_config(GRPOConfig, path, [f"resume={tmp_path}", "recipe=dapo", "preset=laptop"])
    assert (same.recipe, same.cliprange_high) == ("dapo", 0.28)
    for argument in ("recipe=gspo", "recipe=", "preset=one-gpu"):
        with pytest.raises(UserError, match=f"^{argument.replace('=', ' = ')}: .* keeps"):
            load_config(GRPOConfig, path, [f"resume={tmp_path}", argument, "resume_with_changes=true"])
    for line in ("recipe: gspo", "preset: one-gpu", "run_name: other", f"runs_dir: {tmp_path}"):  # or of a file
        (tmp_path / "mine.yaml").write_text(line)
        with pytest.raises(UserError, match=f"^{re.escape(line.replace(':', ' ='))}: .* keeps"):
            load_config(GRPOConfig, path, [f"resume={tmp_path}", f"config={tmp_path}/mine.yaml"])


def test_a_resumed_run_keeps_its_optimizer(tmp_path):
    """The checkpoint holds the moments of one, which the other could not use."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SFTConfig().model_dump(mode="json", exclude={"resume"})))
    arguments = [f"resume={tmp_path}", "optimizer=rmsprop", "resume_with_changes=true"]
    with pytest.raises(UserError, match="optimizer adamw -> rmsprop: the moments are of the other optimizer; leave it"):
        load_config(SFTConfig, "unused.yaml", arguments)


def test_what_the_operating_system_refuses_is_one_line_and_other_errors_are_bugs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["SFT_train.py"])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    for name, message in (
        (".", "Is a directory; a folder stands where a file is expected: remove or rename it"),
        ("loop", "Too many levels of symbolic links; a link leads back to itself: remove it"),
        ("gone", "No such file or directory; it is a link to nothing: remove it"),
        ("n" * 300, "File name too long; give a shorter name"),
    ):
        path = tmp_path / name
        with pytest.raises(SystemExit) as caught:
            run_main(lambda arguments, path=path: print(path.read_text()))
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"error: {path}: {message}\n"
    with pytest.raises(FileNotFoundError):
        run_main(lambda arguments: print((tmp_path / "missing").read_text()))
    with pytest.raises(BrokenPipeError):  # of another pipe than the output

        def broken(arguments):
            raise BrokenPipeError

        run_main(broken)


def test_an_unknown_loss_is_said_once():
    with pytest.raises(UserError, match=r"^loss_type = ppo: unknown; use no_baseline, .* \(command line\)$"):
        load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=laptop", "loss_type=ppo"])
