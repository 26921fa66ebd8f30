"""Beam descent: random contexts against a naive search, bad input, the drop-in, the summary cache, threads, forks, and the GPU kernels in the compiler."""

import copy
import importlib.util
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import ArgumentError, EmptyError, HiernbError, NotFiniteError, RangeError, ShapeError
from hiernb.mergers.binary import BinaryMerger, MeanMerger
from hiernb.mergers.descent import descend
from hiernb.mergers.descent_attention import attend, descent_attention, mean_levels
from hiernb.mergers.descent_plan import plan_descent
from hiernb.mergers.levels import level_masks, n_levels
from hiernb.mergers.student import Student
from hiernb.mergers.summary_cache import SummaryCache

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("torch", "numba")


def naive(query, keys, beam, budget, stop, window, start, length, position, mask):
    "One query, one head: (leaves of the blocks, leaves of the window, nodes scored), in plain Python."
    n = len(keys[0])
    top = start if start is not None else next((level for level in range(stop, len(keys)) if len(keys[level]) <= 2 * beam), len(keys) - 1)
    latest = max(length - window, 0)
    first = latest if position is None else min(max(position - window // 2, 0), latest)
    near = range(first, min(first + window, length))
    nodes, scored, blocks = range(len(keys[top])), 0, (budget - window) >> stop
    for level in range(top, stop - 1, -1):
        rated = []
        for i in nodes:
            covered = range(i << level, min(i + 1 << level, n))
            if i < len(keys[level]) and any(leaf < length and leaf not in near for leaf in covered) and any(mask[leaf] for leaf in covered):
                s = sum(a * b for a, b in zip(query.tolist(), keys[level][i].tolist()))
                rated.append((-math.inf if math.isnan(s) or covered[-1] >= length else -s, i))
        scored += len(rated)
        kept = sorted(i for _, i in sorted(rated)[: beam if level > stop else blocks])
        nodes = [child for i in kept for child in (2 * i, 2 * i + 1)]
    leaves = [leaf for i in kept for leaf in range(i << stop, min(i + 1 << stop, length)) if leaf not in near and mask[leaf]]
    return leaves, [leaf for leaf in near if mask[leaf]], scored


@st.composite
def problems(draw):
    n, beam, stop = draw(st.integers(1, 70)), draw(st.integers(1, 9)), draw(st.integers(0, 3))
    stop = min(stop, n_levels(n))
    window, blocks = draw(st.integers(0, 12)), draw(st.integers(1, 2 * beam))
    start = draw(st.one_of(st.none(), st.integers(stop, n_levels(n))))
    lengths = draw(st.one_of(st.none(), st.lists(st.integers(0, n), min_size=6, max_size=6)))
    positions = draw(st.one_of(st.none(), st.lists(st.integers(0, n - 1), min_size=6, max_size=6)))
    options = dict(beam=beam, budget=window + (blocks << stop), stop=stop, window=window, start=start)
    return n, options, lengths, positions, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 2**31))


@settings(deadline=None, max_examples=150)
@given(problems())
def test_descent_is_the_naive_search(problem):
    "Whole numbers: products are exact and ties are many."
    n, options, lengths, positions, masked, broken, seed = problem
    g = torch.Generator().manual_seed(seed)
    keys = [torch.randint(-2, 3, (2, 2, -(-n >> level), 5), generator=g).float() for level in range(n_levels(n) + 1)]
    queries = [torch.randint(-2, 3, (2, 2, 3, 5), generator=g).float() for _ in keys]
    if broken:
        for level, k in enumerate(keys):
            k[1, :, (n // 3) >> level, 0] = math.nan
    mask = torch.rand(2, n, generator=g) > 0.3 if masked else torch.ones(2, n, dtype=torch.bool)
    lengths, positions = (None if x is None else torch.tensor(x).view(2, 3) for x in (lengths, positions))
    for backend in BACKENDS:
        masks = level_masks(mask, n_levels(n)) if masked else None
        found = descend(queries, keys, **options, lengths=lengths, positions=positions, masks=masks, backend=backend)
        assert found.indices.shape == (2, 2, 3, options["budget"])
        for b in range(2):
            for h in range(2):
                for q in range(3):
                    length, position = n if lengths is None else int(lengths[b, q]), None if positions is None else int(positions[b, q])
                    one = [[k[b, h] for k in keys], *options.values(), length, position, mask[b]]
                    # the query of each level is folded into that level's keys
                    rescaled = [k * x[b, h, q] for k, x in zip(one[0], queries)]
                    leaves, near, scored = naive(torch.ones(5), rescaled, *one[1:])
                    assert found.indices[b, h, q][found.valid[b, h, q]].tolist() == leaves + near, backend
                    assert found.scored[b, h, q] == scored
                    assert not found.indices[b, h, q][~found.valid[b, h, q]].any()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from(BACKENDS), st.booleans())
def test_everything_selected_is_softmax_attention(n, count, seed, backend, top):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, m, 8, generator=g) for m in (count, n, n))
    out = descent_attention(q, k, v, beam=n, budget=n, stop=0, window=0, start=n_levels(n) if top else None, backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 120), st.integers(1, 5), st.integers(0, 2), st.integers(0, 6), st.integers(0, 2**31), st.sampled_from(BACKENDS))
def test_output_is_softmax_over_the_selection(n, beam, stop, window, seed, backend):
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(1, 2, 4, 8, generator=g), torch.randn(1, 2, n, 8, generator=g), torch.randn(1, 2, n, 6, generator=g)
    stop = min(stop, n_levels(n))
    options = dict(beam=beam, budget=window + (beam << stop), stop=stop, window=window)
    found = descend([q] * (n_levels(n) + 1), mean_levels(k, stop), **options, backend=backend)
    seen = torch.zeros(1, 2, 4, n + 1, dtype=torch.bool).scatter(-1, found.indices.masked_fill(~found.valid, n), True)[..., :n]
    assert seen.sum(-1).equal(found.valid.sum(-1))  # nothing twice
    assert seen[..., max(n - window, 0) :].all()
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(descent_attention(q, k, v, **options, backend=backend), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attend(q, k, v, found.indices, found.valid, backend=backend), want, atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 90), st.integers(0, 4), st.lists(st.integers(1, 30), max_size=6), st.integers(1, 40), st.integers(0, 2**31))
def test_a_cache_grown_in_any_way_has_the_same_levels(n, stop, cuts, capacity, seed):
    leaves = torch.randn(2, 2, n, 4, generator=torch.Generator().manual_seed(seed))
    cache = SummaryCache(beam=8, budget=16, stop=stop, window=0, capacity=capacity)
    at = 0
    for size in cuts:
        part = leaves[:, :, at : at + size]
        if part.shape[2]:
            cache.append(part[:, :, 0], part[:, :, 0])
            cache.extend(part[:, :, 1:], part[:, :, 1:])
        at = min(at + size, n)
    cache.extend(leaves[:, :, at:], leaves[:, :, at:])
    assert cache.n == n
    merged = MeanMerger(4)(leaves.flatten(0, 1))
    for level, ours in enumerate(cache.levels()):
        if ours is not None and level < len(merged):
            torch.testing.assert_close(ours.flatten(0, 1), merged[level], atol=1e-5, rtol=1e-5)
    query = torch.randn(2, 2, 1, 4)
    if n >= 16:
        theirs = descent_attention(query, leaves, leaves, beam=8, budget=16, stop=stop, window=0)
        torch.testing.assert_close(cache.attend(query), theirs, atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 40), st.integers(0, 5), st.lists(st.integers(0, 20), max_size=8), st.integers(0, 2**31))
def test_a_prepared_descent_follows_its_cache(groups, stop, capacity, window, cuts, seed):
    g = torch.Generator().manual_seed(seed)
    leaves = torch.randn(2, 2, 200, 4, generator=g)
    cache = SummaryCache(beam=3, budget=window + (4 << stop), stop=stop, window=window, capacity=capacity)
    for i, size in enumerate([1, *cuts]):
        part = leaves[:, :, cache.n : cache.n + size]
        cache.extend(part, part)
        cache.append(leaves[:, :, i], leaves[:, :, i])
        query = torch.randn(2, 2 * groups, 1 + i % 2, 4, generator=g)
        for scale in (None, 2):
            want = cache.attend(query, scale=scale, backend="torch")
            torch.testing.assert_close(cache.attend(query, scale=scale), want, atol=1e-5, rtol=1e-4)
        assert cache.n <= cache.budget or stop == 0 or cache._prepared[2] is not None
    cache.n //= 2  # what comes next overwrites the second half
    query = torch.randn(2, 2 * groups, 1, 4, generator=g)
    if cache.n:
        torch.testing.assert_close(cache.attend(query), cache.attend(query, backend="torch"), atol=1e-5, rtol=1e-4)


def test_threads_share_a_cache():
    torch.manual_seed(0)
    leaves, queries = torch.randn(1, 3, 3000, 16), torch.randn(64, 1, 3, 1, 16)
    cache = SummaryCache(beam=8, budget=64, stop=2, window=16).extend(leaves, leaves)
    want = [cache.attend(q) for q in queries]
    with ThreadPoolExecutor(4) as pool:
        for q_and_out in zip(want, pool.map(cache.attend, queries), strict=True):
            assert torch.equal(*q_and_out)


def test_a_copy_of_a_cache_reads_its_own_buffers():
    torch.manual_seed(0)
    leaves, query = torch.randn(1, 2, 500, 8), torch.randn(1, 2, 1, 8)
    cache = SummaryCache(beam=8, budget=32, stop=1, window=0).extend(leaves, leaves)
    want, other = cache.attend(query), copy.deepcopy(cache)
    other.values.mul_(2)
    other.nodes.neg_()
    assert cache.attend(query).equal(want)
    moved = other.attend(query)
    torch.testing.assert_close(moved, other.attend(query, backend="torch"))
    assert not torch.allclose(moved, 2 * want)  # it went down other summaries
    del cache
    assert other.attend(query).equal(moved)


def test_a_token_changes_one_summary_a_level():
    torch.manual_seed(0)
    leaves = torch.randn(1, 1, 100, 4)
    cache = SummaryCache(beam=8, budget=16, stop=1, window=0, capacity=128).extend(leaves, leaves)
    before = [level.clone() for level in cache.levels()[1:]]
    cache.append(leaves[:, :, 0], leaves[:, :, 0])
    for level, (old, new) in enumerate(zip(before, cache.levels()[1:]), 1):
        changed = [i for i in range(old.shape[2]) if not torch.equal(old[:, :, i], new[:, :, i])]
        assert changed in ([], [100 >> level]) and new.shape[2] == (100 >> level) + 1


def test_memory_is_what_is_said():
    leaves = torch.zeros(1, 2, 4096, 64)
    for stop in (1, 2, 3, 5):
        cache = SummaryCache(stop=stop, beam=64, budget=128, window=0).extend(leaves, leaves)
        per_leaf = cache.nbytes / (4096 * 2 * 4)
        assert 2 * 64 < per_leaf <= 2 * 64 + 64 / 2 ** (stop - 1)
    cache.append(leaves[:, :, 0], leaves[:, :, 0])
    assert cache.layout.capacity == 8192


def test_learnt_summaries_from_both_origins():
    torch.manual_seed(0)
    for origin in ("children", "leaves"):
        merger, student = BinaryMerger(12, origin=origin, max_levels=7), Student(12, d_k=6, heads=2, max_levels=7)
        x, k = torch.randn(1, 50, 12), torch.randn(1, 2, 50, 8)
        cache = SummaryCache(beam=4, budget=10, stop=1, window=2, merger=merger, student=student, capacity=2).extend(k[:, :, :30], k[:, :, :30], x[:, :30])
        cache.extend(k[:, :, 30:], k[:, :, 30:], x[:, 30:])
        with torch.no_grad():
            want = descend(student.queries(x[:, -2:], torch.tensor([48, 49])), student.keys(merger(x)), beam=4, budget=10, stop=1, window=2)
        for backend in BACKENDS:
            assert cache.select(k[:, :, -2:], x[:, -2:], backend=backend)[1].indices.equal(want.indices)
        with pytest.raises(ArgumentError, match="hidden states"):
            cache.attend(k[:, :, -1:])


@pytest.mark.parametrize(
    "options, error, named",
    [
        (dict(beam=0), RangeError, "beam"),
        (dict(beam=-3), RangeError, "beam"),
        (dict(beam=1.5), ArgumentError, "beam"),
        (dict(budget=0), RangeError, "budget"),
        (dict(beam=1, budget=3), RangeError, "budget"),
        (dict(window=-1), RangeError, "window"),
        (dict(window=128), RangeError, "budget"),
        (dict(stop=6), RangeError, "stop"),
        (dict(stop=2, budget=7), RangeError, "budget"),
        (dict(start=6), RangeError, "start"),
        (dict(stop=3, start=2), RangeError, "start"),
        (dict(backend="c"), ArgumentError, "backend"),
        (dict(lengths=torch.ones(3)), ShapeError, "lengths"),
        (dict(positions=torch.ones(7)), ShapeError, "positions"),
        (dict(beam=2, budget=4, masks=[torch.ones(1, 20, dtype=torch.bool)]), ShapeError, "masks"),
        (dict(n=19), ShapeError, "keys"),
        (dict(n=3), RangeError, "top"),
    ],
)
def test_bad_numbers_are_refused(options, error, named):
    keys = mean_levels(torch.randn(1, 1, 20, 4))
    options = dict(stop=2, beam=2, budget=8) | options if "lengths" in options else options
    options = dict(start=4) | options if named == "budget" and options.get("beam") == 1 else options
    with pytest.raises(error, match=f"`{named}`") as caught:
        descend([torch.randn(1, 1, 2, 4)] * len(keys), keys, **options)
    assert isinstance(caught.value, HiernbError)


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_empty_and_hidden_contexts(backend):
    q = torch.randn(2, 1, 3, 4)
    with pytest.raises(EmptyError):
        descent_attention(q, torch.randn(2, 1, 0, 4), torch.randn(2, 1, 0, 4), backend=backend)
    one = torch.randn(2, 1, 1, 4)
    torch.testing.assert_close(descent_attention(q, one, one, backend=backend), one.expand(2, 1, 3, 4))
    few = torch.randn(2, 1, 9, 4)
    found = descend([q] * 5, mean_levels(few), beam=64, budget=100, backend=backend)  # a budget beyond the context
    assert found.valid.sum(-1).eq(9).all() and found.indices.shape[-1] == 100
    out = descent_attention(q, few, few, torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 1, 9), backend=backend)
    assert not out[1].any() and out[0].any()
    out = descent_attention(q, few, few, lengths=torch.tensor([0, 9]), backend=backend)
    assert not out[0].any()
    assert descent_attention(q[:, :, :0], few, few, backend=backend).shape == (2, 1, 0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 300, 8)
    k[:, 0, 123] = math.nan
    out = descent_attention(q, k, torch.randn(1, 2, 300, 8), beam=4, budget=24, stop=2, window=8, backend=backend)
    assert out[:, 0].isnan().all() and out[:, 1].isfinite().all()
    mask = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    mask[..., 123] = False
    assert descent_attention(q, k, torch.randn(1, 2, 300, 8), mask, beam=4, budget=24, stop=2, window=8, backend=backend).isfinite().all()
    assert descent_attention(q * math.nan, k, k, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_and_huge_scores_are_ranked(backend):
    k = torch.zeros(1, 1, 8, 1)
    k[..., 0] = torch.tensor([1e30, -1e30, 0.0, math.inf, -math.inf, 5.0, -0.0, -5.0])
    found = descend([torch.full((1, 1, 1, 1), 1e20)], [k], beam=4, budget=4, backend=backend)
    assert found.indices.flatten().tolist() == [0, 2, 3, 5]


def test_a_cache_refuses_and_stays_whole():
    leaves = torch.randn(1, 2, 40, 4)
    cache = SummaryCache(beam=4, budget=8, stop=1, window=0).extend(leaves, leaves)
    before = [level.clone() for level in cache.levels()]
    for bad, error in (
        ((leaves * math.nan, leaves), NotFiniteError),
        ((leaves, leaves / 0), NotFiniteError),
        ((leaves[:, :1], leaves[:, :1]), ShapeError),
        ((leaves, leaves[:, :, :3]), ShapeError),
        ((leaves.double(), leaves.double()), ShapeError),
        ((leaves, leaves, torch.randn(1, 40, 4)), ShapeError),
    ):
        with pytest.raises(error):
            cache.extend(*bad)
    assert cache.n == 40 and all(torch.equal(x, y) for x, y in zip(before, cache.levels()))
    with pytest.raises(ShapeError, match="`query`"):
        cache.attend(torch.randn(2, 2, 1, 4))
    with pytest.raises(RangeError):
        SummaryCache().attend(leaves)


def test_causal_attention_does_not_see_the_future():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 90, 8)
    for cut in (1, 17, 64, 89):
        y = x.clone()
        y[:, :, cut:] = torch.randn(1, 2, 90 - cut, 8) * 100
        for backend in BACKENDS:
            a, b = (descent_attention(t, t, t, is_causal=True, beam=2, budget=10, stop=1, window=6, backend=backend) for t in (x, y))
            torch.testing.assert_close(a[:, :, :cut], b[:, :, :cut])


def test_tensors_with_any_strides():
    torch.manual_seed(0)
    base = torch.randn(100, 2, 3, 8)
    k, q = base.permute(1, 2, 0, 3), torch.randn(5, 3, 2, 8).permute(2, 1, 0, 3)
    want = descent_attention(q.contiguous(), k.contiguous(), k.contiguous(), beam=4, budget=16, stop=1, window=4, backend="torch")
    torch.testing.assert_close(descent_attention(q, k, k, beam=4, budget=16, stop=1, window=4, backend="numba"), want)
    with pytest.raises(ArgumentError, match="side by side"):
        descend([q.mT.contiguous().mT] * 8, mean_levels(k), beam=4, budget=8, backend="numba")
    cache = SummaryCache(beam=4, budget=16, stop=1, window=4).extend(k, k)
    across, plain = q.mT.contiguous().mT, q.contiguous()  # numbers of a row apart, and side by side
    torch.testing.assert_close(cache.attend(across, backend="torch"), cache.attend(plain))
    torch.testing.assert_close(cache.attend(q), cache.attend(plain))
    with pytest.raises(ArgumentError, match="side by side"):
        cache.attend(across)


def test_any_number_of_threads():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 1000, 16)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            outs.append(descent_attention(q, k, k, beam=8, budget=64, stop=2, window=16, backend="numba"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], out) for out in outs)


def a_descent() -> float:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 4, 500, 16)
    return descent_attention(q, k, k, backend="numba").sum().item()


@pytest.mark.skipif(os.name == "nt", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(after_fork):
    here, in_child = after_fork(a_descent)
    assert here == pytest.approx(in_child)


def test_memory_does_not_grow_with_queries_times_context():
    code = """
import resource, torch
from hiernb.mergers.descent_attention import descent_attention
torch.set_num_threads(1)
q, k = torch.randn(1, 1, 8192, 16), torch.randn(1, 1, 16384, 16)
descent_attention(q[:, :, :8], k, k, beam=8, budget=32, stop=1, window=16, backend=BACKEND)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
descent_attention(q, k, k, is_causal=True, beam=8, budget=32, stop=1, window=16, backend=BACKEND)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    for backend in BACKENDS:
        done = subprocess.run([sys.executable, "-c", code.replace("BACKEND", repr(backend))], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 400, backend  # queries × context in float32 are 512 MB for the scores alone


def test_plans_score_what_they_say():
    for n in (1, 7, 100, 4096, 2**20):
        plan = plan_descent(n, n_levels(n), beam=32, budget=64)
        assert plan.most <= 64 * max(1, math.ceil(math.log2(max(n / 32, 2))))


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hiernb.mergers.descent_triton import _attend, _descend
ints = {"table": "*i64", "seen": "*i64", "indices": "*i64", "valid": "*i8", "scored": "*i64"}
descent = dict(C=16, PIECE=64, SIZE=8, NEAR=32, QUERY=tl.bfloat16, KEY=tl.bfloat16, MASKED=True)
attention = {name: "*bf16" for name in ("q", "k", "v", "out")} | ints | {"scale": "fp32"}
for kernel, types, constants in ((_descend, ints, descent), (_attend, attention, dict(TILE=128, D=64, E=64))):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(kernel.__name__, len(compiled.asm["cubin"]) > 0, ".local" in compiled.asm["ptx"])
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is published for Linux only")
def test_kernels_compile_for_hopper_without_a_gpu(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_descend", "True", "False", "_attend", "True", "False"]


def test_nothing_is_read_outside_of_its_array():
    "The kernels follow addresses: whatever does not fit must be refused before."
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 50, 8)
    for value in (k[:, :, :49], k[:1], k[:, :2], k[0]):
        with pytest.raises(ShapeError):
            descent_attention(q, k, value)
    for query in (q[:1], q[:, :2], q[..., :7], q[0]):
        with pytest.raises(ShapeError):
            descent_attention(query, k, k)
    for bad in (torch.full((2, 3, 4, 1), 50), torch.full((2, 3, 4, 1), -1)):
        with pytest.raises(RangeError, match="`indices`"):
            attend(q, k, k, bad)
    for bad in (torch.zeros(2, 3, 4, 1), torch.zeros(2, 3, 3, 1, dtype=torch.int64)):
        with pytest.raises(ShapeError, match="`indices`"):
            attend(q, k, k, bad)
    with pytest.raises(ShapeError, match="`indices`"):
        attend(q, k, k, torch.zeros(2, 3, 4, 5, dtype=torch.int64), torch.ones(2, 3, 4, 4, dtype=torch.bool))
    levels = mean_levels(k)
    for wrong in (levels[2], levels[3][:, :2], levels[3][..., :7], None):
        with pytest.raises(ShapeError, match="`keys`"):
            descend([q] * 7, [*levels[:3], wrong, *levels[4:]], beam=2, budget=4)
    cache = SummaryCache(merger=MeanMerger(6), student=Student(6, d_k=4, heads=3, max_levels=6), beam=4, budget=8, stop=1, window=0)
    cache.extend(k, k, torch.randn(2, 50, 6))
    for x in (torch.randn(1, 4, 6), torch.randn(2, 3, 6), torch.randn(4, 6)):
        with pytest.raises(ArgumentError, match="`x`"):
            cache.attend(q, x)
