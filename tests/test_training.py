"Training: killed, continued, damaged, full disk, and many bad inputs."

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import hiernb.files
from hiernb.errors import ArgumentError, EmptyError, FileFormatError, HiernbError, NotFiniteError, RangeError, UnknownNameError
from hiernb.files import write_tensors
from hiernb.training.batches import EpochBatches
from hiernb.training.checkpoint import Checkpoints, MismatchError, link_file
from hiernb.training.history import read_log
from hiernb.training.loop import TrainSettings, fit
from hiernb.training.retrieval import PairVectors, tree_loss
from hiernb.training.speed import BatchLoss, Feed
from hiernb.training.state import NamedOptimizer, RandomState, flatten_state, unflatten_state

CPU = dict(device="cpu", log_every=5)


pytestmark = pytest.mark.usefixtures("one_thread")


def data():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(120, 8, generator=g)
    return x, (x[:, 0] * x[:, 1] > 0).long()


X, Y = data()


def net(hidden=16, p=0.3):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, hidden), torch.nn.ReLU(), torch.nn.Dropout(p), torch.nn.Linear(hidden, 2))


def loss(model, positions, step):
    return torch.nn.functional.cross_entropy(model(X[positions]), Y[positions]), {}


def accuracy(model):
    return {"accuracy": (model(X).argmax(-1) == Y).float().mean(), "noise": torch.rand(1)}


def run(model=None, n=100, **kw):
    settings_ = TrainSettings(**(CPU | dict(steps=40, batch_size=16, validate_every=10) | kw.pop("settings", {})))
    return fit(model or net(), kw.pop("loss", loss), n, settings_, progress=False, **kw)


def digest(model):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()


# ---------------------------------------------------------------- kill -9

# One process imports torch and forks the trainings, so that a dozen of them cost one import. It computes nothing itself before
# forking. A training has dropout, a depth drawn from a generator of its own, and an average of weights in `extra_state`.
NURSERY = """
import contextlib, hashlib, json, os, signal, sys, time
from pathlib import Path
import torch
import torch._dynamo  # the first optimiser imports it: once here, not in every child
torch.set_num_threads(1)
import hiernb.files
from hiernb.training.loop import TrainSettings, fit
from hiernb.training.checkpoint import Checkpoints

def train(folder, slow_write=None, pace=0.0):
    torch.manual_seed(1)
    body = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
    model = torch.nn.ModuleDict({"body": body, "drop": torch.nn.Dropout(0.2), "head": torch.nn.Linear(8, 2)})
    g = torch.Generator().manual_seed(3)
    x = torch.randn(120, 8, generator=g)
    y = (x[:, 0] * x[:, 1] > 0).long()
    depths = torch.Generator().manual_seed(9)
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, p, n: 0.9 * a + 0.1 * p)

    def forward(model, x, depth):
        for layer in body[:depth]:
            x = x + model["drop"](torch.relu(layer(x)))
        return model["head"](x)

    def loss(model, positions, step):
        time.sleep(pace)
        depth = int(torch.randint(1, 4, (1,), generator=depths))
        return torch.nn.functional.cross_entropy(forward(model, x[positions], depth), y[positions]), {"depth": depth}

    def validate(model):
        return {"accuracy": (forward(model, x, 3).argmax(-1) == y).float().mean(), "noise": torch.rand(1)}

    if slow_write is not None:
        real = hiernb.files.atomic_write
        count = [0]

        @contextlib.contextmanager
        def slow(path, mode="wb"):
            with real(path, mode) as f:
                class Slow:
                    def write(self, data):
                        count[0] += 1
                        if mode == "wb" and count[0] == slow_write:
                            f.write(data[: len(data) // 2])
                            f.flush()
                            Path(folder, "writing").touch()
                            time.sleep(60)
                        return f.write(data)

                    writelines = f.writelines
                yield Slow() if mode == "wb" else f

        hiernb.files.atomic_write = slow

    s = TrainSettings(steps=60, batch_size=32, validate_every=10, checkpoint_every=7, log_every=1, device="cpu", lr=0.01)
    fit(model, loss, 100, s, validate=validate, run_dir=folder, extra_state={"depths": depths, "average": average},
        after_step=lambda m, t: average.update_parameters(m), progress=False)
    final = Checkpoints(Path(folder, "checkpoints")).load("latest")
    h = hashlib.sha256()
    for part in ("model", "extra.average"):
        for k, v in final.state[part].items():
            h.update(v.numpy().tobytes())
    for v in model.state_dict().values():
        h.update(v.numpy().tobytes())
    rows = [{k: v for k, v in json.loads(l).items() if k != "examples/s"} for l in open(Path(folder, "log.jsonl"))]
    Path(folder, "result.json").write_text(json.dumps([h.hexdigest(), rows]))

def attempt(folder, kill_when=None, **kw):
    "Forks a training; kills it as soon as `kill_when()`; says how it ended."
    pid = os.fork()
    if pid == 0:
        try:
            train(folder, **kw)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if kill_when is not None and kill_when():
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        time.sleep(0.0005)

def lines(folder):
    p = Path(folder, "log.jsonl")
    return p.read_bytes().count(b"\\n") if p.exists() else 0

root, plan = sys.argv[1], json.loads(sys.argv[2])
out = {}
assert attempt(Path(root, "whole")) == 0
out["whole"] = json.loads(Path(root, "whole", "result.json").read_text())
out["killed"] = 0
for name, kills in plan["steps"].items():
    folder = Path(root, name)
    for at in kills:
        status = attempt(folder, lambda: lines(folder) >= at, pace=0.02)
        out["killed"] += os.WIFSIGNALED(status)
    assert attempt(folder) == 0
    out[name] = json.loads((folder / "result.json").read_text())
folder = Path(root, "writing")
for nth in plan["writes"]:
    (folder / "writing").unlink(missing_ok=True)
    status = attempt(folder, (folder / "writing").exists, slow_write=nth)
    out["killed"] += os.WIFSIGNALED(status)
out["left"] = sorted(p.name for p in (folder / "checkpoints").iterdir())
assert attempt(folder) == 0
out["cleaned"] = sorted(p.name for p in (folder / "checkpoints").iterdir())
out["writing"] = json.loads((folder / "result.json").read_text())
print(json.dumps(out))
"""


def test_killed_anywhere_ends_with_the_same_bits(tmp_path):
    rng = random.Random(os.environ.get("PYTEST_SEED", 11))
    plan = {"steps": {f"run{i}": sorted(rng.sample(range(2, 62), 3)) for i in range(2)}, "writes": [1, 4]}
    script = tmp_path / "nursery.py"
    script.write_text(textwrap.dedent(NURSERY))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, tmp_path, json.dumps(plan)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["killed"] == 6 + 2  # every kill met a living training
    for name in [*plan["steps"], "writing"]:
        assert out[name][0] == out["whole"][0], (name, plan)
        assert out[name][1] == out["whole"][1], (name, plan)
    steps = [r["step"] for r in out["whole"][1] if "loss" in r]
    assert steps == list(range(1, 61))
    assert any(n.endswith(".tmp") for n in out["left"]) and not any(n.endswith(".tmp") for n in out["cleaned"])


def test_a_kill_between_checkpoint_and_best_is_made_up_for(tmp_path, monkeypatch):
    path = []
    run(validate=lambda m: path.append(digest(m)) or {"x": 0.0})
    at_20 = lambda m: {"x": float(digest(m) == path[2])}  # noqa: E731

    class Killed(BaseException):
        pass

    def dies(source, target):
        if source.name == "step-000000020.safetensors":
            raise Killed
        link_file(source, target)

    with monkeypatch.context() as m:
        m.setattr("hiernb.training.checkpoint.link_file", dies)
        with pytest.raises(Killed):
            run(validate=at_20, run_dir=tmp_path)
    kept, model = Checkpoints(tmp_path / "checkpoints"), net()
    assert (kept.load("best").step, kept.load("latest").step) == (0, 20)
    assert run(model, validate=at_20, run_dir=tmp_path).resumed_from == 20
    assert kept.load("best").step == 20 and digest(model) == path[2]


# ---------------------------------------------------------------- full disk


class FullDisk:
    "Lets some binary writes through, then answers ENOSPC."

    def __init__(self, monkeypatch, fails):
        real, self.count = hiernb.files.atomic_write, 0

        @contextlib.contextmanager
        def atomic_write(path, mode="wb"):
            with real(path, mode) as f:
                if mode == "wb":
                    self.count += 1
                    if fails(self.count):
                        f.write(b"half")
                        raise OSError(errno.ENOSPC, "No space left on device")
                yield f

        monkeypatch.setattr(hiernb.files, "atomic_write", atomic_write)


def test_full_disk_in_between_warns_and_training_goes_on(tmp_path, monkeypatch):
    whole, model = net(), net()
    run(whole)
    disk = FullDisk(monkeypatch, lambda i: i == 2)
    with pytest.warns(UserWarning, match="checkpoint of step 20 could not be written.*training goes on"):
        h = run(model, run_dir=tmp_path)
    assert disk.count == 4 and h.step == 40 and digest(model) == digest(whole)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [30, 40]


def test_full_disk_at_the_end_is_an_error_that_keeps_the_weights_and_older_files(tmp_path, monkeypatch):
    whole, model = net(), net()
    run(whole)
    with monkeypatch.context() as m, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FullDisk(m, lambda i: i >= 3)
        with pytest.raises(OSError, match="last checkpoint .step 40. could not be written") as e:
            run(model, run_dir=tmp_path)
    assert e.value.errno == errno.ENOSPC and digest(model) == digest(whole)
    kept = Checkpoints(tmp_path / "checkpoints")
    assert kept.steps() == [10, 20] and not list((tmp_path / "checkpoints").glob(".*"))
    again = net()
    assert run(again, run_dir=tmp_path).resumed_from == 20
    assert digest(again) == digest(whole)


def test_a_log_that_cannot_be_written_warns_once(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    from hiernb.training.history import TrainLog

    log = TrainLog(tmp_path / "log.jsonl")
    with pytest.warns(UserWarning, match="log cannot be written") as caught:
        log.append({"step": 1})
        log.append({"step": 2})
    assert len(caught) == 1 and len(log.rows) == 2


# ---------------------------------------------------------------- damaged and foreign files


def stopped(folder, at, **kw):
    "A training whose loss fails at a step, as a crash would."

    def breaks(model, positions, step):
        if step == at:
            raise RuntimeError("crash")
        return loss(model, positions, step)

    with pytest.raises(RuntimeError, match="crash"):
        run(loss=breaks, run_dir=folder, **kw)
    return Checkpoints(folder / "checkpoints")


def test_truncated_newest_checkpoint_falls_back_with_a_warning(tmp_path):
    whole, model = net(), net()
    run(whole)
    kept = stopped(tmp_path, 35)
    assert kept.steps() == [20, 30]
    for cut in (1, 100, kept.path(30).stat().st_size - 4):
        kept.path(30).write_bytes(kept.path(30).read_bytes()[:-cut] if kept.path(30).stat().st_size > cut else b"")
        with pytest.warns(UserWarning, match="step-000000030.safetensors: damaged"):
            assert kept.latest() == kept.path(20)
    with pytest.warns(UserWarning, match="damaged"):
        h = run(model, run_dir=tmp_path)
    assert h.resumed_from == 20 and digest(model) == digest(whole)
    steps = [r["step"] for r in read_log(tmp_path / "log.jsonl")]
    assert steps == sorted(set(steps)) == list(range(5, 41, 5))
    assert kept.steps() == [30, 40]


def test_all_checkpoints_damaged_is_an_error_not_a_fresh_start(tmp_path):
    kept = stopped(tmp_path, 35)
    for s in kept.steps():
        kept.path(s).write_bytes(b"\0" * 40)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(FileFormatError, match="all 2 checkpoints in it are damaged"):
        run(run_dir=tmp_path)
    assert run(run_dir=tmp_path, resume=False).step == 40


def test_damaged_best_file_is_reported_and_training_ends(tmp_path):
    kept = stopped(tmp_path, 35, validate=accuracy)
    best = kept.load("best").step
    kept.best_path.unlink()
    kept.best_path.write_bytes(b"nothing")
    if best not in kept.steps():
        with pytest.warns(UserWarning, match="best weights so far"):
            run(run_dir=tmp_path, validate=accuracy)
    else:
        run(run_dir=tmp_path, validate=accuracy)


def test_foreign_files_are_refused_by_name(tmp_path):
    kept = stopped(tmp_path, 35)
    write_tensors(kept.path(900), {"x": torch.zeros(2)}, kind="flat-index")
    for resume in (True, False):
        with pytest.raises(FileFormatError, match="step-000000900.safetensors.*flat-index"):
            run(run_dir=tmp_path, resume=resume)
    assert kept.steps() == [20, 30, 900]
    kept.path(900).unlink()
    (kept.folder / "step-12.safetensors").write_bytes(b"x")
    with pytest.raises(FileFormatError, match="step-12.safetensors"):
        run(run_dir=tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(settings={"lr": 1e-3}), r"settings\.lr is 0\.004 there, 0\.001 here"),
        (dict(settings={"steps": 50}), r"settings\.steps is 40 there, 50 here"),
        (dict(settings={"betas": (0.9, 0.99)}), r"settings\.betas is \[0\.9, 0\.95\] there"),
        (dict(model_=16 + 1), r"model\.0\.weight is float32 \[16, 8\] there, float32 \[17, 8\] here"),
        (dict(n=99), r"data\.n_examples is 100 there, 99 here"),
        (dict(fingerprint="ab"), r"data\.fingerprint is None there, ab here"),
        (dict(extra_state={"g": torch.Generator()}), r"parts is"),
        (dict(validate=accuracy, monitor="accuracy"), r"data\.monitor is None there, accuracy here"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(tmp_path, change, message):
    kept = stopped(tmp_path, 25)
    before = {p.name: p.read_bytes() for p in kept.folder.iterdir()}
    change = dict(change)
    with pytest.raises(MismatchError, match=message):
        run(net(change.pop("model_", 16)), run_dir=tmp_path, **change)
    assert before == {p.name: p.read_bytes() for p in kept.folder.iterdir()}
    run(run_dir=tmp_path, settings={"keep_last": 5, "log_every": 3, "checkpoint_every": 4})  # housekeeping may change


def test_resume_false_starts_anew(tmp_path):
    a, b = net(), net()
    run(a, run_dir=tmp_path)
    h = run(b, run_dir=tmp_path, resume=False, settings={"lr": 0.02})
    assert h.resumed_from is None and digest(a) != digest(b)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(5, 41, 5))


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("where", ["loss", "validate"])
def test_interruption_saves_at_a_step_boundary(tmp_path, where):
    whole, model = net(), net()
    run(whole, validate=accuracy, monitor="accuracy")

    def loss_(model, positions, step):
        if where == "loss" and step == 20:
            signal.raise_signal(signal.SIGINT)
        return loss(model, positions, step)

    calls = []

    def validate_(model):
        calls.append(1)
        if where == "validate" and len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return accuracy(model)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(loss=loss_, validate=validate_, monitor="accuracy", run_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert Checkpoints(tmp_path / "checkpoints").load().step == (21 if where == "loss" else 20)
    h = run(model, validate=accuracy, monitor="accuracy", run_dir=tmp_path)
    assert digest(model) == digest(whole)
    assert h.curve("validation/accuracy")[0].tolist() == [0, 10, 20, 30, 40]


# ---------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    "kw, error, message",
    [
        (dict(n=0), EmptyError, "n_examples"),
        (dict(n=-1), RangeError, "n_examples"),
        (dict(n=2.5), ArgumentError, "n_examples"),
        (dict(settings={"patience": 2}), ArgumentError, "patience"),
        (dict(monitor="accuracy"), ArgumentError, "monitor"),
        (dict(validate=accuracy, monitor="acuracy"), UnknownNameError, "did you mean 'accuracy'"),
        (dict(validate=lambda m: {}), ArgumentError, "at least one number"),
        (dict(better="more"), UnknownNameError, "better"),
        (dict(model=torch.nn.Dropout()), EmptyError, "without trainable parameters"),
        (dict(settings={"precision": "float16"}), ArgumentError, "precision"),
        (dict(extra_state={"x": 3}), ArgumentError, "extra_state"),
        (dict(loss=lambda m, p, t: (m(X[p]), {})), ArgumentError, "scalar tensor"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, kw, error, message):
    with pytest.raises(error, match=message) as e:
        run(run_dir=tmp_path / "run", **kw)
    assert isinstance(e.value, HiernbError)
    assert not list(tmp_path.rglob("step-*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none():
    with pytest.raises(ArgumentError, match="`device`.*torch sees no CUDA device"):
        run(settings={"device": "cuda"})


@pytest.mark.parametrize("accumulation, at", [(1, 17), (3, 17), (1, 39), (1, 0)])
def test_nan_names_the_step_and_keeps_the_last_checkpoint(tmp_path, accumulation, at):
    def turns_bad(model, positions, step):
        value, logs = loss(model, positions, step)
        return value * (float("inf") if step >= at else 1), logs

    with pytest.raises(NotFiniteError, match=f"at step {at + 1} of 40 it was not") as e:
        run(loss=turns_bad, run_dir=tmp_path, settings={"accumulation": accumulation})
    saved = Checkpoints(tmp_path / "checkpoints")
    assert all(s <= at for s in saved.steps())
    assert (saved.path(10 * (at // 10)).name in str(e.value)) == (at >= 10)
    for s in saved.steps():
        assert all(torch.isfinite(v).all() for v in saved.load(s).state["model"].values())


# ---------------------------------------------------------------- behaviour


def test_random_generators_of_the_caller_are_left_alone_and_validation_changes_nothing():
    a = net()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(a)
    assert torch.equal(torch.rand(3), expected)
    c = net()
    run(c, loss=lambda *x: (torch.rand(1), loss(*x))[1])
    assert digest(c) != digest(a)  # the draws do matter
    seen, d = [], net()
    h = run(d, validate=lambda m: seen.append(torch.rand(1)) or {"calls": len(seen)}, settings={"validate_every": 40})
    assert h.best_step == 40 and digest(d) == digest(a)


def test_accumulation_equals_the_large_batch():
    grads = {}
    for batch, steps in ((32, 1), (8, 4)):
        model = net(p=0.0)
        run(model, settings={"steps": 1, "batch_size": batch, "accumulation": steps, "warmup": 0.0, "clip": None},
            optimizer=lambda m, s: torch.optim.SGD(m.parameters(), lr=1.0))
        grads[batch] = [a - b for a, b in zip(net(p=0.0).parameters(), model.parameters())]
    for a, b in zip(grads[32], grads[8]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert a.abs().max() > 1e-4


def test_clipping_bounds_the_update():
    for clip in (0.01, 1e6):
        model = net(p=0.0)
        run(model, settings={"steps": 1, "warmup": 0.0, "clip": clip}, optimizer=lambda m, s: torch.optim.SGD(m.parameters(), lr=1.0))
        norm = torch.cat([(a - b).flatten() for a, b in zip(net().parameters(), model.parameters())]).norm()
        assert (norm <= 0.0101) == (clip == 0.01)


def test_many_trainings_in_one_process_beside_a_users_accelerator():
    from accelerate import Accelerator

    own = Accelerator(cpu=True)
    plain, half = net(), net()
    for precision, model in (("float32", plain), ("bfloat16", half), ("float32", plain)):
        run(model, settings={"precision": precision})
    assert own.state.mixed_precision == "no" and own.device.type == "cpu"
    assert digest(half) != digest(plain) and half[0].weight.dtype == torch.float32
    assert "forward" not in vars(half)


def test_patience_and_best_weights_with_min(tmp_path):
    values = iter([3.0, 2.0, float("nan"), 2.5, 2.0, 1.0])
    states = []

    def validate(model):
        states.append(digest(model))
        return {"error": next(values)}

    model = net()
    h = run(model, validate=validate, better="min", settings={"patience": 3, "validate_every": 5}, run_dir=tmp_path)
    assert (h.best_step, h.best_value, h.step, h.stopped_early) == (5, 2.0, 20, True)
    assert digest(model) == states[1]
    again = net()
    h = run(again, validate=validate, better="min", settings={"patience": 3, "validate_every": 5}, run_dir=tmp_path)
    assert h.step == 20 and h.stopped_early and digest(again) == states[1]


def test_small_set_gives_whole_batches():
    sizes = []
    run(n=7, loss=lambda m, p, t: (sizes.append(sorted(p.tolist())), loss(m, p, t))[1], settings={"steps": 3})
    assert sizes == [list(range(7))] * 3


# ---------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 99), t=st.integers(0, 200))
def test_batches_are_pure_complete_and_free_of_repeats(n, size, seed, t):
    batches = EpochBatches(n, size, seed)
    b = min(n, size)
    assert len(set(batches[t].tolist())) == b
    assert np.array_equal(batches[t], EpochBatches(n, size, seed)[t])
    first = np.concatenate([batches[i] for i in range(-(-3 * n // b))])[: 3 * n]
    assert np.bincount(first, minlength=n).tolist() == [3] * n


leaf = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8),
    hnp.arrays(st.sampled_from([np.float32, np.int64, np.uint8, np.bool_, np.uint32]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)),
)  # fmt: skip
keys = st.one_of(st.text(max_size=5), st.integers())
nest = st.recursive(leaf, lambda x: st.one_of(st.lists(x, max_size=3), st.tuples(x, x), st.dictionaries(keys, x, max_size=3)), max_leaves=12)


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(x) is type(y) for x, y in zip(a, b)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=80, deadline=None)
@given(state=nest)
def test_any_state_survives_a_file(tmp_path_factory, state):
    p = tmp_path_factory.mktemp("s") / "x.safetensors"
    tensors, skeleton = flatten_state(state)
    write_tensors(p, tensors, "demo", meta=skeleton)
    loaded, meta = hiernb.files.read_tensors(p, "demo")
    assert same(state, unflatten_state(loaded, meta))


def test_names_with_slashes_do_not_collide():
    state = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    back = unflatten_state(*flatten_state(state))
    assert back["a/b"] == 1 and back["a"]["b"] == 0


def test_optimizer_state_follows_names_not_order():
    model = net(p=0.0)
    groups = list(model.parameters())
    a, b = torch.optim.AdamW(groups), torch.optim.AdamW(groups[::-1])
    loss(model, np.arange(20), 0)[0].backward()
    a.step()
    with pytest.raises(ArgumentError, match="optimizer"):
        NamedOptimizer(b, model).load_state_dict(NamedOptimizer(a, model).state_dict())


def test_random_state_covers_every_generator():
    def draw():
        return [random.random(), np.random.rand(), torch.rand(1).item()]

    state = RandomState().state_dict()
    first = draw()
    state = unflatten_state(*flatten_state(state))
    RandomState().load_state_dict(state)
    assert draw() == first


# ---------------------------------------------------------------- compiled, prepared ahead


class Recursive(torch.nn.Module):
    """Never called itself: the loss calls `think`, which calls its body several times, once without gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.body, self.head = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()), torch.nn.Linear(8, 2)
        self.calls = []

    def think(self, x):
        with torch.no_grad():
            x = x + self.body(x)
        for _ in range(2):
            x = x + self.body(x)
        self.calls.append(self.body._compiled_call_impl is not None)
        return self.head(x)


def test_compiled_is_eager_to_rounding_and_leaves_the_model_as_it_was():
    def think(model, positions, step):
        return torch.nn.functional.cross_entropy(model.think(X[positions]), Y[positions]), {}

    def validate(model):
        assert model.body._compiled_call_impl is None  # as whoever uses the model later
        return {"loss": torch.nn.functional.cross_entropy(model.think(X), Y)}

    eager, compiled = Recursive(), Recursive()
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
        s = {"steps": 12, "log_every": 1, "validate_every": 6, "precision": precision}
        a = run(eager, loss=think, settings=s, validate=validate, better="min")
        b = run(compiled, loss=think, settings=s | {"compile": "default"}, validate=validate, better="min")
        np.testing.assert_allclose(a.curve("loss")[1], b.curve("loss")[1], atol=tolerance)
        assert a.curve("loss")[1][-1] < a.curve("loss")[1][0]
    assert not any(eager.calls) and sum(compiled.calls) == 2 * 11  # all but the first step, which is watched; no validation
    assert [*compiled.state_dict()] == [*eager.state_dict()] and compiled.body._compiled_call_impl is None


def test_a_compiled_run_goes_on_where_an_eager_one_stopped(tmp_path):
    """How steps are made fast is housekeeping: a run may go on otherwise than it began."""
    whole = run(net(p=0.0), settings={"steps": 20}, run_dir=tmp_path / "a")
    short = net(p=0.0)

    def stops(model, positions, step):
        if step == 10:
            raise KeyboardInterrupt
        return loss(model, positions, step)

    with pytest.raises(KeyboardInterrupt):
        run(short, loss=stops, settings={"steps": 20, "checkpoint_every": 5}, run_dir=tmp_path / "b")
    rest = run(net(p=0.0), settings={"steps": 20, "checkpoint_every": 5, "compile": "default"}, run_dir=tmp_path / "b")
    assert rest.resumed_from == 10
    np.testing.assert_allclose(rest.curve("loss")[1], whole.curve("loss")[1], atol=1e-4)


@pytest.mark.parametrize("name, value, message", [("compile", "fast", "compile"), ("prefetch", -1, "prefetch"), ("prefetch", 1.5, "prefetch")])
def test_bad_speed_settings(name, value, message):
    with pytest.raises(ArgumentError, match=f"`{message}`"):
        TrainSettings(**{name: value})


def test_cuda_graphs_need_cuda(tmp_path):
    with pytest.raises(ArgumentError, match="`compile`.*CUDA graphs need a CUDA device"):
        run(settings={"compile": "reduce-overhead"}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def of_batch(model, batch, step):
    return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"]), {}


@pytest.mark.parametrize("accumulation, ahead", [(1, 1), (3, 4)])
def test_prefetched_batches_are_the_same_also_after_a_kill(tmp_path, accumulation, ahead):
    seen = []

    def batch(positions, step, stop=None):
        seen.append(step)
        if stop is not None and step == stop:
            raise KeyboardInterrupt
        return {"x": X[positions], "y": Y[positions]}

    s = {"steps": 30, "checkpoint_every": 7, "accumulation": accumulation}
    plain, ahead_of_time, resumed = net(), net(), net()
    run(plain, loss=BatchLoss(batch, of_batch), settings=s)
    inline, seen[:] = list(seen), []
    run(ahead_of_time, loss=BatchLoss(batch, of_batch), settings=s | {"prefetch": ahead})
    assert digest(plain) == digest(ahead_of_time) and seen == inline  # each once and in order, with dropout's random numbers untouched
    with pytest.raises(KeyboardInterrupt):
        run(net(), loss=BatchLoss(lambda p, t: batch(p, t, 17), of_batch), settings=s | {"prefetch": ahead}, run_dir=tmp_path)
    again = run(resumed, loss=BatchLoss(batch, of_batch), settings=s | {"prefetch": ahead}, run_dir=tmp_path)
    assert again.resumed_from in (14, 17) and digest(resumed) == digest(plain)


def test_what_goes_wrong_in_the_other_thread_is_raised_here_and_the_thread_ends():
    import threading

    def batch(positions, step):
        if step == 3:
            raise OSError("the shelf is gone")
        return {"x": X[positions], "y": Y[positions]}

    with pytest.raises(OSError, match="the shelf is gone"):
        run(loss=BatchLoss(batch, of_batch), settings={"prefetch": 2})
    assert not any(t.name.startswith("prefetch") and t.is_alive() for t in threading.enumerate())


def test_a_tree_on_token_states_with_prefetch():
    """Where its batches come from the host, a system's own loss is in two halves."""
    from hiernb.frozen import TokenStates
    from hiernb.retreever.model import Retreever
    from hiernb.retreever.schedule import ConstantSchedule

    generator = torch.Generator().manual_seed(0)
    states = [TokenStates(torch.randn(40, 6, 12, generator=generator), torch.ones(40, 6, dtype=torch.bool)) for _ in range(2)]
    pairs = PairVectors(*states, torch.arange(40).repeat(2, 1).T.contiguous())
    digests = []
    for prefetch in (0, 2):
        torch.manual_seed(0)
        tree = Retreever(12, depth=3, split="cross-attention", split_settings={"heads": 2, "key_dim": 4, "embedding_dim": 4})
        value = tree_loss(pairs, ConstantSchedule(3))
        assert isinstance(value, BatchLoss)
        run(tree, n=40, loss=value, settings={"steps": 6, "prefetch": prefetch})
        digests.append(digest(tree))
    assert digests[0] == digests[1]


def test_memory_at_most_is_in_the_history():
    before = run().peak_memory
    block = torch.ones(60_000_000)
    assert run().peak_memory - before > 150_000_000
    del block


def test_a_feed_stops_where_it_is_told():
    made = []
    feed = Feed(lambda t: made.append(t) or torch.tensor(t), 5, "cpu", end=3)
    assert [feed(t).item() for t in range(3)] == [0, 1, 2] and made == [0, 1, 2]
    feed.close()
