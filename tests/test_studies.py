"""Studies: cells that outlive a kill, are shared by processes, and are refused when damaged."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from hiernb.claims import ask, record
from hiernb.data.pairs import make_pairs
from hiernb.data.sources import load_pairs
from hiernb.errors import FileFormatError, UnknownNameError
from hiernb.experiments import Cell
from hiernb.files import from_root
from hiernb.studies import Method, Study, measure, open_problem, run_study

SMALL = dict(seeds=[0, 1], max_pairs=200, max_queries=40, max_length=32, depth=4, steps=20, batch_size=32, tree_lrs=[0.02], baseline_lrs=[1e-3], device="cpu")
SCRIPT = """
import json, sys
from hiernb.studies import Method, Study, run_study
study = Study(**json.loads(sys.argv[1]))
run_study(study, [Method("tree"), Method("adapter", "adapter"), Method("encoder", "encoder")])
"""


def start(cells, **more):
    settings = json.dumps(SMALL | {"cells": str(cells)} | more)
    return subprocess.Popen([sys.executable, "-c", SCRIPT, settings], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def test_a_killed_study_goes_on_and_two_processes_share_it(tmp_path):
    cells = tmp_path / "cells"
    first = start(cells)
    while not (cells.exists() and list(cells.glob("*.safetensors"))):
        assert first.poll() is None, "ended before it wrote a cell"
        time.sleep(0.05)
    first.kill()
    first.wait()
    before = {p.name: p.stat().st_mtime_ns for p in cells.glob("*.safetensors")}
    both = [start(cells), start(cells)]
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    after = {p.name: p.stat().st_mtime_ns for p in cells.glob("*.safetensors")}
    assert len(after) == 6 and {n: after[n] for n in before} == before  # what was there was not trained again
    study = Study(**SMALL, cells=str(cells))
    methods = [Method("tree"), Method("adapter", "adapter"), Method("encoder", "encoder")]
    alone = run_study(replace(study, cells=str(tmp_path / "alone")), methods)
    for a, b in zip(run_study(study, methods), alone):
        assert (a.method, a.seed, a.figures, a.rate) == (b.method, b.seed, b.figures, b.rate)
    assert {p.name: p.stat().st_mtime_ns for p in cells.glob("*.safetensors")} == after


def halves(folder):
    "Two sets in the pairs format: docstrings of modules up to l, and after."
    pairs, out = load_pairs("pydocs"), []
    for name, belongs in (("early", lambda m: m < "l"), ("late", lambda m: m >= "l")):
        rows = {s: [] for s in pairs.splits}
        for s, q in pairs.splits.items():
            for (i, c), module in zip(q.relevance.tolist(), q.extras["module"]):
                rows[s] += [{"query": q.texts[i], "text": pairs.contexts.full_texts[c]}] if belongs(module) and len(rows[s]) < 300 else []
        out.append(str(make_pairs(name, rows).save(folder / name)))
    return out


def test_sets_trained_together_are_judged_each_by_itself(tmp_path):
    sets, methods = halves(tmp_path), [Method("tree"), Method("encoder", "encoder")]
    study = Study(**SMALL, cells=str(tmp_path / "cells"), datasets=[*sets, sets])
    cells = run_study(study, methods)
    by = {(c.dataset, c.method, c.seed): c for c in cells}
    assert len(by) == len(cells) == len(list((tmp_path / "cells").iterdir())) == 4 * 2 * 2
    for name in ("early", "late"):
        assert by[f"{name}, together", "encoder", 0].figures == by[name, "encoder", 0].figures  # the same queries among the same contexts
        assert by[f"{name}, together", "tree", 0].figures != by[name, "tree", 0].figures  # but other pairs trained on
    trained = [by[f"{name}, together", "tree", 0].facts["seconds"] for name in ("early", "late")]
    assert trained[0] == trained[1]  # once for both
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    assert [c.figures for c in run_study(study, methods)] == [c.figures for c in cells]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == times
    next(p for p in times if p.name == max(times, key=times.get).name).unlink()  # one of two: trained again, and the other stays what it was
    assert [c.figures for c in run_study(study, methods)] == [c.figures for c in cells]


def test_a_damaged_cell_is_named(tmp_path):
    study = Study(**SMALL, cells=str(tmp_path))
    problem = open_problem("pydocs", study)
    measure(problem, study, Method("encoder", "encoder"), 0)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FileFormatError, match=path.name):
        measure(problem, study, Method("encoder", "encoder"), 0)


def cell(method, values, seed=0):
    values = np.asarray(values, dtype=np.float32)
    return Cell("a set", method, seed, {"ndcg@10": {4: float(values.mean())}}, {4: values}, {})


@pytest.mark.parametrize("shift, verdict", [(0.2, "holds"), (-0.2, "fails"), (0.0, "not decided")])
def test_verdicts(shift, verdict):
    rng = np.random.default_rng(0)
    cells = [cell(m, 0.5 + s + 0.01 * rng.normal(size=200), seed) for seed in range(3) for m, s in (("a", shift), ("b", 0.0))]
    assert ask(cells, "a beats b", "a", "b")[0].verdict == verdict


def test_only_common_seeds_are_compared():
    cells = [cell("a", [1, 1], 0), cell("a", [0, 0], 1), cell("b", [1, 1], 0)]
    assert ask(cells, "", "a", "b")[0].difference == 0
    with pytest.raises(UnknownNameError):
        ask(cells, "", "a", "c")


def test_a_record_names_data_sets_and_no_folders(tmp_path):
    study = Study(datasets=["pydocs", str(tmp_path / "mine"), [str(tmp_path / "x"), "nq"]])
    path = record("in-test-paths", "title", study, [cell("a", [1, 0])])
    assert json.loads(path.read_text())["setting"]["datasets"] == ["pydocs", "mine", ["x", "nq"]]


def test_no_record_is_of_the_size_of_a_test():
    records = sorted(from_root("data/results").glob("*.json"))
    assert len(records) > 20
    assert not [path.name for path in records if "in-test" in path.read_text(encoding="utf8")]
