"The teacher: tokenizer, masks, attention taken out of any model, damaged folders, training that continues."

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import hiernb.teacher.mlm as mlm
from hiernb.data.text import load_text
from hiernb.errors import ArgumentError, DamagedFileError, EmptyError, FileFormatError, HiernbError, ShapeError
from hiernb.teacher.attention import attention_layers, attention_rows, tapped, visit_attention
from hiernb.teacher.masking import Masking, TokenStream, choose, token_stream
from hiernb.teacher.mlm import TeacherSettings, load_teacher, masked_loss, new_teacher, random_teacher, save_teacher
from hiernb.teacher.tokenizer import SPECIAL, load_tokenizer, save_tokenizer, train_tokenizer
from hiernb.training.loop import fit
from hiernb.training.mlm import HeldOut, TeacherRun, lengths_of_steps, mlm_loss
from hiernb.training.optim import TrainSettings

FAST = settings(max_examples=40, deadline=None)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = "the attention of a query over all keys is a distribution whose mass a summary must find again".split()
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 60)) + ".\n" for i in range(80)]
TOKENIZER = train_tokenizer(TEXTS, 300)
STREAM = token_stream(TEXTS, TOKENIZER)
SMALL = TeacherSettings(depth=1, vocab_size=len(TOKENIZER), dim=16, heads=2)


pytestmark = pytest.mark.usefixtures("one_thread")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---------------------------------------------------------------- tokenizer


@FAST
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_byte_level_gives_every_text_back(text):
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text
    stream = token_stream([text, text], TOKENIZER)
    assert stream.ids[-1] == TOKENIZER.sep_token_id and stream.starts[-1] and stream.starts[0]


def test_a_vocabulary_depends_on_the_training_text_only(tmp_path):
    save_tokenizer(TOKENIZER, tmp_path)
    first = (tmp_path / "tokenizer.json").read_bytes()
    save_tokenizer(train_tokenizer(list(TEXTS), 300), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"version": "1.0"}', '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FileFormatError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- masks


@FAST
@given(n=st.integers(1, 500), length=st.integers(1, 70))
def test_rows_put_together_are_the_stream(n, length):
    stream = TokenStream(np.arange(n, dtype=np.uint16), np.arange(n) % 3 == 0)
    whole = stream.n_rows(length)
    ids, starts = stream.rows(np.arange(whole), length)
    assert ids.flatten().tolist() == list(range(whole * length)) and starts.flatten().tolist() == [i % 3 == 0 for i in range(whole * length)]
    for bad in ([whole], [-1]):
        with pytest.raises(HiernbError):
            stream.rows(np.array(bad), length)


@FAST
@given(b=st.integers(1, 4), n=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_whole_words_go_together(b, n, share, seed):
    g = torch.Generator().manual_seed(seed)
    ids, starts = torch.randint(0, 12, (b, n), generator=g), torch.rand(b, n, generator=g) < 0.5
    special = torch.arange(5)
    starts |= torch.isin(ids, special)
    starts[:, 1:] |= torch.isin(ids[:, :-1], special)
    chosen = choose(ids, special, share, torch.Generator().manual_seed(seed), starts)
    assert not (chosen & (ids < 5)).any() and chosen.any() == (ids >= 5).any()
    for row in range(b):  # naive: walk along the words
        for i in range(1, n):
            if not starts[row, i]:
                assert chosen[row, i] == chosen[row, i - 1]


@FAST
@given(share=st.floats(0.05, 0.9), mask=st.floats(0, 1), part=st.floats(0, 1), words=st.booleans(), seed=st.integers(0, 9))
def test_rates_are_those_asked_for(share, mask, part, words, seed):
    masking = Masking(TOKENIZER, share, words, mask, (1 - mask) * part)
    ids, starts = STREAM.rows(np.arange(STREAM.n_rows(64)), 64)
    inputs, labels = masking(ids, seed, starts)
    chosen = labels != -100
    assert torch.equal(torch.where(chosen, labels, inputs), ids)
    words_drawn = int((starts & ~torch.isin(ids, masking.special)).sum())
    spread = math.sqrt(share * (1 - share) / words_drawn)
    assert chosen[~torch.isin(ids, masking.special)].float().mean().item() == pytest.approx(share, abs=6 * spread + 0.02)
    error = 6 * math.sqrt(0.25 / int(chosen.sum()))
    assert (inputs[chosen] == TOKENIZER.mask_token_id).float().mean().item() == pytest.approx(mask, abs=error + 0.01)
    assert (inputs[chosen] == ids[chosen]).float().mean().item() == pytest.approx((1 - mask) * (1 - part), abs=error + 0.01)


def test_masks_neither_use_nor_change_the_global_generators():
    ids, starts = STREAM.rows(np.arange(4), 32)
    masking = Masking(TOKENIZER)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = masking(ids, (1, 2))
    torch.manual_seed(2)
    assert torch.equal(masking(ids, (1, 2))[0], first[0])
    torch.manual_seed(1)
    masking(ids, (1, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tokenizer_must_say_where_words_begin():
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    for call in (lambda: token_stream(TEXTS, bare), lambda: Masking(bare)):
        with pytest.raises(ArgumentError, match="tokenizer"):
            call()


# ---------------------------------------------------------------- attention

BASE = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0}
OTHERS = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BASE)),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**BASE)),
    "electra": lambda: transformers.ElectraForMaskedLM(transformers.ElectraConfig(**BASE, embedding_size=8)),
    "xlm-roberta": lambda: transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**BASE)),
    "modernbert": lambda: random_teacher(TeacherSettings(depth=2, vocab_size=60, dim=16, heads=2)).model,
}


@pytest.mark.parametrize("name", OTHERS)
def test_rows_are_those_of_eager_attention(name):
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    ids = torch.randint(5, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(11) < torch.tensor([[11], [7]])
    positions = torch.tensor([[0, 10, 3], [6, 2, 2]])
    rows = attention_rows(model, ids, positions, mask=mask)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    assert list(rows) == [0, 1]
    for layer, a in rows.items():
        for text in (0, 1):
            assert torch.allclose(a[text], plain[layer][text][:, positions[text]], atol=1e-6)
        assert torch.allclose(a.sum(-1), torch.ones(a.shape[:-1]), atol=1e-5) and (a[1, ..., 7:] == 0).all()


@pytest.mark.parametrize("name", OTHERS)
def test_an_attention_computed_outside_gives_the_same_logits(name):
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    ids = torch.randint(5, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with tapped(model, lambda layer: layer.outputs()):
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
        assert torch.equal(model(input_ids=ids).logits, expected)  # nothing is left behind
    assert model.config._attn_implementation != "hiernb_tap" and not any(m._forward_pre_hooks for m in model.modules())


def test_a_failing_listener_leaves_the_model_as_it_was():
    model = random_teacher(SMALL).model
    ids = torch.randint(5, 60, (1, 9))
    with pytest.raises(ZeroDivisionError):
        visit_attention(model, ids, lambda layer: 1 / 0)
    assert model.config._attn_implementation == "sdpa" and not any(m._forward_pre_hooks for m in model.modules())
    assert len(attention_layers(model, ids)) == 1


def test_causal_and_closed_models_are_refused():
    ids = torch.randint(5, 60, (1, 9))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    roformer = transformers.RoFormerForMaskedLM(transformers.RoFormerConfig(**BASE))
    for model in (gpt2, roformer):
        with pytest.raises(ArgumentError, match="model"):
            attention_layers(model, ids)


class Largest(TorchDispatchMode):
    "Notes the size of the largest tensor that is made."

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() // x.element_size() >= x.numel():
                self.size = max(self.size, x.numel())
        return out


def test_no_square_matrix_is_made():
    n = 1024
    model = random_teacher(TeacherSettings(depth=2, vocab_size=60, dim=16, heads=2)).model
    ids = torch.randint(5, 60, (1, n))
    with Largest() as largest:
        attention_rows(model, ids, torch.arange(4))
    assert largest.size < n * n / 4
    with Largest() as largest:
        attention_rows(model, ids, torch.arange(n))
    assert largest.size >= n * n  # the counter sees one where there is one


@pytest.mark.parametrize("ids", [torch.zeros(0, 5, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long), torch.zeros(5, dtype=torch.long)])
def test_no_tokens_no_attention(ids):
    with pytest.raises(ShapeError, match="ids"):
        attention_layers(random_teacher(SMALL).model, ids)


def test_one_token_looks_at_itself():
    rows = attention_rows(random_teacher(SMALL).model, torch.tensor([[9]]), torch.tensor([0]))
    assert rows[0].tolist() == [[[[1.0]], [[1.0]]]]


def test_half_precision_gives_rows_in_float32():
    model = random_teacher(SMALL).model.bfloat16()
    rows = attention_rows(model, torch.randint(5, 60, (1, 9)), torch.arange(9))[0]
    assert rows.dtype == torch.float32 and torch.allclose(rows.sum(-1), torch.ones(1, 2, 9), atol=1e-5)


# ---------------------------------------------------------------- folders


def test_what_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="name"):
        load_teacher(tmp_path)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ArgumentError, match="masked"):
        load_teacher(tmp_path / "gpt2")
    save_teacher(new_teacher(SMALL, tokenizer=TOKENIZER), tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text("{")
    with pytest.raises(HiernbError):
        load_teacher(tmp_path / "t")


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_cut_off_weights_are_named(tmp_path, cut):
    save_teacher(new_teacher(SMALL, tokenizer=TOKENIZER), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedFileError):
        load_teacher(tmp_path)


def test_a_failed_save_leaves_the_old_teacher(tmp_path, monkeypatch):
    old = new_teacher(SMALL, tokenizer=TOKENIZER)
    save_teacher(old, tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlm, "save_tokenizer", full)
    with pytest.raises(OSError, match="No space"):
        save_teacher(new_teacher(SMALL, 1, TOKENIZER), tmp_path)
    assert torch.equal(weights(load_teacher(tmp_path).model), weights(old.model))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_run_folder_with_more_in_its_config_loads(tmp_path):
    save_teacher(new_teacher(SMALL, tokenizer=TOKENIZER), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"run": {"lengths": [1, 2]}}))
    assert load_teacher(tmp_path).dim == 16


# ---------------------------------------------------------------- training


@FAST
@given(steps=st.integers(1, 400), a=st.floats(0, 1), b=st.floats(0, 1), start=st.floats(0, 1), more=st.floats(0, 1))
def test_lengths_keep_their_shares(steps, a, b, start, more):
    a, b = a / 2, b / 2
    later = start + (1 - start) * more
    found = lengths_of_steps(steps, (8, 16, 64), (1 - a - b, a, b), (0, start, later))
    assert len(found) == steps and set(found) <= {8, 16, 64}
    assert (found[: math.ceil(start * steps)] == 8).all() and (found[: math.ceil(later * steps)] < 64).all()
    room = steps - math.ceil(start * steps)
    assert (found == 16).sum() == min(round(a * steps), room)


def stop_at(n):
    def after(model, done):
        if done == n:
            raise KeyboardInterrupt

    return after


@pytest.mark.parametrize("words", [False, True])
def test_a_continued_training_ends_in_the_same_weights(tmp_path, words):
    masking = Masking(TOKENIZER, whole_words=words)
    options = TrainSettings(steps=12, batch_size=8, lr=1e-2, device="cpu", validate_every=4, log_every=4)
    lengths = lengths_of_steps(12, (16, 64), (0.5, 0.5), (0, 0.25))
    judge = HeldOut(STREAM, masking, (16, 64), tokens=256)

    def run(folder, after=None, prefetch=0):
        model = new_teacher(SMALL, tokenizer=TOKENIZER).model
        loss = mlm_loss(STREAM, masking, lengths, gaps=0.5)
        fit(model, loss, STREAM.n_rows(16), replace(options, prefetch=prefetch), validate=judge, better="min", run_dir=folder, after_step=after, progress=False)
        return weights(model)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at(6))
    assert torch.equal(run(tmp_path / "parts", prefetch=2), whole)  # the rest with batches made ahead
    assert not torch.equal(whole, weights(new_teacher(SMALL, tokenizer=TOKENIZER).model))


def test_held_out_figures_count_every_masked_token_once():
    judge = HeldOut(STREAM, Masking(TOKENIZER), (8, 32, 64), tokens=512, batch_tokens=96)
    model = new_teacher(SMALL, tokenizer=TOKENIZER).model
    for n in (8, 32, 64):
        with torch.no_grad():
            naive = [masked_loss(model, x[None], y[None]) for x, y in zip(judge.inputs.view(-1, n), judge.labels.view(-1, n))]
        total = sum(float(v) * len(g) for v, g in naive)
        assert judge.scores(model, n)[0] == pytest.approx(total / judge.n_masked, abs=1e-4)
        assert judge.scores(model, n)[1] == sum(int(g.sum()) for _, g in naive) / judge.n_masked
    assert judge(model)["perplexity@64"] == pytest.approx(math.exp(judge(model)["loss@64"]))


@pytest.mark.parametrize(
    "bad", [{"corpus": ""}, {"kind": "char"}, {"masked": 2.0}, {"steps": 0}, {"shares": [1.0]}, {"lengths": []}, {"starts": [0.5, 0.6, 0.7]},
            {"vocab_size": 3}, {"gaps": -1.0}, {"precision": "int8"}, {"tested": 1}, {"decay": "none"}, {"depth": -1}, {"theta": 0.0}]
)
def test_bad_parameters_are_named(bad):
    with pytest.raises(ArgumentError) as e:
        TeacherRun(**bad)
    assert e.value.argument == next(iter(bad))


def test_too_little_text_is_said_before_training():
    short = token_stream(TEXTS[:1], TOKENIZER)
    with pytest.raises(EmptyError, match="stream"):
        mlm_loss(short, Masking(TOKENIZER), np.array([16, 4096]))
    with pytest.raises(EmptyError, match="stream"):
        HeldOut(short, Masking(TOKENIZER), (4096,))


def test_shared_text_makes_a_stream():
    if not (SHARED / "wiki_text").is_dir():
        pytest.skip("../shared/data/wiki_text is not there")
    texts = load_text(SHARED / "wiki_text", max_chars=200_000)
    tokenizer = train_tokenizer(texts.train, 1000)
    assert len(tokenizer) == 1000 and tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3, 4]
    stream = token_stream(texts.validation, tokenizer)
    assert tokenizer.decode(stream.ids[: stream.ids.tolist().index(3)]) == texts.validation[0]
