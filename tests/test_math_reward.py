"""The reward functions: format exactly as DESIGNed, answers equal in another form, near misses refused."""

import threading

import pytest

from math_reward import answers_match, last_boxed, question_only_reward_fn, r1_zero_reward_fn

EQUAL = [
    ("5", "5"),
    (" 5. ", "5"),
    ("-7", "-7"),
    ("+7", "7"),
    ("007", "7"),
    ("3.0", "3"),
    (".5", "0.5"),
    ("0.25", "1/4"),
    ("2/4", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", "1/2"),
    (r"-\dfrac{3}{4}", "-0.75"),
    (r"\frac{-3}{4}", "-0.75"),
    ("50%", "0.5"),
    (r"50\%", "50%"),
    ("12.5%", "1/8"),
    ("1,234", "1234"),
    ("1{,}234{,}567", "1234567"),
    ("1,234.50", "1234.5"),
    (r"\$5", "5"),
    ("(1,2)", "(1, 2)"),
    (r"(\frac12, 3)", "(0.5, 3)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("x^2 + 1", "1 + x^2"),
    ("x = 5", "5"),
    ("3 1/2", "7/2"),
    ("-1 1/2", "-1.5"),
    (r"\frac 1 2", "0.5"),
    ("two  apples", "two apples"),
]
DIFFERENT = [
    ("7", "8"),
    ("", "8"),
    ("-5", "5"),
    ("0.333", "1/3"),
    ("3.14", r"\pi"),
    ("50%", "50"),
    ("5%", "0.5"),
    ("1,234", "1235"),
    ("12,345", "(12, 345)"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "(1,2,3)"),
    ("[1,2)", "(1,2)"),
    ("1/0", "1"),
    (r"\frac{2}{3}", r"\frac{3}{2}"),
    ("x + 1", "x - 1"),
    ("1 2", "12"),
    ("1 2", "2"),
    ("3 1/2", "31/2"),
    ("3 1/2", "3/2"),
    ("twoapples", "two apples"),
    (r"a \leftarrow b", "a b"),
]


@pytest.mark.parametrize(("answer", "truth"), EQUAL)
def test_equal_answers_match_both_ways(answer, truth):
    assert answers_match(answer, truth)
    assert answers_match(truth, answer)


@pytest.mark.parametrize(("answer", "truth"), DIFFERENT)
def test_different_answers_do_not_match(answer, truth):
    assert not answers_match(answer, truth)


def test_r1_zero_format_needs_both_tags_to_the_letter():
    right = {"format_reward": 1.0, "answer_reward": 1.0, "reward": 1.0}
    wrong = {"format_reward": 1.0, "answer_reward": 0.0, "reward": 0.0}
    none = {"format_reward": 0.0, "answer_reward": 0.0, "reward": 0.0}
    assert r1_zero_reward_fn("so </think> <answer> 4 </answer>", "4") == right
    assert r1_zero_reward_fn("so </think> <answer> 5 </answer>", "4") == wrong
    assert r1_zero_reward_fn("so </think> <answer> 4", "4") == none
    assert r1_zero_reward_fn("so </think><answer> 4 </answer>", "4") == none
    assert r1_zero_reward_fn("so <answer> 4 </answer>", "4") == none
    assert r1_zero_reward_fn("4", "4") == none


def test_r1_zero_takes_the_last_answer_and_unwraps_a_box():
    assert r1_zero_reward_fn("</think> <answer> 1 </answer> no: <answer> 4 </answer>", "4")["reward"] == 1
    assert r1_zero_reward_fn(r"</think> <answer> \boxed{\frac{1}{2}} </answer>", "0.5")["reward"] == 1


def test_question_only_takes_the_last_box():
    assert question_only_reward_fn(r"\boxed{1}, or rather \boxed{2}", "2")["reward"] == 1
    assert question_only_reward_fn(r"\boxed{3}", "2") == {"format_reward": 1.0, "answer_reward": 0.0, "reward": 0.0}
    assert question_only_reward_fn("2", "2")["format_reward"] == 0


def test_last_boxed_needs_closed_braces():
    assert last_boxed(r"\boxed{a{b}c}") == "a{b}c"
    assert last_boxed(r"\boxed{1} \boxed{2") == "1"
    assert last_boxed("none") is None


def test_symbolic_grading_works_outside_the_main_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(answers_match(r"\sqrt{8}", r"2\sqrt{2}")))
    thread.start()
    thread.join(timeout=60)
    assert verdicts == [True]
