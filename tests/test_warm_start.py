"""The first policy of GRPO: a model that is found, or an SFT run that is made first from the same data and sizes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from ranks import SECONDS_TO_END, has_begun, is_alive, left_alive
from test_sources import through_pipe
from tiny import REPOSITORY, FakeEvaluator, grpo_arguments, read_lines, train_rows, write_lines

import SFT_train
from plainrl.cli import load_config, read_yaml
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.data import load_sft_examples
from plainrl.devices import run_command
from plainrl.folder_lock import lock_folder
from plainrl.grading.rewards import question_only_reward_fn
from plainrl.records import Stopped, UserError
from plainrl.run_folder import RunFolder
from plainrl.supplement_config import DPOConfig
from plainrl.warm_start import apply_warm_start
from SFT_train import tokenize_examples


def tiny_config(**overrides):
    return GRPOConfig(**({"compute_dtype": "float32", "max_sync_error": 1e9} | overrides))


class FakeProcess:
    """The SFT run that is not made: notes its arguments, and ends with `status` or is stopped by a signal."""

    def __init__(self, command, env):
        self.commands.append(command[2:])
        self.signals = []

    def wait(self):
        if self.stop_by and not self.signals:
            raise Stopped(self.stop_by)
        return self.status

    def send_signal(self, number):
        self.signals.append(number)
        self.sent.append(number)


@pytest.fixture
def process(monkeypatch):
    for name, value in {"commands": [], "sent": [], "status": 0, "stop_by": None}.items():
        monkeypatch.setattr(FakeProcess, name, value, raising=False)
    monkeypatch.setattr("plainrl.warm_start.subprocess", SimpleNamespace(Popen=FakeProcess))
    return FakeProcess


def test_a_finished_warm_start_is_taken_again(tmp_path, process, capsys):
    (tmp_path / "warm-start" / "final").mkdir(parents=True)
    (tmp_path / "warm-start" / "config.yaml").write_text("model: smollm2-135m\nprompt: r1_zero\nreward: r1_zero\n")
    config = apply_warm_start(tiny_config(warm_start="warm-start", runs_dir=str(tmp_path)))
    assert config.model == str(tmp_path / "warm-start" / "final")
    assert "warm start: " in capsys.readouterr().out
    assert process.commands == []


def test_a_finished_warm_start_of_an_older_preset_is_said(tmp_path, process, capsys):
    (tmp_path / "warm-start" / "final").mkdir(parents=True)
    for saved, warns in (("num_sft_examples: 128", True), ("num_sft_examples: all", False), ("max_steps: 0", False)):
        (tmp_path / "warm-start" / "config.yaml").write_text(f"prompt: r1_zero\nlearning_rate: 1e-4\n{saved}\n")
        apply_warm_start(tiny_config(warm_start="warm-start", runs_dir=str(tmp_path)))
        message = f"warning: {tmp_path / 'warm-start'} was trained with num_sft_examples = 128, not 256; remove it to"
        assert (message in capsys.readouterr().out) == warns
    assert process.commands == []


def test_a_list_of_rewards_reaches_the_warm_start_as_a_list(tmp_path, process):
    """Of a format of their own, whose warm start no reward of the table could make."""
    lines = "from plainrl.grading.rewards import Reward\nF = Reward(lambda response, truth: 1.0, None, '{} {}'.format)"
    (tmp_path / "my.py").write_text(f"{lines}\n")
    rewards = [f"{tmp_path}/my.py:F*0.9", f"{tmp_path}/my.py:F*0.1"]
    apply_warm_start(tiny_config(warm_start="warm-start", runs_dir=str(tmp_path), reward=rewards))
    assert list(load_config(SFTConfig, REPOSITORY / "config.yaml", process.commands[0]).reward) == rewards


def test_a_warm_start_that_another_process_makes_is_waited_for(tmp_path, process, monkeypatch, capsys):
    folder = tmp_path / "warm-start"
    folder.mkdir()
    lock = lock_folder(folder)

    def make(_):
        (folder / "final").mkdir()
        lock.close()

    monkeypatch.setattr("plainrl.warm_start.time", SimpleNamespace(sleep=make))
    config = apply_warm_start(tiny_config(warm_start="warm-start", runs_dir=str(tmp_path)))
    assert config.model == str(folder / "final") and process.commands == []
    assert f"another process is making {folder}; waiting for it" in capsys.readouterr().out


def test_of_two_that_begin_a_warm_start_at_once_the_slower_waits(tmp_path, process, monkeypatch):
    """Its own SFT run is refused, because the folder is taken meanwhile."""
    folder, locks = tmp_path / "warm-start", []

    def end_with_error(self):
        folder.mkdir()
        locks.append(lock_folder(folder))
        return 2

    def make(_):
        (folder / "final").mkdir()
        locks.pop().close()

    monkeypatch.setattr(process, "wait", end_with_error)
    monkeypatch.setattr("plainrl.warm_start.time", SimpleNamespace(sleep=make))
    config = apply_warm_start(tiny_config(warm_start="warm-start", runs_dir=str(tmp_path)))
    assert config.model == str(folder / "final") and len(process.commands) == 1


@pytest.mark.parametrize(
    ("line", "overrides", "message"),
    [
        ("prompt: r1_zero", {"model": "mine"}, "was trained with model = smollm2-135m, not mine"),
        ("arithmetic_terms: [2, 5]", {}, "was trained with arithmetic_terms = [2, 5], not [2, 4]"),
        ("train_data: other.jsonl", {}, "was trained with train_data = other.jsonl, not arithmetic"),
        ("stop_string: END", {}, "was trained with stop_string = END, not </answer>"),
        ("fill_prompts: true", {}, "was trained with fill_prompts = True, not False"),
    ],
)
def test_a_warm_start_of_something_else_stays_and_another_is_made(line, overrides, message, tmp_path, process, capsys):
    folder = tmp_path / "warm-start"
    (folder / "final").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model: smollm2-135m\n{line}\n")
    config = tiny_config(warm_start="warm-start", runs_dir=str(tmp_path), **overrides)
    model = apply_warm_start(config).model
    assert message in capsys.readouterr().out
    (arguments,) = process.commands
    (name,) = (argument.partition("=")[2] for argument in arguments if argument.startswith("run_name="))
    assert name.startswith("warm-start-") and model == str(tmp_path / name / "final")
    (tmp_path / name / "final").mkdir(parents=True)
    assert apply_warm_start(config).model == model and len(process.commands) == 1


def test_a_run_that_goes_on_needs_its_warm_start_for_adapters_alone(tmp_path):
    """Its checkpoint holds the policy, but not the frozen weights beside the adapters."""
    (tmp_path / "warm-start" / "final").mkdir(parents=True)
    (tmp_path / "warm-start" / "config.yaml").write_text("model: smollm2-135m\nprompt: r1_zero\nreward: r1_zero\n")
    settings = {"warm_start": "warm-start", "runs_dir": str(tmp_path)}
    assert apply_warm_start(tiny_config(**settings), tmp_path / "step_000001").model == "smollm2-135m"
    found = apply_warm_start(tiny_config(**settings, lora_rank=8), tmp_path / "step_000001")
    assert found.model == str(tmp_path / "warm-start" / "final")


def test_a_folder_is_a_warm_start(tmp_path, tiny_model_folder, process, capsys):
    """A run's, by path or by its name in runs_dir; or a model's. What it was trained with is said, not refused."""
    shutil.copytree(tiny_model_folder, tmp_path / "mine" / "final")
    (tmp_path / "mine" / "config.yaml").write_text("model: smollm2-135m\ntrain_data: other.jsonl\n")
    for name in ("mine", tmp_path / "mine", tmp_path / "mine" / "final"):
        config = apply_warm_start(tiny_config(warm_start=str(name), runs_dir=str(tmp_path)))
        assert config.model == str(tmp_path / "mine" / "final")
    warning = "warning: warm_start = mine was trained with train_data = other.jsonl, not arithmetic"
    assert warning in capsys.readouterr().out.splitlines()
    assert apply_warm_start(tiny_config(warm_start=tiny_model_folder)).model == tiny_model_folder
    assert process.commands == []


def test_what_is_no_warm_start_is_one_line(tmp_path, process):
    (tmp_path / "stopped" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("warm-strat", "warm_start = warm-strat: neither a preset of config.yaml (laptop, warm-start, "),
        ("empty", "nor the folder of a finished run or of a model"),
        ("x" * 5000, "neither a preset"),
        ("stopped", f"that run is not finished; go on with resume={tmp_path / 'stopped'}"),
    ):
        with pytest.raises(UserError) as caught:
            apply_warm_start(tiny_config(warm_start=name, runs_dir=str(tmp_path)))
        assert message in str(caught.value)
    assert process.commands == []


def test_a_warm_start_that_is_not_there_is_run_first_with_the_same_sizes(tmp_path, process):
    sizes = {
        "num_eval_examples": 5,
        "num_final_eval_examples": 7,
        "max_context_tokens": 300,
        "sampling_max_tokens": 32,
        "drop_long_examples": True,
        "stop_string": "",
        "wandb_mode": "disabled",
    }
    of_ranks = {"num_replicas": 2, "engine_tensor_parallel": 2}  # the warm start is one process
    config = tiny_config(warm_start="warm-start", runs_dir=str(tmp_path), model="mine", seed=3, **sizes, **of_ranks)
    assert apply_warm_start(config).model == str(tmp_path / "warm-start" / "final")
    sft_config = load_config(SFTConfig, REPOSITORY / "config.yaml", process.commands[0])
    assert sft_config.model_dump(include={*sizes, "model"}) == sizes | {"model": "mine"}
    assert (sft_config.runs_dir, sft_config.run_name, sft_config.preset) == (str(tmp_path), "warm-start", "warm-start")
    # How it trains is the preset's matter. So is the seed: runs of several seeds begin with one policy.
    assert (sft_config.seed, sft_config.learning_rate, sft_config.train_batch_size) == (0, 1e-4, 16)
    assert sft_config.model_dump(include=set(of_ranks)) == dict.fromkeys(of_ranks, 1)
    assert sft_config.num_sft_examples == 256
    # Its evaluations are short: the run that follows evaluates the same policy.
    many = {"num_eval_examples": 256, "num_final_eval_examples": "all", "runs_dir": str(tmp_path / "other")}
    apply_warm_start(config.model_copy(update=many))
    sft_config = load_config(SFTConfig, REPOSITORY / "config.yaml", process.commands[1])
    assert (sft_config.num_eval_examples, sft_config.num_final_eval_examples) == (16, 16)
    assert process.commands[1][-2:] == ["resume=auto", "resume_with_changes=true"]  # an interrupted one goes on
    process.status = 1
    with pytest.raises(UserError, match="SFT_train.py ended with status 1"):
        apply_warm_start(config)


def test_a_run_that_is_called_like_its_warm_start_does_not_wait_for_itself(tmp_path):
    config = tiny_config(warm_start="warm-start", runs_dir=str(tmp_path), run_name="warm-start")
    with RunFolder.create(config, "grpo"), pytest.raises(UserError, match="^run_name = warm-start: the warm start of"):
        apply_warm_start(config)


def own_data(folder, num_train, **fields):
    """Files with sums of our own, and with 6 other questions to validate on."""
    rows = [
        {"problem": f"{i} + 1?", "answer": str(i + 1), "solution": f"{i} + 1 = {i + 1}."} | fields for i in range(50)
    ]
    return {
        "train_data": write_lines(folder / "train.jsonl", rows[6 : 6 + num_train]),
        "validation_data": write_lines(folder / "validation.jsonl", rows[:6]),
    }


@pytest.mark.usefixtures("cpu_engine")
@pytest.mark.parametrize(("num_train", "num_steps"), [(12, 1), (3, 1), (40, 3)])
def test_small_data_of_ones_own_works_as_it_is(
    num_train, num_steps, tiny_model_folder, tmp_path, process, monkeypatch, capsys
):
    """The laptop preset asks for 256 traces, and evaluates on 256 questions."""
    monkeypatch.setattr(SFT_train, "Evaluator", FakeEvaluator)
    data = own_data(tmp_path, num_train)
    arguments = grpo_arguments(tiny_model_folder, tmp_path, warm_start="warm-start", num_eval_examples=6, **data)
    config = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", arguments)
    model = apply_warm_start(config).model
    SFT_train.main(process.commands[0])
    assert read_yaml(tmp_path / "warm-start" / "config.yaml")["num_sft_examples"] == "all"
    assert len(train_rows(tmp_path / "warm-start")) == num_steps  # of 16 examples each
    assert json.loads((tmp_path / "warm-start" / "final" / "config.json").read_text())["hidden_size"] == 64
    assert f"trained on all {num_train} examples of {data['train_data']}, fewer than 256" in capsys.readouterr().out
    assert read_lines(tmp_path / "warm-start" / "metrics.jsonl") and apply_warm_start(config).model == model


def test_data_that_a_warm_start_cannot_use_is_one_line(tmp_path, process):
    config = tiny_config(warm_start="warm-start", runs_dir=str(tmp_path), **own_data(tmp_path, 9))
    pipe = through_pipe((tmp_path / "train.jsonl").read_bytes())
    with pytest.raises(UserError, match=f"train_data = {pipe} is a pipe, which the warm start cannot read a second"):
        apply_warm_start(config.model_copy(update={"train_data": pipe}))
    assert process.commands == []


def test_data_without_worked_responses_takes_the_embedded_warm_start(tmp_path, process, capsys):
    """Own questions in two keys: the format is taught on the arithmetic, whose warm start may be there already."""
    path = tmp_path / "mine.csv"
    path.write_text("ask,result\n" + "".join(f"What is {n} + 1?,{n + 1}\n" for n in range(40)))
    arguments = ["preset=laptop", f"runs_dir={tmp_path}", f"train_data={path}", "validation_fraction=0.2"]
    arguments += ["question_field=ask", "answer_field=result"]
    config = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", arguments)
    apply_warm_start(config)
    assert f"{path} has no worked responses, so arithmetic teaches the format" in capsys.readouterr().out
    (command,) = process.commands
    plain = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=laptop", f"runs_dir={tmp_path}"])
    apply_warm_start(plain)
    assert process.commands[1] == command  # the one that any other run on a laptop begins with


@pytest.mark.parametrize("name", ["warm-start", "mine"])
def test_preference_pairs_are_no_data_for_a_warm_start(name, tmp_path, tiny_model_folder, process, capsys):
    """DPO on own pairs, with own questions or none, begins from the same warm start as on the embedded ones."""
    shutil.copytree(tiny_model_folder, tmp_path / "mine" / "final")
    trained = "model: smollm2-135m\nprompt: r1_zero\ntrain_data: instructions.jsonl\narithmetic_max_term: 10\n"
    (tmp_path / "mine" / "config.yaml").write_text(trained + "arithmetic_terms: [2, 3]\n")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}) + "\n")
    for data in ([], [f"train_data={pairs}", "validation_data="], [f"train_data={tmp_path}"], ["validation_data="]):
        arguments = ["preset=laptop", f"runs_dir={tmp_path}", f"warm_start={name}", *data]
        apply_warm_start(load_config(DPOConfig, REPOSITORY / "supplement/dpo_train.yaml", arguments))
    said = capsys.readouterr().out
    if name == "mine":
        assert process.commands == [] and "was trained with" not in said
    else:
        assert len(process.commands) == 4 and process.commands.count(process.commands[0]) == 4
        assert f"{pairs} has no worked responses, so arithmetic teaches the format" in said


def test_a_warm_start_takes_over_an_own_split_and_further_sets(tmp_path, process):
    """What SFT_train.py is started with reads back as it was given here."""
    data = own_data(tmp_path, 9)
    settings = {"validation_fraction": 0.3, "extra_validation_data": {"other": data["validation_data"]}}
    apply_warm_start(tiny_config(warm_start="warm-start", runs_dir=str(tmp_path), **data, **settings))
    (command,) = process.commands
    config = load_config(SFTConfig, REPOSITORY / "config.yaml", command)
    assert {key: getattr(config, key) for key in settings} == settings
    assert config.train_data == data["train_data"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_reaches_the_warm_start_and_the_command_that_goes_on_is_named(
    number, tmp_path, process, monkeypatch, capsys
):
    process.stop_by = number
    arguments = ["GRPO_train.py", "warm_start=warm-start", f"runs_dir={tmp_path}", "stop_string=two words"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(Stopped):
        apply_warm_start(tiny_config(warm_start="warm-start", runs_dir=str(tmp_path)))
    assert process.sent == [number]
    command = run_command(f"python GRPO_train.py warm_start=warm-start runs_dir={tmp_path} 'stop_string=two words'")
    assert capsys.readouterr().out.splitlines()[-1].endswith(f": {command}")


MAKES_A_WARM_START = """
from plainrl import warm_start
from plainrl.config import GRPOConfig

warm_start.num_ranks = lambda: 2
warm_start._run_preset(GRPOConfig(preset="laptop", warm_start="warm-start"))
"""


def test_the_warm_start_of_ranks_ends_with_the_one_that_makes_it(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    maker = subprocess.Popen([sys.executable, "-c", MAKES_A_WARM_START], cwd=tmp_path, env=environment)
    made, deadline = [], time.monotonic() + SECONDS_TO_END
    while not (made and has_begun(made[0])) and maker.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        with contextlib.suppress(psutil.Error):  # one that ends at this moment
            children = psutil.Process(maker.pid).children()
            made = [child for child in children if "resume=auto" in child.cmdline()]
    assert made and is_alive(made[0])
    maker.kill()
    maker.wait()
    assert left_alive(made) == []


def test_question_only_has_a_warm_start_of_its_own(tokenizer, tmp_path, process):
    """The child's settings resolve to the preset's own; its traces are right under its reward and end in EOS."""
    arguments = ["prompt=question_only", "reward=question_only", "warm_start=warm-start-question-only"]
    config = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=laptop", *arguments])
    assert config.warnings() == []
    config = config.model_copy(update={"runs_dir": str(tmp_path)})
    assert apply_warm_start(config).model == str(tmp_path / "warm-start-question-only" / "final")
    sft_config = load_config(SFTConfig, REPOSITORY / "config.yaml", process.commands[0])
    assert sft_config.warnings() == []
    preset = load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=warm-start-question-only"])
    given = {"run_name": "warm-start-question-only", "runs_dir": str(tmp_path), "max_context_tokens": 512}
    given |= {"num_eval_examples": 16, "num_final_eval_examples": 16, "resume_with_changes": True}
    assert sft_config == preset.model_copy(update=given)
    examples = load_sft_examples(sft_config)[:200]
    assert all(example.prompt == example.question for example in examples)
    assert all(question_only_reward_fn(example.response, example.ground_truth)["reward"] == 1 for example in examples)
    rows = tokenize_examples(examples, tokenizer, sft_config)
    assert all(row.response_ids[-1] == tokenizer.eos_token_id for row in rows)
