"Congruence: closed forms against pairs, for any vectors and any routes, and what a planted tree must show."

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.baselines.clusters import ClusterTree
from hiernb.errors import ArgumentError, HiernbError, ShapeError
from hiernb.explore.congruence import context_congruence, node_congruence, plot_congruence
from hiernb.explore.node_vectors import NodeVectors, node_means, node_vectors
from hiernb.explore.pair_statistics import lca_means, mantel, mean_cosine
from hiernb.retreever.model import Retreever
from hiernb.tree import ancestor, distance, lca, level_of, n_splits, paths


@st.composite
def placed(draw):
    "Vectors and a leaf for each; some leaves are crowded, many are empty."
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    depth, n, d = draw(st.integers(1, 5)), draw(st.integers(3, 25)), draw(st.integers(1, 70))
    x = rng.normal(size=(n, d)) + draw(st.sampled_from([0.0, 2.0]))
    leaves = rng.integers(2**depth, size=n) if draw(st.booleans()) else rng.integers(2, size=n)
    return x, paths(depth)[leaves]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(placed())
def test_closed_forms(case):
    x, nodes = case
    gram, depth = unit(x) @ unit(x).T, nodes.shape[1] - 1
    i, j = np.triu_indices(len(x), 1)
    assert mean_cosine(x) == pytest.approx(gram[i, j].mean(), abs=1e-5)
    at = level_of(lca(nodes[i, -1], nodes[j, -1]))
    mean, pairs = lca_means(x, nodes, columns=16)
    assert pairs.tolist() == np.bincount(at, minlength=depth + 1).tolist()
    for h in range(depth + 1):
        assert np.isnan(mean[h]) if pairs[h] == 0 else mean[h] == pytest.approx(gram[i, j][at == h].mean(), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(placed())
def test_results_fit_together(case):
    x, nodes = case
    c = context_congruence(x, nodes, max_pairs=500, permutations=9)
    assert c.pairs.sum() == len(x) * (len(x) - 1) // 2 and (c.pairs > 0).all()
    assert (c.mean * c.pairs).sum() / c.pairs.sum() == pytest.approx(c.baseline, abs=1e-5)
    assert np.isnan(c.rho) or -1 <= c.rho <= 1
    assert 0.1 <= c.p <= 1 and (c.std >= 0).all()
    order = np.random.default_rng(0).permutation(len(x))
    again = context_congruence(x[order], nodes[order], max_pairs=500, permutations=9)
    np.testing.assert_allclose(again.mean, c.mean, atol=1e-6)  # the order of the contexts is no matter
    if not np.isnan(c.rho):
        assert again.rho == pytest.approx(c.rho, abs=1e-6)  # so few contexts that all pairs are used


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.floats(0, 0.6))
def test_nodes_against_all_pairs(depth, seed, missing):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n_splits(depth), 5)).astype(np.float32)
    vectors[rng.random(len(vectors)) < missing] = 0
    there = np.flatnonzero(vectors.any(1))
    found = {}
    for a, b in itertools.combinations(there, 2):
        if level_of(a) < level_of(b) and ancestor(b, level_of(a)) == a:
            found.setdefault(int(distance(a, b)), []).append(float((unit(vectors[[a]]) @ unit(vectors[[b]]).T).item()))
    if len(there) < 3:
        with pytest.raises(ShapeError, match="at least three"):
            node_congruence(NodeVectors(vectors, "embeddings"))
        return
    if len(found) == 0:
        return
    c = node_congruence(NodeVectors(vectors, "embeddings"), permutations=3)
    assert c.groups.tolist() == sorted(found) and c.pairs.tolist() == [len(found[g]) for g in sorted(found)]
    np.testing.assert_allclose(c.mean, [np.mean(found[g]) for g in sorted(found)], atol=1e-5)
    np.testing.assert_allclose(c.std, [np.std(found[g]) for g in sorted(found)], atol=1e-5)


def grown(depth, seed=0):
    "Embeddings that are their parent's plus noise."
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=32)]
    rows += [None] * (n_splits(depth) - 1)
    for node in range(1, len(rows)):
        rows[node] = rows[(node - 1) // 2] + rng.normal(size=32)
    return np.stack(rows).astype(np.float32)


def test_planted_structure_is_found_and_shuffled_is_not():
    vectors, rng, false = grown(6), np.random.default_rng(0), 0
    for pairs in ("descendants", "all"):
        c = node_congruence(NodeVectors(vectors, "embeddings"), pairs, permutations=99)
        assert c.rho < -0.3 and c.p == 0.01
    for trial in range(20):
        false += node_congruence(NodeVectors(vectors[rng.permutation(len(vectors))], "embeddings"), permutations=19, seed=trial).p <= 0.05
    assert false <= 4  # one in twenty expected


def test_pairs_that_share_a_context_do_not_count_twice():
    "The usual p-value of independent pairs would call this significant."
    from scipy.stats import spearmanr

    rng, usual, ours = np.random.default_rng(0), 0, 0
    i, j = np.triu_indices(40, 1)
    for trial in range(30):
        a, b = (np.abs(np.subtract.outer(v, v)) for v in rng.standard_cauchy((2, 40)))
        usual += spearmanr(a[i, j], b[i, j]).pvalue <= 0.05
        ours += mantel(a[i, j], lambda o, b=b: b[o[i], o[j]], 40, permutations=19, seed=trial)[1] <= 0.05
    assert ours <= 5 and usual >= 10


def test_memory_follows_contexts_not_pairs():
    "20,000 contexts: a matrix of pairs would take 3.2 GB; what is allocated stays below 150 MB."
    import tracemalloc

    rng = np.random.default_rng(0)
    x, nodes = rng.normal(size=(20_000, 64)).astype(np.float32), paths(8)[rng.integers(256, size=20_000)]
    tracemalloc.start()
    c = context_congruence(x, nodes, permutations=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6 and c.pairs.sum() == 20_000 * 19_999 // 2


def test_sources_of_node_vectors():
    torch.manual_seed(0)
    settings = {"key_dim": 8, "embedding_dim": 6, "n_embeddings": 3}
    attention = Retreever(dim=8, depth=3, split="cross-attention", split_settings=settings)
    found = node_vectors(attention)
    assert found.kind == "embeddings" and found.signed and found.vectors.shape == (7, 6)
    np.testing.assert_allclose(found.vectors[2], attention.split.node_embeddings[2].detach().mean(0).numpy(), rtol=1e-6)
    for split in ("linear", "mlp"):
        found = node_vectors(Retreever(dim=8, depth=3, split=split))
        assert found.kind == "hyperplanes" and not found.signed and len(found.vectors) == 7
    clusters = ClusterTree.fit(np.random.default_rng(0).normal(size=(20, 4)), depth=4, progress=False)
    found = node_vectors(clusters)
    assert (found.vectors.any(1) == clusters.splits.numpy()).all()
    flipped = NodeVectors(found.vectors * np.where(np.arange(15) % 2, 1, -1)[:, None].astype(np.float32), found.kind, False)
    np.testing.assert_allclose(node_congruence(found, permutations=3).mean, node_congruence(flipped, permutations=3).mean, rtol=1e-6)


def test_node_means_are_means():
    rng = np.random.default_rng(0)
    x, nodes = rng.normal(size=(30, 7)), paths(3)[rng.integers(8, size=30)]
    found = node_means(torch.from_numpy(x), torch.from_numpy(nodes))
    for node in range(15):
        inside = (nodes == node).any(1)
        np.testing.assert_allclose(found.vectors[node], unit(x)[inside].mean(0) if inside.any() else np.zeros(7), atol=1e-6)


def test_figure_says_what_was_measured():
    c = node_congruence(NodeVectors(grown(4), "embeddings"), permutations=9)
    ax = plot_congruence(c).axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tree distance (hops)", "cosine")
    assert f"ρ = {c.rho:+.2f}" in ax.get_title() and [t.get_text() for t in ax.get_legend().get_texts()][-1] == "random pairs"


GOOD = (np.eye(4), paths(2))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: context_congruence(GOOD[0][:2], GOOD[1][:2]), ShapeError),
        (lambda: context_congruence(GOOD[0], GOOD[1][:3]), ShapeError),
        (lambda: context_congruence(GOOD[0], GOOD[1][:, :1]), ArgumentError),
        (lambda: context_congruence(GOOD[0], GOOD[1][:, ::-1]), ArgumentError),
        (lambda: context_congruence(np.zeros((4, 4)), GOOD[1]), ArgumentError),
        (lambda: context_congruence(np.full((4, 4), np.nan), GOOD[1]), ArgumentError),
        (lambda: context_congruence(*GOOD, max_pairs=0), ArgumentError),
        (lambda: context_congruence(*GOOD, permutations=0), ArgumentError),
        (lambda: node_congruence(NodeVectors(grown(3), "embeddings"), pairs="some"), ArgumentError),
        (lambda: node_congruence(NodeVectors(grown(3), "embeddings"), max_pairs=0), ArgumentError),
        (lambda: mean_cosine(np.eye(3)[:1]), ShapeError),
        (lambda: node_vectors(None), ArgumentError),
    ],
)
def test_bad_arguments(call, error):
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, HiernbError)
