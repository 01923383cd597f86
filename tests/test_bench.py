"""The benchmarks: that what they compare is the same work, and that they count right. Nothing here is timed."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import sso
import train
from conftest import PAPER, run_here
from lab import bench, gpu
from plumbing import fast
from plumbing.examples import read_examples
from plumbing.models import load_chat
from plumbing.recipes import change, stage_settings
from plumbing.records import read_json
from plumbing.sampling import load_sampler

SETTINGS = stage_settings(PAPER, "generator")


@pytest.fixture
def chat(qwen3):
    return load_chat(qwen3, "fast")


def short_work(n, chat):
    """`bench.workload`, a tenth as long."""
    return [[sso.Pair(*(ids[:len(ids) // 10] for ids in pair)) for pair in example] for example in WORKLOAD(n, chat)]


WORKLOAD = bench.workload


# ---- Training ------------------------------------------------------------------------------------

def test_the_work_is_pairs_of_the_generator(chat):
    examples = bench.workload(50, chat)
    assert examples == bench.workload(50, chat)
    for plus, minus in examples:
        assert plus.winner == minus.loser               # y+, as in sso.PAIRS
        assert 150 <= len(plus.prompt) <= 600 and 50 <= len(plus.winner) <= 450


def test_a_step_by_checkpoints_does_not_use_torchs_head(chat, monkeypatch):
    torch_head = getattr(F, "linear_cross_entropy", None)
    monkeypatch.setattr(fast, "checkpoint", None)
    with pytest.raises(TypeError):
        bench.by_checkpoints(chat.model, short_work(1, chat), 0)
    assert getattr(F, "linear_cross_entropy", None) is torch_head


@pytest.mark.parametrize("peer", [None, pytest.param("trl", marks=pytest.mark.skipif(
    not find_spec("trl"), reason="TRL is not installed"))])
def test_a_step_is_one_of_training(qwen3, random_responses, tmp_path, peer):
    """The same weights as after the one step of `train.py generator`. Learning rate: that of torch's AdamW."""
    recipe = change(PAPER, generator={"batch_size": 5, "lr": 1e-3})
    train.generator(qwen3, random_responses, tmp_path / "generator", recipe)
    chat = load_chat(qwen3, "fast")
    examples, _ = read_examples(random_responses, "sso", chat, 4096)
    optimizer = train.make_optimizer(chat.model, SETTINGS["weight_decay"])
    make = bench.make_trl_step if peer else bench.make_step
    make(chat, examples, SETTINGS, optimizer)()
    for a, b in zip(chat.model.parameters(), load_chat(tmp_path / "generator").model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


# ---- Sampling ------------------------------------------------------------------------------------

def test_generate_gives_the_same_greedy_answers_and_samples_by_the_settings(qwen3):
    chat = load_sampler(qwen3)
    chat = chat._replace(stop_ids=chat.stop_ids + list(range(3, 60)))       # random answers end soon
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "Why is it so?", "Sing.", "A" * 30, "No")]
    settings = {"temperature": 0.0, "top_p": 0.9, "max_new_tokens": 9, "batch_size": 2}

    def answers(side, **changed):
        return sorted(bench.sampling_works(chat, chats, settings | changed)[side]())

    greedy = answers("sampling")
    assert {answer.finished for answer in greedy} == {True, False}
    assert answers("sampling, generate") == answers("sampling, generate", temperature=1.0, top_p=1e-9) == greedy
    assert answers("sampling, generate", temperature=1.0) != greedy


# ---- Measuring -----------------------------------------------------------------------------------

def test_a_row_has_medians_and_works_take_turns(monkeypatch):
    order = []
    seconds = {"a": [0, 3, 1, 2], "b": [0, 8, 3, 9]}        # the first ones are for memory
    clock = 0

    def work(name):
        nonlocal clock
        order.append(name)
        clock += seconds[name].pop(0)

    monkeypatch.setattr(bench.time, "perf_counter", lambda: 2 * clock)
    monkeypatch.setattr(bench.time, "process_time", lambda: clock)
    rows = bench.measure({name: lambda name=name: work(name) for name in seconds}, repeats=3)
    assert order == 4 * ["a", "b"]
    assert [[row[column] for column in bench.COLUMNS[:3]] for row in rows.values()] == [[4, 2, 1], [16, 8, 4]]


def test_peak_memory_is_that_of_the_largest_moment():
    def work():
        for size in (30, 90, 10):
            torch.zeros(size * 2**18).add_(1)           # size MiB
    assert 85 < bench.peak_memory(work) * 1024 < 120


# ---- The commands --------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, rows", [
    ("--count 1", ["generator step", "reference pass", *[f"gradient, {name}" for name in bench.FORMS]]),
    pytest.param("--memory 1", [f"gradient, {name}" for name in bench.FORMS], marks=pytest.mark.slow),
    ("--vs transformers --answers 2 --set responses.max_new_tokens=4", ["sampling", "sampling, generate"])])
def test_the_commands(qwen3, tmp_path, capsys, monkeypatch, flags, rows):
    monkeypatch.setattr("random.Random.randint", lambda self, least, most: least)
    run_here(f"python -m lab.bench --model {qwen3} --repeats 1 --results-file {tmp_path}/bench.json {flags}")
    table, = read_json(tmp_path / "bench.json")["tables"]
    assert list(table) == rows
    printed = capsys.readouterr().out
    for name, row in table.items():
        assert f"| {name} " in printed and f"{row['extra GiB']:.3f} " in printed


def test_shapes_are_qwens(monkeypatch):
    """The numbers of parameters are those of the published checkpoints."""
    monkeypatch.setattr(bench, "device", torch.device("meta"))
    for shape, size in (("Qwen2.5-0.5B", 494_032_768), ("Qwen2.5-1.5B", 1_543_714_304)):
        assert bench.random_chat(shape).model.num_parameters() == size
    assert bench.random_chat("Qwen2.5-0.5B", layers=2).model.config.num_hidden_layers == 2


def test_the_script_for_a_gpu_runs_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "workload", short_work)
    gpu.gpu(PAPER, tmp_path / "gpu.json")
    found = read_json(tmp_path / "gpu.json")
    rows, = found["tables"]
    assert found["versions"]["torch"] == torch.__version__
    assert rows["decoding, fp32"]["equal"] == 1 and rows["decoding, bf16, 4 rows"]["tokens/s"] > 0
    assert all(float(rows[f"gradient, {name}"]["difference"]) < 1e-4 for name in bench.FORMS)
    # The operations of a step, beside those that torch counts (which has those of a head twice: our chunks).
    step = rows["generator step, tiny"]
    said = step["share of peak"] * step["s"] * found["peak"]
    chat = bench.random_chat("tiny")
    with FlopCounterMode(display=False) as counter:
        bench.gradient(chat, bench.workload(1, chat), fast.pair_logps)
    assert said < counter.get_total_flops() < 1.4 * said
