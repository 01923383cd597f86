"""What fits into memory. The number of tokens in a micro-batch is chosen before the work starts. If
memory runs out all the same, the step starts over with half as many. The update is the same."""

import contextlib
import ctypes
import gc
import os
import re
from pathlib import Path

import torch
from tqdm import tqdm

import sso
from plumbing.records import UserError

MOST = 4096     # tokens of a micro-batch: more bring no speed
SHARE = 0.85    # of what is free; the rest is for other programs, and for gaps in the heap
ADVICE = ("choose a smaller model, --set STAGE.recompute_layers=1, or a lower --set "
          "STAGE.max_length")
ROOT = Path("/")
GROUPS = {      # limit of a control group, what is used of it: versions 2 and 1
    "memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}


# ---- What there is -------------------------------------------------------------------------------

def group_bytes():
    """What the limits of control groups leave, from this process's own up to the root: a job's may
    be nested in its container's."""
    left = []
    own = ROOT / "proc/self/cgroup"
    if not own.exists():
        return left
    for line in own.read_text().splitlines():
        _, controllers, place = line.split(":", 2)      # version 2 has no controllers there
        folder = ROOT / "sys/fs/cgroup" / controllers / place.lstrip("/")
        for group in (folder, *folder.parents):
            for limit, used in GROUPS.items():
                with contextlib.suppress(OSError, ValueError):      # no such file; "max"
                    room = int((group / limit).read_text()) - int((group / used).read_text())
                    # The cache of files is given back.
                    files = re.findall(r"^(?:in)?active_file (\d+)",
                                       (group / "memory.stat").read_text(), re.MULTILINE)
                    left.append(room + sum(map(int, files)))
    return left


def free_bytes():
    """Memory that this process may still take, of the card if there is one."""
    # The C library of Linux keeps what the process has freed: gigabytes, after a training.
    with contextlib.suppress(AttributeError, OSError, TypeError):       # another C library
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    meminfo = ROOT / "proc/meminfo"
    if meminfo.exists():
        found = re.search(r"MemAvailable: +(\d+)", meminfo.read_text())
        return min([1024 * int(found[1]), *group_bytes()])
    if hasattr(os, "sysconf"):          # macOS does not say what is free: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 10**12                       # Windows says nothing: as if everything fitted


# ---- What is needed ------------------------------------------------------------------------------

def padded(example):
    """Tokens of an example as a micro-batch of its own: R rows, as wide as the widest."""
    return len(example) * max(sum(map(len, pair)) for pair in example)


def token_bytes(chat, example, recompute):
    """How many bytes a padded token keeps until the backward pass. They are measured over one
    forward pass of an example, cut to 1,024 tokens a row."""
    short = [sso.Pair(pair.prompt[:512], pair.winner[:256], pair.loser[:256]) for pair in example]
    kept = {}       # {place: its memory}

    def keep(tensor):
        # Nothing is returned for the graph to hold. A graph that holds its own outputs is never
        # freed, nor are the weights that it leads to.
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        logps, _ = chat.pair_logps(chat.model, [short], chat.pad_id)
    for parameter in chat.model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    sizes = [storage.nbytes() for storage in kept.values()]
    total = sum(sizes)
    config = chat.model.config.get_text_config()
    if recompute:       # then only the inputs of all layers are kept, and what one layer keeps
        inputs = 4 * padded(short) * config.num_hidden_layers * config.hidden_size
        total = total / config.num_hidden_layers + inputs
    # The backward pass holds gradients of the largest tensors, too.
    return (total + 3 * max(sizes)) / padded(short)


def plan(chat, examples, settings):
    """Settle settings["micro_batch_tokens"], where 0 means what fits, and print what memory is used
    for. UserError if not even the longest example fits."""
    weights = trained = 0           # bytes
    for parameter in chat.model.parameters():
        # Weights may be pages of their file, which pass for free until the first update.
        parameter.data = parameter.data.clone()
        weights += parameter.nbytes
        trained += parameter.nbytes * parameter.requires_grad
    longest = max(examples, key=padded)
    least = padded(longest)
    each = token_bytes(chat, longest, settings["recompute_layers"])
    # Weights, gradients, AdamW's two states; gradients of embedding and head; on CUDA also the
    # weights in bf16.
    embedding = chat.model.get_input_embeddings().weight
    fixed = weights + 3 * trained + 4 * embedding.nbytes * embedding.requires_grad
    fixed += torch.cuda.is_available() * weights // 2
    gc.collect()
    free = free_bytes() + weights
    room = SHARE * free - fixed
    fitting = max(least, int(min(MOST, room / each)) // 256 * 256)
    budget = settings["micro_batch_tokens"] or fitting
    settings["micro_batch_tokens"] = budget
    print(f"memory: {fixed / 1e9:.3g} GB for weights, gradients and AdamW, "
          f"{budget * each / 1e9:.3g} GB for activations of micro-batches of {budget:,} tokens; "
          f"{free / 1e9:.3g} GB are free")
    if room < least * each:
        raise UserError(f"training takes at least {(fixed + least * each) / 1e9:.3g} GB of memory, "
                        f"since its longest example has {least} tokens; {SHARE:.0%} of "
                        f"{free / 1e9:.3g} GB may be used: {ADVICE}")


# ---- Micro-batches -------------------------------------------------------------------------------

def micro_batches(examples, indices, budget):
    """Split `indices` into groups whose rows in plumbing/fast.py hold at most `budget` padded
    tokens (those of the plain form up to twice as many). Examples of like length come together."""
    groups = []
    for i in sorted(indices, key=lambda i: padded(examples[i])):
        # The last one of a group is its widest.
        if not groups or (len(groups[-1]) + 1) * padded(examples[i]) > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def ran_out(error):
    """Whether an error says that memory ran out, on CUDA or on the CPU."""
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "can't allocate memory" in str(error))


def in_micro_batches(function, model, examples, indices, settings):
    """[function(group)] for groups of `indices`. If memory runs out, it starts over with zeroed
    gradients and half of settings["micro_batch_tokens"], which stays so."""
    while True:
        budget = settings["micro_batch_tokens"] or MOST
        try:
            return [function(group) for group in micro_batches(examples, indices, budget)]
        except Exception as error:
            if not ran_out(error):
                raise
        # Only behind that block are the tensors of its frames given back.
        model.zero_grad()
        torch.cuda.empty_cache()
        longest = max(padded(examples[i]) for i in indices)
        if budget <= longest:
            raise UserError(f"memory ran out with one example of {longest} tokens: {ADVICE}")
        settings["micro_batch_tokens"] = max(longest, budget // 2)
        tqdm.write("memory ran out: the step starts over with micro-batches of "
                   f"{settings['micro_batch_tokens']:,} tokens; the update is the same")
