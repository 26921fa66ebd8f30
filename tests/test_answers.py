"""The measures of answers against the official rule of SQuAD, written down as it is there."""

import collections
import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import EmptyError, RangeError
from hiernb.evaluation.answers import answer_present, evaluate_answers, evidence_recall, exact_match, normalize_answer, token_f1

TOKENS = ["the", "A", "an", "cat's", "U.S.", "1,000", "Été", "-", "—", "", "dog", "dog", "Dog!", "theatre", "\t", "ana"]
TEXT = st.lists(st.sampled_from(TOKENS), max_size=8).map(" ".join)


def official_normalize(s):
    "As in evaluate-v2.0.py."

    def remove_articles(text):
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def remove_punc(text):
        return "".join(ch for ch in text if ch not in set(string.punctuation))

    return " ".join(remove_articles(remove_punc(s.lower())).split())


def official_f1(a_gold, a_pred):
    "As in evaluate-v2.0.py."
    gold_toks, pred_toks = (official_normalize(a).split() if a else [] for a in (a_gold, a_pred))
    num_same = sum((collections.Counter(gold_toks) & collections.Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = 1.0 * num_same / len(pred_toks), 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.lists(TEXT, max_size=3))
def test_official_rule(said, golds):
    accepted = [g for g in golds if official_normalize(g)] or [""]
    assert normalize_answer(said) == official_normalize(said)
    assert exact_match(said, golds) == max(int(official_normalize(g) == official_normalize(said)) for g in accepted)
    assert token_f1(said, golds) == pytest.approx(max(official_f1(g, said) for g in accepted))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_bounds_and_symmetry(a, b):
    assert 0 <= exact_match(a, b) <= token_f1(a, b) <= 1
    assert token_f1(a, a) == exact_match(a, a) == 1
    assert token_f1(a, b) == pytest.approx(token_f1(b, a))


PLACES = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 30), st.integers(0, 12)).map(lambda p: (p[0], p[1], p[1] + p[2])), max_size=6)


@settings(max_examples=200, deadline=None)
@given(PLACES, PLACES)
def test_recall_counts_characters(found, gold):
    held, wanted = ({(s, i) for s, a, b in places for i in range(a, b)} for places in (found, gold))
    if not wanted:
        with pytest.raises(EmptyError):
            evidence_recall(found, gold)
    else:
        assert evidence_recall(found, gold) == pytest.approx(len(held & wanted) / len(wanted))
        assert evidence_recall(found + gold, gold) == 1


def test_bad_places_and_answers():
    with pytest.raises(RangeError):
        evidence_recall([("a", 5, 3)], [("a", 0, 1)])
    assert answer_present([], "x") == 0
    assert answer_present(["in 1,000 BC"], ["1000"]) == 1


def test_errors_are_no_wrong_answers():
    ranking = evaluate_answers(["yes", None, ""], [["yes"], ["no"], ["no"]])
    assert ranking.values["em"].tolist() == [1, 0, 0] and ranking.values["error"].tolist() == [0, 1, 0]
    assert np.allclose(ranking.interval("em", n_boot=200), ranking.interval("em", n_boot=200))
