"""pass@k and maj@k against every subset, ties by hand, classes of equal answers, intervals against scipy."""

import itertools
import math
import operator
import random
from statistics import fmean

import pytest
from scipy import stats

from plainrl.grading.rewards import extract_r1_zero
from plainrl.several_samples import (
    AnswerClass,
    group_equal_answers,
    interval_of_mean,
    majority_at_k,
    pass_at_k,
    sample_counts,
    samples_table,
    summarize_samples,
    wilson_interval,
)


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(num_samples):
    for num_right, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        is_right = [True] * num_right + [False] * (num_samples - num_right)
        expected = fmean(any(chosen) for chosen in itertools.combinations(is_right, k))
        assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected, abs=1e-14)


def test_pass_at_k_keeps_its_precision_for_many_samples():
    """One right response is among k of n with a probability of k / n; nearly certain is not rounded to certain."""
    assert pass_at_k(1000, 1, 10) == pytest.approx(0.01, rel=1e-12)
    exact = 1 - math.comb(998, 900) / math.comb(1000, 900)
    assert pass_at_k(1000, 2, 900) == pytest.approx(exact, rel=1e-12)


def vote(answers):
    """How likely the vote is right: answers are (class, is right), or None where there is none."""
    votes = [answer[0] for answer in answers if answer is not None]
    if not votes:
        return 0.0
    most = max(map(votes.count, votes))
    winners = {name for name in votes if votes.count(name) == most}
    right = {name: fmean(is_right for label, is_right in filter(None, answers) if label == name) for name in winners}
    return fmean(right.values())


@pytest.mark.parametrize("seed", range(40))
def test_majority_at_k_is_the_mean_over_all_subsets(seed):
    generator = random.Random(seed)
    num_samples = generator.randint(1, 8)
    labels = [generator.choice([None, 0, 1, 2, 3]) for _ in range(num_samples)]
    right_label = generator.randint(0, 3)
    answers = [None if label is None else (label, label == right_label) for label in labels]
    classes = [
        AnswerClass(labels.count(label), labels.count(label) * (label == right_label))
        for label in dict.fromkeys(labels)
        if label is not None
    ]
    for k in range(1, num_samples + 1):
        expected = fmean(vote(chosen) for chosen in itertools.combinations(answers, k))
        assert majority_at_k(classes, num_samples, k) == pytest.approx(expected, abs=1e-12), (labels, k)


def test_ties_count_in_equal_parts():
    right, wrong = AnswerClass(2, 2), AnswerClass(2, 0)
    assert majority_at_k([right, wrong], 4, 4) == 0.5
    assert majority_at_k([wrong, right], 4, 4) == 0.5  # whichever came first
    assert majority_at_k([right, wrong, AnswerClass(2, 0)], 6, 6) == pytest.approx(1 / 3)
    assert majority_at_k([right, AnswerClass(1, 0)], 3, 3) == 1.0


def test_responses_without_an_answer_do_not_vote():
    """One right answer of three responses: it wins each pair that it is in, 2 of 3."""
    assert majority_at_k([AnswerClass(1, 1)], 3, 2) == pytest.approx(2 / 3)
    assert majority_at_k([], 3, 2) == 0.0


def test_a_class_that_is_right_in_part_answers_with_any_of_its_members():
    """20 % was graded right and 20 was not, although they are equal: the vote for them is right half the time."""
    assert majority_at_k([AnswerClass(2, 1)], 2, 2) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_one_response_votes_for_itself(seed):
    generator = random.Random(seed)
    sizes = [generator.randint(1, 5) for _ in range(4)]
    classes = [AnswerClass(size, generator.randint(0, size)) for size in sizes]
    num_samples, num_right = sum(sizes) + 3, sum(of_class.num_right for of_class in classes)
    assert majority_at_k(classes, num_samples, 1) == pytest.approx(pass_at_k(num_samples, num_right, 1), abs=1e-14)


def test_the_vote_of_a_thousand_is_a_number():
    """The numbers of subsets have 300 digits. Here they are counted in whole numbers: the larger part of 500 wins."""
    subsets = {
        (a, b): math.comb(40, a) * math.comb(30, b) * math.comb(930, 500 - a - b) for a in range(41) for b in range(31)
    }
    won = sum(number * (2 * (a > b) + (a == b > 0)) for (a, b), number in subsets.items())
    found = majority_at_k([AnswerClass(40, 40), AnswerClass(30, 0)], 1000, 500)
    assert found == pytest.approx(won / (2 * math.comb(1000, 500)), rel=1e-10)
    assert majority_at_k([AnswerClass(40, 40), *[AnswerClass(1, 0)] * 960], 1000, 1) == pytest.approx(0.04)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pass_at_k(4, 5, 1),
        lambda: pass_at_k(4, 1, 0),
        lambda: pass_at_k(4, 1, 5),
        lambda: majority_at_k([], 3, 4),
        lambda: majority_at_k([AnswerClass(4, 0)], 3, 1),
    ],
)
def test_numbers_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="give 1 <= k <= n"):
        call()


def test_answers_that_the_grader_takes_for_equal_are_one_class():
    answers = [r"\frac{1}{2}", "0.5", None, "2", "$0.50$", "", "x = 2"]
    assert group_equal_answers(answers) == [[0, 1, 4], [3, 6]]


def test_an_answer_joins_the_first_class_that_it_equals():
    """20 % equals 20 and 0.2, which do not equal each other."""
    assert group_equal_answers(["20", "0.2", r"20\%"]) == [[0, 2], [1]]
    assert group_equal_answers([r"20\%", "20", "0.2"]) == [[0, 1, 2]]


def test_a_comparison_that_takes_too_long_is_none(monkeypatch):
    from plainrl import several_samples
    from plainrl.grading.arithmetic import GradingError

    def too_long(*_):
        raise GradingError("timeout")

    monkeypatch.setattr(several_samples, "answers_match", too_long)
    assert group_equal_answers(["1", "2", "1"]) == [[0, 2], [1]]


@pytest.mark.parametrize(("num_right", "num_trials"), [(0, 7), (3, 10), (206, 1024), (7, 7)])
def test_wilsons_interval_is_scipys(num_right, num_trials):
    expected = stats.binomtest(num_right, num_trials).proportion_ci(method="wilson")
    for found in (
        wilson_interval(num_right / num_trials, num_trials),
        interval_of_mean([1.0] * num_right + [0.0] * (num_trials - num_right)),
    ):
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_an_interval_covers_the_mean_of_the_questions_95_times_in_100():
    """Questions of three kinds, 8 responses each: the interval of pass@1 is over questions, not over responses."""
    generator = random.Random(0)
    covered = narrow = 0
    for _ in range(1000):
        chances = [generator.choice([0.02, 0.4, 0.9]) for _ in range(100)]
        shares = [fmean(generator.random() < chance for _ in range(8)) for chance in chances]
        low, high = interval_of_mean(shares)
        covered += low <= fmean([0.02, 0.4, 0.9]) <= high
        low, high = wilson_interval(fmean(shares), 800)  # as if the responses were independent
        narrow += low <= fmean([0.02, 0.4, 0.9]) <= high
    assert 930 <= covered <= 970
    assert narrow < 700


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_interval_does_not_jump_where_one_response_differs(value):
    """128 questions with 32 responses each: one response that differs says next to nothing about other questions."""
    same, nearly = [value] * 128, [value] * 127 + [abs(value - 1 / 32)]
    for one, other in zip(interval_of_mean(same), interval_of_mean(nearly), strict=True):
        assert one == pytest.approx(other, abs=0.002)
    middle = interval_of_mean([0.5] * 128)
    assert middle == pytest.approx(interval_of_mean([0.5] * 127 + [0.5 + 1 / 32]), abs=0.001)
    assert middle[1] - middle[0] > 0.02  # and not nothing


@pytest.mark.parametrize(
    ("chances", "weights"), [((0.002, 1.0), (0.998, 0.002)), ((0.0, 0.05), (0.98, 0.02)), ((0.5, 0.0), (0.95, 0.05))]
)
def test_an_interval_covers_a_mean_that_few_questions_decide(chances, weights):
    """Nearly all questions have one value. The few others are often not among those that were asked."""
    generator, truth, covered = random.Random(0), sum(map(operator.mul, chances, weights)), 0
    for _ in range(400):
        asked = generator.choices(chances, weights, k=64)
        low, high = interval_of_mean([fmean(generator.random() < chance for _ in range(16)) for chance in asked])
        covered += low <= truth <= high
    assert covered >= 375


def row(question, answer, is_right):
    response = f" </think> <answer> {answer} </answer>" if answer else "no answer"
    return {"question": question, "response": response, "answer_reward": float(is_right)}


def test_a_summary_by_hand():
    """Two questions, four responses each: one right and two equal wrong; and three right, of which two are equal."""
    rows = [
        *(row(0, "1", 1), row(0, "2", 0), row(0, "2.0", 0), row(0, None, 0)),
        *(row(1, "5", 1), row(1, "5", 1), row(1, "7", 0), row(1, "5.0", 1)),
    ]
    metrics = summarize_samples(rows, extract_r1_zero)
    assert metrics["pass_at_1"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert metrics["pass_at_2"] == pytest.approx((1 / 2 + 1) / 2)
    assert metrics["pass_at_4"] == 1.0
    # Question 0: of 6 pairs, right and none is right; right and wrong are 2 ties. Question 1: 3 pairs right, 3 ties.
    assert metrics["majority_at_2"] == pytest.approx(((1 + 2 / 2) / 6 + (3 + 3 / 2) / 6) / 2)
    assert metrics["majority_at_4"] == (0 + 1) / 2
    low, high = interval_of_mean([1 / 2, 1.0])
    assert (metrics["pass_at_2_low"], metrics["pass_at_2_high"]) == (low, high)
    assert {name.partition("_at_")[2] for name in metrics} == {
        f"{k}{end}" for k in (1, 2, 4) for end in ("", "_low", "_high")
    }
    lines = samples_table(metrics).splitlines()
    assert len(lines) == 4 and lines[0].split()[:2] == ["k", "pass@k"]
    assert lines[2].split() == ["2", "0.750", f"({low:.3f}", "to", f"{high:.3f})", "0.542", *lines[2].split()[-3:]]


def test_without_a_way_to_extract_answers_there_is_no_vote():
    metrics = summarize_samples([row(0, "1", 1), row(0, "1", 1)], None)
    assert metrics["pass_at_2"] == 1.0
    assert metrics["majority_at_2"] is metrics["majority_at_2_low"] is None
    assert samples_table(metrics).splitlines()[-1].split()[-1] == "-"


def test_all_the_k_that_are_shown_can_be_drawn():
    for num_samples in range(1, 40):
        ks = sample_counts(num_samples)
        assert ks == sorted(set(ks)) and ks[0] == 1 and ks[-1] == num_samples
