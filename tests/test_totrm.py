"""ToTRM across its rooms: properties of merges, slots, the recursion's gradients, resuming, files."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import ArgumentError, FileFormatError, HiernbError, NotFiniteError, RangeError, ShapeError, UnknownNameError
from hiernb.files import write_tensors
from hiernb.totrm.block import Network, PositionMixer
from hiernb.totrm.branch import Branch, diversity_loss
from hiernb.totrm.merge import MERGES, make_merge
from hiernb.totrm.model import ToTRM, totrm_loss
from hiernb.totrm.recursion import Recursion, latent_steps
from hiernb.totrm.settings import CHOICES, ToTRMSettings, trm
from hiernb.totrm.solve import solve, think
from hiernb.totrm.stablemax import log_stablemax, stablemax_cross_entropy
from hiernb.training.state import flatten_state, unflatten_state

SIZES = {"vocab_size": 6, "cells": 16, "hidden": 16, "heads": 2, "puzzle_positions": 2, "multiple": 16}
SMALL = SIZES | {"H_cycles": 2, "L_cycles": 3, "halt_max_steps": 4}
PLAIN = [(name, cross) for name in MERGES for cross in (0, 2)]


def boards(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    "Solved 4×4 boards with six empty cells."
    g = torch.Generator().manual_seed(seed)
    r, c = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    grid = ((c + 2 * (r % 2) + r // 2) % 4).flatten()
    labels = torch.stack([torch.randperm(4, generator=g)[grid] for _ in range(n)]) + 2
    return {"inputs": torch.where(torch.rand(n, 16, generator=g).argsort(1) < 6, 1, labels), "labels": labels}


def small(**changes) -> ToTRM:
    "A tiny model with fixed weights, its Q head awake."
    torch.manual_seed(0)
    model = ToTRM(ToTRMSettings(**(SMALL | {"branching_steps": 2} | changes)))
    with torch.no_grad():
        model.q_head.weight.normal_(std=0.5)
    return model


# ---- merges

@pytest.mark.parametrize("name,cross", PLAIN)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_merges_keep_their_promises(name, cross, data):
    width, seed = data.draw(st.sampled_from([1, 2, 3, 4, 8])), data.draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    size = data.draw(st.sampled_from([1e-3, 1.0, 1e3]))
    z = (size * torch.randn(2, width, 3, 8)).requires_grad_()
    merge = make_merge(name, 8, 8, cross_heads=cross)
    out = merge(z)
    assert out.shape == (2, 3, 8) and torch.isfinite(out).all()
    if width == 1:
        assert torch.equal(out, z[:, 0])
    scale = z.detach().abs().max()
    if name != "learned_weighted":
        assert (merge(z[:, torch.randperm(width)]) - out).abs().max() <= 1e-3 * scale
    grads = torch.autograd.grad(out.square().sum(), [z, *(merge.parameters() if width > 1 else [])])
    assert all(torch.isfinite(g).all() for g in grads)
    if size <= 1:  # at 1000 a softmax is one-hot, and its queries have nothing to learn; normalised states never are that large
        assert all(g.abs().sum() > 0 for g in grads)
    if name in ("mean", "max", "learned_weighted", "hierarchical_attention") and not cross:  # inside the span of the branches
        assert (out <= z.amax(1) + 1e-4 * scale).all() and (out >= z.amin(1) - 1e-4 * scale).all()


@pytest.mark.parametrize("name,cross", PLAIN)
def test_merges_in_bfloat16(name, cross):
    torch.manual_seed(0)
    z, merge = torch.randn(4, 8, 16, 32).bfloat16(), make_merge(name, 32, 8, cross_heads=cross)
    want = merge(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = z.clone().requires_grad_()
        got = merge(leaf)
    assert got.dtype == torch.bfloat16
    got.float().square().sum().backward()
    assert torch.isfinite(leaf.grad).all()
    if "geometric" in name:  # its sign jumps where branches cancel; the magnitudes are those of the definition
        assert ((got.float().abs() - want.abs()).norm() / want.norm()) < 0.05
    else:
        assert ((got.float() - want).norm() / want.norm()) < 0.03


@pytest.mark.parametrize("name,cross", PLAIN)
def test_merges_refuse(name, cross):
    merge = make_merge(name, 8, 4, cross_heads=cross)
    for bad in (torch.zeros(2, 4, 8), torch.zeros(8), torch.zeros(1, 2, 4, 3, 8), [[1.0]], None):
        with pytest.raises(ShapeError, match="`z`"):
            merge(bad)
    for value in (float("nan"), float("inf"), -float("inf")):
        z = torch.zeros(2, 4, 3, 8)
        z[1, 2, 0, 5] = value
        with pytest.raises(NotFiniteError, match="1 values"):
            merge(z)
    with pytest.raises(RangeError):
        merge(torch.zeros(2, 0, 3, 8))
    if name == "learned_weighted":
        with pytest.raises(RangeError, match="from 1 to 4"):
            merge(torch.zeros(2, 8, 3, 8))


# ---- the network, branching, the loss

def test_position_mixer_is_blind_to_features_and_attention_to_other_samples():
    torch.manual_seed(0)
    h, mixer = torch.randn(3, 5, 8), PositionMixer(5, multiple=8)
    order = torch.randperm(8)
    assert torch.allclose(mixer(h[..., order]), mixer(h)[..., order], atol=1e-6)
    f = Network(8, 5, heads=2, multiple=8)
    assert torch.allclose(f(h, 0 * h)[1], f(h[1:2], 0 * h[1:2])[0], atol=1e-5)


@given(st.integers(2, 6), st.integers(0, 1000), st.floats(-0.5, 0.5))
@settings(max_examples=20, deadline=None)
def test_diversity_is_between_zero_and_its_largest(width, seed, margin):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2, width, 3, 4, generator=g)
    loss = diversity_loss(z, margin)
    assert 0 <= loss <= (1 - margin) ** 2 + 1e-5
    assert torch.allclose(diversity_loss(z[:, torch.randperm(width)], margin), loss, atol=1e-5)
    assert torch.allclose(diversity_loss(7 * z, margin), loss, atol=1e-5)  # lengths do not count
    assert torch.isfinite(diversity_loss(0 * z, margin))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=8))
@settings(max_examples=100, deadline=None)
def test_stablemax_is_a_distribution_in_the_order_of_its_logits(values):
    x = torch.tensor(values)
    log_p = log_stablemax(x)
    assert torch.isfinite(log_p).all() and abs(log_p.exp().sum().item() - 1) < 1e-4
    order = x.argsort()
    assert (log_p[order].diff() >= -1e-5).all()


def test_cross_entropy_gradient_is_zero_where_nothing_is_asked():
    logits, labels = torch.randn(2, 4, 6, requires_grad=True), torch.randint(1, 6, (2, 4))
    labels[0, 1] = 0
    stablemax_cross_entropy(logits, labels, ignore=0).sum().backward()
    assert (logits.grad[0, 1] == 0).all() and (logits.grad[0, 0] != 0).any()


# ---- the recursion

@pytest.mark.parametrize("merge", CHOICES)
@pytest.mark.parametrize("keep", [False, True])
def test_only_the_last_cycle_has_gradients(merge, keep):
    """The gradient equals that of the last cycle alone, started from the states that the cycles before it left behind."""
    model = small(merge=merge, keep_latent=keep)
    r, x = model.recursion, torch.randn(2, 18, 16)
    z = torch.randn(2, 18, 16)
    weights = list(r.parameters())
    whole = torch.autograd.grad(r(z, z, x).z_H.square().sum(), weights)
    if r.selects:  # the cycles before are those of a narrow tree
        before = Recursion(r.network, 1, 3, keep_latent=keep)(z, z, x)
    else:
        before = Recursion(r.network, 1, 3, r.branch, r.merge, keep)(z, z, x)
    last = Recursion(r.network, 1, 3, r.branch, r.merge, keep)(before.z_H[:, 0].detach(), before.z_L[:, 0].detach(), x)
    for a, b in zip(whole, torch.autograd.grad(last.z_H.square().sum(), weights)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_mixed_precision_keeps_every_gradient():
    model, batch = small(merge="hierarchical_attention"), boards(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        carry, answer = model.step(model.initial_carry(batch), batch)
        loss, _ = totrm_loss(model.settings, answer, carry)
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or p.grad.abs().sum() == 0]
    assert missing == [] and answer.logits.dtype == torch.bfloat16 and loss.dtype == torch.float32


@pytest.mark.parametrize("merge", ["hierarchical_attention", "select_residual"])
def test_the_recursion_is_one_graph(merge):
    "A compiler sees the whole step without a break, and its gradients are the same."
    model, batch = small(merge=merge, layers=1, L_cycles=2, branching_steps=1), boards(4)
    _, plain = model.step(model.initial_carry(batch), batch)
    plain.logits.sum().backward()
    want = [p.grad.clone() for p in model.recursion.parameters() if p.grad is not None]
    model.zero_grad()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.recursion.compile(backend="eager", fullgraph=True)
        _, compiled = model.step(model.initial_carry(batch), batch)
        compiled.logits.sum().backward()
    assert torch.allclose(plain.logits, compiled.logits, atol=1e-4)
    for a, b in zip(want, [p.grad for p in model.recursion.parameters() if p.grad is not None], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@given(st.integers(1, 4), st.integers(1, 6), st.data())
@settings(max_examples=30, deadline=None)
def test_work_is_the_sum_over_cycles(H, L, data):
    s = data.draw(st.integers(0, L))
    states, width = 0, 1
    for step in range(L):
        states, width = states + width, width * 2 if step < s else width
    assert latent_steps(H, L, s) == H * (states + 1)
    assert latent_steps(H, L, s, select=True) == (H - 1) * (L + 1) + states + width


# ---- slots

@pytest.mark.parametrize("merge", ["mean", "hierarchical_attention", "select_q"])
def test_slots_do_not_know_each_other(merge):
    model, batch = small(merge=merge, mixer="mlp").eval(), boards(6)
    with torch.no_grad():
        carry = model.initial_carry(batch)
        for _ in range(2):
            carry, together = model.step(carry, batch)
        for i in range(6):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            carry = model.initial_carry(one)
            for _ in range(2):
                carry, alone = model.step(carry, one)
            assert torch.allclose(alone.logits[0], together.logits[i], atol=1e-2)


def test_slots_take_every_puzzle_to_its_end():
    "Each slot keeps its puzzle until it halts, then takes the one that is offered; clocks start at one."
    model, carry, held, steps = small(merge="mean"), None, None, torch.zeros(8, dtype=torch.int32)
    for i in range(12):
        batch = boards(8, seed=i)
        before = carry
        with torch.no_grad():
            carry, _ = model.step(carry or model.initial_carry(batch), batch)
        fresh = torch.ones(8, dtype=torch.bool) if before is None else before.halted
        held = batch["inputs"] if held is None else torch.where(fresh[:, None], batch["inputs"], held)
        steps = torch.where(fresh, 1, steps + 1)
        assert torch.equal(carry.data["inputs"], held) and torch.equal(carry.steps, steps.int())
        assert carry.halted[carry.steps >= 4].all() and carry.steps.max() <= 4


@pytest.mark.parametrize("merge", ["learned_weighted", "select_q"])
def test_resuming_is_exact(merge, tmp_path):
    "Weights, optimiser, carry, puzzle table and random numbers through files: the next steps are the same bit for bit."
    def run(model, optimizer, carry, first, last):
        losses = []
        for i in range(first, last):
            batch = boards(8, seed=i)
            batch["groups"] = torch.arange(8) % 3
            carry, answer = model.step(carry or model.initial_carry(batch), batch)
            loss, _ = totrm_loss(model.settings, answer, carry)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.puzzles.apply_gradient(*model.puzzles.take_gradient(), lr=0.01, weight_decay=0.1)
            losses.append(loss.item())
        return losses, carry

    def new():
        model = small(merge=merge, n_groups=3, start_spread=0.5, branch_noise=0.05)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = new()
    _, carry = run(model, optimizer, None, 0, 5)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "carry": carry.state_dict(), "random": torch.get_rng_state()}
    tensors, skeleton = flatten_state(state)
    state = unflatten_state(tensors, json.loads(json.dumps(skeleton)))  # copies, as a file would hold
    want, _ = run(model, optimizer, carry, 5, 9)
    again, optimizer = new()
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    batch = boards(8) | {"groups": torch.zeros(8, dtype=torch.long)}
    carry = again.initial_carry(batch)
    carry.load_state_dict(state["carry"])
    torch.set_rng_state(state["random"])
    got, _ = run(again, optimizer, carry, 5, 9)
    assert got == want
    assert torch.equal(again.puzzles.weight, model.puzzles.weight)


# ---- files

SAVED = [{"merge": m} for m in CHOICES]
SAVED += [{"merge": "hierarchical_attention", "merge_settings": {"heads": 2, "cross_heads": 2}}, {"branching_steps": 0}]


@pytest.mark.parametrize("changes", SAVED)
def test_a_saved_model_answers_the_same(changes, tmp_path):
    model = small(**changes).eval()
    model.save_pretrained(tmp_path / "m")
    again = ToTRM.from_pretrained(tmp_path / "m")
    assert again.settings == model.settings
    inputs = boards(5)["inputs"]
    for (a, _), (b, _) in zip(think(model, {"inputs": inputs}), think(again, {"inputs": inputs}), strict=True):
        assert torch.equal(a.logits, b.logits) and torch.equal(a.q, b.q)
    assert torch.equal(solve(again, inputs, starts=2).tokens, solve(model, inputs, starts=2).tokens)


def test_bad_checkpoints_are_refused(tmp_path):
    model, folder = small(), tmp_path / "m"
    model.save_pretrained(folder)
    weights, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    for cut in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError):
            ToTRM.from_pretrained(folder)
    write_tensors(weights, model.state_dict(), kind="retreever", meta=model.config())
    with pytest.raises(FileFormatError, match="totrm"):
        ToTRM.from_pretrained(folder)
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["hidden"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match="saved with settings"):
        ToTRM.from_pretrained(folder)
    weights.unlink()
    with pytest.raises((FileNotFoundError, HiernbError)):
        ToTRM.from_pretrained(folder)


def test_bad_puzzles_are_refused():
    model, inputs = small(task="sudoku"), boards(3)["inputs"]
    with pytest.raises(ShapeError, match="`inputs`"):
        solve(model, inputs[:, :9])
    for bad in (-1, 6, 1000):
        with pytest.raises(RangeError, match="integers from 0 to 5"):
            solve(model, inputs.clone().fill_(bad))
    with pytest.raises(ArgumentError, match="'sudoku'"):
        model.check_puzzles({"inputs": inputs}, task="rubik")
    with pytest.raises(RangeError, match="`groups`"):
        model.check_puzzles({"inputs": inputs, "groups": torch.tensor([0, 0, 1])})
    with pytest.raises(ArgumentError, match="the entries"):
        model.step(model.initial_carry({"inputs": inputs}), boards(3))


@pytest.mark.parametrize("changes,error", [
    ({"hidden": 0}, RangeError), ({"hidden": 15}, ShapeError), ({"merge": "meen"}, UnknownNameError), ({"mixer": "conv"}, UnknownNameError),
    ({"branching_steps": 4}, RangeError), ({"branching_steps": -1}, RangeError), ({"L_cycles": 2.5}, ArgumentError),
    ({"expansion": float("nan")}, ArgumentError),
    ({"merge_settings": {"head": 2}, "merge": "hierarchical_attention"}, UnknownNameError), ({"merge_settings": [1]}, ArgumentError),
    ({"halt_exploration": -0.1}, RangeError), ({"diversity_margin": 2}, RangeError), ({"puzzle_dim": 33}, RangeError), ({"heads": 16}, ArgumentError),
])
def test_bad_settings_are_refused(changes, error):
    with pytest.raises(error):
        small(**changes)


def test_unknown_settings_are_named():
    with pytest.raises(UnknownNameError, match="did you mean 'hidden'"):
        ToTRM({"hiden": 16})
    assert ToTRM(asdict(trm(**SMALL))).settings == trm(**SMALL)


def test_many_branches_need_little_memory_for_diversity():
    "Nothing that the backward pass keeps is larger than the cosines, besides the branches themselves."
    z, kept = torch.randn(2, 16, 20, 32, requires_grad=True), {}

    def keep(t):
        if t.untyped_storage().data_ptr() != z.untyped_storage().data_ptr():
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = diversity_loss(z)
    assert max(kept.values()) <= 4 * 2 * 16 * 16
    loss.backward()


def test_branches_with_noise_differ_and_can_be_repeated():
    branch, z = Branch(8, steps=2, noise=0.3), torch.randn(2, 1, 3, 8)
    torch.manual_seed(1)
    first = branch(z)
    torch.manual_seed(1)
    assert torch.equal(branch(z), first) and not torch.equal(branch(z), first)


def test_a_real_nine_by_nine_board():
    path = Path(__file__).parents[2] / "shared" / "data" / "sudoku" / "sudoku.parquet"
    if not path.exists():
        pytest.skip(f"no {path}")
    import pyarrow.parquet as pq

    table = pq.read_table(path).slice(0, 4).to_pydict()
    column = next(k for k, v in table.items() if isinstance(v[0], str) and len(v[0]) == 81)
    tokens = torch.tensor([[1 if c in ".0" else 1 + int(c) for c in row] for row in table[column]])
    torch.manual_seed(0)
    model = ToTRM(trm(hidden=16, heads=2, multiple=16, H_cycles=1, L_cycles=1, mixer="mlp"))
    assert solve(model, tokens, steps=2).tokens.shape == (4, 81)
