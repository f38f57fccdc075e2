"""The two parsers of the supplement: the assertions of the official test_metrics.py, and hostile text."""

import time

import pytest
from adapters import run_parse_gsm8k_response, run_parse_mmlu_response

from plainrl.config import SFTConfig
from plainrl.grading.rewards import grade_responses
from supplement.answer_parsers import parse_mmlu_response

MMLU = {
    "subject": "virology",
    "question": "How many human polyomaviruses are known at present?",
    "options": ["100", "1", "10", "unknown"],
    "answer": "A",
}


def test_official_assertions():
    output = "The correct answer is B. There is only one human polyomavirus known at present, which is the BK virus."
    assert run_parse_mmlu_response(mmlu_example=MMLU, model_output=output) == "B"
    output = "The correct answer is 10000 polyomaviruses."
    assert not run_parse_mmlu_response(mmlu_example=MMLU, model_output=output)
    output = "Natalia sold 48/2 = 24 clips in May. Natalia sold 48+24 = 72 clips altogether in April and May."
    assert run_parse_gsm8k_response(model_output=output) == "72"
    output = "Natalia sold twenty-four clips in May. Thus, Natalia sold seventy-two clips altogether in April and May."
    assert not run_parse_gsm8k_response(model_output=output)


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("A bad answer is B", "B"),
        ("(C)", "C"),
        ("the answer is A or B", None),
        ("The correct answer is A.", "A"),
        ("The correct answer is (D)", "D"),
        ("The correct answer is **C**.", "C"),
        ('The correct answer is "C".', "C"),
        ("The correct answer is: D", "D"),
        ("The correct answer is option B, which says 1.", "B"),
        ("the correct answer is b.", "B"),
        ("The correct answer is A because a polyomavirus is small.", "A"),
        ("The correct answer is A 100", "A"),
        ("The correct answer is a national holiday.", None),
        ("The correct answer is A bad one.", None),
        ("The correct answer is B. A wrong answer is C.", "B"),
        ("The answer is not A. The correct answer is D.", "D"),
        ("A tempting answer is A, but the correct answer is B", "B"),
        ("The correct answer is B. The correct answer is C.", None),
        ("The correct answer is B. Indeed, the correct answer is B.", "B"),
        ("The correct answer is A, B or C.", None),
        ("The correct answer is A and B.", None),
        ("The correct answer is Hepatitis B.", None),
        ("The correct answer is AB.", None),
        ("The correct answer is C++.", None),
        ("The correct answer is _, filling the blank", None),
        ("Answer: C", "C"),
        ("answer = d", "D"),
        ("B", "B"),
        ("B.", "B"),
        (" B) 1", "B"),
        ("C. 10\nThe number of polyomaviruses", "C"),
        ("A. 100\nB. 1\nC. 10\nD. unknown", None),  # it repeats the options
        ("A virus is small", None),
        ("I choose C.", "C"),
        ("It is D", "D"),
        ("I would say (B), as one is known", "B"),
        ("Either (A) or (B)", None),
        ("$\\boxed{C}$", "C"),
        ("The final answer is \\boxed{A}.", "A"),
        ("\\boxed{\\text{B}}", "B"),
        ("The correct answer is $B$", "B"),
        ("The correct answer is 'C'.", "C"),
        ("The correct answer is \u2018C\u2019.", "C"),
        ("The correct answer is C, D is wrong", "C"),
        ("The correct answer is A, B is also right", None),
        ("The correct answer to the question is B", "B"),
        ("The correct answer is $\\boxed{B}$.", "B"),
        ("The final answer is: $\\boxed{C}$", "C"),
        ("The final answer is \\(\\boxed{C}\\)", "C"),
        ("The correct answer is \\(B\\).", "B"),
        ("The correct answer is $\\text{B}$.", "B"),
        ("The correct answer is $\\text{(B)}$.", "B"),
        ("The correct answer is \\textbf{B}.", "B"),
        ("\\[ \\boxed{\\textbf{(D)}} \\]", "D"),
        ("The correct answer is a, b or c.", None),
        ("The correct answer is (a), (b)", None),
        ("The correct answer is (a) or (b)", None),
        ("The correct answer is A or, maybe, B", None),
        ("The correct answer is A + B", None),
        ("The correct answer is B or maybe C", None),
        ("The correct answer is B (or C)", None),
        ("The correct answer is B and possibly C", None),
        ("The correct answer is B as well as C", None),
        ("The correct answer is B, a small number", "B"),
        ("The correct answer would be C", "C"),
        ("The answer should be D.", "D"),
        ("I think B is correct", "B"),
        ("I think that B is the best choice.", "B"),
        ("B is the correct answer", "B"),
        ("One is known. Thus, option B is correct.", "B"),
        ("B is not correct", None),
        ("A or B is correct", None),
        ("I think neither. B is best described as an acid", None),
        ("A is right-angled", None),
        ("B is the correct answer? No.", None),
        ("$\\boxed{\\mathrm{C}}$", "C"),
        ("The correct answer is $\\mathbf{B}$.", "B"),
        ("Vitamin A is the best source", None),
        ("The answer to this question is B", "B"),
        ("E", None),
        ("The correct answer is E.", None),
        ("Vitamin A deficiency and hepatitis B", None),
        ("", None),
        ("   \n", None),
        ("🙂", None),
    ],
)
def test_letters(output, letter):
    assert run_parse_mmlu_response(MMLU, output) == letter


@pytest.mark.parametrize(
    "output",
    [
        "I do not know." + 20_000 * "\n" + "x",
        "The correct answer is A," + 20_000 * " ",
        "The correct answer is" + 20_000 * " ",
        2_000 * "-\n",
        20_000 * "(",
        2_000 * "the answer to ",
        2_000 * "I think ",
    ],
)
def test_no_response_takes_long(output):
    started = time.process_time()
    run_parse_mmlu_response(MMLU, output)
    run_parse_gsm8k_response(output)
    assert time.process_time() - started < 2


def test_a_letter_without_an_option_is_no_answer():
    assert parse_mmlu_response({"options": ["yes", "no"]}, "The correct answer is C.") is None
    assert parse_mmlu_response({"options": ["yes", "no"]}, "The correct answer is B.") == "B"


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("1,234.", "1234"),
        ("-3", "-3"),
        ("$5.00", "5.00"),
        ("72.", "72"),
        ("She sold 15 clips.", "15"),
        ("The total is $1,234,567.89.", "1234567.89"),
        ("48-24", "24"),
        ("48 - 24 = 24", "24"),
        ("48 - 24", "24"),
        ("so:\n- 18", "18"),
        ("Total - $50", "50"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5", "-5"),
        ("it is \u22127", "-7"),
        ("it is \u20137", "-7"),
        ("between 3\u20134", "4"),
        ("a loss of -\\$5", "-5"),
        ("(-3)", "-3"),
        ("between 3-4", "4"),
        ("(2)-3", "3"),
        ("x = -3.5%", "-3.5"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        (".5 of it", ".5"),
        ("72 clips in 2 months", "2"),
        ("#### 72", "72"),
        ("It costs 72$.", "72"),
        ("\\boxed{72}", "72"),
        ("**72**", "72"),
        ("seventy-two", None),
        ("٧٢", None),
        ("", None),
        ("...", None),
        ("-", None),
    ],
)
def test_numbers(output, number):
    assert run_parse_gsm8k_response(output) == number


@pytest.mark.parametrize(
    ("response", "rewards"),
    [("so 72", (1.0, 1.0)), ("so 72.00 clips", (1.0, 1.0)), ("so 71", (0.0, 1.0)), ("so many", (0.0, 0.0))],
)
def test_the_score_of_gsm8k_as_a_reward(response, rewards):
    config = SFTConfig(preset="laptop", reward="supplement/answer_parsers.py:last_number_reward")
    (grade,) = grade_responses([response], ["72"], config.reward_function)
    assert (grade.rewards["answer_reward"], grade.rewards["format_reward"]) == rewards
