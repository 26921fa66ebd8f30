"Ranking metrics against the oracle and trec_eval, the tie rule, bootstrap coverage, bad inputs."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import ArgumentError, EmptyError, HiernbError, RangeError, ShapeError, UnknownNameError
from hiernb.evaluation.ranking import (
    Ranking,
    evaluate_ranking,
    mrr_at_k,
    ndcg_at_k,
    paired_bootstrap,
    recall_at_k,
    relevant_ranks,
)
from hiernb.search.flat import FlatIndex


def by_hand(row, judged, k):
    "NDCG with graded gains, recall and MRR of one query."
    gains = [max(0, judged.get(c, 0)) for c in row[:k]]
    ideal = sorted((g for g in judged.values() if g > 0), reverse=True)[:k]
    def dcg(gs):
        return sum(g / math.log2(r + 2) for r, g in enumerate(gs))

    hits = [r for r, g in enumerate(gains) if g]
    return dcg(gains) / dcg(ideal), len(hits) / sum(g > 0 for g in judged.values()), 1 / (hits[0] + 1) if hits else 0.0


@st.composite
def rankings(draw):
    "Found ids, judgements (graded, some irrelevant, some of contexts that were not found), cut-offs."
    n, width = draw(st.integers(3, 30)), None
    width = draw(st.integers(1, n))
    ids = draw(st.sampled_from([list(range(n)), [f"c{i}" for i in range(n)]]))
    queries = draw(st.integers(1, 5))
    rows = [draw(st.permutations(ids))[:width] for _ in range(queries)]
    qrels = {}
    for q in range(queries):
        judged = draw(st.dictionaries(st.sampled_from(ids), st.integers(0, 3), max_size=6))
        qrels[f"q{q}"] = judged | {draw(st.sampled_from(ids)): draw(st.integers(1, 3))}
    return rows, qrels, draw(st.lists(st.integers(1, width), min_size=1, max_size=3))


@settings(max_examples=150, deadline=None)
@given(rankings())
def test_equals_the_definitions(case):
    rows, qrels, ks = case
    result = evaluate_ranking(rows, list(qrels), qrels, ks)
    for k in ks:
        for i, q in enumerate(qrels):
            ndcg, recall, mrr = by_hand(rows[i], qrels[q], k)
            assert result.of(f"ndcg@{k}")[i] == pytest.approx(ndcg, abs=1e-6)
            assert result.of(f"recall@{k}")[i] == pytest.approx(recall, abs=1e-6)
            assert result.of(f"mrr@{k}")[i] == pytest.approx(mrr, abs=1e-6)
    assert ("mrr@10" in result.values) == (len(rows[0]) >= 10 or 10 in ks)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([2, 5, 1000]))
def test_torch_functions_equal_trec_eval(seed, n, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, size=(6, n)) / levels
    relevant = np.full((6, n), -1)
    for row in relevant:
        count = rng.integers(1, n + 1)
        row[rng.permutation(n)[:count]] = rng.permutation(n)[:count]  # padding may stand anywhere
    order = np.stack([np.lexsort((np.arange(n), -row)) for row in scores])
    qrels = {i: {c: 1 for c in row.tolist() if c >= 0} for i, row in enumerate(relevant)}
    judged = evaluate_ranking(order, range(6), qrels, ks=(1, 3, 10, 50), n_contexts=n)
    ranks = relevant_ranks(torch.from_numpy(scores), torch.from_numpy(relevant))
    for k in (1, 3, 10, 50):
        for name, f in (("ndcg", ndcg_at_k), ("recall", recall_at_k), ("mrr", mrr_at_k)):
            np.testing.assert_allclose(f(ranks, k).numpy(), judged.of(f"{name}@{k}"), atol=1e-5)


def test_the_index_decides_ties():
    "Everything ties. trec_eval alone would rank by descending id and put the relevant context last."
    index = FlatIndex.build(np.full((5, 2), 0.5), ["a", "b", "c", "d", "e"])
    _, found = index.search([[0.5, 0.5]], 5)
    assert evaluate_ranking(found, ["q"], {"q": {"a": 1}}, ks=(1,)).mean("ndcg@1") == 1.0
    assert evaluate_ranking(found, ["q"], {"q": {"e": 1}}, ks=(5,)).mean("mrr@5") == pytest.approx(0.2)


def test_many_queries_and_long_rows():
    "Blocks of 1,000 queries; ranks up to 5,000 (scores are float32 inside trec_eval)."
    rows = np.tile(np.arange(5000), (3, 1))
    result = evaluate_ranking(rows, [0, 1, 2], {q: {4999 - q: 1} for q in range(3)}, ks=(4998, 4999, 5000))
    assert result.of("recall@4998").tolist() == [0, 0, 1] and result.of("recall@5000").tolist() == [1, 1, 1]
    assert result.of("mrr@4999").tolist() == pytest.approx([0, 1 / 4999, 1 / 4998])
    rows = np.array([[q % 7, 7] for q in range(2500)])
    result = evaluate_ranking(rows, range(2500), {q: {0: 1} for q in range(2500)}, ks=(1,))
    assert result.of("recall@1").tolist() == [float(q % 7 == 0) for q in range(2500)]


ROWS, QRELS = [["a", "b"], ["b", "c"]], {"p": {"a": 1}, "q": {"c": 1}}


@pytest.mark.parametrize(
    ("rows", "queries", "qrels", "kwargs", "error", "says"),
    [
        (ROWS, ["p", "q"], QRELS, {"ks": (1, 3)}, RangeError, "cut-offs of at most 2"),
        (ROWS, ["p", "q"], QRELS, {"ks": (1, 3), "n_contexts": 3}, RangeError, "cut-offs of at most 2"),
        (ROWS, ["p", "q"], QRELS, {}, RangeError, "`ks`"),
        (ROWS, ["p", "q"], QRELS, {"ks": ()}, EmptyError, "`ks`"),
        (ROWS, ["p", "q"], QRELS, {"ks": (0,)}, RangeError, "`ks`"),
        (ROWS, ["p", "q"], QRELS, {"ks": (1.5,)}, ArgumentError, "`ks`"),
        (ROWS, ["p", "q"], {"p": {"a": 1}}, {"ks": (1,)}, ArgumentError, "query 'q'"),
        (ROWS, ["p", "q"], {"p": {"a": 1}, "q": {"c": 0}}, {"ks": (1,)}, ArgumentError, "query 'q'"),
        ([["a", "a"], ["b", "c"]], ["p", "q"], QRELS, {"ks": (1,)}, ArgumentError, "twice in the row of query 'p'"),
        (ROWS, ["p"], QRELS, {"ks": (1,)}, ShapeError, "one row for each"),
        (ROWS, ["p", "p"], QRELS, {"ks": (1,)}, ArgumentError, "distinct"),
        ([], [], QRELS, {"ks": (1,)}, EmptyError, "query_ids"),
    ],
)
def test_refuses(rows, queries, qrels, kwargs, error, says):
    with pytest.raises(error) as e:
        evaluate_ranking(rows, queries, qrels, **kwargs)
    assert says in str(e.value)


def test_a_corpus_smaller_than_the_cut_off():
    result = evaluate_ranking(ROWS, ["p", "q"], QRELS, ks=(1, 100), n_contexts=2)
    assert result.mean("recall@100") == 1.0 and result.mean("recall@1") == 0.5 and "mrr@10" not in result.values


def test_intervals_cover():
    "95 % intervals of a known mean, over 200 samples: about 190 hold it."
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        low, high = Ranking([str(q) for q in range(60)], {"m": rng.beta(2, 3, 60)}).interval("m", n_boot=400, seed=i)
        inside += low <= 0.4 <= high
    assert 178 <= inside <= 199


def test_paired_p_values():
    "No difference: p is uniform, so rarely small. A clear difference: always small."
    rng = np.random.default_rng(0)
    ids, none, clear = [str(q) for q in range(80)], 0, 0
    for i in range(100):
        hard = rng.random(80)
        a, b, c = (Ranking(ids, {"m": hard + shift + rng.normal(0, 0.1, 80)}) for shift in (0, 0, 0.08))
        none += paired_bootstrap(a, b, "m", n_boot=300, seed=i).p < 0.05
        clear += paired_bootstrap(c, a, "m", n_boot=300, seed=i).p < 0.05
    assert none <= 14 and clear >= 99


def test_paired_bootstrap_is_antisymmetric_and_aligned():
    rng = np.random.default_rng(0)
    ids = [f"q{i}" for i in range(30)]
    a, b = (Ranking(ids, {"m": rng.random(30)}) for _ in range(2))
    one, two = paired_bootstrap(a, b, "m"), paired_bootstrap(b, a, "m")
    assert one.mean == pytest.approx(-two.mean) and one.low == pytest.approx(-two.high) and one.p == pytest.approx(two.p)
    shuffled = rng.permutation(30)
    c = Ranking([ids[i] for i in shuffled], {"m": b.of("m")[shuffled]})
    assert paired_bootstrap(a, c, "m") == one
    with pytest.raises(ArgumentError, match="queries"):
        paired_bootstrap(a, Ranking(ids[:-1], {"m": np.zeros(29)}), "m")
    with pytest.raises(UnknownNameError, match="metric"):
        paired_bootstrap(a, b, "ndcg@10")


@pytest.mark.parametrize("f", [recall_at_k, mrr_at_k, ndcg_at_k])
def test_torch_functions_refuse(f):
    for ranks, k in ((torch.tensor([[0, 0]]), 1), (torch.tensor([1]), 1), (torch.tensor([[1]]), 0)):
        with pytest.raises(HiernbError):
            f(ranks, k)


def test_reprs_are_short():
    many = Ranking([str(i) for i in range(10_000)], {"ndcg@10": np.linspace(0, 1, 10_000)})
    assert len(repr(many)) < 300 and "| ndcg@10 | 0.500 |" in many.table()
