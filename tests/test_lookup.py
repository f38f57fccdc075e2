"""Entries of a table and functions of the user's own: what is found, how often it is executed, every error."""

import subprocess
import sys
from pathlib import Path

import pytest

from plainrl.grading.rewards import REWARD_FUNCTIONS, Reward, as_reward, grade_responses
from plainrl.lookup import look_up
from plainrl.records import UserError

REPOSITORY = Path(__file__).parent.parent
TABLE = {"r1_zero": 1, "question_only": 2}
MY_REWARDS = """
from pathlib import Path
from plainrl.grading.rewards import Reward

with Path("executed.txt").open("a") as file:
    file.write(f"{__name__}\\n")


def same_text(response, ground_truth):
    return {"reward": float(response.strip() == ground_truth)}


def half(response, ground_truth):
    return {"reward": 0.5}


last_word = Reward(same_text, extract=lambda response: response.split()[-1], prompt="question_only")
SCALE = 2.0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a user's file; modules that a test loads are forgotten after it."""
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__dict__", {}).get("__file__")):
            del sys.modules[name]


def error_of(name, table=TABLE, kind="reward"):
    """Return the message of the error, which is one line and begins with the setting."""
    with pytest.raises(UserError) as caught:
        look_up(name, table, kind)
    message = str(caught.value)
    assert message.startswith(f"{kind} = {name}: ")
    assert "\n" not in message
    return message.removeprefix(f"{kind} = {name}: ")


def test_an_entry_of_the_table_is_returned_as_it_is():
    for name, reward in REWARD_FUNCTIONS.items():
        assert look_up(name, REWARD_FUNCTIONS, "reward") is reward


def test_a_reward_function_of_the_users_own_grades_responses():
    reward = look_up("my_rewards.py:same_text", REWARD_FUNCTIONS, "reward")
    grades = grade_responses([" 4 ", "5"], ["4", "4"], reward)
    assert [grade.rewards for grade in grades] == [
        {"reward": 1.0, "answer_reward": 1.0, "format_reward": 1.0},
        {"reward": 0.0, "answer_reward": 0.0, "format_reward": 1.0},
    ]
    assert as_reward(reward) == Reward(reward)


def test_a_reward_of_the_users_own_may_say_how_it_is_graded():
    reward = as_reward(look_up("my_rewards.py:last_word", REWARD_FUNCTIONS, "reward"))
    assert reward.prompt == "question_only"
    assert [grade.rewards["reward"] for grade in grade_responses(["it is 1/2", "no"], ["0.5", "0.5"], reward)] == [1, 0]


def test_a_file_is_executed_once_by_whatever_path_it_is_found(folder):
    (folder / "link.py").symlink_to("my_rewards.py")
    names = ["my_rewards.py", "./my_rewards.py", str(folder / "my_rewards.py"), "link.py"]
    found = {look_up(f"{name}:same_text", TABLE, "reward") for name in names}
    assert len(found) == 1
    look_up("my_rewards.py:half", TABLE, "reward")
    assert (folder / "executed.txt").read_text() == f"{folder / 'my_rewards.py'}\n"


@pytest.mark.parametrize("is_imported_first", [True, False])
def test_a_file_that_is_also_imported_is_executed_once(folder, monkeypatch, is_imported_first):
    monkeypatch.syspath_prepend(folder)
    if is_imported_first:
        import my_rewards
    found = look_up("my_rewards.py:half", TABLE, "reward")
    import my_rewards

    assert found is my_rewards.half is look_up("my_rewards:half", TABLE, "reward")
    assert (folder / "executed.txt").read_text() == "my_rewards\n"


def test_a_file_does_not_hide_a_module_of_its_name(folder):
    (folder / "random.py").write_text("def choice(response, truth):\n    return {'reward': 4.0}\n")
    assert look_up("random.py:choice", TABLE, "reward")("", "") == {"reward": 4.0}
    import random

    assert random.choice([1]) == 1
    assert look_up("random:choice", TABLE, "reward") is random.choice


def test_dataclasses_work_in_a_users_file(folder):
    (folder / "own.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\n\n\n"
        "@dataclass\nclass Length:\n    scale: float = field(default=2.0)\n\n"
        "    def __call__(self, response, truth):\n        return {'reward': self.scale * len(response)}\n\n\n"
        "length = Length()\n"
    )
    assert look_up("own.py:length", TABLE, "reward")("ab", "") == {"reward": 4.0}


def test_an_unknown_name_lists_the_choices_the_path_form_and_the_nearest():
    choices = "use r1_zero, question_only, or a function of your own as file.py:function or package.module:function"
    assert error_of("nonsense") == f"unknown; {choices}"
    assert error_of("r1zero") == f"unknown; did you mean r1_zero? {choices}"
    assert error_of("", kind="loss_type") == f"unknown; {choices}"
    assert error_of(":same_text") == f"unknown; {choices}"


def test_a_file_without_a_function_says_how_to_name_one():
    assert error_of("my_rewards.py") == "name the function in the file as well, my_rewards.py:function"


def test_a_missing_file_is_named_with_the_nearest(folder):
    near = f"there is no file {folder / 'my_reward.py'}; did you mean my_rewards.py?"
    assert error_of("my_reward.py:same_text") == near
    assert error_of("x.py:same_text") == f"there is no file {folder / 'x.py'}; correct the path"
    assert error_of("nowhere/x.py:same_text") == f"there is no file {folder / 'nowhere' / 'x.py'}; correct the path"
    (folder / "rewards").mkdir()
    assert error_of("./rewards:same_text").startswith(f"there is no file {folder / 'rewards'}")


@pytest.mark.parametrize(
    ("line", "failure"),
    [
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("raise ImportError('no GPU')", "ImportError: no GPU"),
        ("SCALE / 0", "NameError: name 'SCALE' is not defined"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import json; json.loads('')", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("raise ValueError('one\\n  two')", "ValueError: one two"),
        ("helper()", "KeyError: 'key'"),
    ],
)
@pytest.mark.parametrize("name", ["broken.py:f", "broken:f"])
def test_a_file_that_fails_is_named_with_the_line(folder, monkeypatch, line, failure, name):
    if name == "broken:f":
        monkeypatch.syspath_prepend(folder)
    path = folder / "broken.py"
    path.write_text(f"X = 1\ndef helper(): {{}}['key']\n{line}\n")
    number = 2 if line == "helper()" else 3
    assert error_of(name) == f"{path}:{number}: {failure}; correct that line, or install what it needs"
    assert str(path) not in sys.modules
    path.write_text("def f(response, truth):\n    return {'reward': 1.0}\n")
    assert look_up(name, TABLE, "reward")("", "") == {"reward": 1.0}  # once it is corrected


def test_a_file_that_cannot_be_read_is_named(folder):
    (folder / "binary.py").write_bytes(b"\x00\xff")
    assert error_of("binary.py:f").startswith(f"{folder / 'binary.py'}")


def test_a_missing_module_is_named():
    for place in ("no_such_package", "no_such_package.rewards"):
        message = "there is no module no_such_package; install it, or give its file as file.py:function"
        assert error_of(f"{place}:f") == message
    assert error_of("email.no_such:f").startswith("there is no module email.no_such; install it")


def test_a_missing_function_lists_those_that_there_are(folder):
    path = folder / "my_rewards.py"
    assert error_of("my_rewards.py:some_text") == (
        f"{path} has no function 'some_text'; it has same_text, half; did you mean same_text?"
    )
    assert error_of("my_rewards.py:") == f"{path} has no function ''; it has same_text, half"
    (folder / "empty.py").write_text("")
    assert error_of("empty.py:f") == f"{folder / 'empty.py'} has no function 'f'; it has no function"


def test_methods_of_builtins_beside_a_function_do_no_harm(folder):
    (folder / "short.py").write_text("clean = str.strip\n\ndef f(response, ground_truth):\n    return 1.0\n")
    assert error_of("short.py:g") == f"{folder / 'short.py'} has no function 'g'; it has f"


def test_what_is_no_function_is_refused(folder):
    message = f"SCALE in {folder / 'my_rewards.py'} is of type float, not a function; it has same_text, half"
    assert error_of("my_rewards.py:SCALE") == message


def test_importing_it_is_cheap():
    code = "import sys, plainrl.lookup; print([name for name in ('torch', 'pydantic', 'sympy') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stdout == "[]\n"
