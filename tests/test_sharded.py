"""Corpora in shards: through Ray's workers, with a killed actor, killed writers, and shards that do not fit together."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hiernb.errors import ArgumentError, FileFormatError, NotFiniteError, RangeError
from hiernb.ray_session import ray_session
from hiernb.retreever.model import Retreever
from hiernb.search.cascade import CascadeIndex
from hiernb.search.flat import FlatIndex
from hiernb.search.inverted import InvertedIndex
from hiernb.search.sharded import LostShards, ShardedIndex, finish_shards, in_actors, merge_results, write_shard
from hiernb.streaming import assign_corpus, index_corpus, plan_shards
from hiernb.tree import product_down


def distributions(n, depth=5, seed=0):
    return product_down(torch.sigmoid(4 * torch.randn(n, (1 << depth) - 1, generator=torch.Generator().manual_seed(seed))))


def write_vectors(folder, n=600, dim=12, files=3, groups=64):
    folder.mkdir()
    vectors = np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)
    for i, at in enumerate(np.array_split(np.arange(n), files)):
        table = pa.table({"context_id": [f"c{j:05}" for j in at], "vector": pa.FixedSizeListArray.from_arrays(vectors[at].ravel(), dim)})
        pq.write_table(table, folder / f"part-{i}.parquet", row_group_size=groups)
    return vectors


@pytest.fixture(scope="module")
def ray_here():
    pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
    with ray_session(2, object_store=80 * 2**20) as ray:
        yield ray


@pytest.mark.parametrize("kind", [InvertedIndex, CascadeIndex])
@pytest.mark.parametrize("strings", [False, True])
def test_shards_of_any_cut_are_the_single_index(tmp_path, kind, strings):
    rows = distributions(300)
    rows[100:200] = rows[:100]  # many ties between shards
    ids = np.random.default_rng(1).permutation(300)
    ids = [f"id{i:03}" for i in ids] if strings else ids
    cuts = [[0, 1, 2, 300], [0, 150, 300], [0, 40, 80, 200, 299, 300]]
    scores, found = FlatIndex.build(rows, ids).search(rows[:30], 25)
    for c, cut in enumerate(cuts):
        folder = tmp_path / str(c)
        folder.mkdir()
        finish_shards(folder, [write_shard(folder, f"s{i}", kind.build(rows[a:b], list(ids[a:b]))) for i, (a, b) in enumerate(zip(cut, cut[1:]))])
        answer = ShardedIndex(folder).search(rows[:30], 25)
        assert np.array_equal(answer.scores, scores) and np.array_equal(answer.ids, found)


def test_shards_that_do_not_fit_together(tmp_path):
    rows = distributions(20)
    one = write_shard(tmp_path, "one", InvertedIndex.build(rows, np.arange(20)))
    with pytest.raises(ArgumentError, match="kind"):
        finish_shards(tmp_path, [one, write_shard(tmp_path, "two", CascadeIndex.build(rows, np.arange(20, 40)))])
    with pytest.raises(ArgumentError, match="width"):
        finish_shards(tmp_path, [one, write_shard(tmp_path, "two", InvertedIndex.build(rows, np.arange(20, 40), level=3))])
    with pytest.raises(ArgumentError, match="'?19'?, which stands"):
        finish_shards(tmp_path, [one, write_shard(tmp_path, "two", InvertedIndex.build(rows, np.arange(19, 39)))])
    with pytest.raises(ArgumentError, match="twice"):
        finish_shards(tmp_path, [one, one])
    assert not (tmp_path / "shards.json").exists()
    finish_shards(tmp_path, [one])
    with pytest.raises(RangeError, match="`k`"):
        ShardedIndex(tmp_path).search(rows, 21)
    with pytest.raises(ArgumentError, match="queries"):  # the caller's mistake, not a lost shard
        ShardedIndex(tmp_path).search(rows * 2, 3, partial=True)
    (tmp_path / "shards.json").write_text(json.dumps({"shards": []}))
    with pytest.raises(FileFormatError, match=r"shards\.json"):
        ShardedIndex(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    rows = distributions(60)
    finish_shards(tmp_path, [write_shard(tmp_path, n, InvertedIndex.build(rows[a], np.arange(60)[a])) for n, a in {"x": slice(30), "y": slice(30, 60)}.items()])
    data = bytearray((tmp_path / "y.index").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "y.index").write_bytes(bytes(data))
    with pytest.raises(LostShards, match="y: ") as lost:
        ShardedIndex(tmp_path).search(rows, 3)
    assert lost.value.answered == ["x"] and [*lost.value.lost] == ["y"]
    assert set(ShardedIndex(tmp_path).search(rows, 3, partial=True).ids.ravel()) <= set(range(30))


def test_merging_more_than_there_is():
    scores, ids = merge_results([(np.zeros((2, 1), np.float32), np.array([[3], [4]]))], 5)
    assert ids.tolist() == [[3], [4]]


def test_actors_and_one_that_dies(tmp_path, ray_here):
    rows = distributions(200)
    cuts = {"a": slice(0, 80), "b": slice(80, 200)}
    finish_shards(tmp_path, [write_shard(tmp_path, n, InvertedIndex.build(rows[c], np.arange(200)[c])) for n, c in cuts.items()])
    index = ShardedIndex(tmp_path, start=in_actors(restarts=0, cpus=0.1), timeout=60)
    scores, ids = FlatIndex.build(rows).search(rows[:10], 7)
    answer = index.search(rows[:10], 7)
    assert np.array_equal(answer.scores, scores) and np.array_equal(answer.ids, ids) and not answer.lost
    actor = index.ask["b"].__closure__[0].cell_contents
    ray_here.kill(actor)
    with pytest.raises(LostShards, match="b: "):
        index.search(rows[:10], 7)
    partly = index.search(rows[:10], 7, partial=True)
    assert partly.answered == ["a"] and partly.missing == 120 and partly.ids.max() < 80


def test_a_corpus_through_rays_workers_is_the_corpus_made_here(tmp_path, ray_here):
    write_vectors(tmp_path / "in")
    Retreever(12, depth=4, spread=3.0).save_pretrained(tmp_path / "model")
    here = assign_corpus(tmp_path / "in", tmp_path / "model", tmp_path / "here", rows=150, progress=False)
    there = assign_corpus(tmp_path / "in", tmp_path / "model", tmp_path / "there", rows=150, workers=2, progress=False)
    assert here == there == {f"shard-{i:05}": 150 for i in range(4)}
    for name in here:
        assert pq.read_table(tmp_path / "here" / f"{name}.parquet").equals(pq.read_table(tmp_path / "there" / f"{name}.parquet"))
    assert index_corpus(tmp_path / "there", tmp_path / "index", progress=False) == 600
    answer = ShardedIndex(tmp_path / "index").search(torch.full((1, 16), 1 / 16), 600)
    assert sorted(answer.ids[0]) == [f"c{i:05}" for i in range(600)]


def test_row_groups_of_any_size_are_the_same_corpus(tmp_path):
    """Also one that holds everything, of which each shard reads its own rows only, a batch at a time."""
    rng, out = np.random.default_rng(0), []
    vectors = pa.FixedSizeListArray.from_arrays(rng.normal(size=12 * 1000).astype(np.float32), 12)
    Retreever(12, depth=4, spread=3.0).save_pretrained(tmp_path / "model")
    for groups in (1, 7, 64, 1000):
        (tmp_path / f"in{groups}").mkdir()
        pq.write_table(pa.table({"context_id": np.arange(1000), "vector": vectors}), tmp_path / f"in{groups}" / "x.parquet", row_group_size=groups)
        done = assign_corpus(tmp_path / f"in{groups}", tmp_path / "model", tmp_path / f"out{groups}", rows=300, batch_size=32, progress=False)
        assert done == {"shard-00000": 300, "shard-00001": 300, "shard-00002": 300, "shard-00003": 100}
        made = pa.concat_tables([pq.read_table(tmp_path / f"out{groups}" / f"{name}.parquet") for name in done])
        assert made["context_id"].to_pylist() == [*range(1000)]
        out.append(np.array(made["assignment"].to_pylist(), np.float32))
    assert all(np.abs(x - out[0]).max() < 1e-3 for x in out[1:])  # batches of another size round differently


def test_a_row_group_larger_than_memory_may_be(tmp_path):
    """Memory holds batches, not row groups: reading 60 MB takes less than half of that."""
    vectors = pa.FixedSizeListArray.from_arrays(np.random.default_rng(0).normal(size=384 * 40_000).astype(np.float32), 384)
    pq.write_table(pa.table({"context_id": np.arange(40_000), "vector": vectors}), tmp_path / "x.parquet", row_group_size=1 << 20)
    code = "import sys, pyarrow as pa; from hiernb.streaming import _batches, plan_shards; "
    code += "n = sum(len(b) for p in plan_shards(sys.argv[1], 9000).values() for b in _batches(p, 256)); print(n, pa.default_memory_pool().max_memory())"
    command = [sys.executable, "-c", code, tmp_path / "x.parquet"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    n, peak = map(int, out.stdout.split())
    assert n == 40_000 and peak < 30e6, peak


def test_the_texts_of_a_corpus_are_not_kept_unless_asked(tmp_path, monkeypatch):
    """The encoder's cache would grow with the corpus."""
    monkeypatch.setenv("HIERNB_CACHE", str(tmp_path / "cache"))
    pq.write_table(pa.table({"context_id": [1, 2], "title": ["Owls", None], "text": ["fly at night", "Rain falls."]}), tmp_path / "x.parquet")
    Retreever(384, depth=3, spread=3.0).save_pretrained(tmp_path / "model")
    for cache, kept in ((False, False), (str(tmp_path / "kept"), True)):
        out = tmp_path / f"out-{kept}"
        assert assign_corpus(tmp_path / "x.parquet", tmp_path / "model", out, cache=cache, progress=False) == {"shard-00000": 2}
        assert (tmp_path / "kept").exists() == kept and not [*(tmp_path / "cache").rglob("*.safetensors")]
        assert np.allclose(np.array(pq.read_table(out / "shard-00000.parquet")["assignment"].to_pylist()).sum(1), 1, atol=1e-2)


def test_a_killed_run_goes_on_with_what_is_missing(tmp_path):
    write_vectors(tmp_path / "in", n=3000)
    Retreever(12, depth=8, spread=3.0).save_pretrained(tmp_path / "model")
    code = """
        import sys, time
        from hiernb.retreever.model import Retreever
        from hiernb.streaming import assign_corpus
        represent = Retreever.represent
        Retreever.represent = lambda *args: time.sleep(0.01) or represent(*args)  # 50 ms a shard: the kill comes long before the end
        assign_corpus(*sys.argv[1:4], rows=50, batch_size=10, progress=False)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *(str(tmp_path / n) for n in ("in", "model", "out"))]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while len([*(tmp_path / "out").glob("*.parquet")]) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*.parquet")}
    assert 5 <= len(before) < 60
    done = assign_corpus(tmp_path / "in", tmp_path / "model", tmp_path / "out", rows=50, batch_size=10, progress=False)
    assert len(done) == 60 and sum(done.values()) == 3000
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == at for name, at in before.items())


def test_foreign_corpora(tmp_path):
    Retreever(12, depth=3).save_pretrained(tmp_path / "model")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(FileFormatError, match="context_id"):
        assign_corpus(tmp_path / "foreign.parquet", tmp_path / "model", tmp_path / "a", progress=False)
    assert not [*(tmp_path / "a").glob("*.parquet")]
    bad = pa.FixedSizeListArray.from_arrays(np.array([0.0] * 11 + [np.nan], np.float32), 12)
    pq.write_table(pa.table({"context_id": [5], "vector": bad}), tmp_path / "nan.parquet")
    with pytest.raises(NotFiniteError, match="row of 5"):
        assign_corpus(tmp_path / "nan.parquet", tmp_path / "model", tmp_path / "b", progress=False)
    with pytest.raises(FileNotFoundError):
        plan_shards(tmp_path / "none.parquet")
