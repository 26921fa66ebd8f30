"Flat search against a full scan: ties, duplicates, levels, every k, bad inputs, broken files."

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hiernb.errors import ArgumentError, EmptyError, FileFormatError, HiernbError, NotFiniteError, RangeError, ShapeError
from hiernb.files import write_tensors
from hiernb.order import ids_from_tensors, ids_to_tensors, sort_ids, top_k
from hiernb.search.flat import MOST, ContextVectors, FlatIndex, pair_scores
from hiernb.tree import sum_up


def full_scan(rows, ids, queries, k, metric="ntvd"):
    "Scores of everything in float64, rounded to float32, sorted by (-score, id)."
    rows, queries = rows.astype(np.float32), queries.astype(np.float32)
    if metric == "cosine":
        rows, queries = (np.float32(x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)) for x in (rows, queries))
    rank = np.argsort(np.array(sorted(range(len(ids)), key=lambda i: ids[i])))
    scores, found = [], []
    for q in queries.astype(np.float64):
        r = rows.astype(np.float64)
        s = np.float32((q * r).sum(1) if metric == "cosine" else -0.5 * np.abs(q - r).sum(1))
        best = np.lexsort((rank, -s))[:k]
        scores.append(s[best])
        found.append([ids[i] for i in best])
    return np.array(scores), found


@st.composite
def cases(draw):
    "Contexts and queries over a tree with coarse masses (many exact ties, many zero leaves), ids, k and a level."
    depth = draw(st.integers(1, 4))
    n, b = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    counts = draw(hnp.arrays(np.int64, (n + b, 2**depth), elements=st.integers(0, 2)))
    counts[np.arange(n + b), draw(hnp.arrays(np.int64, n + b, elements=st.integers(0, 2**depth - 1)))] += 1  # no empty row
    if draw(st.booleans()):
        counts[:n] = counts[np.arange(n) % max(1, n // 4)]  # every row several times
    leaves = (counts / counts.sum(1, keepdims=True)).astype(np.float32)
    numbers = draw(st.permutations(range(n)))
    ids = [f"c{i}" for i in numbers] if draw(st.booleans()) else [3 * i - 7 for i in numbers]
    k = draw(st.sampled_from([1, n, (n + 1) // 2]))
    return leaves[:n], ids, leaves[n:], k, draw(st.integers(0, depth))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_a_full_scan(case):
    leaves, ids, queries, k, level = case
    index = FlatIndex.build(leaves, ids, level=level)
    scores, found = index.search(queries, k, batch_size=2)
    want_scores, want = full_scan(sum_up(leaves, level), ids, sum_up(queries, level), k)
    assert found.tolist() == want
    np.testing.assert_array_equal(scores, want_scores)
    assert scores.dtype == np.float32 and (np.diff(scores, axis=1) <= 0).all() and (scores <= 0).all() and (scores > -1.001).all()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_cosine_equals_a_full_scan(case):
    leaves, ids, queries, k, _ = case
    scores, found = FlatIndex.build(leaves, ids, metric="cosine").search(queries, k)
    want_scores, want = full_scan(leaves, ids, queries, k, "cosine")
    assert found.tolist() == want
    np.testing.assert_array_equal(scores, want_scores)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_order_of_rows_does_not_matter(case):
    leaves, ids, queries, k, _ = case
    turned = FlatIndex.build(leaves[::-1].copy(), ids[::-1]).search(queries, k)
    straight = FlatIndex.build(leaves, ids).search(queries, k)
    assert turned[1].tolist() == straight[1].tolist()
    np.testing.assert_array_equal(turned[0], straight[0])


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 30)), elements=st.sampled_from([-1.0, 0.0, 0.25, 0.5])), st.data())
def test_top_k_is_a_stable_sort(scores, data):
    k = data.draw(st.integers(1, scores.shape[1]))
    np.testing.assert_array_equal(top_k(scores, k), np.argsort(-scores, axis=1, kind="stable")[:, :k])


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.lists(st.integers(-(2**62), 2**62), unique=True), st.lists(st.text(), unique=True)))
def test_ids_survive(ids):
    ids_, order = sort_ids(ids, len(ids))
    assert ids_.tolist() == sorted(ids) == [ids[i] for i in order]
    assert ids_from_tensors(ids_to_tensors(ids_)).tolist() == sorted(ids)


@pytest.mark.parametrize("k", [1, 10, MOST - 16, MOST, MOST + 1, 4000])
def test_more_ties_than_faiss_may_return(k):
    "One context is best, 3,998 tie behind it, one is worst; ids run against the order of the rows."
    rows = np.tile(np.array([[0.25, 0.75]], np.float32), (4000, 1))
    rows[7], rows[9] = [0.5, 0.5], [0.0, 1.0]
    ids = list(range(4000, 0, -1))
    scores, found = FlatIndex.build(rows, ids).search([[0.5, 0.5]], k)
    tied = [i for i in range(1, 4001) if i not in (3993, 3991)]
    assert found[0].tolist() == [3993, *tied, 3991][:k]
    assert scores[0, 0] == 0 and (scores[0, 1 : min(k, 3999)] == -0.25).all()


def test_scores_do_not_depend_on_the_batch():
    "Large batches of inner products go through BLAS, which rounds differently from row to row."
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 256)).astype(np.float32)
    x[500:] = x[:500]
    for metric, vectors in (("cosine", x), ("ntvd", np.abs(x) / np.abs(x).sum(1, keepdims=True))):
        index = FlatIndex.build(vectors, metric=metric)
        scores, found = index.search(vectors, 20)
        for i in (0, 499, 777):
            one_scores, one_found = index.search(vectors[[i]], 20)
            np.testing.assert_array_equal(one_scores[0], scores[i])
            np.testing.assert_array_equal(one_found[0], found[i])
        np.testing.assert_array_equal(found[:, 0::2] + 500, found[:, 1::2])  # twins stand together, lower id first
        np.testing.assert_array_equal(scores[:, 0::2], scores[:, 1::2])


@pytest.mark.parametrize("noise", [1e-9, 1e-8, 3e-8])
def test_exact_on_close_scores_of_wide_rows(noise):
    "Contexts that FAISS orders wrongly, because they differ by less than its float32 sums can tell."
    rng = np.random.default_rng(1)
    base = rng.dirichlet(np.ones(1024)).astype(np.float32)
    rows = np.clip(base + rng.normal(0, noise, (1000, 1024)), 0, None).astype(np.float32)
    queries = rng.dirichlet(np.ones(1024), size=10).astype(np.float32)
    index = FlatIndex.build(rows)
    scores, found = index.search(queries, 10)
    want_scores, want = full_scan(rows, list(range(1000)), queries, 10)
    assert found.tolist() == want
    np.testing.assert_array_equal(scores, want_scores)
    assert index._faiss.search(queries, 10)[1].tolist() != want  # FAISS alone would have been wrong


def test_level_zero_is_all_ties():
    leaves = np.random.default_rng(0).dirichlet(np.ones(8), size=50)
    scores, found = FlatIndex.build(leaves, level=0).search(np.full((1, 8), 1 / 8), 50)
    rounding = sum_up(leaves.astype(np.float32), 0)[:, 0]  # sums are 1 but for the last bit, which a full scan sees as well
    assert found[0].tolist() == np.lexsort((np.arange(50), np.abs(rounding - 1))).tolist()
    assert (scores > -1e-6).all()


def test_half_precision_and_torch_inputs():
    leaves = torch.rand(20, 16).softmax(-1)
    a = FlatIndex.build(leaves.half(), level=2).search(leaves[:3].half(), 5)
    b = FlatIndex.build(leaves.half().float().numpy(), level=2).search(leaves[:3].half().double(), 5)
    np.testing.assert_array_equal(a[1], b[1])
    assert FlatIndex.build(leaves.requires_grad_()).search(leaves, 1)[1][:, 0].tolist() == list(range(20))


GOOD = np.full((3, 4), 0.25)


@pytest.mark.parametrize(
    ("vectors", "kwargs", "error", "says"),
    [
        (np.zeros((0, 4)), {}, EmptyError, "at least one row"),
        (np.zeros((3, 0)), {}, ShapeError, "vectors"),
        (np.zeros(4), {}, ShapeError, "[n, m]"),
        (np.full((3, 4), np.nan), {}, NotFiniteError, "vectors"),
        (np.full((3, 4), np.inf), {"metric": "cosine"}, NotFiniteError, "vectors"),
        (np.full((3, 4), 0.3), {}, ArgumentError, "sum to 1"),
        (np.array([[1.5, -0.5]]), {}, ArgumentError, "negative"),
        (np.zeros((2, 4)), {"metric": "cosine"}, ArgumentError, "zero vector"),
        (GOOD, {"ids": [1, 2]}, ShapeError, "ids"),
        (GOOD, {"ids": ["a", "b", "a"]}, ArgumentError, "'a' more than once"),
        (GOOD, {"ids": ["a", 1, 2]}, ArgumentError, "all integers or all strings"),
        (GOOD, {"ids": [0.5, 1.5, 2.5]}, ArgumentError, "all integers or all strings"),
        (GOOD, {"metric": "l2"}, HiernbError, "metric"),
        (GOOD, {"level": 3}, RangeError, "level"),
        (GOOD, {"level": -1}, RangeError, "level"),
        (GOOD, {"device": "mps"}, ArgumentError, "device"),
        (np.full((3, 5), 0.2), {"level": 1}, ShapeError, "2^D"),
    ],
)
def test_refuses_bad_vectors(vectors, kwargs, error, says):
    with pytest.raises(error) as e:
        FlatIndex.build(vectors, **kwargs)
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("queries", "kwargs", "error", "says"),
    [
        (GOOD[:1], {"k": 4}, RangeError, "number of contexts"),
        (GOOD[:1], {"k": 0}, RangeError, "`k`"),
        (GOOD[:1], {"k": 1.0}, ArgumentError, "`k`"),
        (GOOD[:1], {"k": 1, "batch_size": 0}, RangeError, "batch_size"),
        (np.full((1, 2), 0.5), {"k": 1}, ShapeError, "finer level"),
        (np.full((1, 6), 1 / 6), {"k": 1}, ShapeError, "[1, 6]"),
        (GOOD[0], {"k": 1}, ShapeError, "queries"),
        (np.full((1, 4), np.nan), {"k": 1}, NotFiniteError, "queries"),
        (np.ones((1, 4)), {"k": 1}, ArgumentError, "sum to 1"),
    ],
)
def test_refuses_bad_queries(queries, kwargs, error, says):
    with pytest.raises(error) as e:
        FlatIndex.build(GOOD).search(queries, **kwargs)
    assert says in str(e.value)


def test_cuda_without_gpu_is_refused():
    faiss = pytest.importorskip("faiss")
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("this faiss has a GPU")
    with pytest.raises(ArgumentError, match="no GPU"):
        FlatIndex.build(GOOD, device="cuda")


def test_gpu_equals_cpu():
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        pytest.skip("needs faiss-gpu and a GPU")
    leaves = np.tile(np.random.default_rng(0).dirichlet(np.ones(64), size=3000), (2, 1)).astype(np.float32)
    for metric, level in (("ntvd", None), ("ntvd", 1), ("cosine", None)):
        cpu, gpu = (FlatIndex.build(leaves, metric=metric, level=level, device=d) for d in ("cpu", "cuda"))
        for k in (1, 100, 3000):
            for a, b in zip(cpu.search(leaves[:5], k), gpu.search(leaves[:5], k)):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("ids", [None, ["b", "ä", "", "日本"], [5, -3, 2**40, 0]])
@pytest.mark.parametrize("metric", ["ntvd", "cosine"])
def test_save_and_load(tmp_path, ids, metric):
    rows = np.random.default_rng(0).dirichlet(np.ones(8), size=4)
    index = FlatIndex.build(rows, ids, metric)
    index.save(tmp_path / "i.safetensors")
    loaded = FlatIndex.load(tmp_path / "i.safetensors")
    assert (len(loaded), loaded.metric) == (4, metric)
    for a, b in zip(index.search(rows, 4), loaded.search(rows, 4)):
        np.testing.assert_array_equal(a, b)


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "i.safetensors"
    FlatIndex.build(np.random.default_rng(0).dirichlet(np.ones(8), size=20), [f"c{i}" for i in range(20)]).save(path)
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, *range(200, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match=r"i\.safetensors"):
            FlatIndex.load(path)
    with pytest.raises(FileNotFoundError):
        FlatIndex.load(tmp_path / "none")


@pytest.mark.parametrize(
    "tensors",
    [
        {"rows": torch.full((2, 4), 0.25)},
        {"ids": torch.arange(2)},
        {"rows": torch.full((2, 4), 0.25), "ids": torch.arange(3)},
        {"rows": torch.full((2, 4), 0.25), "ids": torch.tensor([1, 0])},
        {"rows": torch.full((2, 4), 0.25), "ids": torch.tensor([1, 1])},
        {"rows": torch.full((2, 4), 0.25), "ids": torch.rand(2)},
        {"rows": torch.full((2, 4), 0.25).double(), "ids": torch.arange(2)},
        {"rows": torch.full((2, 4), 0.3), "ids": torch.arange(2)},
        {"rows": torch.full((2, 4), float("nan")), "ids": torch.arange(2)},
        {"rows": torch.full((8,), 0.25), "ids": torch.arange(8)},
        {"rows": torch.full((2, 4), 0.25), "ids_utf8": torch.zeros(3, dtype=torch.uint8), "ids_offsets": torch.tensor([0, 2, 9])},
        {"rows": torch.full((2, 4), 0.25), "ids_utf8": torch.full((2,), 255, dtype=torch.uint8), "ids_offsets": torch.tensor([0, 1, 2])},
        {"rows": torch.empty(0, 4), "ids": torch.empty(0, dtype=torch.int64)},
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, tensors):
    path = tmp_path / "i.safetensors"
    write_tensors(path, tensors, kind="flat-index", meta={"metric": "ntvd"})
    with pytest.raises(FileFormatError, match="fit together"):
        FlatIndex.load(path)


@pytest.mark.parametrize("meta", [None, {}, {"metric": "l2"}, {"metric": []}, [1]])
def test_headers_that_do_not_fit_are_refused(tmp_path, meta):
    path = tmp_path / "i.safetensors"
    write_tensors(path, {"rows": torch.full((2, 4), 0.25), "ids": torch.arange(2)}, kind="flat-index", meta=meta)
    with pytest.raises(FileFormatError, match="fit together"):
        FlatIndex.load(path)


def test_foreign_files_are_refused(tmp_path):
    ContextVectors.build(GOOD).save(tmp_path / "other")
    (tmp_path / "text").write_text("nothing of the kind")
    for name in ("other", "text"):
        with pytest.raises(FileFormatError, match=f"{name}: expected a flat-index file"):
            FlatIndex.load(tmp_path / name)


def test_a_full_disk_leaves_the_old_index(tmp_path, monkeypatch):
    path = tmp_path / "i.safetensors"
    FlatIndex.build(GOOD).save(path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        FlatIndex.build(np.full((9, 4), 0.25)).save(path)
    monkeypatch.undo()
    assert len(FlatIndex.load(path)) == 3 and [p.name for p in tmp_path.iterdir()] == ["i.safetensors"]


def test_memory_of_a_full_scan_is_bounded():
    "Tied rows force full scans; the chunks of `pair_scores` keep the working set small."
    import tracemalloc

    rows = np.full((20_000, 64), 1 / 64, np.float32)
    index = FlatIndex.build(rows)
    tracemalloc.start()
    index.search(rows[:300], 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 2**20  # all pairs at once would take 300 × 20,000 × 64 × 8 bytes = 2.9 GiB


def test_pair_scores_do_not_depend_on_place_or_chunk():
    rng = np.random.default_rng(0)
    for width in (1, 2, 3, 7, 8, 9, 64, 257):
        x = rng.dirichlet(np.ones(width), size=12).astype(np.float32)
        q, r = np.repeat(np.arange(12), 12), np.tile(np.arange(12), 12)
        for metric in ("ntvd", "cosine"):
            together = pair_scores(x, x, q, r, metric)
            alone = [pair_scores(x, x[[j]].copy(), np.array([i]), np.array([0]), metric)[0] for i, j in zip(q, r)]
            np.testing.assert_array_equal(together, alone)
            np.testing.assert_array_equal(together, pair_scores(x, x, q, r, metric, chunk=5 * width))
            np.testing.assert_array_equal(together.reshape(12, 12), together.reshape(12, 12).T)


@pytest.mark.parametrize("beyond", [2**63, -(2**63) - 1, 10**30])
def test_ids_beyond_64_bits_are_refused_by_name(beyond):
    with pytest.raises(RangeError, match="ids"):
        sort_ids([1, beyond], 2)
    assert sort_ids([2**63 - 1, -(2**63)], 2)[0].tolist() == [-(2**63), 2**63 - 1]
