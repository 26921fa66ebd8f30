"The tree browser in a real browser, and what its data side must survive."

import json
import resource
import shutil
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hiernb.errors import ArgumentError, EmptyError, NotFiniteError, ShapeError
from hiernb.explore.browser import answer_query, browse, query_payload
from hiernb.explore.node_contents import Examples, LeafCounts
from hiernb.explore.tree_view import QueryRoute, TreeView
from hiernb.retreever.model import Retreever
from hiernb.tree import level_of, n_nodes, route, sum_up

HOSTILE = [
    "<script>window.broken = 1</script>", "</script><script>window.broken = 2</script>", '<img src="x" onerror="window.broken = 3">',
    "<svg/onload=window.broken=4>", "<a href='javascript:window.broken=5'>click</a>", "<!-- <script> <!--", "{curly} {{braces}} %s ${window.broken=6}",
    "quotes ' \" ` \\ \\u003c and & &lt; &amp;", "nul \x00 bell \x07 half \ud800 pair", "line\u2028and\u2029paragraph", "\u202eright to left override",
    "日本語 العربية 🌲 é", "x" * 100_000, " ".join(["<b>long</b>"] * 5000), "", " \n ",
]  # fmt: skip


def random_tree(depth: int, dim: int = 16, seed: int = 0) -> Retreever:
    torch.manual_seed(seed)
    return Retreever(dim, depth=depth, spread=3.0, growth=1.0)


def routes_of(model: Retreever, vectors: torch.Tensor, texts: list[str]) -> list[QueryRoute]:
    leaves = model.represent(vectors)
    return [QueryRoute(*row) for row in zip(texts, torch.cat(sum_up(leaves), 1).numpy(), route(leaves)[0].numpy())]


def small_view(depth: int = 4, n: int = 400, texts: list[str] | None = None, **more) -> tuple[TreeView, Retreever, torch.Tensor]:
    model, vectors = random_tree(depth), torch.randn(n, 16, generator=torch.Generator().manual_seed(1))
    words = np.random.default_rng(0).choice(["oak", "elm", "yew", "ash", "fir", "pine", "larch", "birch"], (n, 6))
    texts = texts or [f"context {i}: " + " ".join(row) for i, row in enumerate(words)]
    view = TreeView.build(model, texts, vectors, ids=[f"id-{i}" for i in range(n)], **more)
    view.queries = routes_of(model, vectors[:3] + 0.1, ["the first query", "the second query", "<script>window.broken = 9</script>"])
    return view, model, vectors


# --- the data side -------------------------------------------------------------------------------------------------------------------


def test_refuses_what_does_not_fit():
    view, model, vectors = small_view(depth=2, n=20)
    texts = [f"text {i}" for i in range(20)]
    for error, call in (
        (EmptyError, lambda: TreeView.build(model, [])), (ShapeError, lambda: TreeView.build(model, texts, vectors[:5])),
        (ShapeError, lambda: TreeView.build(model, texts, vectors, ids=["a"])), (ArgumentError, lambda: TreeView.build(model, texts, vectors, top=0)),
        (ArgumentError, lambda: TreeView.build(model, texts, vectors, queries="a string")),
        (ArgumentError, lambda: TreeView.build(model, texts, vectors, block=0)),
        (NotFiniteError, lambda: TreeView.build(model, texts, torch.full((20, 16), torch.nan))),
        (ArgumentError, lambda: browse(view, random_tree(3))),
    ):  # fmt: skip
        with pytest.raises(error):
            call()


def test_one_context_and_topics_from_elsewhere():
    model = random_tree(3)
    view = TreeView.build(model, ["a single context"], torch.randn(1, 16), topics={0: SimpleNamespace(keywords=["mine", "own"])})
    assert view.sizes.sum() == 4 and view.keywords[0] == ["mine", "own"] and view.keywords[1] == []
    assert json.loads(view.payload())["contexts"] == [["0", "a single context"]]


class Endless:
    "A corpus that exists only as long as it is read."

    def __init__(self, n: int):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, at):
        rows = range(*at.indices(self.n)) if isinstance(at, slice) else at
        return [self.text(i) for i in rows] if isinstance(at, slice) else self.text(rows)

    def text(self, i: int) -> str:
        return " ".join(f"word{(i * k) % 50}" for k in range(40))


class Reading(Retreever):
    "Reads a text by hashing it: vectors that depend on the text, without an encoder."

    def read(self, texts, kind="context", prompt=None, progress=False):
        seeds = [hash(t) % 2**31 for t in texts]
        return torch.stack([torch.from_numpy(np.random.default_rng(s).normal(size=self.dim)).float() for s in seeds])


def test_memory_does_not_grow_with_the_corpus():
    model, peaks = Reading(16, depth=5, spread=3.0), []
    for n in (600, 3000):
        tracemalloc.start()
        view = TreeView.build(model, Endless(n), block=128, top=2, sample=200)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert view.sizes[0] == n and len(view.texts) <= 2 * n_nodes(5)
    assert peaks[1] < 1.3 * peaks[0], peaks


def test_sample_decides_the_words():
    counts = LeafCounts(Endless(3000), 4, sample=100)
    assert 0 < len(counts.terms) <= 50 and counts.counts.nnz == 0


def test_examples_do_not_depend_on_the_blocks():
    leaves = torch.rand(500, 16, generator=torch.Generator().manual_seed(3)).double() ** 4
    leaves = (leaves / leaves.sum(1, keepdim=True)).repeat(2, 1)  # every context twice: ties
    nodes, masses = (x.numpy() for x in route(leaves))
    results = []
    for block in (1, 37, 1000):
        examples = Examples.empty(31, 5)
        for start in range(0, 1000, block):
            examples.add(nodes[start : start + block], masses[start : start + block], start)
        results.append(examples.places)
    assert (results[0] == results[1]).all() and (results[1] == results[2]).all()
    for node in range(31):
        inside = set(np.flatnonzero(nodes[:, int(level_of(node))] == node))
        assert {i for i in results[0][node].tolist() if i >= 0} <= inside


def test_a_full_disk_leaves_the_old_file(tmp_path):
    view, *_ = small_view(depth=2, n=30)
    path = view.save_html(tmp_path / "tree.html")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError):
            small_view(depth=3, n=30)[0].save_html(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["tree.html"]


# --- in the browser ------------------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on the PATH")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--headless=new"], timeout=60_000)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    "Opens a view's file; afterwards there must be no error, no request for anything else, and nothing hostile may have run."
    tabs = []

    def open_view(view: TreeView, **settings):
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, "reduced_motion": "reduce", "offline": True} | settings)
        tab, wrong, uri = context.new_page(), [], view.save_html(tmp_path / f"tree é {len(tabs)}.html").resolve().as_uri()
        tab.set_default_timeout(40_000)
        tab.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: wrong.append(str(e)))
        tab.on("request", lambda r: wrong.append(r.url) if r.url != uri and not r.url.startswith("data:") else None)
        tab.on("dialog", lambda d: wrong.append("dialog"))
        tab.goto(uri)
        tab.wait_for_selector("main[data-ready]")
        tabs.append((tab, wrong))
        return tab

    yield open_view
    for tab, wrong in tabs:
        assert wrong == [] and tab.evaluate("window.broken === undefined")
        tab.context.close()


def settle(tab, act):
    "Does something and waits until the drawing has followed."
    before = int(tab.get_attribute("main", "data-ready"))
    act()
    tab.wait_for_function("n => Number(document.querySelector('main').dataset.ready) > n", arg=before)


BLOCKS = """(() => {
    const chart = document.querySelector(".hb-chart").getBoundingClientRect(), share = (x, from, all) => (x - from - 2) / (all - 4);  // margins of 2 px
    return [...document.querySelectorAll(".hb-chart .slice")].map(slice => {
        const path = slice.querySelector("path"), box = path.getBoundingClientRect();
        return {id: Number(slice.__data__.data.data.id), stroke: path.style.stroke, fill: path.style.fill,
            left: share(box.left, chart.left, chart.width), top: share(box.top, chart.top, chart.height),
            width: box.width / (chart.width - 4), height: box.height / (chart.height - 4)};
    });
})()"""


def slice_of(tab, node: int):
    "The block of a node in the drawing."
    find = "node => [...document.querySelectorAll('.hb-chart .slice')].find(e => e.__data__.data.data.id === String(node))"
    return tab.evaluate_handle(find, node).as_element()


def expected_blocks(view: TreeView, start: int, columns: int) -> dict[int, tuple[float, float, float, float]]:
    "Place of every block, as shares of the drawing: (left, top, width, height), each below its elder sibling."
    columns = min(columns, view.depth - int(level_of(start)) + 1)
    found, row = {}, [(start, 0.0)]
    for column in range(columns):
        below = []
        for node, top in row:
            if view.sizes[node]:
                found[node] = (column / columns, top, 1 / columns, view.sizes[node] / view.sizes[start])
                below += [(2 * node + 1, top), (2 * node + 2, top + view.sizes[2 * node + 1] / view.sizes[start])] if column + 1 < columns else []
        row = below
    return found


def expect_drawing(tab, view: TreeView, columns: int):
    "Every block in sight and no other, each in its place."
    want, got = expected_blocks(view, int(tab.get_attribute("main", "data-view")), columns), {b["id"]: b for b in tab.evaluate(BLOCKS)}
    assert got.keys() == want.keys() and len(got) < 1 << columns
    for node, place in want.items():
        assert [got[node][name] for name in ("left", "top", "width", "height")] == pytest.approx(place, abs=0.003)


WATCH_BLOCKS = """() => {
    const chart = document.querySelector(".hb-chart"), count = () => { window.most = Math.max(window.most, chart.querySelectorAll(".slice").length); };
    new MutationObserver(count).observe(chart, {subtree: true, childList: true});
}"""


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_blocks_lie_where_their_contexts_are(opened, motion):
    "After zooming in and out as well, with and without sliding."
    view, *_ = small_view(depth=10, n=3000)
    tab = opened(view, reduced_motion=motion)
    expect_drawing(tab, view, 4)
    tab.evaluate(WATCH_BLOCKS)
    deep = int(np.flatnonzero(view.sizes[7:15])[0]) + 7
    for node in (2, None, deep, None):  # by a click, or back to the root
        tab.evaluate("window.most = 0")
        settle(tab, lambda node=node: slice_of(tab, node).click() if node else tab.click("nav button >> nth=0"))
        expect_drawing(tab, view, 4)
        moved = tab.evaluate("most") > tab.locator(".hb-chart .slice").count()  # while they slide, the old blocks are there as well
        assert moved == (motion == "no-preference")
    assert tab.evaluate("document.querySelectorAll('*').length") < 300  # of 2047 nodes
    assert tab.evaluate("(chart => Plotly.validate(chart.data, chart.layout))(document.querySelector('.hb-chart'))") is None  # plotly.js knows every name


def test_the_last_of_many_clicks_counts(opened):
    view, *_ = small_view(depth=10, n=3000)
    tab = opened(view, reduced_motion="no-preference")
    settle(tab, lambda: tab.evaluate("for (const child of [0, 1, 0, 1]) document.querySelectorAll('.hb-kids button')[child].click()"))
    tab.wait_for_function("() => document.querySelector('main').dataset.ready === '5'")
    assert tab.get_attribute("main", "data-view") == "20"  # 0, 1, 4, 9, 20
    expect_drawing(tab, view, 4)
    settle(tab, lambda: slice_of(tab, 41).click())  # and a click is one click
    assert tab.get_attribute("main", "data-ready") == "6" and tab.get_attribute("main", "data-view") == "41"


def test_the_drawing_follows_the_window_and_the_scheme(opened):
    view, *_ = small_view(depth=10, n=3000)
    tab = opened(view, viewport={"width": 1600, "height": 900})
    expect_drawing(tab, view, 5)
    traced = tab.evaluate("document.querySelector('.hb-chart').data.map(trace => [trace.type, trace.ids.length])")
    assert traced == [["icicle", int((view.sizes[:31] > 0).sum())]]  # one trace, and in it only what is drawn
    before = {b["id"]: b["fill"] for b in tab.evaluate(BLOCKS)}
    settle(tab, lambda: tab.set_viewport_size({"width": 500, "height": 900}))
    expect_drawing(tab, view, 3)
    settle(tab, lambda: tab.emulate_media(color_scheme="dark"))
    after = {b["id"]: b["fill"] for b in tab.evaluate(BLOCKS)}
    assert all(sum(map(int, after[i][4:-1].split(","))) < sum(map(int, before[i][4:-1].split(","))) for i in after)  # darker, every one


def test_a_block_says_its_words(opened):
    view, *_ = small_view()
    tab = opened(view)
    settle(tab, lambda: tab.select_option("select", label="the second query"))
    for node in (0, 2):
        slice_of(tab, node).hover()
        facts = f"level {int(level_of(node))}, node {node}, {view.sizes[node]} contexts"
        tab.wait_for_function("facts => document.querySelector('.hoverlayer')?.textContent.includes(facts)", arg=facts)
        said = tab.locator(".hoverlayer .hovertext .line").all_text_contents()
        assert said[:2] == [", ".join(view.keywords[node]), facts]
        assert abs(float(said[2].removeprefix("probability ")) - view.queries[1].probabilities[node]) < 0.006
        words, box = slice_of(tab, node).query_selector("text"), slice_of(tab, node).query_selector("path").bounding_box()
        inside = words.bounding_box()
        assert inside["height"] < box["height"] and inside["x"] + inside["width"] < box["x"] + box["width"]
        lines = words.query_selector_all(".line") or [words]
        assert ", ".join(line.text_content().strip() for line in lines) == ", ".join(view.keywords[node])


def test_click_shows_the_contexts_of_a_node(opened):
    view, *_ = small_view()
    tab = opened(view)
    assert sorted(block["id"] for block in tab.evaluate(BLOCKS)) == np.flatnonzero(view.sizes[:15]).tolist()  # four columns at this width
    for node in (4, 0):  # into the tree, and back by the breadcrumbs
        settle(tab, lambda node=node: slice_of(tab, node).click() if node else tab.click("nav button >> nth=0"))
        assert tab.get_attribute("main", "data-node") == str(node)
        shown = tab.locator(".hb-context .hb-text:first-child").all_inner_texts()
        assert shown[::1] and f"{view.sizes[node]} contexts" in tab.inner_text(".hb-node")
        expected = [view.texts[i] for i in view.examples.places[node].tolist() if i >= 0]
        assert [t for t in shown if t.startswith("context")] == [text for _, text in expected]
        assert all(i in tab.inner_text(".hb-node") for i, _ in expected)
        assert tab.locator(".hb-chips li").all_inner_texts() == view.keywords[node]
    settle(tab, lambda: slice_of(tab, 2).click())
    settle(tab, lambda: slice_of(tab, 2).click())  # the leftmost block leads back
    assert tab.get_attribute("main", "data-node") == "0"


def test_query_marks_its_route(opened):
    view, *_ = small_view()
    tab, query = opened(view), view.queries[1]
    settle(tab, lambda: tab.select_option("select", label="the second query"))
    rows = tab.locator("tr[data-node]")
    assert [int(rows.nth(i).get_attribute("data-node")) for i in range(5)] == query.nodes.tolist()
    for i, node in enumerate(query.nodes):
        assert abs(float(rows.nth(i).locator(".hb-bar").inner_text()) - query.probabilities[node]) < 0.006
    blocks = {block["id"]: block for block in tab.evaluate(BLOCKS)}
    framed = {node for node, block in blocks.items() if block["stroke"] == "rgb(179, 71, 0)"}
    assert framed == {n for n in query.nodes[1:4].tolist() if view.sizes[n]}  # the root, in focus, has its own frame
    blue = {n: int(blocks[n]["fill"].split(",")[0].removeprefix("rgb(")) for n in (1, 2)}
    assert (blue[1] < blue[2]) == (query.probabilities[1] > query.probabilities[2])  # less red: more of the blue
    settle(tab, lambda: rows.nth(4).locator("button").click())  # by the table to the leaf
    assert tab.get_attribute("main", "data-node") == str(query.nodes[4])
    settle(tab, lambda: tab.select_option("select", index=0))
    assert tab.locator("tr[data-node]").count() == 0


def test_hostile_texts_are_text(opened):
    n = len(HOSTILE)
    topics = {node: SimpleNamespace(keywords=[HOSTILE[node % n], "<b>bold</b>", HOSTILE[(node + 3) % n]]) for node in range(15)}
    view, *_ = small_view(depth=3, n=n, texts=HOSTILE, topics=topics, title=HOSTILE[1], top=n, n_keywords=3, max_chars=400)
    for i in view.texts:
        view.texts[i] = (HOSTILE[i % 7], view.texts[i][1])
    view = TreeView(view.title, 3, view.sizes, view.keywords, view.examples, view.texts, view.queries)
    tab = opened(view)
    assert tab.locator("h1").inner_text() == HOSTILE[1]
    assert tab.locator(".hb-node .hb-context").count() == n
    for i in range(3):
        settle(tab, lambda i=i: tab.select_option("select", index=i + 1))
    for node in (1, 2):
        settle(tab, lambda node=node: slice_of(tab, node).click() if slice_of(tab, node) else tab.click(".hb-kids button"))
        tab.hover(".hb-chart .slice >> nth=1")
    assert tab.locator("#browser script, #browser img, #browser a, #browser iframe").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_deep_tree_on_a_phone_in_the_dark(opened):
    view, *_ = small_view(depth=10, n=3000)
    tab = opened(view, viewport={"width": 360, "height": 740}, color_scheme="dark")
    assert tab.get_attribute("main", "data-scheme") == "dark"
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for _ in range(3):
        settle(tab, lambda: tab.click(".hb-kids button >> nth=0"))
    assert tab.get_attribute("main", "data-node") == "7" and tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert len(view.to_html()) < 6.5e6


def test_widget_answers_any_query(chromium):
    "The widget's module in a page whose messages go to the functions that the kernel calls."
    view, model, _ = small_view(depth=4)
    asking = Reading(16, depth=4)
    asking.load_state_dict(model.state_dict())
    widget = browse(view, asking)
    tab, wrong = chromium.new_page(), []
    tab.set_default_timeout(40_000)
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.expose_function("kernel", lambda text: answer_query(asking, text if text != "fail" else None))
    tab.set_content(f"<body><div id='host'></div><style>{widget._css}</style></body>")
    tab.evaluate("""async ([source, data]) => {
        const module = await import(URL.createObjectURL(new Blob([source], {type: "text/javascript"})));
        let hear = null;
        const send = async message => hear(await window.kernel(message.ask));
        const model = {get: name => ({data, asks: true})[name], on: (_, f) => { hear = f; }, off: () => null, send};
        module.default.render({model, el: document.getElementById("host")});
    }""", [str(widget._esm), widget.data])  # fmt: skip
    tab.wait_for_selector(".hb[data-ready]")
    tab.fill("input", "any <b>query</b>")
    tab.press("input", "Enter")
    tab.wait_for_selector("tr[data-node] >> nth=4")
    assert tab.locator("caption").inner_text() == "Route of: any <b>query</b>"
    expected = answer_query(asking, "any <b>query</b>")["query"]["route"]
    assert [int(r.get_attribute("data-node")) for r in tab.locator("tr[data-node]").all()] == expected
    tab.fill("input", "fail")
    tab.press("input", "Enter")
    tab.wait_for_function("document.querySelector('.hb-wrong').textContent.startsWith('ArgumentError')")
    assert wrong == []
    tab.close()


def test_payload_is_exact():
    view, *_ = small_view()
    value = json.loads(view.payload())
    assert value["sizes"] == view.sizes.tolist() and len(value["queries"]) == 3
    assert value["queries"][0] == query_payload(view.queries[0])
    for node, row in enumerate(value["examples"]):
        assert [value["contexts"][place][0] for place, _ in row] == [f"id-{i}" for i in view.examples.places[node] if i >= 0]
        assert all(0 <= mass <= 10_000 for _, mass in row)
