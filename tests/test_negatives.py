"""Shared and mined negatives: against naive oracles, on whatever hypothesis finds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.contrastive import info_nce, same_context, symmetric_info_nce
from hiernb.errors import ArgumentError, ShapeError
from hiernb.frozen import TokenStates
from hiernb.retreever.model import Retreever
from hiernb.retreever.schedule import make_schedule
from hiernb.retreever.similarity import ntvd
from hiernb.retreever.split import SPLITS
from hiernb.training.loop import fit
from hiernb.training.mining import draw_negatives, mine_negatives, mined_tree_loss
from hiernb.training.negatives import RelevanceMask, _chunks, cached_loss, represent_in_chunks, tree_contrast
from hiernb.training.optim import TrainSettings
from hiernb.training.retrieval import PairVectors

FAST = settings(max_examples=60, deadline=None)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the loss


@FAST
@given(b=st.integers(1, 6), more=st.integers(0, 5), first=st.integers(0, 4), scale=st.floats(0.1, 50), seed=st.integers(0, 999))
def test_info_nce_is_a_softmax_over_the_columns_that_are_left(b, more, first, scale, seed):
    sim, same = torch.rand(b, b + more + first, generator=generator(seed)), torch.rand(b, b + more + first, generator=generator(seed + 1)) < 0.3
    for i, value in enumerate(info_nce(sim, scale, same, first)):
        left = [scale * (sim[i, j] - sim[i, first + i]).item() for j in range(sim.shape[1]) if j == first + i or not same[i, j]]
        assert value.item() == pytest.approx(math.log(sum(map(math.exp, left))), abs=1e-4)


@FAST
@given(b=st.integers(1, 6), more=st.integers(0, 5), seed=st.integers(0, 999))
def test_more_contexts_change_the_queries_half_only(b, more, seed):
    sim, same = torch.rand(b, b + more, generator=generator(seed)), torch.rand(b, b + more, generator=generator(seed + 1)) < 0.3
    wide, square = symmetric_info_nce(sim, 9.0, same), symmetric_info_nce(sim[:, :b], 9.0, same[:, :b])
    difference = (info_nce(sim, 9.0, same) - info_nce(sim[:, :b], 9.0, same[:, :b])).mean() / 2
    assert (wide - square).item() == pytest.approx(difference.item(), abs=1e-5)
    assert wide >= square - 1e-6
    excluded = torch.cat([same[:, :b], torch.ones(b, more, dtype=torch.bool)], 1)
    assert symmetric_info_nce(sim, 9.0, excluded).item() == pytest.approx(square.item(), abs=1e-6)


def test_bad_shapes_are_named():
    for bad in (torch.zeros(3, 2), torch.zeros(3), torch.zeros(0, 4)):
        with pytest.raises(ShapeError, match="similarity"):
            symmetric_info_nce(bad)
    with pytest.raises(ShapeError, match="same"):
        symmetric_info_nce(torch.zeros(2, 3), 1.0, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ShapeError, match="column_ids"):
        same_context([1, 2], [[1]])


# ---------------------------------------------------------------- chunks


def tree_and_inputs(split, propagation, n=13):
    torch.manual_seed(0)
    tree = Retreever(8, depth=3, split=split, propagation=propagation)
    if not tree.reads_tokens:
        return tree, torch.randn(n, 8), torch.randn(n + 4, 8)
    mask = [torch.arange(6) < torch.randint(1, 7, (m, 1)) for m in (n, n + 4)]
    return tree, *(TokenStates(torch.randn(*k.shape, 8) * k[..., None], k) for k in mask)


def gradients(tree, value):
    tree.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in tree.parameters() if p.grad is not None])


@pytest.mark.parametrize("propagation", ["product", "learned"])
@pytest.mark.parametrize("split", list(SPLITS))
def test_chunks_leave_the_gradient_alone(split, propagation):
    tree, queries, contexts = tree_and_inputs(split, propagation)
    run = lambda chunk: gradients(tree.eval(), tree_contrast(tree, queries, contexts, [1, 3], chunk=chunk)[0])  # noqa: E731
    whole = run(None)
    assert whole.abs().max() > 0
    for chunk in (1, 4, 12, 100):
        torch.testing.assert_close(run(chunk), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", list(SPLITS))
def test_dropout_falls_again_as_it_fell(split):
    tree, queries, _ = tree_and_inputs(split, "learned")
    tree.train()

    def contrast(y):
        return symmetric_info_nce(ntvd(y[:6], y[6:12]), 20.0)

    def kept():
        "The chunks that are checkpointed otherwise, with their activations kept."
        return contrast(torch.cat([tree.assign(part, 3) for part in _chunks(queries, 5)]))

    seen = []
    for run in (kept, lambda: cached_loss(lambda rows: tree.assign(rows, 3), contrast, queries, 5)):
        torch.manual_seed(3)
        seen.append((gradients(tree, run()), torch.rand(3)))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[0][1], seen[1][1])  # the random state afterwards is the same
    torch.manual_seed(4)
    other = gradients(tree, kept())
    assert not torch.allclose(other, seen[0][0], atol=1e-4)  # other dropout, other gradient: the test can fail


def test_activations_are_not_kept():
    tree, x = Retreever(8, depth=6, propagation="learned"), torch.randn(256, 8)

    def kept_bytes(chunk):
        total = [0]

        def pack(t):
            total[0] += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            represent_in_chunks(lambda rows: tree.assign(rows, 6), x, chunk)
        return total[0]

    assert kept_bytes(None) > 20 * 256 * 64 * 4  # some twenty numbers for each leaf of each row
    assert kept_bytes(16) <= 256 * 64 * 4


def test_a_loss_with_parameters_of_its_own_and_no_grad():
    layer, scale, x = torch.nn.Linear(4, 4), torch.tensor(3.0, requires_grad=True), torch.randn(9, 4)
    cached_loss(layer, lambda y: (y.square() * scale).sum(), x, 2).backward()
    assert scale.grad.item() == pytest.approx(layer(x).square().sum().item(), rel=1e-5)
    with torch.no_grad():
        assert not represent_in_chunks(layer, x, 2).requires_grad
        torch.testing.assert_close(represent_in_chunks(layer, x, 2), layer(x))
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ArgumentError, match="chunk"):
            represent_in_chunks(layer, x, bad)


# ---------------------------------------------------------------- masks and mining

pairs_of = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 11)), max_size=25)


@FAST
@given(pairs=pairs_of, queries=st.lists(st.integers(0, 9), max_size=9), contexts=st.lists(st.integers(0, 13), max_size=9))
def test_mask_is_membership(pairs, queries, contexts):
    mask = RelevanceMask(torch.tensor(pairs, dtype=torch.long).view(-1, 2))(torch.tensor(queries, dtype=torch.long), torch.tensor(contexts, dtype=torch.long))
    assert mask.tolist() == [[(q, c) in set(pairs) for c in contexts] for q in queries]


@FAST
@given(pairs=pairs_of, k=st.integers(1, 15), skip=st.integers(0, 3), margin=st.sampled_from([None, 0, 1, 2]), ratio=st.sampled_from([None, 0.5, 1]),
       block=st.sampled_from([1, 3, 64]), seed=st.integers(0, 99))
def test_mining_is_the_full_ranking(pairs, k, skip, margin, ratio, block, seed):
    queries, contexts = (torch.randint(-2, 3, (n, 2), generator=generator(seed + n)).float() for n in (8, 12))  # integers: many exact ties
    scores, shapes = queries @ contexts.T, []

    def score(a, b):
        shapes.append((len(a), len(b)))
        return a @ b.T

    relevance = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    found = mine_negatives(queries, contexts, relevance, k, skip=skip, margin=margin, ratio=ratio, score=score, block=block)
    for q in range(8):
        own = {c for p, c in pairs if p == q}
        least = min((scores[q, c].item() for c in own), default=None)
        free = [c for c in range(12) if own and c not in own and (margin is None or scores[q, c] < least - margin)
                and (ratio is None or scores[q, c] < least - (1 - ratio) * abs(least))]
        best = sorted(free, key=lambda c: (-scores[q, c].item(), c))[skip : skip + k]
        assert found[q].tolist() == best + [-1] * (k - len(best))
    assert all(a <= block and b <= block for a, b in shapes)  # never more than a block of scores


def test_mining_refuses_what_it_cannot_read():
    x, one = torch.eye(4), torch.tensor([[0, 0]])
    for args, kwargs, name in (
        ((x * math.inf, x, one, 1), {}, "queries"),
        ((x, x[:, :2], one, 1), {}, "contexts"),
        ((x, x, torch.tensor([0, 1]), 1), {}, "relevance"),
        ((x, x, torch.tensor([[4, 0]]), 1), {}, "relevance"),
        ((x, x, torch.tensor([[0, -1]]), 1), {}, "relevance"),
        ((x, x, one, 0), {}, "k"),
        ((x, x, one, 1), {"skip": 1.5}, "skip"),
        ((x, x, one, 1), {"margin": math.nan}, "margin"),
        ((x, x, one, 1), {"ratio": 0}, "ratio"),
        ((x, x, one, 1), {"block": 0}, "block"),
    ):
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            mine_negatives(*args, **kwargs)
    assert mine_negatives(x[:0], x, one[:0], 3).shape == (0, 3)


@FAST
@given(seed=st.integers(0, 9999), per_query=st.integers(0, 5), queries=st.lists(st.integers(0, 19), min_size=1, max_size=12, unique=True))
def test_a_draw_depends_on_nothing_but_seed_and_query(seed, per_query, queries):
    mined, nothing = torch.randint(-1, 40, (20, 5), generator=generator(0)), torch.zeros(0, dtype=torch.long)
    together = draw_negatives(mined, torch.tensor(queries), nothing, per_query, (seed, 1))
    apart = [draw_negatives(mined, torch.tensor([q]), nothing, per_query, (seed, 1)) for q in queries]
    assert together.tolist() == sorted({c for draw in apart for c in draw.tolist()})
    assert all(set(draw.tolist()) <= set(mined[q].tolist()) - {-1} and len(draw) <= per_query for q, draw in zip(queries, apart))
    blocked = draw_negatives(mined, torch.tensor(queries), together[::2], per_query, (seed, 1))
    assert blocked.tolist() == together[1::2].tolist()


# ---------------------------------------------------------------- in `fit`


def test_a_training_with_mined_negatives_and_chunks_continues_bit_for_bit(tmp_path):
    g = generator(0)
    queries = torch.randn(60, 8, generator=g)
    contexts = torch.cat([queries + 0.3 * torch.randn(60, 8, generator=g), torch.randn(20, 8, generator=g)])
    pairs = PairVectors(queries, contexts, torch.arange(60)[:, None].expand(60, 2))
    mined = mine_negatives(pairs.queries, pairs.contexts, pairs.relevance, 4)
    plan = TrainSettings(steps=12, batch_size=16, lr=1e-2, checkpoint_every=4, validate_every=100, log_every=1, device="cpu")

    def run(folder, stop=None):
        torch.manual_seed(0)
        tree = Retreever(8, depth=4, split="mlp")

        def after_step(model, step):
            if step == stop:
                raise RuntimeError("stopped")

        loss = mined_tree_loss(pairs, make_schedule("stochastic", 4, 12), mined, per_query=2, chunk=5)
        history = fit(tree, loss, len(pairs), plan, run_dir=folder, after_step=after_step, progress=False)
        return tree, history

    straight, history = run(tmp_path / "a")
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "b", stop=7)
    continued, _ = run(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), continued.state_dict().values()))
    assert max(history.curve("mined")[1]) > 4
    losses = history.curve("loss")[1]
    assert np.isfinite(losses).all()
