"Hierarchical clustering and tree search: distributions, routing, exactness with all leaves, seeds, bad inputs, broken files."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.baselines.bisection import ClusterSettings, unit_rows
from hiernb.baselines.cluster_search import ClusterIndex, enough
from hiernb.baselines.clusters import ClusterTree, assign_sequentially, tree_to_tensors
from hiernb.errors import ArgumentError, EmptyError, FileFormatError, HiernbError, NotFiniteError, RangeError, ShapeError, UnknownNameError
from hiernb.files import write_tensors
from hiernb.search.flat import FlatIndex
from hiernb.tree import route, sum_up


def vectors(n, d=6, seed=0, copies=1):
    "Vectors on a coarse grid (many ties), each `copies` times."
    x = np.random.default_rng(seed).integers(-2, 3, (n, d)).astype(np.float32)
    x[(x == 0).all(1), 0] = 1
    return x[np.arange(n) // copies]


@st.composite
def fitted(draw):
    n, copies = draw(st.integers(1, 60)), draw(st.sampled_from([1, 1, 3, 60]))
    x = vectors(n, draw(st.integers(1, 6)), draw(st.integers(0, 10**6)), copies)
    tree = ClusterTree.fit(x, draw(st.integers(1, 4)), draw(st.sampled_from(["kmeans", "gmm"])), draw(st.integers(0, 5)), progress=False,
                           min_points=draw(st.integers(2, 8)))
    return tree, x


@settings(max_examples=60, deadline=None)
@given(fitted(), st.integers(0, 1000))
def test_every_level_is_a_distribution_and_sequential_equals_batched(case, seed):
    tree, x = case
    queries = vectors(9, x.shape[1], seed)
    leaves = tree.assign(queries)
    assert leaves.shape == (9, 2**tree.depth) and (leaves >= 0).all()
    for level in range(tree.depth + 1):
        rows = tree.assign(queries, level)
        assert torch.allclose(rows.sum(1), torch.ones(9), atol=1e-5) and torch.allclose(rows, sum_up(leaves, level), atol=1e-6)
    slow = assign_sequentially(tree, torch.from_numpy(unit_rows("queries", queries)))
    assert torch.allclose(slow, leaves, atol=2e-3)
    assert torch.allclose(leaves, tree.assign(queries, block=2), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(fitted())
def test_routes(case):
    tree, x = case
    leaves = tree.leaves(x)
    masses, first = tree.assign(x), 2**tree.depth - 1
    decided = (tree.scores(torch.from_numpy(unit_rows("x", x))).abs() > 1e-4).all(1)  # the others may round to a tie
    assert (route(masses)[0][:, -1] - first)[decided].tolist() == leaves[decided].tolist()
    assert torch.equal(leaves, tree.at_temperature(3.0).leaves(x))
    for node in range(first // 2):
        if not tree.splits[node]:
            assert not tree.splits[2 * node + 1] and not tree.splits[2 * node + 2]
    for node in np.flatnonzero(~tree.splits.numpy()):  # nothing goes right below a stopped node
        level = int(np.log2(node + 1))
        right, width = 2 * node + 2 - (2 ** (level + 1) - 1), 2 ** (tree.depth - level - 1)
        assert (masses[:, right * width : (right + 1) * width] == 0).all()


@settings(max_examples=60, deadline=None)
@given(fitted(), st.integers(1, 30), st.integers(0, 1000), st.booleans())
def test_all_leaves_equal_exhaustive_search(case, k, seed, strings):
    tree, x = case
    n = len(x)
    k = min(k, n)
    ids = [f"c{(7 * i) % 101}" for i in range(n)] if strings else [(37 * i) % 101 - 50 for i in range(n)]
    queries = vectors(5, x.shape[1], seed)
    index, flat = ClusterIndex.build(tree, x, ids), FlatIndex.build(x, ids, metric="cosine")
    want = flat.search(queries, k)
    got = index.search(queries, k, leaves=2**tree.depth, batch_size=2)
    np.testing.assert_array_equal(got[0], want[0])
    assert got[1].tolist() == want[1].tolist()
    last = np.full(want[0].shape, -2, np.float32)
    for leaves in (1, 2, 2**tree.depth):  # more leaves never score lower; every row is full and without repetition
        scores, found = index.search(queries, k, leaves=leaves)
        assert (scores >= last).all() and (np.diff(scores, axis=1) <= 0).all() and all(len(set(row)) == k for row in found.tolist())
        last = scores


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_search_looks_into_the_best_leaf_only(method):
    x = vectors(300, 6, 1)
    tree = ClusterTree.fit(x, 3, method, progress=False)
    index = ClusterIndex.build(tree, x)
    queries = vectors(40, 6, 2)
    best = tree.assign(queries).argmax(1).numpy()
    for q, (leaf, found) in enumerate(zip(best, index.search(queries, 5)[1])):
        if index.sizes[leaf] >= 5 and tree.assign(queries[[q]])[0].topk(2).values.diff().abs() > 1e-5:
            assert (index.leaves[found] == leaf).all()


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_seed(method):
    x = np.random.default_rng(0).normal(size=(500, 12))
    a, b, c = (ClusterTree.fit(x, 4, method, seed, progress=False) for seed in (3, 3, 4))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.centres, c.centres)


def test_clusters_are_found():
    rng = np.random.default_rng(0)
    middles = np.array([[1, 0, s, 0] if left else [0, 1, 0, s] for left in (True, False) for s in (0.4, -0.4)])  # two pairs
    x = np.repeat(middles, 50, 0) + 0.05 * rng.normal(size=(200, 4))
    for method in ("kmeans", "gmm"):
        leaves = ClusterTree.fit(x, 2, method, n_init=5, progress=False).leaves(x).numpy().reshape(4, 50)
        assert (leaves == leaves[:, :1]).all() and len(set(leaves[:, 0])) == 4


@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_few_points(n):
    x = vectors(n)
    tree = ClusterTree.fit(x, 3, progress=False)
    assert not tree.splits.any() and torch.equal(tree.assign(x), torch.eye(8)[:1].repeat(n, 1))
    assert ClusterIndex.build(tree, x).search(x, n)[1].shape == (n, n)


def test_enough():
    assert enough(np.array([1, 0]), np.array([0, 4]), 1, 4).tolist() == [1]
    assert enough(np.array([1, 0]), np.array([2, 4]), 1, 5).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("x", "kwargs", "error"),
    [
        (np.empty((0, 4)), {}, EmptyError),
        (np.full((5, 4), np.nan), {}, NotFiniteError),
        (np.full((5, 4), np.inf), {}, NotFiniteError),
        (np.zeros((5, 4)), {}, ArgumentError),
        (np.ones(5), {}, ShapeError),
        (np.ones((5, 0)), {}, ShapeError),
        (np.array([["a"]]), {}, ShapeError),
        (np.ones((5, 4)), {"depth": 0}, RangeError),
        (np.ones((5, 4)), {"depth": 17}, RangeError),
        (np.ones((5, 4)), {"depth": 2.0}, ArgumentError),
        (np.ones((5, 4)), {"method": "GMM"}, UnknownNameError),
        (np.ones((5, 4)), {"regcovar": 1}, UnknownNameError),
        (np.ones((5, 4)), {"temperature": -1.0}, RangeError),
        (np.ones((5, 4)), {"seed": "x"}, ArgumentError),
    ],
)
def test_fit_refuses(x, kwargs, error):
    with pytest.raises(error):
        ClusterTree.fit(x, **kwargs)


def test_index_and_assign_refuse():
    x = vectors(20)
    tree = ClusterTree.fit(x, 2, progress=False)
    index = ClusterIndex.build(tree, x)
    for bad, error in ((x[:, :3], ShapeError), (x * np.nan, NotFiniteError), (x * 0, ArgumentError), (x[0], ShapeError)):
        for call in (tree.assign, tree.leaves, index.search, lambda v: ClusterIndex.build(tree, v)):
            with pytest.raises(error):
                call(bad)
    for kwargs, error in (({"k": 21}, RangeError), ({"k": 0}, RangeError), ({"leaves": 0}, RangeError), ({"leaves": 5}, RangeError),
                          ({"k": 1.5}, ArgumentError), ({"batch_size": 0}, RangeError)):
        with pytest.raises(error):
            index.search(x, **kwargs)
    with pytest.raises(RangeError):
        tree.assign(x, 3)
    with pytest.raises(ShapeError):
        ClusterIndex.build(tree, x, ids=range(3))


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_files(tmp_path, method):
    x = vectors(80, 5, 3)
    tree = ClusterTree.fit(x, 3, method, progress=False, temperature=0.7)
    index = ClusterIndex.build(tree, x, [f"ü{i}" for i in range(80)])
    for thing, name in ((tree, "tree"), (index, "index")):
        path = tmp_path / name
        thing.save(path)
        loaded = type(thing).load(path)
        if name == "tree":
            assert loaded.settings == tree.settings and torch.equal(loaded.assign(x), tree.assign(x))
        else:
            assert [a.tolist() for a in loaded.search(x, 7)] == [a.tolist() for a in index.search(x, 7)]
        whole = path.read_bytes()
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == whole
        for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(FileFormatError):
                type(thing).load(path)
        path.write_bytes(b"not a tensor file at all" * 10)
        with pytest.raises(FileFormatError):
            type(thing).load(path)
        with pytest.raises(FileNotFoundError):
            type(thing).load(tmp_path / "none")
    assert not list(tmp_path.glob("*.tmp"))


def test_files_that_do_not_fit_together(tmp_path):
    x = vectors(40, 5, 3)
    tree = ClusterTree.fit(x, 2, progress=False)
    tensors, meta = tree_to_tensors(tree)
    bad = [
        ({k: v for k, v in tensors.items() if k != "tree.weights"}, meta),
        ({**tensors, "tree.splits": tensors["tree.splits"].long()}, meta),
        ({**tensors, "tree.variances": -tensors["tree.variances"]}, meta),
        ({**tensors, "tree.centres": tensors["tree.centres"] * torch.nan}, meta),
        (tensors, {**meta, "depth": 3}),
        (tensors, {**meta, "method": "gmm"}),
        (tensors, {**meta, "colour": 1}),
        (tensors, None),
    ]
    for t, m in bad:
        write_tensors(tmp_path / "t", t, kind="cluster-tree", meta=m)
        with pytest.raises(FileFormatError):
            ClusterTree.load(tmp_path / "t")
    index = ClusterIndex.build(tree, x)
    index.leaves = index.leaves + 4
    index.save(tmp_path / "i")
    with pytest.raises(FileFormatError):
        ClusterIndex.load(tmp_path / "i")


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    tree = ClusterTree.fit(vectors(20), 2, progress=False)
    tree.save(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="space"):
        ClusterTree.fit(vectors(30), 3, progress=False).save(tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_cuda_equals_cpu(method):
    x = np.random.default_rng(0).normal(size=(300, 16))
    tree = ClusterTree.fit(x, 4, method, progress=False)
    want = tree.assign(x)
    assert torch.allclose(tree.to("cuda").assign(x), want, atol=1e-3)
    assert [a.shape for a in ClusterIndex.build(tree, x).search(x, 3)] == [(300, 3)] * 2


def test_errors_are_of_the_house():
    with pytest.raises(HiernbError):
        ClusterSettings(min_points=1)
