"""Splits, aggregations and propagations: properties over many trees, many inputs, and many bad arguments."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.errors import HiernbError, NotFiniteError
from hiernb.frozen import TokenStates
from hiernb.retreever.aggregation import AGGREGATIONS, NodeScorer, TreeRefine
from hiernb.retreever.cross_attention import CrossAttentionSplit
from hiernb.retreever.propagation import PROPAGATIONS, LearnedPropagation, ProductPropagation
from hiernb.retreever.split import SPLITS, calibrate
from hiernb.tree import level_of, n_splits, sum_up

EVERY = [(name, aggregation) for name, cls in SPLITS.items() for aggregation in cls.aggregations]


def stir(module: torch.nn.Module) -> torch.nn.Module:
    "Random values everywhere, so that nothing is at its start."
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module.eval()


def small(name: str, depth: int, **kwargs) -> torch.nn.Module:
    if name == "cross-attention":
        kwargs = {"heads": 2, "key_dim": 8, "embedding_dim": 6} | kwargs
    return stir(SPLITS[name](6, depth, **kwargs))


def tokens(n: int = 5, t: int = 7, dim: int = 6, seed: int = 0) -> TokenStates:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)
    return TokenStates(torch.randn(n, t, dim, generator=g) * mask[..., None], mask)


# propagation ---------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(PROPAGATIONS)), residual=st.booleans(), depth=st.integers(1, 9), width=st.floats(0, 300), seed=st.integers(0, 10**6))
def test_every_level_sums_to_one_and_parents_are_the_sum_of_their_children(name, residual, depth, width, seed):
    torch.manual_seed(seed)
    module = stir(PROPAGATIONS[name](depth, **({"residual": residual} if name == "learned" else {})))
    scores = (width * torch.randn(3, n_splits(depth))).requires_grad_()
    leaves = module(scores)
    assert (leaves >= 0).all()
    levels = sum_up(leaves)
    for h, level in enumerate(levels):
        assert level.shape == (3, 2**h)
        torch.testing.assert_close(level.sum(1), torch.ones(3), atol=1e-5, rtol=0)
        if h:
            torch.testing.assert_close(level[:, 0::2] + level[:, 1::2], levels[h - 1])
    torch.testing.assert_close(module(scores, log=True).exp(), leaves, atol=1e-6, rtol=1e-4)
    (leaves * torch.randn_like(leaves)).sum().backward()
    assert scores.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@settings(max_examples=30, deadline=None)
@given(depth=st.integers(2, 9), seed=st.integers(0, 10**6), data=st.data())
def test_a_truncated_product_is_the_summed_up_one(depth, seed, data):
    torch.manual_seed(seed)
    level = data.draw(st.integers(1, depth))
    scores = 4 * torch.randn(3, n_splits(depth))
    torch.testing.assert_close(ProductPropagation(depth)(scores[:, : n_splits(level)]), sum_up(ProductPropagation(depth)(scores), level))


@pytest.mark.parametrize("cls", PROPAGATIONS.values())
@pytest.mark.parametrize("size", [0.0, 30.0, 200.0, 1e4])
def test_depth_16_at_saturation_has_finite_gradients(cls, size):
    torch.manual_seed(0)
    scores = (size * torch.sign(torch.randn(2, n_splits(16)))).requires_grad_()
    module = cls(16)
    leaves = module(scores)
    torch.testing.assert_close(leaves.sum(1), torch.ones(2), atol=1e-4, rtol=0)
    (leaves * torch.randn_like(leaves)).sum().backward()
    assert scores.grad.isfinite().all()
    scores.grad = None
    log_p = module(scores, log=True)
    assert log_p.isfinite().all()  # the probability of most leaves is 0 in float32 here; its logarithm is known
    log_p[:, ::4096].sum().backward()
    assert scores.grad.isfinite().all()
    assert size < 1 or (scores.grad.abs().max() > 0.1)  # and its gradient is alive


def test_where_the_probability_is_zero_only_its_logarithm_can_be_learned_from():
    scores = torch.full((1, n_splits(16)), 16.0, requires_grad=True)
    ProductPropagation(16)(scores)[0, -1].backward()
    assert not scores.grad.any()
    ProductPropagation(16)(scores, log=True)[0, -1].backward()
    assert (scores.grad != 0).sum() == 16


def test_learned_propagation_against_a_loop_in_double():
    torch.manual_seed(1)
    module = stir(LearnedPropagation(3, residual=False)).double()
    scores = torch.randn(2, 7, dtype=torch.float64)
    e = torch.empty(2, 8, dtype=torch.float64)
    for leaf, turns in enumerate(itertools.product([0, 1], repeat=3)):
        node, z = 0, []
        for turn in turns:
            z.append(torch.sigmoid(-scores[:, node] if turn else scores[:, node]))
            node = 2 * node + 1 + turn
        e[:, leaf] = torch.relu(torch.stack(z, 1) @ module.weight_in[leaf] + module.bias_in[leaf]) @ module.weight_out[leaf]
    torch.testing.assert_close(module.float()(scores.float()), e.softmax(1).float(), atol=1e-5, rtol=1e-4)


# splits --------------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(which=st.sampled_from(EVERY), depth=st.integers(1, 6), seed=st.integers(0, 10**6), data=st.data())
def test_scores_above_a_level_depend_on_nodes_above_it_only(which, depth, seed, data):
    torch.manual_seed(seed)
    split, level = small(which[0], depth, aggregation=which[1]), data.draw(st.integers(0, depth))
    x = torch.randn(3, 6)
    whole = split(x)
    torch.testing.assert_close(split(x, level), whole[:, : n_splits(level) if level else 0], atol=1e-5, rtol=1e-4)
    n = (1 << level) - 1
    with torch.no_grad():  # disturb all that belongs to nodes at the level and below
        for p in split.parameters():
            if p.shape[:1] == (n_splits(depth),):
                p[n:].normal_()
    torch.testing.assert_close(split(x)[:, :n], whole[:, :n], atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(aggregation=st.sampled_from(AGGREGATIONS), depth=st.integers(1, 5), n_e=st.integers(1, 3), block=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_blocks_of_nodes_give_the_plain_attention_and_its_gradients(aggregation, depth, n_e, block, seed):
    torch.manual_seed(seed)
    split = small("cross-attention", depth, aggregation=aggregation, n_embeddings=n_e, block=block).double()
    x = TokenStates(tokens(seed=seed).states.double().requires_grad_(), tokens(seed=seed).mask)
    oracle = split.scorer(split.attend(x)[0])
    oracle = oracle if split.refine is None else split.refine(oracle)
    torch.testing.assert_close(split(x), oracle)
    inputs = [x.states, *split.parameters()]
    for a, b in zip(torch.autograd.grad(split(x).square().sum(), inputs), torch.autograd.grad(oracle.square().sum(), inputs)):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


def test_scores_of_the_attention_against_a_loop_over_nodes():
    split, x = small("cross-attention", 3, aggregation="linear-mean", n_embeddings=2).double(), tokens()
    x = TokenStates(x.states.double(), x.mask)
    for b, (states, mask) in enumerate(zip(*x)):
        key, value = split.key(states[mask]), split.value(states[mask])
        for node in range(7):
            scores = []
            for e in split.node_embeddings[node]:
                query = split.query(e)
                heads = [torch.softmax(key[:, h] @ query[h] / math.sqrt(4), 0) @ value[:, h] for h in (slice(0, 4), slice(4, 8))]
                scores.append(split.scorer.weight[node] @ torch.cat(heads) + split.scorer.bias[node])
            torch.testing.assert_close(split(x)[b, node], torch.stack(scores).mean())


def test_padding_and_batch_mates_do_not_matter():
    split, x = small("cross-attention", 4), tokens(6)
    wanted = split(x)
    longer = TokenStates(torch.cat([x.states, torch.full((6, 3, 6), float("1e6"))], 1), torch.cat([x.mask, torch.zeros(6, 3, dtype=torch.bool)], 1))
    torch.testing.assert_close(split(longer), wanted, atol=1e-5, rtol=1e-4)
    for i in range(6):
        row = TokenStates(x.states[i : i + 1, x.mask[i]], x.mask[i : i + 1, x.mask[i]])
        torch.testing.assert_close(split(row), wanted[i : i + 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(split(tuple(x)), wanted)  # a plain pair will do
    assert split(TokenStates(x.states[:0], x.mask[:0])).shape == (0, 15)


def test_with_pooled_vectors_the_node_embeddings_cannot_matter():
    split, x = small("cross-attention", 4, aggregation="linear-mean"), torch.randn(5, 6)
    split(x).square().sum().backward()
    assert not split.node_embeddings.grad.any() and not split.query.weight.grad.any() and not split.key.weight.grad.any()
    assert split.value.weight.grad.any()
    split.zero_grad()
    split(tokens()).square().sum().backward()
    assert split.node_embeddings.grad.any()  # with tokens they do


def test_half_precision_states_and_autocast():
    split, x = small("cross-attention", 4), tokens()
    wanted = split(x)
    torch.testing.assert_close(split(TokenStates(x.states.half(), x.mask)), wanted, atol=1e-2, rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        got = split(x)
        (got.sum()).backward()
    torch.testing.assert_close(got.float(), wanted, atol=0.3, rtol=0.1)


# refinement and calibration --------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(depth=st.integers(1, 6), hidden=st.integers(1, 5), residual=st.booleans(), seed=st.integers(0, 10**6))
def test_refined_scores_depend_on_the_path_only(depth, hidden, residual, seed):
    torch.manual_seed(seed)
    refine, nodes = stir(TreeRefine(depth, hidden, residual)), n_splits(depth)
    scores = torch.randn(nodes)
    jacobian = torch.autograd.functional.jacobian(lambda s: refine(s[None])[0], scores)
    for t in range(nodes):
        path, node = {t}, t
        while node:
            node = (node - 1) // 2
            path.add(node)
        assert not jacobian[t, [n for n in range(nodes) if n not in path]].any()


@pytest.mark.parametrize("which", EVERY)
@pytest.mark.parametrize("read", ["vectors", "tokens"])
def test_calibrated_splits_are_centred_on_what_reaches_them(which, read):
    torch.manual_seed(0)
    split = SPLITS[which[0]](6, 4, spread=0.7, aggregation=which[1])
    x = torch.randn(800, 6) + 3 * torch.randn(6)
    if read == "tokens":
        if not split.reads_tokens:
            with pytest.raises(HiernbError, match="`x`"):
                calibrate(split, tokens())
            return
        x = TokenStates(torch.randn(800, 5, 6) + 3 * torch.randn(6), torch.arange(5) < torch.randint(1, 6, (800, 1)))
    split.train()
    calibrate(split, x, block=37)
    assert split.training
    scores = split.eval()(x).detach()
    for level, leaves in enumerate(sum_up(ProductPropagation(4)(scores))[:4]):
        share = leaves / leaves.sum(0)
        here = scores[:, 2**level - 1 : 2 ** (level + 1) - 1]
        torch.testing.assert_close((share * here).sum(0), torch.zeros(2**level), atol=5e-3, rtol=0)
        torch.testing.assert_close((share * here**2).sum(0).sqrt(), torch.full((2**level,), 0.7), atol=0.02, rtol=0)


def test_calibrate_says_what_is_wrong():
    x = tokens()
    bad = x.states.clone()
    bad[2, 0, 1] = float("nan")
    with pytest.raises(NotFiniteError, match="`x`"):
        calibrate(small("cross-attention", 3), TokenStates(bad, x.mask))
    with pytest.raises(HiernbError, match="at least two contexts"):
        calibrate(small("cross-attention", 3), TokenStates(x.states[:1], x.mask[:1]))


@pytest.mark.parametrize("bad", [
    dict(heads=3), dict(heads=0), dict(key_dim=0), dict(embedding_dim=0), dict(n_embeddings=0), dict(dropout=1.0), dict(dropout=-0.1), dict(block=0),
    dict(aggregation="mean"), dict(outputs=0), dict(outputs=8), dict(spread=0.0), dict(tree_hidden=0), dict(depth=0), dict(depth=17), dict(dim=0),
    dict(heads=2.0), dict(key_dim="512"),
])
def test_bad_settings_are_named(bad):
    good = dict(dim=6, depth=3, heads=2, key_dim=8, embedding_dim=4)
    with pytest.raises(HiernbError) as caught:
        CrossAttentionSplit(**(good | bad))
    name = next(iter(bad))
    assert {"heads": "head", "outputs": "output", "tree_hidden": "hidden"}.get(name, name) in str(caught.value)


@pytest.mark.parametrize("bad", [
    torch.zeros(3), torch.zeros(3, 5), torch.zeros(2, 3, 5), torch.zeros(1, 2, 3, 6), (torch.zeros(2, 3, 6), torch.ones(2, 3)),
    (torch.zeros(2, 3, 6), torch.ones(2, 4).bool()), (torch.zeros(2, 6), torch.ones(2).bool()), (torch.zeros(2, 3, 6), None, None), "text", None,
])
def test_bad_inputs_are_named(bad):
    with pytest.raises(HiernbError, match="`x`"):
        small("cross-attention", 3)(bad)


def test_shared_map_is_one_map_and_is_not_trained_through_its_gain():
    scorer = NodeScorer(7, 4, shared=True)
    assert [name for name, _ in scorer.named_parameters()] == ["weight", "bias"] and scorer.weight.shape == (1, 4)
    assert set(scorer.state_dict()) == {"weight", "bias", "gain", "offset"}  # but it is saved
    assert (level_of(6) == 2).all()
