"""Sampling and judging by an OpenAI-compatible server: vLLM, SGLang, llama.cpp, a hosted model.

A request is for one answer, with a seed of its own; whether that makes the answer the same again is
the server's affair. Servers differ in what they take: a field that one refuses is left out.
"""

import os
import re
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import sso
from plumbing.records import UserError

KEY = "OPENAI_API_KEY"      # environment variable; what it holds is never printed or written
AT_ONCE = 64                # requests; fewer where a server is too busy
RETRIES = 50                # of a request, by the package openai, after growing waits: some minutes
UNFINISHED = ("length", "content_filter")
SHORT = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 64}
RENAMED = {"max_tokens": "max_completion_tokens"}           # OpenAI's own models
NO_ANSWER = ("it gave no answer, only its reasoning: raise max_new_tokens, or switch the model's "
             "thinking off")


class Server:
    """A model at a URL, and what it has refused."""

    def __init__(self, client, model):
        self.client = client            # openai.OpenAI
        self.model = model
        self.names = {}                 # of refused fields: what is sent instead, or None
        self.said = set()               # warnings, each printed once
        self.places = AT_ONCE           # requests that may be under way
        self.room = threading.Semaphore(AT_ONCE)
        self.lock = threading.Lock()

    def say(self, text):
        if text not in self.said:
            self.said.add(text)
            print(f"--server: {text}")

    def send(self, messages, fields):
        """The answer to a request. After one that had to be sent again there is a place less."""
        with self.room:
            sent = {self.names.get(name, name): value for name, value in fields.items()}
            sent.pop(None, None)
            answer = self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, **sent)
        with self.lock:
            fewer = answer.retries_taken > 0 and self.places > 1
            self.places -= fewer
        if fewer:
            self.room.acquire()
        return answer.parse()


def load_server(url, model):
    """A server that has answered once: that it does not is better known now than after hours."""
    try:
        import openai       # takes a second, and few need it
        key = os.environ.get(KEY) or "EMPTY"
        server = Server(openai.OpenAI(base_url=url, api_key=key, max_retries=2), model)
    except Exception as error:      # no such package; not a URL
        raise UserError(f"--server {url}: {error}; it takes a URL, and `pip install openai`"
                        ) from None
    sample(server, [[{"role": "user", "content": "Hi"}]], ["0"], SHORT)
    server.client = server.client.with_options(max_retries=RETRIES)
    return server


def sample(server, prompts, seeds, settings):
    """As `sampling.sample`: responses in the order of their prompts, and the tokens of all.
    UserError if a request fails for good: no failure becomes an empty response."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(partial(ask, server, settings), prompts, seeds))
    return [response for response, _ in answers], sum(tokens for _, tokens in answers)


def ask(server, settings, messages, seed):
    """One response, and its number of tokens."""
    fields = {"seed": zlib.crc32(seed.encode()) >> 1, "temperature": settings["temperature"],
              "top_p": settings["top_p"], "max_tokens": settings["max_new_tokens"],
              "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    while True:
        known = set(server.names)
        try:
            return read(server, server.send(messages, fields))
        except Exception as error:      # of any kind: so are servers
            status = getattr(error, "status_code", None)
            if status not in (400, 422) or not leave_out(server, error, fields, known):
                raise fault(server, error, messages) from None


def leave_out(server, error, fields, known):
    """Whether a refused request is worth another try: without the field that the server names, or
    under its other name; else without the field that is not standard. `known`: what was left out
    of the request already."""
    said = f"{error} {error.response.text}"
    named = {name for name in fields if re.search(rf"\b{name}\b", said)} or {"extra_body"}
    for name in named - known:
        server.names[name] = RENAMED.get(name)
        server.say(f"it refuses the field {name!r}; in its place: {RENAMED.get(name) or 'nothing'}")
    return bool(named - known)


def read(server, completion):
    """The response in a completion, and its number of tokens. ValueError if there is none."""
    try:
        choice = completion.choices[0]
        reason = choice.finish_reason
        text = choice.message.content or ""
        if not text and getattr(choice.message, "reasoning_content", None):
            raise UserError(NO_ANSWER)
        if choice.message.content is None and reason not in UNFINISHED:
            raise ValueError
        text = without_thinking(text)
        text.encode()               # fails on half a surrogate pair
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(f"no answer: {completion}") from None
    if reason is None:
        server.say("it does not say why an answer ended (finish_reason is null): taken as finished")
    tokens = getattr(completion.usage, "completion_tokens", 0) or 0
    return sso.Response(text, reason not in UNFINISHED), tokens


def without_thinking(text):
    """An answer without what the model thought before it."""
    if text.lstrip().startswith("<think>"):
        return text.partition("</think>")[2].lstrip()
    return text


def fault(server, error, messages):
    """A UserError of one line, without the key, which a server may repeat."""
    status = getattr(error, "status_code", None)
    cause = error.__cause__             # of a request without any answer
    what = " ".join(str(cause or error).replace(server.client.api_key, "...").split())[:200]
    if status in (401, 403):
        what = f"it wants a key that it knows, in the environment variable {KEY}"
    if status == 404:
        what = f"it knows no model {server.model!r}; {known_models(server)}"
    return UserError(f"--server {server.client.base_url}: {what}, on the query "
                     f"{messages[-1]['content'][-60:]!r}")


def known_models(server):
    try:
        return "it has " + ", ".join(model.id for model in server.client.models.list())
    except Exception:       # of any kind: a server need not know of this
        return "or the URL lacks its end, which is /v1 as a rule"


# ---- A judge -------------------------------------------------------------------------------------

def judge_by_text(server, prompts, comparisons):
    """As `eval.judge_marks`, but by text: the name of which exactly one stands in the answer as a
    word. An answer without a name is half a win."""
    asked = []
    for query, a, b in comparisons:
        asked.append(sso.judge_messages(query, a.text, b.text, prompts))
        asked.append(sso.judge_messages(query, b.text, a.text, prompts))
    responses, _ = sample(server, asked, list(map(str, range(len(asked)))), SHORT)
    wins = [named(response.text) for response in responses]     # of m: 1, 0, or 0.5
    shares = [(1 + first - second) / 2 for first, second in zip(wins[::2], wins[1::2])]
    unreadable = wins.count(0.5)
    disagree = sum(first == second != 0.5 for first, second in zip(wins[::2], wins[1::2]))
    print(f"--judge: of {len(shares)} comparisons {disagree} are ties since both orders disagree; "
          f"{unreadable} of {len(wins)} answers name neither m nor M, or both")
    return [(share, 1 - share) for share in shares]


def named(text):
    """1 if a text names m, 0 if it names M, 0.5 if neither or both."""
    names = set(re.findall(r"(?<![\w'’])[mM](?![\w'’])", text))
    if len(names) != 1:
        return 0.5
    return float(names == {"m"})
