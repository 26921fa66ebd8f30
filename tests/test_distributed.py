"""Several processes on one machine, joined by gloo: what one process would do, they do together."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hiernb.errors import ArgumentError, EmptyError
from hiernb.retreever.model import Retreever
from hiernb.retreever_runs import RetreeverRun
from hiernb.training.cli import train_tree
from hiernb.training.distributed import average_gradients, broadcast_weights, gather_rows, own_share, ranks
from hiernb.training.gathered import gathered_contrast
from hiernb.training.negatives import RelevanceMask, tree_contrast

HEAD = """
import json, pathlib, numpy as np, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
from hiernb.training.distributed import *
from hiernb.training.gathered import gathered_contrast
from hiernb.retreever.model import Retreever
from hiernb.training.negatives import RelevanceMask
"""
TAIL = """
pathlib.Path(folder, f"result-{rank}").write_text(json.dumps(result))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def context():
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["hiernb.training.gathered", "hiernb.retreever.model"])  # imported once for all processes
    yield server
    os.environ.pop("GLOO_SOCKET_IFNAME") if before is None else os.environ.update(GLOO_SOCKET_IFNAME=before)


@pytest.fixture
def on_ranks(context, tmp_path):
    def run(world, lines, **known):
        known |= {"world": world, "folder": str(tmp_path)}
        started = [context.Process(target=exec, args=(HEAD + lines + TAIL, {"rank": r, **known})) for r in range(world)]
        for p in started:
            p.start()
        for p in started:
            p.join(timeout=120)
        assert [p.exitcode for p in started] == [0] * world
        return [json.loads(Path(tmp_path, f"result-{r}").read_text()) for r in range(world)]

    return run


def test_rows_of_any_shape_and_number(on_ranks):
    seen = on_ranks(3, """
own = [torch.arange(2.0).view(1, 2) + 10 * rank] * [2, 0, 3][rank]
x = (torch.cat(own) if own else torch.zeros(0, 2)).requires_grad_()
y = gather_rows(x)
weight = torch.arange(10.0).view(5, 2)
((rank + 1) * weight * y).sum().backward()
half = gather_rows(torch.full((rank + 1,), rank % 2 == 0))
deep = gather_rows(torch.full((1, 2, 3), rank, dtype=torch.int32))
result = y.tolist(), x.grad.tolist(), half.tolist(), deep.shape, str(deep.dtype), row_counts(rank * 7)
""")
    rows = [[0, 1]] * 2 + [[20, 21]] * 3
    weight = 6 * np.arange(10.0).reshape(5, 2)  # 1 + 2 + 3 times the weights: the losses of all ranks
    for result, own in zip(seen, (slice(0, 2), slice(2, 2), slice(2, 5))):
        assert result[0] == rows
        assert np.array(result[1]).reshape(-1, 2).tolist() == weight[own].tolist()
        assert result[2:] == [[True, False, False, True, True, True], [3, 2, 3], "torch.int32", [0, 7, 14]]


SETUP = """
torch.manual_seed(0)
tree = Retreever(12, depth=4, split="mlp", propagation="learned", scales="per-level", spread=1.0, growth=1.0).eval()
queries, contexts, extra = torch.randn(9, 12), torch.randn(9, 12), torch.randn(6, 12)
relevant = RelevanceMask(torch.tensor([[i, i] for i in range(9)] + [[0, 6], [3, 10], [5, 12], [8, 2]]))
"""


@pytest.mark.parametrize("cuts", [[0, 3, 6, 9], [0, 1, 2, 9]])
def test_three_ranks_are_one_batch(on_ranks, cuts):
    known = {"torch": torch, "Retreever": Retreever, "RelevanceMask": RelevanceMask}
    exec(SETUP, known)
    tree, ids = known["tree"], torch.arange(15)
    whole, _ = tree_contrast(tree, known["queries"], torch.cat([known["contexts"], known["extra"]]), [1, 4], known["relevant"](ids[:9], ids))
    whole.backward()
    expected = torch.cat([p.grad.flatten() for p in tree.parameters()])
    seen = on_ranks(3, SETUP + """
own = torch.arange(cuts[rank], cuts[rank + 1])
more = [torch.tensor([0, 1, 4]), torch.tensor([], dtype=torch.long), torch.tensor([1, 2, 3, 5])][rank]  # 1 is mined twice: it counts once
ids = torch.cat([own, 9 + more])
value, logs = gathered_contrast(tree, queries[own], torch.cat([contexts[own], extra[more]]), [1, 4], own, ids, relevant, chunk=2)
value.backward()
average_gradients(tree.parameters())
result = value.item(), torch.cat([p.grad.flatten() for p in tree.parameters()]).tolist(), logs["level"]
""", cuts=cuts)
    assert np.mean([value for value, _, _ in seen]) == pytest.approx(whole.item(), abs=1e-5)
    for _, gradient, level in seen:
        assert level == 4 and gradient == seen[0][1]
        assert np.abs(np.array(gradient) - expected.numpy()).max() < 1e-6 * max(1, expected.abs().max())
    assert expected.abs().max() > 0.1


def test_without_the_others_rows_the_gradient_is_another(on_ranks):
    known = {"torch": torch, "Retreever": Retreever, "RelevanceMask": RelevanceMask}
    exec(SETUP, known)
    tree = known["tree"]
    tree_contrast(tree, known["queries"][:8], known["contexts"][:8], [4])[0].backward()
    expected = torch.cat([p.grad.flatten() for p in tree.parameters()]).numpy()
    (local, _) = on_ranks(2, SETUP + """
from hiernb.training.negatives import tree_contrast
own = slice(0, 4) if rank == 0 else slice(4, 8)
tree_contrast(tree, queries[own], contexts[own], [4])[0].backward()
average_gradients(tree.parameters())
result = torch.cat([p.grad.flatten() for p in tree.parameters()]).tolist()
""")
    assert np.abs(np.array(local) - expected).max() > 1e-3


def test_weights_gradients_and_shares(on_ranks):
    seen = on_ranks(2, """
torch.manual_seed(rank)
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
model[1].running_mean += rank
broadcast_weights(model)
model[0].weight.grad = torch.full((2, 2), float(rank))
if rank == 1:  # what one rank alone has used
    model[2].bias.grad = torch.ones(1)
average_gradients(model.parameters())
try:
    own_share(np.arange(5))
except ValueError as e:
    error = str(e)
result = [model.state_dict()["1.running_mean"].tolist(), model[0].weight.tolist(), model[0].weight.grad.tolist(), model[2].bias.grad.tolist(),
          model[0].bias.grad, own_share(np.arange(6)).tolist(), error, mean_over_ranks(torch.tensor([rank * 2.0])).item(), rank_0_says(lambda: {"rank": rank})]
""")
    for r, result in enumerate(seen):
        assert result[:2] == seen[0][:2]
        assert result[2:5] == [[[0.5, 0.5], [0.5, 0.5]], [0.5], None]
        assert result[5] == [[0, 1, 2], [3, 4, 5]][r]
        assert "batch_size" in result[6] and "multiple of 2" in result[6]
        assert result[7:] == [1.0, {"rank": 0}]


def test_one_process_needs_none_of_it():
    assert ranks() == (0, 1)
    x, layer = torch.randn(3, 2), torch.nn.Linear(2, 2)
    assert gather_rows(x) is x
    broadcast_weights(layer)
    average_gradients(layer.parameters())
    assert layer.weight.grad is None
    assert own_share(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    tree = Retreever(2, depth=2)
    with pytest.raises(ArgumentError, match="context_ids"):
        gathered_contrast(tree, x, x, [2], torch.arange(3), torch.arange(2))
    with pytest.raises(EmptyError, match="levels"):
        gathered_contrast(tree, x, x, [], torch.arange(3), torch.arange(3))


FIT = """
import json, os, sys, torch
torch.set_num_threads(1)
from hiernb.retreever.model import Retreever
from hiernb.retreever.schedule import make_schedule
from hiernb.training.loop import fit
from hiernb.training.mining import mine_negatives, mined_tree_loss
from hiernb.training.optim import TrainSettings
from hiernb.training.retrieval import PairVectors, validator
g = torch.Generator().manual_seed(0)
queries, contexts = torch.randn(64, 16, generator=g), torch.randn(80, 16, generator=g)
contexts[:64] += queries
pairs = PairVectors(queries, contexts, torch.arange(64)[:, None].expand(64, 2).clone())
mined = mine_negatives(queries, contexts, pairs.relevance, k=4)
torch.manual_seed(int(os.environ.get("RANK", 0)))  # each process would start elsewhere: rank 0's weights count
model = Retreever(16, depth=4)
settings = TrainSettings(steps=20, batch_size=16, lr=1e-2, validate_every=5, log_every=5, checkpoint_every=5, device="cpu")
loss = mined_tree_loss(pairs, make_schedule("stochastic", 4, 20), mined, per_query=2)
def stop(model, done):
    if done == int(os.environ.get("STOP", 0)):
        raise KeyboardInterrupt
history = fit(model, loss, 64, settings, validate=validator(pairs), run_dir=sys.argv[1], after_step=stop, progress=False)
if os.environ.get("RANK", "0") == "0":
    out = {"weights": model.split.weight.flatten().tolist(), "best": history.best_value, "losses": history.curve("loss")[1].tolist()}
    json.dump(out, open(sys.argv[2], "w"))
if torch.distributed.is_initialized():  # no process leaves while another still talks to it
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_a_training_on_two_processes_is_the_training_on_one_and_goes_on_from_it(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(FIT)
    one, two = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    out = {}
    for name, legs in {"one": [(one, {})], "two": [(two, {})], "moved": [(one, {"STOP": "11"}), (two, {})]}.items():
        for i, (start, more) in enumerate(legs):  # "moved" is interrupted after 11 steps on one process and goes on with two
            command = [*start, str(script), str(tmp_path / f"run-{name}"), str(tmp_path / f"out-{name}")]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | more, timeout=300, capture_output=True)
            assert (done.returncode == 0) == (i == len(legs) - 1), done.stderr.decode()[:6000]
        out[name] = json.loads((tmp_path / f"out-{name}").read_text())
    for name in ("two", "moved"):
        np.testing.assert_allclose(out[name]["weights"], out["one"]["weights"], atol=1e-5)
        np.testing.assert_allclose(out[name]["losses"], out["one"]["losses"], atol=1e-5)
        assert out["one"]["best"] == pytest.approx(out[name]["best"], abs=1e-6)
        assert len(list((tmp_path / f"run-{name}").rglob("*.jsonl"))) == 1  # rank 0 writes for both


def test_the_command_on_two_processes(tmp_path):
    run = {"depth": 3, "max_pairs": 200, "max_length": 32, "steps": 6, "batch_size": 16, "validate_every": 3, "device": "cpu"}
    run |= {"from_leaves": 0.0, "from_encoder": 0.0}
    (tmp_path / "run.json").write_text(json.dumps(run))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hiernb.training.cli"]
    command = ["--config", str(tmp_path / "run.json"), "--set", f"run_dir={tmp_path / 'two'}"]
    done = subprocess.run([*launch, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("NDCG@10") == 1  # rank 0 alone reports
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["processes"] == 2
    one = train_tree(RetreeverRun(**run, run_dir=str(tmp_path / "one")), progress=False)[0].state_dict()
    two = Retreever.from_pretrained(tmp_path / "two").state_dict()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)
