"""The grader: exact formats, the table of rewards, a corpus of pairs, hostile strings, workers that fail."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import grader_report
from experiments.grader_report import IN_ANOTHER_FORM, ORDINARY, measure_throughput, read_corpus
from plainrl.grading import worker as worker_module
from plainrl.grading.equality import answers_match, is_expression, tidy
from plainrl.grading.estimate import surely_different
from plainrl.grading.rewards import (
    REWARD_FUNCTIONS,
    Grade,
    Reward,
    as_reward,
    count_failures,
    grade_answer,
    grade_response,
    grade_responses,
    last_boxed,
    question_only_reward_fn,
    r1_zero_reward_fn,
    write_r1_zero,
)
from plainrl.grading.worker import Budget, GradingError, Template, Worker, expressions_equal
from plainrl.records import UserError

REPOSITORY = Path(__file__).parent.parent
CORPUS = read_corpus(grader_report.CORPUS)
GRADING_MODULES = {path.stem for path in (REPOSITORY / "plainrl" / "grading").glob("*.py")} - {"__init__"}
HANGS = "9^{9^{9^9}}"  # in a worker; is_expression refuses it
GROWS = "+".join(f"x^{{{power}}}" for power in range(10, 500))  # takes a few megabytes in parser and sympy

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
    [None, 1.0, [1.0], {}, {"answer_reward": 1.0}, {"reward": None}, {"reward": "1.0"}, {"reward": float("nan")},
     {"reward": float("inf")}, {"reward": 1.0, "length": float("nan")}, {"reward": np.ones(2)}, {"reward": 10**400}],
    ids=lambda result: repr(result)[:30],
)  # fmt: skip
def test_a_result_without_a_finite_reward_is_one_clear_error(result):
    def broken(response, truth):
        return result

    for grade in (lambda: grade_response("a", "1", broken), lambda: grade_responses(["a"], ["1"], Reward(broken))):
        with pytest.raises(ValueError, match=r"reward function \S*broken returned .*: return a dictionary of finite"):
            grade()


def test_a_function_of_ones_own_is_called_by_one_thread_at_a_time_and_its_errors_are_its_own():
    running = []

    def slow(response, truth):
        running.append(response)
        time.sleep(0.01)
        assert running == [response]
        running.remove(response)
        return {"reward": 1.0}

    with ThreadPoolExecutor(4) as threads:
        grades = list(threads.map(lambda response: grade_response(response, "1", slow), "abcdefgh"))
    assert len(grades) == 8
    with pytest.raises(ZeroDivisionError):
        grade_responses(["a"], ["1"], lambda response, truth: {"reward": 1 / 0})


def test_a_reward_with_an_extractor_of_ones_own_is_graded_in_the_workers():
    reward = Reward(
        lambda response, truth: {"reward": 0.0}, extract=lambda response: response.partition("=")[2] or None
    )
    grades = grade_responses(["y=0.5", "y=2", "0.5"], ["1/2"] * 3, reward)
    assert [(grade.rewards["format_reward"], grade.rewards["reward"]) for grade in grades] == [(1, 1), (1, 0), (0, 0)]


def test_grading_imports_nothing_else_of_plainrl_and_not_sympy():
    code = "import sys, plainrl.grading.rewards; print(*[name for name in sys.modules if name[:7] == 'plainrl'])"
    code += "; print('sympy' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    modules, heavy = result.stdout.splitlines()
    names = {"plainrl", "plainrl.grading", *(f"plainrl.grading.{name}" for name in GRADING_MODULES)}
    assert set(modules.split()) == names
    assert heavy == "False False"


def test_the_report_names_what_the_grader_got_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grader_report, "measure_throughput", lambda forms: (1.0, 1234.0))
    path = tmp_path / "pairs.tsv"
    path.write_text("category\tanswer\tground_truth\tequal\treason\na\t1\t1.0\t1\tsame\nb\t1\t1\t0\tnot so\n")
    grader_report.main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["a", "1", "1.000", "0", "0"]
    assert lines[2].split()[:5] == ["b", "1", "0.000", "1", "0"]
    assert lines[3] == "false accept: '1' against '1' (not so)"
    assert lines[4].startswith("ordinary answers: 1,234 per second")
    path.write_text("header\none\ttwo\n")
    with pytest.raises(UserError, match=r"pairs.tsv: .*; give a file with a header and five columns"):
        grader_report.main([str(path)])
    with pytest.raises(UserError, match="usage: uv run python -m experiments.grader_report"):
        grader_report.main(["--report"])


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


def test_what_is_surely_different_is_different_to_sympy_too():
    generator = random.Random(0)
    pairs = [(pair.answer, pair.ground_truth) for pair in CORPUS if pair.equal]
    pairs += [(mutate(one, generator), other) for one, other in pairs]
    pairs = [(tidy(one), tidy(other)) for one, other in pairs]
    pairs = [(one, other) for one, other in pairs if is_expression(one) and is_expression(other)]
    texts = [text for pair in pairs for text in pair]
    pairs += zip(generator.choices(texts, k=300), generator.choices(texts, k=300), strict=True)
    different = [pair for pair in pairs if surely_different(*pair)]
    assert len(different) > 100
    assert [pair for pair in different if is_equal_to_sympy(*pair)] == []


def is_equal_to_sympy(one, other):
    try:
        return expressions_equal(one, other, Budget())
    except GradingError:
        return False


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\sqrt{10^{20}+1}-10^{10}", "0"),  # cancels
        ("1+10^{-30}", "1"),  # too close
        (r"10^{-200}\cdot10^{-200}", "5"),  # underflows
        ("10^{200}10^{200}", "5"),  # overflows
        ("1/0", "5"),
        ("0^0", "5"),
        (r"\sqrt{-4}", "5"),  # complex
        ("(-8)^{1/3}", "5"),
        ("1/2x", "5"),  # read in two ways
        ("3(4)", "5"),
        ("f(x)", "5"),
        (r"2\frac{1}{2}", "5"),
        ("x^12", "5"),
        ("2^3^4", "5"),
        (r"\sin1", "5"),  # left to sympy
        ("|x|", "5"),
        ("(1", "5"),  # no expressions
        ("1)", "5"),
        ("1+", "5"),
        ("", "5"),
    ],
)
def test_no_estimate_is_made_of_what_is_doubtful(one, other):
    assert not surely_different(one, other)
    assert not surely_different(other, one)


def test_ordinary_answers_hardly_need_sympy(monkeypatch):
    """This counts how many answers get as far as sympy. The report prints the rate itself."""
    asked = []
    monkeypatch.setattr("plainrl.grading.equality.expressions_equal", lambda *pair: not asked.append(pair))
    num_right, _ = measure_throughput(ORDINARY, [101])
    assert num_right == 0.5
    assert len(asked) == 2  # one of the 20, and the one that starts the workers
    num_right, _ = measure_throughput(IN_ANOTHER_FORM, [101])
    assert num_right == 1
    assert len(asked) == 3 + len(IN_ANOTHER_FORM)


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


def ask(worker, one, other, seconds=60):
    return worker.ask({"one": one, "other": other}, seconds)[0]


@pytest.fixture(scope="module")
def template():
    """One for all tests: to start it takes two seconds, most of which is the import of sympy."""
    template = Template()
    yield template
    template.stop()


@pytest.fixture
def worker(template):
    worker = Worker(template)
    assert ask(worker, "x+1", "1+x") == {"equal": True}
    yield worker
    worker.stop()


def is_gone(pid):
    return not Path(f"/proc/{pid}").exists()


def test_a_worker_that_hangs_is_killed_and_replaced(worker):
    pid = worker._pid
    started = time.monotonic()
    assert ask(worker, HANGS, "1", 0.5) == {"failure": "timeout"}
    assert is_gone(pid)
    assert ask(worker, "x+1", "1+x") == {"equal": True}
    assert time.monotonic() - started < 1.5  # the new one is forked, which takes less than to import sympy


def test_a_worker_that_grows_is_stopped_and_replaced():
    worker = Worker(Template(memory_bytes=2**20))
    assert ask(worker, "x+1", "1+x") == {"equal": True}
    pid = worker._pid
    assert ask(worker, GROWS, "1") == {"failure": "memory"}
    assert is_gone(pid)
    assert ask(worker, "x+1", "1+x") == {"equal": True}
    worker.template.stop()


def test_a_worker_that_dies_is_replaced(worker):
    killer = threading.Timer(0.3, os.kill, (worker._pid, signal.SIGKILL))
    killer.start()
    assert ask(worker, HANGS, "1") == {"failure": "error"}
    assert ask(worker, "x+1", "1+x") == {"equal": True}


def test_a_template_that_dies_is_replaced_and_its_worker_used_until_then(worker):
    pid = worker._pid
    worker.template._process.kill()
    worker.template._process.wait()
    assert ask(worker, "x+1", "1+x") == {"equal": True}
    assert worker._pid == pid
    worker.stop()
    assert ask(worker, "x+1", "1+x") == {"equal": True}
    assert worker._pid != pid


def test_a_template_that_cannot_start_is_an_error_of_each_item(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert ask(Worker(Template()), "x+1", "1+x") == {"failure": "error"}


def test_failures_are_graded_zero_with_their_reason_counted_and_not_remembered(monkeypatch):
    answers = iter([{"failure": "timeout"}, {"failure": "memory"}, {"failure": "error"}, {"equal": True}])
    monkeypatch.setattr(Worker, "ask", lambda self, question, seconds: (next(answers), 0.1))
    monkeypatch.setattr("plainrl.grading.rewards.NUM_WORKERS", 1)
    grades = grade_responses([r"\boxed{x+x+x}"] * 4, ["3x"] * 4, "question_only")
    assert [grade.failure for grade in grades] == ["timeout", "memory", "error", None]
    assert [grade.rewards["reward"] for grade in grades] == [0, 0, 0, 1]
    assert count_failures([grade.failure for grade in grades]) == {"timeouts": 1, "out_of_memory": 1, "errors": 1}
    worker_module._known.clear()


def test_an_answer_has_one_budget_of_time_however_many_parts_it_has(monkeypatch):
    """Two parts of 3 seconds each: the second has 2 left, a third would have none."""
    allowed = []

    def ask_slowly(self, question, seconds):
        allowed.append(seconds)
        return {"equal": True}, 3.0

    monkeypatch.setattr(Worker, "ask", ask_slowly)
    assert answers_match("(a+a,b+b)", "(2a,2b)")
    assert allowed == [5.0, 2.0]
    with pytest.raises(GradingError, match="timeout"):
        answers_match("(c+c,d+d,x+x)", "(2c,2d,2x)")
    worker_module._known.clear()


def test_a_start_works_in_any_folder_and_is_not_charged_to_the_answer(template, tmp_path, monkeypatch):
    (tmp_path / "sympy.py").write_text("raise SystemExit('the wrong sympy')")
    monkeypatch.chdir(tmp_path)
    template.stop()
    started = time.perf_counter()
    answer, seconds = Worker(template).ask({"one": "x+1", "other": "1+x"}, 60)
    assert answer == {"equal": True}
    assert seconds < (time.perf_counter() - started) / 2  # a start imports sympy


def test_an_interrupted_question_leaves_no_answer_behind(worker, monkeypatch):
    def interrupt(self, question, seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_exchange", interrupt)
        with pytest.raises(KeyboardInterrupt):
            worker.ask({"one": "x+1", "other": "1+x"}, 60)
    assert ask(worker, "1", "2") == {"equal": False}


def has_ended(pid):
    """Whether a process is gone, or waits only for init to collect its status, which may take a second."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("end", ["exits", "killed while idle", "killed while they compute"])
def test_no_worker_outlives_its_parent(end):
    code = f"""
import sys, time
from plainrl.grading import worker as worker_module
from plainrl.grading.equality import answers_match
assert answers_match("x+1", "1+x")
workers = list(worker_module._pool().queue)
print(workers[0].template._process.pid, *[worker._pid for worker in workers if worker._pid], flush=True)
if "compute" in sys.argv[1]:
    worker_module.expressions_equal({HANGS!r}, "1", worker_module.Budget(600))
if "killed" in sys.argv[1]:
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code, end], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) >= 2
    if "compute" in end:
        time.sleep(0.5)  # until they do
    if "killed" in end:
        process.kill()
    process.wait(timeout=30)
    process.stdout.close()
    deadline = time.monotonic() + 12  # a worker's own timer would end it later than this
    while not all(has_ended(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.05)


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
    assert time.monotonic() - started < 3 * worker_module.SECONDS_PER_ITEM
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
    assert sum(grade.failure is not None for grade in grades) <= 20
    assert seconds < 180  # 8 s on two free cores
    worker_module.stop_workers()
    assert not worker_module._pools


def test_reformatted_numbers_equal_themselves_and_no_other():
    generator = random.Random(1)
    numbers = [generator.choice([1, -1]) * int(10 ** generator.uniform(0, 6)) for _ in range(300)]
    forms = ["{:,}", "{}.00", "${}", r"\${}", "{} eggs", r"{}\text{{ hours}}", r"\boxed{{{}}}"]
    for number, other in itertools.pairwise(numbers):
        for form in forms:
            response = f"</think> <answer> {form.format(number)} </answer>"
            assert r1_zero_reward_fn(response, str(number))["reward"] == 1
            assert r1_zero_reward_fn(response, str(other))["reward"] == (number == other)
