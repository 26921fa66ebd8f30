"""Properties of trees, assignments and similarity that hold for any input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb import tree
from hiernb.errors import HiernbError
from hiernb.pooling import pool_only, softmax_pool
from hiernb.retreever.propagation import ProductPropagation
from hiernb.retreever.similarity import ntvd

depths = st.integers(1, 16)
seeds = st.integers(0, 2**31)


def assignments(n: int, depth: int, spread: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return tree.product_down(spread * torch.randn(n, tree.n_splits(depth), generator=g))


@given(depths, st.data())
def test_relatives(depth, data):
    a, b = (data.draw(st.integers(0, tree.n_nodes(depth) - 1)) for _ in range(2))
    common = int(tree.lca(a, b))
    assert int(tree.ancestor(a, tree.level_of(common))) == common == int(tree.ancestor(b, tree.level_of(common)))
    below_a, below_b = (int(tree.ancestor(x, min(tree.level_of(common) + 1, tree.level_of(x)))) for x in (a, b))
    assert common in (a, b) or below_a != below_b  # the lowest one
    assert int(tree.distance(a, b)) == int(tree.distance(b, a)) >= 0
    assert (int(tree.distance(a, b)) == 0) == (a == b)


@given(depths)
def test_paths_reach_every_leaf_once(depth):
    paths = tree.paths(depth)
    assert paths.shape == (2**depth, depth + 1)
    assert (tree.parent(paths[:, 1:]) == paths[:, :-1]).all() and (paths[:, 0] == 0).all()
    assert (paths[:, -1] == np.arange(2**depth) + 2**depth - 1).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.floats(0, 60), seeds)
def test_every_level_is_a_distribution_and_a_coarsening(depth, spread, seed):
    leaves = assignments(3, depth, spread, seed)
    levels = tree.sum_up(leaves)
    for h, level in enumerate(levels):
        assert (level >= 0).all() and torch.allclose(level.sum(-1), torch.ones(3), atol=1e-4)
        if h:
            assert torch.equal(level[:, 0::2] + level[:, 1::2], levels[h - 1])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 16), st.sampled_from([0.0, 1.0, 30.0, 1e4]), seeds)
def test_gradients_stay_finite_at_saturation(depth, spread, seed):
    g = torch.Generator().manual_seed(seed)
    scores = (spread * torch.randn(2, tree.n_splits(depth), generator=g)).requires_grad_()
    leaves = ProductPropagation(depth)(scores)
    ntvd(leaves, leaves.detach().flip(0)).sum().backward()
    assert torch.isfinite(scores.grad).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.floats(0.01, 40), seeds)
def test_ntvd_is_what_it_says(rows, columns, depth, spread, seed):
    a, b = assignments(rows, depth, spread, seed), assignments(columns, depth, spread, seed + 1)
    scores = ntvd(a, b)
    assert torch.allclose(scores, -0.5 * (a[:, None] - b).abs().sum(-1), atol=2e-5)
    assert (scores <= 1e-5).all() and (scores >= -1 - 1e-5).all()
    assert torch.allclose(scores, ntvd(b, a).T, atol=1e-6)
    for h in range(depth):  # a coarse level is an upper bound of every finer one
        assert (ntvd(tree.sum_up(a, h), tree.sum_up(b, h)) >= scores - 2e-5).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10), seeds, st.booleans())
def test_ntvd_gradient_is_that_of_cdist_ties_included(rows, columns, depth, seed, tied):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(n, 2**depth, generator=g) for n in (rows, columns))
    if tied:
        a, b = (a * 3).round() / 3, (b * 3).round() / 3
    weights, out = torch.randn(rows, columns, generator=g), []
    for f in (ntvd, lambda x, y: -0.5 * torch.cdist(x, y, p=1)):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        (f(x, y) * weights).sum().backward()
        out.append((x.grad, y.grad))
    for ours, theirs in zip(*out):
        assert torch.allclose(ours, theirs, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 7), st.sampled_from([1, 2, 4]), seeds)
def test_pooling_ignores_what_is_masked(queries, n, heads, seed):
    g = torch.Generator().manual_seed(seed)
    q, x, junk = (torch.randn(m, 8, generator=g) for m in (queries, n, 3))
    mask = torch.cat([torch.ones(n), torch.zeros(3)]).bool()
    pooled, weights = softmax_pool(q, x, heads=heads)
    padded, padded_weights = softmax_pool(q, torch.cat([x, 1e6 * junk]), mask=mask, heads=heads)
    assert torch.allclose(pooled, padded, atol=1e-5) and (padded_weights[..., n:] == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(heads, queries), atol=1e-5)
    assert torch.allclose(pool_only(q, x, heads=heads), pooled, atol=1e-5)
    order = torch.randperm(n, generator=g)
    assert torch.allclose(softmax_pool(q, x[order], heads=heads)[0], pooled, atol=1e-5)  # a set has no order


@pytest.mark.parametrize("call", [
    lambda: tree.n_leaves(0), lambda: tree.n_leaves(17), lambda: tree.level_slice(-1), lambda: tree.sum_up(torch.zeros(3)),
    lambda: tree.sum_up(torch.zeros(2, 8), 4), lambda: tree.product_down(torch.zeros(2, 8)), lambda: tree.ancestor(1, 2),
    lambda: tree.level_of(np.array([3, -1])), lambda: tree.route(torch.zeros(8)), lambda: tree.sum_up(torch.tensor(1.0)),
    lambda: ntvd(torch.zeros(2, 4), torch.zeros(2, 8)), lambda: ntvd(torch.zeros(4), torch.zeros(2, 4)),
])
def test_bad_input_is_refused_by_name(call):
    with pytest.raises(HiernbError, match="`[a-z_]+`"):
        call()
