"""What fits into the memory that there is. How many tokens a micro-batch holds is chosen before the
work; where memory runs out all the same, the step is begun anew with half as many: the update is
the same."""

import ctypes
import gc
import os
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig

from plumbing import fast
from plumbing.files import UserError

MOST = 4096     # tokens of a micro-batch: more bring no speed
SHARE = 0.85    # of what is free; the rest is for other programs, and for gaps in the heap
ADVICE = "choose a smaller model, --recompute-layers 1, or a lower --max-length"
ROOT = Path("/")
GROUPS = {      # limit of a control group, what is used of it: versions 2 and 1
    "memory.max": "memory.current",
    "memory/memory.limit_in_bytes": "memory/memory.usage_in_bytes"}


# ---- What there is -------------------------------------------------------------------------------

def numbers(path):
    """{name: number} of a file with a name and a number a line."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


def group_bytes():
    """What the limits of a container leave, if there are any."""
    left = []
    groups = ROOT / "sys/fs/cgroup"
    for limit, used in GROUPS.items():
        if (groups / limit).exists() and (groups / limit).read_text().strip() != "max":
            most, now = (int((groups / name).read_text()) for name in (limit, used))
            files = numbers((groups / limit).with_name("memory.stat"))  # their cache is given back
            left.append(most - now + files["active_file"] + files["inactive_file"])
    return left


def give_back():
    """Let the system have what this process has freed. The C library of Linux keeps it: gigabytes,
    after a training."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):        # another C library
        pass


def free_bytes():
    """Memory that this process may still take, of the card if there is one."""
    give_back()
    if torch.cuda.is_available():
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    if (ROOT / "proc/meminfo").exists():
        return min([1024 * numbers(ROOT / "proc/meminfo")["MemAvailable"], *group_bytes()])
    if hasattr(os, "sysconf"):          # macOS does not say what is free: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 10**12                       # Windows says nothing: as if everything fitted


def check_weights(path, bytes_each, auto_class, **options):
    """UserError if a checkpoint's parameters do not fit, of so many bytes each; before it is
    loaded."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    with torch.device("meta"):
        needed = auto_class.from_config(config).num_parameters() * bytes_each
    free = free_bytes()
    if needed > free:
        raise UserError(f"it takes {needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free: "
                        "choose a smaller model")


# ---- What is needed ------------------------------------------------------------------------------

def token_bytes(chat, width, recompute):
    """What a padded token in a row of `width` keeps until the backward pass, in fp32."""
    config = chat.model.config.get_text_config()
    layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    queries = heads * (getattr(config, "head_dim", None) or hidden // heads)
    # Two norms keep three tensors each; attention q, k, v, before and behind norms of their own,
    # its result and a row of the mask; the MLP four.
    layer = 4 * (6 * hidden + 8 * queries + 4 * inner + width)
    kept = layers * layer
    if recompute:
        kept = layer + layers * 4 * hidden
    if chat.pair_logps is not fast.pair_logps:      # the plain form: two rows, with all logits
        kept = 2 * kept + 16 * config.vocab_size
    return max(kept, 3 * layer)         # the reference pass: no gradient, but four times the tokens


def padded(example):
    """Tokens of an example as a micro-batch of its own: R rows, as wide as the widest."""
    return len(example) * max(sum(map(len, pair)) for pair in example)


def plan(chat, examples, settings):
    """Settle settings["micro_batch_tokens"], where 0 stands for what fits, and print what goes
    where. UserError if not even the longest example fits."""
    parameters = list(chat.model.parameters())
    for parameter in parameters:
        # Weights may be pages of their file, which pass for free until the first update.
        parameter.data = parameter.data.clone()
    weights = sum(parameter.nbytes for parameter in parameters)
    longest = max(map(padded, examples))
    each = token_bytes(chat, longest // len(examples[0]), settings["recompute_layers"])
    # Two chunks of logits, two gradients of embedding and head; on CUDA the weights in bf16.
    head = chat.model.get_input_embeddings().weight
    rest = 2 * min(fast.LOGIT_BYTES, 4 * len(head) * MOST) + 2 * head.nbytes
    rest += torch.cuda.is_available() * weights // 2
    free = free_bytes() + weights
    room = int(SHARE * free) - 4 * weights - rest
    budget = settings["micro_batch_tokens"] or max(longest, min(MOST, room // each // 256 * 256))
    settings["micro_batch_tokens"] = budget
    print(f"memory: weights {weights / 1e9:.3g} GB, gradients {weights / 1e9:.3g}, AdamW "
          f"{weights / 5e8:.3g}, activations {(rest + budget * each) / 1e9:.3g} (micro-batches of "
          f"{budget:,} tokens); {free / 1e9:.3g} GB are free")
    if room < longest * each:
        raise UserError(f"training takes {(4 * weights + rest + longest * each) / 1e9:.3g} GB of "
                        f"memory at least, its longest example being {longest} tokens; "
                        f"{SHARE:.0%} of {free / 1e9:.3g} GB may be used: {ADVICE}")


# ---- Where it runs out ---------------------------------------------------------------------------

def ran_out(error):
    """Whether an error says that memory ran out, on CUDA or on the CPU."""
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "can't allocate memory" in str(error))


def retry(function, chat, examples, *args):
    """function(chat, examples, ..., settings). Where memory runs out it is begun anew, without what
    it had added to gradients, with half of settings["micro_batch_tokens"], for good."""
    settings = args[-1]
    longest = max(map(padded, examples))
    while True:
        try:
            return function(chat, examples, *args)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
        # Only behind that block are the tensors of its frames given back.
        chat.model.zero_grad()
        torch.cuda.empty_cache()
        budget = min(settings["micro_batch_tokens"], longest * len(examples))
        if budget <= longest:
            raise UserError(f"memory ran out with one example of {longest} tokens: {ADVICE}")
        budget = max(longest, budget // 2)
        settings["micro_batch_tokens"] = budget
        tqdm.write(f"memory ran out: begun anew with micro-batches of {budget:,} tokens; the "
                   "update is the same")
