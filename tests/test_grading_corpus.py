"""The corpus of pairs: what it must hold to be a test of the grader."""

from collections import Counter, defaultdict

import grader_report
import pytest

CORPUS = grader_report.read_corpus(grader_report.CORPUS)
# Kinds of answers that were once misjudged: each is tested by many pairs, near misses among them.
KINDS = (
    "percent_sign function_before_product several_dollars boxed_ground_truth doubled_backslashes plain_text_algebra "
    "approx_tail units_glued_or_unlisted interval_and_inequality column_vector_as_tuple array_for_matrix "
    "letter_for_union and_in_lists scaled_equation assignments short_words bold fraction_slash short_frac "
    "spaces_in_thousands upright_text_and_cfrac degrees_and_radians positive_variables"
).split()


def test_each_line_is_complete():
    for pair in CORPUS:
        assert pair.category.strip() and pair.reason.strip(), pair
        assert pair.ground_truth.strip(), pair
        assert pair.ground_truth != pair.answer or pair.equal, pair


def test_no_two_lines_say_the_opposite():
    """Equality has no direction, so a pair turned round has the same verdict."""
    verdicts = defaultdict(set)
    for pair in CORPUS:
        verdicts[frozenset((pair.answer, pair.ground_truth))].add(pair.equal)
    assert [texts for texts, found in verdicts.items() if len(found) > 1] == []


def test_no_pair_stands_twice():
    counts = Counter((pair.answer, pair.ground_truth) for pair in CORPUS)
    assert [texts for texts, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_many_pairs_and_a_third_of_them_are_unequal(kind):
    verdicts = [pair.equal for pair in CORPUS if pair.category == kind]
    assert len(verdicts) >= 24
    assert verdicts.count(False) * 3 >= len(verdicts)
    assert verdicts.count(True) >= 10


def test_the_lines_of_a_kind_stand_together():
    categories = [pair.category for pair in CORPUS if pair.category in KINDS]
    starts = [name for name, before in zip(categories, [None, *categories], strict=False) if name != before]
    assert starts == KINDS
