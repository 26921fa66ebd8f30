"""The student and its losses: plain loops as oracles, properties over many shapes, and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import ArgumentError, EmptyError, HiernbError, NotFiniteError, RangeError, ShapeError
from hiernb.mergers.levels import level_masks, level_mass, level_size, n_levels
from hiernb.mergers.losses import FORMS, chained_log_probs, level_ce, level_entropy, softmax_ce, student_losses
from hiernb.mergers.student import Student, copy_projections, group_centres, masked_scores, rotate, wavelengths

quick = settings(max_examples=40, deadline=None)


def means(x: torch.Tensor, levels: int) -> list[torch.Tensor]:
    "Plain means of groups, [B, N, d] → one tensor per level."
    return [torch.stack([x[:, i << level : (i + 1) << level].mean(1) for i in range(level_size(x.shape[1], level))], 1) for level in range(levels + 1)]


def problem(n: int, levels: int, seed: int, batch: int = 2, heads: int = 2, queries: int = 3, masked: bool = False):
    "Random scores of all levels and a random teacher; masked leaves have neither mass nor finite scores."
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, n, generator=g) < 0.6 if masked else torch.ones(batch, n, dtype=torch.bool)
    mask[:, seed % n] = True
    logits = 3 * torch.randn(batch, heads, queries, n, generator=g, dtype=torch.float64)
    teacher = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    scores = [3 * torch.randn(batch, heads, queries, level_size(n, level), generator=g, dtype=torch.float64) for level in range(levels + 1)]
    return [s.masked_fill(~m[:, None, None], -torch.inf) for s, m in zip(scores, level_masks(mask, levels))], teacher, mask


# student -------------------------------------------------------------------------------------------------------------

@quick
@given(
    n=st.integers(1, 20), batch=st.integers(1, 3), queries=st.integers(1, 4), heads=st.integers(1, 3), half=st.integers(1, 4),
    shared=st.booleans(), rotary=st.booleans(), seed=st.integers(0, 10**6),
)
def test_scores_are_the_definition(n, batch, queries, heads, half, shared, rotary, seed):
    torch.manual_seed(seed)
    d_k, levels = 2 * half, n_levels(n)
    student = Student(5, d_k, heads, max_levels=5, shared=shared, rotary=rotary).double()
    x, leaves = torch.randn(batch, queries, 5, dtype=torch.float64), torch.randn(batch, n, 5, dtype=torch.float64)
    mask = torch.rand(batch, n) < 0.7
    positions = torch.randint(0, 50, (batch, queries))
    summaries, masks = means(leaves, levels), level_masks(mask, levels)
    with torch.no_grad():
        got = student(x, summaries, masks, positions)
        for level in range(levels + 1):
            w = 0 if shared else level
            omega = [2 * math.pi / length for length in wavelengths(d_k, level, 5).tolist()]
            assert got[level].shape == (batch, heads, queries, level_size(n, level))
            for b in range(batch):
                for i in range(level_size(n, level)):
                    for j in range(queries):
                        q, k = student.to_query[w](x[b, j]).view(heads, d_k), student.to_key[w](summaries[level][b, i]).view(heads, d_k)
                        far = positions[b, j].item() - (i * 2**level + (2**level - 1) / 2)
                        for h in range(heads):
                            want = float(q[h] @ k[h])
                            if rotary:  # complex numbers: Re(q · conj(k) · e^{iω(p − c)})
                                pairs = [complex(q[h, m], q[h, m + half]) * complex(k[h, m], -k[h, m + half]) for m in range(half)]
                                want = sum((z * complex(math.cos(o * far), math.sin(o * far))).real for z, o in zip(pairs, omega))
                            want = want / math.sqrt(d_k) if masks[level][b, i] else -math.inf
                            assert got[level][b, h, j, i].item() == pytest.approx(want, abs=1e-9)


@quick
@given(n=st.integers(1, 40), first=st.integers(0, 39), rotary=st.booleans(), level=st.integers(0, 4), seed=st.integers(0, 10**6))
def test_keys_of_a_growing_cache_are_those_of_the_whole(n, first, rotary, level, seed):
    torch.manual_seed(seed)
    student = Student(4, 6, 2, max_levels=4, rotary=rotary)
    nodes, first = torch.randn(2, n, 4), first % n
    torch.testing.assert_close(student.key(nodes[:, first : first + 1], level, first), student.key(nodes, level)[:, :, first : first + 1])


@quick
@given(level=st.integers(0, 10), i=st.integers(0, 30), half=st.integers(1, 20), extra=st.integers(0, 4))
def test_a_centre_stands_for_its_group(level, i, half, extra):
    "The mean of the leaves' rotations is the rotation at the centre, shrunk by less than 5 %."
    lengths = wavelengths(2 * half, level, level + extra)
    x = torch.ones(1, 1, 1, 2 * half, dtype=torch.float64)
    leaves = torch.arange(i << level, (i + 1) << level)
    mean = rotate(x.expand(1, 1, len(leaves), -1), leaves, lengths).mean(2)
    centre = rotate(x, group_centres(1, level, i), lengths)[:, :, 0]
    ratio = mean / centre.where(centre.abs() > 1e-3, torch.nan)
    ratio = ratio[ratio.isfinite()]
    assert (ratio > 0.95).all() and (ratio < 1 + 1e-6).all()


@quick
@given(shift=st.integers(0, 10**6), level=st.integers(0, 14), seed=st.integers(0, 10**6))
def test_rotated_scores_depend_on_distance_only(shift, level, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 3, 8, generator=g)
    a, b = torch.randint(0, 1000, (2, 3), generator=g)
    lengths = wavelengths(8, level)
    one, two = (rotate(q, a + s, lengths) @ rotate(k, b + s, lengths).mT for s in (0, shift))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_copied_projections_make_the_mean_of_the_leaves_scores():
    torch.manual_seed(0)
    to_q, to_k = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)
    student = copy_projections(Student(6, 4, 2, max_levels=4), to_q.weight, to_k.weight, to_q.bias)
    x = torch.randn(1, 16, 6)
    scores = student(x, means(x, 4))
    q, k = (f(x).view(1, 16, 2, 4).transpose(1, 2) for f in (to_q, to_k))
    torch.testing.assert_close(scores[0].softmax(-1), (q @ k.mT / 2).softmax(-1))  # the key's bias has no effect
    for level in range(5):
        torch.testing.assert_close(scores[level], scores[0].unflatten(-1, (-1, 2**level)).mean(-1), atol=1e-5, rtol=1e-4)


def test_half_precision_and_gradients():
    torch.manual_seed(0)
    student = Student(6, 4, 2, max_levels=3, rotary=True)
    x = torch.randn(2, 7, 6)
    teacher = torch.randn(2, 2, 7, 7).softmax(-1)
    student_losses(student(x, means(x, 3)), teacher).total.backward()
    # a root has one node: nothing to learn there
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(student.to_query[level].weight.grad.abs().max() > 0 for level in range(3)) and student.to_query[3].weight.grad.abs().max() < 1e-7
    low = [s.bfloat16() for s in student(x, means(x, 3))]
    found = student_losses(low, teacher.bfloat16())
    assert found.total.dtype == torch.float32 and found.total.isfinite()


@pytest.mark.parametrize("call, error", [
    (lambda: Student(0), RangeError),
    (lambda: Student(4, heads=0), RangeError),
    (lambda: Student(4, max_levels=-1), RangeError),
    (lambda: Student(4, d_k=3, rotary=True), ArgumentError),
    (lambda: Student(4, 2)(torch.zeros(1, 2, 5), [torch.zeros(1, 2, 4)]), ShapeError),
    (lambda: Student(4, 2)(torch.zeros(1, 2, 4), []), RangeError),
    (lambda: Student(4, 2, max_levels=0)(torch.zeros(1, 2, 4), [torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)]), RangeError),
    (lambda: Student(4, 2)(torch.zeros(1, 2, 4), [torch.zeros(1, 5, 4), torch.zeros(1, 2, 4)]), ShapeError),
    (lambda: masked_scores(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4, 3), torch.ones(1, 3).bool()), ShapeError),
    (lambda: masked_scores(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4, 3), torch.ones(1, 4)), ShapeError),
])
def test_bad_students(call, error):
    with pytest.raises(error):
        call()


# losses --------------------------------------------------------------------------------------------------------------

@quick
@given(n=st.integers(1, 33), cut=st.integers(0, 6), masked=st.booleans(), seed=st.integers(0, 10**6))
def test_the_leaf_kl_is_the_sum_of_the_expected_kls(n, cut, masked, seed):
    "With a top level of several nodes as well as with a root, with and without masks."
    levels = max(0, n_levels(n) - cut)
    scores, teacher, mask = problem(n, levels, seed, masked=masked)
    mass = level_mass(teacher, levels)
    parts = [level_ce(scores, mass, level, "sibling").double() - entropy64(mass, level, "sibling") for level in range(levels + 1)]
    leaves = chained_log_probs(scores)[0]
    at_leaves = torch.where(teacher > 0, teacher * (teacher.log() - leaves), 0).sum(-1)
    torch.testing.assert_close(sum(parts), at_leaves, atol=1e-8, rtol=1e-8)
    for part in parts:
        assert (part > -1e-9).all()


def entropy64(mass, level, form):
    "`level_entropy` in float64, by its definition."
    def h(t):
        return torch.special.entr(t).sum(-1)
    return h(mass[level]) - (h(mass[level + 1]) if form == "sibling" and level < len(mass) - 1 else 0)


@quick
@given(n=st.integers(1, 17), cut=st.integers(0, 5), form=st.sampled_from(FORMS), seed=st.integers(0, 10**6))
def test_losses_are_plain_loops(n, cut, form, seed):
    levels = max(0, n_levels(n) - cut)
    scores, teacher, mask = problem(n, levels, seed, masked=True)
    found = student_losses(scores, teacher, form)
    for level in range(levels + 1):
        total = floor = 0.0
        for b, h, q in ((b, h, q) for b in range(2) for h in range(2) for q in range(3)):
            t = [teacher[b, h, q, i << level : (i + 1) << level].sum().item() for i in range(level_size(n, level))]
            s = scores[level][b, h, q].tolist()
            for i in range(len(t)):
                rivals = range(len(t)) if form == "softmax" or level == levels else [j for j in (i & ~1, i | 1) if j < len(t)]
                if t[i] > 0:
                    total -= t[i] * (s[i] - math.log(sum(math.exp(s[j]) for j in rivals)))
                    floor -= t[i] * math.log(t[i] / sum(t[j] for j in rivals))
        assert found.ce[level].item() == pytest.approx(total / 12, abs=1e-6)
        assert found.entropy[level].item() == pytest.approx(floor / 12, abs=1e-4)
    assert found.total.item() == pytest.approx(found.ce.sum().item(), abs=1e-5)


@quick
@given(n=st.integers(2, 33), form=st.sampled_from(FORMS), seed=st.integers(0, 10**6))
def test_a_perfect_student_has_no_divergence(n, form, seed):
    scores, teacher, _ = problem(n, n_levels(n), seed)
    found = student_losses([t.log() for t in level_mass(teacher)], teacher, form)
    torch.testing.assert_close(found.kl.double(), torch.zeros_like(found.kl.double()), atol=1e-4, rtol=0)
    assert (student_losses(scores, teacher, form).kl >= -1e-4).all()


@quick
@given(n=st.integers(1, 33), seed=st.integers(0, 10**6))
def test_chained_probabilities_are_a_distribution_on_every_level(n, seed):
    scores, _, mask = problem(n, n_levels(n), seed, masked=True)
    chain = [p.exp() for p in chained_log_probs(scores)]
    for level, p in enumerate(chain):
        torch.testing.assert_close(p.sum(-1), torch.ones_like(p.sum(-1)))
        if level:
            torch.testing.assert_close(level_mass(chain[level - 1], 1)[1], p)
    assert (chain[0][~mask[:, None, None].expand_as(chain[0])] == 0).all()


@quick
@given(n=st.integers(1, 12), form=st.sampled_from(FORMS), seed=st.integers(0, 10**6))
def test_no_nan_gradient_from_masks_and_empty_contexts(n, form, seed):
    scores, teacher, mask = problem(n, n_levels(n), seed, masked=True)
    gone = torch.tensor([True, False])[:, None, None, None]  # the first context of the batch has no leaf at all
    scores = [s.masked_fill(gone, -torch.inf).requires_grad_() for s in scores]
    found = student_losses(scores, teacher.masked_fill(gone, 0), form)
    found.total.backward()
    assert found.n == 6 and all(s.grad.isfinite().all() and (s.grad[0] == 0).all() for s in scores)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_against_differences(form):
    scores, teacher, _ = problem(5, 3, 3, batch=1, heads=1, queries=2)
    inputs = [s.requires_grad_() for s in scores]
    assert torch.autograd.gradcheck(lambda *s: student_losses(list(s), teacher, form, weights=[1, 0.5, 2, 1]).total, inputs)


@quick
@given(n=st.integers(1, 12), form=st.sampled_from(FORMS), seed=st.integers(0, 10**6))
def test_masked_queries_have_no_effect(n, form, seed):
    scores, teacher, _ = problem(n, n_levels(n), seed)
    keep = torch.tensor([[True, False, True], [False, False, True]])
    found = student_losses(scores, teacher, form, query_mask=keep)
    rows = [(s.transpose(1, 2)[keep], teacher.transpose(1, 2)[keep]) for s in scores]  # [3, H, n_l]: three queries of one context
    alone = student_losses([s.transpose(0, 1)[None] for s, _ in rows], rows[0][1].transpose(0, 1)[None], form)
    torch.testing.assert_close(found.ce, alone.ce)
    torch.testing.assert_close(found.entropy, alone.entropy, atol=1e-6, rtol=1e-5)
    assert found.n == alone.n == 6


def test_levels_without_weight_are_measured_and_not_trained():
    scores, teacher, _ = problem(8, 3, 0)
    inputs = [s.requires_grad_() for s in scores]
    found = student_losses(inputs, teacher, weights=[1, 0, 0, 0])
    found.total.backward()
    assert inputs[1].grad is None and inputs[0].grad is not None
    torch.testing.assert_close(found.ce, student_losses(scores, teacher).ce)


def test_the_teacher_is_not_copied():
    "Level 0 of the mass is the teacher itself, and all levels hold less than 2N + log2 N numbers."
    teacher = torch.rand(1, 2, 3, 1000).softmax(-1)
    mass = level_mass(teacher)
    assert mass[0].data_ptr() == teacher.data_ptr()
    assert sum(m.shape[-1] for m in mass) <= 2 * 1000 + n_levels(1000)


def test_memory_of_a_loss_is_linear_in_the_leaves():
    "What autograd keeps: a constant times queries × leaves for all levels together."

    def saved(n: int) -> int:
        scores, teacher, _ = problem(n, n_levels(n), 0, batch=1, queries=4)
        sizes = {}

        def keep(t):
            sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            found = student_losses([s.requires_grad_() for s in scores], teacher, "sibling")
        assert found.total.requires_grad
        return sum(sizes.values())

    kept = {n: saved(n) for n in (256, 1024)}
    assert kept[1024] < 4.2 * kept[256] and kept[1024] < 12 * 2 * 4 * 1024


@pytest.mark.parametrize("change, error", [
    (lambda s, t: (s, t.masked_fill(t > t.median(), torch.nan)), RangeError),
    (lambda s, t: (s, t * 1.1), RangeError),
    (lambda s, t: (s, t * 0), EmptyError),
    (lambda s, t: ([s[0] * torch.nan, *s[1:]], t), NotFiniteError),
    (lambda s, t: ([s[0] + torch.inf, *s[1:]], t), NotFiniteError),
    (lambda s, t: ([torch.full_like(s[0], -torch.inf).index_fill(-1, torch.tensor(0), 0.0), *s[1:]], t), NotFiniteError),
    (lambda s, t: ([], t), EmptyError),
    (lambda s, t: (s[1:], t), ShapeError),
    (lambda s, t: (s, t[:, :1]), ShapeError),
    (lambda s, t: (s, t[0]), ShapeError),
])
@pytest.mark.parametrize("form", FORMS)
def test_bad_losses(change, error, form):
    scores, teacher, _ = problem(7, 3, 0)
    with pytest.raises(error):
        student_losses(*change(scores, teacher), form)


@pytest.mark.parametrize("settings_", [
    {"weights": [1, 1]}, {"weights": [1, -1, 1, 1]}, {"weights": [1, math.nan, 1, 1]}, {"form": "soft"},
    {"query_mask": torch.ones(2, 3)}, {"query_mask": torch.ones(3, 2).bool()}, {"query_mask": torch.zeros(2, 3).bool()},
])
def test_bad_settings(settings_):
    scores, teacher, _ = problem(7, 3, 0)
    with pytest.raises(HiernbError):
        student_losses(scores, teacher, **settings_)


def test_entropy_is_the_floor():
    scores, teacher, _ = problem(9, 4, 5)
    mass = level_mass(teacher)
    for level in range(5):
        for form in FORMS:
            torch.testing.assert_close(level_entropy(mass, level, form).double(), entropy64(mass, level, form), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(softmax_ce(teacher.log(), teacher), entropy64(mass, 0, "softmax"))
