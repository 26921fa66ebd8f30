"""Plain text: what the notebooks do not show (properties, faults, real sets)."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.data.corpus import SPLITS
from hiernb.data.documents import WIKITEXT, Part, gather, hub_parts, read_lines, read_records, split_named, text_parts
from hiernb.data.pydocs import load_pydocs
from hiernb.data.text import Texts, load_text, shelve
from hiernb.errors import ArgumentError, DamagedFileError, EmptyError, FileFormatError, RangeError, ShapeError, UnknownNameError

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
DOCUMENTS = [f"Document {i} has {'many ' * (i % 7)}words." for i in range(40)]


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/data/{name} is not beside this checkout")
    return path


def everything(texts):
    return sorted(t for s in texts.splits.values() for t in s)


# ---- properties ----------------------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from("ab A\n🙂é"), max_size=12)


@given(st.lists(st.tuples(st.sampled_from([None, "train", "validation", "test"]), st.lists(TEXT, max_size=6)), min_size=1, max_size=4), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_document_stands_once_and_held_out_parts_keep_theirs(raw, seed):
    parts = [Part(s, lambda t=texts: iter([("", x) for x in t])) for s, texts in raw]
    found, titles, _ = shelve(parts, {"validation": 0.3, "test": 0.2}, dict.fromkeys(SPLITS, np.inf), seed)
    same = lambda t: " ".join(t.casefold().split())  # noqa: E731
    kept = [same(t) for s in SPLITS for t in found[s]]
    assert len(kept) == len(set(kept)) and set(kept) == {same(t) for _, texts in raw for t in texts if t.strip()}
    for s in ("test", "validation"):
        named = {same(t) for split, texts in raw for t in texts if split == s and t.strip()}
        assert named <= {same(t) for later in ("test", "validation") for t in found[later]}  # in its split, or as a copy in a later one
    assert {s: len(t) for s, t in titles.items()} == {s: len(t) for s, t in found.items()}


@given(st.lists(st.text(st.sampled_from("abc \n"), min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=20), st.integers(8, 200))
@settings(max_examples=150, deadline=None)
def test_limits_hold_and_only_the_last_document_is_cut(docs, limit):
    parts = [Part(None, lambda: iter([("", d) for d in docs]))]
    whole = {d.strip() for d in docs}
    limits = {"train": limit, "validation": limit / 8, "test": limit / 8}
    few, _, _ = shelve(parts, {"validation": 0.2, "test": 0.2}, limits)
    for s in SPLITS:
        assert sum(map(len, few[s])) <= limits[s]
        assert set(few[s][:-1]) <= whole and all(any(d.startswith(t) for d in whole) for t in few[s][-1:])


def test_documents_do_not_move_when_others_come(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    first = load_text(tmp_path)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"More {d}"}) + "\n" for d in DOCUMENTS))
    second = load_text(tmp_path)
    assert all(set(first.splits[s]) <= set(second.splits[s]) and first.splits[s] for s in SPLITS)
    assert load_text(tmp_path, seed=1).fingerprint != second.fingerprint == load_text(tmp_path).fingerprint


@pytest.mark.parametrize("end", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, end):
    path = tmp_path / f"docs.{end}"
    if end == "parquet":
        pq.write_table(pa.table({"text": DOCUMENTS}), path, row_group_size=7)
    else:
        lines = "".join(f" = T{i} = \n{d}\n" if "txt" in end else json.dumps({"text": d}) + "\n" for i, d in enumerate(DOCUMENTS))
        path.write_bytes(gzip.compress(lines.encode()) if end.endswith("gz") else lines.encode())
    assert everything(load_text(tmp_path, **({"heading": WIKITEXT} if "txt" in end else {}))) == sorted(DOCUMENTS)


@given(st.lists(st.text(st.sampled_from("ab=# "), max_size=8), max_size=12))
def test_gather_loses_no_line(lines):
    documents = [*gather(lines, "#.*")]
    assert sum(len(t.split("\n")) if t else 0 for _, t in documents) <= sum(not x.startswith("#") for x in lines)
    assert "".join(t.replace("\n", "") for _, t in documents) == "".join(x for x in lines if not x.startswith("#"))


def test_titles_and_columns(tmp_path):
    pq.write_table(pa.table({"name": ["One", None, "3"], "body": ["First.", "Second.", "Third."], "text": ["x", "y", "z"]}), tmp_path / "a.parquet")
    texts = load_text(tmp_path, column="body", title="name", validation=0, test=0)
    assert texts.full_texts("train") == ["One\n\nFirst.", "Second.", "3\n\nThird."]
    assert load_text(tmp_path, validation=0, test=0).titles["train"] == ["", "", ""]


def test_streams_are_not_read_to_their_end(tmp_path):
    read = []
    part = Part(None, lambda: (read.append(i) or ("", f"Document number {i}, with some text.") for i in range(100_000)))
    shelve([part], {"validation": 0.1, "test": 0.1}, {"train": 1000, "validation": 125, "test": 125})
    assert len(read) < 200


def test_memory_is_counted(tmp_path):
    wide = Texts("w", {"train": ["é" * 1000 + "🙂"]}, {"train": [""]})
    assert wide.nbytes > 4000 and wide.n_chars["train"] == 1001


# ---- faults --------------------------------------------------------------------------------------------------------


def test_empty_and_foreign_folders(tmp_path):
    with pytest.raises(EmptyError, match="at least one file"):
        load_text(tmp_path)
    (tmp_path / "a.txt").write_text("  \n ")
    with pytest.raises(EmptyError, match="at least one document"):
        load_text(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DamagedFileError, match="parquet"):
        load_text(tmp_path)
    with pytest.raises(EmptyError, match="nothing.txt"):
        load_text(tmp_path, pattern="nothing.txt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("end", ["txt.gz", "jsonl.gz", "parquet"])
def test_truncated_files_are_refused_by_name(tmp_path, end, share):
    path, many = tmp_path / f"docs.{end}", [f"{np.random.default_rng(i).bytes(40).hex()}" for i in range(400)]
    if end == "parquet":
        pq.write_table(pa.table({"text": many}), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps({"text": m}) + "\n" for m in many).encode()))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileFormatError, match=f"docs.{end}"):
        load_text(tmp_path)


def test_gzip_that_is_none_and_flipped_bits(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"plain text")
    with pytest.raises(DamagedFileError, match="gzip"):
        [*read_lines(tmp_path / "a.txt.gz")]
    data = bytearray(gzip.compress(np.random.default_rng(0).bytes(4000).hex().encode()))
    data[len(data) // 2] ^= 255
    (tmp_path / "a.txt.gz").write_bytes(bytes(data))
    with pytest.raises(FileFormatError):
        [*read_lines(tmp_path / "a.txt.gz")]


@pytest.mark.parametrize(
    "line, match",
    [('{"text": 3}', "record 2 has int"), ('["text"]', "it has a list"), ('{"text"', "line 2 does not parse"), ('{"body": "x"}', "has no 'text'")],
)
def test_bad_records(tmp_path, line, match):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(FileFormatError, match=match):
        load_text(tmp_path)


def test_undecodable_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xe9"}\n')
    with pytest.raises(FileFormatError, match="line 2 is not UTF-8"):
        load_text(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d alone"}\n{"text": "other"}\n')  # half of a surrogate pair: JSON allows it
    assert len(load_text(tmp_path).fingerprint) == 64


@pytest.mark.parametrize("options, error", [
    ({"max_chars": 0}, RangeError), ({"max_chars": 1.5}, ArgumentError), ({"validation": -0.1}, RangeError), ({"validation": 0.5, "test": 0.5}, ArgumentError),
    ({"test": float("nan")}, ArgumentError), ({"source": ""}, ArgumentError), ({"source": None}, ArgumentError), ({"source": "pydcos"}, UnknownNameError),
    ({"source": "../no/such"}, FileNotFoundError),
])  # fmt: skip
def test_bad_arguments(options, error):
    with pytest.raises(error):
        load_text(**options)


def test_texts_refuse_titles_of_another_length():
    with pytest.raises(ShapeError):
        Texts("x", {"train": ["a", "b"]}, {"train": [""]})


def test_a_hub_set_by_its_files(tmp_path):
    for s in ("train", "test"):
        pq.write_table(pa.table({"text": [f"{d} ({s})" for d in DOCUMENTS], "title": ["T"] * 40}), tmp_path / f"{s}.parquet")
    parts = hub_parts("parquet", data_files={s: str(tmp_path / f"{s}.parquet") for s in ("train", "test")})
    found, titles, notes = shelve(parts, {"validation": 0.2, "test": 0.1}, dict.fromkeys(SPLITS, np.inf))
    assert found["test"] == [f"{d} (test)" for d in DOCUMENTS] and len(found["train"]) + len(found["validation"]) == 40 and found["validation"]
    assert set(titles["train"]) == {"T"} and "no validation split" in notes[0]


def test_names_of_splits():
    names = ("dev", "x.test.txt", "latest.txt", "validation-00000-of-00002.parquet")
    assert [split_named("shard", n) for n in names] == ["validation", None, None, "validation"]


# ---- the embedded corpus and real text -----------------------------------------------------------------------------


def test_pydocs_modules_are_long_and_keep_their_splits():
    texts, pairs = load_text("pydocs"), load_pydocs()
    for s in SPLITS:
        assert set(texts.titles[s]) == set(pairs.splits[s].extras["module"]) and len(set(texts.titles[s])) == len(texts.titles[s])
    assert max(map(len, texts.train)) > 100_000 and min(texts.n_chars.values()) > 500_000


def test_wikipedia_is_read_only_as_far_as_asked():
    folder = shared("wiki_text")
    few = load_text(folder, max_chars=2_000_000)
    assert 1_990_000 < few.n_chars["train"] <= 2_000_000 and all(0.9 < few.n_chars[s] / 250_000 <= 1 for s in ("validation", "test"))
    assert few.titles["train"][0] and few.nbytes < 6e6
    named = dict(zip(few.titles["train"], few.train))
    title, text = next((t, x) for t, x in read_records(sorted(folder.glob("*.parquet"))[0]) if t in named)
    assert named[title] == text.strip()


def test_small_text_files():
    folder = shared("text_small")
    texts = load_text(folder)
    assert [len(texts.splits[s]) for s in SPLITS] == [1, 1, 1] and texts.train[0].startswith("First Citizen")
    articles = load_text(folder / "wikitext2-valid.txt.gz", heading=WIKITEXT)
    assert [len(articles.splits[s]) for s in SPLITS] and sum(map(len, articles.splits.values())) == 60
    assert "Homarus gammarus" in {t for s in SPLITS for t in articles.titles[s]}
    assert len([*text_parts(folder)]) == 3


def test_contexts_of_pairs_as_text():
    texts = load_text(shared("nq"), pattern="contexts.parquet")
    assert 5000 < sum(map(len, texts.splits.values())) <= 5434
