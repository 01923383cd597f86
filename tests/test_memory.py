"""What is said of memory before the work, what is chosen by it, and that running out changes no result."""

import ctypes
import gc
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch

import train
from conftest import TOY, TOY_BASE, assert_same_weights, log
from plumbing import checkpoint as checkpoints
from plumbing import command, fast, memory, models
from plumbing.models import load_chat
from plumbing.recipes import change
from plumbing.records import UserError, write_text
from sso import Pair, pair_logps

pytestmark = pytest.mark.usefixtures("here")

RECIPE = change(TOY, generator={"epochs": 2, "batch_size": 16, "examples": 32, "lr": 1e-4, "micro_batch_tokens": 600})


# ---- What there is -------------------------------------------------------------------------------

def resident_bytes():
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
                    reason="another C library than glibc")
def test_what_was_freed_is_free():
    """Blocks below one that stays are kept by the C library, as activations are after a training."""
    blocks = [bytearray(b"x" * 60_000) for _ in range(4000)]
    last = blocks[-1]
    del blocks[:]
    before = resident_bytes()
    memory.free_bytes()
    assert before - resident_bytes() > 200e6 and last


VERSION_2 = ("0::/job/task", "memory.max", "memory.current")
VERSION_1 = ("9:cpu,cpuacct:/job\n4:memory:/job/task", "memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize("version, limits, free", [         # {control group: (limit, used)}
    (VERSION_2, {"job/task": (1000, 600)}, 450), (VERSION_2, {"job/task": ("max", 300), "job": (1000, 600)}, 450),
    (VERSION_2, {"job/task": (900, 600), "job": (1000, 600)}, 350), (VERSION_2, {"": (1000, 600)}, 450),
    (VERSION_2, {"job/other": (1000, 600), "job": (10**12, 600)}, 8_192_000),
    (VERSION_1, {"memory/job/task": (10**12, 600), "memory/job": (1000, 600)}, 450)])
def test_free_is_what_the_machine_and_the_control_groups_leave(monkeypatch, version, limits, free):
    monkeypatch.setattr(memory, "ROOT", Path.cwd())
    own, *names = version
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\nHugePages_Total:   0",
             "proc/self/cgroup": own}
    for group, sizes in limits.items():
        files[f"sys/fs/cgroup/{group}/memory.stat"] = "anon 7\nactive_file 30\ninactive_file 20"
        for name, size in zip(names, sizes):
            files[f"sys/fs/cgroup/{group}/{name}"] = str(size)
    for name, text in files.items():
        write_text(name, text + "\n")
    assert memory.free_bytes() == free


def test_free_elsewhere_is_half_of_the_machine_and_on_a_card_what_its_driver_and_torch_have(monkeypatch):
    assert 10**7 < memory.free_bytes() < 10**13         # of this machine
    monkeypatch.setattr(memory, "ROOT", Path.cwd())       # no /proc, as on macOS
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PHYS_PAGES": 2**21, "SC_PAGE_SIZE": 4096}.get)
    assert memory.free_bytes() == 2**32
    monkeypatch.delattr(memory.os, "sysconf")           # nor that, as on Windows
    assert memory.free_bytes() == 10**12
    for name, value in {"is_available": True, "mem_get_info": (700, 1000), "memory_reserved": 200,
                        "memory_allocated": 150}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert memory.free_bytes() == 750


# ---- What is needed ------------------------------------------------------------------------------

def saved_bytes(chat, examples):
    """What autograd saves for the backward pass; each storage once."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps, _ = chat.pair_logps(chat.model, examples, chat.pad_id)
    assert logps.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("form", [fast.pair_logps, pair_logps])
def test_the_bytes_of_a_token_are_on_the_safe_side_of_what_autograd_saves(checkpoint, form):
    """Of four examples, each longer than the row that is measured. Layers that are computed again save their inputs. In
    the backward pass one of the two layers is whole."""
    chat = load_chat(checkpoint)._replace(pair_logps=form)
    example = [Pair([5] * 600, [6] * 50, [7] * 40)]
    estimates = [memory.token_bytes(chat, example, recompute) for recompute in (0, 1)]
    whole = saved_bytes(chat, [example] * 4)
    models.recompute_layers(chat.model)
    inputs = saved_bytes(chat, [example] * 4)
    assert inputs < 0.4 * whole
    for estimate, needed in zip(estimates, (whole, inputs + whole / 2)):
        assert needed < 4 * 690 * estimate < 3 * needed


def test_a_plan_keeps_nothing_of_the_model(checkpoint):
    """The next training of the same process needs its memory."""
    chat = load_chat(checkpoint)
    weights = weakref.ref(next(chat.model.parameters()))
    memory.plan(chat, [[Pair([5] * 60, [6] * 50, [7] * 40)]], {"micro_batch_tokens": 0, "recompute_layers": 0})
    del chat
    gc.collect()
    assert weights() is None


def planned(chat, examples, capsys):
    """The budget that is chosen, and the GB in the line that is printed: what is fixed, activations, what is free."""
    settings = {"micro_batch_tokens": 0, "recompute_layers": 0}
    memory.plan(chat, examples, settings)
    return settings["micro_batch_tokens"], *map(float, re.findall(r"(\S+) GB", capsys.readouterr().out)[-3:])


def test_the_plan_holds_what_weights_gradients_and_adamw_really_take(toy_chat, toy_examples, capsys):
    places = [p.data_ptr() for p in toy_chat.model.parameters()]
    _, fixed, *_ = planned(toy_chat, toy_examples, capsys)
    optimizer = train.make_optimizer(toy_chat.model, 0.1)
    pair_logps(toy_chat.model, toy_examples[:2], toy_chat.pad_id)[0].sum().backward()
    optimizer.step()
    real = 0
    for p, place in zip(toy_chat.model.parameters(), places):
        assert p.data_ptr() != place            # no page of the file, which would count only once it is written
        real += sum(tensor.nbytes for tensor in (p, p.grad, *optimizer.state[p].values()) if tensor.ndim)
    assert real < fixed * 1e9 < 1.3 * real


def test_the_budget_grows_with_memory_from_the_longest_example_up(toy_chat, toy_examples, monkeypatch, capsys):
    longest = max(map(memory.padded, toy_examples))
    budgets = []
    monkeypatch.setattr(memory.gc, "collect", lambda: None)         # it takes half a second
    for free in range(2, 200, 6):
        monkeypatch.setattr(memory, "free_bytes", lambda: free * 10**6)
        try:
            budget, fixed, activations, _ = planned(toy_chat, toy_examples, capsys)
        except UserError as error:
            assert not budgets and re.search("^training takes at least .* or a lower [^\n]*max_length$", str(error))
            continue
        assert fixed + activations < free / 1000 and budget >= longest
        budgets.append(budget)
    assert budgets == sorted(budgets) and budgets[-1] == memory.MOST and len(set(budgets)) > 3


def test_too_little_memory_is_one_line_before_any_work(toy_responses, monkeypatch):
    """Also where the recipe says how many tokens a micro-batch has."""
    monkeypatch.setattr(memory, "free_bytes", lambda: 10**6)
    with pytest.raises(UserError, match=r"^training takes at least \S+ GB of memory, [^\n]*: choose a smaller model"):
        train.generator(TOY_BASE, toy_responses, "g", RECIPE)
    assert not Path("g.partial").exists()


# ---- Where it runs out ---------------------------------------------------------------------------

ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
          RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                       "tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)")]


def train_failing(data, out, monkeypatch, fails):
    """A training that runs out of memory at some calls of its log-probs: (with gradient, the number of such calls)."""
    calls = []

    def failing(model, examples, pad_id):
        calls.append(torch.is_grad_enabled())
        if (calls[-1], calls.count(calls[-1])) in fails:
            raise ERRORS[calls.count(True) % 3]
        return pair_logps(model, examples, pad_id)

    with monkeypatch.context() as patch:
        patch.setattr(train, "choose_logps", lambda chat, logps: chat._replace(pair_logps=failing))
        train.generator(TOY_BASE, data, out, RECIPE)


def test_running_out_in_the_middle_of_a_step_changes_neither_losses_nor_weights(toy_responses, monkeypatch, capsys):
    """In the reference pass; in the first step, when one micro-batch had gone backward; and in a later step."""
    train.generator(TOY_BASE, toy_responses, "a", RECIPE)
    train_failing(toy_responses, "b", monkeypatch, [(False, 1), (True, 2), (True, 10)])
    tokens = re.findall(r"micro-batches of ([\d,]+) tokens; the update is the same", capsys.readouterr().out)
    assert tokens == ["1,200", "300", "150"]
    for a, b in zip(log("a"), log("b"), strict=True):
        for name in ("loss", "grad_norm", "margin"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4)
    assert_same_weights("a", "b", atol=1e-5)


def test_where_one_example_is_too_much_it_is_one_line_and_the_progress_is_kept(toy_responses, monkeypatch):
    monkeypatch.setattr(checkpoints, "SAVE_SECONDS", -1)         # a checkpoint at every step
    with pytest.raises(UserError, match=r"^memory ran out with one example of \d+ tokens: choose [^\n]*$"):
        train_failing(toy_responses, "g", monkeypatch, [(True, count) for count in range(10, 99)])
    done = len(log("g.partial"))
    assert torch.load("g.partial/checkpoint.pt")["step"] == done - 1 > 0
    train.generator(TOY_BASE, toy_responses, "g", RECIPE)
    assert [row["step"] for row in log("g")] == list(range(4))


def test_in_sampling_it_is_one_line_and_other_errors_are_not_taken_for_it():
    for error in ERRORS:
        assert "lower --set STAGE.micro_batch_tokens (training) or STAGE.batch_size (sampling)" in command.reason(error)
    assert not memory.ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
