"""Sampling and judging by an OpenAI-compatible server: vLLM, SGLang, a hosted model.

A request is for one answer, with a seed of its own; whether that makes the answer the same again is
the server's affair. The optional package openai brings time-outs, and tries again what failed.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import sso
from plumbing.records import UserError

KEY = "OPENAI_API_KEY"      # environment variable; what it holds is never printed or written
AT_ONCE = 64                # requests
RETRIES = 4                 # of a request, within some ten seconds
BATCHES_AT_ONCE = 16        # times the setting batch_size: what a failure may cost
SHORT = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8}

# Fields beside the standard ones. By CONTINUED, vLLM and SGLang go on from a begun answer. A server
# that refuses them (transformers serve, OpenAI) is asked without, and without the begun answer:
# what it repeats of that is taken off.
FIELDS = {"chat_template_kwargs": {"enable_thinking": False}}       # as in sso.encode_prompt
CONTINUED = FIELDS | {"add_generation_prompt": False, "continue_final_message": True}


class Server(NamedTuple):
    client: Any         # openai.OpenAI
    model: str


def load_server(url, model):
    """A server that has answered once: that it does not is better known now than after hours."""
    try:
        import openai       # takes a second, and few need it
        key = os.environ.get(KEY) or "EMPTY"
        server = Server(openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES), model)
    except Exception as error:      # no such package; not a URL
        raise UserError(f"--server {url}: {error}; it takes a URL, and `pip install openai`"
                        ) from None
    sample(server, [[{"role": "user", "content": "Hi"}]], ["0"], SHORT, [""])
    return server


def sample(server, prompts, seeds, settings, begun, end=None):
    """As `sampling.sample`: responses in the order of their prompts, and the tokens of all.
    UserError if any request fails: no failure becomes an empty response."""
    numbers = [zlib.crc32(seed.encode()) >> 1 for seed in seeds]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(partial(ask, server, settings, end), prompts, begun, numbers))
    return [response for response, _ in answers], sum(tokens for _, tokens in answers)


def ask(server, settings, end, messages, begun, seed):
    """One response, and its number of tokens."""
    options = {"model": server.model, "seed": seed, "temperature": settings["temperature"],
               "top_p": settings["top_p"], "max_tokens": settings["max_new_tokens"]}
    if end and end not in begun:
        options["stop"] = [end]
    elif end:       # what begins anew would stop before the new part, and is longer by the old one
        options["max_tokens"] *= 2
    ways = [(messages, FIELDS), (messages, {})]
    if begun:
        ways[0] = (messages + [{"role": "assistant", "content": begun}], CONTINUED)
    for sent, fields in ways:
        try:
            completion = server.client.chat.completions.create(messages=sent, extra_body=fields,
                                                               **options)
            return read(completion, begun, end)
        except Exception as error:      # of any kind: so are servers
            if not fields or getattr(error, "status_code", None) not in (400, 422):
                raise fault(server, error, messages) from None


def read(completion, begun, end):
    """The response in a completion, and its number of tokens. ValueError if there is none."""
    try:
        choice = completion.choices[0]
        text, finished = choice.message.content, choice.finish_reason == "stop"
        if choice.finish_reason == "length":
            text = text or ""       # None: cut off while it was thinking
        text.encode()               # fails on half a surrogate pair
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(f"no answer: {completion}") from None
    if begun and text.lstrip().startswith(begun[:9]):           # begun anew: the new part of it
        text = text.partition(begun.split(end or "\n")[-1])[2]
    return sso.Response(text, finished), getattr(completion.usage, "completion_tokens", 0) or 0


def fault(server, error, messages):
    """A UserError of one line, without the key, which a server may repeat."""
    status, cause = getattr(error, "status_code", None), error.__cause__     # a cause: no answer
    what = " ".join(repr(cause or error).replace(server.client.api_key, "...").split())[:200]
    if not cause:
        what += f", on {messages[-1]['content'][-60:]!r}"
    if status in (401, 403):
        what = f"it wants a key that it knows, in the environment variable {KEY}"
    if status == 404:
        what = f"it knows no model {server.model!r}; {known_models(server)}"
    return UserError(f"--server {server.client.base_url}: {what}; the same command continues")


def known_models(server):
    try:
        return "it has " + ", ".join(model.id for model in server.client.models.list())
    except Exception:       # of any kind: a server need not know of this
        return "or the URL lacks its end, which is /v1 as a rule"


def judge_by_text(server, prompts, comparisons):
    """As `eval.judge_marks`, but by text: what is neither of the two names is half a win."""
    asked = []
    for query, a, b in comparisons:
        asked.append(sso.judge_messages(query, a.text, b.text, prompts))
        asked.append(sso.judge_messages(query, b.text, a.text, prompts))
    seeds = [str(i) for i in range(len(asked))]
    responses, _ = sample(server, asked, seeds, SHORT, [""] * len(asked))
    wins = [{"m": 1, "M": 0}.get(response.text.strip(" \n\"'`"), 0.5) for response in responses]
    if 0.5 in wins:
        print(f"--judge: {wins.count(0.5)} of {len(wins)} answers name neither m nor M")
    shares = [(1 + first - second) / 2 for first, second in zip(wins[::2], wins[1::2])]
    return [(share, 1 - share) for share in shares]
