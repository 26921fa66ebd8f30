"""The reader beyond the notebooks: random batches, odd texts, kills, resumed training, SQuAD where it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.encoders import load_encoder
from hiernb.errors import ArgumentError, DamagedFileError, EmptyError
from hiernb.rag.docs_qa import load_docs_qa
from hiernb.rag.hybrid_reader import HybridBody, pack, unpack
from hiernb.rag.qa_data import QAData, answer_spans
from hiernb.rag.reader import ReaderOutput, SpanReader, span_loss
from hiernb.rag.reader_training import Drawing, evaluate_reader, limit_contexts, reader_data, reader_loss, split_data
from hiernb.rag.reading import best_spans, read_answers
from hiernb.rag.token_store import token_store
from hiernb.rag.tokens import FEATURES, ReaderBatch, Surface, TokenText, reader_batch, surface, token_spans, token_texts
from hiernb.training.loop import fit
from hiernb.training.optim import TrainSettings

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "global_attention_heads": 2, "window_size": 4, "segment_length": 6, "window_overlap": 2,
         "num_landmark_tokens": 2, "landmark_stride": 3, "dropout": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(max_length=64, precision="float32")


def random_output(b, p, t, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, p, t, generator=g) < 0.7
    mask[:, 0, 0] = True
    logs = torch.randn(b, p * t + 1, 2, generator=g)
    logs[:, :-1][~mask.flatten(1)] = float("-inf")
    logs = logs.log_softmax(1)
    return ReaderOutput(*(logs[:, :-1, k].unflatten(1, (p, t)) for k in (0, 1)), logs[:, -1])


# ---- spans and loss ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_best_spans_are_all_spans_sorted(b, p, t, width, k, seed):
    out = random_output(b, p, t, seed)
    found = best_spans(out, k, width)
    for q in range(b):
        places = [(n, i, j) for n in range(p) for i in range(t) for j in range(i, min(t, i + width))]
        every = sorted((float(out.start[q, n, i] + out.end[q, n, j]) for n, i, j in places), reverse=True)
        real = found.score[q][found.score[q] > float("-inf")]
        assert torch.allclose(real, torch.tensor([x for x in every if x > float("-inf")][: len(real)]), atol=1e-5)
        for n, i, j, s in zip(*(x[q].tolist() for x in (found.passage, found.start, found.end, found.score))):
            if s > float("-inf"):
                assert 0 <= j - i < width and j < t and s == pytest.approx(float(out.start[q, n, i] + out.end[q, n, j]), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_loss_is_the_sum_over_places(seed):
    out, rng = random_output(3, 2, 6, seed), np.random.default_rng(seed)
    gold = torch.full((3, 3, 3), -1)
    for q in range(2):
        for g in range(int(rng.integers(1, 4))):
            i = int(rng.integers(6))
            gold[q, g] = torch.tensor([int(rng.integers(2)), i, int(rng.integers(i, 6))])
    losses = span_loss(out, gold)
    for q in range(3):
        places = [(n, i, j) for n, i, j in gold[q].tolist() if n >= 0]
        p = sum(float((out.start[q, n, i] + out.end[q, n, j]).exp()) for n, i, j in places) if places else float(out.none[q].sum().exp())
        assert float((-losses[q]).exp()) == pytest.approx(p, rel=1e-4, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_pack_and_unpack(seed):
    g = torch.Generator().manual_seed(seed)
    states, mask = torch.randn(2, 3, 4, 5, generator=g), torch.rand(2, 3, 4, generator=g) < 0.5
    mask[:, 0, 0] = True
    packed, there, order = pack(states, mask)
    for q in range(2):
        assert torch.equal(packed[q][there[q]], states[q][mask[q]])  # in the old order
    assert torch.equal(unpack(packed, there, order, (3, 4)), states * mask[..., None])


@pytest.mark.parametrize("kind", ["transformer", "hybrid"])
def test_padding_and_neighbours_in_the_batch_change_nothing(kind):
    torch.manual_seed(0)
    reader = SpanReader(6, 16, heads=2, body=HybridBody(16, SMALL) if kind == "hybrid" else None).eval()
    plain = lambda n: Surface(np.zeros((n, 5), np.float32), *(np.zeros(n, np.int64),) * 2, np.zeros(n, bool))  # noqa: E731
    texts = [TokenText("x" * n, torch.randn(n, 6), np.stack([np.arange(n), np.arange(1, n + 1)], 1), plain(n)) for n in (5, 9, 3, 7)]
    with torch.no_grad():
        alone = reader(reader_batch(texts[2:3], [texts[:2]]))
        among = reader(reader_batch([texts[3], texts[2]], [[texts[1], texts[3], texts[0]], texts[:2]]))
    assert torch.allclose(alone.start[0].exp(), among.start[1, :2].exp(), atol=2e-5)
    assert torch.allclose(alone.none[0], among.none[1], atol=2e-4)


def test_scores_are_finite_for_large_states():
    torch.manual_seed(0)
    reader = SpanReader(6, 16).eval()
    masks = torch.ones(2, 1, 8, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    b = ReaderBatch(1e4 * torch.randn(2, 1, 8, 6), masks[0], torch.zeros(2, 1, 8, len(FEATURES)), torch.randn(2, 3, 6), masks[1])
    assert all(x.isfinite().all() for x in (reader(b).start, reader(b).end, reader(b).none))


# ---- texts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="aé界 .\n\u0301ß😀Ω-_1", min_size=1, max_size=60))
def test_any_text_has_a_place_for_each_token(encoder, text):
    spans = token_spans(encoder, [text])[0]
    assert len(spans) == len(encoder.tokenizer([text], truncation=True, max_length=64)["input_ids"][0])
    assert (spans >= 0).all() and (spans[:, 1] <= len(text)).all() and (spans[:, 0] <= spans[:, 1]).all()
    assert surface(text, spans).facts.shape == (len(spans), 5)


def test_answers_are_substrings_even_where_the_encoder_cuts(encoder):
    torch.manual_seed(0)
    passages = ["word " * 500, "Été 😀 in 1858.", "a"]
    orders = [passages, passages[::-1]]
    for own, reading in zip(orders, read_answers(SpanReader(encoder.dim, 16), encoder, ["Where?", "What is 1858?"], orders, k=20)):
        assert len(reading.spans) == 20
        assert all(own[s.passage][s.start : s.end] == s.text != "" for s in reading.spans)


def test_reader_of_another_encoder_is_refused(encoder):
    with pytest.raises(ArgumentError, match="trained with"):
        read_answers(SpanReader(encoder.dim, 16, encoder_fingerprint="other"), encoder, ["Where?"], [["Here."]])
    with pytest.raises(EmptyError):
        read_answers(SpanReader(encoder.dim, 16), encoder, ["Where?"], [[]])


# ---- the store -----------------------------------------------------------------------------------------------------


def test_a_killed_writer_leaves_no_half_store(encoder, tmp_path):
    code = f"""
import os, signal
from hiernb.encoders import load_encoder
from hiernb.rag import token_store as t
real = t.np.save
t.np.save = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
t.token_store({str(tmp_path)!r}, load_encoder(max_length=64, precision="float32"), ["Bees.", "Ducks."], progress=False)
"""
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == -9
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    store = token_store(tmp_path, encoder, ["Bees.", "Ducks."], progress=False)
    assert np.allclose(np.float32(store[1].states), token_texts(encoder, ["Ducks."])[0].states.float(), atol=1e-2)


def test_truncated_store_is_damaged(encoder, tmp_path):
    store = token_store(tmp_path, encoder, ["Bees visit lavender."], progress=False)
    data, path = (store.folder / "states.npy").read_bytes(), store.folder / "states.npy"
    path.unlink()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedFileError, match="does not load"):
        token_store(tmp_path, encoder, ["Bees visit lavender."])


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_set(encoder, tmp_path_factory):
    data = limit_contexts(QAData(*_short_docs()), 40)
    return reader_data(data, encoder, tmp_path_factory.mktemp("tokens"), progress=False)


def _short_docs():
    pairs = load_docs_qa(max_words=30, per_text=2)
    q = pairs.train
    keep = range(min(120, len(q)))
    gold = {i: [c] for i, c in q.relevance.tolist()}
    return pairs.contexts.texts, [q.texts[i] for i in keep], [[q.extras["answer"][i]] for i in keep], [gold[i] for i in keep]


def test_resumed_training_is_the_same_bit_for_bit(encoder, small_set, tmp_path):
    def run(folder, steps, interrupt=None):
        torch.manual_seed(0)
        reader = SpanReader(encoder.dim, 16, layers=1)
        loss, n = reader_loss(small_set, Drawing(distractor=0.3, no_answer=0.2))
        settings = TrainSettings(steps=steps, batch_size=8, lr=1e-3, validate_every=100, checkpoint_every=3, device="cpu")

        def stopped(model, positions, step):
            if step == interrupt:
                raise KeyboardInterrupt
            return loss(model, positions, step)

        fit(reader, stopped, n, settings, run_dir=folder, progress=False)
        return reader

    whole = run(tmp_path / "a", 6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", 6, interrupt=4)
    again = run(tmp_path / "b", 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_hybrid_body_learns_too(encoder, small_set):
    torch.manual_seed(0)
    reader = SpanReader(encoder.dim, 16, body=HybridBody(16, SMALL, layers=1), dropout=0.0)
    loss, n = reader_loss(small_set, Drawing(distractor=0.0, no_answer=0.0))
    positions = np.arange(min(16, n))
    first = float(loss(reader, positions, 0)[0].detach())
    optimizer = torch.optim.AdamW(reader.parameters(), lr=5e-3)
    for _ in range(25):
        value, _ = loss(reader, positions, 0)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.6 * first


def test_evaluation_counts_what_cannot_be_found(encoder, tmp_path):
    data = reader_data(QAData(["Bees visit lavender."], ["What?", "Who?"], [["lavender"], ["nobody"]], [[0], [0]]), encoder, tmp_path, progress=False)
    assert data.counts == {"answerable": 1, "unanswerable": 0, "not found": 1}
    assert len(evaluate_reader(SpanReader(encoder.dim, 16), data)) == 2
    with pytest.raises(EmptyError):
        reader_loss(reader_data(QAData(["Bees."], ["Who?"], [["nobody"]], [[0]]), encoder, tmp_path, progress=False))


@pytest.mark.skipif(not (SHARED / "squad" / "contexts.parquet").is_file(), reason="../shared/data/squad is not there")
def test_squad_answers_stand_where_they_are_found(encoder, tmp_path):
    from hiernb.data.pairs import read_pairs

    data = split_data(read_pairs(SHARED / "squad"), "test", encoder, 12, folder=tmp_path, progress=False)
    assert data.counts["unanswerable"] == 0 and data.counts["answerable"] > 20
    for q, places in enumerate(data.spans):
        for c, i, j in places:
            text, spans = data.contexts[c].text, data.contexts[c].spans
            assert data.data.answers[q][0].strip().casefold() in text[spans[i, 0] : spans[j, 1]].casefold()
        assert places == [(c, *s) for c in data.data.gold[q] for s in answer_spans(data.contexts[c], data.data.answers[q])]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="compilation needs a C++ compiler")
def test_compiled_bfloat16_has_finite_gradients():
    "A maximum that a compiled backward pass looks for by its rounded value is not found again."
    torch.manual_seed(0)
    part = SpanReader(384, 96, dropout=0.0).interaction
    part.compile()
    states, there = torch.randn(6, 48, 384), torch.ones(6, 48, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        known, one = part(states, there, torch.zeros(6, 48, len(FEATURES)), states[:, :12], there[:, :12])
    (known.float().square().sum() + one.float().square().sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())
    assert part.w3.grad.abs().sum() > 0
