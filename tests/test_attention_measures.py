"""Measures of sparse attention and selectors at equal budget: plain loops as oracles, ties, masks, bad input."""

import math

import faiss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import EmptyError, HiernbError, NotFiniteError, RangeError, ShapeError, UnknownNameError
from hiernb.evaluation.attention_measures import (
    effective_rank,
    evidence_recall,
    level_kl,
    mass_ratio,
    mass_recall,
    mean_cosine,
    measure_selection,
    oracle_mass,
    output_error,
    selected_leaves,
    topk_recall,
)
from hiernb.evaluation.attention_selectors import SELECTORS, best_blocks, best_leaves, block_bounds, faiss_keys, mean_blocks, min_max_blocks, select
from hiernb.mergers.losses import student_losses

quick = settings(max_examples=40, deadline=None)
EXACT = ("oracle", "window", "mean blocks", "min/max bounds", "faiss flat")
rows = [(b, h, q) for b in range(2) for h in range(2) for q in range(3)]


def problem(n: int, seed: int, integers: bool = False):
    "Queries, keys, values, attention, mask; with small integers there are many ties."
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, m, 3, generator=g) for m in (3, n, n))
    if integers:
        q, k = q.round(), k.round()
    mask = torch.rand(2, n, generator=g) < 0.7
    mask[0, seed % n] = mask[1, seed % n] = True
    a = (q @ k.mT).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    return q, k, v, a, mask


def picks(n: int, b: int, seed: int):
    "Random indices with repetitions, and which of them are valid; what is not valid may be anything."
    g = torch.Generator().manual_seed(seed)
    indices, valid = torch.randint(0, n, (2, 2, 3, b), generator=g), torch.rand(2, 2, 3, b, generator=g) < 0.8
    return torch.where(valid, indices, torch.randint(-5, n + 5, indices.shape, generator=g).clamp(-5, n)), valid


# measures ------------------------------------------------------------------------------------------------------------

@quick
@given(n=st.integers(1, 15), b=st.integers(1, 20), k=st.integers(1, 20), ties=st.booleans(), seed=st.integers(0, 10**6))
def test_measures_are_plain_loops(n, b, k, ties, seed):
    _, _, v, a, _ = problem(n, seed)
    if ties:
        a = (a * 4).round() / 4
    indices, valid = picks(n, b, seed)
    mass, ratio = mass_recall(a, indices, valid), mass_ratio(a, indices, valid)
    top, error = topk_recall(a, indices, k, valid), output_error(a, v, indices, valid)
    for r in rows:
        chosen = {p for p, ok in zip(indices[r].tolist(), valid[r].tolist()) if ok}
        weights = a[r].tolist()
        want, best = sum(weights[p] for p in chosen), sum(sorted(weights)[::-1][:b])
        assert mass[r].item() == pytest.approx(want, abs=1e-5)
        assert ratio[r].item() == pytest.approx(want / best, abs=1e-5) if best else ratio[r].isnan()
        threshold, count = sorted(weights)[::-1][min(k, n) - 1], min(k, n)
        assert top[r].item() == pytest.approx(min(count, sum(weights[p] >= threshold for p in chosen)) / count)
        exact = sum(w * v[r[0], r[1], p].double() for p, w in enumerate(weights))
        sparse = sum((weights[p] * v[r[0], r[1], p].double() for p in chosen), torch.zeros(3).double()) / (want or 1)
        if exact.norm() > 1e-3:
            assert error[r].item() == pytest.approx(((exact - sparse).norm() / exact.norm()).item(), rel=1e-3, abs=1e-4)


@quick
@given(n=st.integers(1, 30), b=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_no_selection_beats_the_oracle_and_more_never_holds_less(n, b, seed):
    q, k, v, a, mask = problem(n, seed)
    indices, valid = picks(n, b, seed)
    assert (mass_recall(a, indices, valid) <= oracle_mass(a, b) + 1e-6).all()
    assert (mass_recall(a, indices[..., : max(1, b // 2)], valid[..., : max(1, b // 2)]) <= mass_recall(a, indices, valid) + 1e-6).all()
    top = select("oracle", q, k, b, mask)
    torch.testing.assert_close(mass_recall(a, top.indices, top.valid), oracle_mass(a, b), atol=1e-5, rtol=0)


@quick
@given(n=st.integers(1, 12), d=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_rank_and_cosine(n, d, rank, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rank, generator=g) @ torch.randn(rank, d, generator=g)
    sigma = torch.linalg.svdvals(x.double())
    sigma = sigma[sigma > sigma.max() * 1e-6]
    p = sigma / sigma.sum()
    assert effective_rank(x).item() == pytest.approx(math.exp(-sum(t * math.log(t) for t in p.tolist())), rel=1e-3)
    assert effective_rank(x).item() <= min(n, d, rank) + 1e-3
    assert effective_rank(7 * x).item() == pytest.approx(effective_rank(x).item(), rel=1e-4)
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    pairs = [float(unit[i] @ unit[j]) for i in range(n) for j in range(n) if i != j]
    got = mean_cosine(x).item()
    assert math.isnan(got) if n < 2 else got == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_cosine_of_a_million_pairs_needs_no_pairs():
    "100,000 vectors: a matrix of pairs would fill 80 GB."
    x = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(0)) + 1
    assert mean_cosine(x).item() == pytest.approx(0.5, abs=0.02)


def test_level_kl_has_the_means_that_the_losses_report():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 2, 3, 11, generator=g).softmax(-1)
    scores = [torch.randn(2, 2, 3, n, generator=g) for n in (11, 6, 3, 2, 1)]
    for form in ("softmax", "sibling"):
        torch.testing.assert_close(level_kl(scores, a, form).mean((1, 2, 3)), student_losses(scores, a, form).kl, atol=1e-5, rtol=1e-4)


@quick
@given(n=st.integers(1, 12), b=st.integers(1, 14), seed=st.integers(0, 10**6))
def test_evidence(n, b, seed):
    indices, valid = picks(n, b, seed)
    evidence = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < 0.4
    evidence[:, seed % n] = True
    share, hit = evidence_recall(indices, evidence, valid)
    for r in rows:
        gold = set(evidence[r[0]].nonzero()[:, 0].tolist())
        found = gold & {p for p, ok in zip(indices[r].tolist(), valid[r].tolist()) if ok}
        assert share[r].item() == pytest.approx(len(found) / len(gold)) and hit[r].item() == bool(found)


A = torch.full((1, 1, 2, 4), 0.25)
S = torch.zeros(1, 1, 2, 3, dtype=torch.int64)


@pytest.mark.parametrize("call, error", [
    (lambda: mass_recall(A * torch.nan, S), NotFiniteError),
    (lambda: mass_recall(A, S + 4), RangeError),
    (lambda: mass_recall(A, S - 1), RangeError),
    (lambda: mass_recall(A[:, :, :1], S), ShapeError),
    (lambda: mass_recall(A, S, torch.ones(1, 1, 2, 2).bool()), ShapeError),
    (lambda: mass_recall(A, S, torch.ones(1, 1, 2, 3)), ShapeError),
    (lambda: oracle_mass(A, 0), RangeError),
    (lambda: topk_recall(A, S, 0), RangeError),
    (lambda: output_error(A, torch.zeros(1, 1, 3, 2), S), ShapeError),
    (lambda: output_error(A, torch.full((1, 1, 4, 2), torch.inf), S), NotFiniteError),
    (lambda: effective_rank(torch.full((2, 2), torch.nan)), NotFiniteError),
    (lambda: effective_rank(torch.zeros(3)), EmptyError),
    (lambda: mean_cosine(torch.zeros(3)), ShapeError),
    (lambda: mean_cosine(torch.full((2, 2), torch.inf)), NotFiniteError),
    (lambda: evidence_recall(S, torch.zeros(1, 4).bool()), EmptyError),
    (lambda: evidence_recall(S, torch.ones(1, 4)), ShapeError),
    (lambda: evidence_recall(S, torch.ones(2, 4).bool()), ShapeError),
    (lambda: measure_selection(A * 0, S), EmptyError),
    (lambda: measure_selection(A, S, query_mask=torch.zeros(1, 2).bool()), EmptyError),
    (lambda: selected_leaves(S[0], 4), ShapeError),
])
def test_bad_measures(call, error):
    with pytest.raises(error):
        call()


# selectors -----------------------------------------------------------------------------------------------------------

def nearest(there: list[int], cost: dict[int, float]) -> list[int]:
    "Leaves by cost; of equals the first."
    return sorted(there, key=lambda p: (cost[p], p))


@quick
@given(n=st.integers(1, 15), budget=st.integers(1, 20), size=st.integers(1, 17), ties=st.booleans(), seed=st.integers(0, 10**6))
def test_selectors_are_plain_loops(n, budget, size, ties, seed):
    q, k, _, _, mask = problem(n, seed, integers=ties)
    positions = torch.randint(-2, n + 2, (2, 3), generator=torch.Generator().manual_seed(seed))
    got = {name: select(name, q, k, budget, mask, **{"window": {"positions": positions}}.get(name, {})) for name in ("oracle", "window")}
    blocks = {"mean": mean_blocks(q, k, budget, mask, size=size), "bounds": min_max_blocks(q, k, budget, mask, size=size)}
    for b, h, i in rows:
        there = [p for p in range(n) if mask[b, p]]
        score = {p: float(q[b, h, i] @ k[b, h, p]) for p in there}
        chosen = {name: found.indices[b, h, i][found.valid[b, h, i]].tolist() for name, found in (got | blocks).items()}
        assert all(len(found) == len(set(found)) == min(budget, len(there)) and set(found) <= set(there) for found in chosen.values())
        worst = min(score[p] for p in chosen["oracle"])  # up to rounding, what was taken is no worse than what was left
        assert all(score[p] <= worst + 1e-4 for p in set(there) - set(chosen["oracle"]))
        if ties:
            assert chosen["oracle"] == sorted(nearest(there, {p: -score[p] for p in there})[:budget])
        assert chosen["window"] == sorted(nearest(there, {p: abs(p - positions[b, i].item()) for p in there})[:budget])
        parts = {j: [p for p in there if p // size == j] for j in range(-(-n // size))}
        means = {j: sum(score[p] for p in part) / len(part) for j, part in parts.items() if part}
        ends = {j: [(min(column), max(column)) for column in zip(*(k[b, h, p].tolist() for p in part))] for j, part in parts.items() if part}
        bounds = {j: sum(max(x * low, x * high) for x, (low, high) in zip(q[b, h, i].tolist(), pairs)) for j, pairs in ends.items()}
        for name, value in (("mean", means), ("bounds", bounds)):
            found = chosen[name]
            whole = [j for j in value if set(parts[j]) <= set(found)]
            cut = [j for j in value if set(parts[j]) & set(found) and j not in whole]
            assert len(cut) <= 1
            assert all([p for p in found if p // size == j] == parts[j][: sum(p // size == j for p in found)] for j in cut)
            left = [value[j] for j in value if j not in whole and j not in cut]
            assert all(value[j] <= min([value[w] for w in whole], default=math.inf) + 1e-4 for j in cut)
            assert all(x <= min([value[w] for w in whole + cut], default=math.inf) + 1e-4 for x in left)


@quick
@given(n=st.integers(1, 20), size=st.integers(1, 9), b=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_blocks_with_ties_are_taken_from_the_left(n, size, b, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, n, generator=g) < 0.6
    scores = torch.randint(0, 3, (2, 1, 3, -(-n // size)), generator=g).float()
    got = best_blocks(scores, size, b, mask)
    for c in range(2):
        for i in range(3):
            order = sorted(range(scores.shape[-1]), key=lambda j: (-scores[c, 0, i, j].item(), j))
            assert got[c, 0, i].nonzero()[:, 0].tolist() == sorted([p for j in order for p in range(j * size, min(n, (j + 1) * size)) if mask[c, p]][:b])


@quick
@given(n=st.integers(1, 20), size=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_no_leaf_scores_above_the_bound_of_its_block(n, size, seed):
    q, k, _, _, mask = problem(n, seed)
    bounds = block_bounds(q, k, size, mask)
    scores = (q @ k.mT).masked_fill(~mask[:, None, None], -torch.inf)
    assert (scores <= bounds[..., torch.arange(n) // size] + 1e-5).all()
    if size == 1:
        torch.testing.assert_close(bounds, scores)


@quick
@given(name=st.sampled_from(sorted(SELECTORS)), n=st.integers(1, 24), budget=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_every_selector_keeps_the_contract(name, n, budget, seed):
    q, k, v, a, mask = problem(n, seed)
    found = select(name, q, k, budget, mask)
    b = min(budget, n)
    assert found.indices.shape == found.valid.shape == (2, 2, 3, b) and found.scored.shape == (2, 2, 3)
    assert found.indices.dtype == found.scored.dtype == torch.int64 and found.valid.dtype == torch.bool
    count = found.valid.sum(-1)
    assert (count <= mask.sum(-1)[:, None, None].clamp_max(b)).all()
    if name in (*EXACT, "random"):
        assert (count == mask.sum(-1)[:, None, None].clamp_max(b)).all()
    for r in rows:
        kept = found.indices[r][found.valid[r]].tolist()
        assert kept == sorted(set(kept)) and all(mask[r[0], p] for p in kept)
        assert (found.indices[r][~found.valid[r]] == 0).all()
    assert (found.scored <= 2 * n + math.isqrt(n) + 2 + 64 * ("hnsw" in name) * n).all()
    assert set(measure_selection(a, *found, v)) == {"mass recall", "of the oracle", "top-k recall", "output error", "scored"}
    again = select(name, q, k, budget, mask)
    assert (again.indices == found.indices).all() and (again.scored == found.scored).all()


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_bad_and_extreme_input(name):
    q, k, _, _, mask = problem(9, 0)
    for bad, error in (
        ((q, k, 0), RangeError), ((q, k, 2.5), HiernbError), ((q, k, True), HiernbError), ((q[0], k, 3), ShapeError), ((q[..., :2], k, 3), ShapeError),
        ((q, k[:1], 3), ShapeError), ((q, k[:, :, :0], 3), ShapeError), ((q, k, 3, mask[:, :5]), ShapeError), ((q, k, 3, mask.float()), ShapeError),
        ((q * torch.nan, k, 3), NotFiniteError), ((q, k.index_fill(2, torch.tensor(4), torch.nan), 3), NotFiniteError), ((q, k - torch.inf, 3), NotFiniteError),
    ):
        with pytest.raises(error):
            select(name, *bad)
    assert not select(name, q, k, 3, mask & False).valid.any()
    half = mask.clone()
    half[1] = False  # one context of the batch is empty
    found = select(name, q, k, 3, half)
    assert not found.valid[1].any() and found.valid[0].any() and (found.scored[1] == 0).all()
    same = select(name, q, torch.ones_like(k), 3)  # all keys alike: everything ties
    assert (same.valid.sum(-1) == 3).all() or "ivf" in name
    if name in ("oracle", "mean blocks", "min/max bounds"):
        assert (same.indices == torch.arange(3)).all()
    assert select(name, q.double(), k.double(), 3, mask).indices.shape == (2, 2, 3, 3)


def test_unknown_names():
    q, k, _, _, mask = problem(9, 0)
    with pytest.raises(UnknownNameError):
        select("quest", q, k, 3)
    with pytest.raises(UnknownNameError):
        faiss_keys(q, k, 3, kind="lsh")


def test_graph_search_finds_most_and_scores_less():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 20, 16, generator=g), torch.randn(1, 2, 2000, 16, generator=g)
    a = (3 * q @ k.mT / 4).softmax(-1)
    for kind, more in (("hnsw", {"effort": 400}), ("ivf", {"probes": 40})):
        few, many = faiss_keys(q, k, 20, kind=kind), faiss_keys(q, k, 20, kind=kind, **more)
        assert (few.scored < 2000).all() and (many.scored > few.scored).all()
        assert mass_ratio(a, many.indices, many.valid).mean() > max(0.9, mass_ratio(a, few.indices, few.valid).mean() - 1e-6)
    every = faiss_keys(q, k, 20, kind="ivf", lists=7, probes=7)
    torch.testing.assert_close(mass_recall(a, every.indices), oracle_mass(a, 20))
    assert (every.scored == 2007).all()


def test_threads_of_faiss_are_left_as_they_were():
    before = faiss.omp_get_max_threads()
    q, k, _, _, mask = problem(9, 0)
    faiss_keys(q, k, 3, mask)
    assert faiss.omp_get_max_threads() == before


def test_random_is_fair_and_follows_its_seed():
    q, k = torch.zeros(1, 4, 2000, 2), torch.zeros(1, 4, 11, 2)
    one, two = (select("random", q, k, 4, seed=s) for s in (0, 1))
    share = torch.bincount(one.indices.flatten(), minlength=11) / 8000
    torch.testing.assert_close(share, torch.full((11,), 4 / 11), atol=0.03, rtol=0)
    assert (one.indices != two.indices).any()


def test_best_leaves_takes_exactly_as_many_among_ties():
    for b in range(1, 8):
        got = best_leaves(torch.tensor([[[[1.0, 2, 1, 2, 1, 1, 0]]]]), b, torch.ones(1, 7).bool())
        assert got[0, 0, 0].nonzero()[:, 0].tolist() == sorted([1, 3, 0, 2, 4, 5, 6][:b])


def test_many_blocks_that_tie_are_taken_from_the_left():
    "A sort that is not stable mixes hundreds of equal scores."
    scores = (torch.arange(900) % 3).float().expand(1, 1, 2, 900)
    got = best_blocks(scores, 2, 100, torch.ones(1, 1800).bool())
    assert got[0, 0, 1].nonzero()[:, 0].tolist() == [p for j in range(2, 150, 3) for p in (2 * j, 2 * j + 1)]
