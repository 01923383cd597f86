"""A chat model with what goes with it: load it, refuse what cannot work, choose device and
precision, read many examples without gradient."""

from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig)
from transformers.utils import logging

import sso
from plumbing import fast, memory
from plumbing.files import UserError
from plumbing.plaintext import PlainText, special_tokens

logging.disable_progress_bar()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SYSTEM = ("a system message carries principles: use a model that has one, or give it a template "
          "that puts it before the user's text")
FRESH = {AutoModelForSequenceClassification: ("score",)}    # the head of a reward model to be


class Chat(NamedTuple):
    model: Any              # in eval mode: no dropout, in training either
    tokenizer: Any
    stop_ids: list          # every id that ends a response
    end_id: int             # the one of them that closes an assistant turn
    pad_id: int
    context: int            # tokens, at most, of prompt and response
    pair_logps: Callable    # fast.pair_logps, or sso.pair_logps where the model cannot


def load_tokenizer(path):
    """The tokenizer of a chat model. UserError if there is none, or it cannot take a principle."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:                  # of many kinds, as the file is broken
        reason = first_line(error)
        if Path(path).is_dir():
            raise UserError(f"model {path}: not a checkpoint folder ({reason})") from None
        raise UserError(
            f"model {path}: no such folder, nor can it be reached on the Hugging Face hub; to work "
            f"offline, fetch it where there is a network (hf download {path} --local-dir DIR) and "
            f"name that folder ({reason})") from None
    if tokenizer.chat_template is None:
        raise UserError(f"model {path}: it has no chat template; use a chat (instruct) model")
    tokenizer = PlainText(tokenizer)
    messages = [{"role": "system", "content": "zebra"}, {"role": "user", "content": "q"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        begun = tokenizer.apply_chat_template(messages[1:], tokenize=False, enable_thinking=False,
                                              add_generation_prompt=True)
    except UserError as error:
        raise UserError(f"model {path}: {error}; {SYSTEM}") from None
    if "zebra" not in text:
        raise UserError(f"model {path}: its chat template has no system message; {SYSTEM}")
    if begun.count("<think>") > begun.count("</think>"):
        raise UserError(f"model {path}: its chat template leaves <think> open before an answer; "
                        "use a model that can be told not to think")
    return tokenizer


def end_of_turn_id(path, tokenizer):
    """The id that closes an assistant turn in the template: the first special one after its
    content."""
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "zebra"}]
    tail = tokenizer.apply_chat_template(turn, tokenize=False).rsplit("zebra", 1)[-1]
    specials = special_tokens(tokenizer)
    for found in tokenizer.specials.findall(tail):
        return specials[found]
    raise UserError(f"model {path}: its chat template closes an answer with no special token, so "
                    "that no answer would end; use a chat (instruct) model")


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stop_ids_of(model, tokenizer):
    """Every id that ends a response: Qwen has two. Mends sampling settings that could not be
    saved."""
    own = getattr(model, "generation_config", None)
    if own is None:                         # a model with a reward head
        own = GenerationConfig.from_model_config(model.config)
    try:
        own.validate(strict=True)
    except ValueError:                      # say, a temperature without do_sample
        own.do_sample = True
    ids = own.eos_token_id
    if not isinstance(ids, list):
        ids = [ids]
    return sorted({tokenizer.eos_token_id, *ids} - {None})


def context_of(config):
    """The most tokens of a row. Where layers see a sliding window it is the window: within it one
    mask serves all layers."""
    context = getattr(config, "max_position_embeddings", 2**30)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    if window and "sliding_attention" in layers:
        context = min(context, window)
    return context


def load_chat(path, dtype=torch.float32, auto_class=AutoModelForCausalLM, **options):
    """Load a chat model from a folder or the Hugging Face hub; UserError if it is of no use
    here."""
    tokenizer = load_tokenizer(path)
    try:
        memory.check_weights(path, dtype.itemsize, auto_class, **options)
        model, report = auto_class.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, **options)
    except Exception as error:                  # of many kinds, as the file is broken
        if memory.ran_out(error):
            raise
        raise UserError(f"model {path}: it cannot be loaded ({first_line(error)})") from None
    check_weights(path, model, report, fresh=FRESH.get(auto_class, ()))
    model = model.to(device).eval()
    if model.num_parameters() < 2**20:
        # Tensors this small gain little from a second thread, and lose a factor of dozens when
        # another program runs on its core.
        torch.set_num_threads(1)
    if device.type == "cuda":
        print(f"{path}: on {torch.cuda.get_device_name()}, matrix products in {precision()}")
    end_id = end_of_turn_id(path, tokenizer)
    stop_ids = sorted({end_id, *stop_ids_of(model, tokenizer)})
    # Padding is always masked; but it must not be an end of turn, off which a reward is read.
    candidates = [i for i in (tokenizer.pad_token_id, *stop_ids, 0, 1) if i not in (None, end_id)]
    pair_logps = fast.pair_logps
    if auto_class is AutoModelForCausalLM and not fast.reads_rows(model):
        print(f"{path}: it does not read a pair as one row; log-probs come from the plain form, "
              "slower and larger")
        pair_logps = sso.pair_logps
    return Chat(model, tokenizer, stop_ids, end_id, candidates[0], context_of(model.config),
                pair_logps)


def check_weights(path, model, report, fresh):
    """UserError if transformers had to invent weights, but for those of `fresh` modules, or if some
    are no numbers."""
    invented = [name for name in report["missing_keys"] if name.split(".")[0] not in fresh]
    invented += [str(name) for name in report["mismatched_keys"]]
    if invented:
        raise UserError(f"model {path}: its files lack {len(invented)} tensors of the model, such "
                        f"as {invented[0]}; they would be random")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"model {path}: {name} has weights that are NaN or infinite")


def spare(model, settings):
    """Save time by compiling; save memory by computing layers a second time in the backward
    pass."""
    if settings["compile"]:
        model.base_model.compile(dynamic=True)      # not anew for every width of a micro-batch
    if settings["recompute_layers"]:
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable      # transformers before 5.23
        enable({"use_reentrant": False})
        for module in model.modules():      # it works in training mode alone, which is dropout, too
            module.training = hasattr(module, "gradient_checkpointing")


def precision():
    """Of matrix products: bf16 on a card with units for it (compute capability 8, A100 or later).
    On an older one, such as a T4, fp32: its fp16 ends at 65,504, and gradients below 6e-8 vanish in
    it, so that training would need its loss scaled."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def autocast():
    """bf16 matrix products where the card can. Weights stay fp32: in bf16, steps of 5e-7 would be
    rounded away."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision() == torch.bfloat16)


def micro_batches(examples, budget):
    """Group examples, each R pairs of token ids, so that a group's rows in plumbing/fast.py hold at
    most `budget` padded tokens (those of the plain form up to twice as many); 0 is the default.
    Returns lists of indices into `examples`; those of like length come together."""
    budget = budget or memory.MOST
    widths = [max(sum(map(len, pair)) for pair in example) for example in examples]
    groups = [[]]
    for i in sorted(range(len(examples)), key=widths.__getitem__):  # a group's last is its widest
        rows = len(examples[i]) * (len(groups[-1]) + 1)
        if groups[-1] and rows * widths[i] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


@torch.no_grad()
def score(chat, examples, budget, function=None, name="scoring"):
    """`chat.pair_logps`, or another function like it, of all examples, without gradient: two
    (2, R, examples)."""
    settings = {"micro_batch_tokens": budget or memory.MOST}
    return memory.retry(score_all, chat, examples, function or chat.pair_logps, name, settings)


def score_all(chat, examples, function, name, settings):
    scores = torch.zeros(2, len(examples[0]), len(examples), device=device)
    tokens = torch.zeros_like(scores, dtype=torch.long)
    for group in tqdm(micro_batches(examples, settings["micro_batch_tokens"]), desc=name,
                      leave=False):
        with autocast():
            values, counts = function(chat.model, [examples[i] for i in group], chat.pad_id)
        scores[:, :, group], tokens[:, :, group] = values, counts
    return scores, tokens
