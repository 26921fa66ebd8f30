"""Puzzles: symmetries keep solutions, splits share nothing, and files that are not whole are refused by name."""

import functools
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.data.arc import ArcCopy, ArcTask, draw_copy, flatten_grid, make_arc, parse_copy, read_arc, unflatten_grid, vote_arc
from hiernb.data.boards import Puzzles
from hiernb.data.cube import N_STATES, cube_distances, move_states, solve_cube
from hiernb.data.dihedral import augment_dihedral, canonical_dihedral
from hiernb.data.maze import generate_mazes, make_maze, solve_maze
from hiernb.data.puzzle_sources import GENERATED, augmenter, load_puzzles
from hiernb.data.puzzle_splits import split_by_key
from hiernb.data.puzzles import PuzzleSet, read_puzzles
from hiernb.data.rubik import apply_answer, canonical_cube, cube_states, cube_stickers, make_rubik
from hiernb.data.sudoku import generate_sudoku, make_sudoku
from hiernb.data.sudoku_files import leaked, load_sudoku_extreme, read_sudoku_folder, read_sudoku_lines, read_sudoku_table
from hiernb.data.sudoku_solver import BOXES, board_text, check_sudoku, dig_sudoku, parse_board, solve_sudoku, sudoku_units
from hiernb.data.sudoku_symmetry import augment_sudoku, canonical_sudoku
from hiernb.data.trm_files import read_trm, write_trm
from hiernb.errors import ArgumentError, DamagedFileError, EmptyError, FileFormatError, RangeError, ShapeError
from hiernb.files import write_tensors

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)


# ---- Sudoku --------------------------------------------------------------------------------------

@quick
@given(st.sampled_from(sorted(BOXES)), seeds, seeds, st.integers(0, 40))
def test_the_augmented_puzzle_has_the_augmented_solution_and_the_same_canonical_form(size, seed, other, target):
    puzzles, solutions = dig_sudoku(size, np.full(4, target), seed)
    inputs, labels = augment_sudoku(puzzles + 1, solutions + 1, other)
    assert np.array_equal(check_sudoku(inputs - 1).solutions, labels - 1)
    assert np.array_equal(canonical_sudoku(inputs - 1), canonical_sudoku(puzzles))
    assert np.array_equal(canonical_sudoku(labels - 1), canonical_sudoku(solutions))


@quick
@given(st.sampled_from(sorted(BOXES)), seeds)
def test_the_canonical_form_is_a_copy_and_its_own_canonical_form(size, seed):
    puzzles, _ = dig_sudoku(size, np.zeros(3, int), seed)
    canonical = canonical_sudoku(puzzles)
    assert np.array_equal(canonical_sudoku(canonical), canonical)
    assert ((canonical > 0).sum(1) == (puzzles > 0).sum(1)).all()
    assert (check_sudoku(canonical).counts == 1).all()  # a copy of a puzzle is a puzzle


def test_moving_one_clue_changes_the_canonical_form_of_a_9x9():
    puzzles, solutions = dig_sudoku(9, np.full(20, 30), 5)
    changed = puzzles.copy()
    for p, s in zip(changed, solutions):
        gone, new = np.flatnonzero(p)[0], np.flatnonzero(p == 0)[0]
        p[gone], p[new] = 0, s[new]
    assert (canonical_sudoku(changed) != canonical_sudoku(puzzles)).any(1).mean() > 0.9


@quick
@given(st.sampled_from([4, 6]), seeds, st.sampled_from(["puzzle", "solution"]), st.sampled_from([None, (8, 12)]))
def test_splits_are_disjoint(size, seed, by, clues):
    if size == 4 and by == "solution":
        sizes = {"train": 30, "test": 20}  # two classes: two splits
    else:
        sizes = {"train": 60, "validation": 10, "test": 20}
    made = make_sudoku(size, clues if size == 4 else None, by, seed % 1000, **sizes)
    keys = [set(map(bytes, canonical_sudoku((p.inputs if by == "puzzle" else p.labels) - 1))) for p in made.splits.values()]
    assert sum(map(len, keys)) == len(set().union(*keys))
    assert [len(p) for p in made.splits.values()] == list(sizes.values())


@quick
@given(seeds)
def test_random_digits_are_counted_as_by_hand(seed):
    rng = np.random.default_rng(seed)
    board = (rng.integers(1, 5, 16) * (rng.random(16) < 0.3)).astype(np.int8)
    grids = solutions_of_4x4()
    assert solve_sudoku(board[None], limit=300).counts[0] == ((grids == board) | (board == 0)).all(1).sum()


@functools.cache
def solutions_of_4x4():
    "All 288 grids, from all 24^4 choices of four row permutations."
    rows = np.array([p for p in np.ndindex(4, 4, 4, 4) if len(set(p)) == 4]) + 1
    pick = np.stack(np.meshgrid(*[np.arange(24)] * 4, indexing="ij"), -1).reshape(-1, 4)
    grids = rows[pick].reshape(-1, 16)
    good = np.ones(len(grids), bool)
    for u in sudoku_units(4):
        good &= np.bitwise_or.reduce(1 << grids[:, u], axis=1) == 30
    assert good.sum() == 288
    return grids[good]


BAD_BOARDS = {
    "two solutions": ("12.." + "." * 12, "row 1, with more than one solution: 12.............."),
    "unsolvable": ("12..3......3.4..", "row 1, with no solution: 12..3......3.4.."),
    "a digit twice": ("11" + "." * 14, "row 1, with no solution: 11"),
}


@pytest.mark.parametrize("board, message", BAD_BOARDS.values(), ids=BAD_BOARDS)
def test_boards_that_are_no_puzzles_are_refused_with_row_and_board(board, message, tmp_path):
    good = dig_sudoku(4, np.zeros(1, int))[0][0]
    with pytest.raises(ArgumentError, match=message.replace(".", r"\.")):
        check_sudoku(np.stack([good, parse_board(board)]))
    (tmp_path / "train.txt").write_text(f"{board_text(good)}\n{board}\n")
    with pytest.raises(FileFormatError, match="train has row 1, with"):
        read_sudoku_folder(tmp_path)


def test_digits_and_sizes_are_checked():
    with pytest.raises(RangeError, match="row 1, cell 3: 5"):
        solve_sudoku(np.array([[0] * 16, [0, 0, 0, 5] + [0] * 12]))
    with pytest.raises(RangeError, match="row 0, cell 0: -1"):
        check_sudoku(np.full((1, 81), -1))
    with pytest.raises(ShapeError, match="25 cells"):
        solve_sudoku(np.zeros((1, 25), int))
    with pytest.raises(ShapeError):
        solve_sudoku(np.zeros(81, int))
    with pytest.raises(ArgumentError, match="not '5'"):
        parse_board("5" + "." * 15)


# ---- files of Sudokus ----------------------------------------------------------------------------

def some_lists(folder, n=6):
    puzzles, solutions = generate_sudoku(n, 9, seed=7)
    rows = [f"{board_text(p)},{board_text(s)}" for p, s in zip(puzzles, solutions)]
    (folder / "train.csv").write_text("puzzle,solution\n" + "\n".join(rows) + "\n")
    return puzzles, solutions


def test_a_list_cut_off_anywhere_is_refused_or_shorter_by_whole_lines(tmp_path):
    puzzles, _ = some_lists(tmp_path)
    text = (tmp_path / "train.csv").read_text()
    refused = 0
    for cut in range(16 + 82 + 12, len(text), 7):  # from the first dozen digits of the first solution on
        (tmp_path / "cut.csv").write_text(text[:cut])
        try:
            found, solutions = read_sudoku_lines(tmp_path / "cut.csv")
            assert solutions is not None and np.array_equal(found, puzzles[: len(found)])
            assert text[cut] == "\n" or text[cut - 1] == "\n"
        except (FileFormatError, EmptyError) as e:
            assert "cut.csv" in str(e)
            refused += 1
    assert refused > 100


def test_packed_lists_cut_off_or_damaged_are_refused_by_name(tmp_path):
    some_lists(tmp_path)
    whole = gzip.compress((tmp_path / "train.csv").read_bytes())
    for cut in range(11, len(whole), 40):
        (tmp_path / "cut.csv.gz").write_bytes(whole[:cut])
        with pytest.raises(DamagedFileError, match="cut.csv.gz"):
            read_sudoku_lines(tmp_path / "cut.csv.gz")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (tmp_path / "cut.csv.gz").write_bytes(bytes(flipped))
    with pytest.raises(FileFormatError, match="cut.csv.gz"):
        read_sudoku_lines(tmp_path / "cut.csv.gz")


def test_a_table_cut_off_is_refused_by_name(tmp_path):
    puzzles, solutions = generate_sudoku(5, 6)
    pq.write_table(pa.table({"puzzle": [board_text(p) for p in puzzles], "solution": [board_text(s) for s in solutions]}), tmp_path / "t.parquet")
    assert np.array_equal(read_sudoku_table(tmp_path / "t.parquet").train.labels - 1, solutions)
    whole = (tmp_path / "t.parquet").read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "t.parquet").write_bytes(whole[:cut])
        with pytest.raises(DamagedFileError, match="t.parquet"):
            read_sudoku_table(tmp_path / "t.parquet")


def test_wrong_solutions_are_refused(tmp_path):
    puzzles, solutions = generate_sudoku(3, 4)
    solutions[2] = solutions[2][::-1]
    (tmp_path / "test.txt").write_text("\n".join(f"{board_text(p)} {board_text(s)}" for p, s in zip(puzzles, solutions)))
    for options in ({}, {"check": 1}):
        with pytest.raises(FileFormatError, match="test has row 2, solution"):
            read_sudoku_folder(tmp_path, **options)


def test_sudoku_extreme_from_local_files(tmp_path):
    puzzles, solutions = generate_sudoku(40, 9, seed=3)
    mirrored = puzzles.reshape(-1, 9, 9)[:, ::-1].reshape(-1, 81)
    rows = [f"s,{board_text(p)},{board_text(a)},{i}" for i, (p, a) in enumerate(zip(puzzles, solutions))]
    (tmp_path / "train.csv").write_text("source,question,answer,rating\n" + "\n".join(rows) + "\n")
    answer = board_text(solve_sudoku(mirrored[:1]).solutions[0])
    (tmp_path / "test.csv").write_text(f"source,question,answer,rating\ns,{board_text(mirrored[0])},{answer},0\n")
    whole = load_sudoku_extreme(tmp_path)
    assert np.array_equal(whole.train.inputs - 1, puzzles) and np.array_equal(whole.train.labels - 1, solutions)
    assert len(load_sudoku_extreme(tmp_path, disjoint=True).train) == 39
    assert len(load_sudoku_extreme(tmp_path, train=7).train) == 7
    (tmp_path / "train.csv").write_text("question\n123\n")
    with pytest.raises(FileFormatError):
        load_sudoku_extreme(tmp_path)


@pytest.mark.skipif(not (SHARED / "sudoku" / "sudoku.parquet").is_file(), reason="../shared/data/sudoku is not here")
def test_the_shared_table_loads_and_its_difficulty_is_ours(tmp_path):
    table = pq.read_table(SHARED / "sudoku" / "sudoku.parquet").to_pandas()
    some = table.groupby("source").sample(60, random_state=0)
    pq.write_table(pa.Table.from_pandas(some, preserve_index=False), tmp_path / "some.parquet")
    found = read_sudoku_table(tmp_path / "some.parquet", disjoint=False)
    assert sum(map(len, found.splits.values())) == len(some)
    ours = np.concatenate([found.splits[s].difficulty for s in ("train", "validation", "test")])
    theirs = np.concatenate([some.guesses[some.split == s] for s in ("train", "validation", "test")])
    assert np.corrcoef(np.argsort(np.argsort(ours)), np.argsort(np.argsort(theirs)))[0, 1] > 0.9


# ---- sets and their files ------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(GENERATED))
def test_every_task_survives_its_files(name, tmp_path):
    made = load_puzzles(name, train=40, test=10)
    assert load_puzzles(made.save(tmp_path / "a")).fingerprint == made.fingerprint
    back = read_trm(write_trm(made, tmp_path / "b"))
    assert all(np.array_equal(getattr(back.splits[s], k), getattr(p, k)) for s, p in made.splits.items() for k in ("inputs", "labels", "groups"))
    if augment := augmenter(made):
        inputs, labels = augment(made.train.inputs, made.train.labels, [3, 4])
        PuzzleSet(made.task, {"train": Puzzles(inputs, labels)}, made.vocab, made.height, made.width)
        again = augment(made.train.inputs, made.train.labels, [3, 4])
        assert np.array_equal(inputs, again[0]) and inputs.dtype == made.train.inputs.dtype


def test_a_saved_set_that_was_damaged_is_refused_by_name(tmp_path):
    made = make_sudoku(4, train=20, test=10)
    made.save(tmp_path / "s")
    path = tmp_path / "s" / "train.safetensors"
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DamagedFileError, match="train.safetensors"):
            read_puzzles(tmp_path / "s")
    flipped = bytearray(whole)
    flipped[-500] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(DamagedFileError, match=re.escape(str(tmp_path))):
        read_puzzles(tmp_path / "s")
    tensors = {k: torch.from_numpy(np.ascontiguousarray(getattr(made.train, k))) for k in ("inputs", "labels", "groups", "difficulty", "origins")}
    inputs, labels, groups = (tensors[k] for k in ("inputs", "labels", "groups"))
    foreign = ({"inputs": inputs + 100}, {"inputs": inputs.float()}, {"labels": labels[:, :9]}, {"groups": groups[:3]}, {"more": groups + 0})
    for change in foreign:  # whole files
        write_tensors(path, {k: v.contiguous() for k, v in (tensors | change).items()}, "puzzles")
        with pytest.raises(FileFormatError, match=re.escape(str(tmp_path))):
            read_puzzles(tmp_path / "s")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train.safetensors"):
        read_puzzles(tmp_path / "s")
    (tmp_path / "s" / "dataset.json").write_text(json.dumps({"kind": "other"}))
    with pytest.raises(FileFormatError, match="dataset.json"):
        read_puzzles(tmp_path / "s")


ENDLESS = """
import sys
from hiernb.data.xor import make_xor
i = 0
while True:
    i += 1
    make_xor(6, seed=i, train=200, test=50).save(sys.argv[1])
"""


def test_a_killed_writer_leaves_a_whole_set(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path / "x")], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (tmp_path / "x" / "dataset.json").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [p for p in tmp_path.iterdir() if (p / "dataset.json").exists()]
    assert any(len(read_puzzles(p).train) == 200 for p in left if not p.name.endswith(".tmp"))


@pytest.mark.parametrize("name", ["inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices"])
def test_trm_arrays_cut_off_or_with_objects_are_refused_by_name(name, tmp_path):
    write_trm(make_sudoku(4, train=20, test=10), tmp_path / "t")
    path = tmp_path / "t" / "train" / f"all__{name}.npy"
    whole = path.read_bytes()
    for cut in (0, 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DamagedFileError, match=path.name):
            read_trm(tmp_path / "t")
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DamagedFileError, match=path.name):  # never unpickled
        read_trm(tmp_path / "t")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        read_trm(tmp_path / "t")


@pytest.mark.parametrize("change", [{"pad_id": 3}, {"seq_len": 17}, {"vocab_size": 4}, {"ignore_label_id": -100}, {"num_puzzle_identifiers": 0}])
def test_trm_cards_that_do_not_fit_are_refused(change, tmp_path):
    write_trm(make_sudoku(4, train=20), tmp_path / "t")
    path = tmp_path / "t" / "train" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileFormatError):
        read_trm(tmp_path / "t")


def test_a_trm_set_as_the_original_builds_it(tmp_path):
    "The arrays of build_sudoku_dataset.py, written by hand: two puzzles, the first with a copy."
    puzzles, solutions = generate_sudoku(2, 9)
    copy = augment_sudoku(puzzles[:1] + 1, solutions[:1] + 1)
    (tmp_path / "train").mkdir()
    arrays = {"inputs": np.concatenate([puzzles[:1] + 1, copy[0], puzzles[1:] + 1])}
    arrays |= {"labels": np.concatenate([solutions[:1] + 1, copy[1], solutions[1:] + 1]), "puzzle_identifiers": np.zeros(3, np.int32)}
    arrays |= {"puzzle_indices": np.arange(4, dtype=np.int32), "group_indices": np.array([0, 2, 3], np.int32)}
    for name, a in arrays.items():
        np.save(tmp_path / "train" / f"all__{name}.npy", a.astype(np.uint8) if a.ndim == 2 else a)
    card = {"pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": 11, "seq_len": 81, "num_puzzle_identifiers": 1}
    card |= {"total_groups": 2, "mean_puzzle_examples": 1, "total_puzzles": 2, "sets": ["all"]}
    (tmp_path / "train" / "dataset.json").write_text(json.dumps(card))
    (tmp_path / "identifiers.json").write_text('["<blank>"]')
    found = load_puzzles(tmp_path)
    assert (found.task, found.vocab_size, found.train.origins.tolist()) == ("sudoku", 11, [0, 0, 1])
    assert np.array_equal(solve_sudoku(found.train.inputs - 1).solutions, found.train.labels - 1)
    assert np.array_equal(found.train.tensors([1])["labels"], torch.from_numpy(copy[1].astype(np.int64)))


@quick
@given(st.lists(st.integers(0, 30), min_size=60, max_size=200), seeds)
def test_keys_never_straddle_and_nothing_is_lost(keys, seed):
    keys = np.array(keys)[:, None]
    try:
        at = split_by_key(keys, {"train": 0.6, "validation": 0.2, "test": 0.2}, seed)
    except EmptyError:
        return
    assert sorted(np.concatenate(list(at.values())).tolist()) == list(range(len(keys)))
    sets = [set(keys[a, 0].tolist()) for a in at.values()]
    assert sum(map(len, sets)) == len(set().union(*sets))


# ---- mazes ---------------------------------------------------------------------------------------

@quick
@given(st.integers(7, 16), st.integers(7, 16), st.sampled_from([0.0, 0.2, 1.0]), seeds)
def test_mazes_have_one_shortest_path_and_so_have_their_copies(height, width, loops, seed):
    boards = generate_mazes(5, height, width, loops, shortest=2, seed=seed)
    labels, lengths = solve_maze(boards, height, width)
    assert (lengths >= 2).all() and np.array_equal((labels == 5).sum(1) + 1, lengths)
    inputs, copied = augment_dihedral(boards, labels, height, width, seed)
    assert np.array_equal(solve_maze(inputs, height, width)[0], copied)
    assert np.array_equal(canonical_dihedral(inputs, height, width), canonical_dihedral(boards, height, width))


def test_shortest_paths_agree_with_scipy():
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import shortest_path

    boards = generate_mazes(5, 11, 13, loops=0.5, shortest=2)
    for board, length in zip(boards, solve_maze(boards, 11, 13)[1]):
        at = np.arange(143).reshape(11, 13)
        edges = np.concatenate([np.stack([at[:-1].ravel(), at[1:].ravel()], 1), np.stack([at[:, :-1].ravel(), at[:, 1:].ravel()], 1)])
        edges = edges[(board[edges] != 1).all(1)]
        graph = csr_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), (143, 143))
        assert shortest_path(graph, directed=False, indices=int((board == 3).argmax()))[int((board == 4).argmax())] == length


def test_maze_splits_are_disjoint():
    made = make_maze(9, 9, shortest=4, train=100, validation=20, test=30)
    keys = [set(map(bytes, canonical_dihedral(p.inputs, 9, 9))) for p in made.splits.values()]
    assert sum(map(len, keys)) == len(set().union(*keys)) == 150


# ---- cubes ---------------------------------------------------------------------------------------

def test_the_counts_per_distance_are_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("HIERNB_CACHE", str(tmp_path))
    half = [1, 9, 54, 321, 1847, 9992, 50136, 227536, 870072, 1887748, 623800, 2644]
    assert np.bincount(cube_distances("half")).tolist() == half and sum(half) == N_STATES
    path = tmp_path / "cube" / "distances-half.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="made again"):
        assert np.bincount(cube_distances("half")).tolist() == half
    assert np.bincount(cube_distances("quarter")).tolist()[-3:] == [782536, 90280, 276]


@quick
@given(st.lists(st.integers(0, N_STATES - 1), min_size=1, max_size=50), st.lists(st.integers(0, 8), max_size=30))
def test_cubes(states, moves):
    states = np.array(states)
    stickers = cube_stickers(states)
    assert np.array_equal(cube_states(stickers), states)
    copies = cube_states(canonical_cube(states))
    for metric in ("half", "quarter"):
        assert np.array_equal(cube_distances(metric)[copies], cube_distances(metric)[states])
        steps = solve_cube(states, metric)
        assert apply_answer(stickers, np.where(steps >= 0, steps + 9, 8))[1].all()
    at = states
    for m in moves:
        at = move_states(at)[:, m]
    turned, _ = apply_answer(stickers, np.tile(np.array(moves, int) + 9, (len(states), 1)))
    assert np.array_equal(turned, cube_stickers(at))


@quick
@given(st.integers(0, N_STATES - 1), st.integers(0, 7), st.integers(1, 2))
def test_a_twisted_corner_is_never_taken_for_a_cube(state, corner, by):
    from hiernb.data.cube import corners

    stickers = cube_stickers(np.array([state]))
    stickers[0, corners()[corner]] = stickers[0, np.roll(corners()[corner], by)]
    with pytest.raises(ArgumentError, match="row 0"):
        cube_states(stickers)


def test_rubik_splits_share_no_copy():
    made = make_rubik(distances=(1, 5), train=150, validation=20, test=50)
    keys = [set(map(bytes, canonical_cube(cube_states(p.inputs[:, :24])))) for p in made.splits.values()]
    assert sum(map(len, keys)) == len(set().union(*keys))


# ---- ARC -----------------------------------------------------------------------------------------

@quick
@given(st.integers(1, 30), st.integers(1, 30), seeds)
def test_arc_copies_are_undone(height, width, seed):
    rng = np.random.default_rng(seed)
    grid, copy = rng.integers(0, 10, (height, width)).astype(np.uint8), draw_copy(rng)
    assert np.array_equal(copy.undo(copy.apply(grid)), grid)
    assert parse_copy(copy.name("x")) == ("x", copy)
    assert np.array_equal(unflatten_grid(flatten_grid(grid)), grid)
    assert np.array_equal(vote_arc([flatten_grid(copy.apply(grid))], [copy.name("x")])[0][0], grid)


@quick
@given(seeds)
def test_any_board_of_tokens_can_be_read(seed):
    rng = np.random.default_rng(seed)
    grid = unflatten_grid(np.where(rng.random(900) < 0.1, 1, rng.integers(2, 12, 900)))
    assert grid.ndim == 2 and (grid.size == 0 or grid.max() <= 9)


def test_arc_lines_cut_off_are_refused_by_name(tmp_path):
    task = {"train": [{"input": [[1, 2]], "output": [[2, 1]]}], "test": [{"input": [[3]], "output": [[3]]}]}
    text = "".join(json.dumps({"id": f"t{i}", **task}) + "\n" for i in range(5))
    for cut in (len(text) - 5, len(text) // 2):
        (tmp_path / "a.jsonl").write_text(text[:cut])
        with pytest.raises(DamagedFileError, match="a.jsonl"):
            read_arc(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(text)
    assert [t.id for t in read_arc(tmp_path / "a.jsonl")] == [f"t{i}" for i in range(5)]
    for bad in ({"train": []}, {**task, "test": [{"input": [[11]]}]}, {**task, "test": [{}]}, [1]):
        (tmp_path / "b.json").write_text(json.dumps({"b": bad}))
        with pytest.raises(FileFormatError, match="task b"):
            read_arc(tmp_path / "b.json")


@pytest.mark.skipif(not (SHARED / "arc_agi_1").is_dir(), reason="../shared/data/arc_agi_1 is not here")
def test_all_of_arc_agi_1_loads():
    training, evaluation = (read_arc(SHARED / "arc_agi_1" / f"{s}.jsonl.gz") for s in ("training", "evaluation"))
    assert (len(training), len(evaluation)) == (400, 400)
    made = make_arc(training, evaluation)
    assert (len(made.train), len(made.test), made.n_groups) == (1302 + 416 + 1363, 419, 801)
    by_id = {t.id: t for t in evaluation}
    for board, group in zip(made.test.labels, made.test.groups):
        assert any(np.array_equal(unflatten_grid(board), output) for _, output in by_id[made.group_names[group]].test)


def test_leaks_are_found_in_the_direction_of_the_later_split():
    puzzles, _ = generate_sudoku(4, 6)
    boards = {"train": puzzles[[0, 1]], "validation": puzzles[[1, 2]], "test": puzzles[[2, 3]]}
    assert {s: v.tolist() for s, v in leaked(boards).items()} == {"train": [False, True], "validation": [True, False][::-1], "test": [False, False]}


def test_arc_task_without_published_outputs():
    task = ArcTask("a", [(np.ones((2, 2), np.uint8), np.ones((2, 2), np.uint8))], [(np.ones((1, 1), np.uint8), None)])
    made = make_arc([], [task])
    assert len(made.train) == 1 and len(made.test) == 0 and ArcCopy().name("a") == made.group_names[1]
