"""Ranks that die, hang, are stopped, or get a signal: all end, with one line, and the run can be resumed."""

import json
import os
import re
import shutil
import time

import pytest
import rank_gradients
import torch
from kill_and_resume import differences_to_rounding, ranks_of, start
from ranks import SECONDS_TO_END, end, has_begun, left_alive
from tiny import run_python, tiny_arguments, train_rows
from transformers import AutoModelForCausalLM

from plainrl import distributed
from plainrl.records import UserError

SECONDS_AFTER_FAULT = 400
CHANGED = ["resume_with_changes=true"]


def run_fault(who, fault, model, folder, **settings):
    """Run SFT by two ranks with a fault; return what was printed, and the checkpoints."""
    values = {"run_name": "run", "max_steps": 4, "checkpoint_interval": 1, "keep_last": 9} | settings
    log, arguments = folder / "log", tiny_arguments(model, folder, **values)
    options = ["--shutdown-timeout", "120"]  # after which torchrun kills what its signal does not end
    program = "tests/rank_faults.py"
    process = start(program, [who, fault, *arguments], log, num_ranks=2, torchrun_options=options)
    assert end(process, log) == 1
    text, now = log.read_text(), time.time()
    begun = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("fault at ")]
    assert len(begun) == (2 if who == "all" else 1) or "=" in fault, text[-3000:]
    assert all(now - moment < SECONDS_AFTER_FAULT for moment in begun), f"{now - begun[0]:.0f} seconds"
    return text, sorted(path.name for path in folder.glob("run/checkpoints/step_*"))


def said(text):
    """The error lines and the tracebacks of the ranks, without what torchrun and torch ([W...]) say about them."""
    lines = [line for line in text.splitlines() if not line.startswith("[")]
    errors = [found.group() for line in lines if (found := re.search(r"(rank \d+: )?\berror: .*", line))]
    of_torchrun = len(re.findall(r"raise (?:ChildFailedError|SignalException)", text))
    tracebacks = text.count("Traceback (most recent call last)") - of_torchrun
    return errors, tracebacks


LOST = "error: another rank has ended"


@pytest.mark.parametrize(
    ("who", "fault", "lines", "num_tracebacks"),
    [
        ("one", "dies", [LOST], 0),
        ("first", "dies", [f"rank 1: {LOST}"], 0),
        ("one", "has a bug", [LOST], 1),
        ("first", "has a bug", [], 1),
        ("one", "runs out of memory", ["rank 1: error: out of memory", LOST], 0),
        ("first", "runs out of memory", ["error: out of memory"], 0),
        ("one", "meets a user's mistake", ["rank 1: error: a mistake; mend it", LOST], 0),
        ("first", "meets a user's mistake", ["error: a mistake; mend it"], 0),
        ("all", "meets a user's mistake", ["error: a mistake; mend it"], 0),
        ("one", "fills its disk", ["error: the disk of "], 0),  # in the save after the step
    ],
)
def test_a_fault_of_a_rank_ends_all_in_one_line(who, fault, lines, num_tracebacks, tiny_model_folder, tmp_path):
    """An error of another rank than the first is said by it, and what follows from it by the first."""
    text, saved = run_fault(who, fault, tiny_model_folder, tmp_path)
    errors, tracebacks = said(text)
    assert len(errors) == len(lines), text[-3000:]
    assert all(error.startswith(line) for error, line in zip(errors, lines, strict=True)), text[-3000:]
    assert tracebacks == num_tracebacks, text[-3000:]
    assert saved == ["step_000001"]


def test_ranks_with_other_settings_are_refused(tiny_model_folder, tmp_path):
    """As on a node with another YAML file. What the ranks decide alike they must be told alike."""
    text, saved = run_fault("one", "learning_rate=0.05", tiny_model_folder, tmp_path)
    errors, tracebacks = said(text)
    assert any("has another configuration than the first" in error for error in errors) and not tracebacks, text[-3000:]
    assert not saved


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_end_with_torchrun_also_while_they_start(num_ranks, tiny_model_folder, tmp_path):
    """Importing takes seconds, and more on a busy machine. Ranks do not know each other yet."""
    arguments = tiny_arguments(tiny_model_folder, tmp_path, run_name="run")
    process = start("SFT_train.py", arguments, tmp_path / "log", num_ranks=num_ranks)
    ranks, deadline = [], time.monotonic() + SECONDS_TO_END
    while not (len(ranks) == num_ranks and all(map(has_begun, ranks))) and time.monotonic() < deadline:
        time.sleep(0.05)
        ranks = ranks_of(process)
    process.kill()
    process.wait()
    assert len(ranks) == num_ranks and left_alive(ranks) == []
    assert not (tmp_path / "run/metrics.jsonl").exists(), "they had not got far"


@pytest.mark.parametrize(("who", "fault"), [("one", "hangs"), ("one", "is stopped"), ("first", "is stopped")])
def test_a_rank_that_hangs_is_ended_at_the_limit(who, fault, tiny_model_folder, tmp_path):
    """A stopped process cannot end itself: another one does, and torchrun kills it."""
    text, saved = run_fault(who, fault, tiny_model_folder, tmp_path, max_train_seconds=5)
    errors, tracebacks = said(text)
    assert len(errors) == 1 and not tracebacks, text[-3000:]
    assert errors[0].removeprefix("rank 1: ").startswith("error: train took longer than its limit of 5 seconds")
    assert saved == ["step_000001"]
    assert list(tmp_path.glob("run/stacks_train*.txt"))


@pytest.mark.parametrize("fault", ["gets a signal", "lets torchrun get a signal"])
def test_a_signal_stops_all_and_saves(fault, tiny_model_folder, tmp_path):
    text, saved = run_fault("one", fault, tiny_model_folder, tmp_path)
    assert text.count("stopped by SIGTERM") == 1 and said(text) == ([], 0), text[-3000:]
    assert saved == ["step_000001", "step_000002"]


def test_a_run_saved_by_any_number_of_ranks_is_resumed_by_another(tiny_model_folder, tmp_path):
    """By 2 ranks, by 4, by 1, and by 2 again. A signal ends each start in its second step; the last one finishes.

    The 4 ranks hold two replicas of the weights.

    Before each later start a newer checkpoint is put there, which is damaged. The ranks find it out together.
    """
    settings = {"max_steps": 7, "gradient_accumulation_steps": 4, "resume": "auto"}
    settings |= {"checkpoint_interval": 100, "eval_interval": 100}  # an evaluation draws the run's figure
    log, program = tmp_path / "log", "tests/rank_faults.py"
    for run, fault, starts in (("alone", "none", [0]), ("resumed", "gets a signal", [2, 4, 1, 2])):
        arguments = ["all", fault, *tiny_arguments(tiny_model_folder, tmp_path, run_name=run, **settings)]
        changes = {4: ["num_replicas=2", *CHANGED], 1: ["num_replicas=1", *CHANGED]}
        for number, num_ranks in enumerate(starts, 1):
            if number > 1:
                saved = sorted((tmp_path / run / "checkpoints").glob("step_*"))[-1]
                shutil.copytree(saved, newer := saved.with_name("step_000099"))
                (newer / "model/config.json").write_text("{}") if number < 4 else (newer / "manifest.json").unlink()
            given = [*arguments, *changes.get(num_ranks, [])]
            status = end(start(program, given, log, num_ranks=num_ranks), log)
            assert (status == 0) == (number == len(starts)), log.read_text()[-3000:]
    assert [f"going on after step {step}" in log.read_text() for step in (2, 4, 6)] == [True] * 3
    assert log.read_text().count("step_000099 is damaged and passed over (model/config.json is not what was") == 2
    assert log.read_text().count("step_000099 is damaged and passed over (manifest.json or a file it names") == 1
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    assert len(train_rows(alone)) == 7 and differences_to_rounding(alone, resumed) == []
    assert len(list((resumed / "final").glob("*.safetensors"))) == 2  # its last start was by two ranks
    models = []
    for folder in (alone, resumed):
        model, found = AutoModelForCausalLM.from_pretrained(folder / "final", output_loading_info=True)
        assert not any(found.values())
        models.append(model.state_dict())
    assert models[0].keys() == models[1].keys()
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], rtol=1e-5, atol=1e-6)


def test_torchrun_restarts_the_ranks_and_they_resume(tiny_model_folder, tmp_path, monkeypatch):
    """The second rank dies in the second step after each start: two starts make two steps."""
    settings = {"run_name": "run", "max_steps": 2, "checkpoint_interval": 1, "keep_last": 9, "resume": "auto"}
    arguments = ["one", "dies", *tiny_arguments(tiny_model_folder, tmp_path, **settings)]
    log = tmp_path / "log"
    monkeypatch.setenv(distributed.OWN_STORE, "1")
    options = ["--max-restarts", "1"]
    process = start("tests/rank_faults.py", arguments, log, num_ranks=2, torchrun_options=options)
    assert end(process, log) == 0, log.read_text()[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["train_step"] for row in rows if "train_step" in row] == [1, 2]
    assert (tmp_path / "run/final").is_dir() and "going on after step 1" in log.read_text()


@pytest.mark.parametrize(
    ("variables", "prints"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "1"}, True),  # of something else than torchrun
    ],
)
def test_of_several_ranks_the_first_alone_prints_from_the_start(variables, prints):
    environment = {name: value for name, value in os.environ.items() if name not in distributed.RANK_VARIABLES}
    found = run_python("SFT_train.py", "--show", "preset=laptop", env=environment | variables)
    assert found.returncode == 0 and bool(found.stdout) == prints


def test_restarts_that_could_not_work_are_refused(tiny_model_folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match="restarted ranks would not meet; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed._require_divisible(rank_gradients.config_of(tiny_model_folder, {}), 2)
