"""Documents and passages beyond the notebook: random texts, random bytes, damaged files."""

import io
import os
import time

import pypdf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pypdf.generic import DictionaryObject as Dict
from pypdf.generic import NameObject as Name

from hiernb.errors import EmptyError, FileFormatError, HiernbError
from hiernb.rag.documents import READERS, Document, decode, load_documents, read_pdf
from hiernb.rag.passages import sentence_spans, split_passages

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
SOME = ["Bees", "visit", "lavender.", "Why?", "e.g.", "Dr.", "U.S.", "(sage)", "été", "\n\n", "3.5", "...", "x" * 30, '"Yes!"', "。"]
WORDS = st.lists(st.sampled_from(SOME), min_size=1, max_size=80)
PLAIN = st.text(min_size=1, max_size=60).filter(lambda t: not any(ord(c) < 32 or ord(c) == 127 for c in t))
ODD = {"dots": "." * 200_000, "lines": "\n" * 200_000 + "x", "a.": "a. " * 60_000, "brackets": "(" * 200_000}
ODD |= {"spaced": " ." * 100_000, "words": "word " * 60_000}


def pdf(text="Bees visit lavender.", password=None):
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(200, 200)
    if text:
        stream = pypdf.generic.DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode())
        page[Name("/Contents")] = writer._add_object(stream)
        font = Dict({Name(k): Name(v) for k, v in (("/Type", "/Font"), ("/Subtype", "/Type1"), ("/BaseFont", "/Helvetica"))})
        page[Name("/Resources")] = Dict({Name("/Font"): Dict({Name("/F1"): writer._add_object(font)})})
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


# ---- passages ------------------------------------------------------------------------------------------------------


@QUICK
@given(st.lists(WORDS, min_size=1, max_size=3), st.integers(1, 15), st.data())
def test_passages_are_where_they_say(texts, words, data):
    overlap = data.draw(st.integers(0, words - 1))
    documents = [Document(" ".join(t), f"{i}.txt") for i, t in enumerate(texts)]
    if not any(d.text.strip() for d in documents):
        with pytest.raises(EmptyError):
            split_passages(documents, words, overlap)
        return
    passages = split_passages(documents, words, overlap)
    assert len({p.id for p in passages}) == len(passages)
    assert passages == split_passages(documents, words, overlap)
    for d in documents:
        own = [p for p in passages if p.source == d.source]
        covered = [False] * len(d.text)
        for p in own:
            assert d.text[p.start : p.end] == p.text == p.text.strip() and 1 <= len(p.text.split()) <= words
            covered[p.start : p.end] = [True] * (p.end - p.start)
        assert all(c or ch.isspace() for c, ch in zip(covered, d.text))
        for a, b in zip(own, own[1:]):
            assert a.start < b.start and a.end < b.end and len(d.text[b.start : max(a.end, b.start)].split()) <= overlap


@QUICK
@given(st.text(max_size=300))
def test_sentences_cover_any_text(text):
    spans = sentence_spans(text)
    assert all(a < b and not text[a].isspace() and not text[b - 1].isspace() for a, b in spans)
    assert all(b <= c for (_, b), (c, _) in zip(spans, spans[1:]))
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())


@pytest.mark.parametrize("name", ODD)
def test_odd_texts_take_linear_time(name):
    text = ODD[name]
    start = time.process_time()
    passages = split_passages([Document(text, "odd.txt")])
    assert time.process_time() - start < 5 and passages[-1].end == len(text.rstrip())


# ---- bytes ---------------------------------------------------------------------------------------------------------


@QUICK
@given(PLAIN, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_marked_encodings_come_back(text, encoding):
    if text[0] == "\ufeff" or encoding == "utf-8" and text.encode(errors="surrogatepass")[:1] in (b"\xff", b"\xfe"):
        return
    assert decode(text.encode(encoding), "a.txt") == (text.replace("\r\n", "\n").replace("\r", "\n"), encoding)


@pytest.mark.parametrize("ending", sorted(READERS))
@QUICK
@given(st.binary(max_size=300))
def test_random_bytes_give_documents_or_our_error(ending, tmp_path, data):
    path = tmp_path / f"file{ending}"
    path.write_bytes(data)
    try:
        assert any(d.text.strip() for d in load_documents(path))
    except HiernbError as e:
        assert f"file{ending}" in str(e)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 900), st.binary(min_size=1, max_size=8))
def test_damaged_pdfs_give_our_error(at, noise):
    whole = pdf()
    damaged = whole[:at] + noise + whole[at + len(noise) :]
    for data in (damaged, whole[:at]):
        try:
            read_pdf(data, "garden.pdf")
        except FileFormatError as e:
            assert "garden.pdf" in str(e)


def test_whole_pdf_locked_pdf_scan():
    assert read_pdf(pdf(), "a.pdf")[0].text == "Bees visit lavender."
    with pytest.raises(FileFormatError, match="password"):
        read_pdf(pdf(password="secret"), "a.pdf")
    with pytest.raises(FileFormatError, match="scan"):
        read_pdf(pdf(""), "a.pdf")


# ---- files ---------------------------------------------------------------------------------------------------------


def farm(folder):
    (folder / "sub" / ".hidden").mkdir(parents=True)
    (folder / "b.TXT").write_text("Bees.")
    (folder / "sub" / "a.md").write_text("Ducks.")
    (folder / "sub" / ".hidden" / "c.txt").write_text("Not seen.")
    (folder / "sub" / "photo.png").write_bytes(b"\x89PNG")
    return folder


def test_folders_recursively_and_once(tmp_path):
    farm(tmp_path)
    os.symlink(tmp_path, tmp_path / "sub" / "loop")
    assert [d.text for d in load_documents([tmp_path, tmp_path / "b.TXT", str(tmp_path / "sub")])] == ["Bees.", "Ducks."]


def test_one_bad_file_stops_all_and_names_all(tmp_path):
    farm(tmp_path)
    for name, data in (("empty.txt", b""), ("blank.md", b" \n\t "), ("photo.txt", bytes(range(256))), ("cut.jsonl", b'{"text": "a"}\n{"te')):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(FileFormatError) as told:
        load_documents(tmp_path)
    assert all(name in str(told.value) for name in ("empty.txt", "blank.md", "photo.txt", "cut.jsonl"))
    with pytest.warns(UserWarning, match="left out"):
        assert len(load_documents(tmp_path, skip_bad=True)) == 2


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(EmptyError, match="empty.txt"):
        load_documents(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(EmptyError):
        load_documents(tmp_path, skip_bad=True)
    with pytest.raises(EmptyError, match="a folder with files"):
        load_documents(tmp_path / "sub" if (tmp_path / "sub").mkdir() is None else "")


def test_documents_of_one_source_do_not_share_ids():
    pages = [Document("The same text.", "a.pdf", page) for page in (1, 2)]
    assert len({p.id for p in split_passages(pages)}) == 2
    assert len(split_passages([*pages, *pages])) == 2
