"""The data rooms: what the notebooks do not show (properties, faults, real sets)."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.data.corpus import Contexts, Queries, draw, find_duplicates
from hiernb.data.pairs import Pairs, make_pairs, merge_pairs, read_pairs
from hiernb.data.pydocs import build_pydocs, cached, load_pydocs, read_docstrings
from hiernb.data.sources import SOURCES, HubSource, SourceError, load_pairs, prepare_nq, prepare_squad, prepare_triviaqa
from hiernb.errors import ArgumentError, EmptyError, FileFormatError, HiernbError, RangeError, ShapeError, UnknownNameError

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
SETS = ["arxiv", "boolq", "hotpotqa", "inscit", "mtrag_un", "narrativeqa", "nq", "squad", "squadshifts"]


def plants(n=30, name="plants", test=3):
    rows = [{"query": f"what is plant {i}?", "title": f"Plant {i}", "text": f"It is number {i} of {n}.", "answer": str(i)} for i in range(n)]
    return make_pairs(name, {"train": rows, "test": rows[:test]})


def qrels(pairs):
    return {s: q.qrels(pairs.contexts) for s, q in pairs.splits.items()}


# ---- the real sets -------------------------------------------------------------------------------------------------


def shared(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"shared/data/{name} is not beside this checkout")
    return folder


@pytest.mark.parametrize("name", SETS)
def test_real_set_has_the_counts_of_its_readme(name):
    folder = shared(name)
    stated = json.loads(next(x for x in (folder / "README.md").read_text(encoding="utf8").splitlines() if x.startswith("{")))
    pairs = read_pairs(folder)
    rows = {s: pq.read_table(folder / f"pairs-{s}.parquet").to_pylist() for s in pairs.splits}
    assert {s: len(r) for s, r in rows.items()} == {s: stated[s] for s in ("train", "validation", "test") if s in stated}
    assert {s: len(q) for s, q in pairs.splits.items()} == {s: len({x["query_id"] for x in r}) for s, r in rows.items()}
    assert len(pairs.contexts) + len(pairs.contexts.aliases) == stated["contexts"]
    for s, split in rows.items():  # every row is still there, through the aliases
        found = pairs.splits[s].qrels(pairs.contexts)
        assert all(pairs.contexts.ids[pairs.contexts.position(r["context_id"])] in found[r["query_id"]] for r in split)


@pytest.mark.parametrize("name, at_least, one_text_two_titles", [("boolq", 160, 1), ("nq", 9, 0)])
def test_real_duplicates_are_dropped(name, at_least, one_text_two_titles):
    contexts = read_pairs(shared(name)).contexts
    assert len(contexts.aliases) >= at_least
    texts = {}
    for title, text in zip(contexts.titles, contexts.texts):
        texts.setdefault(" ".join(text.casefold().split()), []).append(title)
    twins = [t for t in texts.values() if len(t) > 1]
    assert len(twins) == one_text_two_titles
    assert all(all(t) and len({x.casefold() for x in t}) == len(t) for t in twins)  # what is left differs in its title


def test_load_pairs_takes_folders_and_lists_of_them():
    few = load_pairs([shared("nq"), str(shared("inscit"))], max_pairs=200)
    assert len(few.train.relevance) <= 200 and 0 < len(few.validation.relevance) <= 200 and 0 < len(few.test.relevance) <= 200
    used = np.unique(np.concatenate([q.relevance[:, 1] for q in few.splits.values()]))
    assert len(used) == len(few.contexts)
    assert any("subset" in n for n in few.notes)
    boolq = load_pairs(shared("boolq"))  # no validation split: a tenth of train is held out
    assert abs(len(boolq.validation) - 362) <= 2 and len(boolq.train) + len(boolq.validation) == 3623
    assert boolq.leakage("train", "validation") == 0
    assert not len(load_pairs(shared("mtrag_un")).train)
    clean = boolq.without_leakage()
    assert boolq.leakage() > 200 and clean.leakage() == 0 and len(clean.test) == len(boolq.test)


def test_large_set_is_read_quickly():
    folder = shared("arxiv")
    start = time.process_time()
    pairs = read_pairs(folder)
    assert len(pairs.fingerprint) == 64 and len(pairs.contexts) == 74_615
    assert time.process_time() - start < 30


# ---- properties ----------------------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from("ab Aé\n\t\u00a0🙂"), min_size=1, max_size=6).filter(str.strip)
ROW = st.fixed_dictionaries({"query": TEXT, "title": st.sampled_from(["", "t", "T ", "u"]), "text": TEXT})
ROWS = st.fixed_dictionaries({s: st.lists(ROW, max_size=8) for s in ("train", "validation", "test")}).filter(lambda r: any(r.values()))


def naive_kept(titles, texts):
    "The rule of `find_duplicates`, word for word."
    same = lambda s: " ".join(s.casefold().split())  # noqa: E731
    kept = []
    for title, text in zip(titles, texts):
        if not same(title):  # takes the first titled copy of its text, if there is one
            titled = [j for j in range(len(texts)) if same(titles[j]) and same(texts[j]) == same(text)]
            title = titles[titled[0]] if titled else ""
        kept.append(next(j for j in range(len(texts)) if same(texts[j]) == same(text) and same(titles[j]) == same(title)))
    return kept


@given(st.lists(st.tuples(st.sampled_from(["", "t", "T ", "u"]), TEXT), max_size=12))
def test_duplicates_as_the_naive_rule_says(contexts):
    titles, texts = [t for t, _ in contexts], [t for _, t in contexts]
    assert find_duplicates(titles, texts).tolist() == naive_kept(titles, texts)


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory, rows):
    pairs = make_pairs("x", rows)
    folder = pairs.save(tmp_path_factory.mktemp("p") / "set")
    again = read_pairs(folder, verify=True)
    assert again.fingerprint == pairs.fingerprint and qrels(again) == qrels(pairs)
    assert again.contexts.aliases == pairs.contexts.aliases and again.name == "x"


@given(ROWS, st.integers(0, 9), st.integers(0, 3), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_subset_keeps_relevance_and_nothing_else(rows, limit, distractors, seed):
    pairs = make_pairs("x", rows)
    try:
        few = pairs.subset(max_train=limit, max_distractors=distractors, seed=seed)
    except EmptyError:
        assert set(pairs.splits) == {"train"} and limit == 0
        return
    assert len(few.train.relevance) == min(limit, len(pairs.train.relevance))
    for s, judged in qrels(few).items():
        assert judged == {i: r for i, r in qrels(pairs)[s].items() if i in judged}
    used = {c for q in few.splits.values() for c in q.relevance[:, 1].tolist()}
    assert len(few.contexts) - len(used) == min(distractors, len(pairs.contexts) - len(used))


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 14)), min_size=1, max_size=25), st.integers(0, 3))
def test_no_context_straddles_a_hold_out(links, seed):
    rows = [{"query_id": f"q{q}", "query": f"query {q}", "text": f"text {c}"} for q, c in links]
    pairs = make_pairs("x", {"train": rows})
    try:
        whole = pairs.with_validation(0.3, seed)
    except EmptyError:
        return
    assert whole.leakage("train", "validation") == 0
    assert len(whole.train) and 0 < len(whole.validation) <= max(1, round(0.3 * len(pairs.train)))
    assert {**qrels(whole)["train"], **qrels(whole)["validation"]} == qrels(pairs)["train"]


@given(st.lists(ROWS, min_size=2, max_size=3))
@settings(max_examples=40, deadline=None)
def test_merge_keeps_every_judgement(sets):
    sets = [make_pairs("same name", r) for r in sets]
    merged = merge_pairs(sets)
    assert len(find_duplicates(merged.contexts.titles, merged.contexts.texts)) == len(merged.contexts)
    assert (find_duplicates(merged.contexts.titles, merged.contexts.texts) == np.arange(len(merged.contexts))).all()
    for s, queries in merged.splits.items():
        assert len(queries) == sum(len(p.splits.get(s, ())) for p in sets) == len(set(queries.ids))
        old = [(p.splits[s].texts[q], " ".join(p.contexts.texts[c].casefold().split())) for p in sets if s in p.splits for q, c in p.splits[s].relevance]
        new = [(queries.texts[q], " ".join(merged.contexts.texts[c].casefold().split())) for q, c in queries.relevance]
        assert set(old) == set(new)


def test_merged_aliases_survive_a_second_merge():
    a = make_pairs("a", {"train": [{"query": "one", "text": "same"}]})
    b = make_pairs("b", {"train": [{"query": "two", "text": "Same"}]})
    c = make_pairs("c", {"train": [{"query": "three", "title": "Titled", "text": "same"}]})
    merged = merge_pairs([merge_pairs([a, b]), c])
    assert merged.contexts.titles == ["Titled"]
    assert {merged.contexts.position(i) for i in ("a-c000000", "b-c000000", "c-c000000")} == {0}


def test_fingerprint_is_the_same_on_every_machine():
    assert plants().fingerprint == replace(plants(), name="other", notes=["a note"]).fingerprint
    contexts = Contexts(["a"], [""], ["b"])
    pairs = Pairs("x", contexts, {"test": Queries(["q"], ["r"], [[0, 0]])})
    parts = [(1).to_bytes(8, "little"), *[(1).to_bytes(8, "little") + b"a"], (1).to_bytes(8, "little"), (0).to_bytes(8, "little")]
    parts += [(1).to_bytes(8, "little"), (1).to_bytes(8, "little") + b"b", (1).to_bytes(8, "little"), (4).to_bytes(8, "little") + b"test"]
    for v in (b"q", b"r", bytes(16)):
        parts += [(1).to_bytes(8, "little"), len(v).to_bytes(8, "little") + v]
    assert pairs.fingerprint == hashlib.sha256(b"".join(parts)).hexdigest()


def test_draw_is_uniform_and_fixed():
    assert draw(["a"], 0)[0] == int.from_bytes(hashlib.blake2b(b"0\ta", digest_size=8).digest(), "little") / 2**64
    assert draw([], 0).shape == (0,)
    numbers = draw(map(str, range(20_000)), 1)
    assert np.histogram(numbers, 10, (0, 1))[0].min() > 1850


# ---- faults --------------------------------------------------------------------------------------------------------


def table(folder, name, **columns):
    pq.write_table(pa.table(columns), Path(folder, f"{name}.parquet"))


@pytest.mark.parametrize(
    "contexts, pairs, error, told",
    [
        ({"context_id": ["c"], "title": [""]}, None, FileFormatError, "contexts.parquet.*lacks text"),
        ({"context_id": ["c"], "title": [""], "text": [None]}, None, FileFormatError, "contexts.parquet.*row 0 has None as text"),
        ({"context_id": ["c"], "title": [""], "text": ["  "]}, None, FileFormatError, "row 0 has '  ' as text"),
        ({"context_id": ["c"], "title": [""], "text": [3]}, None, FileFormatError, "row 0 has 3 as text"),
        ({"context_id": [None], "title": [""], "text": ["x"]}, None, FileFormatError, "row 0 has None as context_id"),
        ({"context_id": ["c", "c"], "title": ["", ""], "text": ["x", "y"]}, None, FileFormatError, "rows 0 and 1 are both 'c' and differ"),
        ({"context_id": pa.array([], "str"), "title": pa.array([], "str"), "text": pa.array([], "str")}, None, EmptyError, "contexts.parquet without rows"),
        (None, {"query_id": ["q"], "query": ["?"]}, FileFormatError, "pairs-train.parquet.*lacks context_id"),
        (None, {"query_id": ["q"], "query": [None], "context_id": ["c"]}, FileFormatError, "pairs-train.parquet.*row 0 has None as query"),
        (None, {"query_id": ["q", "r"], "query": ["?", "!"], "context_id": ["c", "z"]}, FileFormatError, "1 of 2 pairs name.*query 'r' with 'z'"),
        (None, {"query_id": ["q", "q"], "query": ["?", "!"], "context_id": ["c", "c"]}, FileFormatError, "one text per query_id"),
        (None, {k: pa.array([], "str") for k in ("query_id", "query", "context_id")}, EmptyError, "without any pair"),
    ],
)
def test_bad_folder_names_the_file_and_the_row(tmp_path, contexts, pairs, error, told):
    table(tmp_path, "contexts", **(contexts or {"context_id": ["c"], "title": [None], "text": ["x"]}))
    table(tmp_path, "pairs-train", **(pairs or {"query_id": ["q"], "query": ["?"], "context_id": ["c"]}))
    with pytest.raises(error, match=told):
        read_pairs(tmp_path)


def test_missing_pieces(tmp_path):
    for told in ("no such folder", "no contexts.parquet", "no pairs"):
        with pytest.raises(FileNotFoundError, match=told):
            read_pairs(tmp_path / "set")
        (tmp_path / "set").mkdir(exist_ok=True)
        if told == "no contexts.parquet":
            table(tmp_path / "set", "contexts", context_id=["c"], title=[""], text=["x"])
    table(tmp_path / "set", "pairs-test", query_id=[1], query=["?"], context_id=["c"])
    assert read_pairs(tmp_path / "set").test.ids == ["1"]  # a null title and number ids are no error


def test_every_truncation_and_flip_is_noticed(tmp_path):
    folder = plants(200).save(tmp_path / "set")
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        rng = np.random.default_rng(0)
        for cut in [0, 1, 4, len(whole) // 2, len(whole) - 1]:
            file.write_bytes(whole[:cut])
            with pytest.raises(FileFormatError, match=file.name):
                read_pairs(folder)
        for at in rng.integers(4, len(whole) // 2, 10):  # the pages, which carry checksums
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            try:
                assert read_pairs(folder).fingerprint == plants(200).fingerprint
            except FileFormatError:
                pass
        file.write_bytes(b"PAR1 this is a text file PAR1")
        with pytest.raises(FileFormatError, match=file.name):
            read_pairs(folder)
        file.write_bytes(whole)
    assert read_pairs(folder, verify=True).fingerprint == plants(200).fingerprint


def test_verify_notices_an_exchanged_file(tmp_path):
    a, b = plants(20, test=2).save(tmp_path / "a"), plants(20, test=4).save(tmp_path / "b")
    shutil.copy(b / "pairs-test.parquet", a / "pairs-test.parquet")
    assert len(read_pairs(a).test) == 4  # a person may do that
    with pytest.raises(FileFormatError, match="fingerprint"):
        read_pairs(a, verify=True)


def test_save_replaces_its_own_folder_only(tmp_path):
    folder = plants(20).save(tmp_path / "set")
    assert len(read_pairs(plants(9).save(folder)).contexts) == 9
    (folder / "README.md").write_text("mine")
    for target in (folder, folder / "README.md"):
        with pytest.raises(ArgumentError, match="`folder`"):
            plants(9).save(target)
    mixed = make_pairs("x", {"train": [{"query": "a", "text": "b", "answer": 1}, {"query": "c", "text": "d", "answer": "one"}]})
    with pytest.raises(ArgumentError, match="`extras`"):
        mixed.save(tmp_path / "mixed")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_killed_while_saving_leaves_the_old_set(tmp_path):
    plants(20).save(tmp_path / "set")
    sets = {plants(20).fingerprint, plants(2000).fingerprint}
    plants(2000).save(tmp_path / "big")
    code = f"""
        from hiernb.data.pairs import read_pairs
        big = read_pairs({str(tmp_path / "big")!r})
        print("ready", flush=True)
        while True:
            big.save({str(tmp_path / "set")!r})
    """
    for delay in (0.0, 0.033):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        if (tmp_path / "set").exists():  # a kill between two renames leaves the old set aside under another name, never half of one
            assert read_pairs(tmp_path / "set", verify=True).fingerprint in sets


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: make_pairs("x", {}), EmptyError),
        (lambda: make_pairs("x", {"dev": []}), ArgumentError),
        (lambda: make_pairs("x", {"train": [{"query": "q"}]}), ArgumentError),
        (lambda: make_pairs("x", {"train": [{"query": 3, "text": "t"}]}), ArgumentError),
        (lambda: Contexts(["a", "b"], ["", ""], ["x"]), ShapeError),
        (lambda: Queries(["a"], ["x"], [[-1, 0]]), RangeError),
        (lambda: Queries(["a"], ["x"], [[0, 0]], {"answer": []}), ShapeError),
        (lambda: Pairs("x", Contexts([], [], []), {"train": Queries(["a"], ["x"], [[0, 0]])}), EmptyError),
        (lambda: plants().subset(max_test=True), ArgumentError),
        (lambda: plants().subset(max_distractors=-1), RangeError),
        (lambda: plants().with_validation(1.5), RangeError),
        (lambda: plants().with_validation(float("nan")), ArgumentError),
        (lambda: plants().leakage("train", "tset"), UnknownNameError),
        (lambda: merge_pairs([]), EmptyError),
        (lambda: load_pairs("hotpot"), UnknownNameError),
        (lambda: load_pairs("pydocs", max_pairs=-5), RangeError),
        (lambda: load_pairs("pydocs", hold_out=2), RangeError),
        (lambda: load_pairs({"a": 1}), ArgumentError),
    ],
)
def test_bad_arguments(make, error):
    with pytest.raises(error):
        make()


# ---- pydocs --------------------------------------------------------------------------------------------------------


def test_pydocs_never_imports_what_it_reads(tmp_path):
    (tmp_path / "evil.py").write_text('"""Run me please now.\n\n' + "word " * 20 + '"""\nraise SystemExit(3)\n')
    assert [name for name, _, _ in read_docstrings(str(tmp_path / "evil.py"), "evil")] == ["evil"]
    code = """
        import sys
        from hiernb.data.pydocs import build_pydocs
        assert not {"seaborn", "bm25s"} & set(sys.modules)
        build_pydocs(["seaborn", "bm25s"], stdlib=False)
        assert not {"seaborn", "bm25s"} & set(sys.modules), "a package was imported"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_pydocs_is_deterministic_and_splits_by_module():
    one, two = (build_pydocs(["networkx", "joblib"], stdlib=False, workers=w) for w in (1, 2))
    assert one.fingerprint == two.fingerprint
    modules = [set(q.extras["module"]) for q in one.splits.values()]
    assert sum(map(len, modules)) == len(set().union(*modules))
    assert build_pydocs(["networkx", "joblib"], stdlib=False, seed=1).test.ids != one.test.ids


def test_pydocs_cache_survives_damage(tmp_path, monkeypatch):
    monkeypatch.setenv("HIERNB_CACHE", str(tmp_path))
    first = load_pydocs(["bm25s", "joblib"], stdlib=False)
    (folder,) = (tmp_path / "pairs").iterdir()
    for damage in (lambda: (folder / "pairs-test.parquet").write_bytes(b"PAR1"), lambda: (folder / "contexts.parquet").unlink()):
        damage()
        with pytest.warns(UserWarning, match="built again"):
            assert load_pydocs(["bm25s", "joblib"], stdlib=False).fingerprint == first.fingerprint
    assert load_pydocs(["bm25s", "joblib", "not-installed"], stdlib=False).fingerprint == first.fingerprint


def test_unwritable_cache_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="could not be written"):
        assert len(cached(tmp_path / "file" / "set", plants).contexts) == 30


# ---- sources -------------------------------------------------------------------------------------------------------


def test_without_network_the_message_helps(tmp_path):
    code = "from hiernb.data.sources import *\nfor n in SOURCES:\n    if n != 'pydocs':\n        try: load_pairs(n)\n        except SourceError as e: print(e)"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HIERNB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env).stdout
    for name, source in SOURCES.items():
        if name != "pydocs":
            line = next(x for x in out.splitlines() if repr(name) in x)
            assert "could not be reached" in line and "load_pairs('path/to/folder')" in line
            assert (source.path if source.path != "json" else "McGill-NLP/TopiOCQA") in line


def squad_file(path, n):
    rows = [{"id": f"q{i}", "title": "T", "context": f"Text {i}.", "question": f"Why {i}?", "answers": {"text": [], "answer_start": []}} for i in range(n)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_hub_set_is_prepared_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HIERNB_CACHE", str(tmp_path / "cache"))
    files = {"train": squad_file(tmp_path / "train.jsonl", 20), "validation": squad_file(tmp_path / "dev.jsonl", 5)}
    monkeypatch.setitem(SOURCES, "mine", HubSource("mine", "json", prepare_squad, data_files=files))
    first = load_pairs("mine")
    assert [len(q) for q in first.splits.values()] == [18, 2, 5]
    for f in files.values():
        Path(f).unlink()
    assert load_pairs("mine").fingerprint == first.fingerprint  # the originals are gone
    with pytest.raises(SourceError, match="'mine'"):
        load_pairs("mine", cache=False)
    with pytest.raises(SourceError):  # another seed is another hold-out
        load_pairs("mine", seed=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_streams_are_rows_too(tmp_path, streaming):
    files = {"train": squad_file(tmp_path / "train.jsonl", 20), "validation": squad_file(tmp_path / "dev.jsonl", 5)}
    assert len(HubSource("mine", "json", prepare_squad, data_files=files, streaming=streaming).fetch().train) == 18


def test_wrong_schema_is_not_called_a_network_problem(tmp_path):
    files = {s: squad_file(tmp_path / f"{s}.jsonl", 5) for s in ("train", "validation")}
    for prepare in (prepare_nq, prepare_triviaqa):
        with pytest.raises(HiernbError, match="rows with") as told:
            HubSource("mine", "json", prepare, data_files=files).fetch()
        assert not isinstance(told.value, SourceError)
