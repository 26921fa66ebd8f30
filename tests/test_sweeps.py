"Sweeps: what is said before anything runs, and what is left when processes and machines are lost."

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from hiernb.errors import ArgumentError, EmptyError, FileFormatError, HiernbError, UnknownNameError
from hiernb.grids import Sweep, read_sweep, read_yaml, run_key
from hiernb.ray_session import free_ports
from hiernb.run_tables import read_run, runs_table
from hiernb.sweeps import main, run_task, sweep

BODY = """
import json, os, time
def note(what):
    with open(log, "a") as f: f.write(f"{what} {number}\\n")
note("start")
if os.path.exists(log + ".gate"):  # the test holds the runs here, to kill something while it knows what is under way
    with open(log + ".held", "a") as f: f.write(f"{number} {os.getpid()}\\n")
    while os.path.exists(log + ".gate"): time.sleep(0.02)
time.sleep(pause)
"""
END = """
if number == bad: raise RuntimeError(f"number {number} <does> not work")
if run_dir: open(os.path.join(run_dir, "metrics.json"), "w").write(json.dumps({"metrics": {"test": {"square": number ** 2}}}))
note("end")
"""


def write_tiny(folder: Path, pause: float = 0.0) -> str:
    "A notebook that notes its start and its end in a file."
    head = new_code_cell(f"number = 0\nbad = -1\npause = {pause}\nname = 'é'\nlog = {str(folder / 'log')!r}\nrun_dir = ''", metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[head, new_code_cell(BODY), new_code_cell(END)], metadata=kernel), folder / "tiny ü.ipynb")
    return str(folder / "tiny ü.ipynb")


def noted(folder: Path) -> Counter:
    path = folder / "log"
    return Counter(path.read_text().split("\n")[:-1]) if path.exists() else Counter()


# --- before anything runs ------------------------------------------------------------------------------------------------------------

BAD_YAML = {
    "a: [1": "parse", "": "names no notebook", "- 1": "names no notebook", "notebook: x\nnotebook: y": "stands twice",
    "notebook: x\ngird: {a: [1]}": "did you mean 'grid'",
    "notebook: x\ngrid: {a: 1}": "`grid: a`", "notebook: x\ngrid: {a: []}": "`grid: a`", "notebook: x\ngrid: [1]": "`grid`",
    "notebook: 3": "`notebook`",
    "notebook: x\nruns: []": "`runs`", "notebook: x\nruns: [1]": "`runs`", "notebook: x\nruns: {a: 1}": "`runs`", "notebook: x\ncpus: -1": "`cpus`",
    "notebook: x\ncpus: many": "`cpus`", "notebook: x\nretries: 1.5": "`retries`", "notebook: x\ngrid: {a: [.nan]}": "`grid: a`",
    "notebook: x\ntimeout: 0": "`timeout`",
    "notebook: x\ngrid: {a: [2026-01-01]}": "no dates", "notebook: x\nparameters: {1: 2}": "names of parameters",
    "notebook: !!python/object:os.system x": "parse",
    "? [a]\n: b": "",
    "notebook: x\nparameters: {a b: 1}": "names of parameters", "\x00": "",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_yaml(tmp_path, text, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(HiernbError) as error:
        read_sweep(path)
    expected = BAD_YAML[text]
    assert (expected in str(error.value)) or (expected == "parse" and isinstance(error.value, FileFormatError))
    assert main([str(path)]) == 2 and capsys.readouterr().err.startswith("hiernb_sweep: ")


def test_yaml_numbers(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("rates: [1e-3, 1E5, 2.5e-4, -1e3, 0.1, 3]\nnames: [e5, 1e, yes-no, '1e-3']")
    assert read_yaml(path) == {"rates": [1e-3, 1e5, 2.5e-4, -1e3, 0.1, 3], "names": ["e5", "1e", "yes-no", "1e-3"]}
    assert [type(x) for x in read_yaml(path)["rates"]] == [float] * 5 + [int]


def test_bad_notebooks_and_names(tmp_path):
    notebook = write_tiny(tmp_path)
    bare, torn = tmp_path / "bare.ipynb", tmp_path / "torn.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("number = 1")]), bare)
    torn.write_text(Path(notebook).read_text()[:200])
    for error, call in (
        (FileNotFoundError, lambda: sweep("no/such.ipynb", {"a": [1]})), (FileNotFoundError, lambda: sweep(str(tmp_path), {"a": [1]})),
        (ArgumentError, lambda: sweep(str(bare), {"number": [1]})), (FileFormatError, lambda: sweep(str(torn), {"number": [1]})),
        (UnknownNameError, lambda: sweep(notebook, {"numbr": [1]}, folder=str(tmp_path / "runs"))), (EmptyError, lambda: sweep(notebook, [])),
        (UnknownNameError, lambda: sweep(notebook, [{"number": 1}, {"nunber": 2}], folder=str(tmp_path / "runs"))),
        (UnknownNameError, lambda: sweep(notebook, {"number": [1]}, parameters={"puase": 1})),
        (UnknownNameError, lambda: sweep(notebook, {"number": [1]}, cpu=1)),
        (ArgumentError, lambda: sweep(notebook, {"run_dir": ["x"]})), (ArgumentError, lambda: sweep(notebook, [{"number": 1}, {"number": 1}])),
        (ArgumentError, lambda: sweep(notebook, {"number": [1]}, jobs=0)),
        (ArgumentError, lambda: sweep(notebook, {"number": [1]}, jobs=2, address="auto")),
    ):  # fmt: skip
        with pytest.raises(error):
            call()
    assert not noted(tmp_path) and not (tmp_path / "runs").exists()


def test_without_ray(tmp_path, monkeypatch):
    notebook = write_tiny(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"hiernb\[ray\]"):
        sweep(notebook, {"number": [1]}, folder=str(tmp_path / "runs"), progress=False)
    assert sweep(notebook, {"number": [1]}, folder=str(tmp_path / "runs"), jobs=1, progress=False).status.tolist() == ["finished"]


def test_key():
    cell = {"cell_type": "code", "source": ["a = ", "1"], "metadata": {"tags": ["parameters"]}, "outputs": [1]}
    source = json.dumps({"cells": [cell], "metadata": {"kernelspec": {}}})
    assert run_key(source, {"a": 1}) == run_key(json.dumps({"cells": [cell | {"outputs": [], "source": "a = 1"}]}), {"a": 1})
    different = [run_key(source, p) for p in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {}, {"a": [1]}, {"a": 1, "b": 1}, {"a": True})]
    assert len(set(different)) == len(different)
    assert run_key(source.replace("a = ", "b = "), {"a": 1}) != run_key(source, {"a": 1})


# --- one process ---------------------------------------------------------------------------------------------------------------------


def test_one_job(tmp_path, capsys):
    "Failures, retries, resuming, an edited notebook, and the table: a small sweep from the command line."
    notebook, grid, runs = write_tiny(tmp_path), tmp_path / "grid.yaml", tmp_path / "runs"
    grid.write_text(f"notebook: '{notebook}'\ngrid: {{number: [1, 2]}}\nparameters: {{bad: 2, name: 'ü \"q\"'}}\nretries: 1\nfolder: {runs}")
    assert main([str(grid), "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert "number 2 <does> not work" in out and "1 finished, 1 failed" in out
    assert noted(tmp_path) == {"start 1": 1, "end 1": 1, "start 2": 2}  # one retry
    table = runs_table(runs).set_index("number")
    assert table.loc[1, "test / square"] == 1 and table.loc[2, "error"] == "RuntimeError: number 2 <does> not work" and table.loc[2, "starts"] == 2
    partial = nbformat.read(runs / table.loc[2, "run"] / "notebook.ipynb", 4)
    assert any(o.output_type == "error" for c in partial.cells if c.cell_type == "code" for o in c.outputs)
    assert main([str(grid), "--jobs", "1"]) == 1 and noted(tmp_path) == {"start 1": 1, "end 1": 1, "start 2": 2}  # nothing again
    (runs / table.loc[2, "run"] / "run.json").write_text('{"status": "fin')  # a damaged record is no result
    assert runs_table(runs).set_index("run").loc[table.loc[2, "run"], "status"] == "damaged"
    assert main([str(grid), "--list"]) == 0 and noted(tmp_path)["start 2"] == 2


def test_two_tasks_at_once_run_once(tmp_path):
    "Two processes that are given the same run: one works, the other waits and takes over the result."
    task = Sweep(write_tiny(tmp_path, pause=0.3), {"number": [7]}, folder=str(tmp_path / "runs")).tasks()[0]
    pids = []
    for _ in range(2):
        if (pid := os.fork()) == 0:
            os._exit(0 if json.loads(run_task(json.dumps(task)))["status"] == "finished" else 1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert noted(tmp_path) == {"start 7": 1, "end 7": 1}


def test_kernel_dies_with_its_parent(tmp_path):
    task = Sweep(write_tiny(tmp_path, pause=1.0), {"number": [3]}, folder=str(tmp_path / "runs")).tasks()[0]
    if (pid := os.fork()) == 0:
        run_task(json.dumps(task))
        os._exit(0)
    while not noted(tmp_path):
        time.sleep(0.02)
    assert read_run(task["folder"])["status"] == "running"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert read_run(task["folder"])["status"] == "interrupted"
    time.sleep(1.3)
    assert noted(tmp_path) == {"start 3": 1}  # an orphan would have noted its end


# --- a cluster of two nodes ----------------------------------------------------------------------------------------------------------

N = 24
ENVIRONMENT = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def alive(pid: int) -> bool:
    "Whether a process runs; one that has ended and waits to be collected does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """24 runs, one of which fails, on two nodes of one processor each. The driver is killed half-way and started again; then one node is
    killed in the middle of a run. Everything that happened, for the tests below."""
    pytest.importorskip("ray", reason="needs ray")
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("sweep")
    notebook, grid, runs = write_tiny(folder, pause=0.1), folder / "grid.yaml", folder / "runs"
    grid.write_text(f"notebook: '{notebook}'\nfolder: {runs}\nparameters: {{bad: 5}}\ngrid: {{number: {list(range(N))}}}")
    def node():  # ports of its own: with free ones a node waits for its agent for a few seconds only, which a busy machine may need
        small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        names = ("metrics_agent", "metrics_export", "dashboard_agent_listen", "runtime_env_agent")
        return small | {f"{name}_port": port for name, port in zip(names, free_ports(len(names)))}

    cluster = Cluster(initialize_head=True, head_node_args=node())
    try:
        second = cluster.add_node(**{k: v for k, v in node().items() if k != "include_dashboard"})
        command = [sys.executable, "-c", "import sys; from hiernb.sweeps import main; sys.exit(main())", str(grid), "--address", cluster.address]

        def ended():
            records = [read_run(path) for path in runs.glob("*")] if runs.exists() else []
            return {r["parameters"]["number"] for r in records if r.get("status") in ("finished", "failed")}

        def until(done, what):
            deadline = time.monotonic() + 180
            while not done():
                assert time.monotonic() < deadline and driver.poll() is None, what
                time.sleep(0.02)

        def start_and_hold(n):
            "A driver that has ended n runs, and the two runs under way, held before their end: number -> process."
            nonlocal driver
            driver = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            until(lambda: len(ended()) >= n, f"{n} runs to end")
            held.unlink(missing_ok=True)
            gate.touch()
            until(lambda: held.exists() and held.read_text().count("\n") == 2, "two runs under way")
            return {int(number): int(pid) for number, pid in map(str.split, held.read_text().splitlines())}

        driver, gate, held = None, folder / "log.gate", folder / "log.held"
        killed = start_and_hold(N // 2)
        before = ended()
        driver.kill()
        driver.communicate()
        deadline = time.monotonic() + 120
        while any(map(alive, killed.values())):  # they end with their driver
            assert time.monotonic() < deadline
            time.sleep(0.02)
        gate.unlink()
        more = start_and_hold(len(before) + 4)
        cluster.remove_node(second, allow_graceful=False)
        until(lambda: sum(map(alive, more.values())) == 1, "the run on the lost node to die")
        killed |= {number: pid for number, pid in more.items() if not alive(pid)}
        gate.unlink()
        out, err = driver.communicate(timeout=180)
        said = {"code": driver.returncode, "out": out, "err": err}
        yield {"table": runs_table(runs), "log": noted(folder), "before": before, "killed": set(killed), "folder": runs} | said
    finally:
        cluster.shutdown()


def test_23_results_and_one_named_failure(lost):
    table = lost["table"]
    assert lost["code"] == 1, lost["err"]
    assert len(table) == N and table.status.value_counts().to_dict() == {"finished": N - 1, "failed": 1}
    failed = table[table.status == "failed"].iloc[0]
    assert failed["number"] == 5 and failed["error"] == "RuntimeError: number 5 <does> not work"
    assert (lost["folder"] / failed["run"] / "notebook.ipynb").exists() and "not work" in lost["out"]
    assert sorted(table["test / square"].dropna()) == sorted(i**2 for i in range(N) if i != 5)


def test_none_ran_twice(lost):
    "Each run comes to its end once. What was under way when something was killed starts again, and nothing else does."
    log, killed = lost["log"], lost["killed"]
    assert N // 2 <= len(lost["before"]) < N - 4 and len(killed) == 3 and not killed & lost["before"]
    assert [log[f"start {i}"] for i in range(N)] == [1 + (i in killed) for i in range(N)]
    assert [log[f"end {i}"] for i in range(N)] == [int(i != 5) for i in range(N)]
    assert lost["table"].starts.sum() == N + 3


def test_a_machine_too_small_is_refused(tmp_path):
    ray = pytest.importorskip("ray", reason="needs ray")
    notebook = write_tiny(tmp_path)
    with pytest.raises(ArgumentError, match="`gpus`"):
        sweep(notebook, {"number": [1]}, gpus=64, jobs=1 + 1, folder=str(tmp_path / "runs"), progress=False)
    assert not ray.is_initialized() and not noted(tmp_path)


def test_nobody_at_the_address(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs ray")
    with pytest.raises((HiernbError, ConnectionError)):
        sweep(write_tiny(tmp_path), {"number": [1]}, address="no-such-cluster", progress=False)
