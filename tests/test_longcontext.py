"""Long contexts: what the notebooks do not show (properties, schemas, faults, real sets)."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.data.corpus import SPLITS
from hiernb.data.long_qa import find_quoted, prepare_hotpot, prepare_longbench, prepare_trivia
from hiernb.data.long_sources import HubLong, load_long
from hiernb.data.longcontext import LongContext, token_spans, tokenize_with_offsets, with_question
from hiernb.data.needle import KINDS, NeedleTask
from hiernb.data.packing import GAP, Ruler, assemble, distractor_positions, names_answer, qa_contexts
from hiernb.data.pairs import make_pairs, read_pairs
from hiernb.data.text import load_text
from hiernb.errors import ArgumentError, DamagedFileError, EmptyError, FileFormatError, RangeError

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
WORDS = "the old elm and a young ash grow near Berlin where rain falls on red roofs every day It was so . They said : no".split()


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/data/{name} is not beside this checkout")
    return path


def prose(n, seed=0):
    rng = np.random.default_rng(seed)
    return " ".join(" ".join(rng.choice(WORDS[:-6], 9)).capitalize() + "." for _ in range(n))


TEXTS = [prose(60, i) for i in range(12)]


def wordpiece():
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(TEXTS + [" ".join(WORDS)], tokenizers.trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    return made


def bytelevel():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return made


@pytest.fixture(scope="module", params=["wordpiece", "bytelevel", "fast"])
def tokenizer(request):
    if request.param != "fast":
        return {"wordpiece": wordpiece, "bytelevel": bytelevel}[request.param]()
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=wordpiece(), model_max_length=16, **names)


# ---- spans ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(WORDS), min_size=3, max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_spans_map_back_to_the_exact_words(words, data):
    text = " ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    start = len(" ".join(words[:first])) + bool(first)
    end = start + len(" ".join(words[first : last + 1]))
    for made in (WP, BL):
        ((ids, offsets),) = tokenize_with_offsets(made, [text])
        ((a, b),) = token_spans(offsets, [(start, end)])
        assert text[offsets[a, 0] : offsets[b - 1, 1]].strip() == text[start:end]
        naive = [i for i, (s, e) in enumerate(offsets.tolist()) if any(start <= c < end for c in range(s, e))]
        assert (a, b) == (naive[0], naive[-1] + 1)


WP, BL = wordpiece(), bytelevel()


def test_question_and_context_keep_their_places(tokenizer):
    text = GAP.join(TEXTS[:3])
    at = text.index(TEXTS[1][100:140])
    item = LongContext("x", text, ["how old is it", "and where"], [["a"], ["b"]], [[(at, at + 40)], []])
    full = with_question(item, tokenizer)
    ((ids, offsets),) = tokenize_with_offsets(tokenizer, [text])
    assert full.ids[full.context].tolist() == ids.tolist()
    assert full.ids[full.question].tolist() == tokenize_with_offsets(tokenizer, ["how old is it"])[0][0].tolist()
    gold = np.flatnonzero(full.evidence) - full.context.start
    assert text[at : at + 40].strip() in text[offsets[gold[0], 0] : offsets[gold[-1], 1]] and len(gold) < 40
    assert not full.evidence[full.question].any() and not with_question(item, tokenizer, 1).evidence.any()
    for seed in range(20):  # cut windows hold all of the evidence, at different places
        cut = with_question(item, tokenizer, length=100, seed=seed)
        assert len(cut.ids) == 100 and cut.ids[cut.evidence].tolist() == full.ids[full.evidence].tolist()
    assert len({int(np.flatnonzero(with_question(item, tokenizer, length=100, seed=s).evidence)[0]) for s in range(20)}) > 5


def test_slow_tokenizers_and_bad_items_are_refused():
    with pytest.raises(ArgumentError, match="fast tokenizer"):
        tokenize_with_offsets(lambda t: t, ["a"])
    with pytest.raises(RangeError):
        LongContext("x", "abc", ["?"], [[]], [[(0, 9)]])
    item = LongContext("x", "abc abc", [], [], [])
    with pytest.raises(RangeError, match="question"):
        with_question(item, WP)


# ---- packing -------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.sampled_from("ab cd.\n"), max_size=20), min_size=1, max_size=8), st.integers(0, 20))
@settings(max_examples=80, deadline=None)
def test_cut_is_the_longest_beginning_that_fits(texts, room):
    for text in texts:
        for ruler in (Ruler(), Ruler(WP), Ruler(BL)):
            short = ruler.cut(text, room)
            assert text.startswith(short) and ruler.count(short) <= room or ruler.count("") > room
        words = text.split()
        assert Ruler().cut(text, room).split() == words[:room]


@pytest.mark.parametrize("length", [60, 200, 777])
def test_assembled_contexts_fill_the_length(tokenizer, length):
    ruler, gold = Ruler(tokenizer), [prose(1, 90), prose(2, 91)]
    for seed in range(5):
        context, parts, spans = assemble(gold, TEXTS, length, ruler, np.random.default_rng(seed))
        ((ids, _),) = tokenize_with_offsets(tokenizer, [context])
        assert length - 12 <= len(ids) <= length
        assert [context[s:e] for s, e in spans] == gold and GAP.join(context[s:e] for s, e in parts) == context


def test_gold_places_are_uniform():
    fillers = [f"word{i} " * 5 for i in range(19)]
    places = [assemble(["gold"], fillers, 200, Ruler(), np.random.default_rng(s))[2][0] for s in range(2000)]
    contexts = [assemble(["gold"], fillers, 200, Ruler(), np.random.default_rng(s))[0] for s in range(3)]
    slots = np.array([round(19 * p[0] / (len(contexts[0]) - 4)) for p in places])
    counts = np.bincount(slots, minlength=20)
    assert ((counts - 100) ** 2 / 100).sum() < 44  # chi-square with 19 degrees of freedom, 0.1 %


def test_pairs_in_long_contexts_keep_splits_apart():
    rows = {s: [{"query": f"{s} {i}?", "text": f"{s} context {i} says something long.", "answer": f"answer {s} {i}"} for i in range(30)] for s in SPLITS}
    pairs = make_pairs("x", rows)
    for s in SPLITS:
        made = qa_contexts(pairs, s, 60, n=10)
        for item in made:
            assert set(re.findall(r"train|validation|test", item.context)) == {s}
            assert item.evidence_texts() == [item.questions[0].replace("?", "").replace(f"{s} ", f"{s} context ") + " says something long."]
    assert [i.id for i in qa_contexts(pairs, "test", 60, n=3)] == [i.id for i in qa_contexts(pairs, "test", 60)][:3]
    places = [distractor_positions(pairs, s) for s in SPLITS]
    assert not set(places[0]) & set(places[1]) and not set(places[1]) & set(places[2])


def test_several_gold_contexts_are_all_evidence():
    rows = [{"query_id": "q", "query": "which?", "text": t} for t in ("one gold", "two gold")] + [{"query": f"o{i}", "text": f"other {i}"} for i in range(9)]
    item = next(i for i in qa_contexts(make_pairs("x", {"test": rows}), "test", 16) if i.id == "x/q")
    assert sorted(item.evidence_texts()) == ["one gold", "two gold"] and len(item.context.split()) == 16


def test_distractors_do_not_name_the_answer():
    rows = [{"query": f"q{i}", "text": f"Text {i}: the castle stands.", "answer": "castle" if i == 0 else "yes"} for i in range(12)]
    made = {i.id: i for i in qa_contexts(make_pairs("x", {"test": rows}), "test", 40)}
    asked = next(i for i in made.values() if i.questions == ["q0"])
    assert asked.context == "Text 0: the castle stands." and not names_answer("no castle", ["cas"])
    assert all(len(i.parts) > 3 for i in made.values() if i is not asked)


# ---- needle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_needles", [1, 4])
def test_needle_distance_is_exact(tokenizer, kind, n_needles):
    task = NeedleTask(TEXTS, tokenizer, 300, kind, n_needles, values=["roof", "rain", "ash", "elm", "day", "red", "young", "old"])
    for distance in (0, 1, 17, 60, 100):
        for i in range(4):
            item = task.item(i, distance=distance)
            first, end = item.extras["needle"]
            assert len(item.ids) == len(item.offsets) == 300 and 300 - end == distance
            asked = with_question(item, tokenizer)
            assert asked.context.stop - 1 - np.flatnonzero(asked.evidence)[-1] == distance and asked.evidence.sum() == end - first
            assert item.answers[0][0] in item.evidence_texts()[0] and item.context.count(item.evidence_texts()[0]) == 1
            assert len(item.extras["others"]) == n_needles - 1 and (item.offsets[:, 0] <= item.offsets[:, 1]).all()
            spans = sorted([*item.extras["others"], (first, end)])
            assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    assert task.chance == {"values": 1 / len(task.values), "needles": 1 / n_needles}


def test_needle_retokenizes_to_itself_and_depends_on_seed_and_index_only():
    task = NeedleTask(TEXTS, WP, 400, n_needles=2)
    for item in task.items(10):
        assert WP.encode(item.context, add_special_tokens=False).ids == item.ids.tolist()
    again = NeedleTask(TEXTS, WP, 400, n_needles=2)
    again.item(3)
    assert again.item(7).context == task.item(7).context != NeedleTask(TEXTS, WP, 400, n_needles=2, seed=1).item(7).context
    depths = [task.item(i).extras["depth"] for i in range(300)]
    assert np.histogram(depths, 5, (0, 1))[0].min() > 35


@pytest.mark.parametrize("make, error", [
    (lambda: NeedleTask(TEXTS, WP, 0), RangeError), (lambda: NeedleTask(TEXTS, WP, 50, "straw"), ArgumentError), (lambda: NeedleTask([], WP, 50), EmptyError),
    (lambda: NeedleTask(TEXTS, WP, 50).item(-1), RangeError), (lambda: NeedleTask(TEXTS, WP, 50).item(0, distance=50), RangeError),
    (lambda: NeedleTask(TEXTS, WP, 50).item(0, depth=1.1), RangeError), (lambda: NeedleTask(TEXTS, WP, 3).item(0), RangeError),
    (lambda: NeedleTask(TEXTS, WP, 60, n_needles=8).item(0), RangeError), (lambda: NeedleTask(TEXTS[:1], WP, 10**5).item(0), RangeError),
])  # fmt: skip
def test_needle_refuses(make, error):
    with pytest.raises(error):
        make()


# ---- schemas -------------------------------------------------------------------------------------------------------


def hotpot_row(i):
    titles = ["Fir", f"Elm {i}", "Ash"]
    context = {"title": titles, "sentences": [[f"Firs of {i}."], ["An elm.", f" Young {i}."], ["An ash.", " Old."]]}
    facts = {"title": ["Ash", f"Elm {i}"], "sent_id": [1, 1]}
    return {"id": str(i), "question": f"Which, {i}?", "answer": f"Elm {i}", "supporting_facts": facts, "context": context, "type": "bridge", "level": "hard"}


def trivia_row(i):
    pages = {"title": [f"T{i}"], "wiki_context": [f"{prose(20, i)} The tall Oak{i} fell. {prose(20, i + 1)}"], "filename": ["x"], "doc_source": ["y"]}
    found = {"title": ["R"], "search_context": ["Nothing here."], "url": ["u"], "rank": [1], "description": ["d"], "filename": ["f"]}
    answer = {"value": f"Oak{i}", "aliases": [f"Oak{i}", "The oak"], "normalized_value": f"oak{i}"}
    return {"question_id": f"tc_{i}", "question": "What fell?", "answer": answer, "entity_pages": pages, "search_results": found}


def bench_row(i):
    text = "".join(f"Paragraph {k}: {prose(2, k)}\n\n" for k in range(1, 31))
    return {"_id": str(i), "input": "Which?", "context": text, "answers": [f"Paragraph {i + 1}"], "dataset": "passage_retrieval_en", "language": "en"}


def test_hub_schemas_through_parquet(tmp_path):
    for name, row in (("hotpot", hotpot_row), ("trivia", trivia_row), ("bench", bench_row)):
        pq.write_table(pa.Table.from_pylist([row(i) for i in range(25)]), tmp_path / f"{name}.parquet")
    at = lambda name: {"train": str(tmp_path / f"{name}.parquet"), "validation": str(tmp_path / f"{name}.parquet")}  # noqa: E731
    hub = HubLong("hotpotqa", "parquet", prepare_hotpot, data_files=at("hotpot"))
    made = {s: prepare_hotpot(hub.rows(s), s, length=50) for s in SPLITS}
    assert sum(len(made[s]) for s in ("train", "validation")) == 25 == len(made["test"])
    assert not {i.id for i in made["train"]} & {i.id for i in made["validation"]}
    for item in made["test"]:
        i = item.id.split("/")[1]
        assert sorted(item.evidence_texts()) == ["Old.", f"Young {i}."] and item.context.count("Elm") == item.context.count(f"Elm {i}.") + sum(
            f"Elm {j}." in item.context for j in range(25) if str(j) != i
        )
    trivia = prepare_trivia(HubLong("t", "parquet", prepare_trivia, data_files=at("trivia"), key="question_id").rows("test"), n=3)
    assert len(trivia) == 3 and all(item.answers[0][0] in item.evidence_texts()[0] for item in trivia)
    bench = prepare_longbench(HubLong("b", "parquet", prepare_longbench, {"test": "validation"}, data_files=at("bench"), key="_id").rows("test"), n=5)
    assert all(item.evidence_texts()[0].startswith(item.answers[0][0] + ":") and len(item.parts) == 30 for item in bench)


def test_files_of_every_schema_are_recognised(tmp_path):
    meeting = {"id": "m", "turns": [{"speaker": "A", "text": "Hello."}], "specific": [], "general": [{"query": "Sum up.", "answer": "A greeting."}]}
    cases = {"hotpotqa": hotpot_row(1), "triviaqa": trivia_row(1), "longbench": bench_row(1), "qmsum": meeting}
    cases["leval"] = {"task": "tpo", "source": "s", "input": "Text.", "questions": ["Q?"], "answers": ["A"]}
    cases["bamboo"] = {"task": "paperqa", "question": "Q?", "content": "Text.", "answer": "A", "options": ["A. a"], "evidence": "Text."}
    for name, row in cases.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))
        assert load_long(path).name == name
        with pytest.raises(EmptyError, match="which has"):
            load_long(path, "train")


@pytest.mark.parametrize("content, error", [
    (b"", FileFormatError), (b"[1]\n", FileFormatError), (b'{"a": 1}\n', FileFormatError), (b'{"turns"\n', DamagedFileError), (b'"text"\n', FileFormatError),
    (b'{"turns": [], "specific": [], "general": []}\n', ArgumentError), (b'\xff\n', FileFormatError),
])  # fmt: skip
def test_bad_files(tmp_path, content, error):
    (tmp_path / "test.jsonl").write_bytes(content)
    with pytest.raises(error):
        load_long(tmp_path)


def test_truncated_gzip_is_named(tmp_path):
    data = gzip.compress("".join(json.dumps(bench_row(i)) + "\n" for i in range(9)).encode())
    (tmp_path / "test.jsonl.gz").write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(DamagedFileError, match="test.jsonl.gz"):
        load_long(tmp_path)


@given(st.lists(st.sampled_from(["an", "elm", "(so)", "is.", "old*", "+"]), min_size=5, max_size=25), st.data())
@settings(max_examples=80, deadline=None)
def test_quotations_are_found_whatever_the_white_space(words, data):
    start = data.draw(st.integers(0, len(words) - 4))
    end = data.draw(st.integers(start + 4, len(words)))
    space = lambda ws: "".join(w + data.draw(st.sampled_from([" ", "\n", "  "])) for w in ws).strip()  # noqa: E731
    context, quoted = space(words), space(words[start:end])
    spans = find_quoted(context, quoted)
    assert [context[s:e].split() for s, e in spans] == [words[start:end]]


# ---- the real sets -------------------------------------------------------------------------------------------------


def test_real_qmsum():
    folder = shared("qmsum")
    for split, n, queries in (("train", 162, 1095), ("validation", 35, 237), ("test", 35, 244)):
        made = load_long(folder, split)
        assert len(made) == n and sum(bool(e) for i in made for e in i.evidence) == queries
    raw = json.loads(gzip.open(folder / "test.jsonl.gz", "rt", encoding="utf8").readline())
    first, last = raw["specific"][0]["spans"][0]
    assert made[0].evidence_texts(0)[0].split("\n") == [f"{t['speaker']}: {t['text']}" for t in raw["turns"][first : last + 1]]
    cut = with_question(made[0], WP, 0, length=2048)
    assert len(cut.ids) == 2048 and cut.evidence.sum() == with_question(made[0], WP, 0).evidence.sum()


def test_real_long_qa():
    leval, bamboo = (load_long(shared("long_qa") / f"{n}.jsonl.gz") for n in ("leval", "bamboo"))
    assert sum(len(i.questions) for i in leval) == 1599 and not any(e for i in leval for e in i.evidence)
    assert len(bamboo) == 499 and 220 < sum(bool(i.evidence[0]) for i in bamboo) <= 299 and "without evidence" in bamboo.notes[0]
    assert {i.extras["task"] for i in load_long(shared("long_qa") / "leval.jsonl.gz", task="tpo")} == {"tpo"}


def test_real_hotpotqa():
    folder = shared("hotpotqa")
    made = {s: load_long(folder, s, length=1500, n=20) for s in ("train", "test")}
    pairs = read_pairs(folder)
    for item in made["test"]:
        assert 1480 <= len(item.context.split()) <= 1500 and len(item.evidence_texts()) >= 2
        query = pairs.test.ids.index(item.id.split("/")[1])
        gold = pairs.contexts.texts[pairs.test.relevance[pairs.test.relevance[:, 0] == query, 1][0]]
        assert {t.strip() for t in gold.split("\n")} == set(item.evidence_texts())
    documents = {s: {i.context[a:b] for i in m for a, b in i.parts[:-1]} for s, m in made.items()}
    assert len(documents["train"] & documents["test"]) <= 1  # three contexts stand in both splits of the set itself


@pytest.mark.parametrize("name", ["squad", "nq", "narrativeqa", "boolq"])
def test_real_pairs(name):
    made = load_long(shared(name), length=3000, n=10)
    assert len(made) == 10 and all(2900 < len(i.context.split()) <= 3000 and i.evidence_texts() for i in made)
    assert made.fingerprint == load_long(shared(name), length=3000, n=10).fingerprint


def test_embedded_needle_at_4096():
    texts = load_text(max_chars=4_000_000)
    task = NeedleTask(texts.test, WP, 4096)
    assert all(4096 - i.extras["needle"][1] == 2000 for i in task.items(5, distance=2000))
