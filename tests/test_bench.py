"""The benchmark: that what it compares is the same work, and that it counts right. Nothing here is timed."""

import statistics
from importlib.util import find_spec

import pytest
import torch

import bench
import generate
import sso
import train
from conftest import command

S = {"micro_batch_tokens": 4096, "beta": 0.1, "gamma": 0.0, "objective": "sso", "base": "dpo"}


@pytest.fixture(scope="module")
def chat(qwen3):
    return generate.load_chat(qwen3)


def test_lengths_are_the_realistic_ones_for_few_queries_too(chat):
    for n in (2, 8, 400):
        queries = bench.workload(n, chat._replace(context=32_768), seed=1)
        x = [len(query["prompt"]["original"]) for query in queries]
        principle = [len(query["prompt"][role]) - len(query["prompt"]["original"]) for query in queries for role in ("good", "bad")]
        y = [len(query["response"][role]) for query in queries for role in ("good", "bad", "original")]
        assert 50 <= min(x) and max(x) <= 401 and statistics.fmean(x) == pytest.approx(225, abs=2)
        assert 100 <= min(principle) and max(principle) <= 201 and statistics.fmean(principle) == pytest.approx(150, abs=2)
        assert max(y) <= 2048 and statistics.fmean(y) == pytest.approx(250, rel=0.12 if n == 2 else 0.05)
    assert statistics.stdev(y) == pytest.approx(200, rel=0.1)
    again = bench.workload(400, chat._replace(context=32_768), seed=1)
    assert again == queries and queries[0]["prompt"]["good"][-len(queries[0]["prompt"]["original"]):] == queries[0]["prompt"]["original"]


def test_every_stand_in_gives_the_same_log_probs_and_gradient(chat):
    examples = bench.encoded(bench.workload(3, chat, 0), "sso")
    parameters, results = list(chat.model.parameters()), []
    ways = [{}, *bench.WITHOUT.values()] + ([{"TokenLogps": bench.library}] if hasattr(torch.nn.functional, "linear_cross_entropy") else [])
    for parts in ways:
        with bench.stand_ins(parts):
            logps, tokens = sso.pair_logps(chat.model, examples, chat.pad_id)
        gradient = torch.autograd.grad((logps * torch.arange(1., 13).view_as(logps)).sum(), parameters)
        results.append((logps, tokens.float(), *gradient))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert (a - b).norm() <= 1e-4 * a.norm()
    assert sso.pair_logps is bench.pair_logps


def test_the_authors_scheme_has_the_same_gradient(chat):
    queries, gradients = bench.workload(3, chat, 0), []
    ref = generate.score(chat, bench.encoded(queries, "sso"), 4096)[0]
    for work in (lambda: train.accumulate_gradient(chat, bench.encoded(queries, "sso"), ref, S),
                 lambda: bench.authors_scheme(chat, bench.encoded(queries, "joint"), S)):
        chat.model.zero_grad()
        work()
        gradients.append([p.grad.clone() for p in chat.model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_flops_are_those_executed_with_what_torch_leaves_out():
    a, q = torch.randn(8, 16), torch.randn(1, 2, 64, 32, requires_grad=True)
    mask = torch.ones(64, 64, dtype=torch.bool).tril()

    def work():
        torch.zeros(8, 8).addmm_(a, a.T)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward()
    row = bench.measure({"it": (work, 10)}, repeats=1)["it"]
    product = 2 * 2 * 64 * 64 * 32                       # of queries and keys
    assert row["TFLOP"] * 1e12 == pytest.approx(2 * 8 * 8 * 16 + 2 * product + 5 * product)       # backward: five products
    assert row["ratio"] == 1


def test_peak_memory_is_that_of_the_largest_moment():
    def work():
        for size in (30, 90, 10):
            torch.zeros(size * 2**18).add_(1)            # size MiB
    assert 85 < bench.peak_memory(work) / 2**20 < 120


def test_the_commands(toy_base):
    printed = command("bench.py", "--model", toy_base, "--queries", 4, "--answers", 32, "--repeats", 1).stdout
    for name in ("generator step", "policy step", "reference pass", "generator step: prompt read twice",
                 "generator step: the authors' scheme, with its reference", "sampling", "sampling, naive"):
        assert f"| {name} " in printed
    assert "| F.linear_cross_entropy" in command("bench.py", "--model", toy_base, "--memory").stdout or not hasattr(
        torch.nn.functional, "linear_cross_entropy")


@pytest.mark.skipif(not find_spec("trl"), reason="TRL is not a dependency")
def test_trls_losses_are_ours(toy_base):
    printed = command("bench.py", "--model", toy_base, "--queries", 4, "--repeats", 1, "--vs", "trl").stdout
    assert "losses over five steps" in printed and "| TRL, micro-batches of" in printed
