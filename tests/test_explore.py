"Keywords of nodes: what must hold for any texts and any routes."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import ArgumentError, EmptyError, HiernbError, RangeError, ShapeError, UnknownNameError
from hiernb.explore.topics import NodeTopic, TermCounts, count_terms, node_keywords
from hiernb.tree import level_of, paths

VOCABULARY = ["oak", "elm", "yew", "ash", "fir", "pine", "larch"]


@st.composite
def corpora(draw):
    "Short texts over a small vocabulary, so that ties and empty nodes are common, and a leaf for each."
    depth, n = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    texts = [" ".join(draw(st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=6))) for _ in range(n)]
    leaves = draw(st.lists(st.integers(0, 2**depth - 1), min_size=n, max_size=n))
    return texts, paths(depth)[leaves]


def naive(counts: TermCounts, inside: np.ndarray, outside: np.ndarray, smoothing: float) -> dict[str, float]:
    "Scores above 1 of all terms for one node, from the definition."
    def fpm(rows: np.ndarray) -> np.ndarray:
        words = counts.words[rows].sum()
        return 1e6 * counts.counts.toarray()[rows].sum(0) / words if words else np.zeros(len(counts.terms))

    scores = (fpm(inside) + smoothing) / (fpm(outside) + smoothing)
    return {t: s for t, s in zip(counts.terms, scores) if s > 1}


@settings(max_examples=60, deadline=None)
@given(corpora(), st.sampled_from(["rest", "sibling"]), st.sampled_from([1.0, 100.0, 1e6]))
def test_against_the_definition(corpus, reference, smoothing):
    texts, nodes = corpus
    counts = count_terms(texts, min_df=1)
    for node, topic in node_keywords(counts, nodes, top=3, smoothing=smoothing, reference=reference).items():
        here = nodes[:, int(level_of(node))]
        other = here != node if reference == "rest" or node == 0 else here == (node - 1 if node % 2 == 0 else node + 1)
        expected = naive(counts, here == node, other, smoothing) if topic.size else {}
        assert topic.size == (here == node).sum()
        assert len(topic.keywords) == min(3, len(expected))
        np.testing.assert_allclose(topic.scores, [expected[k] for k in topic.keywords], rtol=1e-12)
        np.testing.assert_allclose(topic.scores, sorted(expected.values(), reverse=True)[:3], rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(corpora(), st.randoms(use_true_random=False))
def test_order_of_contexts_does_not_matter(corpus, random):
    texts, nodes = corpus
    order = list(range(len(texts)))
    random.shuffle(order)
    assert node_keywords(count_terms(texts, min_df=1), nodes) == node_keywords(count_terms([texts[i] for i in order], min_df=1), nodes[order])


@settings(max_examples=40, deadline=None)
@given(corpora())
def test_sizes(corpus):
    texts, nodes = corpus
    topics = node_keywords(count_terms(texts, min_df=1), nodes)
    assert list(topics) == list(range(2 ** nodes.shape[1] - 1))
    for level in range(nodes.shape[1]):
        assert sum(t.size for n, t in topics.items() if level_of(n) == level) == len(texts)
    for node in range(len(topics) // 2):
        assert topics[node].size == topics[2 * node + 1].size + topics[2 * node + 2].size
    for topic in topics.values():
        assert topic.size or topic == NodeTopic(topic.node, 0)
        assert len(topic.keywords) == len(topic.scores) and all(s > 1 for s in topic.scores)


def test_large_smoothing_favours_frequent_words():
    texts = ["common common common common rare"] * 20 + ["common common filler filler filler"] * 20
    nodes = paths(1)[[0] * 20 + [1] * 20]
    best = {n: node_keywords(count_terms(texts), nodes, smoothing=n)[1].keywords[0] for n in (1.0, 1e7)}
    assert best == {1.0: "rare", 1e7: "common"}


def test_deeper_levels_leave_the_upper_ones_alone():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(VOCABULARY, 8)) for _ in range(50)]
    counts, nodes = count_terms(texts), paths(5)[rng.integers(0, 32, 50)]
    deep, shallow = node_keywords(counts, nodes), node_keywords(counts, nodes, max_level=2)
    assert shallow == {n: deep[n] for n in range(7)}
    assert node_keywords(counts, torch.from_numpy(nodes)) == deep == node_keywords(texts, nodes)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("don't isn't wouldn’t lean", ["lean"]),
        ("__init__ _private trailing_ np.float64", ["float64", "init", "private", "trailing"]),
        ("a ab abc 123 3d 12abc", ["abc"]),
        ("the Übung café naïve", ["café", "naïve", "übung"]),
        ("self.n_components=3", ["n_components", "self"]),
    ],
)
def test_terms(text, terms):
    assert count_terms([text], min_df=1).terms == terms


def test_texts_without_terms_are_contexts_too():
    counts = count_terms(["oak oak", "", "of the", "!!"], min_df=1)
    assert counts.words.tolist() == [2, 0, 2, 0]
    topics = node_keywords(counts, paths(1)[[0, 0, 1, 1]])
    assert (topics[1].size, topics[1].keywords, topics[2].size, topics[2].keywords) == (2, ["oak"], 2, [])
    for reference in ("rest", "sibling"):
        alone = node_keywords(counts, paths(2)[[0, 1, 1, 1]], reference=reference)
        assert all(np.isfinite(t.scores).all() for t in alone.values())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"nodes": np.zeros((3, 0), int)}, ShapeError),
        ({"nodes": np.zeros(3, int)}, ShapeError),
        ({"nodes": np.zeros((2, 1), int)}, ShapeError),
        ({"nodes": np.zeros((3, 1))}, ShapeError),
        ({"nodes": np.array([[0, 1]] * 2 + [[0, 3]])}, ArgumentError),
        ({"nodes": np.array([[0, 1, 3]] * 2 + [[0, 1, 5]])}, ArgumentError),
        ({"nodes": np.array([[-1]] * 3)}, RangeError),
        ({"top": 0}, RangeError),
        ({"top": 2.5}, ArgumentError),
        ({"smoothing": 0}, RangeError),
        ({"smoothing": float("nan")}, ArgumentError),
        ({"max_level": 3}, RangeError),
        ({"reference": "corpus"}, UnknownNameError),
        ({"counts": []}, EmptyError),
    ],
)
def test_bad_arguments(change, error):
    arguments = {"counts": count_terms(["oak elm"] * 3), "nodes": paths(2)[[0, 1, 2]]} | change
    with pytest.raises(error) as caught:
        node_keywords(**arguments)
    assert isinstance(caught.value, HiernbError)
