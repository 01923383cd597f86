"""The benchmark: that what it compares is the same work, and that it counts right. Nothing here is
timed."""

import json
import statistics
import sys
from importlib.util import find_spec

import pytest
import torch

import sso
import train
from conftest import PAPER, ROOT, command, make_checkpoint, run_here
from lab import bench, toy
from plumbing import cli, fast, sampling
from plumbing.chat import load_chat, score
from plumbing.files import UserError

WAYS = dict(bench.SWITCHED_OFF)
if hasattr(torch.nn.functional, "linear_cross_entropy"):        # torch >= 2.13
    WAYS["the library"] = bench.by_library
SETTINGS = PAPER["generator"]


@pytest.fixture(scope="module")
def chat(qwen3):
    return load_chat(qwen3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint with a tenth of the context that realistic lengths need."""
    return make_checkpoint(tmp_path_factory.mktemp("small") / "model", "qwen3", context=500)


@pytest.fixture(scope="module")
def queries(chat):
    """Of a tenth of the realistic lengths."""
    return bench.workload(3, chat._replace(context=500))


# ---- The work ------------------------------------------------------------------------------------

def lengths(queries):
    """Numbers of tokens of queries, principles and responses."""
    x, principles, responses = [], [], []
    for prompts, answers in queries:
        x.append(len(prompts["original"]))
        for role in ("good", "bad"):
            principles.append(len(prompts[role]) - x[-1])
        responses += [len(answers[role]) for role in ("good", "bad", "original")]
    return x, principles, responses


@pytest.mark.parametrize("n, tolerance", [(2, 0.12), (8, 0.05), (400, 0.05)])
def test_lengths_are_the_realistic_ones_for_few_queries_too(chat, n, tolerance):
    x, principles, responses = lengths(bench.workload(n, chat._replace(context=32_768), seed=1))
    assert 50 <= min(x) and max(x) <= 401
    assert statistics.fmean(x) == pytest.approx(225, abs=2)
    assert 100 <= min(principles) and max(principles) <= 201
    assert statistics.fmean(principles) == pytest.approx(150, abs=2)
    assert max(responses) <= 2048
    assert statistics.fmean(responses) == pytest.approx(250, rel=tolerance)
    if n == 400:
        assert statistics.stdev(responses) == pytest.approx(200, rel=0.1)


def test_the_same_seed_gives_the_same_work_and_another_seed_other_work(chat):
    assert bench.workload(9, chat, seed=1) == bench.workload(9, chat, seed=1)
    assert bench.workload(9, chat, seed=1) != bench.workload(9, chat, seed=2)


def test_a_steered_prompt_is_a_principle_and_the_query(queries):
    for prompts, _ in queries:
        query = prompts["original"]
        assert prompts["good"][-len(query):] == prompts["bad"][-len(query):] == query
        assert prompts["good"] != prompts["bad"]


def test_a_small_models_work_fits_into_its_context(small):
    chat = load_chat(small)
    for example in bench.encoded(bench.workload(20, chat), "sso"):
        for prompt, winner, loser in example:
            assert len(prompt) + max(len(winner), len(loser)) <= chat.context
            assert max(prompt + winner + loser) < chat.model.config.vocab_size


@pytest.mark.parametrize("objective", sso.PAIRS)
def test_examples_are_the_pairs_of_an_objective(queries, objective):
    for (prompts, responses), example in zip(queries, bench.encoded(queries, objective)):
        for roles, pair in zip(sso.PAIRS[objective].values(), example, strict=True):
            assert pair.prompt == prompts[roles.prompt]
            assert (pair.winner, pair.loser) == (responses[roles.winner], responses[roles.loser])


# ---- The tricks ----------------------------------------------------------------------------------

def logps_and_gradient(pair_logps, chat, examples):
    """Log-probs, numbers of tokens, and the gradient of a sum of the log-probs in which each has a
    weight of its own."""
    logps, tokens = pair_logps(chat.model, examples, chat.pad_id)
    weights = torch.arange(1.0, logps.numel() + 1).view(logps.shape)
    gradient = torch.autograd.grad((logps * weights).sum(), list(chat.model.parameters()))
    return logps, tokens.float(), *gradient


@pytest.mark.parametrize("name", WAYS)
def test_every_stand_in_gives_the_same_log_probs_and_gradient(chat, queries, name):
    examples = bench.encoded(queries, "sso")
    ours = logps_and_gradient(fast.pair_logps, chat, examples)
    for a, b in zip(ours, logps_and_gradient(WAYS[name], chat, examples), strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-4 * a.norm()


def gradient_of(backward, chat, examples, ref_logps, settings):
    chat.model.zero_grad()
    backward(chat, examples, ref_logps, settings)
    return [parameter.grad.clone() for parameter in chat.model.parameters()]


def test_the_authors_scheme_and_one_query_at_a_time_have_the_same_gradient(chat, queries):
    examples = bench.encoded(queries, "sso")
    ref_logps, _ = score(chat, examples, 4096)
    ours = gradient_of(train.accumulate_gradient, chat, examples, ref_logps, SETTINGS)
    joint = bench.encoded(queries, "joint")
    theirs = gradient_of(bench.authors_scheme, chat, joint, None, SETTINGS)
    alone = gradient_of(train.accumulate_gradient, chat, examples, ref_logps,
                        SETTINGS | {"micro_batch_tokens": 1})
    for other in (theirs, alone):
        for a, b in zip(ours, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_stand_in_is_called_in_the_step_and_once_a_query_if_these_come_alone(qwen3, queries):
    calls = []

    def counted(model, examples, pad_id):
        if torch.is_grad_enabled():
            calls.append(len(examples))
        return fast.pair_logps(model, examples, pad_id)

    chat = load_chat(qwen3)._replace(pair_logps=counted)
    works = bench.training_works(chat, queries, SETTINGS)
    calls.clear()
    works["generator step"]()
    assert calls == [3]
    calls.clear()
    works["generator step: one query at a time"]()
    assert calls == [1, 1, 1]
    calls.clear()
    for name in bench.SWITCHED_OFF:
        works[f"generator step: {name}"]()
    assert calls == []


def test_a_step_is_one_of_training(qwen3, queries):
    """The same weights as by hand, with the learning rate of the settings."""
    settings = SETTINGS | {"lr": 1e-3}
    examples = bench.encoded(queries, "sso")
    weights = []
    for by_hand in (False, True):
        chat = load_chat(qwen3)
        optimizer = train.make_optimizer(chat.model, settings["weight_decay"])
        step = bench.make_step(chat, optimizer, examples, settings)
        if by_hand:
            ref_logps, _ = score(chat, examples, 4096)
            train.accumulate_gradient(chat, examples, ref_logps, settings)
            torch.nn.utils.clip_grad_norm_(chat.model.parameters(), settings["clip"])
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            optimizer.step()
        else:
            step()
        weights.append(torch.cat([p.detach().flatten() for p in chat.model.parameters()]))
    torch.testing.assert_close(*weights)


# ---- Measuring -----------------------------------------------------------------------------------

@pytest.mark.parametrize("heads", [1, 2])        # of keys and values, for two of the queries
def test_flops_are_those_executed_with_what_torch_leaves_out(monkeypatch, heads):
    monkeypatch.setattr(bench, "peak_flops", lambda: 1e12)
    a = torch.randn(8, 16)
    q = torch.randn(1, 2, 64, 32, requires_grad=True)
    k = torch.randn(1, heads, 64, 32, requires_grad=True)
    mask = torch.ones(64, 64, dtype=torch.bool).tril()

    def work():
        torch.zeros(8, 8).addmm_(a, a.T)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
        attended.sum().backward()

    row = bench.measure({"it": work}, repeats=1)["it"]
    product = 2 * 2 * 64 * 64 * 32                          # of queries and keys
    forward, backward = 2 * product, 5 * product            # backward: five products
    assert row["TFLOP"] * 1e12 == pytest.approx(2 * 8 * 8 * 16 + forward + backward)
    assert row["ratio"] == 1


def test_a_row_is_the_median_and_works_take_turns(monkeypatch):
    order = []
    seconds = {"a": iter([3.0, 1.0, 2.0]), "b": iter([8.0, 3.0, 9.0])}
    works = {name: lambda name=name: order.append(name) for name in seconds}

    def timed(run):
        run()
        return next(seconds[order[-1]])

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench, "peak_flops", lambda: 4e12)
    rows = bench.measure(works, repeats=3)
    assert order == ["a", "b"] + 3 * ["a", "b"]             # first for FLOPs and memory
    assert [row["ms"] for row in rows.values()] == [2000, 8000]
    assert [row["ratio"] for row in rows.values()] == [1, 4]
    assert [row["share of peak"] for row in rows.values()] == [0, 0]


def test_peak_memory_is_that_of_the_largest_moment():
    def work():
        for size in (30, 90, 10):
            torch.zeros(size * 2**18).add_(1)               # size MiB
    assert 85 < bench.peak_memory(work) * 1024 < 120


# ---- The commands --------------------------------------------------------------------------------

def test_the_tables(small, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench, "peak_flops", lambda: 1e12)
    recipe = cli.change(PAPER, responses={"max_new_tokens": 8})
    bench.bench(recipe, small, answers=20, repeats=1)
    printed = capsys.readouterr().out
    for name in ("generator step", "policy step", "reference pass",
                 "generator step: prompt read twice", "generator step: logits of every position",
                 "generator step: response logits by autograd",
                 "generator step: plain form, sso.pair_logps",
                 "generator step: one query at a time",
                 "generator step: the authors' scheme, with its reference",
                 "sampling", "greedy", "sampling, in one batch", "sampling, a cache that is copied",
                 "sampling, naive", "sampling, top-p of transformers", "sampling, bf16"):
        assert f"| {name} " in printed
    for column in ("ms", "ratio", "TFLOP", "share of peak", "extra GiB"):
        assert f" {column} " in printed


@pytest.mark.parametrize("flags, name, absent", [
    ("--answers 0 --repeats 1", "policy step", "sampling"),
    ("--memory 1", "logits of every position", "sampling"),
    ("--vs transformers --answers 2 --max-new-tokens 4 --repeats 1", "sampling, top-p of transformers", "policy step"),
    ("--vs transformers --worked-examples 1 --answers 1 --max-new-tokens 4 --repeats 1", "sampling, bf16", "policy step")])
def test_the_commands(small, tmp_path, capsys, monkeypatch, flags, name, absent):
    monkeypatch.delitem(sys.modules, "lab.bench")       # runpy warns of a module it runs again
    kept = tmp_path / "bench.json"
    run_here(f"python -m lab.bench --model {small} --queries 1 --results-file {kept} {flags}", monkeypatch)
    printed = capsys.readouterr().out
    assert f"| {name} " in printed
    assert f"| {absent}" not in printed
    found = json.loads(kept.read_text())
    rows, = found["tables"]
    assert f"{rows[name]['extra GiB']:.3f}" in printed and found["versions"]["torch"] == torch.__version__


def test_the_default_is_qwens_shape_and_about_one_in_250_random_tokens_ends(monkeypatch):
    monkeypatch.setattr(bench, "Qwen2ForCausalLM", lambda config: Recorded(config))
    chat = bench.load(None, layers=3)
    config = chat.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (896, 3, 151_936)
    assert len(chat.stop_ids) / config.vocab_size == pytest.approx(1 / 250, rel=0.01)


class Recorded:
    """In place of a model: 136 M parameters take seconds to draw."""

    def __init__(self, config):
        self.config = config

    def to(self, device):
        return self

    def eval(self):
        return self


def test_prompts_are_random_without_a_tokenizer_and_else_real(chat, monkeypatch):
    monkeypatch.chdir(ROOT)
    prompts = bench.prompts_to_sample(chat, 3, sso.PROMPTS)
    assert len(prompts) == 3 and "assistant" in chat.tokenizer.decode(prompts[0])
    tokenizer = toy.make_tokenizer()
    prompts = bench.prompts_to_sample(chat._replace(tokenizer=tokenizer), 2, toy.PROMPTS)
    assert toy.make_queries()[0][0] in tokenizer.decode(prompts[0])
    behind = bench.prompts_to_sample(chat, 1, PAPER["prompts"], worked_examples=True)
    text = chat.tokenizer.decode(behind[0])
    query = chat.tokenizer.decode(bench.prompts_to_sample(chat, 1, PAPER["prompts"])[0])
    assert text.endswith(query.partition("user\n")[2])
    assert all(example["query"] in text for example in PAPER["prompts"]["principles"]["examples"])
    random = bench.prompts_to_sample(chat._replace(tokenizer=None), 5, sso.PROMPTS)
    assert len(random) == 5 and max(max(random)) < chat.model.config.vocab_size


def test_the_librarys_cache_gives_the_same_answers(chat, monkeypatch):
    monkeypatch.chdir(ROOT)
    prompts, options = bench.prompts_to_sample(chat, 3, sso.PROMPTS), {"do_sample": True, "top_p": 0.9, "temperature": 1.0}
    ours = sampling.decode_static(chat, prompts, 0, 8, options)
    assert ours == sampling.decode_static(chat, prompts, 0, 8, options, for_rows=bench.growing)


@pytest.mark.skipif(not find_spec("trl"), reason="TRL is not a dependency")
def test_trls_losses_are_ours(small):
    done = command("-m", "lab.bench", "--model", small, "--repeats", 1, "--vs", "trl")
    assert "losses over five steps" in done.stdout and "| TRL, micro-batches of 4" in done.stdout


@pytest.mark.skipif(not find_spec("trl"), reason="TRL is not a dependency")
def test_other_losses_than_trls_are_refused(small, monkeypatch):
    right = bench.make_step

    def wrong(chat, optimizer, examples, settings, *backward):
        if not backward:                                    # ours
            settings = settings | {"base_loss": "ipo"}
        return right(chat, optimizer, examples, settings, *backward)

    monkeypatch.setattr(bench, "make_step", wrong)
    with pytest.raises(UserError, match="the losses differ"):
        bench.check_losses(lambda: load_chat(small), SETTINGS)


def test_a_peer_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="error: --vs trl: TRL is not installed: pip install trl"):
        run_here("python -m lab.bench --vs trl", monkeypatch)
