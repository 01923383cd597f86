"""Sampling and judging by an OpenAI-compatible server: vLLM, SGLang, llama.cpp, a hosted model.

A request is for one answer, with a seed of its own; whether that makes the answer the same again is
the server's affair. Servers differ in what they take: a field that one refuses is left out.
"""

import functools
import os
import re
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import sso
from plumbing.records import UserError

KEY = "OPENAI_API_KEY"      # environment variable; what it holds is never printed or written
AT_ONCE = 64                # requests; fewer where a server is too busy
RETRIES = 50                # of a request, by the package openai, after growing waits: some minutes
UNFINISHED = ("length", "content_filter")
SHORT = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 64}
NO_ANSWER = ("it gave no answer, only its reasoning: raise max_new_tokens, or switch the model's "
             "thinking off")


class Server:
    """A model at a URL, and the fields that it has refused."""

    def __init__(self, client, model):
        self.client = client            # openai.OpenAI
        self.model = model
        self.refused = set()            # names of fields
        self.room = threading.Semaphore(AT_ONCE)            # places for requests under way,
        self.spare = threading.Semaphore(AT_ONCE - 1)       # and those of them that can be given up

    def send(self, messages, fields):
        """The answer to a request. If it had to be sent again, there is one place less from then
        on."""
        with self.room:
            answer = self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, **fields)
        if answer.retries_taken and self.spare.acquire(blocking=False):
            self.room.acquire()
        return answer.parse()


@functools.cache        # so that each is printed once
def say(server, text):
    print(f"--server: {text}")


def load_server(url, model):
    """A server that has answered once. If it does not answer, that is known now, not after
    hours."""
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
    """As `sampling.sample`: responses in the order of their prompts. UserError if a request fails
    for good: no failure becomes an empty response."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(functools.partial(ask, server, settings), prompts, seeds))


def ask(server, settings, messages, seed):
    """One response."""
    fields = {"seed": zlib.crc32(seed.encode()) >> 1, "temperature": settings["temperature"],
              "top_p": settings["top_p"], "max_tokens": settings["max_new_tokens"],
              "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    while True:
        names = fields.keys() - server.refused
        sent = {name: fields[name] for name in names}
        if "max_tokens" not in names:
            sent["max_completion_tokens"] = fields["max_tokens"]    # as OpenAI's own models call it
        try:
            return read(server, server.send(messages, sent))
        except Exception as error:      # of any kind: so are servers
            if not leave_out(server, error, names):
                raise fault(server, error, messages) from None


def leave_out(server, error, names):
    """Whether a refused request is worth another try: without the fields that the server names,
    else without the field that is not standard."""
    if getattr(error, "status_code", None) not in (400, 422):
        return False
    said = f"{error} {error.response.text}"
    named = {name for name in names if re.search(rf"\b{name}\b", said)}
    named = named or names & {"extra_body"}
    for name in named:
        say(server, f"it refuses the field {name!r}, which is left out or renamed")
    server.refused |= named
    return bool(named)


def read(server, completion):
    """The response in a completion. ValueError if there is none."""
    try:
        choice = completion.choices[0]
        text = choice.message.content
        finished = choice.finish_reason not in UNFINISHED
        if not text and getattr(choice.message, "reasoning_content", None):
            raise ValueError(NO_ANSWER)
        if not finished:
            text = text or ""
        text = without_thinking(text)
        text.encode()               # fails on half a surrogate pair
    except (AttributeError, LookupError, TypeError, UnicodeError):
        raise ValueError(f"no answer: {completion}") from None
    if choice.finish_reason is None:
        say(server, "it does not say why an answer ended (finish_reason is null): taken as "
                    "finished")
    return sso.Response(text, finished)


def without_thinking(text):
    """An answer without what the model thought before it."""
    if text.lstrip().startswith("<think>"):
        return text.partition("</think>")[2].lstrip()
    return text


def fault(server, error, messages):
    """A UserError of one line, without the key, which a server may repeat."""
    status = getattr(error, "status_code", None)
    cause = error.__cause__ or error    # of a request without any answer it has one
    what = " ".join(str(cause).replace(server.client.api_key, "...").split())[:200]
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
    """As `eval.judge_marks`, but by text. The better output is the one whose name stands in the
    answer as a word. If both names stand there, or none, each output gets half."""
    asked = []
    for query, a, b in comparisons:
        asked += [sso.judge_messages(query, a.text, b.text, prompts),
                  sso.judge_messages(query, b.text, a.text, prompts)]
    responses = sample(server, asked, map(str, range(len(asked))), SHORT)
    wins = [named(response.text) for response in responses]     # of m: 1, 0, or 0.5
    marks = []
    disagree = 0
    for first, second in zip(wins[::2], wins[1::2]):
        share = (1 + first - second) / 2
        marks.append((share, 1 - share))
        disagree += first == second != 0.5
    print(f"--judge: of {len(marks)} comparisons {disagree} are ties since both orders disagree; "
          f"{wins.count(0.5)} of {len(wins)} answers name neither m nor M, or both")
    return marks


def named(text):
    """1 if a text names m, 0 if it names M, 0.5 if neither or both."""
    names = set(re.findall(r"(?<![\w'’])[mM](?![\w'’])", text))
    return {"m": 1.0, "M": 0.0}.get("".join(names), 0.5)
