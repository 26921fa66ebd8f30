"""Grown and pruned trees: level sums, what stays as it was, gradients, bad input, and what lies on disk."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import FileFormatError, HiernbError
from hiernb.frozen import TokenStates
from hiernb.retreever.growth import busiest, grow, prune
from hiernb.retreever.model import Retreever
from hiernb.retreever.no_tree import NoTree
from hiernb.retreever.ragged import GrownTree, ragged_leaves, subtree, under
from hiernb.retreever.sharpness import sharpen
from hiernb.retreever.similarity import ntvd
from hiernb.retreever.split import calibrate
from hiernb.retreever_runs import RetreeverRun, SharpRun
from hiernb.training.growth import fit_growth, growth_loss
from hiernb.training.optim import TrainSettings
from hiernb.training.retrieval import PairVectors
from hiernb.tree import level_of, sum_up

torch.manual_seed(0)
X = F.normalize(torch.randn(40, 8), dim=1)


def a_tree(depth=3, **more) -> Retreever:
    torch.manual_seed(depth)
    tree = Retreever(dim=8, depth=depth, **{"spread": 2.0, "growth": 1.0} | more)
    calibrate(tree.split, X)
    return tree


def is_sound(tree: GrownTree, base: Retreever, pruned: bool) -> None:
    "Everything that must hold of any grown tree."
    leaves = tree.represent(X)
    assert leaves.shape == (40, tree.max_size) and (leaves >= 0).all()
    torch.testing.assert_close(leaves.sum(1), torch.ones(40))
    left = (tree.leaf_nodes + 1.0) / 2.0 ** level_of(tree.leaf_nodes)
    assert (np.diff(left) > 0).all()  # from left to right, none twice
    levels = [tree.assign(X, h).detach() for h in range(tree.depth + 1)]
    for h, at in enumerate(levels):
        torch.testing.assert_close(tree.to_level(leaves, h), at, atol=1e-6, rtol=1e-5)
        if h:
            torch.testing.assert_close(at[:, 0::2] + at[:, 1::2], levels[h - 1], atol=1e-6, rtol=1e-5)
        if not pruned:
            assert torch.equal(at, base.assign_all(X, h))  # bit for bit
    bounds = [ntvd(x, x) for x in (*levels, leaves)]
    assert all((fine <= coarse + 1e-6).all() for coarse, fine in zip(bounds, bounds[1:]))


@settings(max_examples=25, deadline=None)
@given(depth=st.integers(1, 4), data=st.data())
def test_any_sequence_of_growing_and_pruning_keeps_the_sums(depth, data):
    base = a_tree(depth)
    tree, pruned = base, False
    for _ in range(data.draw(st.integers(1, 4))):
        size = tree.max_size
        if isinstance(tree, GrownTree) and data.draw(st.booleans()):
            usage = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)), dtype=torch.float)
            if usage.sum() == 0:
                continue
            tree, pruned = prune(tree, usage, data.draw(st.sampled_from([0.0, 0.05, 0.2, 0.5]))), True
        else:
            leaves = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True))
            tree = grow(tree, leaves, data.draw(st.integers(1, 3)), data.draw(st.sampled_from([None, X])))
    if isinstance(tree, GrownTree):
        is_sound(tree, base, pruned)


@pytest.mark.parametrize("levels, depth", [(1, 1), (3, 2), (6, 5)])
def test_the_other_leaves_do_not_change_and_the_new_ones_hold_the_mass(levels, depth):
    base = a_tree(depth)
    grown, before = grow(base, 1, levels, X), base.assign_all(X)
    after, n = grown.represent(X), 1 << levels
    assert after.shape[1] == (1 << depth) - 1 + n
    assert torch.equal(after[:, :1], before[:, :1]) and torch.equal(after[:, 1 + n :], before[:, 2:])
    torch.testing.assert_close(after[:, 1 : 1 + n].sum(1), before[:, 1])
    assert torch.equal(base.assign_all(X), before) and all(p.requires_grad for p in base.parameters())  # and the tree that was given is as it was


def test_a_pruned_nodes_sibling_takes_the_mass_and_levels_above_stay():
    base = a_tree(3)
    before, usage = [base.assign_all(X, h) for h in range(4)], torch.ones(8)
    usage[5] = 0  # node 12, the right child of node 5
    pruned = prune(base, usage, 0.01)
    assert pruned.closed == [12] and pruned.max_size == 7
    for h in range(3):
        assert torch.equal(pruned.assign(X, h).detach(), before[h])
    torch.testing.assert_close(pruned.assign(X, 3)[:, 4].detach(), before[2][:, 2])
    assert pruned.assign(X, 3)[:, 5].abs().max() == 0
    torch.testing.assert_close(prune(pruned, torch.ones(7), 0.0).represent(X), pruned.represent(X))


def test_a_graft_below_a_closed_node_goes_and_both_children_unused_leave_one():
    base = a_tree(2)
    grown = grow(base, [0, 3], 2, X)
    usage = torch.tensor([0.0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    pruned = prune(grown, usage, 0.05)
    assert [g[0] for g in pruned.layout] == [6]
    assert not any(name.startswith("grafts.3.") for name in pruned.state_dict())
    assert prune(grown, torch.eye(10)[0], 0.5).max_size == 1
    is_sound(prune(grown, torch.eye(10)[0], 0.5), base, True)


def test_gradients_reach_only_the_new_subtree():
    base = a_tree(3)
    first = grow(base, 2, 2, X)
    second = grow(first, 3, 1, X)
    pairs = PairVectors(X, X, torch.arange(40)[:, None].expand(-1, 2))
    growth_loss(pairs)(second, np.arange(20), 0)[0].backward()
    touched = {name for name, p in second.named_parameters() if p.grad is not None}
    assert touched == {f"grafts.{second.layout[1][0]}.{part}" for part in ("weight", "bias")}
    before = {k: v.clone() for k, v in second.state_dict().items()}
    fit_growth(second, pairs, TrainSettings(steps=5, batch_size=20, lr=0.05, device="cpu"), progress=False)
    assert {k for k, v in second.state_dict().items() if not torch.equal(v, before[k])} == touched
    assert torch.equal(second.represent(X, 8), base.assign_all(X))


def test_training_is_continued_to_the_same_weights(tmp_path):
    pairs, results = PairVectors(X, X, torch.arange(40)[:, None].expand(-1, 2)), []
    for steps, folder in ((10, "whole"), (5, "half"), (10, "half")):
        torch.manual_seed(0)
        tree = grow(a_tree(3), 2, 2, X)
        settings = TrainSettings(steps=10, batch_size=20, lr=0.05, decay="constant", warmup=0.0, device="cpu", checkpoint_every=5)
        calls = []

        def stop(model, step, steps=steps, calls=calls):
            calls.append(step)
            if step == steps < 10:
                raise KeyboardInterrupt

        try:
            fit_growth(tree, pairs, settings, run_dir=tmp_path / folder, after_step=stop, progress=False)
        except KeyboardInterrupt:
            continue
        results.append(tree.represent(X))
    assert torch.equal(*results)


@pytest.mark.parametrize("more", [{"propagation": "learned"}, {"split": "mlp"}, {"split_settings": {"aggregation": "tree"}}, {"scales": "shared"}])
def test_other_kinds_of_tree_grow(more, tmp_path):
    base = a_tree(3, **more).eval()
    grown = grow(base, [0, 5], 2, X)
    is_sound(grown, base, False)
    grown.save_pretrained(tmp_path)
    assert torch.equal(GrownTree.from_pretrained(tmp_path).represent(X), grown.represent(X))
    in_graft = prune(grown, torch.tensor([0.0] + [1.0] * 13), 0.01)
    assert len(in_graft.closed) == 1 and level_of(in_graft.closed[0]) == 5
    is_sound(in_graft, base, False)
    if more.get("propagation") == "learned":
        with pytest.raises(HiernbError, match="closed"):
            prune(grown, torch.eye(14)[13], 0.4)


def test_a_tree_over_token_states_grows():
    mask = torch.arange(5) < torch.randint(1, 6, (12, 1))
    states = TokenStates(torch.randn(12, 5, 8) * mask[..., None], mask)
    base = Retreever(dim=8, depth=2, split="cross-attention", split_settings={"heads": 2, "key_dim": 8, "embedding_dim": 8})
    grown = grow(base, 1, 1, states)
    assert grown.reads_tokens and torch.equal(grown.represent(states, 4), base.assign_all(states))
    torch.testing.assert_close(grown.represent(states).sum(1), torch.ones(12))
    with pytest.raises(HiernbError, match="token states"):
        grown.represent(X)


def test_saved_and_loaded(tmp_path):
    tree = prune(grow(grow(a_tree(3), [1, 4], 2, X), 2, 1, X), torch.arange(15.0), 0.02)
    tree.save_pretrained(tmp_path)
    again = GrownTree.from_pretrained(tmp_path)
    assert torch.equal(again.represent(X), tree.represent(X)) and again.config() == tree.config()
    assert not any(p.requires_grad for p in again.base.parameters())
    (tmp_path / "config.json").unlink()  # a save that was killed between its two files
    assert torch.equal(GrownTree.from_pretrained(tmp_path).represent(X), tree.represent(X))


def test_damaged_foreign_and_inconsistent_files_are_refused(tmp_path, refuses_damage):
    tree = grow(a_tree(3), 1, 2, X)
    tree.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    refuses_damage(path, lambda: GrownTree.from_pretrained(tmp_path))
    a_tree(3).save_pretrained(tmp_path / "plain")
    with pytest.raises(FileFormatError, match="retreever"):
        GrownTree.from_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"closed": [7]}))
    with pytest.raises(FileFormatError, match="closed"):
        GrownTree.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda t: grow(t, -1), "leaves"),
        (lambda t: grow(t, 8), "leaves"),
        (lambda t: grow(t, []), "leaves"),
        (lambda t: grow(t, [0.5]), "leaves"),
        (lambda t: grow(t, 0, 17), "levels"),
        (lambda t: grow(t, 0, True), "levels"),
        (lambda t: grow(t, 0, 1, X[:1]), "x"),
        (lambda t: grow(t, 0, 1, X, spread=0.0), "spread"),
        (lambda t: grow(t, 0, 1, X, near=1), "near"),
        (lambda t: grow(t, 0, 1, X * torch.nan), "vectors"),
        (lambda t: grow(t, 0, 1, X[:, :3]), "vectors"),
        (lambda t: prune(t, torch.ones(7), 0.1), "usage"),
        (lambda t: prune(t, torch.zeros(8), 0.1), "usage"),
        (lambda t: prune(t, torch.full((8,), torch.nan), 0.1), "usage"),
        (lambda t: prune(t, -torch.ones(8), 0.1), "usage"),
        (lambda t: prune(t, torch.ones(8), 0.51), "min_share"),
        (lambda t: prune(t, torch.ones(8), -0.1), "min_share"),
        (lambda t: busiest(torch.zeros(0, 8)), "assignments"),
        (lambda t: busiest(torch.ones(2, 8), 1.5), "share"),
        (lambda t: grow(NoTree(dim=8, depth=3), 0), "model"),
        (lambda t: GrownTree(t.config(), [[7, 1, 1.0], [7, 1, 1.0]]), "grafts"),
        (lambda t: GrownTree(t.config(), [[3, 1, 1.0]]), "grafts"),
        (lambda t: GrownTree(t.config(), closed=[0]), "closed"),
        (lambda t: GrownTree(t.config(), closed=[3, 8]), "closed"),
        (lambda t: fit_growth(grow(t, 0).requires_grad_(False), None), "model"),
        (lambda t: sharpen(t, 0.0), "temperature"),
        (lambda t: SharpRun(entropy=-1.0), "entropy"),
    ],
)
def test_bad_input_is_refused_by_name(call, named):
    with pytest.raises(HiernbError, match=f"`{named}`"):
        call(a_tree(3))


def test_a_leaf_grown_as_deep_as_it_goes():
    tree = a_tree(1)
    with pytest.raises(HiernbError, match="levels"):
        for _ in range(10):
            tree = grow(tree, 0, 8)
    assert level_of(tree.leaf_nodes).max() == 33
    torch.testing.assert_close(tree.represent(X).sum(1), torch.ones(40))


def test_layout_against_a_walk():
    "Naive: walk down from the root, left child first."
    grafts, closed = [(4, 2), (20, 1)], [10, 6]
    splits = {n for g in [(0, 2), *grafts] for n in subtree(*g)[0].tolist()}

    def walk(node):
        if node in closed:
            return []
        return walk(2 * node + 1) + walk(2 * node + 2) if node in splits else [node]

    assert ragged_leaves(2, grafts, closed)[1].tolist() == walk(0)
    nodes = np.arange(63)
    naive = [any(top in {((n + 1) >> h) - 1 for h in range(7)} for top in (4, 20)) for n in nodes]
    assert under(nodes, [4, 20]).tolist() == naive


def test_runs_without_a_penalty_keep_their_parameters():
    assert set(vars(SharpRun())) - set(vars(RetreeverRun())) == {"entropy"}
    before = a_tree(3).assign_all(X)
    sharp = sharpen(a_tree(3), 0.5).assign_all(X)
    assert torch.special.entr(sharp).sum(1).mean() < torch.special.entr(before).sum(1).mean()
    torch.testing.assert_close(sum_up(sharp, 0), torch.ones(40, 1))
