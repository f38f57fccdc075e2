"""The chat: how a run's model is asked, and two models side by side with the engine of all tests."""

import io
import re

import pytest
import yaml
from tiny import tiny_arguments

from experiments import chat
from experiments.chat import ChatConfig, describe_response, read_questions, resolve_for, side_by_side
from plainrl.checkpoint_files import REMOVED
from plainrl.cli import check_arguments
from plainrl.records import Response, UserError


def make_run(folder, **settings):
    """The folder of a finished run that was trained with some settings."""
    (folder / "final").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "environment.json").write_text("{}")
    return folder


def test_a_model_is_asked_as_its_run_was_trained(tmp_path):
    run = make_run(tmp_path / "mine", prompt="question_only", stop_string="", sampling_max_tokens=7, learning_rate=1.0)
    own = {"prompt": "question_only", "stop_string": "", "sampling_max_tokens": 7}

    def asked(model, *others):
        config = resolve_for(str(model), ["preset=laptop", *others]).config.model_dump()
        return {key: config[key] for key in own}, config["seed"], config["model"]

    for model in (run, run / "final"):  # the folder of a run stands for its final policy
        assert asked(model, "seed=1") == (own, 1, str(run / "final"))
    checkpoint = run / "checkpoints/step_000001/model"
    assert asked(checkpoint, "prompt=r1_zero") == (own | {"prompt": "r1_zero"}, 0, str(checkpoint))
    mine = tmp_path / "mine.yaml"
    mine.write_text("prompt: r1_zero\npresets: {laptop: {sampling_max_tokens: 9}}\n")
    others = {"prompt": "r1_zero", "sampling_max_tokens": 9}
    assert asked(run, f"config={mine}")[0] == own | others  # a file of the user's counts more than the run
    assert asked(run, f"config={mine}", "prompt=question_only")[0] == own | others | {"prompt": "question_only"}
    (run / "environment.json").unlink()  # another program's config.yaml says nothing
    of_preset = resolve_for("", ["preset=laptop"]).config.model_dump(include=set(own))
    assert asked(run / "final") == (of_preset, 0, str(run / "final")) and of_preset != own


def test_show_has_the_settings_of_the_run_of_each_model(tmp_path, capsys):
    runs = [make_run(tmp_path / name, prompt="question_only", max_context_tokens=4096) for name in ("a", "b")]
    arguments = ["preset=laptop", *(f"model={run}" for run in runs), "sampling_max_tokens=2000", "--show"]
    check_arguments("-m experiments.chat", arguments)
    chat.main(arguments)
    shown = capsys.readouterr().out
    assert [shown.count(f"# {run / 'config.yaml'}") for run in runs] == [2, 2]
    assert shown.count("prompt: question_only") == shown.count("sampling_max_tokens: 2000") == 2


def test_weights_that_a_sweep_has_removed_are_named_or_its_best_taken(tmp_path):
    run = make_run(tmp_path / "mine")
    (run / "final" / REMOVED).write_text("")
    with pytest.raises(
        UserError, match="^model = .*mine: a sweep has removed the weights of .*mine; run it again with"
    ):
        resolve_for(str(run), ["preset=laptop"])
    (run / "best").mkdir()
    (run / "best/config.json").write_text("{}")
    assert resolve_for(str(run), ["preset=laptop"]).config.model == str(run / "best")


def test_an_answer_without_a_question_is_refused():
    with pytest.raises(UserError, match="^answer = 7: there is no question that it answers; give question, or leave "):
        resolve_for("", ["preset=laptop", "answer=7"])


def test_questions_are_read_with_their_answers(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a => b? => 7\n\nWhat?\n => 3\n"))
    assert list(read_questions(ChatConfig())) == [("What is a => b?", "7"), ("What?", "")]
    assert list(read_questions(ChatConfig(question="x", answer="y"))) == [("x", "y")]


def test_a_response_is_shown_with_its_grade_and_cannot_command_the_terminal():
    response = Response([1], " 3. </think> <answer> 3 </answer>\x1b[2J", [5, 6], [], "length")
    shown = describe_response(response, "What is 1 + 2?", "prompt", "3", ChatConfig())
    assert shown == "3. </think> <answer> 3 </answer>\\x1b[2J\n[right, reward 1, 2 tokens, cut]"
    assert describe_response(response, "q", "p", "", ChatConfig()).endswith("[2 tokens, cut]")


def test_a_reward_that_wants_a_column_is_said_and_the_chat_goes_on(tmp_path):
    """A typed question has no further columns."""
    (tmp_path / "mine.py").write_text("def by_level(response, ground_truth, level):\n    return 1.0\n")
    config = ChatConfig(reward=f"{tmp_path}/mine.py:by_level")
    shown = describe_response(Response([1], "3", [5, 6], [], "stop"), "What is 1 + 2?", "prompt", "3", config)
    assert shown.startswith("3\n[not graded: ") and "level" in shown and shown.endswith(", 2 tokens]")


def test_a_long_text_is_wrapped_in_its_column():
    lines = side_by_side(["a" * 50, "b\n\nc"], width=63).splitlines()
    assert lines == ["a" * 30 + " | b", "a" * 20 + " " * 10 + " |", " " * 30 + " | c"]


@pytest.fixture
def arguments(engine, monkeypatch, tiny_model_folder, answering_model_folder, tmp_path):
    """Two models of one architecture, with the engine of all tests."""
    monkeypatch.setattr(chat, "init_vllm", lambda *_, **__: engine)
    monkeypatch.setenv("COLUMNS", "200")
    shared = [argument for argument in tiny_arguments("", tmp_path) if not argument.startswith("model=")]
    return [*shared, f"model={tiny_model_folder}", f"model={answering_model_folder}"]


def test_two_models_are_asked_side_by_side(arguments, capsys):
    """The second one keeps the format, and its own weights are in the engine. A question is sampled anew each time."""
    chat.main([*arguments, "question=What is 1 + 2?", "answer=3", "num_samples=3"])
    lines = capsys.readouterr().out.splitlines()
    grades = [re.findall(r"\[(right|wrong), reward ([01]), \d+ tokens(?:, cut)?\]", line) for line in lines]
    assert [len(found) for found in grades if found] in ([2, 2, 2], [1] * 6)  # columns may differ in height
    columns = [line.partition(" | ")[::2] for line in lines if " | " in line]
    assert sum("<answer>" in right for _, right in columns) == 3
    assert sum("<answer>" in left for left, _ in columns[1:]) == 0


def test_models_of_two_architectures_are_refused(arguments, tmp_path, tiny_model):
    from transformers import AutoTokenizer

    tiny_model.resize_token_embeddings(520)
    tiny_model.save_pretrained(tmp_path / "other")
    first = next(argument for argument in arguments if argument.startswith("model=")).removeprefix("model=")
    AutoTokenizer.from_pretrained(first).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has other weights than .*: ask each by a command of its own"):
        chat.main([*arguments, f"model={tmp_path / 'other'}", "question=x"])


def test_a_model_that_the_engine_would_run_as_another_is_refused(arguments, tmp_path, tiny_model, tiny_model_folder):
    """The shapes of the weights are the same, and positions are turned by other angles."""
    from transformers import AutoTokenizer

    tiny_model.config.rope_parameters["rope_theta"] *= 100
    tiny_model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has other settings in config.json than .*: ask each by a command of its own"):
        chat.main([*arguments[:-1], f"model={tmp_path / 'other'}", "question=x"])


def test_only_typos_are_looked_for_before_the_settings_of_the_run_are_known(capsys):
    """The run may have a longer context than the laptop's preset."""
    check_arguments("-m experiments.chat", ["preset=laptop", "model=x", "sampling_max_tokens=2000"])
    with pytest.raises(SystemExit):
        check_arguments("-m experiments.chat", ["preset=laptop", "model=x", "sampling_max_tokens=many"])
    assert "sampling_max_tokens = 'many'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check_arguments("-m experiments.chat", ["preset=laptop", "answer=3"])  # of no run
    assert "there is no question that it answers" in capsys.readouterr().err


def test_a_question_that_is_too_long_is_said_and_the_next_is_answered(arguments, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'1 + ' * 400}\nWhat is 1 + 2?\n"))
    chat.main(arguments[:-1])
    output = capsys.readouterr().out
    assert "tokens, at most 368 fit: ask a shorter question" in output and re.search(r"\[\d+ tokens", output)


def test_help_names_its_own_keys(capsys):
    with pytest.raises(SystemExit):
        chat.main(["--help"])
    output = capsys.readouterr().out
    assert "num_samples" in output and "responses to each question, of each model" in output
