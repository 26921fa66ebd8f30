"""The model: saved and loaded, damaged, killed in training, and over the whole range of depths."""

import hashlib
import json
import signal
import subprocess
import sys

import pytest
import torch

from hiernb.errors import HiernbError, NotFiniteError
from hiernb.retreever.model import Retreever, retreever_loss
from hiernb.retreever.schedule import SCHEDULES, make_schedule
from hiernb.retreever.split import calibrate

TRAIN = """
import os, signal, sys, torch
from hiernb.retreever.model import Retreever
from hiernb.retreever.schedule import make_schedule
from hiernb.retreever.split import calibrate
from hiernb.training.loop import fit
from hiernb.training.optim import TrainSettings
from hiernb.training.retrieval import PairVectors, tree_loss, validator

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
contexts = torch.nn.functional.normalize(torch.randn(400, 32, generator=g), dim=-1)
queries = torch.nn.functional.normalize(contexts + 0.1 * torch.randn(400, 32, generator=g), dim=-1)
pairs = PairVectors(queries, contexts, torch.arange(400)[:, None].expand(-1, 2))
torch.manual_seed(0)
model = Retreever(dim=32, depth=6)
calibrate(model.split, contexts)
settings = TrainSettings(steps=400, batch_size=64, lr=1e-2, validate_every=100, checkpoint_every=20, log_every=10, device="cpu")
loss, last = tree_loss(pairs, make_schedule("stochastic", 6, 400)), int(sys.argv[2])
def deadly(model, positions, step):
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(model, positions, step)
fit(model, deadly, 400, settings, validate=validator(pairs), run_dir=sys.argv[1], progress=False)
model.save_pretrained(sys.argv[1])
"""


def weights(folder) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_killed_in_training_and_started_again_gives_the_same_weights(tmp_path):
    def run(folder, last):  # killed in step `last`
        return subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path / folder), str(last)]).returncode

    assert run("whole", -1) == 0
    for last in (7, 133, 381):  # before the first checkpoint, between two, near the end
        assert run("killed", last) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert run("killed", -1) == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 400  # no step stands twice in the log


@pytest.mark.parametrize("depth", [1, 2, 7, 12, 16])
def test_any_depth_trains_and_comes_back(tmp_path, depth):
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    model = Retreever(dim=8, depth=depth)
    calibrate(model.split, x)
    for name in SCHEDULES:
        loss, _ = retreever_loss(model, x, x, make_schedule(name, depth, 10).levels(9))
        model.zero_grad()
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.save_pretrained(tmp_path)
    again = Retreever.from_pretrained(tmp_path)
    assert torch.equal(again.assign_all(x), model.assign_all(x)) and again.depth == depth


def test_damaged_and_foreign_models_are_refused(tmp_path, refuses_damage):
    Retreever(dim=8, depth=3).save_pretrained(tmp_path)
    refuses_damage(tmp_path / "model.safetensors", lambda: Retreever.from_pretrained(tmp_path))
    (tmp_path / "config.json").unlink()  # a save that was killed between its two files: the weights know their configuration
    assert Retreever.from_pretrained(tmp_path).depth == 3


@pytest.mark.parametrize("x, error", [
    (torch.zeros(2, 9), HiernbError), (torch.zeros(8), HiernbError), (torch.full((2, 8), float("nan")), NotFiniteError),
    (torch.full((2, 8), float("inf")), NotFiniteError),
])
def test_bad_vectors_are_refused(x, error):
    model = Retreever(dim=8, depth=3)
    with pytest.raises(error):
        model.assign_all(x)
    with pytest.raises(error):
        calibrate(model.split, x)


@pytest.mark.parametrize("arguments, named", [
    ({"depth": 17}, "depth"), ({"depth": 0}, "depth"), ({"split": "x"}, "split"), ({"propagation": "prduct"}, "product"), ({"dim": 0}, "dim"),
    ({"scale": -1.0}, "init"), ({"spread": 0.0}, "spread"), ({"scales": "all"}, "scales"), ({"scales": "per-level", "scale": [1.0, 2.0]}, "3 levels"),
    ({"split_settings": {"width": 3}}, "split_settings"), ({"propagation": "learned", "propagation_settings": {"hiden": 3}}, "hidden"),
    ({"tokens": True}, "tokens"),
])
def test_bad_settings_are_refused_by_name(arguments, named):
    with pytest.raises(HiernbError, match=named):
        Retreever(**({"dim": 8, "depth": 3} | arguments))
