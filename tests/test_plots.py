"Figures: what is drawn, and what is refused."

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hiernb.errors import ArgumentError, EmptyError, HiernbError, NotFiniteError, RangeError, ShapeError, UnknownNameError
from hiernb.explore.topics import NodeTopic
from hiernb.plots import COLOURS, Curve, draw_tree, plot_route, plot_sizes, plot_training, plot_usage
from hiernb.tree import level_of, route, sum_up


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def topics_of(leaf_sizes, words=("keyword", "another_identifier", "third")):
    "Topics of a tree whose leaves have these sizes."
    sizes = np.concatenate(sum_up(np.array(leaf_sizes)))
    return {i: NodeTopic(i, int(n), list(words) if n else []) for i, n in enumerate(sizes)}


def spans(fig):
    "Node -> (top, height) of the blocks of an icicle."
    return {int(p.get_gid().split()[1]): (p.get_y(), p.get_height()) for p in fig.axes[0].patches}


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3).flatmap(lambda d: st.lists(st.integers(0, 9), min_size=2**d, max_size=2**d)).filter(any))
def test_blocks_tile_the_tree(leaf_sizes):
    topics = topics_of(leaf_sizes)
    blocks = spans(draw_tree(topics))
    assert set(blocks) == {n for n, t in topics.items() if t.size}
    for level in range(int(level_of(max(topics))) + 1):
        at = 0.0
        for node in sorted(n for n in blocks if level_of(n) == level):
            assert blocks[node][0] == pytest.approx(at)
            assert blocks[node][1] == pytest.approx(topics[node].size / topics[0].size)
            at += blocks[node][1]
        assert at == pytest.approx(1.0)


def test_no_text_leaves_its_block():
    fig = draw_tree(topics_of(np.random.default_rng(0).integers(0, 60, 16), ("long_identifier_of_something", "mesh", "wwwwwwwwww", "x" * 60)), 4)
    renderer = FigureCanvasAgg(fig).get_renderer()
    blocks = [p.get_window_extent(renderer) for p in fig.axes[0].patches]
    texts = [t.get_window_extent(renderer) for t in fig.axes[0].texts if t.get_text().strip()]
    assert len(texts) > 20
    for t in texts:
        assert any(b.x0 - 1 <= t.x0 and t.x1 <= b.x1 + 1 and b.y0 - 2 <= t.y0 and t.y1 <= b.y1 + 2 for b in blocks)
    for i, a in enumerate(texts):
        assert not any(a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1.5 and b.y0 < a.y1 - 1.5 for b in texts[i + 1 :])


def test_draw_tree_refuses():
    good = topics_of([1, 2, 3, 4])
    more, gap = {**good, 1: NodeTopic(1, 9)}, {0: good[0], 2: good[2]}
    for bad, error in (({}, EmptyError), (more, ArgumentError), (gap, ArgumentError), (topics_of([0, 0]), RangeError)):
        with pytest.raises(error):
            draw_tree(bad)
    with pytest.raises(ArgumentError, match="no node 7"):
        draw_tree(good, depth_shown=3)
    with pytest.raises(RangeError, match="depth_shown"):
        draw_tree(good, depth_shown=0)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_route_is_outlined(depth, seed):
    leaves = torch.distributions.Dirichlet(torch.full((2**depth + 1,), 0.3)).sample()[1:] + 1e-3 if seed % 2 else torch.ones(2**depth)
    leaves = (leaves / leaves.sum())[None]
    nodes, masses = route(leaves)
    ax = plot_route([p[0] for p in sum_up(leaves)], nodes[0], {0: NodeTopic(0, 3, ["root", "word"])}).axes[0]
    assert [p.get_gid() for p in ax.patches] == [f"node {n}" for n in nodes[0].tolist()]
    np.testing.assert_allclose([p.get_width() for p in ax.patches], 2.0 ** -np.arange(depth + 1))
    shown = [t.get_text() for t in ax.texts]
    assert shown[::2] == [f"{m:.2f}" for m in masses[0].tolist()] and shown[1::2] == ["root, word"] + [""] * depth


def test_route_refuses():
    levels = sum_up(np.array([0.5, 0.2, 0.2, 0.1]))
    for bad_levels, nodes, error in (
        ([], [], EmptyError),
        (levels[1:], [0, 1], ShapeError),
        (levels, [0, 1], ShapeError),
        (levels, [0, 1, 6], ArgumentError),
        (levels, [0, 2, 3], ArgumentError),
        ([levels[0], levels[1] * np.nan, levels[2]], [0, 1, 3], NotFiniteError),
        ([levels[0], levels[1], -levels[2]], [0, 1, 3], ArgumentError),
        ([levels[0], levels[1], 2 * levels[2]], [0, 1, 3], ArgumentError),
    ):
        with pytest.raises(error):
            plot_route(bad_levels, nodes)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(["line", "point", "level"]), min_size=1, max_size=7), st.floats(0, 1))
def test_names_never_overlap(kinds, spread):
    rng = np.random.default_rng(0)
    curves = [Curve(f"method {i}", [2, 4, 8], 0.5 + spread * rng.random(3) / 2, kind=k) for i, k in enumerate(kinds) if k != "level"]
    curves += [Curve(f"level {i}", None, 0.5, kind=k) for i, k in enumerate(kinds) if k == "level"]
    fig = plot_sizes(curves)
    fig.savefig(io.BytesIO(), format="png")
    boxes = sorted((t.get_window_extent() for t in fig.axes[0].texts), key=lambda b: b.y0)
    assert len(boxes) == len(kinds)
    assert all(a.y1 <= b.y0 + 1 for a, b in zip(boxes, boxes[1:]))


def test_sizes_draws_intervals_and_ticks():
    sizes = 2 ** np.arange(1, 11)
    level, point = Curve("b", None, 0.3, 0.2, 0.4, kind="level"), Curve("c", [384], [0.2], [0.1], [0.3], kind="point")
    ax = plot_sizes([Curve("a", sizes, sizes / 2000, sizes / 2500, sizes / 1500), level, point]).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == [f"{s:,}" for s in sorted([*sizes, 384])]
    band = next(c for c in ax.collections if type(c).__name__ == "FillBetweenPolyCollection" or type(c).__name__ == "PolyCollection")
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(1024 / 1500)
    assert "95 % interval" in ax.get_title()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"sizes": []}, EmptyError),
        ({"sizes": [2, 4, 8]}, ShapeError),
        ({"sizes": [0, 4]}, ArgumentError),
        ({"sizes": [4, 4]}, ArgumentError),
        ({"mean": [0.1, np.nan]}, NotFiniteError),
        ({"low": [0.1, 0.1]}, ArgumentError),
        ({"low": [0.1], "high": [0.1, 0.2]}, ShapeError),
        ({"kind": "bar"}, UnknownNameError),
        ({"kind": "level"}, ShapeError),
    ],
)
def test_curve_refuses(arguments, error):
    with pytest.raises(error):
        Curve(**{"name": "x", "sizes": [2, 4], "mean": [0.1, 0.2]} | arguments)


def test_too_many_curves():
    with pytest.raises(ArgumentError, match="curves"):
        plot_sizes([Curve("x", [2], [0.1])] * (len(COLOURS) + 1))


def test_training_rows_and_columns_draw_the_same():
    rows = [{"step": s, "loss": 1 / s} for s in range(1, 40)]
    rows += [{"step": 20, "validation/recall@10": 0.3}, {"step": 39, "loss": None, "validation/recall@10": 0.4}]
    columns = {k: np.array([r.get(k) for r in rows], dtype=float) for k in ("step", "loss", "validation/recall@10")}
    a, b = plot_training(rows, window=5), plot_training(columns, window=5)
    for one, other in zip(a.axes, b.axes):
        for x, y in zip(one.lines, other.lines):
            np.testing.assert_array_equal(x.get_xydata(), y.get_xydata())
    assert len(a.axes[0].lines[1].get_xdata()) == 35 and a.axes[1].get_legend().get_texts()[0].get_text() == "recall@10"


def test_training_short_or_without_validation():
    fig = plot_training([{"step": 1, "loss": 2.0}])
    assert [len(ax.lines) for ax in fig.axes] == [2, 0]
    given_axes = plt.figure().subplots(1, 2)
    plt.close(given_axes[0].figure)
    assert plot_training([{"step": 1, "loss": 2.0}], axes=given_axes) is given_axes[0].figure


@pytest.mark.parametrize(
    ("log", "arguments"),
    [
        ([], {}),
        ([{"loss": 1.0}], {}),
        ([{"step": 1}], {}),
        ([{"step": 1, "loss": None}], {}),
        ({"step": [1], "loss": [1.0, 2.0]}, {}),
        ({"step": [1], "loss": [np.inf]}, {}),
        ([{"step": 1, "loss": 1.0}], {"metrics": ["recall"]}),
        ([{"step": 1, "loss": 1.0}], {"window": 0}),
    ],
)
def test_training_refuses(log, arguments):
    with pytest.raises(HiernbError):
        plot_training(log, **arguments)


def test_usage():
    fig = plot_usage(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    np.testing.assert_allclose(fig.axes[0].patches[0].get_data().values, [40, 30, 20, 10], rtol=1e-5)
    assert "of 65,536" in plot_usage(np.full(2**16, 2.0**-16)).axes[0].get_title()
    given = plt.figure().subplots()
    plt.close(given.figure)
    assert plot_usage([1.0], ax=given) is given.figure
