"""Prompts in, responses out: our own decoding loop, for CPU and CUDA alike, or a server."""

import random
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

import sso
from plumbing import server as servers
from plumbing.models import Chat, device, inspect_chat, load_weights, precision
from plumbing.records import UserError, for_each

SHARED = 32             # tokens of a common prefix from which on it is read once
ROWS_ON_CUDA = 16       # times the setting batch_size: a step's time there is that of its launches


def load_sampler(path, server=None, probes=()):
    """The model at `path` for sampling, in bf16 where `precision` says so. Or the model of that
    name at the URL of a server. `probes`: prompts that its template must take, tried before it is
    loaded. A checkpoint's own sampling settings are not used: responses are to be the policy's
    own."""
    if server:
        return servers.load_server(server, path)
    chat = load_weights(inspect_chat(path, probes), path, precision())
    return chat._replace(shares_prefix=reads_shared_prefix(chat))


# ---- The loop ------------------------------------------------------------------------------------

@torch.no_grad()
def decode(chat, prompts, choose, is_over, shared=0):
    """An answer to each of N prompts, as lists of token ids. choose(logits (rows, V), their
    prompts' numbers) gives the next tokens (rows,); is_over(i, ids) ends an answer. The first
    `shared` tokens of all prompts, S, are the same, and are read once."""
    pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
    own = [torch.tensor(prompt[shared:], device=device) for prompt in prompts]
    input_ids = pad_left(own, padding_value=chat.pad_id)                            # (N, T-S)
    attention_mask = pad_left([torch.ones_like(ids) for ids in own])
    attention_mask = F.pad(attention_mask, (shared, 0), value=1)    # (N, T): shared, padding, own
    cache = DynamicCache(config=chat.model.config.get_text_config())
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    if shared:
        chat.model(torch.tensor([prompts[0][:shared]], device=device), **options)       # (1, S)
        cache.reorder_cache(torch.zeros_like(input_ids[:, 0]))

    answers = [[] for _ in prompts]
    over = [False for _ in prompts]
    rows = list(range(len(prompts)))        # the number of each row's prompt
    while True:
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)                      # (N, T)
        logits = chat.model(input_ids, attention_mask=attention_mask,
                            position_ids=position_ids[:, -input_ids.shape[1]:],
                            **options).logits[:, -1]                                    # (N, V)
        tokens = choose(logits, rows)                                                   # (N,)
        for i, token in zip(rows, tokens.tolist()):
            if not over[i]:
                answers[i].append(token)
                over[i] = is_over(i, answers[i])
        live = [row for row, i in enumerate(rows) if not over[i]]
        if not live:
            return answers
        input_ids = tokens[:, None]                                                     # (N, 1)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)                         # (N, T+1)
        if len(live) < 0.75 * len(rows):    # drop the rows whose answers are over
            rows = [rows[row] for row in live]
            kept = torch.tensor(live, device=device)
            cache.reorder_cache(kept)
            input_ids = input_ids[kept]
            attention_mask = attention_mask[kept]


def draw(logits, randoms, temperature, top_p):
    """Draw a token for each of N rows, (N,), from logits (N, V). Each row has its own source of
    random numbers, so its tokens do not depend on the rows beside it."""
    if temperature == 0:
        return logits.argmax(1)
    probs = (logits.float() / temperature).softmax(1)               # (N, V)
    upto = probs.cumsum(1)                                          # (N, V)
    tokens = probs.argmax(1)                                        # (N,)
    rows = list(range(len(probs)))
    while rows:
        shares = torch.tensor([[randoms[row].random()] for row in rows], device=probs.device)
        drawn = torch.searchsorted(upto[rows], shares * upto[rows, -1:])                # (rows, 1)
        tokens[rows] = drawn[:, 0]
        # Top-p: a token stays if those likelier than it hold less than top_p. Else draw again.
        asked = probs[rows]
        p = asked.gather(1, drawn)                                                      # (rows, 1)
        likelier = (asked * (asked > p)).sum(1)                                         # (rows,)
        rows = [row for row, share in zip(rows, likelier.tolist()) if share >= top_p]
    return tokens


# ---- A shared prefix -----------------------------------------------------------------------------

def shared_prefix(prompts):
    """How many tokens all prompts begin with, leaving at least one of each; 0 if they are few."""
    shared = 0
    for tokens in zip(*prompts):
        if len(set(tokens)) > 1:
            break
        shared += 1
    shared = min(shared, min(map(len, prompts)) - 1)
    if shared < SHARED or len(prompts) == 1:
        return 0
    return shared


def reads_shared_prefix(chat):
    """Whether the model reads prompts behind a shared prefix as it reads them alone. Padding is
    then in the middle of a row, and that breaks a sliding window, or a layer with a state."""
    prefix = [i % 7 for i in range(chat.window + 4)]
    prompts = [prefix + [5], prefix + [1, 3, 2, 0, 4, 6]]
    seen = []

    def choose(logits, rows):
        seen.append(logits.float().log_softmax(1))
        return logits.argmax(1)

    look = partial(decode, chat, choose=choose, is_over=lambda i, ids: True)
    try:
        look(prompts, shared=len(prefix))
    except Exception:           # of any kind: its cache is of another kind
        return False
    for prompt in prompts:
        look([prompt])
    tolerance = {torch.float32: 1e-3}.get(chat.model.dtype, 0.2)        # in nats
    return torch.allclose(seen[0], torch.cat(seen[1:]), rtol=0, atol=tolerance)


# ---- Text to text --------------------------------------------------------------------------------

def sizes(chat, settings):
    """How many records are sampled and written together, and how many such batches run at once."""
    if isinstance(chat, servers.Server):
        return 1, servers.AT_ONCE
    if device.type == "cuda":
        return settings["batch_size"] * ROWS_ON_CUDA, 1
    return settings["batch_size"], 1


def encode(chat, messages, begun=""):
    """The token ids of a prompt with the beginning of its answer. UserError if they leave no room
    in the model's context."""
    ids = sso.encode_prompt(chat.tokenizer, messages) + chat.tokenizer(begun).input_ids
    if len(ids) >= chat.context:
        raise UserError(f"a prompt of {len(ids)} tokens leaves no room in the model's context of "
                        f"{chat.context}; it ends with {messages[-1]['content'][-60:]!r}")
    return ids


def check_context(chat, prompts, path):
    """UserError for the first prompt that is too long, before anything is written."""
    def check(messages):
        # A prompt of few bytes has few tokens.
        if isinstance(chat, Chat) and len(str(messages).encode()) > chat.context // 2:
            encode(chat, messages)

    for_each(f"{path}, record", check, prompts)


def sample(chat, prompts, seeds, settings, begun=None, end=None):
    """Sample a `sso.Response` to each of N prompts, which are lists of chat messages. Each has its
    own seed. `begun`: texts that the responses continue. `end`: what follows this text in a
    response does not matter. Neither is for a server."""
    if not prompts:
        return []
    if isinstance(chat, servers.Server):
        return servers.sample(chat, prompts, seeds, settings)
    begun = begun or [""] * len(prompts)
    encoded = [encode(chat, messages, text) for messages, text in zip(prompts, begun)]
    randoms = [random.Random(seed) for seed in seeds]
    limits = [min(settings["max_new_tokens"], chat.context - len(ids)) for ids in encoded]

    def choose(logits, rows):
        return draw(logits, [randoms[i] for i in rows], settings["temperature"], settings["top_p"])

    def is_over(i, ids):
        if ids[-1] in chat.stop_ids or len(ids) >= limits[i]:
            return True
        return bool(end) and end in chat.tokenizer.decode(ids).lstrip()

    shared = shared_prefix(encoded) if chat.shares_prefix else 0
    responses = []
    for ids in decode(chat, encoded, choose, is_over, shared):
        finished = ids[-1] in chat.stop_ids
        if finished:
            text = chat.tokenizer.decode_response(ids[:-1])
        else:
            text = chat.tokenizer.decode_response(ids).rstrip("\ufffd")     # half a character
        responses.append(sso.Response(text, finished))
    return responses
