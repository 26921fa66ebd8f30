"""Generators beyond the notebook: odd answers, odd servers, what is sent and what is not."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from hiernb.errors import ArgumentError, EmptyError, RangeError
from hiernb.rag.documents import Document
from hiernb.rag.endpoint import EndpointGenerator
from hiernb.rag.generator import Answer, FunctionGenerator, GeneratorError, LocalGenerator, fit_prompt, quoted_spans, written_answer
from hiernb.rag.passages import Passage, split_passages

PASSAGES = split_passages([Document("Bees visit lavender. Ducks eat slugs (all of them). C++ costs $5.", "garden.txt")], words=6, overlap=0)


@pytest.fixture
def server(monkeypatch):
    "A server that replies with whatever bytes the test sets, and keeps what it was sent."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.seen.append((dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            status, data, cut = self.server.reply
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data) + cut))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    s = HTTPServer(("127.0.0.1", 0), Handler)
    s.seen, s.reply, s.url = [], (200, chat("slugs"), 0), f"http://127.0.0.1:{s.server_port}/v1"
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def chat(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


# ---- written answers -----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_an_answer_or_none(text):
    answer = written_answer(text, PASSAGES, None, "x", [])
    assert answer.status == ("answered" if answer.text else "no answer")
    by_id = {p.id: p for p in PASSAGES}
    for where, start, end in answer.spans:
        assert by_id[where].text[start:end].casefold().split() == answer.text.strip(" .").casefold().split()


QUOTED = {"C++": 1, "$5": 1, "(all of them)": 1, "SLUGS": 1, "slug": 0, ".*": 0, "eat\n slugs": 1, "": 0, ".": 0}


@pytest.mark.parametrize(("text", "n"), QUOTED.items())
def test_quotations_are_literal_and_whole_words(text, n):
    assert len(quoted_spans(text, PASSAGES)) == n


def test_prompt_keeps_the_first_passages():
    many = [Passage(str(i), "word " * 20, "a", 0, 1) for i in range(50)]
    prompt, notes = fit_prompt("Why?", many, len, 1000, "characters")
    assert len(prompt) <= 1000 < len(prompt) + 110 and "[1]" in prompt and "passages left out" in notes[0]
    with pytest.raises(RangeError, match="at least one passage"):
        fit_prompt("Why?", many, len, 180, "characters")
    with pytest.raises(EmptyError):
        fit_prompt("  ", many, len, 1000, "characters")


def test_functions_keep_their_errors_and_their_name():
    def broken(question, passages):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        FunctionGenerator(broken).generate("Why?", PASSAGES)
    borrowed = FunctionGenerator(lambda q, p: Answer("slugs", [], 0.5, "somebody else"), "mine")
    assert borrowed.generate("Why?", PASSAGES).generator == "mine"
    for bad in (None, 3, ["slugs"]):
        with pytest.raises(GeneratorError):
            FunctionGenerator(lambda q, p, bad=bad: bad).generate("Why?", PASSAGES)
    with pytest.raises(ArgumentError):
        FunctionGenerator("no function")


# ---- the endpoint --------------------------------------------------------------------------------------------------


def test_only_the_given_key_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    EndpointGenerator(server.url, "m").generate("What?", PASSAGES)
    EndpointGenerator(server.url, "m", api_key="given").generate("What?", PASSAGES)
    keys = [{k.lower(): v for k, v in headers.items()}.get("authorization") for headers, _ in server.seen]
    assert keys == ["Bearer none", "Bearer given"]


def test_unset_base_url_of_the_environment_is_not_used(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert EndpointGenerator(server.url, "m").generate("What?", PASSAGES).text == "slugs"
    with pytest.raises(ArgumentError, match="base_url"):
        EndpointGenerator("", "m")


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b'"text"', b"{}", b'{"choices": null}', b'{"choices": [{}]}', b'{"choices": [{"message": null}]}',
                                  b'{"choices": [{"message": {"content": null}}]}', b'{"choices": [{"message": {"content": 3}}]}', b"\xff\xfe"])  # fmt: skip
def test_replies_that_are_none(server, data):
    server.reply = (200, data, 0)
    with pytest.raises(GeneratorError, match="endpoint m at http://127"):
        EndpointGenerator(server.url, "m").generate("What?", PASSAGES)


@pytest.mark.parametrize("status", [400, 403, 404, 422, 429, 500, 503])
def test_every_status_is_named_and_tried_once(server, status):
    server.reply = (status, b'{"error": {"message": "no"}}', 0)
    with pytest.raises(GeneratorError, match=f"status {status}"):
        EndpointGenerator(server.url, "m").generate("What?", PASSAGES)
    assert len(server.seen) == 1


def test_cut_off_reply(server):
    server.reply = (200, chat("slugs")[:20], 500)
    with pytest.raises(GeneratorError):
        EndpointGenerator(server.url, "m", timeout=2).generate("What?", PASSAGES)


def test_unreachable_and_silent_endpoints(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        with pytest.raises(GeneratorError, match="no connection"):
            EndpointGenerator(f"http://127.0.0.1:{port}/v1", "m").generate("What?", PASSAGES)
        s.listen()
        start = time.monotonic()
        with pytest.raises(GeneratorError, match="within 0.5 s"):
            EndpointGenerator(f"http://127.0.0.1:{port}/v1", "m", timeout=0.5).generate("What?", PASSAGES)
        assert time.monotonic() - start < 20


# ---- local models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    words = ["<unk>", "<eos>", "Answer", "the", "question", "from", "passages", "slugs", "ducks", "user"]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(words), n_positions=96, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config), tokenizer


def test_local_prompt_and_answer_fit_the_model(tiny):
    generator = LocalGenerator(*tiny, max_new_tokens=8)
    many = [Passage(str(i), "ducks " * 15, "a", 0, 1) for i in range(20)]
    answer = generator.generate("ducks?", many)
    assert "passages left out" in answer.notes[0] and answer.generator == "local GPT2LMHeadModel"
    with pytest.raises(RangeError, match="at most 88 tokens"):
        generator.generate("ducks " * 10_000, [])
    with pytest.raises(ArgumentError, match="tokenizer"):
        LocalGenerator(tiny[0])


def test_chat_template_is_used(tiny):
    model, tokenizer = tiny
    tokenizer.chat_template = "{% for m in messages %}user {{ m['content'] }}{% endfor %}"
    try:
        generator = LocalGenerator(model, tokenizer, max_new_tokens=4)
        assert generator._ids("slugs") == [9, 7]
        assert generator.generate("ducks?", PASSAGES).score is not None
    finally:
        tokenizer.chat_template = None


def test_broken_model_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(GeneratorError, match="does not load"):
        LocalGenerator(tmp_path)
