"""The grader: exact formats, the table of rewards, rules of spelling, a corpus of pairs, hostile strings, limits."""

import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from grader_report import CORPUS as CORPUS_PATH
from grader_report import read_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from plainrl.grading import expressions
from plainrl.grading.arithmetic import GradingError, Point
from plainrl.grading.equality import NO_UNITS, UNITS, answers_match
from plainrl.grading.expressions import constant, factor_between
from plainrl.grading.own_rewards import RewardError
from plainrl.grading.rewards import (
    REWARD_FUNCTIONS,
    Grade,
    Reward,
    as_reward,
    clean_ground_truth,
    count_failures,
    grade_answer,
    grade_response,
    grade_responses,
    is_gradable,
    last_boxed,
    question_only_reward_fn,
    r1_zero_reward_fn,
    write_r1_zero,
)
from plainrl.grading.spelling import NUMBER_WORDS, RULES, tidy

REPOSITORY = Path(__file__).parent.parent
CORPUS = read_corpus(CORPUS_PATH)
GRADING_MODULES = {path.stem for path in (REPOSITORY / "plainrl" / "grading").glob("*.py")} - {"__init__"}

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
    ("50%", "50"),
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
    ("5%", "0.5"),
    ("0.2", "20"),
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


@pytest.mark.parametrize("name", REWARD_FUNCTIONS)
def test_a_reward_function_grades_responses_in_its_own_format(name):
    reward = REWARD_FUNCTIONS[name]
    right = reward.write_response("1 + 2 = 3, of 6.", r"\frac{1}{2}")
    wrong = reward.write_response("1 + 2 = 3, of 6.", "3")
    assert reward(right, "0.5") == {"format_reward": 1.0, "answer_reward": 1.0, "reward": 1.0}
    assert reward(wrong, "0.5") | {"reward": 0} == {"format_reward": 1.0, "answer_reward": 0.0, "reward": 0}
    assert reward("0.5", "0.5") | {"reward": 0} == {"format_reward": 0.0, "answer_reward": 0.0, "reward": 0}
    # A reward may give something for the format. Those of the assignment give nothing without the right answer.
    assert reward("0.5", "0.5")["reward"] <= reward(wrong, "0.5")["reward"] < 1
    if name in ("r1_zero", "question_only"):
        assert reward(wrong, "0.5")["reward"] == reward("0.5", "0.5")["reward"] == 0
    for response in (right, wrong, "0.5", ""):
        for reward_fn in (name, reward, reward.function):
            assert grade_response(response, "0.5", reward_fn) == Grade(reward(response, "0.5"))


@pytest.mark.parametrize("name", REWARD_FUNCTIONS)
def test_what_a_reward_extracts_is_what_its_function_grades(name):
    reward = REWARD_FUNCTIONS[name]
    if reward.extract is None:
        pytest.skip("graded by its function alone")
    assert reward.extract(reward.write_response("1 + 2 = 3.", r"\frac{1}{2}")) == r"\frac{1}{2}"
    assert reward.extract("3") is None


@pytest.mark.parametrize("name", [name for name, reward in REWARD_FUNCTIONS.items() if reward.prompt])
def test_a_reward_names_a_prompt_that_exists(name):
    assert (REPOSITORY / "plainrl" / "prompts" / f"{REWARD_FUNCTIONS[name].prompt}.prompt").is_file()


def test_a_response_is_written_to_the_letter():
    write = {name: reward.write_response for name, reward in REWARD_FUNCTIONS.items()}
    assert write["r1_zero"]("1 + 2 = 3.", "3") == " 1 + 2 = 3. </think> <answer> 3 </answer>"
    assert write["question_only"]("1 + 2 = 3.", "3") == r" 1 + 2 = 3. The answer is \boxed{3}."


def test_a_function_of_ones_own_needs_to_return_its_reward_only():
    def length(response, truth):
        return {"reward": len(response) / 4}

    assert as_reward(length) == Reward(length, None, write_r1_zero, None)
    derived = {"reward": 0.5, "answer_reward": 0.5, "format_reward": 1.0}
    assert grade_responses(["ab", ""], ["1", "1"], length) == [
        Grade(derived),
        Grade({"reward": 0.0, "answer_reward": 0.0, "format_reward": 1.0}),
    ]
    own = {"reward": 1, "answer_reward": False, "format_reward": 0.0, "length": np.float32(2)}
    assert grade_response("a", "1", Reward(lambda response, truth: own)).rewards == own
    assert own["reward"] is not grade_response("a", "1", lambda response, truth: own).rewards["reward"]  # a float


@pytest.mark.parametrize(
    "result",
    [None, [1.0], {}, {"answer_reward": 1.0}, {"reward": None}, {"reward": "1.0"}, {"reward": float("nan")},
     {"reward": float("inf")}, {"reward": 1.0, "length": float("nan")}, {"reward": np.ones(2)}, {"reward": 10**400}],
    ids=lambda result: repr(result)[:30],
)  # fmt: skip
def test_a_result_without_a_finite_reward_is_one_clear_error(result):
    def broken(response, truth):
        return result

    message = r"reward function tests/test_grading.py:\S*broken returned .*: return a finite number, or a dictionary"
    grade = grade_response("a", "1", broken)
    assert grade.rewards == dict.fromkeys(("reward", "answer_reward", "format_reward"), 0.0)
    assert grade.failure == "error" and re.search(message, grade.problem or "")
    with pytest.raises(RewardError, match=message):
        grade_responses(["a"], ["1"], Reward(broken))


def test_a_function_of_ones_own_is_called_by_one_thread_at_a_time():
    running = []

    def slow(response, truth):
        running.append(response)
        time.sleep(0.01)
        assert running == [response]
        running.remove(response)
        return {"reward": 1.0}

    with ThreadPoolExecutor(4) as threads:
        grades = list(threads.map(lambda response: grade_response(response, "1", slow), "abcdefgh"))
    assert len(grades) == 8 and not any(grade.problem for grade in grades)


def test_a_reward_with_an_extractor_of_ones_own_is_graded_by_equality():
    reward = Reward(
        lambda response, truth: {"reward": 0.0}, extract=lambda response: response.partition("=")[2] or None
    )
    grades = grade_responses(["y=0.5", "y=2", "0.5"], ["1/2"] * 3, reward)
    assert [(grade.rewards["format_reward"], grade.rewards["reward"]) for grade in grades] == [(1, 1), (1, 0), (0, 0)]


def test_grading_imports_nothing_else_of_plainrl_and_not_sympy():
    code = "import sys, plainrl; before = set(sys.modules); import plainrl.grading.rewards"
    code += "; print(*[name for name in set(sys.modules) - before if name[:7] == 'plainrl'])"
    code += "; print('sympy' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    modules, heavy = result.stdout.splitlines()
    names = {"plainrl.grading", *(f"plainrl.grading.{name}" for name in GRADING_MODULES)}
    assert set(modules.split()) == names
    assert heavy == "False False"


def accepts(answer, truth):
    grade = grade_answer(answer, truth)
    assert grade.failure is None, (answer, truth, grade)
    return grade.rewards["answer_reward"] == 1


def test_the_corpus_has_no_false_accept_and_no_false_reject():
    """In both directions: equal in one is equal in the other."""
    assert len(CORPUS) >= 600
    verdicts = [(accepts(pair.answer, pair.ground_truth), accepts(pair.ground_truth, pair.answer)) for pair in CORPUS]
    assert [pair for pair, (one, other) in zip(CORPUS, verdicts, strict=True) if one != other] == []
    accepted = [one for one, _ in verdicts]
    assert [pair for pair, is_accepted in zip(CORPUS, accepted, strict=True) if is_accepted and not pair.equal] == []
    rejected = [pair for pair, is_accepted in zip(CORPUS, accepted, strict=True) if pair.equal and not is_accepted]
    assert rejected == []


def test_every_ground_truth_equals_itself():
    for pair in CORPUS:
        assert accepts(pair.ground_truth, pair.ground_truth), pair


def test_every_category_has_both_verdicts():
    for category in {pair.category for pair in CORPUS} - {"nearly_equal", "adversarial"}:
        assert {pair.equal for pair in CORPUS if pair.category == category} == {True, False}


def test_a_batch_keeps_its_order_and_equals_one_by_one():
    answers = ["1", r"\sqrt{8}", "x", r"2\sqrt{2}"] * 3
    responses = [f"</think> <answer> {answer} </answer>" for answer in answers] + ["no format"]
    truths = [r"2\sqrt{2}"] * len(responses)
    one_by_one = [Grade(r1_zero_reward_fn(response, truth)) for response, truth in zip(responses, truths, strict=True)]
    for reward_fn in ("r1_zero", r1_zero_reward_fn, REWARD_FUNCTIONS["r1_zero"]):
        assert grade_responses(responses, truths, reward_fn) == one_by_one
    assert [grade.rewards["reward"] for grade in one_by_one] == [0, 1, 0, 1] * 3 + [0]
    own = grade_responses(["a", "b"], ["a", "a"], lambda response, truth: {"reward": float(response == truth)})
    assert [grade.rewards["reward"] for grade in own] == [1, 0]
    with pytest.raises(ValueError, match="reward_fn = 'nonsense': use r1_zero, question_only, .*or a function"):
        grade_responses([], [], "nonsense")


def test_grading_works_from_any_thread():
    verdicts = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append(accepts(rf"\sqrt{{{n * n * 2}}}", rf"{n}\sqrt{{2}}")))
        for n in range(20, 26)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert verdicts == [True] * 6


HOSTILE = [
    "9" * 100_000,
    "{" * 10_000 + "}" * 10_000,
    "(" * 500 + "5" + ")" * 500,
    "\\frac{" * 10_000,
    "\\boxed{" * 5_000,
    "\x00",
    "5\x00",
    "\ud800",
    "\u202e5",
    "5\u200b",
    "\n\n\n",
    "a" * 900,
    "1," * 450 + "2",
    "x^" * 400 + "2",
    "\\sqrt{" * 150 + "2" + "}" * 150,
    "+".join(["x"] * 300),
    "9^{9^{9^9}}",
    "((((10!)!)!)!)!",
    "\\binom{10^{12}}{10^{11}}",
    "__import__('os').system('touch OWNED')",
    "().__class__.__bases__[0].__subclasses__()",
    "(lambda: 5)()",
    "\\input{/etc/passwd}",
    " " * 900,
    "$" * 900,
    "\\text{" * 100 + "5" + "}" * 100,
    "|" * 901,
    "!" * 900,
    "1" + "!" * 5,
    "\\pm" * 300,
    "ln^" * 333,
    "=".join(["x"] * 400),
    "\\begin{pmatrix}" * 60,
    "&".join(["1"] * 400),
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_and_cost_little(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    for response in (f"</think> <answer> {text} </answer>", rf"\boxed{{{text}}}", text):
        for reward_fn in (r1_zero_reward_fn, question_only_reward_fn):
            for truth in ("5", r"\sqrt{2}", "x+1"):
                assert reward_fn(response, truth)["answer_reward"] == 0
    assert time.monotonic() - started < 15
    assert list(tmp_path.iterdir()) == []


PIECES = [
    *r"\frac \sqrt { } ( ) [ ] ^ _ + - / ! , = < \pm \cup \{ \} | $ % \% \$ . 1 2 10 9 0.5 x y i e \pi \infty".split(),
    *r"\sin \log \text{ cm \begin{pmatrix} \end{pmatrix} & \\ \cdot \times \binom \circ '".split(),
    " ",
    "\u0660",  # a digit of another script
]


def mutate(text, generator):
    """Change, drop, double or insert a few characters or pieces of a real answer."""
    for _ in range(generator.randint(1, 3)):
        position = generator.randint(0, len(text))
        end = min(len(text), position + generator.randint(0, 2))
        text = text[:position] + generator.choice([*PIECES, "", text[position:end] * 2]) + text[end:]
    return text


ANSWERS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.sampled_from(CORPUS).map(
    lambda pair: pair[1]
)


@settings(max_examples=300, deadline=None)
@given(ANSWERS, ANSWERS, st.sampled_from([",", "=", "<", r"\cup ", r"\text{ and }", "%", r"^\circ "]))
def test_equality_is_reflexive_and_has_no_direction(one, other, between):
    for answer in (one, f"{one}{between}{other}"):
        assert answers_match(answer, answer) == bool(tidy(answer))
    assert answers_match(f"{one}{between}{other}", one) == answers_match(one, f"{one}{between}{other}")
    assert answers_match(f"{one}{between}{other}", f"{other}{between}{one}") == answers_match(
        f"{other}{between}{one}", f"{one}{between}{other}"
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=40), st.sampled_from(CORPUS))
def test_random_strings_never_raise_and_have_no_direction(text, pair):
    assert grade_answer(text, pair.ground_truth).rewards == grade_answer(pair.ground_truth, text).rewards
    tidy(text)


def test_ten_thousand_random_and_mutated_answers_are_graded_in_time():
    generator = random.Random(0)
    pairs = generator.choices(CORPUS, k=10_000)
    texts = [
        mutate(pair.answer, generator) if index % 2 else "".join(generator.choices(PIECES, k=generator.randint(1, 20)))
        for index, pair in enumerate(pairs)
    ]
    started = time.monotonic()
    grades = grade_responses(
        [rf"</think> <answer> {text} </answer>" for text in texts], [pair.ground_truth for pair in pairs], "r1_zero"
    )
    seconds = time.monotonic() - started
    assert len(grades) == 10_000
    assert [grade.failure for grade in grades if grade.failure] == []
    assert seconds < 60


def test_reformatted_numbers_equal_themselves_and_no_other():
    generator = random.Random(1)
    numbers = [generator.choice([1, -1]) * int(10 ** generator.uniform(0, 6)) for _ in range(300)]
    forms = ["{:,}", "{}.00", "${}", r"\${}", "{} eggs", r"{}\text{{ hours}}", r"\boxed{{{}}}"]
    for number, other in itertools.pairwise(numbers):
        for form in forms:
            response = f"</think> <answer> {form.format(number)} </answer>"
            assert r1_zero_reward_fn(response, str(number))["reward"] == 1
            assert r1_zero_reward_fn(response, str(other))["reward"] == (number == other)


@pytest.mark.parametrize("name", RULES)
def test_each_rule_of_spelling_does_what_its_example_says(name):
    rule = RULES[name]
    assert rule.before != rule.after
    assert rule.pattern.sub(rule.replacement, rule.before) == rule.after


def test_no_rule_of_spelling_stands_in_the_table_twice():
    lines = (REPOSITORY / "plainrl/grading/spelling.tsv").read_text(encoding="utf-8").splitlines()
    assert len(RULES) == sum(not line.startswith("#") for line in lines)


def test_spelling_takes_little_time():
    for unit in (
        "$",
        "{",
        "(",
        "1 ",
        "1,",
        "a ",
        " ",
        "\\",
        r"\text{",
        r"\frac{",
        r"\boxed{",
        r"\mathbf{{}",
        "**",
        "and ",
        "x or ",
        r"\text{\sin ",
        "x=&=",
        r"x&=1\\",
    ):
        started = time.process_time()
        for before in ("", r"\text{", r"\begin{cases}"):
            tidy(before + unit * ((1000 - len(before)) // len(unit)))
            tidy((before + unit * 60 + "}" + r"\end{cases}")[:1000])
        assert time.process_time() - started < 0.5, unit


# One kind of answers a line: (ground truth, answers that equal it, answers that do not)
KINDS = {
    "percent": ("20", ["20%", r"20\%", "20 percent"], ["0.2", "200%", "21%"]),
    "percent as a value": (r"20\%", ["0.2", r"\frac15", "20"], ["2", "0.02", "0.2%"]),
    "function before a product": (r"\ln 6", [r"\ln 2+\ln 3"], [r"\ln 2\cdot 3", r"3\ln 2", r"\ln 2\times 3"]),
    "function of degrees": (r"\cos 20^\circ", [r"\cos\frac{\pi}{9}"], [r"\cos 10^\circ\cdot 2", r"2\cos 10^\circ"]),
    "double angle": (r"\frac12\sin 2x", [r"\sin x\cdot\cos x", "sin(x)cos(x)"], [r"\sin x", r"\sin x\cos 2x"]),
    "several dollars": ("3,-3", ["$3$ and $-3$", "$-3$, $3$", "$3$ or $-3$"], ["$3$ and $3$", "$3$"]),
    "doubled backslashes": (r"\frac32", [r"\\frac{3}{2}", r"\\dfrac{3}{2}"], [r"\\frac{2}{3}"]),
    "plain algebra": (r"3\sqrt{2}",
                      ["3sqrt(2)", "3*sqrt(2)", "sqrt(18)", "3√2"], ["3sqrt(3)", "sqrt(32)", "3+sqrt(2)"]),
    "plain pi": (r"\frac{\pi}{4}", ["pi/4", "(pi)/(4)", "0.25pi"], ["4/pi", "pi/2"]),
    "plain powers": ("x^2+1", ["x**2+1", "x^(2)+1", "1+x*x"], ["x**2-1", "2x+1"]),
    "slash": (r"\frac{x}{2}", ["1/2x", "x/2", "(x)/(2)"], ["1/(2x)", "2/x"]),
    "tail": (r"\frac13", [r"\frac{1}{3} \approx 0.333", "1/3 ≈ 0.33"], [r"0.333 \approx \frac13", "0.333"]),
    "glued unit": (r"5\text{ cm}", ["5cm", "5 cm", "5", "5 centimeters"], ["5 m", "5mm", "6cm"]),
    "unlisted unit": ("16", [r"16\text{ daps}", "16 USD", "16 gm", "16 a.m."], [r"16\text{ million}", "17 USD"]),
    "interval": (r"(-\infty,3)", ["x<3", "3>x", "(-inf, 3)"], [r"x\le 3", "x>3", "(-3,3)"]),
    "bounded interval": ("[2,5)", [r"2\le x<5", r"5>x\geq2"], ["2<x<5", "(2,5)", "x<5"]),
    "union": (r"(-\infty,0)\cup(2,\infty)", ["x<0 or x>2", "(-oo,0) U (2,oo)"], ["x<0", "x<2 or x>0"]),
    "all but one": (r"(-\infty,2)\cup(2,\infty)", [r"x\ne 2", "x != 2"], ["x=2", r"x\ne 3"]),
    "column": (r"\begin{pmatrix}5\\-7\end{pmatrix}",
               ["(5,-7)", r"\begin{array}{c}5\\-7\end{array}"], ["(-7,5)", "5,-7"]),
    "array": (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", [r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]"],
              [r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"]),
    "lists": ("1,2,3", ["1, 2, and 3", r"3, 2\text{ and }1", "1;2;3"], ["1, 2", "1, 2, and 4"]),
    "imaginary list": ("3i,-3i", ["3i and -3i", r"\pm 3i"], ["3i", "3 and -3"]),
    "scaled equation": ("5x-7y=0", ["-10x+14y=0", "5x=7y", r"y=\frac57x"], ["5x+7y=0", "5x-7y=1", "5x-7y"]),
    "scaled inequality": ("-2x<4", ["x>-2", "2x>-4", "-x<2"], ["x<-2", "2x<-4", r"x\ge-2"]),
    "named value": ("2x+3", ["y = 2x+3", "f(x)=3+2x", "2x+3=y"], ["y=2x-3", "y=3x+2"]),
    "assignments": ("p=5,q=2", ["5,2", "(5,2)", "q=2, p=5", "(p,q)=(5,2)"], ["2,5", "p=2,q=5", "(2,5)"]),
    "short words": (r"\text{odd}", ["odd", "Odd", r"\mbox{odd}"], ["even", "dod"]),
    "number words": ("4", [r"\mbox{four}", "four", "Four"], ["five", r"\text{fourth}"]),
    "bold": ("16", ["**16**", r"\mathbf{16}", r"\boldsymbol{16}"], ["**61**"]),
    "fractions": (r"\frac{1}{b}", [r"\frac1b", "1\u2044b", r"\cfrac{1}{b}", r"\frac{1}b"], [r"\frac b1", r"\frac1c"]),
    "thousands": ("12345", ["12 345", r"12\,345", "12,345", "12{,}345"], ["12 3456", "12, 345"]),
    "radians": (r"\frac{3\pi}{4}", [r"135^\circ", "135 degrees"], ["135", r"45^\circ"]),
    "degrees": (r"135^\circ", ["135", r"\frac{3\pi}{4}", r"\frac{3\pi}{4}\text{ radians}"], ["136", r"\frac{\pi}{4}"]),
    "positive variables": (r"\ln a+\ln b", [r"\ln(ab)"], [r"\ln(a+b)", r"\ln a\ln b"]),
    "positive roots": (r"\sqrt{1/n}", [r"\frac{1}{\sqrt n}"], [r"-\frac{1}{\sqrt n}", r"\sqrt n"]),
    "variables of any sign": (r"\sqrt{x^2}", ["|x|"], ["x", "-x"]),
    "large and small": ("2^{2008}-2", [r"2(2^{2007}-1)"], ["2^{2008}-2i", "2^{2008}", r"2^{2008}-\sqrt{3}"]),
    "many variables": ("a+2b+cdf", ["cfd+a+b+b"], ["2a+b+cdf", "f+2b+cda", "a+2f+cdb"]),
    "both hold": ("(1,2)", ["x>1 and x<2", r"x>1\text{ and }x<2", "1<x<2"], ["x>1 or x<2", "x>1, x<2", "x>1"]),
    "all numbers": (r"\mathbb{R}", ["all real numbers", r"(-\infty,\infty)", r"x\in\mathbb{R}"], [r"\mathbb{Z}"]),
    "set of a condition": (r"(1,\infty)",
                           [r"\{x \mid x>1\}", r"\{x\in\mathbb{R}: x>1\}"], [r"\{x\in\mathbb{Z}: x>1\}"]),
    "only for negative numbers": (r"\ln(x^2)", [r"\ln(x\cdot x)"], [r"2\ln(-x)", r"\ln x"]),
    "order of names": ("y=2,x=1", ["(1,2)", "x=1,y=2"], ["(2,1)", "2,1"]),
    "signs of roots": (r"\sqrt{ab}", [r"\sqrt{a}\sqrt{b}"], [r"-\sqrt{a}\sqrt{b}", "ab"]),
    "unknown functions": ("f(2x)", ["f(x+x)"], ["2f(x)", "f(x)", "g(2x)"]),
    "no product": ("x2", [], ["2x", "x^2"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_accepted_in_all_its_forms_and_nothing_beside(kind):
    truth, equal, different = KINDS[kind]
    assert [answer for answer in equal if not (accepts(answer, truth) and accepts(truth, answer))] == []
    assert [answer for answer in different if accepts(answer, truth) or accepts(truth, answer)] == []


def test_lists_are_matched_one_to_one_although_equality_is_not_transitive():
    """The sign makes 20% equal to both 20 and 0.2, which differ."""
    assert accepts("20%, 20", "20, 0.2")
    assert accepts("20, 20%", "20, 0.2")
    assert not accepts("20%, 0.2", "20, 20")
    assert not accepts(r"\{20\%\}", r"\{20, 0.2\}")


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        (5, "5"),
        (-0.5, "-0.5"),
        (True, "True"),
        (None, ""),
        (Fraction(1, 3), "1/3"),
        (np.float64(2.5), "2.5"),
        (r"\boxed{24}", "24"),
        (r"So it is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"$\boxed{1}$ and $\boxed{2}$", "$1$ and $2$"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("The answer is 7.", "7"),
        ("Answer: x=2", "x=2"),
        ("<answer> 3 </answer>", "3"),
        (["1", 2], '["1", "2"]'),
        ((r"\boxed{4}",), "4"),
        ([], ""),
        (float("nan"), ""),
        (np.float32("-inf"), ""),
        ("NaN", ""),
        (["nan", "5"], "5"),
        (r"-\infty", r"-\infty"),
        (" x ", "x"),
        ("answer", "answer"),
    ],
)
def test_a_ground_truth_of_any_type_becomes_text(truth, text):
    assert clean_ground_truth(truth) == text
    assert clean_ground_truth(text) == text
    if text:
        answer = json.loads(text)[-1] if text[0] == "[" else text
        assert grade_answer(answer, truth).rewards["answer_reward"] == 1
        assert grade_answer(f"{answer}1", truth).rewards["answer_reward"] == 0


def test_any_alternative_of_the_ground_truth_is_right_but_not_of_the_answer():
    for truth in (["1/3", "0.33"], ("0.33", r"\frac13"), '["0.33", "1/3"]'):
        assert [grade_answer(answer, truth).rewards["reward"] for answer in ("1/3", "0.33", "0.3")] == [1, 1, 0]
    assert grade_answer('["1", "2"]', "1").rewards["reward"] == 0
    assert grade_answer("1", "[1,2]").rewards["reward"] == 0  # an interval


@pytest.mark.parametrize("name", REWARD_FUNCTIONS)
def test_a_ground_truth_that_no_response_equals_is_found(name):
    reward = REWARD_FUNCTIONS[name]
    answers = ["5", r"\frac{1}{2}", r"\text{Softball, Kickball, Picnic}", "x \\in [1,2]", '["1", "2"]', "12 a.m."]
    prose = ["", "  ", "$$", "First add both. The sum is 5.", "word " * 61, "1" * 1001, "Add.\n\nThen 5", "nan"]
    assert [truth for truth in answers if not is_gradable(truth, reward)] == []
    assert [truth for truth in prose if is_gradable(truth, reward)] == []
    assert all(is_gradable(truth, Reward(reward.function)) for truth in prose)  # one's own function grades any text


def test_what_announces_an_answer_is_removed_on_both_sides():
    for text in (
        r"So it is $\boxed{7}$.",
        "2 + 5 = 7 #### 7",
        "The answer is 7.",
        r"5\boxed{7}",
        r"\boxed{5}\boxed{7}",
    ):
        assert accepts(text, "7") and accepts("7", text) and accepts(text, text)
        assert not accepts(text, "57") and not accepts("5", text)


def test_no_word_is_both_a_unit_and_none():
    """A word that changes the number before it is refused, with \\text and without, and whatever follows."""
    assert len(NO_UNITS) > 100
    assert NO_UNITS & {*UNITS} == set()
    for word in NO_UNITS - {"square"}:  # square inches are a unit
        for answer in (rf"6\text{{ {word}}}", f"6 {word}"):
            assert not accepts(answer, "6"), answer
    for unit in UNITS:
        assert accepts(rf"6\text{{ {unit}}}", "6"), unit


def test_the_number_words_are_those_up_to_ninety_nine():
    words = ("zero", "nine", "nineteen", "twenty", "twenty-one", "ninety-nine")
    assert [NUMBER_WORDS[word] for word in words] == ["0", "9", "19", "20", "21", "99"]
    assert len(NUMBER_WORDS) == 100


def test_a_ground_truth_that_breaks_the_format_is_found():
    assert not is_gradable(r"\frac{1}{2", REWARD_FUNCTIONS["question_only"])


@pytest.mark.parametrize(
    ("text", "other"),
    [
        (r"\sin 2x", r"\sin(2x)"),
        (r"\sin x\cos x", r"\cos x\sin x"),
        (r"\ln 2x", r"\ln(2x)"),
        (r"\ln 2\cdot x", r"x\ln 2"),
        (r"\sin x/2", r"\frac{\sin x}{2}"),
        (r"\sin^2x", r"(\sin x)^2"),
        (r"\sin^{-1}x", r"\arcsin x"),
        (r"\log 100", "2"),
        (r"\log_2^2 8", "9"),
        (r"\lg 1000", "3"),
        (r"\sqrt[3]{-8}", "-2"),
        ("x^{1/3}", r"\sqrt[3]{x}"),
        ("a/bc", r"\frac{a}{bc}"),
        ("a/(b)c", r"\frac{ac}{b}"),
        (r"4\frac12", "4.5"),
        (r"4\frac12x", "4.5x"),
        (r"x\frac12", "0.5x"),
        ("n!", "n(n-1)!"),
        (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        (r"\lfloor-2.5\rfloor", "-3"),
        (r"\lceil\log_2 8\rceil", "3"),
        ("|x||y|", "|xy|"),
        ("i^2", "-1"),
        (r"e^{i\pi}", "-1"),
        ("2^-1", "0.5"),
        ("5+-3", "2"),
        (r"\sin\pi+5", "5"),
        (r"\tan^{-1}1", r"\frac{\pi}{4}"),
        (r"\sinh x", r"\frac{e^x-e^{-x}}{2}"),
        (r"0.1\overline{6}", r"\frac16"),
        (r"f(x)+f(x)", "2f(x)"),
    ],
)
def test_expressions_are_read_as_a_mathematician_reads_them(text, other):
    assert factor_between((tidy(text),), (tidy(other),), float("inf")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5+",
        "(1",
        "1)",
        "x2",
        "2 3",
        "x^2^3",
        "3!!",
        "abcd",
        "12_8",
        "1/0",
        r"\frac{1}{",
        "*2",
        "x_",
        "|x",
        "$",
        r"\foo",
        "()",
        "1..2",
        "x^",
        r"\sqrt",
        ".",
        "^2",
        "x_{",
        r"\log_",
    ],
)
def test_what_is_no_expression_is_not_read(text):
    assert constant(text) != constant(text)  # NaN
    assert factor_between((text,), (text,), float("inf")) == 0


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^9}}",
        "10^{10^{100}}",
        "2^{99999}",
        "((10!)!)!",
        "5000!",
        r"\sin 10^{40}",
        r"\tanh 200",
        r"\binom{10^{12}}{5}",
        r"\cos 10^{-50}",
        "e^{10^{-70}}",
        r"\sqrt{2}+10^{-70}",
        r"\ln 0",
        "0^0",
        "0^{-1}",
        r"\tan\frac{\pi}{2}",
    ],
)
def test_what_is_too_large_or_too_small_to_compute_equals_nothing_but_its_text(text):
    for other in ("0", "1", r"\sqrt{2}", r"\frac{\pi}{2}", f"{text}+1"):
        assert not accepts(text, other)
    assert accepts(text, text)


def test_a_timeout_is_graded_zero_counted_and_remembered(monkeypatch):
    """Eight copies of an answer that hangs cost one limit, also where they are asked at the same time."""
    monkeypatch.setattr("plainrl.grading.equality.SECONDS_PER_ANSWER", 0.2)
    num_steps = []

    def hang(self, operation, *values):
        num_steps.append(operation)
        while time.thread_time() < self.deadline:
            pass
        raise GradingError("timeout")

    with monkeypatch.context() as patch:
        patch.setattr(Point, "compute", hang)
        with ThreadPoolExecutor(8) as threads:
            grades = list(threads.map(lambda _: grade_response(r"\boxed{x+x+x+y}", "y+3x", "question_only"), range(8)))
    assert [grade.failure for grade in grades] == ["timeout"] * 8
    assert [grade.rewards["reward"] for grade in grades] == [0] * 8
    assert len(num_steps) == 1
    assert count_failures(["timeout", None, "memory", "error", "timeout"]) == {
        "timeouts": 2,
        "out_of_memory": 1,
        "errors": 1,
    }
    with pytest.raises(GradingError, match="timeout"):
        answers_match("y+3x", "x+x+x+y")
    expressions._known.clear()
    assert accepts("x+x+x+y", "y+3x")


def test_the_parts_of_an_answer_share_its_time(monkeypatch):
    deadlines = set()
    monkeypatch.setattr(
        "plainrl.grading.equality.factor_between", lambda one, other, deadline: deadlines.add(deadline) or 1
    )
    assert answers_match("(a+a,b+b)", "(2a,2b)")
    assert len(deadlines) == 1


def test_no_evaluation_goes_on_after_the_deadline():
    with pytest.raises(GradingError, match="timeout"):
        factor_between(("w+w+w",), ("3w",), time.thread_time() - 1)
    expressions._known.clear()


LONG = [
    "+".join([r"\sqrt{x}"] * 100),
    r"\sin" * 240 + "x",
    r"\frac{\sin x}{\ln y}" * 45,
    "(" * 24 + "x" + ")" * 24 + "^{0.1}" * 9,
    "1/" * 400 + "x",
    "x!" * 400,
    "/".join(f"{n}^{{99}}" for n in range(100, 200)),
    "|x|" * 300,
    "-" * 900 + "x",
    ",".join(["\\sqrt{x}"] * 40),
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:10])
def test_no_answer_takes_long(text):
    started = time.process_time()
    assert not accepts(text, f"{text}+1"[:1000])
    accepts(text[::-1], text)
    assert time.process_time() - started < 3
