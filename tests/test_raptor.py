"Extractive summaries, soft clusters and RAPTOR: coverage, limits, exactness, seeds, bad inputs, broken files."

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.baselines.raptor import MODES, Raptor, gather, traverse
from hiernb.baselines.soft_clusters import RaptorSettings, soft_clusters, soft_members
from hiernb.baselines.summaries import ExtractiveSummariser, choose_sentences, split_sentences
from hiernb.errors import ArgumentError, EmptyError, FileFormatError, HiernbError, RangeError, ShapeError, UnknownNameError
from hiernb.files import read_tensors, write_tensors
from hiernb.search.flat import FlatIndex

WORDS = "tree leaf root river sea fish bread salt wine iron gold stone cloud rain wind snow horse dog cat bird".split()


class BagOfWords:
    "An encoder without a model: hashed word counts."

    def encode(self, texts, kind="context"):
        out = np.zeros((len(texts), 24), np.float32)
        for row, text in zip(out, texts):
            for word in text.lower().replace(".", " ").split():
                row[zlib.crc32(word.encode()) % 24] += 1
        return out + 0.01


def corpus(n, seed=0):
    "Texts about one of five topics each."
    rng = np.random.default_rng(seed)
    topics = np.array(WORDS).reshape(5, 4)
    return [f"The {' '.join(rng.choice(topics[i % 5], 6))} number {i}. A {rng.choice(WORDS)} {i}." for i in range(n)]


@pytest.fixture(scope="module")
def tree():
    texts = corpus(150)
    return Raptor.build(texts, [f"c{i:03d}" for i in range(150)], BagOfWords(), cluster_words=150, summary_words=20, progress=False), texts


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.integers(1, 50))
def test_sentences_keep_every_word(text, longest):
    found = split_sentences(text, longest)
    assert all(0 < len(s.split()) <= longest for s in found)
    keep = str.maketrans("", "", "\"')]")
    assert " ".join(found).translate(keep).split() == text.translate(keep).split()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([*WORDS, "the", "of."]), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=12), st.integers(1, 40))
def test_summaries_are_extracts_within_the_budget(texts, budget):
    summary = ExtractiveSummariser()(texts, budget)
    assert summary.strip() and len(summary.split()) <= budget
    assert set(summary.split()) <= {w for t in texts for w in t.split()}
    assert summary == ExtractiveSummariser()(texts, budget)


def test_many_sentences_and_equal_ones():
    texts = [f"Sentence {i} is about {WORDS[i % 20]}. Repeated words." for i in range(3000)]
    assert len(ExtractiveSummariser(max_sentences=50)(texts, 30).split()) <= 30
    assert ExtractiveSummariser()(["Same words."] * 5, 30) == "Same words."
    assert choose_sentences(["one tree", "one tree stands"], 5, 0.0)
    with pytest.raises(EmptyError):
        ExtractiveSummariser()(["", " \n"], 5)
    with pytest.raises(RangeError):
        ExtractiveSummariser(balance=2.0)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 120), st.integers(1, 12), st.integers(0, 1000), st.sampled_from([1, 5, 1000]), st.integers(1, 400), st.floats(0, 1))
def test_soft_clusters_cover_everything(n, d, seed, copies, limit, threshold):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))[np.arange(n) // copies].astype(np.float32)
    words = rng.integers(1, 60, n)
    chosen = RaptorSettings(cluster_words=limit, threshold=threshold, dim=int(rng.integers(1, 11)))
    clusters = soft_clusters(x, words, chosen)
    assert set(np.concatenate(clusters).tolist()) == set(range(n))
    assert len({tuple(c) for c in clusters}) == len(clusters)
    for c in clusters:
        assert (np.diff(c) > 0).all() and (len(c) == 1 or words[c].sum() <= limit)
    assert [c.tolist() for c in soft_clusters(x, words, chosen)] == [c.tolist() for c in clusters]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 1000), st.floats(0, 1))
def test_soft_members(n, k, seed, threshold):
    posterior = np.random.default_rng(seed).dirichlet(np.full(k, 0.3), n)
    member = np.zeros((n, k), bool)
    clusters = soft_members(posterior, threshold)
    assert set(np.concatenate(clusters)) == set(range(n)) and all(len(c) for c in clusters)
    assert sum(map(len, clusters)) == ((posterior > threshold) | (np.arange(k) == posterior.argmax(1)[:, None]) | member).sum()


def test_layers(tree):
    raptor, _ = tree
    assert raptor.layers[0] == 150 and len(raptor.layers) > 2 and raptor.layers == sorted(raptor.layers, reverse=True)
    for layer in range(1, len(raptor.layers)):
        nodes = range(raptor.starts[layer], raptor.starts[layer + 1])
        below = set(range(raptor.starts[layer - 1], raptor.starts[layer]))
        assert set(np.concatenate([raptor.children[i - 150] for i in nodes]).tolist()) == below
        assert set(np.concatenate([raptor.covers[i] for i in nodes]).tolist()) == set(range(150))
    assert len(raptor.summaries) == sum(raptor.layers[1:]) and all(len(s.split()) <= 20 for s in raptor.summaries)
    assert "ExtractiveSummariser" in repr(raptor) and "PCA" in repr(raptor)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [1, 10, 150])
def test_search(tree, mode, k):
    raptor, texts = tree
    flat = FlatIndex.build(BagOfWords().encode(texts), raptor.ids, metric="cosine").search(BagOfWords().encode(texts[:20]), k)
    everywhere = raptor.search(texts[:20], k, mode, breadth=10**6, batch_size=7)
    np.testing.assert_array_equal(everywhere[0], flat[0])
    assert everywhere[1].tolist() == flat[1].tolist()
    last = np.full((20, k), -2, np.float32)
    for breadth in (1, 2, 8, 64):
        scores, found = raptor.search(texts[:20], k, mode, breadth=breadth)
        assert scores.dtype == np.float32 and (np.diff(scores, axis=1) <= 0).all() and (scores <= flat[0]).all()
        assert all(len(set(row)) == k for row in found.tolist()) and (scores >= last).all()
        last = scores if mode != "traversal" else last  # a wider traversal may leave a layer by other nodes


def test_order_of_the_input_does_not_matter(tree):
    raptor, texts = tree
    order = np.random.default_rng(1).permutation(150)
    other = Raptor.build([texts[i] for i in order], [f"c{i:03d}" for i in order], BagOfWords(), cluster_words=150, summary_words=20, progress=False)
    assert other.summaries == raptor.summaries and np.array_equal(other.vectors, raptor.vectors)
    assert other.search(texts[:5], 9)[1].tolist() == raptor.search(texts[:5], 9)[1].tolist()


def test_gather_and_traverse(tree):
    raptor, _ = tree
    scores = np.random.default_rng(0).normal(size=len(raptor.children))
    assert traverse(raptor, scores, 10**6).tolist() == list(range(150))
    assert set(traverse(raptor, scores, 1)) <= set(range(150))
    assert gather([], [], 1, 1).tolist() == []


@pytest.mark.parametrize("n", [1, 2, 11, 12, 13])
def test_few_contexts(n):
    raptor = Raptor.build(corpus(n), encoder=BagOfWords(), progress=False)
    for mode in MODES:
        assert sorted(raptor.search(corpus(3), n, mode)[1][0].tolist()) == list(range(n))


def test_equal_contexts_end():
    raptor = Raptor.build(["The same text."] * 60, encoder=BagOfWords(), cluster_words=6, progress=False)
    assert raptor.search(["same"], 5)[1].tolist() == [[0, 1, 2, 3, 4]]


def test_any_summariser():
    def title(texts, max_words):
        return " ".join(t.split()[1] for t in texts)[:200]

    raptor = Raptor.build(corpus(60), encoder=BagOfWords(), summarise=title, progress=False)
    assert "title" in raptor.summariser and "Extractive" not in repr(raptor)
    seen = []
    Raptor.build(corpus(60), encoder=BagOfWords(), summarise=lambda t, n: seen.append(n) or "text", summary_words=33, progress=False)
    assert set(seen) == {33}
    with pytest.raises(RuntimeError, match="down"):
        Raptor.build(corpus(60), encoder=BagOfWords(), summarise=lambda t, n: (_ for _ in ()).throw(RuntimeError("down")), progress=False)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"texts": []}, EmptyError),
        ({"texts": "a text"}, ArgumentError),
        ({"texts": [1, 2]}, ArgumentError),
        ({"encoder": None}, ArgumentError),
        ({"summarise": "extractive"}, ArgumentError),
        ({"summarise": lambda t, n: None}, ArgumentError),
        ({"ids": [1]}, ShapeError),
        ({"ids": [1] * 30}, ArgumentError),
        ({"vectors": np.ones((3, 24))}, ShapeError),
        ({"vectors": np.full((30, 24), np.nan)}, HiernbError),
        ({"vectors": np.random.default_rng(0).normal(size=(30, 5))}, ShapeError),
        ({"treshold": 0.2}, UnknownNameError),
        ({"threshold": 2.0}, RangeError),
        ({"max_layers": -1}, RangeError),
    ],
)
def test_build_refuses(kwargs, error):
    with pytest.raises(error):
        Raptor.build(**{"texts": corpus(30), "encoder": BagOfWords(), "progress": False, **kwargs})


def test_search_refuses(tree):
    raptor, texts = tree
    for kwargs, error in (({"k": 151}, RangeError), ({"k": 0}, RangeError), ({"mode": "tree"}, UnknownNameError), ({"breadth": 0}, RangeError),
                          ({"queries": "one"}, ArgumentError), ({"queries": np.ones((2, 3))}, ShapeError),
                          ({"queries": np.full((2, 24), np.nan)}, HiernbError)):
        with pytest.raises(error):
            raptor.search(**{"queries": texts[:2], **kwargs})


def test_files(tree, tmp_path):
    raptor, texts = tree
    path = tmp_path / "raptor"
    raptor.save(path)
    loaded = Raptor.load(path, BagOfWords())
    for mode in MODES:
        assert [a.tolist() for a in loaded.search(texts[:9], 8, mode)] == [a.tolist() for a in raptor.search(texts[:9], 8, mode)]
    assert loaded.settings == raptor.settings and loaded.summaries == raptor.summaries and loaded.summariser == raptor.summariser
    with pytest.raises(ArgumentError, match="no encoder"):
        Raptor.load(path).search(texts[:1], 1)
    whole = path.read_bytes()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == whole
    for cut in (0, 8, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError):
            Raptor.load(path)
    with pytest.raises(FileNotFoundError):
        Raptor.load(tmp_path / "none")
    few = Raptor.build(corpus(3), encoder=BagOfWords(), progress=False)
    few.save(path)
    assert Raptor.load(path).layers == [3]


def test_files_that_do_not_fit_together(tree, tmp_path):
    raptor, _ = tree
    raptor.save(tmp_path / "r")
    tensors, meta = read_tensors(tmp_path / "r", kind="raptor")
    tensors = {k: v.clone() for k, v in tensors.items()}
    damage = {
        "children": tensors["children"] * 0 + 10**6,
        "children_offsets": tensors["children_offsets"][:-1],
        "layers": tensors["layers"][:-1],
        "vectors": tensors["vectors"][:-1],
        "ids_offsets": tensors["ids_offsets"].flip(0),
        "summaries.ids_offsets": tensors["summaries.ids_offsets"][:-1],
    }
    for name, value in damage.items():
        write_tensors(tmp_path / "bad", {**tensors, name: value}, kind="raptor", meta=meta)
        with pytest.raises(FileFormatError):
            Raptor.load(tmp_path / "bad")
    shifted = {**tensors, "children": tensors["children"].clone()}
    shifted["children"][-1] = 0  # a child two layers down
    longer = {**tensors, "vectors": tensors["vectors"] * 2}
    for t, m in ((shifted, meta), (longer, meta), (tensors, {}), (tensors, None), (tensors, {**meta, "settings": {"x": 1}})):
        write_tensors(tmp_path / "bad", t, kind="raptor", meta=m)
        with pytest.raises(FileFormatError):
            Raptor.load(tmp_path / "bad")
