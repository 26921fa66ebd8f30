"""Hybrid attention across its rooms: backends against each other, padding, round trips, cost, gradients, files, bad input."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hiernb.errors import ArgumentError, FileFormatError, HiernbError, RangeError, ShapeError, UnknownNameError
from hiernb.hybrid.config import AttentionConfig, as_config
from hiernb.hybrid.landmark import CrossAttention, SparseGlobalAttention, batch_positions, landmark_positions
from hiernb.hybrid.model import HybridModel
from hiernb.hybrid.query import TASKS, DynamicQueryGenerator
from hiernb.hybrid.segments import RetrievalAugmentedSegments, merge_segments, segment_spans, split_segments
from hiernb.hybrid.window import SlidingWindowAttention, block_lists, hybrid_attention, visible

SMALL = {"window_size": 12, "window_overlap": 5, "num_landmark_tokens": 3, "landmark_stride": 8, "segment_length": 20, "hidden_size": 16,
         "num_attention_heads": 2, "global_attention_heads": 2, "max_retrieved_segments": 2}


def naive(q, k, v, window, prefix, mask):
    "The definition, position by position."
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            if mask is not None and not mask[b, i]:
                continue
            seen = [j for j in range(q.shape[2]) if (i < prefix or j < prefix or abs(i - j) <= window / 2) and (mask is None or mask[b, j])]
            weights = (k[b, :, seen] @ q[b, :, i, :, None] / math.sqrt(q.shape[-1])).softmax(1)
            out[b, :, i] = (weights * v[b, :, seen]).sum(1)
    return out


def masks(data, batch: int, n: int):
    "No mask, padding on the right, holes anywhere, or texts of padding only."
    kind = data.draw(st.sampled_from(["none", "right", "holes", "nobody"]))
    if kind == "none":
        return None
    if kind == "right":
        return torch.arange(n) < torch.tensor([[data.draw(st.integers(0, n))] for _ in range(batch)])
    return torch.rand(batch, n) > 0.5 if kind == "holes" else torch.arange(batch)[:, None].expand(-1, n) > 0


# ---- the three backends

@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_dense_is_the_definition(data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    n = data.draw(st.integers(1, 14))
    q, k, v = torch.randn(3, 2, 2, n, 4)
    window, prefix, mask = data.draw(st.integers(0, 16)), data.draw(st.integers(0, n)), masks(data, 2, n)
    for backend in ("dense", "chunked"):
        assert (hybrid_attention(q, k, v, window, prefix, mask, backend) - naive(q, k, v, window, prefix, mask)).abs().max() < 1e-5


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_chunked_is_dense_with_gradients(data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    n = data.draw(st.one_of(st.integers(1, 70), st.integers(71, 700), st.sampled_from([64, 128, 129, 512, 1200])))
    window, prefix = data.draw(st.integers(0, 300)), data.draw(st.integers(0, min(n, 40)))
    batch, mask = data.draw(st.integers(1, 2)), None
    mask, tensors = masks(data, batch, n), [torch.randn(batch, 2, n, 8, requires_grad=True) for _ in range(3)]
    into, found = torch.randn(batch, 2, n, 8), {}
    for backend in ("dense", "chunked"):
        out = hybrid_attention(*tensors, window, prefix, mask, backend)
        found[backend] = [out, *torch.autograd.grad((out * into).sum(), tensors)]
    for a, b in zip(found["dense"], found["chunked"]):
        assert torch.isfinite(b).all() and (a - b).abs().max() < 1e-5
    if mask is not None:
        assert not found["chunked"][0].masked_select(~mask[:, None, :, None]).any()
        assert not any(g.masked_select(~mask[:, None, :, None]).any() for g in found["chunked"][1:])  # nor does padding learn


def test_large_scores_and_half_precision():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 500, 16)
    for scale in (1e-4, 1e3):
        a, b = (hybrid_attention(scale * q, scale * k, v, 100, 3, backend=name) for name in ("dense", "chunked"))
        assert torch.isfinite(b).all() and (a - b).abs().max() < 1e-4
    half = hybrid_attention(*(x.bfloat16() for x in (q, k, v)), 100, 3)
    assert half.dtype == torch.bfloat16 and (half.float() - hybrid_attention(q, k, v, 100, 3)).abs().max() < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = SlidingWindowAttention(32, 2, 100)
        layer(torch.randn(1, 500, 32), torch.arange(500)[None] < 400, torch.randn(1, 3, 32))[0].float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_second_derivatives_and_changes_in_place():
    torch.manual_seed(0)
    tensors = [torch.randn(1, 1, 200, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    small = [x.detach()[:, :, :70].requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: hybrid_attention(*x, 6, 2, backend="chunked"), small, fast_mode=True)
    key = tensors[1] * 1.0
    out = hybrid_attention(tensors[0], key, tensors[2], 20, 2)
    key.zero_()
    with pytest.raises(RuntimeError, match="changed in place|modified by an inplace"):
        out.sum().backward()


@pytest.mark.parametrize("n", [1, 30, 200, 1500])
def test_no_gradients_are_needed(n):
    q, k, v = torch.randn(3, 1, 2, n, 4, generator=torch.Generator().manual_seed(n))
    with torch.no_grad():
        plain = hybrid_attention(q, k, v, 20, 0, None, "chunked")
    with torch.inference_mode():
        assert torch.equal(hybrid_attention(q.clone(), k.clone(), v.clone(), 20, 0, None, "chunked"), plain)
    learned = k.clone().requires_grad_()
    hybrid_attention(q, learned, v, 20, 0, None, "chunked").sum().backward()  # the keys alone
    dense = torch.autograd.grad(hybrid_attention(q, again := k.clone().requires_grad_(), v, 20, 0, None, "dense").sum(), again)[0]
    assert (learned.grad - dense).abs().max() < 1e-4


def test_flex_is_dense():
    import shutil

    if not shutil.which("g++") and not shutil.which("clang++") and not torch.cuda.is_available():
        pytest.skip("FlexAttention compiles with a C++ compiler on a CPU, and there is none")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = torch.randn(3, 2, 2, 300, 16, device=device)
    holes = torch.rand(2, 300, device=device) > 0.4
    holes[1] = False
    with torch.no_grad():
        for n, window, prefix, mask in [(300, 64, 5, None), (290, 131, 0, holes[:, :290]), (300, 0, 130, holes)]:  # one shape: compiled once
            x = [t[:, :, :n] for t in (q, k, v)]
            a, b = (hybrid_attention(*x, window, prefix, mask, backend) for backend in ("dense", "flex"))
            assert (a - b).abs().max() < 1e-5


@given(n=st.integers(1, 900), window=st.integers(0, 600), prefix=st.integers(0, 300))
@settings(max_examples=25, deadline=None)
def test_flex_visits_the_blocks_it_must(n, window, prefix):
    assume(prefix <= n)
    count, which = block_lists(n, window, prefix)
    seen = torch.nn.functional.pad(visible(n, window, prefix)[0, 0], (0, -n % 128, 0, -n % 128)).unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(3).any(1)
    for row, (c, w) in enumerate(zip(count[0, 0], which[0, 0])):
        assert set(seen[row].nonzero()[:, 0].tolist()) <= set(w[:c].tolist()) and len(w) == len(seen)


# ---- landmarks

@given(st.integers(1, 3000), st.integers(0, 64), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_landmarks_stand_evenly(length, num, stride):
    at = landmark_positions(length, num, stride)
    assert len(at) == min(num, -(-length // stride))
    if len(at):
        assert 0 <= at[0] and at[-1] < length and (at[1:] > at[:-1]).all()
        gaps = at.diff()
        assert not len(gaps) or gaps.max() - gaps.min() <= 1
        found, there = batch_positions((torch.arange(length + 9) < length)[None], num, stride)
        assert torch.equal(found[0][there[0]], at)


@given(length=st.integers(1, 60), more=st.integers(1, 60), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_landmark_attention_knows_no_padding(length, more, seed):
    torch.manual_seed(seed)
    module, x = SparseGlobalAttention(16, 2, num=5, stride=7).eval(), torch.randn(1, length, 16)
    padded = torch.cat([x, 9 * torch.randn(1, more, 16)], 1)
    tokens, landmarks = module(padded, torch.arange(length + more)[None] < length)
    alone, marks = module(x)
    assert (tokens[:, :length] - alone).abs().max() < 1e-4 and not tokens[:, length:].any()
    assert (landmarks[:, : marks.shape[1]] - marks).abs().max() < 1e-4 and not landmarks[:, marks.shape[1] :].any()


# ---- segments

@given(st.data())
@settings(max_examples=30, deadline=None)
def test_segments_there_and_back(data):
    length, size = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 30))
    overlap = data.draw(st.integers(0, size - 1))
    x = torch.randn(2, length, 3, dtype=torch.float64)
    mask = torch.rand(2, length) > 0.3
    segments, real = split_segments(x, size, overlap), split_segments(mask, size, overlap)
    assert segments.shape[1] == len(segment_spans(length, size, overlap))
    every = split_segments(torch.ones(2, length, dtype=torch.bool), size, overlap)
    for some, want in ((every, x), (real, x * mask[..., None])):
        assert (merge_segments(segments, length, overlap, some) - want).abs().max() < 1e-12
    noise = torch.randn(segments.shape, dtype=torch.float64)
    want, counts = torch.zeros(2, length, 3, dtype=torch.float64), torch.zeros(length)
    for i, (a, b) in enumerate(segment_spans(length, size, overlap)):
        want[:, a:b] += noise[:, i, : b - a]
        counts[a:b] += 1
    assert counts.min() >= 1 and (merge_segments(noise, length, overlap) - want / counts[:, None]).abs().max() < 1e-12


def test_passages_that_are_not_there():
    torch.manual_seed(0)
    reader = RetrievalAugmentedSegments(16, 6, 2, most=3)
    reader.gate.data.fill_(0.7)
    x, passages, there = torch.randn(3, 4, 16), torch.randn(3, 5, 6), torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])
    out, relevance, weights = reader(x, torch.where(there[..., None], passages, 1e4), passage_mask=there, maps=True)
    assert torch.isfinite(out).all() and torch.equal(out[2], x[2])
    assert (out[1] - reader(x[1:2], passages[1:2, [0, 2]])[0][0]).abs().max() < 1e-5
    assert not weights[1, ..., ~there[1]].any() and (weights > 0).sum(-1).max() <= 3
    assert torch.allclose(relevance.exp().sum(1), torch.tensor([1.0, 1.0, 0.0]))
    out.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in reader.parameters() if p.grad is not None)


# ---- the model

def awake(**switches) -> HybridModel:
    "A small model whose zero-initialised parts have woken."
    model = HybridModel(SMALL, dim=12, **switches).eval()
    with torch.no_grad():
        model.retrieved.gate.fill_(0.5)
        if hasattr(model, "generator"):
            torch.nn.init.normal_(model.generator.fuse.out.weight, std=0.2)
    return model


SWITCHES = [{}, {"window": False}, {"landmarks": False}, {"segments": False}, {"query": "static"}, {"layers": 1, "cross_layers": 2, "synthesis_layers": 2}]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_parameter_learns(switches):
    torch.manual_seed(0)
    model = awake(**switches)
    x, question = torch.randn(2, 90, 12), torch.randn(2, 12)
    passages = torch.randn(2, 5, 12, requires_grad=True)
    out = model(x, torch.arange(90) < torch.tensor([[90], [50]]), question, passages, task=torch.tensor([0, 2]))
    (out.states.square().sum() + out.summary.sin().sum() + out.query.square().sum()).backward()
    assert passages.grad.abs().sum() > 0
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and (p.grad.abs().sum() > 0 or not p.numel()), name


@pytest.mark.parametrize("switches", SWITCHES[:4], ids=str)
@given(length=st.integers(1, 90), more=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_model_knows_no_padding(switches, length, more, seed):
    torch.manual_seed(seed)
    model, x, question, passages = awake(**switches), torch.randn(1, length, 12), torch.randn(1, 12), torch.randn(1, 3, 12)
    with torch.no_grad():
        alone = model(x, None, question, passages, task="qa")
        longer = torch.cat([x, 9 * torch.randn(1, more, 12)], 1)
        there = torch.tensor([[True, True, True, False]])
        padded = model(longer, torch.arange(length + more)[None] < length, question, torch.cat([passages, 9 * torch.randn(1, 1, 12)], 1), there, task="qa")
    for a, b in ((alone.states, padded.states[:, :length]), (alone.summary, padded.summary), (alone.query, padded.query)):
        assert (a - b).abs().max() < 1e-4
    assert not padded.states[:, length:].any()


@pytest.mark.parametrize("switches", SWITCHES[:5], ids=str)
def test_texts_of_padding_only(switches):
    model = awake(**switches).train()
    x, mask = torch.randn(2, 50, 12), torch.tensor([[True], [False]]).expand(2, 50)
    out = model(x, mask, torch.randn(2, 12), torch.randn(2, 3, 12), torch.tensor([[True] * 3, [False] * 3]), maps=True)
    out.states.sum().backward()
    assert all(torch.isfinite(v).all() for v in (out.states, out.summary, out.query, *out.maps.values())) and not out.states[1].any()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("switches", SWITCHES[:4], ids=str)
def test_cost_is_linear(switches):
    def work(n: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            awake(**switches)(torch.zeros(1, n, 12), question=torch.zeros(1, 12), passages=torch.zeros(1, 3, 12))
        return counter.get_total_flops()

    assert 1.95 < work(8192) / work(4096) < 2.05


def test_maps_are_distributions_and_never_tokens_by_tokens():
    model, n = awake(), 300
    out = model(torch.randn(2, n, 12), question=torch.randn(2, 12), passages=torch.randn(2, 5, 12), task="qa", maps=True)
    assert set(out.maps) == {"landmarks", "relevance", "passages", "synthesis", "segments", "tokens", "query"}
    assert out.maps["segments"].shape == (2, 2, 1, len(segment_spans(n, 20, 5)))
    for name, weights in out.maps.items():
        assert weights.shape[-2:] != (n, n) and torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-4), name


def test_backends_agree_in_the_model():
    torch.manual_seed(0)
    x, mask = torch.randn(2, 200, 12), torch.arange(200) < torch.tensor([[200], [33]])
    a, b = (awake(backend=name, segments=False)(x, mask).states for name in ("dense", "chunked"))
    assert (a - b).abs().max() < 1e-4


def test_seed_and_caller_s_random_numbers():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = HybridModel(SMALL, 12), HybridModel(SMALL, 12), HybridModel(SMALL, 12, seed=1)
    assert torch.equal(torch.rand(3), want)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()))


@pytest.mark.parametrize("config", [SMALL, AttentionConfig(**SMALL)], ids=["dict", "dataclass"])
def test_files(config, tmp_path):
    model = HybridModel(config, 12, query="static", tasks=["qa", "other"]).eval()
    model.save_pretrained(tmp_path / "m")
    loaded, x = HybridModel.from_pretrained(tmp_path / "m"), torch.randn(1, 30, 12)
    assert loaded.config() == model.config() and torch.equal(loaded(x).states, model(x).states)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(FileFormatError):
        HybridModel.from_pretrained(tmp_path / "m")


# ---- what is refused

@pytest.mark.parametrize("settings_,kind", [
    ({"window": 3}, UnknownNameError), ({"window_size": -1}, RangeError), ({"window_size": 2.0}, ArgumentError), ({"dropout": 2}, RangeError),
    ({"hidden_size": 30}, ArgumentError), ({"segment_length": 64}, RangeError), ({"num_landmark_tokens": 0}, RangeError),
    ({"hidden_size": None}, ArgumentError), (3, ArgumentError), ({"num_attention_heads": True}, ArgumentError), ({"global_attention_heads": 5}, ArgumentError),
])
def test_bad_settings(settings_, kind):
    with pytest.raises(kind):
        as_config(settings_)
    with pytest.raises(HiernbError):
        HybridModel(settings_, 12)


@pytest.mark.parametrize("arguments", [
    {"dim": 0}, {"dim": "12"}, {"layers": 0}, {"cross_layers": -1}, {"query": "dynamik"}, {"backend": "fast"}, {"tasks": []}, {"seed": 1.5},
], ids=str)
def test_bad_arguments(arguments):
    with pytest.raises(HiernbError):
        HybridModel(SMALL, **({"dim": 12} | arguments))


def test_bad_input():
    model, x = HybridModel(SMALL, 12), torch.zeros(2, 30, 12)
    bad = [{"x": x[0]}, {"x": x[:, :0]}, {"x": x[:0]}, {"mask": torch.ones(2, 30)}, {"mask": torch.ones(2, 29, dtype=torch.bool)}, {"question": x[:, :3]},
           {"question": torch.zeros(2, 11)}, {"passages": torch.zeros(1, 3, 12)}, {"passages": torch.zeros(2, 3, 11)},
           {"passages": torch.zeros(2, 3, 12), "passage_mask": torch.ones(2, 4, dtype=torch.bool)}, {"passage_mask": torch.ones(2, 4, dtype=torch.bool)},
           {"task": "poetry"}, {"task": torch.tensor([0, 9])}, {"task": torch.tensor([0.0, 1.0])}, {"task": torch.tensor([0])}]
    for arguments in bad:
        with pytest.raises(HiernbError):
            model(**({"x": x} | arguments))
    assert model(x, passages=torch.zeros(2, 0, 12)).states.shape == (2, 30, 16)  # no passages are no mistake
    q = torch.zeros(1, 2, 5, 4)
    for arguments in [{"q": q[0]}, {"k": q[..., :2]}, {"window": -1}, {"window": 2.5}, {"prefix": 6}, {"prefix": -1},
                      {"mask": torch.ones(1, 5)}, {"backend": "cuda"}]:
        with pytest.raises(HiernbError):
            hybrid_attention(**({"q": q, "k": q, "v": q, "window": 2} | arguments))
    with pytest.raises(ShapeError):
        DynamicQueryGenerator(12, 16)(torch.zeros(2, 12), torch.zeros(2, 15))
    with pytest.raises(ArgumentError):
        CrossAttention(10, 3)
    assert TASKS[0] == "qa"
