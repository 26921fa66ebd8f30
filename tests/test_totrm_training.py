"""Training ToTRM: exact continuation after a kill, slots, puzzle embeddings, evaluation from a folder, bad input."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import hiernb.totrm_training as training
from hiernb.data.boards import Puzzles
from hiernb.data.puzzle_sources import load_puzzles
from hiernb.data.puzzles import PuzzleSet
from hiernb.errors import ArgumentError, FileFormatError, HiernbError, ShapeError
from hiernb.experiments import read_parameters
from hiernb.totrm_evaluation import evaluate, load_totrm
from hiernb.totrm_runs import TotrmRun
from hiernb.totrm_training import SlotLoss, compile_model, exact_and_cells, train_totrm
from hiernb.training.checkpoint import Checkpoints, MismatchError
from hiernb.training.ema import EMA

SMALL = {"hidden": 16, "batch_size": 8, "steps": 14, "checkpoint_every": 5, "validate_every": 7, "validation": 10, "max_train": 40, "device": "cpu",
         "halt_max_steps": 3, "halt_exploration": 0.5}  # fmt: skip
RUNS = {
    "tree": {"branching_steps": 2, "branch_noise": 0.1},
    "trm": {"branching_steps": 0},
    "selection": {"branching_steps": 1, "merge": "select_q", "start_spread": 0.3},
    "curriculum": {"merge": "learned_weighted", "curriculum": [[0.5, 1, 2]], "decay": "cosine"},
    "bfloat16": {"precision": "bfloat16"},
    "attention": {"mixer": "attention", "merge_settings": {"heads": 2}, "keep_latent": False},
}


@pytest.fixture(scope="module")
def puzzles() -> PuzzleSet:
    "4×4 boards, with three puzzle embeddings to learn."
    found = load_puzzles("sudoku-4x4", train=40, validation=10, test=30)
    return dataclasses.replace(found, splits={s: Puzzles(p.inputs, p.labels, np.arange(len(p)) % 3) for s, p in found.splits.items()}, n_groups=3)


def states(model) -> list:
    "All tensors of a model."
    return [*model.state_dict().items()]


def break_at(monkeypatch, step: int) -> None:
    "The loss of this step raises."
    call = SlotLoss.__call__

    def broken(self, model, positions, at):
        if at == step:
            raise RuntimeError("the machine went away")
        return call(self, model, positions, at)

    monkeypatch.setattr(SlotLoss, "__call__", broken)


@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_run_continues_bit_for_bit(kind, puzzles, tmp_path, monkeypatch):
    run = TotrmRun(**SMALL | RUNS[kind])
    whole, history = train_totrm(run, puzzles, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        break_at(patch, 9)
        with pytest.raises(RuntimeError, match="went away"):
            train_totrm(run, puzzles, tmp_path / "broken", progress=False)
    again, second = train_totrm(run, puzzles, tmp_path / "broken", progress=False)
    assert second.resumed_from == 5
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(states(whole), states(again)))
    last = [Checkpoints(tmp_path / name / "checkpoints").load("latest").state for name in ("whole", "broken")]
    assert all(torch.equal(a, b) for a, b in zip(*(x["model"].values() for x in last)))
    assert all(torch.equal(last[0]["extra.carry"][k], last[1]["extra.carry"][k]) for k in ("z_H", "z_L", "steps", "halted"))
    assert [r["ce"] for r in history.rows if "ce" in r] == [r["ce"] for r in second.rows if "ce" in r]


KILLED = """
import os, signal, sys
from hiernb.totrm_runs import TotrmRun
from hiernb.totrm_training import SlotLoss, train_totrm
call, last = SlotLoss.__call__, int(sys.argv[3])
def deadly(self, model, positions, at):
    if at == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, model, positions, at)
SlotLoss.__call__ = deadly
run = TotrmRun(**eval(sys.argv[2]))
train_totrm(run, run.puzzles(), sys.argv[1], progress=False)[0].save_pretrained(sys.argv[1])
"""


def test_a_killed_process_continues_bit_for_bit(tmp_path):
    settings = repr(dict(SMALL, steps=60, checkpoint_every=3, validate_every=1000))
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

    def start(folder: str, last: int):  # killed in step `last`
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder), settings, str(last)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    broken, whole = start("broken", 20), start("whole", -1)
    assert broken.wait(timeout=240) == -signal.SIGKILL, broken.stderr.read().decode()[-2000:]
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    early, _ = load_totrm(tmp_path / "broken")  # the newest checkpoint can be evaluated
    resumed = start("broken", -1)
    for process in (whole, resumed):
        assert process.wait(timeout=240) == 0, process.stderr.read().decode()[-2000:]
    a, b = (load_totrm(tmp_path / name)[0] for name in ("whole", "broken"))
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(states(a), states(b)))
    assert not all(torch.equal(x, y) for (_, x), (_, y) in zip(states(a), states(early)))


def test_other_parameters_do_not_continue_the_run(puzzles, tmp_path):
    train_totrm(TotrmRun(**SMALL | {"steps": 7}), puzzles, tmp_path, progress=False)
    for changes in ({"ema": 0.5}, {"puzzle_lr": 0.5}, {"augment": False}, {"merge": "mean"}, {"curriculum": [[0.5, 1, 1]]}):
        with pytest.raises(MismatchError):
            train_totrm(TotrmRun(**SMALL | {"steps": 7} | changes), puzzles, tmp_path, progress=False)
    for changes in ({"starts": 4}, {"select": "residual"}, {"checkpoint_every": 2}):  # these do not change weights
        train_totrm(TotrmRun(**SMALL | {"steps": 7} | changes), puzzles, tmp_path, progress=False)


def test_puzzle_embeddings_move_by_the_sign_of_their_gradient(puzzles, tmp_path):
    run = TotrmRun(**SMALL | {"steps": 1, "puzzle_lr": 0.01, "warmup": 0.0, "puzzle_weight_decay": 0.0})
    train_totrm(run, puzzles, tmp_path, progress=False)
    state = Checkpoints(tmp_path / "checkpoints").load("latest").state
    table = state["model"]["puzzles.weight"]
    assert table.shape == (3, 16)
    assert torch.allclose(table.abs(), torch.full_like(table, 0.01)) and (table > 0).any() and (table < 0).any()
    assert torch.equal(state["extra.ema"]["module.puzzles.weight"], table)  # copied, not averaged
    assert all(torch.equal(state["extra.ema"][f"module.{k}"], v) for k, v in state["model"].items())  # the first average is the weights


def test_slots_keep_their_puzzles_until_they_halt(puzzles):
    run = TotrmRun(**SMALL | {"halt_exploration": 0.0})
    model = run.model(puzzles).train()
    slots = SlotLoss(run, model, puzzles)
    seen = []
    for step in range(7):
        slots(model, np.arange(8) + step, step)
        seen.append(slots.carry.data["inputs"].clone())
    changed = [not torch.equal(a, b) for a, b in zip(seen, seen[1:])]
    assert changed == [False, False, True, False, False, True]  # three steps a puzzle


def test_evaluation_needs_the_folder_only(puzzles, tmp_path):
    run = TotrmRun(**SMALL | {"steps": 7, "task": "sudoku-4x4", "task_options": {"train": 40, "validation": 10, "test": 30}, "starts": 2})
    model, _ = train_totrm(run, run.puzzles(), tmp_path, progress=False)
    from_checkpoint = evaluate(tmp_path)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"run": dataclasses.asdict(run)}))
    for p in (tmp_path / "checkpoints").glob("*"):
        p.unlink()
    saved = evaluate(tmp_path)
    assert len(saved.exact) == 30 and np.array_equal(saved.cells, from_checkpoint.cells)
    assert np.array_equal(saved.cells, exact_and_cells(model, run.puzzles().test, starts=2)[1])
    with pytest.raises(ShapeError, match="36 cells"):
        evaluate(tmp_path, load_puzzles("sudoku-6x6", train=4, test=4))
    with pytest.raises(ArgumentError, match="was trained for"):
        evaluate(tmp_path, load_puzzles("xor"))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(FileFormatError):
        evaluate(tmp_path)


CONFIGS = ["", "{", "[]", "null", '{"settings": 3}', '{"settings": {"vocab_size": 0}}', '{"settings": {"vocab_size": 5}, "run": {"merge": "meen"}}']


@pytest.mark.parametrize("text", CONFIGS)
def test_a_bad_config_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((HiernbError, FileNotFoundError)):
        load_totrm(tmp_path)


BAD = [
    {"task": ""}, {"ema": 1.0}, {"ema": -1}, {"ema": float("nan")}, {"curriculum": [3]}, {"curriculum": [[2, 1, 1]]}, {"curriculum": [[0.1, 0, 1]]},
    {"merge": "sum"}, {"starts": 0}, {"branching_steps": -1}, {"branching_steps": 9}, {"puzzle_lr": -1}, {"hidden": 0}, {"mixer": "conv"}, {"steps": 0},
    {"lr": float("inf")}, {"precision": "int8"}, {"select": "best"}, {"betas": [0.9]}, {"max_train": 0}, {"validation": 0}, {"merge_settings": 3},
    {"halt_max_steps": 0}, {"seed": -1},
]  # fmt: skip


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_bad_parameters_are_named(changes):
    with pytest.raises(HiernbError) as e:
        TotrmRun(**changes)
    assert next(iter(changes)) in str(e.value)


def test_notebook_parameters_are_checked():
    assert read_parameters({"branching_steps": 2, "betas": [0.9, 0.99]}, TotrmRun).branching_steps == 2
    with pytest.raises(HiernbError, match="branching_steps"):
        read_parameters({"branching_step": 2}, TotrmRun)


def test_a_nan_ends_the_training_with_its_step(puzzles, monkeypatch):
    run = TotrmRun(**SMALL)
    build = TotrmRun.model

    def poisoned(self, puzzles):
        model = build(self, puzzles)
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(TotrmRun, "model", poisoned)
    with pytest.raises(HiernbError, match="step"):
        train_totrm(run, puzzles, progress=False)


def test_the_average_of_a_compiled_model_is_plain(puzzles):
    model = TotrmRun(**SMALL).model(puzzles)
    compile_model(model, backend="eager")
    average = EMA(model, 0.5)
    assert all(m._compiled_call_impl is None for m in average.module.modules()) and any(m._compiled_call_impl for m in model.modules())
    batch = puzzles.train.tensors(slice(4))
    slots, answer = model.step(model.initial_carry(batch), batch)
    assert answer.logits.shape == (4, 16, 6) and training.run_fingerprint(TotrmRun(compile=True), puzzles) == training.run_fingerprint(TotrmRun(), puzzles)
