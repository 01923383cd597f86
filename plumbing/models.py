"""A chat model and what belongs to it. What cannot work is refused before weights are loaded."""

import contextlib
import inspect
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, GenerationConfig)
from transformers.utils import logging

import sso
from plumbing import fast, memory
from plumbing.plaintext import PlainText
from plumbing.records import UserError

logging.disable_progress_bar()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
bf16_on_cpu = False         # the setting of this name, which plumbing/command.py puts here
FRESH = {AutoModelForSequenceClassification: ("score",)}    # the head of a reward model to be
QUERY = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "zebra"}
OFFLINE = "; offline, fetch it where there is a network: hf download ID --local-dir DIR"


class Chat(NamedTuple):
    model: Any              # in eval mode, also in training: no dropout. None: not loaded
    tokenizer: Any          # plumbing.plaintext.PlainText
    stop_ids: list          # every id that ends a response
    end_id: int             # the one of them that closes an assistant turn
    pad_id: int
    context: int            # the most tokens of prompt and response
    window: int             # how many tokens the layer with the smallest window sees; 0: no window
    pair_logps: Callable = sso.pair_logps       # or fast.pair_logps
    shares_prefix: bool = False     # whether a prefix that all prompts share may be read once


# ---- Before the weights --------------------------------------------------------------------------

@contextlib.contextmanager
def refusing(path):
    """An error about a model becomes a UserError of one line that names the model."""
    try:
        yield
    except Exception as error:                  # of many kinds, as a file is broken
        if memory.ran_out(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if not Path(path).exists():
            lines[0] += OFFLINE
        raise UserError(f"model {path}: {lines[0]}") from None


def load_tokenizer(path):
    """The tokenizer of a chat model, as `PlainText`."""
    with refusing(path):
        folder = Path(path)
        bare = any(folder.glob("*.gguf")) and not Path(folder, "config.json").exists()
        if folder.suffix == ".gguf" or bare:
            raise UserError("a GGUF file; `python -m lab.gguf` makes a checkpoint folder of it")
        if Path(folder, "adapter_config.json").exists():
            raise UserError("an adapter; merge it into its model (peft: merge_and_unload, then "
                            "save_pretrained) and name that folder")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.chat_template is None:
            raise UserError("it has no chat template; use a chat (instruct) model")
        tokenizer = PlainText(tokenizer)
        begun = tokenizer.apply_chat_template([QUERY], tokenize=False, enable_thinking=False,
                                              add_generation_prompt=True)
        if begun.count("<think>") > begun.count("</think>"):
            raise UserError("its chat template leaves <think> open before an answer; use a model "
                            "that can be told not to think")
        # The first control token behind an answer ends a turn.
        turn = tokenizer.apply_chat_template([QUERY, ANSWER], tokenize=False)
        tail = turn.rsplit("zebra", 1)[-1]
        ends = [(tail.index(text), -len(text), text) for text in tokenizer.specials if text in tail]
        if not ends:
            raise UserError("its chat template closes an answer with no special token, so that no "
                            "answer would end; use a chat (instruct) model")
        tokenizer.end_id = tokenizer.specials[min(ends)[2]]
        if not tokenizer.read_as_template():
            print(f"{path}: its chat template does not read an answer as its tokenizer does; "
                  "responses may be scored in other tokens than were sampled")
    return tokenizer


def stop_ids_of(path, config):
    """The ids that end a response, as a checkpoint says. Qwen has two."""
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):               # it has no such file
        ids = config.get_text_config().eos_token_id
    if isinstance(ids, list):
        return ids
    return [ids]


def sight(config):
    """(context, window): the most tokens of a row, and how many tokens the layer with the smallest
    window sees, 0 if all layers see everything. A window does not limit the context."""
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**30
    kinds = " ".join(getattr(text, "layer_types", None) or ["sliding"])
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    windows = [window for window in windows if window and window < context]
    if windows and ("sliding" in kinds or "chunked" in kinds):
        return context, min(windows)
    return context, 0


def inspect_chat(path, probes=(), auto_class=AutoModelForCausalLM, **options):
    """A `Chat` whose weights are not loaded yet. UserError if the model cannot be used here, or if
    its template refuses the prompts `probes`."""
    tokenizer = load_tokenizer(path)
    with refusing(path):
        for messages in probes:
            sso.encode_prompt(tokenizer, messages)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
        if getattr(config, "quantization_config", None):
            raise UserError("its weights are quantised, and cannot be trained; use the original "
                            "ones")
        with torch.device("meta"):                      # shapes alone, no memory
            model = auto_class.from_config(config, trust_remote_code=False)
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise UserError(f"{type(model).__name__} has no cache of keys and values, which "
                            "sampling needs")
        rows = len(model.get_input_embeddings().weight)
        top = max(tokenizer.apply_chat_template([QUERY, ANSWER]))
        if top >= rows:
            raise UserError(f"its chat template writes token {top}, {tokenizer.decode([top])!r}, "
                            f"and its embedding has {rows} rows: resize it "
                            "(resize_token_embeddings), or take the tokenizer that belongs to it")
        needed = 4 * model.num_parameters()
        free = memory.free_bytes()
        if needed > free:
            raise UserError(f"it takes {needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are "
                            "free: choose a smaller model")
    end_id = tokenizer.end_id
    stop_ids = sorted({end_id, tokenizer.eos_token_id, *stop_ids_of(path, config)} - {None})
    # Padding is always masked. But its id must lie within the embedding, and must not be the end of
    # a turn, since a reward model reads its reward there.
    candidates = [tokenizer.pad_token_id, *stop_ids, 0, 1]
    pad_id = next(i for i in candidates if i is not None and i != end_id and i < rows)
    return Chat(None, tokenizer, stop_ids, end_id, pad_id, *sight(config))


# ---- The weights ---------------------------------------------------------------------------------

def load_weights(chat, path, dtype=torch.float32, auto_class=AutoModelForCausalLM, **options):
    """The `Chat` with its model, from a folder or the Hugging Face hub."""
    with refusing(path):
        model, report = auto_class.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, **options)
        # transformers invents missing weights. Only a new reward head may be invented.
        invented = [name for name in (*report["missing_keys"], *report["mismatched_keys"])
                    if str(name).split(".")[0] not in FRESH.get(auto_class, ())]
        if invented:
            raise UserError(f"its files lack {len(invented)} tensors of the model, such as "
                            f"{invented[0]}; they would be random")
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(f"{name} has weights that are NaN or infinite")
    with contextlib.suppress(AttributeError):       # a model with a reward head
        try:
            model.generation_config.validate(strict=True)
        except ValueError:      # a temperature without do_sample, which could not be saved
            model.generation_config.do_sample = True
    if model.num_parameters() < 2**20:
        # Tensors this small gain little from a second thread, and lose a factor of dozens when
        # another program runs on its core.
        torch.set_num_threads(1)
    if device.type == "cuda":
        print(f"{path}: on {torch.cuda.get_device_name()}, matrix products in {precision()}")
    elif torch.backends.mps.is_available():
        print(f"{path}: on the CPU: Apple's GPU (MPS) is not used, since nothing was tried on it")
    return chat._replace(model=model.to(device).eval())


def load_chat(path, logps="plain"):
    """Load a chat model. Its log-probs come from `sso.pair_logps`. If `logps` is "fast" they come
    from plumbing/fast.py, provided that a check shows that these are right."""
    return choose_logps(load_weights(inspect_chat(path), path), logps)


def choose_logps(chat, logps):
    """The `Chat` with its function for log-probs, "plain" or "fast"."""
    if logps == "plain":
        return chat
    if fast.reads_rows(chat.model, chat.window):
        return chat._replace(pair_logps=fast.pair_logps)
    print(f"{type(chat.model).__name__} does not read a pair as one row; log-probs come from the "
          "plain form, slower and larger")
    return chat


# ---- Precision, memory ---------------------------------------------------------------------------

def precision():
    """Of matrix products. It is bf16 on a card with units for it (compute capability 8: A100 or
    later). On an older one, such as a T4, fp32: its fp16 ends at 65,504, and gradients below 6e-8
    vanish in it, so training would need a scaled loss. On a CPU the recipe's run.bf16_on_cpu
    decides."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cpu" and bf16_on_cpu:
        return torch.bfloat16
    return torch.float32


def autocast():
    """Matrix products in the precision above. Weights stay fp32: in bf16 steps of 5e-7 would be
    rounded away."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision() == torch.bfloat16)


def recompute_layers(model):
    """Save memory: layers are computed again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable      # transformers before 5.23
    enable({"use_reentrant": False})
    for module in model.modules():      # it needs training mode, which elsewhere means dropout
        module.training = hasattr(module, "gradient_checkpointing")
