"""The loop: what a step does, that it does not depend on how it is split or interrupted, and what stops it."""

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import sso
import train
from conftest import (TOY, TOY_BASE, assert_same_weights, change_json, log, make_checkpoint, naive_logp,
                      probability)
from plumbing import checkpoint, memory
from plumbing.checkpoint import Progress
from plumbing.examples import read_examples
from plumbing.models import load_chat
from plumbing.recipes import change, stage_settings
from plumbing.records import UserError, read_json, read_jsonl
from plumbing.scoring import score

pytestmark = pytest.mark.usefixtures("here")


def recipe(stage, **settings):
    """The toy's recipe with a training of few steps."""
    return change(TOY, **{stage: {"epochs": 1, "batch_size": 16} | settings})


# ---- One step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("budget", [1, 300, 1200])
def test_the_gradient_is_that_of_the_mean_for_any_micro_batch_size(toy_chat, toy_examples, budget):
    """Compares gradients: AdamW divides by their size, and would blow rounding up where they are nearly zero."""
    ref, _ = score(toy_chat, toy_examples, 1000)
    ref += torch.randn(ref.shape, generator=torch.Generator().manual_seed(0))       # margins that are not zero
    batch = list(range(len(toy_examples)))[:3:-1]

    def loss(group):
        logps, tokens = toy_chat.pair_logps(toy_chat.model, [toy_examples[i] for i in group], toy_chat.pad_id)
        return sso.sso_loss(logps, ref[:, :, group], tokens, "dpo", 0.1, beta=0.1)

    losses, parts = loss(batch)
    whole = torch.autograd.grad(losses.mean(), list(toy_chat.model.parameters()))
    assert len(memory.micro_batches(toy_examples, batch, budget)) > 2
    split = train.accumulate_gradient(toy_chat, toy_examples, batch, loss, {"micro_batch_tokens": budget})
    for parameter, gradient in zip(toy_chat.model.parameters(), whole):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-6 * max(1, gradient.abs().max().item()))
    assert train.summarize(split, ("L+", "L-")) == pytest.approx(train.summarize(parts, ("L+", "L-")), rel=1e-4)


def test_micro_batches_hold_every_example_once_within_the_budget():
    examples = [[sso.Pair([1] * n, [2] * (n % 7 + 1), [3] * (n % 5 + 1))] * 2 for n in (40, 3, 9, 27, 3, 14, 90, 8)]
    groups = memory.micro_batches(examples, [1, 2, 3, 5, 6, 7], budget=200)
    assert sorted(sum(groups, [])) == [1, 2, 3, 5, 6, 7] and len(groups) > 2
    for group in groups:
        width = max(sum(map(len, examples[i][0])) for i in group)
        assert len(group) == 1 or 2 * len(group) * width <= 200
    alike = [[sso.Pair([1] * 5, [2] * 3, [3] * 2)] * 2] * 7         # two rows of 10 tokens each
    assert [len(group) for group in memory.micro_batches(alike, range(7), budget=60)] == [3, 3, 1]


@pytest.fixture(scope="module")
def policy(toy_responses, tmp_path_factory):
    """A policy that was trained as simply as can be: plain log-probs, a whole batch at once."""
    out = tmp_path_factory.mktemp("policy") / "policy"
    train.policy(TOY_BASE, toy_responses, out, recipe("policy", lr=1e-4))
    return out


@pytest.mark.parametrize("settings", [{"logps": "fast"}, {"micro_batch_tokens": 600, "recompute_layers": 1},
                                      {"logps": "fast", "micro_batch_tokens": 300, "recompute_layers": 1}])
def test_log_probs_micro_batches_and_layers_computed_again_train_the_same_policy(policy, toy_responses, settings):
    """From a model with dropout, which nothing may turn on."""
    shutil.copytree(TOY_BASE, "model")
    change_json("model/config.json", attention_dropout=0.5)
    train.policy("model", toy_responses, "out", recipe("policy", lr=1e-4, **settings))
    assert_same_weights(policy, "out", atol=1e-5)


def test_every_batch_is_compared_with_the_reference_of_its_own_examples(toy_responses):
    """With a learning rate of next to nothing the policy stays the reference: all margins are zero."""
    train.generator(TOY_BASE, toy_responses, "g", recipe("generator", lr=1e-12, batch_size=7))
    assert len(log("g")) > 5
    for row in log("g"):
        assert [row["margin"], row["chosen_rewards"], row["base"] - math.log(2)] == pytest.approx([0, 0, 0], abs=1e-5)


@pytest.mark.parametrize("stage, objective, base_loss, gamma", [
    ("generator", "sso", "dpo", 0.3), ("policy", "policy", "dpo", 0.0), ("generator", "mine", "ipo", 0.3)])
def test_a_training_does_one_step_by_hand(toy_responses, monkeypatch, capsys, stage, objective, base_loss, gamma):
    """One step moves the weights as AdamW on the loss of all pairs at once does. An objective of one's own is a row."""
    beta, lr, decay = 0.2, 1e-3, 5.0
    monkeypatch.setitem(sso.PAIRS, "mine", {"A": sso.Pair("good", "original", "bad"),
                                            "B": sso.Pair("original", "bad", "good")})
    train.train(stage, TOY_BASE, toy_responses, "out", recipe(
        stage, objective=objective, base_loss=base_loss, gamma=gamma, beta=beta, lr=lr,
        weight_decay=decay, batch_size=1000, examples=20, warmup=0.0, clip=0.5))
    known = {"dpo": "0.6931 (ln 2 = 0.6931)", "ipo": "6.2500 (1/(4β²) = 6.2500)"}
    assert f"L_base at step zero: {known[base_loss]}" in capsys.readouterr().out

    chat = load_chat(TOY_BASE)
    before = {name: value.clone() for name, value in chat.model.state_dict().items()}
    examples, _ = read_examples(toy_responses, objective, chat, 256, TOY["prompts"], limit=20)
    logps, tokens = sso.pair_logps(chat.model, examples, chat.pad_id)
    losses, _ = sso.sso_loss(logps, logps.detach(), tokens, base_loss, gamma, beta=beta)
    loss = losses.mean()
    loss.backward()
    parameters = list(chat.model.parameters())
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.optim.AdamW([{"params": [p for p in parameters if p.ndim == 2], "weight_decay": decay},
                       {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}], lr=lr).step()
    row, = log("out")
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4) and ("loss B" in row) == (objective == "mine")
    trained = load_chat("out").model.state_dict()
    moved = [trained[name] - value * (1 - lr * decay * (value.ndim == 2)) for name, value in before.items()]
    assert max(change.abs().max().item() for change in moved) == pytest.approx(lr, rel=0.01)
    for name, value in chat.model.state_dict().items():
        close = (value - trained[name]).abs() < 1e-5        # a gradient of about 0 may have either sign
        assert close.float().mean() > 0.99, name


def test_gradients_are_clipped_and_the_schedule_applied_before_an_update(toy_responses, monkeypatch):
    """AdamW's first step would not tell. The log has the norm before the clipping."""
    norms, rates, step = [], [], torch.optim.AdamW.step

    def watched(self, *args, **how):
        groups = self.param_groups
        norms.append(sum((p.grad ** 2).sum() for group in groups for p in group["params"]).sqrt().item())
        rates.append([group["lr"] for group in groups])
        return step(self, *args, **how)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    logged = []
    for clip in (0.25, 1e6):
        train.policy(TOY_BASE, toy_responses, str(clip), recipe("policy", clip=clip, lr=1e-3, warmup=0.6))
        logged += log(str(clip))
    clipped = [min(row["grad_norm"], 0.25) for row in logged[:3]]
    assert norms == pytest.approx(clipped + [row["grad_norm"] for row in logged[3:]], rel=1e-4) and clipped[0] == 0.25
    assert rates == [[row["lr"]] * 2 for row in logged] and rates[:2] == [[5e-4] * 2, [1e-3] * 2]


def test_schedule_and_order():
    assert [train.learning_rate(s, 10, 1.0, 0.2) for s in (0, 1, 2, 6, 9)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 7 / 8))])
    assert train.learning_rate(0, 1, 1.0, 0.04) == 1.0
    steps = train.make_batches(10, 4, 2, seed=0)
    assert [len(step) for step in steps] == [4, 4, 2] * 2
    assert sorted(sum(steps[:3], [])) == sorted(sum(steps[3:], [])) == list(range(10)) and steps[:3] != steps[3:]
    assert steps == train.make_batches(10, 4, 2, seed=0) != train.make_batches(10, 4, 2, seed=1)


# ---- The log -------------------------------------------------------------------------------------

def test_every_step_is_logged(toy_responses, monkeypatch, capsys):
    made, make_batches = [], train.make_batches
    monkeypatch.setattr(train, "make_batches", lambda *args: made.append(args) or make_batches(*args))
    train.generator(TOY_BASE, toy_responses, "g", change(recipe("generator"), run={"seed": 4}))
    printed, rows = capsys.readouterr().out, log("g")
    n = int(printed.split("responses.jsonl: ")[1].split()[0])
    assert made == [(n, 16, 1, 4)]              # examples, batch size, epochs, seed
    assert "L-: prompt '<|im_start|> system" in printed
    assert [row["step"] for row in rows] == list(range(math.ceil(n / 16)))
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss L+"] + row["loss L-"], rel=1e-5)
        assert row["loss"] == pytest.approx(2 * (row["base"] + 0.1 * row["sft"]), rel=1e-5)
        assert row["margin"] == pytest.approx(row["chosen_rewards"] - row["rejected_rewards"], abs=1e-5)
        assert 0 <= row["reward_accuracy L-"] <= 1 and row["seconds"] > 0 > row["chosen_logps"] and "p(original)" not in row
    assert rows[-1]["margin"] > 0               # the first steps widen it


def probability_of_yo(model, data):
    """By hand, from plain logits: the mean over the first responses."""
    chat = load_chat(model)
    values = []
    for record in read_jsonl(data)[:32]:
        values.append(probability(chat, record["prompt"], sso.record_response(record, "original")))
    return sum(values) / len(values)


def test_a_policys_log_has_how_probable_its_own_answers_still_are(toy_responses, monkeypatch, capsys):
    """Its learning rate is far too high, so there is a warning; also after an interruption, when the weights before are
    gone."""
    calls, accumulate = [], train.accumulate_gradient

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return accumulate(*args)

    monkeypatch.setattr(train, "accumulate_gradient", interrupted)
    settings = recipe("policy", batch_size=4, lr=3e-2)
    with pytest.raises(KeyboardInterrupt):
        train.policy(TOY_BASE, toy_responses, "p", settings)
    train.policy(TOY_BASE, toy_responses, "p", settings)
    rows = log("p")
    looked = {row["step"]: row["p(original)"] for row in rows if "p(original)" in row}
    assert list(looked) == [0, 8, len(rows) - 1] and len(rows) > 10         # after the update of that step
    before, = {row["p(original) before"] for row in rows if "p(original)" in row}
    assert before == pytest.approx(probability_of_yo(TOY_BASE, toy_responses), rel=1e-4)
    assert looked[len(rows) - 1] == pytest.approx(probability_of_yo("p", toy_responses), rel=1e-3)
    line = f"p(original) fell from {before:.2f} to {looked[8]:.2f}: the policy unlearns its own answers"
    assert line in capsys.readouterr().out and looked[8] < before / 2


# ---- Any loss, and interruptions -----------------------------------------------------------------

def supervised(chat, examples):
    """A loss of one's own, without pairs: the mean cross-entropy of the winner's tokens."""
    def loss(group):
        losses = []
        for i in group:
            [(prompt, winner, _)] = examples[i]
            losses.append(-naive_logp(chat.model, prompt, winner) / len(winner))
        losses = torch.stack(losses)
        return losses, {"loss": losses.detach()[None]}
    return loss


SETTINGS = recipe("policy", batch_size=4, examples=12, lr=1e-3)


def fit_supervised(data, out):
    chat = load_chat(TOY_BASE)
    examples, _ = read_examples(data, "policy", chat, 256, limit=12)
    train.fit(chat, examples, supervised(chat, examples), out, stage_settings(SETTINGS, "policy"))
    return chat, examples


def train_policy(data, out):
    train.policy(TOY_BASE, data, out, SETTINGS)


def test_the_loop_trains_by_any_loss(toy_chat, toy_responses, capsys):
    chat, examples = fit_supervised(toy_responses, "out")
    with torch.no_grad():
        before, after = (supervised(each, examples)(range(len(examples)))[0].mean() for each in (toy_chat, chat))
    assert after < 0.9 * before
    first = log("out")[0]
    assert first.keys() == {"step", "loss", "grad_norm", "lr", "seconds"}
    assert f"loss at step zero: {first['loss']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("trains, stop", [(fit_supervised, signal.SIGINT), (train_policy, signal.SIGTERM),
                                          (train_policy, None)])
def test_an_interrupted_training_continues_to_the_same_weights(toy_responses, monkeypatch, trains, stop):
    """The signal comes between the second update and its line of the log, and is held back: it is neither lost nor done
    twice. Without a signal, a kill behind that line: the log is ahead of the last checkpoint."""
    write = Progress.log

    def log_and_stop(progress, row):
        if stop and progress.step == 1:
            os.kill(os.getpid(), stop)
        write(progress, row)
        if not stop and progress.step == 2:
            raise SystemExit

    handlers = [signal.getsignal(each) for each in checkpoint.STOPS]
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(Progress, "log", log_and_stop)
        patch.setattr(checkpoint, "SAVE_SECONDS", -1)           # a checkpoint before every step
        trains(toy_responses, "a")
    assert [signal.getsignal(each) for each in checkpoint.STOPS] == handlers
    assert torch.load("a.partial/checkpoint.pt")["step"] == 1 + bool(stop)
    assert len(log("a.partial")) == 2 and not Path("a").exists()
    for name in "ab":
        trains(toy_responses, name)
    assert_same_weights("a", "b", atol=1e-6)
    assert [row["step"] for row in log("a")] == [0, 1, 2]
    assert not Path("a/checkpoint.pt").exists()


@pytest.mark.parametrize("batch_size, message", [
    (8, r"the loss became nan .* at step [12]; the last good state is \S+checkpoint.pt. Try a lower learning rate"),
    (1000, "the last update made weights NaN or infinite; nothing is saved. Try a lower learning rate")])
def test_what_is_not_finite_stops_a_training_with_its_last_good_state(toy_responses, monkeypatch, batch_size, message):
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", -1)
    with pytest.raises(UserError, match=message):
        train.policy(TOY_BASE, toy_responses, "p", recipe("policy", lr=1e39, batch_size=batch_size, warmup=0.0))
    kept = torch.load("p.partial/checkpoint.pt")
    assert all(value.isfinite().all() for value in kept["model"].values())
    assert not Path("p").exists() and all(math.isfinite(row["loss"]) for row in log("p.partial"))


def test_a_checkpoint_with_a_temperature_but_no_do_sample_is_saved():
    make_checkpoint("model", "qwen3")
    change_json("model/generation_config.json", do_sample=False, temperature=0.6)
    chat = load_chat("model")
    Progress("out", chat.model, None).finish(chat)
    saved = read_json("out/generation_config.json")
    assert saved["temperature"] == 0.6 and saved["do_sample"]       # a combination that transformers would save
