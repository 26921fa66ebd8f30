"""The command of the README, from the outside: papermill runs nbs/train.ipynb."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from hiernb.data.sources import load_pairs
from hiernb.retreever.model import Retreever
from hiernb.retreever_runs import RetreeverRun

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
TINY = {"depth": 4, "steps": 40, "validate_every": 20, "max_pairs": 300, "max_length": 48, "batch_size": 64}


def papermill(tmp_path: Path, **parameters) -> subprocess.CompletedProcess:
    flags = [x for k, v in parameters.items() for x in ("-p", k, str(v))]
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "papermill", "nbs/train.ipynb", str(tmp_path / "out.ipynb"), "-p", "run_dir", str(tmp_path / "run"), *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_run_leaves_a_whole_run_folder(tmp_path):
    done = papermill(tmp_path, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    record, config = json.loads((run / "metrics.json").read_text()), json.loads((run / "config.json").read_text())
    assert config["run"]["depth"] == 4 and record["seed"] == 0 and "torch" in record["versions"]
    assert {"ReTreever @ 16", "ReTreever @ 2", "linear adapter @ 384", "Matryoshka adapter @ 8", "encoder, cut @ 384", "BM25"} <= set(record["metrics"]["test"])
    assert all(0 <= v <= 1 for row in record["metrics"]["test"].values() for v in row.values())
    assert "-p depth 4" in record["command"]
    assert {"training.png", "ndcg-by-size.png", "tree.png", "route-1.png"} <= {p.name for p in (run / "figures").iterdir()}
    assert not list(run.rglob("checkpoints"))
    model = Retreever.from_pretrained(run)
    assert model.encode_query("read a file line by line", level=3).shape == (8,)
    notebook = json.loads((tmp_path / "out.ipynb").read_text())
    injected = [c for c in notebook["cells"] if "injected-parameters" in c["metadata"].get("tags", [])]
    assert len(injected) == 1  # the tag of the parameters cell survived nbdev_clean


@pytest.mark.parametrize("parameters, message", [
    ({"dept": 8}, "did you mean 'depth'"), ({"schedule": "stocastic"}, "did you mean 'stochastic'"),
    ({"depth": 99}, "`depth`: expected an integer from 1 to 16"),
    ({"dataset": "pydoc"}, "did you mean 'pydocs'"), ({"dataset": "no/such/folder"}, "no/such/folder"),
])
def test_a_wrong_parameter_ends_the_run_with_its_name(tmp_path, parameters, message):
    done = papermill(tmp_path, **(TINY | parameters))
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / "run").exists()  # nothing was written


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data sets in {SHARED.name} beside the checkout")
def test_a_folder_of_ones_own_works_unchanged(tmp_path):
    done = papermill(tmp_path, dataset=SHARED / "nq", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["training pairs"] <= 300


def test_a_folder_that_load_pairs_wrote_works_too(tmp_path):
    load_pairs("pydocs", max_pairs=200).save(tmp_path / "mine")
    done = papermill(tmp_path, dataset=tmp_path / "mine", **(TINY | {"max_pairs": 200, "depth": 3, "split": "linear"}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert Retreever.from_pretrained(tmp_path / "run").depth == 3


def test_the_parameters_cell_has_the_defaults_of_the_settings():
    cells = json.loads((ROOT / "nbs" / "train.ipynb").read_text(encoding="utf8"))["cells"]
    (source,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    namespace: dict = {}
    exec(source, namespace)
    assert {k: v for k, v in namespace.items() if not k.startswith("__")} == asdict(RetreeverRun())


def test_run_py_refuses_an_unknown_command():
    if not (ROOT / ".venv" / "ready").is_file():
        pytest.skip("the environment was not made by run.py")
    done = subprocess.run([sys.executable, "run.py", "no-such-command"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "no-such-command: no such command" in done.stderr


def test_nothing_is_loaded_or_saved_by_pickle():
    pickles = re.compile(r"(?<!safetensors\.)torch\.(load|save)\(|import pickle|allow_pickle=True")
    assert not [p.name for p in (ROOT / "hiernb").rglob("*.py") if pickles.search(p.read_text(encoding="utf8"))]
