"""One interface: sentence-transformers' evaluator and mteb run every method unchanged, and find what we find."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiernb.baselines.adapter import LinearAdapter, TruncatedEncoder
from hiernb.baselines.cluster_search import ClusterIndex
from hiernb.baselines.clusters import ClusterTree
from hiernb.baselines.matryoshka import MatryoshkaAdapter, PCATruncation
from hiernb.baselines.raptor import Raptor
from hiernb.data.pairs import read_pairs
from hiernb.data.sources import load_pairs
from hiernb.encoders import load_encoder
from hiernb.errors import ArgumentError, FileFormatError, HiernbError, NotFiniteError
from hiernb.evaluation.ranking import evaluate_ranking, ndcg_at_k, relevant_ranks
from hiernb.frozen import TokenStates
from hiernb.retreever.model import LevelScales, Retreever, retreever_loss
from hiernb.retreever.no_tree import NoTree
from hiernb.retreever.split import calibrate
from hiernb.search.flat import pair_scores
from hiernb.search.retrievers import DenseRetriever, IndexRetriever, LexicalRetriever, VectorRetriever
from hiernb.sentences import SentenceModel, WrappedModel
from hiernb.tree import sum_up

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
N_QUERIES, N_CONTEXTS, MAX_LENGTH = 40, 150, 32


@dataclasses.dataclass
class Set:
    "A small retrieval set: every text by its id."

    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]

    @property
    def relevant(self) -> torch.Tensor:  # [Q, R] positions among the sorted context ids, −1 for none
        at = {c: i for i, c in enumerate(sorted(self.corpus))}
        most = max(map(len, self.qrels.values()))
        return torch.tensor([[at[c] for c in self.qrels[q]] + [-1] * (most - len(self.qrels[q])) for q in self.queries])


@pytest.fixture(scope="module")
def data() -> Set:
    pairs = read_pairs(SHARED / "inscit") if (SHARED / "inscit").is_dir() else load_pairs("pydocs", max_pairs=600)
    every, test = pairs.test.qrels(pairs.contexts), dict(list(zip(pairs.test.ids, pairs.test.texts))[:N_QUERIES])
    qrels = {q: every[q] for q in test}
    needed = {c for found in qrels.values() for c in found}
    corpus = {c: t[:200] for i, (c, t) in enumerate(zip(pairs.contexts.ids, pairs.contexts.full_texts)) if c in needed or i < N_CONTEXTS}
    return Set(test, corpus, qrels)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("minilm", max_length=MAX_LENGTH, precision="float32")


@pytest.fixture(scope="module")
def models(data, encoder) -> dict[str, SentenceModel]:
    "One of each kind, none of them trivial: the adapters' matrices are not the identity."
    contexts = encoder.encode(list(data.corpus.values()), progress=False)
    torch.manual_seed(0)
    tree = Retreever(encoder.dim, depth=7, encoder={"name": "minilm", "max_length": MAX_LENGTH})
    calibrate(tree.split, contexts)
    linear, nested = LinearAdapter(encoder.dim), MatryoshkaAdapter(encoder.dim)
    for adapter in (linear, nested):
        torch.nn.init.normal_(adapter.layer.bias, std=0.02)
        adapter.layer.weight.data += 0.02 * torch.randn(encoder.dim, encoder.dim)
    clusters = ClusterTree.fit(contexts, depth=4, method="gmm", progress=False).at_temperature(30.0)  # soft: hard posteriors tie, up to rounding
    gmm = WrappedModel(lambda x, size: clusters.assign(x, size.bit_length() - 1), encoder, "GMM", 16, "ntvd", weights=clusters)
    return {
        "tree": tree.attach(encoder), "linear": linear.attach(encoder), "matryoshka": nested.attach(encoder),
        "pca": PCATruncation.fit(contexts).attach(encoder), "encoder": TruncatedEncoder(encoder), "gmm": gmm,
        "no tree": NoTree(encoder.dim, depth=7).attach(encoder),
    }


def ndcg(model: SentenceModel, data: Set, size: int | None = None, descending: bool = False) -> float:
    "Mean NDCG@10 by our own ranking, from the model's similarities; ties by ascending id, or by descending as trec_eval has it."
    ids = sorted(data.corpus)
    q = model.encode_query(list(data.queries.values()), truncate_dim=size, convert_to_tensor=True)
    c = model.encode_document([data.corpus[i] for i in ids], truncate_dim=size, convert_to_tensor=True)
    scores, relevant = model.similarity(q, c), data.relevant
    if descending:
        scores, relevant = scores.flip(1), torch.where(relevant < 0, relevant, len(ids) - 1 - relevant)
    return ndcg_at_k(relevant_ranks(scores, relevant), 10).double().mean().item()


# ---------------------------------------------------------------------------------------------------- sentence-transformers


@pytest.mark.parametrize("name, size", [("tree", None), ("tree", 4), ("tree", 32), ("linear", None), ("linear", 64), ("matryoshka", None), ("matryoshka", 16),
                                        ("pca", 8), ("encoder", None), ("encoder", 32), ("gmm", None), ("gmm", 4), ("no tree", None)])
def test_sentence_transformers_evaluator_finds_what_we_find(models, data, name, size):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    evaluator = InformationRetrievalEvaluator(data.queries, data.corpus, {q: set(c) for q, c in data.qrels.items()}, name="t", truncate_dim=size)
    result, model = evaluator(models[name]), models[name]
    key = f"t_{model.similarity_fn_name}_ndcg@10"
    assert evaluator.primary_metric == key and result[key] == pytest.approx(ndcg(model, data, size), abs=1e-6)
    assert result[key] > 0.02
    assert model.model_card_data[-1][key] == result[key]


def test_evaluator_with_prompts_and_chunks(models, data):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    args = (data.queries, data.corpus, {q: set(c) for q, c in data.qrels.items()})
    plain = InformationRetrievalEvaluator(*args)(models["tree"])
    chunked = InformationRetrievalEvaluator(*args, corpus_chunk_size=100, batch_size=7)(models["tree"])
    prompted = InformationRetrievalEvaluator(*args, query_prompt="in French: ")(models["tree"])
    assert plain == pytest.approx(chunked) and plain != prompted
    assert plain == pytest.approx(InformationRetrievalEvaluator(*args, query_prompt_name="query", corpus_prompt_name="document")(models["tree"]))


def test_encoder_gives_what_sentence_transformers_gives(encoder, data):
    from sentence_transformers import SentenceTransformer

    theirs, ours = SentenceTransformer(str(encoder.folder), device="cpu"), TruncatedEncoder(load_encoder("minilm", max_length=MAX_LENGTH, precision="float32"))
    theirs.max_seq_length, texts = MAX_LENGTH, list(data.corpus.values())[:6]
    for kwargs in ({}, {"truncate_dim": 32, "normalize_embeddings": True}, {"prompt": "a question: "}, {"convert_to_tensor": True}):
        a, b = theirs.encode(texts, **kwargs), ours.encode(texts, **kwargs)
        assert type(a) is type(b) and np.allclose(a, b, atol=2e-5) and a.dtype == b.dtype
    assert np.allclose(theirs.encode("one"), ours.encode("one"), atol=2e-5) and ours.encode("one").shape == theirs.encode("one").shape
    assert [type(v) for v in theirs.encode(texts[:2], convert_to_numpy=False)] == [type(v) for v in ours.encode(texts[:2], convert_to_numpy=False)]
    a, b = theirs.encode(texts), ours.encode(texts)
    assert np.allclose(theirs.similarity(a, a[:3]), ours.similarity(b, b[:3]), atol=2e-5)
    assert np.allclose(theirs.similarity_pairwise(a, a[::-1].copy()), ours.similarity_pairwise(b, b[::-1].copy()), atol=2e-5)


# ---------------------------------------------------------------------------------------------------------------------- mteb


@pytest.fixture(scope="module")
def task(data):
    "A retrieval task of mteb whose data set is in memory."
    pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalRetrieval(AbsTaskRetrieval):
        k_values = (1, 10)
        metadata = TaskMetadata(
            name="LocalRetrieval", description="A small local set.", reference=None, dataset={"path": "none", "revision": "1"}, type="Retrieval",
            category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10")

        def load_data(self, num_proc=None, **kwargs):
            corpus = Dataset.from_list([{"id": i, "title": "", "text": t} for i, t in data.corpus.items()])
            queries = Dataset.from_list([{"id": i, "text": t} for i, t in data.queries.items()])
            qrels = {q: dict(c) for q, c in data.qrels.items()}
            self.dataset = {"default": {"test": {"corpus": corpus, "queries": queries, "relevant_docs": qrels, "top_ranked": None}}}
            self.data_loaded = True

    return LocalRetrieval


def run_mteb(model, task, cache=None) -> dict[str, float]:
    import mteb

    result = mteb.evaluate(model, task(), cache=cache, co2_tracker=False, show_progress_bar=False)
    return result.task_results[0].scores["test"][0]


@pytest.mark.parametrize("name", ["tree", "linear", "matryoshka", "pca", "encoder", "gmm", "no tree"])
def test_mteb_finds_what_we_find(models, data, task, name):
    scores = run_mteb(models[name], task)
    assert scores["main_score"] == scores["ndcg_at_10"] == pytest.approx(ndcg(models[name], data, descending=True), abs=1e-5)  # mteb rounds to 5 digits


def test_mteb_cuts_and_files_each_model_under_its_own_name(models, data, task, tmp_path):
    import mteb

    cache, tree = mteb.ResultCache(tmp_path), models["tree"]
    whole = run_mteb(tree, task, cache)["ndcg_at_10"]
    with tree.truncate_embeddings(8):
        cut = run_mteb(tree, task, cache)["ndcg_at_10"]
        assert cut == pytest.approx(ndcg(tree, data, 8, descending=True), abs=1e-5)
    assert cut < whole and run_mteb(tree, task, cache)["ndcg_at_10"] == whole  # from the cache
    torch.manual_seed(1)
    other = Retreever(384, depth=7).attach(tree.encoder)  # same class, same size, other weights
    assert run_mteb(other, task, cache)["ndcg_at_10"] == pytest.approx(ndcg(other, data, descending=True), abs=1e-5)
    names = {(m.mteb_model_meta.name, m.mteb_model_meta.revision) for m in (*models.values(), other)}
    assert len(names) == len(models) + 1 and ("hiernb/Retreever-128", tree.fingerprint()) in names


@pytest.mark.parametrize("kind", ["dense", "lexical", "vectors", "raptor"])
def test_mteb_runs_retrievers_as_search_models(models, data, task, encoder, kind):
    def raptor(texts, ids):
        return Raptor.build(texts, ids, encoder, progress=False)

    def clusters(x, ids):
        return ClusterIndex.build(ClusterTree.fit(x, depth=3, progress=False), x, ids)

    make = {"dense": lambda: DenseRetriever(models["tree"], 32), "lexical": LexicalRetriever, "vectors": lambda: VectorRetriever(clusters, encoder, "2-means"),
            "raptor": lambda: IndexRetriever(raptor, "RAPTOR")}
    scores = run_mteb(make[kind](), task)
    values, found = make[kind]().index(list(data.corpus.values()), list(data.corpus)).search(list(data.queries.values()), 10)
    ranked = [sorted(zip(v.tolist(), f.tolist()), reverse=True) for v, f in zip(values, found)]  # ties by descending id, as mteb has it: BM25 ties often
    ours = evaluate_ranking([[i for _, i in row] for row in ranked], list(data.queries), data.qrels, ks=(10,)).mean("ndcg@10")
    assert scores["ndcg_at_10"] == pytest.approx(ours, abs=1e-5)
    assert scores["ndcg_at_10"] > 0.1


def test_mteb_is_not_imported_by_us():
    code = "import sys, hiernb.sentences, hiernb.search.retrievers, hiernb.retreever.model as m; assert m.Retreever(8, 2).mteb_model_meta is None; "
    code += "print([n for n in ('mteb', 'sentence_transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------------- arguments and sizes


def test_levels_are_sums_and_sizes_are_prefixes(models, data):
    texts, tree = list(data.corpus.values())[:30], models["tree"]
    leaves = tree.encode(texts, convert_to_tensor=True)
    for level in range(8):
        got = tree.encode(texts, truncate_dim=1 << level, convert_to_tensor=True)
        torch.testing.assert_close(got, sum_up(leaves, level), atol=1e-5, rtol=0)
        assert torch.equal(got, tree.encode(texts, level=level, convert_to_tensor=True))
    for name in ("linear", "matryoshka", "pca", "encoder"):
        whole = models[name].encode(texts, convert_to_tensor=True)
        cut = models[name].encode(texts, truncate_dim=24, convert_to_tensor=True)
        torch.testing.assert_close(cut, torch.nn.functional.normalize(whole[:, :24], dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tree", "linear", "encoder"])
@pytest.mark.parametrize("kwargs", [
    {"precision": "int8"}, {"output_value": "token_embeddings"}, {"output_value": None}, {"pool": {"processes": []}}, {"device": ["cpu", "cpu"]},
    {"chunk_size": 3}, {"batch_size": 0}, {"truncate_dim": 1000}, {"truncate_dim": 0}, {"truncate_dim": 2.5}, {"prompt_name": "quary"}, {"prompt": 3},
    {"kind": "answer"}, {"processing_kwargs": {}}, {"prompt_type": "image"},
])
def test_what_is_not_supported_is_refused(models, name, kwargs):
    with pytest.raises(HiernbError, match=f"`{next(iter(kwargs))}`|`size`"):
        models[name].encode(["a text"], **kwargs)


def test_distributions_are_not_normalised_and_flat_models_have_no_levels(models):
    for call in (lambda: models["tree"].encode(["x"], normalize_embeddings=True), lambda: models["linear"].encode(["x"], level=3),
                 lambda: models["tree"].encode(["x"], truncate_dim=24), lambda: models["tree"].encode(["x"], truncate_dim=8, level=2),
                 lambda: models["tree"].encode(None), lambda: models["tree"].encode(["x", None])):
        with pytest.raises(ArgumentError):
            call()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["tree", "linear", "pca", "encoder"]), st.integers(0, 6), st.booleans(), st.booleans(), st.data())
def test_any_mixture_of_arguments_gives_the_same_numbers(models, name, n, tensor, as_document, draw):
    model, texts = models[name], [f"text number {i}" for i in range(n)]
    size = 1 << draw.draw(st.integers(0, 7)) if name == "tree" else draw.draw(st.integers(1, model.max_size))
    want = model.represent(model.read(texts), size)
    encode = model.encode_document if as_document else model.encode
    order = draw.draw(st.permutations(range(n)))
    got = torch.as_tensor(encode([texts[i] for i in order], truncate_dim=size, convert_to_tensor=tensor, batch_size=draw.draw(st.integers(1, 5))))
    assert got.shape == (n, size) and torch.allclose(got, want[order], atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- encoders


def test_saved_models_load_the_right_encoder_by_themselves(models, tmp_path, encoder):
    for name in ("tree", "linear", "matryoshka", "pca"):
        model, folder = models[name], tmp_path / name
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder)
        assert not again._encoder and again.encoder_settings["max_length"] == MAX_LENGTH
        texts = ["a b c " * 40, "one"]
        assert np.allclose(again.encode(texts), model.encode(texts), atol=0.02)  # its own encoder, perhaps in bfloat16
        assert again.encoder.fingerprint == encoder.fingerprint and again.encoder is not encoder
        assert np.array_equal(again.attach(encoder).encode(texts), model.encode(texts))
        assert json.loads((folder / "config.json").read_text())["encoder_fingerprint"] == encoder.fingerprint
        with pytest.raises(ArgumentError, match="max_length = 64.*|`encoder`"):
            type(model).from_pretrained(folder).attach(load_encoder("minilm", max_length=64))
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:-1]):
            weights.write_bytes(damaged)
            with pytest.raises(FileFormatError, match=r"model\.safetensors"):
                type(model).from_pretrained(folder)


def test_a_model_of_another_kind_is_refused(models, tmp_path):
    models["linear"].save_pretrained(tmp_path)
    with pytest.raises(FileFormatError, match="linear-adapter"):
        PCATruncation.from_pretrained(tmp_path, dim=384, n_axes=4)


def test_the_wrong_encoder_is_named_together_with_the_right_one(encoder):
    with pytest.raises(ArgumentError, match=f"'minilm' with fingerprint feedfacefeed.*minilm with fingerprint {encoder.fingerprint[:12]}"):
        LinearAdapter(384, encoder={"name": "minilm"}, encoder_fingerprint="feedface" * 8).attach(encoder)
    with pytest.raises(ArgumentError, match="width 384.*width|width 12"):
        LinearAdapter(12).attach(encoder)


def test_queries_and_contexts_get_their_prefixes(models):
    from mteb.types import PromptType

    encoder = load_encoder("minilm", max_length=MAX_LENGTH, precision="float32", query_prefix="ask: ", context_prefix="read: ")
    model, bare = LinearAdapter(384).attach(encoder), models["encoder"]
    ask, read = bare.encode(["ask: one"]), bare.encode(["read: one"])
    assert model.prompts == {"query": "ask: ", "document": "read: "} and not np.allclose(ask, read, atol=1e-3)
    for got in (model.encode_query(["one"]), model.encode(["one"], prompt_name="query"), model.encode(["one"], kind="query"),
                model.encode([{"text": ["one"]}], prompt_type=PromptType.query, hf_split="test"), model.encode(["one"], prompt="ask: "),
                model.encode_document(["one"], prompt_name="query")):
        assert np.allclose(got, ask, atol=1e-5)
    for got in (model.encode(["one"]), model.encode_document(["one"]), model.encode([{"text": ["one"]}], prompt_type=PromptType.document)):
        assert np.allclose(got, read, atol=1e-5)
    assert np.allclose(model.encode(["one"], prompt=""), bare.encode(["one"]), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ token states


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    return Retreever(12, depth=4, split="cross-attention", split_settings={"heads": 2, "key_dim": 8, "embedding_dim": 6, "dropout": 0.0}).eval()


def random_states(n: int, longest: int, seed: int = 0, half: bool = False) -> TokenStates:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(longest) < torch.randint(1, longest + 1, (n, 1), generator=g)
    states = torch.randn(n, longest, 12, generator=g) * mask[..., None]
    return TokenStates(states.half() if half else states, mask)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 9), st.integers(0, 4), st.booleans())
def test_blocks_of_token_states_change_nothing(reader, n, longest, block, level, half):
    x = random_states(n, longest, seed=n * longest, half=half)
    with torch.no_grad():
        want = reader.assign(TokenStates(x.states.float(), x.mask), level)
    torch.testing.assert_close(reader.assign_all(x, level, block), want, atol=1e-5, rtol=0)


def test_loss_of_token_states_of_different_lengths(reader):
    q, c = random_states(5, 3), random_states(5, 9, seed=1)
    loss, logs = retreever_loss(reader, q, c, (1, 4))
    wider = TokenStates(torch.nn.functional.pad(q.states, (0, 0, 0, 6)), torch.nn.functional.pad(q.mask, (0, 6)))
    assert torch.allclose(loss, retreever_loss(reader, wider, c, (1, 4))[0], atol=1e-5) and logs["level"] == 4
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in reader.parameters() if p.grad is not None) and reader.split.key.weight.grad.abs().sum() > 0
    with pytest.raises(HiernbError, match="`contexts`"):
        retreever_loss(reader, q, random_states(4, 3), (1,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same(reader, models):
    x = random_states(300, 20, half=True)
    cpu = reader.assign_all(x)
    try:
        torch.testing.assert_close(reader.to("cuda").assign_all(x), cpu, atol=1e-3, rtol=0)
    finally:
        reader.to("cpu")
    want = models["linear"].encode(["one", "two"], truncate_dim=8)
    try:
        assert np.allclose(models["linear"].encode(["one", "two"], truncate_dim=8, device="cuda"), want, atol=1e-4) and models["linear"].device.type == "cuda"
    finally:
        models["linear"].to("cpu")


def test_bad_token_states_are_refused(reader):
    x = random_states(3, 4)
    x.states[1, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="`states`"):
        reader.assign_all(x)
    for bad in (torch.randn(3, 12), TokenStates(torch.randn(3, 4, 7), torch.ones(3, 4, dtype=torch.bool))):
        with pytest.raises(HiernbError, match="`vectors`"):
            reader.assign_all(bad)
    assert reader.assign_all(TokenStates(torch.zeros(0, 0, 12), torch.zeros(0, 0, dtype=torch.bool))).shape == (0, 16)


# ------------------------------------------------------------------------------------------------------------------ scales


def test_shared_and_per_level_scales_agree_where_they_are_equal(tmp_path):
    torch.manual_seed(0)
    a = Retreever(8, depth=4, scale=7.0, scales="shared")
    b = Retreever(8, depth=4, scale=[7.0] * 4, scales="per-level")
    b.load_state_dict(a.state_dict() | {"scale.log_scale": b.scale.log_scale.detach()})
    x = torch.randn(6, 8)
    for levels in ((4,), (1, 2, 3, 4)):
        assert torch.allclose(retreever_loss(a, x, x, levels)[0], retreever_loss(b, x, x, levels)[0], atol=1e-6)
    assert a.scale.log_scale.shape == () and b.scale.log_scale.shape == (4,)
    b.save_pretrained(tmp_path)
    assert torch.equal(Retreever.from_pretrained(tmp_path).scale.log_scale, b.scale.log_scale)
    with pytest.raises(HiernbError):
        LevelScales(3, [1.0, float("nan"), 2.0])
    with pytest.raises(HiernbError, match="`level`"):
        b.scale_at(5)


def test_a_checkpoint_from_before_still_loads(tmp_path):
    "Its configuration knows nothing of scales, settings and tokens."
    Retreever(8, depth=3).save_pretrained(tmp_path)
    from hiernb.files import read_tensors, write_json, write_tensors

    tensors, config = read_tensors(tmp_path / "model.safetensors", kind="retreever")
    for new in ("scales", "split_settings", "propagation_settings", "tokens"):
        config.pop(new)
    write_tensors(tmp_path / "model.safetensors", tensors, kind="retreever", meta=config)
    write_json(tmp_path / "config.json", config)
    assert Retreever.from_pretrained(tmp_path).depth == 3 and set(tensors) == {"split.weight", "split.bias", "scale.log_scale"}


# -------------------------------------------------------------------------------------------------------------- retrievers


@pytest.mark.parametrize("name", ["tree", "linear", "matryoshka", "pca", "encoder"])
def test_index_and_trec_eval_agree_with_similarities(models, data, name):
    "The other way to the same figure: exact search, then trec_eval on the ids that it found."
    found = DenseRetriever(models[name]).index(list(data.corpus.values()), list(data.corpus)).search(list(data.queries.values()), 10)[1]
    assert evaluate_ranking(found, list(data.queries), data.qrels, ks=(10,)).mean("ndcg@10") == pytest.approx(ndcg(models[name], data), abs=1e-6)


@pytest.mark.parametrize("name, size", [("tree", None), ("tree", 16), ("linear", 20), ("encoder", None)])
def test_dense_retriever_is_brute_force(models, data, name, size):
    model, ids, texts = models[name], list(data.corpus), list(data.corpus.values())
    scores, found = DenseRetriever(model, size).index(texts, ids).search(list(data.queries.values())[:10], 12)
    q = model.encode_query(list(data.queries.values())[:10], truncate_dim=size)
    c = model.encode_document(texts, truncate_dim=size)
    at = np.repeat(np.arange(10), len(ids)), np.tile(np.arange(len(ids)), 10)
    every = pair_scores(q, c, *at, metric=model.similarity_fn_name).reshape(10, -1)
    if model.similarity_fn_name == "ntvd":
        for row, got, values in zip(every, found, scores):
            want = sorted(range(len(ids)), key=lambda i: (-row[i], ids[i]))[:12]
            assert got.tolist() == [ids[i] for i in want] and np.allclose(values, row[want])
    else:
        assert np.allclose(scores, -np.sort(-every, axis=1)[:, :12], atol=1e-6)
