"""What is said of memory before the work, what is chosen by it, and that running out changes no result."""

import ctypes
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sso
import train
from conftest import TOY, make_checkpoint, run_here
from lab import reward, toy
from plumbing import chat as chats
from plumbing import checkpoint, cli, fast, files, memory
from plumbing.chat import load_chat
from plumbing.files import UserError

SETTINGS = {"micro_batch_tokens": 0, "recompute_layers": 0}


@pytest.fixture(scope="module")
def data(toy_data):
    return toy_data / "responses.jsonl"


@pytest.fixture(scope="module")
def chat(toy_base):
    return load_chat(toy_base)


@pytest.fixture(scope="module")
def examples(chat, data):
    return files.read_examples(data, "sso", chat, 256, TOY["prompts"])[0]


def recipe(**settings):
    return cli.change(TOY, generator={"epochs": 1, "batch_size": 16, "micro_batch_tokens": 0} | settings)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def planned(chat, examples, capsys, **settings):
    """The budget that is chosen, and the GB in the line that is printed, by name."""
    settings = SETTINGS | settings
    capsys.readouterr()
    memory.plan(chat, examples, settings)
    line, = capsys.readouterr().out.splitlines()
    return settings["micro_batch_tokens"], {name: float(size) for name, size in re.findall(r"(\w+) ([\d.e+-]+)", line)}


# ---- What there is -------------------------------------------------------------------------------

def resident_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


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


def write_machine(root, available, limits):
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 9000 kB\nMemAvailable:    {available} kB\nHugePages_Total:   0\n")
    for path, text in limits.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


STAT = "anon 7\nactive_file 30\ninactive_file 20"


@pytest.mark.parametrize("limits, free", [
    ({}, 8_192_000),
    ({"memory.max": "max", "memory.current": 5, "memory.stat": STAT}, 8_192_000),
    ({"memory.max": 1000, "memory.current": 600, "memory.stat": STAT}, 450),
    ({"memory.max": 10**12, "memory.current": 600, "memory.stat": STAT}, 8_192_000),
    ({"memory/memory.limit_in_bytes": 1000, "memory/memory.usage_in_bytes": 600, "memory/memory.stat": STAT}, 450)])
def test_free_is_what_the_machine_and_its_container_leave(tmp_path, monkeypatch, limits, free):
    write_machine(tmp_path, 8000, limits)
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    assert memory.free_bytes() == free


def test_free_is_asked_of_this_machine_and_elsewhere_is_half_of_it(tmp_path, monkeypatch):
    assert 10**7 < memory.free_bytes() < 10**13
    monkeypatch.setattr(memory, "ROOT", tmp_path)       # no /proc, as on macOS
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PHYS_PAGES": 2**21, "SC_PAGE_SIZE": 4096}.get)
    assert memory.free_bytes() == 2**32
    monkeypatch.delattr(memory.os, "sysconf")           # nor that, as on Windows
    assert memory.free_bytes() == 10**12


def test_free_on_a_card_is_the_drivers_and_what_torch_keeps_unused(monkeypatch):
    for name, value in {"is_available": True, "mem_get_info": (700, 1000), "memory_reserved": 200,
                        "memory_allocated": 150}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert memory.free_bytes() == 750


# ---- What is needed ------------------------------------------------------------------------------

def test_the_plan_says_what_weights_gradients_and_adamw_really_take(chat, toy_base, examples, capsys):
    _, said = planned(chat, examples, capsys)
    own = load_chat(toy_base)
    optimizer = train.make_optimizer(own.model, 0.1)
    logps, _ = own.pair_logps(own.model, examples[:2], own.pad_id)
    logps.sum().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    tensors = {"weights": own.model.parameters(), "gradients": [p.grad for p in own.model.parameters()],
               "AdamW": moments}
    for name, values in tensors.items():
        assert said[name] == pytest.approx(sum(value.nbytes for value in values) / 1e9, rel=5e-3)


def saved_bytes(chat, width):
    """What autograd saves for the backward pass of one pair, but for parameters; each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in chat.model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps, _ = chat.pair_logps(chat.model, [[sso.Pair([5] * (width - 2), [6], [7])]], chat.pad_id)
    assert logps.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("form", [fast.pair_logps, sso.pair_logps])
def test_the_estimate_of_a_token_is_on_the_safe_side_of_what_autograd_saves(checkpoint, form):
    chat = load_chat(checkpoint)._replace(pair_logps=form)
    for width in (100, 400):
        saved = saved_bytes(chat, width) / width
        assert saved < memory.token_bytes(chat, width, recompute=0) < 2.2 * saved
    chat = chat._replace(pair_logps=fast.pair_logps)
    chat.model.config.num_hidden_layers = 30        # of a deep model the layers' inputs are little
    assert 8 * memory.token_bytes(chat, 100, recompute=1) < memory.token_bytes(chat, 100, recompute=0)


def test_the_budget_grows_with_memory_from_the_longest_example_up(chat, examples, monkeypatch, capsys):
    longest = max(map(memory.padded, examples))
    budgets = []
    for free in range(50, 300, 10):
        monkeypatch.setattr(memory, "free_bytes", lambda: free * 10**6)
        try:
            budget, said = planned(chat, examples, capsys)
        except UserError as error:
            assert not budgets and "\n" not in str(error)
            continue
        used = said["weights"] + said["gradients"] + said["AdamW"] + said["activations"]
        assert used < free / 1000 and budget >= longest and (budget % 256 == 0 or budget == longest)
        budgets.append(budget)
    assert budgets == sorted(budgets) and budgets[-1] == memory.MOST and len(set(budgets)) > 3
    assert planned(chat, examples, capsys, micro_batch_tokens=77)[0] == 77      # a number given is kept


def test_weights_that_are_pages_of_their_file_become_the_process_s_own(toy_base, examples):
    own = load_chat(toy_base)
    tensors = [(p, p.data_ptr(), p.detach().clone()) for p in own.model.parameters()]
    memory.plan(own, examples, dict(SETTINGS))
    for p, place, value in tensors:
        assert p.data_ptr() != place and torch.equal(p, value)
    assert own.model.get_output_embeddings().weight is own.model.get_input_embeddings().weight      # still tied


# ---- Too little ----------------------------------------------------------------------------------

@pytest.mark.parametrize("free, message", [
    (10**5, r"error: model \S+: it cannot be loaded \(it takes [\d.e-]+ GB of memory, 0.0001 GB are free: choose a "
            r"smaller model\)"),
    (10**6, r"error: training takes \S+ GB of memory at least, its longest example being \d+ tokens; 85% of \S+ GB "
            r"may be used: choose a smaller model, --recompute-layers 1, or a lower --max-length")])
def test_too_little_memory_is_one_line_before_any_work(toy_base, data, tmp_path, monkeypatch, free, message):
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    line = f"python train.py generator --model {toy_base} --data {data} --recipe {toy.RECIPE} --out {tmp_path / 'g'}"
    with pytest.raises(SystemExit) as stopped:
        run_here(line, monkeypatch)
    assert re.fullmatch(message, str(stopped.value))
    assert not (tmp_path / "g/log.jsonl").exists()
    monkeypatch.undo()
    train.train("generator", toy_base, data, tmp_path / "g", recipe(examples=4))       # nothing is in its way
    assert (tmp_path / "g/config.json").exists()


# ---- Where it runs out ---------------------------------------------------------------------------

ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
          RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                       "tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)")]


@pytest.mark.parametrize("error", ERRORS, ids=["CUDA", "Python", "CPU"])
def test_running_out_in_the_middle_of_a_step_changes_neither_losses_nor_weights(toy_base, data, tmp_path, monkeypatch,
                                                                                capsys, error):
    """In the reference pass; in the first step, when one micro-batch had gone backward; and in a later step."""
    settings = recipe(micro_batch_tokens=600)
    train.train("generator", toy_base, data, tmp_path / "a", settings)
    real, calls, begun = fast.pair_logps, [], []

    def small(model, examples, pad_id):
        calls.append(torch.is_grad_enabled())
        if (not any(calls), sum(calls) == 2, sum(calls) == 8)[min(len(begun), 2)] and len(begun) < 3:
            begun.append(all(parameter.grad is not None for parameter in model.parameters()))
            calls.clear()
            raise error
        return real(model, examples, pad_id)

    monkeypatch.setattr(train, "load_chat", lambda path: load_chat(path)._replace(pair_logps=small))
    capsys.readouterr()
    train.train("generator", toy_base, data, tmp_path / "b", settings)
    printed = "".join(capsys.readouterr())
    tokens = re.findall(r"begun anew with micro-batches of (\d+) tokens; the update is", printed.replace(",", ""))
    assert tokens == ["1200", "300", "150"] and begun == [False, True, True]
    for a, b in zip(log(tmp_path / "a"), log(tmp_path / "b"), strict=True):
        for name in a.keys() - {"tokens_per_second"}:
            if not name.startswith("accuracy"):         # a share of margins above 0: at step zero all of them are 0
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-5)


def test_where_one_example_is_too_much_it_is_one_line_and_the_progress_is_kept(toy_base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", -1)         # a checkpoint at every step
    settings, real = recipe(epochs=2), train.accumulate_gradient

    def fails(*args):
        if len(log(tmp_path / "g")) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradient", fails)
        with pytest.raises(UserError, match=r"^memory ran out with one example of \d+ tokens: choose [^\n]*$"):
            train.train("generator", toy_base, data, tmp_path / "g", settings)
    assert torch.load(tmp_path / "g/checkpoint.pt")["step"] == 2
    train.train("generator", toy_base, data, tmp_path / "g", settings)
    assert [row["step"] for row in log(tmp_path / "g")] == list(range(6))


def test_other_errors_are_not_taken_for_it(chat, examples):
    def fails(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        chats.score(chat, examples, 100, fails)


def test_it_is_told_in_one_line_wherever_it_happens(tmp_path, monkeypatch):
    """Sampling has no retry: the command ends with the flags to lower."""
    def out_of_memory():
        """Run out."""
        raise ERRORS[2]

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit, match="can't allocate memory.*lower --micro-batch-tokens"):
        cli.run("A test.", ("out", out_of_memory, []))


def test_a_reward_model_is_planned_and_begun_anew_as_well(toy_base, data, tmp_path, monkeypatch, capsys):
    settings = cli.change(TOY, reward={"epochs": 1, "micro_batch_tokens": 0})
    real = reward.pair_rewards

    def small(model, examples, pad_id):
        if sum(map(memory.padded, examples)) > 300:
            raise ERRORS[0]
        return real(model, examples, pad_id)

    for name in "ab":
        reward.train_reward([data], toy_base, tmp_path / name, settings)
        printed = "".join(capsys.readouterr())
        assert re.search(r"memory: weights \S+ GB, .*micro-batches of 4,096 tokens", printed)
        monkeypatch.setattr(reward, "pair_rewards", small)
    assert "memory ran out: begun anew" in printed
    for a, b in zip(log(tmp_path / "a"), log(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


# ---- Precision -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, capability, dtype", [("Tesla T4", (7, 5), torch.float32),
                                                     ("NVIDIA A100", (8, 0), torch.bfloat16)])
def test_precision_is_what_the_card_has_units_for_and_is_said(qwen3, monkeypatch, capsys, name, capability, dtype):
    class Properties:
        major, minor = capability

    assert chats.precision() is torch.float32           # of the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(memory, "free_bytes", lambda: 10**9)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr(fast, "reads_rows", lambda model: True)

    class Card:
        type = "cuda"

    monkeypatch.setattr(chats, "device", Card())
    load_chat(qwen3)
    assert f"on {name}, matrix products in {dtype}" in capsys.readouterr().out
    used = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: used.append((*args, how["enabled"])))
    chats.autocast()
    assert used == [("cuda", torch.bfloat16, dtype == torch.bfloat16)]
