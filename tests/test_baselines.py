"Contrastive loss, adapters, PCA and BM25: properties, ties, bad inputs, and real data where it is there."

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.baselines.adapter import LinearAdapter, truncate
from hiernb.baselines.bm25 import BM25, lexical_scores
from hiernb.baselines.matryoshka import MatryoshkaAdapter, PCATruncation, matryoshka_sizes
from hiernb.contrastive import LogitScale, info_nce_floor, same_context, symmetric_info_nce
from hiernb.errors import ArgumentError, HiernbError, NotFiniteError

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.floats(0.1, 50), st.integers(0, 10_000))
def test_info_nce_equals_the_sum_of_equation_1(size, scale, seed):
    g = torch.Generator().manual_seed(seed)
    sim, same = torch.rand(size, size, generator=g).double(), torch.rand(size, size, generator=g) < 0.3
    total = 0.0
    for i in range(size):
        for rows, mask in ((sim, same), (sim.T, same.T)):
            keep = [j for j in range(size) if j == i or not mask[i, j]]
            total -= scale * rows[i, i].item() - math.log(sum(math.exp(scale * rows[i, j].item()) for j in keep))
    assert symmetric_info_nce(sim, scale, same).item() == pytest.approx(total / (2 * size), abs=1e-4)


def test_info_nce_is_symmetric_shift_invariant_and_bounded():
    sim = torch.rand(9, 9) - 1
    loss = symmetric_info_nce(sim, 7.0)
    assert loss.item() == pytest.approx(symmetric_info_nce(sim.T, 7.0).item(), abs=1e-6)
    assert loss.item() == pytest.approx(symmetric_info_nce(sim + 0.3, 7.0).item(), abs=1e-5)
    assert loss.item() >= info_nce_floor(9, 7.0)


def test_info_nce_in_half_precision_and_extremes():
    sim = torch.rand(5, 5).half().requires_grad_()
    symmetric_info_nce(sim, 100.0).backward()
    assert sim.grad.dtype == torch.float16 and torch.isfinite(sim.grad).all()
    assert torch.isfinite(symmetric_info_nce(torch.eye(5) * 1e4, 1e4))
    assert symmetric_info_nce(torch.zeros(1, 1)).item() == 0.0


def test_masked_entries_get_no_gradient():
    sim = torch.rand(4, 4, requires_grad=True)
    same = same_context([0, 1, 0, 2])
    symmetric_info_nce(sim, 5.0, same).backward()
    off = same & ~torch.eye(4, dtype=torch.bool)
    assert (sim.grad[off] == 0).all() and (sim.grad[~off] != 0).all()


def test_logit_scale_survives_two_forwards_before_backward():
    scale = LogitScale(30.0, cap=30.0)
    (scale() + scale()).backward()
    assert scale.log_scale.grad.item() == pytest.approx(60.0, rel=1e-5)
    with torch.no_grad():
        scale.log_scale.fill_(10.0)
    with torch.inference_mode():
        assert scale().item() == pytest.approx(30.0, rel=1e-5)


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), None, "20"])
def test_logit_scale_refuses(bad):
    with pytest.raises(HiernbError, match="init"):
        LogitScale(bad)


def clustered(n=300, dim=16, seed=0):
    "Contexts, and queries that are a fixed linear map of them plus noise: a task that a linear adapter can learn."
    g = torch.Generator().manual_seed(seed)
    contexts = torch.randn(n, dim, generator=g)
    signal = torch.zeros(dim)
    signal[dim // 2 :] = 1.0  # only the second half of the dimensions is shared
    return contexts * signal + torch.randn(n, dim, generator=g) * (1.5 - signal), contexts


@pytest.mark.parametrize("make", [LinearAdapter, MatryoshkaAdapter])
def test_adapters_learn(make):
    queries, contexts = clustered()
    held_q, held_c = clustered(seed=1)
    torch.manual_seed(0)
    model = make(16)

    def hits(size):
        with torch.no_grad():
            return ((model.represent(held_q, size) @ model.represent(held_c, size).T).argmax(1) == torch.arange(300)).float().mean().item()

    before = {size: hits(size) for size in (8, 16)}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(120):
        i = torch.randint(300, (64,), generator=torch.Generator().manual_seed(step))
        loss, logs = model(queries[i], contexts[i], i)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert hits(16) > before[16] + 0.1
    if make is MatryoshkaAdapter:  # the shared half was last; the adapter moves it to the front
        assert hits(8) > before[8] + 0.2


def test_same_contexts_are_no_negatives():
    x, ids = torch.randn(4, 8), torch.tensor([5, 5, 6, 7])
    x[1] = x[0]
    for model in (LinearAdapter(8), MatryoshkaAdapter(8)):
        with_ids, _ = model(x, x, ids)
        assert with_ids.item() < model(x, x)[0].item() - 0.1


def test_one_pair_and_state_dict():
    model = MatryoshkaAdapter(6, scale=10.0)
    loss, _ = model(torch.randn(1, 6), torch.randn(1, 6))
    assert loss.item() == 0.0
    other = MatryoshkaAdapter(6)
    other.load_state_dict(model.state_dict())
    assert other.scale().item() == pytest.approx(10.0, rel=1e-5)
    assert set(model.state_dict()) == {"layer.weight", "layer.bias", "scale.log_scale"}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1024), st.integers(1, 64))
def test_matryoshka_sizes(dim, smallest):
    if smallest > dim:
        with pytest.raises(HiernbError):
            matryoshka_sizes(dim, smallest)
        return
    sizes = matryoshka_sizes(dim, smallest)
    assert sizes[0] == smallest and sizes[-1] == dim and sizes == sorted(set(sizes))
    assert all(b == 2 * a for a, b in zip(sizes, sizes[1:-1]))


def test_bad_shapes_are_named():
    model = LinearAdapter(8)
    for call, name in (
        (lambda: model(torch.randn(3, 8), torch.randn(2, 8)), "contexts"),
        (lambda: model(torch.randn(3, 7), torch.randn(3, 7)), "x"),
        (lambda: MatryoshkaAdapter(8)(torch.randn(3, 7), torch.randn(3, 7)), "queries"),
        (lambda: model(torch.randn(3, 8), torch.randn(3, 8), torch.arange(4)), "same"),
        (lambda: truncate(torch.randn(2, 8), 0), "size"),
        (lambda: PCATruncation.fit(torch.full((3, 2), float("nan"))), "contexts"),
        (lambda: symmetric_info_nce(torch.zeros(0, 0)), "similarity"),
    ):
        with pytest.raises(HiernbError, match=f"`{name}`"):
            call()
    with pytest.raises(NotFiniteError):
        PCATruncation.fit(torch.tensor([[1.0, math.inf], [0.0, 0.0]]))


def test_pca_keeps_what_varies():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=g) @ torch.randn(3, 20, generator=g) + 5.0
    pca = PCATruncation.fit(x)
    whole, cut = pca.represent(x), pca.represent(x, 3)
    torch.testing.assert_close(whole @ whole.T, cut @ cut.T, atol=1e-3, rtol=0)
    assert PCATruncation.fit(x[:5]).axes.shape == (5, 20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("alpha beta gamma delta the of".split()), max_size=5), min_size=1, max_size=12), st.data())
def test_bm25_ranks_by_score_then_id(bags, data):
    texts = ["omega", *(" ".join(bag) for bag in bags)]
    ids = [f"c{i}" for i in data.draw(st.permutations(range(len(texts))))]
    query = " ".join(data.draw(st.lists(st.sampled_from("alpha beta the omega unknown".split()), max_size=4)))
    k = data.draw(st.integers(1, len(texts)))
    bm25 = BM25.build(texts, ids)
    scores, found = bm25.search([query], k)
    every = dict(zip(bm25.ids, lexical_scores(bm25.scorer, query)))
    want = sorted(ids, key=lambda i: (-every[i], i))[:k]
    assert found[0].tolist() == want and scores[0].tolist() == [every[i] for i in want]
    assert all((every[i] > 0) == bool(set(t.split()) & set(query.split()) - {"the", "of"}) for i, t in zip(ids, texts))
    for a in range(len(texts)):
        for b in range(a):
            if texts[a] == texts[b]:
                assert every[ids[a]] == every[ids[b]]


def test_bm25_is_quiet(capfd):
    BM25.build(["one two", "three"]).search(["two"], 1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"texts": []}, "texts"),
        ({"texts": ["", "the"]}, "without a single word"),
        ({"texts": ["one", "two"], "ids": ["a", "a"]}, "more than once"),
        ({"texts": ["one"], "b": 2}, "`b`"),
        ({"texts": ["one"], "k1": -1}, "`k1`"),
        ({"texts": ["one"], "backend": "jax"}, "`backend`"),
    ],
)
def test_bm25_refuses(kwargs, says):
    with pytest.raises(ArgumentError, match=says):
        BM25.build(**kwargs)


def test_bm25_on_nq():
    if not (SHARED / "nq").is_dir():
        pytest.skip("shared/data/nq is not beside the repository")
    from hiernb.data.pairs import read_pairs
    from hiernb.evaluation.ranking import evaluate_ranking

    pairs = read_pairs(SHARED / "nq")
    bm25, test = BM25.build(pairs.contexts.full_texts, pairs.contexts.ids), pairs.test
    result = evaluate_ranking(bm25.search(test.texts[:300], 100)[1], test.ids[:300], test.qrels(pairs.contexts))
    assert 0.3 < result.mean("ndcg@10") < 0.95 and result.mean("recall@100") > 0.7
