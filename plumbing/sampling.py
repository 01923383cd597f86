"""Prompts in, responses out: `sample` is the one contract; static and continuous batches serve it,
and so do servers."""

import os
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import (ContinuousBatchingConfig, GenerationConfig, LogitsProcessor,
                          LogitsProcessorList, StoppingCriteria)
from transformers.cache_utils import DynamicLayer

import sso
from plumbing import server as servers
from plumbing.chat import device, load_chat
from plumbing.files import UserError


def load_sampler(path, server=None):
    """`load_chat` for sampling: bf16 on CUDA, and none of the checkpoint's own sampling settings
    (Qwen2.5 brings a repetition penalty and top-k), so that responses are the policy's own. Or the
    model of that name at the URL of a server."""
    if server:
        return servers.load_server(server, path)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chat = load_chat(path, dtype)
    ignored = {}
    for key, value in chat.model.generation_config.to_diff_dict().items():
        if not key.endswith(("_token_id", "_version")) and key[0] != "_" and key != "do_sample":
            ignored[key] = value
    if ignored:
        tqdm.write(f"{path}: ignoring the checkpoint's sampling settings {ignored}")
    chat.model.generation_config = GenerationConfig(eos_token_id=chat.stop_ids,
                                                    pad_token_id=chat.pad_id)
    return chat


class EndText(StoppingCriteria):
    """Ends a row once what is new of it holds a text. (The stop_strings of transformers fail on
    some tokenizers.)"""

    def __init__(self, tokenizer, width, end):
        self.tokenizer, self.width, self.end = tokenizer, width, end

    def __call__(self, input_ids, scores, **others):                # (N, T)
        texts = self.tokenizer.batch_decode(input_ids[:, self.width:], skip_special_tokens=True)
        return torch.tensor([self.end in text.lstrip() for text in texts], device=input_ids.device)


class TopP(LogitsProcessor):
    """Temperature and top-p: the same tokens stay as in transformers, which sorts the vocabulary
    (but for rounding at the boundary).
    The `first` likeliest tokens nearly always hold the share top_p; where not, all are sorted."""

    def __init__(self, temperature, top_p, first=512):
        self.temperature, self.top_p, self.first = temperature, top_p, first

    def __call__(self, input_ids, scores):                          # (N, V)
        logps = (scores / self.temperature).log_softmax(-1)         # (N, V)
        entries = scores.shape[1]
        for count in (min(self.first, entries), entries):
            likeliest, tokens = logps.topk(count)                   # (N, count), descending
            upto = likeliest.exp().cumsum(-1)
            if (upto[:, -1] >= self.top_p).all():
                break
        before = upto - likeliest.exp()
        likeliest = likeliest.masked_fill(before >= self.top_p, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, likeliest)


class RoomyLayer(DynamicLayer):
    """The cache of a layer for N rows that begin with the same P tokens. It has room for what is to
    come: a new token is written behind those before, which DynamicLayer copies for each token."""

    def __init__(self, keys, values, n_rows, room):                 # (1, H, P, D) each
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        _, heads, length, size = keys.shape
        self.all_keys = keys.new_empty(n_rows, heads, length + room, size)
        self.all_values = values.new_empty(n_rows, heads, length + room, values.shape[3])
        self.keys = self.all_keys[:, :, :0]
        self.update(keys, values)

    def update(self, key_states, value_states, *args, **others):    # (N or 1, H, T, D)
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values


def for_rows(layer, n_rows, room):
    """A layer of the cache of one row for N rows, with room if it is of the common kind."""
    if type(layer) is DynamicLayer:
        return RoomyLayer(layer.keys, layer.values, n_rows, room)
    layer.batch_repeat_interleave(n_rows)       # a sliding window, or a state of fixed size
    return layer


def decode_static(chat, prompts, seed, limit, options, for_rows=for_rows):
    """New ids of N prompts of token ids, all decoded together until the longest answer ends: N
    lists. What all prompts begin with, P tokens such as worked examples, is read but once."""
    shared = os.path.commonprefix([prompt[:-1] for prompt in prompts])
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), chat.pad_id)      # (N, T): shared, padding, own
    attention_mask = torch.zeros_like(input_ids)                    # (N, T)
    for row, prompt in enumerate(prompts):
        own = prompt[len(shared):]
        input_ids[row, :len(shared)] = torch.tensor(shared, dtype=torch.long)
        input_ids[row, width - len(own):] = torch.tensor(own)
        attention_mask[row, :len(shared)] = 1
        attention_mask[row, width - len(own):] = 1
    if shared:
        cache = chat.model(input_ids=input_ids[:1, :len(shared)].to(device), use_cache=True,
                           logits_to_keep=1).past_key_values
        room = width - len(shared) + limit
        cache.layers = [for_rows(layer, len(prompts), room) for layer in cache.layers]
        options = options | {"past_key_values": cache}
    if options["do_sample"] and options["top_p"] < 1:
        top_p = TopP(options["temperature"], options["top_p"])
        options = options | {"temperature": 1.0, "top_p": 1.0,
                             "logits_processor": LogitsProcessorList([top_p])}
    torch.manual_seed(seed)
    output = chat.model.generate(input_ids=input_ids.to(device),
                                 attention_mask=attention_mask.to(device),
                                 max_new_tokens=limit, **options)
    return output[:, width:].tolist()


def decode_continuously(chat, prompts, seed, limit, options, **sizes):
    """The same by transformers' continuous batching: where an answer ends, another one begins. It
    takes no stopping criteria."""
    options = {key: value for key, value in options.items() if key != "stopping_criteria"}
    config = GenerationConfig(eos_token_id=chat.stop_ids, pad_token_id=chat.pad_id,
                              max_new_tokens=limit, **options)
    batching = ContinuousBatchingConfig(seed=seed, **sizes)
    outputs = chat.model.generate_batch(prompts, generation_config=config, progress_bar=False,
                                        continuous_batching_config=batching)
    errors = [output.error for output in outputs.values() if output.error]
    if errors or len(outputs) < len(prompts):               # it logs what is wrong, and goes on
        raise UserError("transformers' continuous batching gave up (its log says why); "
                        "--batch-size sets how many queries it is given at once")
    return [output.generated_tokens for output in outputs.values()]


# A static batch waits for its longest answer: with real lengths most of its rows are idle. On the
# CPU, where a step costs as much as its rows, the bookkeeping of continuous batches eats what they
# save.
if device.type == "cuda":
    decode = decode_continuously
    batches_at_once = 256       # times the setting batch_size
else:
    decode = decode_static
    batches_at_once = 1


def check_words(chat, records, path):
    """UserError for queries of another world: the toy model's vocabulary is small."""
    if isinstance(chat, servers.Server):
        return
    for number, record in enumerate(records, 1):
        ids = chat.tokenizer(record["prompt"][-1]["content"]).input_ids
        if ids.count(chat.tokenizer.unk_token_id) > len(ids) / 2:
            raise UserError(f"{path}, line {number}: the model's tokenizer does not know most of "
                            "its words; choose a model for these queries")


def batch_size(chat, settings):
    """How many records are sampled, and then written, together."""
    if isinstance(chat, servers.Server):
        return settings["batch_size"] * servers.BATCHES_AT_ONCE
    return settings["batch_size"] * batches_at_once


class Sampled(NamedTuple):
    responses: list     # of sso.Response
    tokens: int         # in all


@torch.no_grad()
def sample(chat, prompts, seed, settings, begun=None, end=None):
    """Sample a response to each of N prompts, lists of chat messages. `begun`: texts that the
    responses go on from; `end`: a text after which a response is of no interest."""
    if not prompts:
        return Sampled([], 0)
    if isinstance(chat, servers.Server):
        return Sampled(*servers.sample(chat, prompts, seed, settings, begun, end))
    begun = begun or [""] * len(prompts)
    encoded = []
    for messages, text in zip(prompts, begun):
        ids = sso.encode_prompt(chat.tokenizer, messages)
        encoded.append(ids + chat.tokenizer(text, add_special_tokens=False).input_ids)
    width = max(map(len, encoded))
    if width >= chat.context:
        longest = prompts[[len(ids) for ids in encoded].index(width)]
        raise UserError(f"a prompt of {width} tokens leaves no room in the model's context of "
                        f"{chat.context}; it ends with {longest[-1]['content'][-60:]!r}")
    options = {"do_sample": False}
    if settings["temperature"] > 0:
        options = {"do_sample": True, "temperature": settings["temperature"],
                   "top_p": settings["top_p"], "top_k": 0}
    if end:
        options["stopping_criteria"] = [EndText(chat.tokenizer, width, end)]
    limit = min(settings["max_new_tokens"], chat.context - width)
    responses, tokens = [], 0
    for ids in decode(chat, encoded, seed, limit, options):
        length = 0
        while length < len(ids) and ids[length] not in chat.stop_ids:
            length += 1
        text = chat.tokenizer.decode(ids[:length], skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)
        finished = length < len(ids)
        if not finished:
            text = text.rstrip("\ufffd")            # cut off inside a character
        responses.append(sso.Response(text, finished))
        tokens += min(length + 1, len(ids))
    return Sampled(responses, tokens)
