"""The cascade's bounds, kernels and relatives: never above the truth, exact on every form of rows, approximate only by name."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.search.approximate import ApproximateCascade, recall_of, truncate
from hiernb.search.cascade import CascadeIndex, Descent
from hiernb.search.flat import FlatIndex
from hiernb.search.gpu import TorchIndex
from hiernb.search.level_bounds import as_limit, block_bounds, choose_codes, narrow, nearest_limit, quantise, reach, refine, scan, write_keys
from hiernb.search.levels import block_shapes, choose_levels, level_codes
from hiernb.search.row_sums import STEPS, byte_sum, half_sum, plain_byte_sum, plain_half_sum, row_bounds, unpack_halves
from hiernb.search.storage import AssignmentIndex
from hiernb.tree import product_down, sum_up

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"))]


def assignments(seed, n, depth, kind):
    "Distributions of one kind, float32."
    rng, m = np.random.default_rng(seed), 1 << depth
    rows = {
        "diffuse": lambda: 1 + 0.05 * rng.random((n, m)),
        "sharp": lambda: rng.dirichlet(np.full(m, 0.02), n) + 1e-12,
        "one-hot": lambda: np.eye(m)[rng.integers(m, size=n)],
        "mixed": lambda: np.where(rng.random((n, 1)) < 0.5, np.eye(m)[rng.integers(m, size=n)], np.full((n, m), 1 / m)),
        "ties": lambda: rng.integers(0, 2, (n, m)) + np.eye(m)[rng.integers(m, size=n)],
        "one heavy": lambda: np.concatenate([np.eye(m)[:1], 1 + 1e-3 * rng.random((n - 1, m))]),
    }[kind]()
    return (rows / rows.sum(1, keepdims=True)).astype(np.float32)


KINDS = ["diffuse", "sharp", "one-hot", "mixed", "ties", "one heavy"]


def same(index, rows, queries, k):
    oracle = FlatIndex.build(rows).search(queries, k)
    for got, want in zip(index.search(queries, k), oracle):
        np.testing.assert_array_equal(got, want)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.sampled_from(KINDS), st.sampled_from(KINDS), st.floats(1e-7, 0.5), st.sampled_from([4, 8]))
def test_bounds_are_never_above_the_truth(seed, h, kind, other, unit, bits):
    rows, query = assignments(seed, 40, 6, kind), assignments(seed + 1, 1, 6, other)
    masses, truth = sum_up(rows.astype(np.float64), h), np.abs(rows.astype(np.float64) - query).sum(1)
    half = masses[::2]  # half of the contexts never saw the offsets: their codes clip at 0
    for low, u in ((half.min(0), unit), choose_codes(half, bits)):
        codes, residual = quantise(masses, low, u, bits)
        values = (unpack_halves(codes) if bits == 4 else codes).astype(int)
        keys = np.zeros((1, values.shape[1]) if bits == 4 else (4, values.shape[1]), np.uint8)
        offset = write_keys(sum_up(query.astype(np.float64), h)[0], low, u, 248 if bits == 4 else 255, keys)
        bound = u * np.abs(values[None] - keys[:, None].astype(int)).mean(0).sum(1) - residual + offset
        assert (bound <= truth + 1e-12).all()
        if bits == 8:
            key, r = quantise(sum_up(query.astype(np.float64), h), low, u)
            plain = u * np.abs(values - key.astype(int)).sum(1) - residual - r
            assert (plain <= truth + 1e-12).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(1, 150), st.integers(1, 12))
def test_every_level_keeps_the_answer(seed, kind, other, n, k):
    rows, query, k = assignments(seed, n + 1, 6, kind)[1:], assignments(seed + 1, 1, 6, other)[0], min(k, n)
    index = CascadeIndex.build(rows, levels=[0, 1, 3, 5, 6])
    d, truth = Descent(index.parts[0], query), np.abs(rows.astype(np.float64) - query).sum(1)
    kth = np.sort(truth)[k - 1]
    for i in range(5):
        bounds = np.empty(n, np.int32)
        kept = narrow(d.codes[i], d.slack[i], d.keys[i], d.limit(i, reach(kth)), np.arange(n), bounds)
        at, bounds = np.arange(n), np.empty(n, np.int32)
        narrow(d.codes[i], d.slack[i], d.keys[i], 2**30, at, bounds)
        assert kept >= k and (bounds * d.scales[i] + d.offsets[i] <= truth[d.order] + 1e-9).all()
        if d.bits[i] == 4:
            shapes = block_shapes(d.codes[i], d.slack[i], always=True)
            box = np.empty(len(shapes["box_low"]), np.int32)
            block_bounds(shapes["box_low"], shapes["box_high"], shapes["box_slack"], d.keys[i].ravel(), box)
            assert len(box) == -(-n // 64) and all(box[j // 64] <= bounds[j] for j in range(n))
            assert 0 < i or (d.scan()[1] == bounds).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from(KINDS), st.sampled_from([None, [0], [2, 4], [1, 2, 3, 4, 5, 6]]), st.integers(1, 60))
def test_cascade_equals_the_scan(seed, kind, other, levels, k):
    rows = assignments(seed, 300, 6, kind)
    queries = np.concatenate([assignments(seed + 1, 3, 6, other), rows[:2]])
    same(CascadeIndex.build(rows, levels=levels), rows, queries, k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_index_equals_the_scan(kind, device):
    rows = assignments(3, 700, 6, kind)
    queries = np.concatenate([assignments(4, 5, 6, kind), rows[:5]])
    for level in (None, 0, 6):
        index = TorchIndex.build(rows, bound_level=level).to(device)
        for k in (1, 10, 700):
            same(index, rows, queries, k)


def test_removed_contexts_set_no_threshold():
    rows = assignments(0, 500, 6, "sharp")
    rows[:200] = rows[200]  # 200 copies of one context, all nearer than anything else
    for index in (CascadeIndex.build(rows, levels=[3, 5]), TorchIndex.build(rows, bound_level=4)):
        index.remove(range(100))
        scores, ids = index.search(rows[200:201], 150)
        want = FlatIndex.build(rows[100:], ids=range(100, 500)).search(rows[200:201], 150)
        np.testing.assert_array_equal(ids, want[1])
        np.testing.assert_array_equal(scores, want[0])


@pytest.mark.parametrize("masses", ["float32", "float16"])
def test_sparse_and_half_rows(masses):
    rows = truncate(assignments(5, 400, 7, "sharp"), 5)
    index = CascadeIndex.build(rows, masses=masses)
    queries, stored = assignments(6, 6, 7, "sharp"), index.parts[0].rows(np.arange(400))
    same(index, stored, queries, 12) if masses == "float32" else None
    for got, want in zip(index.search(queries, 12), AssignmentIndex.build(rows, masses=masses).search(queries, 12)):
        np.testing.assert_array_equal(got, want)


def test_more_queries_than_a_pass_shares_and_threads():
    rows, queries = assignments(1, 900, 6, "sharp"), assignments(2, 45, 6, "sharp")
    index = CascadeIndex.build(rows)
    one, two = index.search(queries, 10, threads=1), index.search(queries, 10, threads=2)
    for b, q in enumerate(queries):
        alone = index.search(q[None], 10)
        for i in (0, 1):
            np.testing.assert_array_equal(alone[i][0], one[i][b])
            np.testing.assert_array_equal(one[i], two[i])


def test_kernels_at_the_ends_of_a_byte():
    for width in (1, 64, 300):
        low, most = np.zeros((2, width), np.uint8), np.full((4, width), 255, np.uint8)
        at, out = np.empty((1, 3), np.int64), np.empty((1, 3), np.int32)
        slack, every = np.array([0, 65535], np.uint16), np.ones((1, 1), bool)
        assert scan(low, slack, most[:1], most[1:2], every, np.full(1, 2**30), at, out).tolist() == [2]
        assert out[0, :2].tolist() == [2 * width * 255, 2 * width * 255 - 65535]
        assert narrow(low, slack, most, 2**30, np.arange(2), out[0]) == 2 and out[0, :2].tolist() == [4 * width * 255, 4 * (width * 255 - 65535)]
    assert as_limit(np.inf, 1e-9, 0.0) == 2**30 and as_limit(0.0, 1e-9, 2.0) == -(2**30)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256, 512]), st.sampled_from(["any", "ends", "equal"]))
def test_instructions_equal_the_plain_loops(seed, width, kind):
    rng = np.random.default_rng(seed)
    draw = {"any": lambda *s: rng.integers(0, 256, s), "ends": lambda *s: rng.choice([0, 255], s), "equal": lambda *s: np.full(s, rng.integers(256))}[kind]
    rows, keys = draw(80, width).astype(np.uint8), draw(4, width).astype(np.uint8)
    values, both = unpack_halves(rows).astype(int), np.concatenate([keys[0], keys[1]]).astype(int)
    wanted = np.abs(values - both).sum(1)
    assert [half_sum(rows, i, keys[0], keys[1]) for i in range(80)] == [plain_half_sum(rows, i, keys[0], keys[1]) for i in range(80)] == wanted.tolist()
    by_bytes = np.abs(rows[:, None].astype(int) - keys).sum((1, 2)).tolist()
    assert [byte_sum(rows, i, keys) for i in range(80)] == [plain_byte_sum(rows, i, keys) for i in range(80)] == by_bytes
    slack, room, bounds = rng.integers(0, 2**16, 80).astype(np.uint16), np.empty(16, np.uint64), np.empty(64, np.int32)
    for start, end in (sorted(rng.integers(0, 65, 2)), (0, 64), (16, 80)):
        least = row_bounds(rows, slack, start, end, keys[0], keys[1], room, bounds)
        assert (bounds[: end - start] == wanted[start:end] - slack[start:end]).all()
        assert least == min(bounds[: end - start], default=2**30)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**29), 2**29), min_size=1, max_size=200), st.integers(1, 250))
def test_a_limit_keeps_as_many_as_asked_for(bounds, some):
    bounds = np.array(bounds, np.int32)
    assert (bounds <= nearest_limit(bounds, some)).sum() >= min(some, len(bounds))


PLAIN = """
import numpy as np
from hiernb.search import row_sums
from hiernb.search.cascade import CascadeIndex
from hiernb.search.flat import FlatIndex
assert row_sums.NATIVE == 0, row_sums.NATIVE
rows = np.random.default_rng(0).dirichlet(np.full(128, 0.3), 700).astype(np.float32)
for levels in ([7], [5, 7]):
    for got, want in zip(CascadeIndex.build(rows, levels=levels).search(rows[:5], 9), FlatIndex.build(rows).search(rows[:5], 9)):
        np.testing.assert_array_equal(got, want)
"""


def test_a_processor_without_the_instructions():
    "Numba told to compile for a processor of which nothing is known."
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", PLAIN], check=True, env=environment, timeout=300)


def test_refine_never_stops_at_a_tie():
    rows = np.zeros((6, 2), np.float32)
    rows[:, 0] = 1
    best, out = np.full(2, np.inf), np.empty(6)
    assert refine(rows, np.array([0.5, 0.5], np.float32), np.arange(6), np.full(6, 1.0), best, out) == 6
    assert (best == 1.0).all() and (out == 1.0).all()


def test_choose_levels_keeps_the_promised_memory():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shares = np.sort(rng.random(11))[::-1]
        assert sum(2**h for h in choose_levels(shares)) <= 0.9 * 1024


def test_approximate_never_claims_to_be_exact():
    assert "approximate" in ApproximateCascade.kind and not ApproximateCascade.exact and "Approximate" in repr(ApproximateCascade.build(np.eye(4)))
    rows = assignments(0, 600, 6, "diffuse")
    queries = assignments(1, 10, 6, "diffuse")
    exact = CascadeIndex.build(rows).search(queries, 10)
    rough = ApproximateCascade.build(rows, levels=[2], beam=15).search(queries, 10)
    assert recall_of(rough[1], exact[1]) < 1 and (rough[0] <= exact[0]).all()


def test_a_cascade_file_is_no_approximate_one(tmp_path):
    ApproximateCascade.build(np.eye(8)).save(tmp_path / "a")
    with pytest.raises(ValueError, match="approximate-cascade"):
        CascadeIndex.load(tmp_path / "a")
    assert ApproximateCascade.load(tmp_path / "a").options["beam"] == 256


def test_mapped_cascade_searches_the_same(tmp_path):
    rows = assignments(1, 500, 6, "mixed")
    index = CascadeIndex.build(rows, levels=(3, 5))
    index.save(tmp_path / "c")
    for got, want in zip(CascadeIndex.load(tmp_path / "c").search(rows[:7], 9), index.search(rows[:7], 9)):
        np.testing.assert_array_equal(got, want)
    same(TorchIndex.build(rows), rows, rows[:7], 9)


@pytest.mark.parametrize("h", [6, 8, 9])
def test_a_context_unlike_all_of_the_sample(h):
    rows = np.concatenate([assignments(0, 300, 9, "diffuse"), np.eye(512, dtype=np.float32)[:3]])
    for bits in (4, 8):
        level = level_codes({"rows": rows}, np.arange(303), 512, h, rows[:300], bits)
        codes = (unpack_halves(level["codes"]) if bits == 4 else level["codes"]).astype(int)
        for query in (rows[0], rows[302]):
            keys = np.zeros((1 if bits == 4 else 4, 1 << h), np.uint8)
            offset = write_keys(sum_up(query[None].astype(np.float64), h)[0], level["low"], level["unit"], STEPS[-1] if bits == 4 else 255, keys)
            sad = np.abs(codes - keys[:, None].astype(int)).sum((0, 2)) - len(keys) * level["slack"].astype(np.int64)
            assert (level["unit"] / len(keys) * sad + offset <= np.abs(rows.astype(np.float64) - query).sum(1) + 1e-12).all()
            at, out = np.arange(303), np.empty(303, np.int32)
            narrow(level["codes"], level["slack"], keys.reshape(2, -1) if bits == 4 else keys, 2**30, at, out)
            np.testing.assert_array_equal(out, sad)  # no overflow


def test_an_index_with_a_context_unlike_all_others():
    rows = np.concatenate([assignments(0, 3500, 6, "diffuse"), np.eye(64, dtype=np.float32)[:2]])
    rows = rows[np.random.default_rng(3).permutation(len(rows))]
    heavy = np.flatnonzero(rows.max(1) == 1)
    for levels in ([3], [5], [6], None):
        same(CascadeIndex.build(rows, levels=levels), rows, rows[[0, *heavy]], 5)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_one_query_on_several_threads(threads):
    rows = product_down(3 * torch.randn(6_000, 15, generator=torch.Generator().manual_seed(0))).numpy()  # 94 blocks
    index, queries = CascadeIndex.build(rows), rows[::1_500]
    for query in queries:
        one, many = (index.search(query[None], 20, threads=t) for t in (1, threads))
        assert np.array_equal(one[0], many[0]) and np.array_equal(one[1], many[1])
