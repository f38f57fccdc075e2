"""What several responses to a question show: pass@k, maj@k, and intervals over questions.

Symbols: n responses to a question, c of them right; k <= n of them are looked at. Both quantities are expectations over
all subsets of k responses, each equally likely, and are computed exactly.

    pass@k     the probability that at least one of k responses is right:   1 - C(n - c, k) / C(n, k)
    maj@k      the probability that the answer which most of k responses give is right

An interval is over questions. The responses to one question depend on each other, so that a question counts as one
observation, however many responses it has.

Sources: Chen et al. 2021 (Codex, arXiv 2107.03374), equation 1; Wang et al. 2023 (self-consistency, arXiv 2203.11171);
Wilson 1927, "Probable inference"; Kish 1965, "Survey Sampling" (the effective number of observations); Agresti and
Coull 1998, "Approximate is better than exact".
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import numpy as np

from plainrl.data import derive_seed
from plainrl.grading.arithmetic import GradingError
from plainrl.grading.equality import answers_match
from plainrl.grading.rewards import clean_ground_truth

QUANTILE = NormalDist().inv_cdf(0.975)  # of a 95 % interval


class AnswerClass(NamedTuple):
    """Responses to a question whose answers are equal: how many there are, and how many of them were graded right."""

    num_votes: int
    num_right: int


def sample_counts(num_samples: int) -> list[int]:
    """Return the k that are shown for n samples: the powers of two up to n, and n.

    >>> sample_counts(1), sample_counts(8), sample_counts(12)
    ([1], [1, 2, 4, 8], [1, 2, 4, 8, 12])
    """
    powers = [2**exponent for exponent in range(num_samples.bit_length())]
    return list(dict.fromkeys([*powers, num_samples]))


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that at least one of k responses to a question is right, without bias.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} (1 - k / i)

    1 - (1 - c/n)^k would be too low, since it draws with replacement.

    Args:
        num_samples: n, responses to the question.
        num_right: c, how many of them are right.
        k: how many are looked at, 1 <= k <= n.

    Raises:
        ValueError: k or c is outside its range.

    Source: Chen et al. 2021, equation 1 and figure 3.

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 0, 4), pass_at_k(4, 3, 2)
    (0.5, 0.0, 1.0)
    """
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"k = {k}, {num_right} right of {num_samples}: give 1 <= k <= n and 0 <= c <= n")
    if num_samples - num_right < k:
        return 1.0  # any k responses have a right one among them
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_right + 1, num_samples + 1))


def majority_at_k(classes: Sequence[AnswerClass], num_samples: int, k: int) -> float:
    """Return the probability that the vote of k responses to a question is right.

    The class with most of the k votes wins. Of classes with equally many votes each wins equally likely. The vote then
    answers with any of the class's responses. It is wrong if none of the k responses has an answer.

    Args:
        classes: the classes of equal answers.
        num_samples: n, responses to the question. Those that stand in no class have no answer, and do not vote.
        k: how many responses vote, 1 <= k <= n.

    Raises:
        ValueError: k is outside its range, or the classes have more votes than there are responses.

    Source: Wang et al. 2023. The expectation over all subsets of k of the n responses is exact.

    One wrong and two right responses, k = 2: the two pairs of a wrong and a right one are ties, and count half.

    >>> round(majority_at_k([AnswerClass(1, 0), AnswerClass(2, 2)], num_samples=3, k=2), 6)
    0.666667
    """
    num_voters = sum(of_class.num_votes for of_class in classes)
    if not 1 <= k <= num_samples or num_voters > num_samples:
        raise ValueError(f"k = {k}, {num_voters} votes of {num_samples} responses: give 1 <= k <= n, and at most n")
    most_votes = min(k, max((of_class.num_votes for of_class in classes), default=0))
    right_subsets = sum(_subsets_won_with(most, classes, num_samples, k) for most in range(1, most_votes + 1))
    return min(right_subsets / math.comb(num_samples, k), 1.0)  # rounding could exceed 1


def group_equal_answers(answers: Sequence[str | None]) -> list[list[int]]:
    r"""Return the indices of equal answers, class by class, in the order in which the classes appear.

    An answer belongs to the first class whose first member equals it. A comparison that exceeds a limit counts as
    unequal. An answer that is None or empty belongs to no class.

    >>> group_equal_answers(["0.5", None, r"\frac{1}{2}", "2", "0.50", ""])
    [[0, 2, 4], [3]]
    """
    cleaned = [None if answer is None else clean_ground_truth(answer) for answer in answers]
    classes: dict[str, list[int]] = {}  # by the first member
    class_of: dict[str, str] = {}  # an answer as written -> the first member of its class
    for index, answer in enumerate(cleaned):
        if not answer:
            continue
        if answer not in class_of:
            class_of[answer] = next((first for first in classes if _are_equal(answer, first)), answer)
        classes.setdefault(class_of[answer], []).append(index)
    return list(classes.values())


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean over questions of values between 0 and 1.

    It is Wilson's interval for the number of yes-or-no questions that would give the mean the same variance:

        n' = n m (1 - m) / s^2,      n: number of questions

    The mean m and the variance s^2 = mean squared deviation are here those of the n values, one 0 and one 1. The two
    stand for the questions that were not asked: n values close to each other do not show that all others are, too.
    Without them one right response among thousands would narrow the interval to nearly nothing. With values of 0 and 1
    alone, n' = n. Unlike m +- 2 s / sqrt(n), the interval ends at 0 and 1 and has a width where all values are 0.

    Args:
        values: one for each question, at least one.

    Source: Wilson 1927; Kish 1965; Agresti and Coull 1998 (values that are added).

    >>> low, high = interval_of_mean([0.0] * 5 + [1.0] * 5)
    >>> round(low, 4), round(high, 4)
    (0.2366, 0.7634)
    """
    added = [*values, 0.0, 1.0]
    share = fmean(added)
    variance = fmean([(value - share) ** 2 for value in added])
    return wilson_interval(fmean(values), len(values) * share * (1 - share) / variance)


def wilson_interval(share: float, num_trials: float) -> tuple[float, float]:
    """Return the 95 % interval of a probability, given the share of successes in a number of trials.

        (m + z^2 / 2n +- z sqrt(m (1 - m) / n + z^2 / 4n^2)) / (1 + z^2 / n),      z = 1.96

    Source: Wilson 1927.

    >>> low, high = wilson_interval(0.0, 10)
    >>> round(low, 4), round(high, 4)
    (0.0, 0.2775)
    """
    ratio = QUANTILE**2 / num_trials
    middle = share + ratio / 2
    half = math.sqrt(ratio * (share * (1 - share) + ratio / 4))
    return max(0.0, (middle - half) / (1 + ratio)), min(1.0, (middle + half) / (1 + ratio))


def repeat_each(values: Sequence[Any], num_samples: int) -> list[Any]:
    """Return each value as often as there are samples. Those of a question stand next to each other.

    >>> repeat_each(["a", "b"], 2)
    ['a', 'a', 'b', 'b']
    """
    return [value for value in values for _ in range(num_samples)]


def sampling_seeds(seed: int, num_prompts: int, num_samples: int) -> list[int]:
    """Return the seed of every sample. The first of a prompt has the same one, however many there are.

    >>> sampling_seeds(0, num_prompts=2, num_samples=3)[::3] == sampling_seeds(0, num_prompts=2, num_samples=1)
    True
    """
    numbers = [() if sample == 0 else (sample,) for sample in range(num_samples)]
    return [derive_seed(seed, "evaluation", prompt, *number) for prompt in range(num_prompts) for number in numbers]


def summarize_samples(
    examples: Sequence[Mapping[str, Any]], extract: Callable[[str], str | None] | None
) -> dict[str, float | None]:
    """Return pass@k and maj@k of an evaluation, each with its interval, for the k of `sample_counts`.

    Args:
        examples: of `policy_evaluation.log_generations`. Every question has the same number of responses.
        extract: returns the answer in a response, or None. Without it maj@k is None.

    Returns:
        `pass_at_<k>`, `pass_at_<k>_low`, `pass_at_<k>_high`, and the same of `majority_at_<k>`.
    """
    by_question: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for example in examples:
        by_question[example["question"]].append(example)
    rights = [[row["answer_reward"] == 1 for row in rows] for rows in by_question.values()]
    classes = []
    for rows, is_right in zip(by_question.values(), rights, strict=True):
        equal = group_equal_answers([extract(row["response"]) for row in rows]) if extract else []
        classes.append([AnswerClass(len(members), sum(is_right[index] for index in members)) for members in equal])
    num_samples = len(rights[0])
    metrics: dict[str, float | None] = {}
    for k in sample_counts(num_samples):
        metrics |= _with_interval(f"pass_at_{k}", [pass_at_k(num_samples, sum(right), k) for right in rights])
        votes = [majority_at_k(of_question, num_samples, k) for of_question in classes] if extract else []
        metrics |= _with_interval(f"majority_at_{k}", votes)
    return metrics


def samples_table(metrics: Mapping[str, float | int | None]) -> str:
    """Return pass@k and maj@k with their intervals as a table for the terminal, one line for each k."""
    ks = [int(name.removeprefix("pass_at_")) for name in metrics if name.removeprefix("pass_at_").isdecimal()]
    cells = [["k", "pass@k (95 %)", "maj@k (95 %)"]]
    for k in ks:
        cells.append([str(k), *(_describe(metrics, f"{name}_at_{k}") for name in ("pass", "majority"))])
    return "\n".join(f"  {k:>4}  {passed:<24}  {voted}" for k, passed, voted in cells)


def is_of_several(name: str) -> bool:
    """Return whether a metric's name is one of `summarize_samples`.

    >>> is_of_several("pass_at_4_low"), is_of_several("answer_reward")
    (True, False)
    """
    return name.startswith(("pass_at_", "majority_at_"))


def _subsets_won_with(most: int, classes: Sequence[AnswerClass], num_samples: int, k: int) -> float:
    """Return how many subsets of k responses are won with `most` votes, each counted by how likely it is right."""
    rivals = [of_class for of_class in classes if of_class.num_votes >= most]
    num_others = num_samples - sum(of_class.num_votes for of_class in rivals)  # of classes that never have `most` votes
    most_tied, most_behind = min(k // most, len(rivals)), min(k, (most - 1) * len(rivals))
    # Axes: subsets of the rivals' responses, and these times the right share of the classes with `most` votes; how many
    # such classes there are; how many votes the other rivals have.
    counts = np.zeros((2, most_tied + 1, most_behind + 1))
    counts[0, 0, 0] = 1.0
    for num_votes, num_right in rivals:
        extended = np.zeros_like(counts)
        for taken in range(min(most, most_behind + 1)):
            extended[:, :, taken:] += float(math.comb(num_votes, taken)) * counts[:, :, : most_behind + 1 - taken]
        tied = float(math.comb(num_votes, most)) * counts[:, :-1]
        extended[:, 1:] += tied
        extended[1, 1:] += num_right / num_votes * tied[0]
        counts = extended
    return sum(
        float(counts[1, num_tied, num_behind]) / num_tied * math.comb(num_others, left)
        for num_tied in range(1, most_tied + 1)
        for num_behind in range(most_behind + 1)
        if (left := k - num_tied * most - num_behind) >= 0
    )


def _are_equal(one: str, other: str) -> bool:
    try:
        return answers_match(one, other)
    except GradingError:
        return False


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    low, high = interval_of_mean(values)
    return {name: fmean(values), f"{name}_low": low, f"{name}_high": high}


def _describe(metrics: Mapping[str, float | int | None], name: str) -> str:
    if metrics[name] is None:
        return "-"
    return f"{metrics[name]:.3f} ({metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f})"
