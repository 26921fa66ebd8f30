"Properties that every operator of the mergers must have, from either origin."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import ArgumentError, EmptyError, NotFiniteError, RangeError, ShapeError, UnknownNameError
from hiernb.mergers.attention import OPERATORS, make_merger
from hiernb.mergers.binary import append_all, merge_naively
from hiernb.mergers.levels import hide_and_pad, level_masks, level_mass, level_size, n_levels
from hiernb.mergers.merger import Merger

DIM, MAX_LEVELS = 8, 6
KINDS = {
    "mean": ("mean", {}),
    "binary": ("binary", {}),
    "conv": ("conv", {}),
    "conv, overlap 3, shared kernels": ("conv", {"overlap": 3, "kernels": 2}),
    "attention": ("attention", {}),
    "attention, 4 heads, temperature": ("attention", {"heads": 4, "learn_temperature": True}),
}
GRID = [pytest.param(kind, origin, id=f"{kind} from {origin}") for kind in KINDS for origin in ("children", "leaves")]
grid = pytest.mark.parametrize(("kind", "origin"), GRID)
few = settings(max_examples=8, deadline=None)


def disturbed(kind, origin, seed=0, dtype=torch.float64):
    "A merger whose parameters are all away from their start."
    operator, options = KINDS[kind]
    merger = make_merger(operator, origin, DIM, max_levels=MAX_LEVELS, **options).to(dtype)
    g = torch.Generator().manual_seed(seed)
    for p in merger.parameters():
        p.data = (torch.randn(p.shape, generator=g) * (3.0 if "attention" in kind and p.ndim == 3 else 0.3)).to(dtype)
    return merger


@st.composite
def contexts(draw, most=40):
    "Leaves [B, N, DIM] in float64 and a mask; sometimes nothing counts in a whole context."
    batch, n, share = draw(st.integers(1, 3)), draw(st.integers(1, most)), draw(st.sampled_from([1.0, 0.7, 0.2, 0.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return torch.randn(batch, n, DIM, generator=g, dtype=torch.float64), torch.rand(batch, n, generator=g) < share


def same(got, want, tolerance=1e-9):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@grid
@few
@given(data=contexts())
def test_shapes_masks_and_empty_groups(kind, origin, data):
    leaves, mask = data
    merger, n = disturbed(kind, origin), leaves.shape[1]
    summaries = merger(leaves, mask)
    assert [s.shape for s in summaries] == [(len(leaves), level_size(n, level), DIM) for level in range(n_levels(n) + 1)]
    assert summaries[0] is leaves
    for summary, there in zip(summaries[1:], level_masks(mask, n_levels(n))[1:]):
        assert torch.isfinite(summary).all() and (summary[~there] == 0).all()
    for rubbish in (float("nan"), float("inf"), 1e300):
        same(merger(leaves.masked_fill(~mask[..., None], rubbish), mask)[1:], summaries[1:])
    for levels in range(n_levels(n) + 1):
        same(merger(leaves, mask, levels), summaries[: levels + 1])
    same(merger(leaves, torch.ones_like(mask)), merger(leaves))


@grid
@few
@given(data=contexts())
def test_forward_is_the_definition(kind, origin, data):
    merger = disturbed(kind, origin)
    if merger.reach == 1:
        same(merger(*data), merge_naively(merger, *data))
    if origin == "leaves":  # the faster ways from the leaves, against `merge` group by group
        leaves, mask = data
        levels, n = n_levels(leaves.shape[1]), leaves.shape[1]
        oracle = Merger.from_leaves(merger, *hide_and_pad(leaves, mask, levels), n, levels)
        same(merger(*data)[1:], [s * m[..., None] for s, m in zip(oracle, level_masks(mask, levels)[1:])])


@grid
@few
@given(data=contexts(), cut=st.integers(1, 40), more=st.integers(0, 2))
def test_growing_is_forward(kind, origin, data, cut, more):
    leaves, mask = data
    merger, n = disturbed(kind, origin), leaves.shape[1]
    want = merger(leaves, mask)
    same(append_all(merger, leaves, mask), want)
    same(append_all(merger, leaves), merger(leaves))
    cut, levels = min(cut, n), min(n_levels(n) + more, MAX_LEVELS)
    summaries, state = merger.prefill(leaves[:, :cut], mask[:, :cut], levels)
    assert len(summaries) == levels + 1 and state.n == cut
    same(summaries[: n_levels(cut) + 1], merger(leaves[:, :cut], mask[:, :cut]))
    path = [s[:, -1] for s in summaries]
    for i in range(cut, n):
        path = merger.append(state, leaves[:, i], mask[:, i])
        if i == n // 2:
            same(path[: n_levels(i + 1) + 1], [s[:, -1] for s in merger(leaves[:, : i + 1], mask[:, : i + 1])])
    same(path[: len(want)], [s[:, -1] for s in want])


@grid
@few
@given(data=contexts(most=20))
def test_gradients_are_finite_and_none_reach_what_is_masked(kind, origin, data):
    leaves, mask = data
    merger, leaves = disturbed(kind, origin), leaves.requires_grad_()
    for make in (lambda: merger(leaves, mask), lambda: append_all(merger, leaves, mask)):
        leaves.grad = None
        merger.zero_grad()
        sum(((level + 1) * s).square().sum() for level, s in enumerate(make())).backward()
        assert torch.isfinite(leaves.grad).all()
        if leaves.shape[1] > 1:
            assert all(torch.isfinite(p.grad).all() for p in merger.parameters())
        leaves.grad = None
        sum(s.square().sum() for s in make()[1:] or [leaves * 0]).backward()
        assert (leaves.grad[~mask] == 0).all()


@grid
def test_every_parameter_learns(kind, origin):
    merger = disturbed(kind, origin)
    g = torch.Generator().manual_seed(0)
    leaves = torch.randn(4, 200, DIM, generator=g, dtype=torch.float64, requires_grad=True)
    sum((s * torch.randn(s.shape, generator=g, dtype=s.dtype)).sum() for s in merger(leaves, levels=MAX_LEVELS)).backward()
    for name, p in merger.named_parameters():
        assert (p.grad != 0).all(), name


@grid
@few
@given(data=contexts(most=20), extra=st.integers(1, 20))
def test_padding_changes_nothing(kind, origin, data, extra):
    leaves, mask = data
    merger, n = disturbed(kind, origin), leaves.shape[1]
    wide = torch.cat([leaves, torch.randn(len(leaves), extra, DIM, dtype=leaves.dtype)], 1)
    wide_mask = torch.cat([mask, torch.zeros(len(leaves), extra, dtype=torch.bool)], 1)
    alone = merger(leaves, mask)
    same([s[:, : level_size(n, level)] for level, s in enumerate(merger(wide, wide_mask, n_levels(n)))], alone)
    for b in range(len(leaves)):  # and contexts of a batch do not know of each other
        same(merger(leaves[b : b + 1], mask[b : b + 1]), [s[b : b + 1] for s in alone])


@grid
def test_a_leaf_changes_its_ancestors_only(kind, origin):
    merger, n = disturbed(kind, origin), 37
    leaves = torch.randn(1, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = merger(leaves)
    for changed in (0, 17, 36):
        other = leaves.clone()
        other[:, changed] += 1
        for level, (a, b) in enumerate(zip(before, merger(other))):
            differs = (a != b).any(-1)[0].nonzero()[:, 0].tolist()
            assert changed >> level in differs
            if merger.reach == 1:
                assert differs == [changed >> level]
            else:
                assert min(differs) == changed >> level  # overlap looks back, never ahead


@grid
def test_permutation_of_the_leaves_of_a_group(kind, origin):
    merger = disturbed(kind, origin)
    g = torch.Generator().manual_seed(0)
    leaves = torch.randn(2, 32, DIM, generator=g, dtype=torch.float64)
    inside = torch.cat([8 * i + torch.randperm(8, generator=g) for i in range(4)])  # groups of level 3 keep their leaves
    a, b = merger(leaves)[3], merger(leaves[:, inside])[3]
    blind = kind.startswith("mean") or (kind.startswith("attention") and origin == "leaves")
    assert torch.allclose(a, b) == blind
    swapped = merger(leaves.unflatten(1, (-1, 2)).flip(2).flatten(1, 2))[1]  # left and right exchanged
    assert torch.allclose(swapped, merger(leaves)[1]) == kind.startswith(("mean", "attention"))


@grid
def test_bfloat16(kind, origin):
    merger = disturbed(kind, origin, dtype=torch.float32)
    for p in merger.parameters():
        p.data *= 0.1
    leaves = torch.randn(2, 45, DIM, generator=torch.Generator().manual_seed(0))
    exact = merger(leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same([s.float() for s in merger(leaves)], exact, 0.06)
    for _ in range(2):  # float32 parameters, then bfloat16 ones
        for got in (merger(leaves.bfloat16()), append_all(merger, leaves.bfloat16())):
            assert all(s.dtype == torch.bfloat16 for s in got)
            same([s.float() for s in got], exact, 0.06)
        merger = merger.bfloat16()


@pytest.mark.parametrize("origin", ["children", "leaves"])
def test_running_sums_do_not_stall_in_bfloat16(origin):
    ones = torch.ones(1, 1000, DIM, dtype=torch.bfloat16)
    merger = make_merger("mean", origin, DIM)
    assert (append_all(merger, ones)[-1] == 1).all() and (merger(ones)[-1] == 1).all()


@grid
def test_state_does_not_grow(kind, origin):
    merger = disturbed(kind, origin)
    state = merger.begin(2, MAX_LEVELS, like=torch.zeros(1, dtype=torch.float64))
    sizes = []
    with torch.no_grad():
        for n in range(200):
            path = merger.append(state, torch.full((2, DIM), float(n), dtype=torch.float64))
            sizes.append(sum(t.numel() for t in [state.counts, *state.kept.values()]))
    assert len(path) == MAX_LEVELS + 1 and state.n == 200
    assert len(set(sizes[150:])) == 1 and sizes[-1] <= MAX_LEVELS * 2 * 30 * (DIM + 1) * merger.reach


@grid
def test_untrained_operators_are_means(kind, origin):
    operator, options = KINDS[kind]
    merger = make_merger(operator, origin, DIM, **options, **({"init_std": 0.0} if operator == "attention" else {}))
    leaves = torch.randn(2, 64, DIM)
    same(merger(leaves), make_merger("mean", origin, DIM)(leaves), 1e-5)


@few
@given(n=st.integers(1, 300), seed=st.integers(0, 1000))
def test_mass_is_kept(n, seed):
    a = torch.rand(2, 3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    levels = level_mass(a)
    assert [t.shape[-1] for t in levels] == [level_size(n, level) for level in range(n_levels(n) + 1)]
    for t in levels:
        torch.testing.assert_close(t.sum(-1), a.sum(-1))
    for child, parent in zip(levels, levels[1:]):
        torch.testing.assert_close(torch.nn.functional.pad(child, (0, child.shape[-1] % 2)).unflatten(-1, (-1, 2)).sum(-1), parent)


@grid
def test_bad_input(kind, origin):
    merger, x = disturbed(kind, origin, dtype=torch.float32), torch.randn(2, 9, DIM)
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    assert all((s == 0).all() for s in merger(x, nothing)[1:])
    one = merger(x[:, :1])
    assert len(one) == 1 and torch.equal(one[0], x[:, :1])
    state = merger.begin(2, 3, like=x)
    bad = x.clone()
    bad[1, 4, 2] = float("nan")
    for error, words, call in [
        (EmptyError, "at least one leaf", lambda: merger(x[:, :0])),
        (NotFiniteError, "`leaves`", lambda: merger(bad)),
        (NotFiniteError, "`leaves`", lambda: merger.append(state, bad[:, 4])),
        (RangeError, "`levels`", lambda: merger(x, levels=5)),
        (RangeError, "`levels`", lambda: merger(x, levels=-1)),
        (RangeError, "`max_levels` of this merger", lambda: merger(torch.randn(1, 65, DIM))),
        (RangeError, "`max_levels` of this merger", lambda: merger.begin(2, 7, like=x)),
        (RangeError, "`batch`", lambda: merger.begin(0, 3, like=x)),
        (ArgumentError, "`levels`", lambda: merger(x, levels=1.5)),
        (ShapeError, "`leaves`", lambda: merger(x[..., :5])),
        (ShapeError, "`leaves`", lambda: merger(x[0])),
        (ShapeError, "`mask`", lambda: merger(x, nothing[:1])),
        (ShapeError, "`mask`", lambda: merger(x, nothing.float())),
        (ShapeError, "`leaf`", lambda: merger.append(state, x[:, :2])),
        (ShapeError, "`mask`", lambda: merger.append(state, x[:, 0], nothing[:1, 0])),
        (ArgumentError, "floating point", lambda: merger(x.long())),
    ]:
        with pytest.raises(error, match=words):
            call()
    assert state.n == 0  # a refused leaf leaves no trace
    same(append_all(merger, x[:, :8]), merger(x[:, :8]), 1e-4)


def test_names():
    assert sorted(OPERATORS) == ["attention", "binary", "conv", "mean"]
    for call in (
        lambda: make_merger("max", "leaves", DIM),
        lambda: make_merger("mean", "root", DIM),
        lambda: make_merger("conv", "leaves", DIM, heads=2),
        lambda: make_merger("attention", "leaves", DIM, dropout=0.1),
    ):
        with pytest.raises(UnknownNameError):
            call()
    for options in ({"heads": 3}, {"heads": 0}, {"init_std": -1.0}, {"max_levels": -1}, {"max_levels": 49}):
        with pytest.raises(ArgumentError):
            make_merger("attention", "leaves", DIM, **options)
    for options in ({"overlap": 0}, {"kernels": 3}, {"max_levels": 30}):
        with pytest.raises(ArgumentError):
            make_merger("conv", "leaves", DIM, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@grid
def test_gpu(kind, origin):
    merger = disturbed(kind, origin, dtype=torch.float32)
    leaves, mask = torch.randn(2, 45, DIM), torch.rand(2, 45) > 0.3
    want, grown = merger(leaves, mask), append_all(merger, leaves, mask)
    merger.cuda()
    same([s.cpu() for s in merger(leaves.cuda(), mask.cuda())], want, 1e-4)
    same([s.cpu() for s in append_all(merger, leaves.cuda(), mask.cuda())], grown, 1e-4)
