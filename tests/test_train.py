"""The loop: what a step does, that it does not depend on how it is split or interrupted, and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sso
import train
from conftest import PAPER, ROOT, TOY, make_checkpoint, write_jsonl
from lab import toy
from plumbing import chat as chats
from plumbing import checkpoint, cli, fast, files
from plumbing.chat import load_chat
from plumbing.files import UserError


@pytest.fixture(scope="module")
def data(toy_data):
    return toy_data / "responses.jsonl"


@pytest.fixture(scope="module")
def base(toy_base):
    """The toy base model, for reading alone."""
    return load_chat(toy_base)


@pytest.fixture(scope="module")
def examples(base, data):
    """The data as the generator's examples."""
    return files.read_examples(data, "sso", base, 256, TOY["prompts"])[0]


def recipe(stage, **settings):
    """The toy's recipe with a training of few steps."""
    return cli.change(TOY, **{stage: {"epochs": 1, "batch_size": 16} | settings})


def weights(folder):
    return load_file(folder / "model.safetensors")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_weights(a, b, atol):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


# ---- One step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("objective, budget", [("sso", 1), ("sso", 300), ("sso", 1200), ("joint", 300)])
def test_the_gradient_is_the_same_for_any_micro_batch_size(base, data, objective, budget):
    """Compares gradients: AdamW divides by their size, and would blow rounding up where they are nearly zero."""
    examples, _ = files.read_examples(data, objective, base, 256, TOY["prompts"])
    ref, _ = chats.score(base, examples, 1000)
    ref += torch.randn(ref.shape, generator=torch.Generator().manual_seed(0))      # margins that are not zero
    gradients, rows = [], []
    for tokens in (10**9, budget):
        base.model.zero_grad()
        settings = {"micro_batch_tokens": tokens, "beta": 0.1, "gamma": 0.1, "objective": objective, "base_loss": "dpo"}
        parts = train.accumulate_gradient(base, examples, ref, settings)
        rows.append(train.summarize(parts, objective))
        gradients.append([p.grad.clone() for p in base.model.parameters()])
    base.model.zero_grad()
    assert len(chats.micro_batches(examples, budget)) > 2
    for whole, split in zip(*gradients):
        torch.testing.assert_close(whole, split, rtol=0, atol=1e-6 * max(1, whole.abs().max().item()))
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_the_whole_training_does_not_depend_on_the_micro_batch_size(toy_base, data, tmp_path):
    for tokens in (600, 10**6):
        train.train("policy", toy_base, data, tmp_path / str(tokens),
                    recipe("policy", micro_batch_tokens=tokens, recompute_layers=int(tokens == 600), lr=1e-4))
    assert_same_weights(tmp_path / "600", tmp_path / "1000000", atol=1e-6)


def test_layers_computed_again_give_the_same_gradient_from_fewer_activations(checkpoint):
    """Fewer bytes are saved for the backward pass, no dropout is turned on, and nothing else changes."""
    chat = load_chat(checkpoint)
    examples = [[sso.Pair([5] * 30, [6, 7] * 20, [8] * 25)]] * 3
    gradients, saved = [], []

    def pack(tensor):
        saved[-1] += tensor.nbytes
        return tensor

    for on in (0, 1):
        chats.spare(chat.model, {"compile": 0, "recompute_layers": on})
        chat.model.zero_grad()
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logps, _ = chat.pair_logps(chat.model, examples, chat.pad_id)
        (logps * torch.arange(1., 7).view_as(logps)).sum().backward()
        gradients.append([p.grad.clone() for p in chat.model.parameters()])
    assert saved[1] < 0.6 * saved[0]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not any(module.training for module in chat.model.modules() if not hasattr(module, "gradient_checkpointing"))


def test_compiled_layers_train_the_same_policy_and_are_not_compiled_for_every_width(toy_base, data, tmp_path,
                                                                                    monkeypatch):
    """With a backend that needs no C++ compiler: what dynamo makes of the model, and how often."""
    compile, made = torch.nn.Module.compile, []
    widths, make_mask = set(), fast.make_mask

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    def watched(segments):
        widths.add(segments.shape)
        return make_mask(segments)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(self, backend=backend, **how))
    monkeypatch.setattr(fast, "make_mask", watched)
    for on in (0, 1):
        train.train("policy", toy_base, data, tmp_path / str(on),
                    recipe("policy", compile=on, lr=1e-4, micro_batch_tokens=150))
    assert_same_weights(tmp_path / "0", tmp_path / "1", atol=1e-6)
    assert len(widths) > 5 and 0 < len(made) <= 8


def test_the_reference_is_every_examples_logp_before_training(base, examples):
    ref, tokens = chats.score(base, examples, 500)
    assert ref.shape == (2, 2, len(examples)) and not ref.requires_grad
    assert tokens[:, :, 3].tolist() == [[len(pair.winner) for pair in examples[3]],
                                        [len(pair.loser) for pair in examples[3]]]
    for i in (0, 7, len(examples) - 1):
        alone, _ = sso.pair_logps(base.model, [examples[i]], base.pad_id)
        torch.testing.assert_close(ref[:, :, i], alone[:, :, 0], rtol=1e-5, atol=1e-4)


def simpo_loss(policy_logps, ref_logps, tokens, beta, margin, **others):
    """SimPO (Meng et al. 2024): mean log-probs, no reference, a margin."""
    rewards = beta * policy_logps / tokens
    return -F.logsigmoid(rewards[0] - rewards[1] - margin), rewards.detach()


@pytest.mark.parametrize("stage, objective, base_loss, gamma", [
    ("generator", "sso", "dpo", 0.3), ("policy", "policy", "dpo", 0.0), ("generator", "sso", "ipo", 0.3),
    ("policy", "policy", "simpo", 0.0)])
def test_a_training_does_one_step_by_hand(toy_base, data, tmp_path, monkeypatch, stage, objective, base_loss, gamma):
    """One step moves the weights as AdamW on the naive loss does. SimPO, a base loss of one's own, is named in a recipe
    with a setting of its own, and makes no reference pass."""
    beta, margin, lr, decay, calls = 0.2, 0.7, 1e-3, 5.0, []
    monkeypatch.setitem(sso.BASE_LOSSES, "simpo", simpo_loss)
    monkeypatch.setattr(sso, "REFERENCE_FREE", {"simpo"})
    score = train.score
    monkeypatch.setattr(train, "score", lambda *args, **how: calls.append(args) or score(*args, **how))
    settings = {"base_loss": base_loss, "batch_size": 1000, "epochs": 1, "lr": lr, "gamma": gamma, "beta": beta,
                "warmup": 0.0, "clip": 0.5, "weight_decay": decay}
    if base_loss == "simpo":
        settings["margin"] = margin
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join([toy.RECIPE.read_text().partition(f"[{stage}]")[0], f"[{stage}]", *lines]))
    out = tmp_path / stage
    train.train(stage, toy_base, data, out, cli.read_recipe(path) | {"prompts": toy.PROMPTS})
    assert len(calls) == (base_loss != "simpo")

    chat = load_chat(toy_base)
    before = {name: value.clone() for name, value in chat.model.state_dict().items()}
    examples, _ = files.read_examples(data, objective, chat, 256, toy.PROMPTS)
    loss = 0
    for example in examples:
        for prompt, winner, loser in example:
            logps = []
            for response in (winner, loser):
                token_logps = chat.model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
                logps.append(sum(token_logps[len(prompt) + i - 1, token] for i, token in enumerate(response)))
            w, l = logps
            w_ratio, l_ratio = w - w.detach(), l - l.detach()       # policy = reference at step zero
            if base_loss == "dpo":
                loss = loss - torch.log(torch.sigmoid(beta * (w_ratio - l_ratio)))
            elif base_loss == "ipo":
                loss = loss + (w_ratio / len(winner) - l_ratio / len(loser) - 1 / (2 * beta)) ** 2
            else:
                loss = loss - torch.log(torch.sigmoid(beta * (w / len(winner) - l / len(loser)) - margin))
            loss = loss - gamma * w / len(winner)
    loss = loss / len(examples)
    loss.backward()
    parameters = list(chat.model.parameters())
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.optim.AdamW([{"params": [p for p in parameters if p.ndim == 2], "weight_decay": decay},
                       {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}], lr=lr).step()
    assert log(out)[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    trained = load_chat(out).model.state_dict()
    moved = max((trained[name] - before[name] * (1 - lr * decay * (before[name].ndim == 2))).abs().max().item()
                for name in before)
    assert moved == pytest.approx(lr, rel=0.01)
    for name, value in chat.model.state_dict().items():
        close = (value - trained[name]).abs() < 1e-5        # a gradient of about 0 may have either sign
        assert close.float().mean() > 0.99, name


def test_gradients_are_clipped_before_the_update(toy_base, data, tmp_path, monkeypatch):
    """AdamW's first step would not tell. The log has the norm before the clipping."""
    norms, step = [], torch.optim.AdamW.step

    def watched(self, *args, **how):
        norms.append(sum((p.grad ** 2).sum() for group in self.param_groups for p in group["params"]).sqrt().item())
        return step(self, *args, **how)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for clip in (0.25, 1e6):
        norms.clear()
        train.train("policy", toy_base, data, tmp_path / str(clip), recipe("policy", clip=clip))
        logged = [row["grad_norm"] for row in log(tmp_path / str(clip))]
        assert len(norms) == len(logged) > 2 and max(logged) > 0.25
        assert norms == pytest.approx([min(norm, clip) for norm in logged], rel=1e-4)


def test_schedule_and_order():
    assert [train.learning_rate(s, 10, 1.0, 0.2) for s in (0, 1, 2, 6, 9)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 7 / 8))])
    assert train.learning_rate(0, 1, 1.0, 0.04) == 1.0
    steps = train.make_batches(10, 4, 2, seed=0)
    assert [len(step) for step in steps] == [4, 4, 2] * 2
    assert sorted(sum(steps[:3], [])) == sorted(sum(steps[3:], [])) == list(range(10)) and steps[:3] != steps[3:]
    assert steps == train.make_batches(10, 4, 2, seed=0) != train.make_batches(10, 4, 2, seed=1)


def test_the_schedule_is_applied(toy_base, data, tmp_path, monkeypatch):
    """AdamW's first step moves weights by the learning rate: here half of --lr, the first of two warm-up steps."""
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", -1)
    monkeypatch.setattr(train, "save_model", lambda chat, out: None)
    train.train("policy", toy_base, data, tmp_path / "p", recipe("policy", batch_size=24, lr=1e-3, warmup=1.0))
    kept, before = torch.load(tmp_path / "p/checkpoint.pt"), load_chat(toy_base).model.state_dict()
    assert kept["step"] == 1 and len(log(tmp_path / "p")) == 2       # two steps, the checkpoint taken between them
    moved = max((kept["model"][name] - before[name]).abs().max().item() for name in before)
    assert moved == pytest.approx(5e-4, rel=0.01)
    assert [row["lr"] for row in log(tmp_path / "p")] == pytest.approx([5e-4, 1e-3])


def test_weight_decay_is_on_matrices_only(base):
    groups = train.make_optimizer(base.model, 0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2} and {p.ndim for p in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(base.model.parameters()))


# ---- The loop ------------------------------------------------------------------------------------

def test_step_zero_is_printed_and_every_step_logged(toy_base, data, tmp_path, monkeypatch, capsys):
    made, make_batches = [], train.make_batches
    monkeypatch.setattr(train, "make_batches", lambda *args: made.append(args) or make_batches(*args))
    used = cli.change(recipe("generator"), run={"seed": 4})
    train.train("generator", toy_base, data, tmp_path / "g", used)
    printed, rows = "".join(capsys.readouterr()), log(tmp_path / "g")
    n = int(printed.split("responses.jsonl: ")[1].split()[0])
    assert made == [(n, 16, 1, 4)]              # examples, batch size, epochs, seed
    assert "L_base at step zero: 0.6931 (ln 2" in printed and "L-: prompt '<|im_start|> system" in printed
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"loss", "loss L+", "loss L-", "base", "sft", "chosen_rewards", "rejected_rewards", "margin", "accuracy",
            "chosen_logps", "rejected_logps", "lr", "grad_norm", "tokens_per_second"} <= rows[0].keys()
    assert rows[0]["base"] == pytest.approx(math.log(2)) and rows[0]["margin"] == pytest.approx(0, abs=1e-6)
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss L+"] + row["loss L-"], rel=1e-5)
        assert row["loss"] == pytest.approx(2 * (row["base"] + 0.1 * row["sft"]), rel=1e-5)
        assert row["margin"] == pytest.approx(row["chosen_rewards"] - row["rejected_rewards"], abs=1e-5)
        assert 0 <= row["accuracy L-"] <= 1
    # What it used lies beside it, the prompts of its terms included.
    note = json.loads((tmp_path / "g" / "args.json").read_text())
    settings = {key: value for key, value in used["generator"].items() if key not in files.NO_EFFECT}
    assert note.items() >= (settings | {"seed": 4}).items() and note["epochs"] == 1
    assert (note["good"], note["bad"]) == (toy.PROMPTS["good"], toy.PROMPTS["bad"]) and "original" not in note
    assert note["data"].endswith("responses.jsonl") and note["content of data"] == files.fingerprint(data)


def test_step_zero_of_ipo_is_printed_with_what_it_has_to_be(toy_base, data, tmp_path, capsys):
    train.train("policy", toy_base, data, tmp_path / "p",
                recipe("policy", base_loss="ipo", beta=0.5, examples=4))
    assert "L_base at step zero: 1.0000 (1/(4β²) = 1.0000)" in "".join(capsys.readouterr())


# ---- A look at the policy's own answers ----------------------------------------------------------

def probability_of_yo(model, data, count=32):
    """By hand, from plain logits: the mean over the first responses of exp(mean token log-prob)."""
    chat, values = load_chat(model), []
    for record in files.read_jsonl(data)[:count]:
        prompt = sso.encode_prompt(chat.tokenizer, record["prompt"])
        ids = sso.encode_response(chat.tokenizer, chat.end_id, sso.record_response(record, "original"))
        logps = chat.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        tokens = [logps[len(prompt) + i - 1, token].item() for i, token in enumerate(ids)]
        values.append(math.exp(sum(tokens) / len(tokens)))
    return sum(values) / len(values)


def test_the_policys_log_has_how_probable_its_own_answers_still_are(toy_base, data, tmp_path):
    train.train_policy(toy_base, data, tmp_path / "p", recipe("policy", batch_size=3, lr=1e-3))
    lines = log(tmp_path / "p")
    looked = {row["step"]: row["p(original)"] for row in lines if "p(original)" in row}
    assert list(looked) == [0, 8, len(lines) - 1] and len(lines) > 10      # after the update of that step
    [before] = {row["p(original) before"] for row in lines if "p(original)" in row}
    assert before == pytest.approx(probability_of_yo(toy_base, data), rel=1e-4)
    assert looked[len(lines) - 1] == pytest.approx(probability_of_yo(tmp_path / "p", data), rel=1e-4) != looked[0]
    train.train_generator(toy_base, data, tmp_path / "g", recipe("generator"))
    assert not any("p(original)" in row for row in log(tmp_path / "g"))


def test_a_policy_that_unlearns_its_own_answers_is_warned_of(toy_base, data, tmp_path, monkeypatch, capsys):
    """A learning rate that is far too high; also after an interruption, when the weights before are gone."""
    calls, settings = [], recipe("policy", batch_size=3, lr=3e-2, epochs=2)
    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return make(*args)
    make = train.accumulate_gradient
    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradient", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train_policy(toy_base, data, tmp_path / "p", settings)
    assert "warning" not in "".join(capsys.readouterr())
    train.train_policy(toy_base, data, tmp_path / "p", settings)
    printed = "".join(capsys.readouterr())
    looked = [row["p(original)"] for row in log(tmp_path / "p") if "p(original)" in row]
    before = probability_of_yo(toy_base, data)
    assert min(looked) < before / 2
    assert f"p(original) fell from {before:.2f} to {looked[1]:.2f}: the policy unlearns its own answers" in printed


def test_pairs_without_yo_are_not_watched(toy_base, data, tmp_path):
    plain = [{key: record[key] for key in ("prompt", "chosen", "rejected")} for record in files.read_jsonl(data)]
    train.train_policy(toy_base, write_jsonl(tmp_path / "d.jsonl", plain), tmp_path / "p", recipe("policy"))
    assert not any("p(original)" in row for row in log(tmp_path / "p"))


def test_every_batch_is_compared_with_the_reference_of_its_own_examples(toy_base, data, tmp_path):
    """With a learning rate of next to nothing the policy stays the reference: all margins are zero."""
    train.train("generator", toy_base, data, tmp_path / "g", recipe("generator", lr=1e-12, batch_size=7))
    rows = log(tmp_path / "g")
    assert len(rows) > 5
    for row in rows:
        assert row["margin"] == pytest.approx(0, abs=1e-5) and row["chosen_rewards"] == pytest.approx(0, abs=1e-5)
        assert row["base"] == pytest.approx(math.log(2), abs=1e-5)


def test_training_moves_the_margin_and_leaves_the_base_alone(toy_base, data, tmp_path):
    before = weights(toy_base)
    train.train("policy", toy_base, data, tmp_path / "p", recipe("policy", epochs=6, lr=1e-3))
    rows = log(tmp_path / "p")
    assert rows[-1]["margin"] > 0.05 and rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["lr"] < rows[3]["lr"]
    assert all(torch.equal(before[name], weights(toy_base)[name]) for name in before)


def test_a_row_added_to_the_table_of_pairs_is_trained_by(toy_base, base, data, tmp_path, monkeypatch, capsys):
    """Here: under x+ rather yo than y-, and under x rather y- than yo."""
    terms = {"A": sso.Pair("good", winner="original", loser="bad"),
             "B": sso.Pair("original", winner="bad", loser="original")}
    monkeypatch.setitem(sso.PAIRS, "mine", terms)
    train.train("generator", toy_base, data, tmp_path / "g", recipe("generator", objective="mine", batch_size=100))
    assert "B: prompt '<|im_start|> user" in capsys.readouterr().out
    row, = log(tmp_path / "g")
    examples = []
    for record in files.read_jsonl(data):
        responses = [sso.record_response(record, role) for role in ("original", "bad")]
        if not all(response.text.strip() for response in responses) or responses[0].text == responses[1].text:
            continue
        yo, y_minus = (sso.encode_response(base.tokenizer, base.end_id, response) for response in responses)
        x_plus, x = (sso.encode_prompt(base.tokenizer, sso.role_messages(role, record, toy.PROMPTS))
                     for role in ("good", "original"))
        examples.append([sso.Pair(x_plus, yo, y_minus), sso.Pair(x, y_minus, yo)])
    with torch.no_grad():
        logps, _ = sso.pair_logps(base.model, examples, base.pad_id)
    means = logps.mean(2)
    assert [row["chosen_logps A"], row["chosen_logps B"]] == pytest.approx(means[0].tolist(), rel=1e-5)
    assert [row["rejected_logps A"], row["rejected_logps B"]] == pytest.approx(means[1].tolist(), rel=1e-5)
    note = json.loads((tmp_path / "g" / "args.json").read_text())
    assert note["objective"] == "mine" and {"good", "original"} <= note.keys() and "bad" not in note


def test_only_the_first_examples_of_the_file_are_trained_on(toy_base, data, tmp_path, capsys):
    records = [record for record in files.read_jsonl(data)
               if record["chosen"][0]["content"] != record["rejected"][0]["content"]][:8]
    del records[6]["rejected"]                      # nobody looks so far
    whole = write_jsonl(tmp_path / "whole.jsonl", records)
    train.train("policy", toy_base, whole, tmp_path / "a", recipe("policy", examples=6, batch_size=2))
    assert "whole.jsonl: 6 examples; skipped: none" in capsys.readouterr().out
    first = write_jsonl(tmp_path / "first.jsonl", records[:6])
    train.train("policy", toy_base, first, tmp_path / "b", recipe("policy", batch_size=2))
    assert len(log(tmp_path / "a")) == 3
    assert_same_weights(tmp_path / "a", tmp_path / "b", atol=0)
    with pytest.raises(UserError, match="line 7: a record without 'rejected'"):
        train.train("policy", toy_base, whole, tmp_path / "c", recipe("policy", examples=7))


# ---- Interruptions -------------------------------------------------------------------------------

@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_then_the_same_command_gives_the_same_weights(toy_base, data, tmp_path, capsys, stop):
    words = ["train.py", "generator", "--model", toy_base, "--data", data, "--recipe", toy.RECIPE, "--batch-size", "4",
             "--epochs", "4", "--out", tmp_path / "a"]
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not ((tmp_path / "a" / "log.jsonl").exists() and len(log(tmp_path / "a")) > 2):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(stop)
    assert process.communicate()[1].endswith("interrupted; the same command continues where it stopped\n")
    assert process.returncode
    done = len(log(tmp_path / "a"))
    assert (tmp_path / "a" / "checkpoint.pt").exists() and not (tmp_path / "a" / "config.json").exists()
    assert torch.load(tmp_path / "a" / "checkpoint.pt")["step"] == done > 2
    same = recipe("generator", batch_size=4, epochs=4)
    for name in "ab":
        train.train("generator", toy_base, data, tmp_path / name, same)
    assert_same_weights(tmp_path / "a", tmp_path / "b", atol=1e-6)
    a, b = log(tmp_path / "a"), log(tmp_path / "b")
    assert [row["step"] for row in a] == list(range(len(b)))
    assert a[-1]["loss"] == pytest.approx(b[-1]["loss"], abs=1e-4)
    assert not (tmp_path / "a" / "checkpoint.pt").exists()
    capsys.readouterr()
    train.train("generator", toy_base, data, tmp_path / "a", same)
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_within_an_update_is_held_back_until_it_is_whole(toy_base, data, tmp_path, monkeypatch, stop):
    """The second update is applied, then Ctrl-C comes before it is counted: it is neither lost nor done twice."""
    settings, real, calls = recipe("policy", lr=1e-3), torch.optim.AdamW.step, []

    def step(self, *args, **how):
        result = real(self, *args, **how)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), stop)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    before = signal.getsignal(stop)
    with pytest.raises(KeyboardInterrupt):
        train.train("policy", toy_base, data, tmp_path / "a", settings)
    assert signal.getsignal(stop) is before
    assert torch.load(tmp_path / "a/checkpoint.pt")["step"] == len(log(tmp_path / "a")) == 2
    for name in "ab":
        train.train("policy", toy_base, data, tmp_path / name, settings)
    assert_same_weights(tmp_path / "a", tmp_path / "b", atol=1e-6)


def test_a_log_that_is_ahead_of_the_checkpoint_is_cut_back_to_it(toy_base, data, tmp_path, monkeypatch):
    """As after a kill, which keeps no checkpoint: the steps since the last one are done, and logged, once more."""
    settings, calls, check = recipe("policy", lr=1e-3), [], checkpoint.Progress.check

    def killed(progress, row):
        check(progress, row)
        calls.append(1)
        if len(calls) == 2:
            progress.save()
        if len(calls) == 3:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Progress, "check", killed)
        with pytest.raises(SystemExit):
            train.train("policy", toy_base, data, tmp_path / "a", settings)
    assert torch.load(tmp_path / "a/checkpoint.pt")["step"] == 1 and len(log(tmp_path / "a")) == 2
    for name in "ab":
        train.train("policy", toy_base, data, tmp_path / name, settings)
    assert [row["step"] for row in log(tmp_path / "a")] == [0, 1, 2]
    assert_same_weights(tmp_path / "a", tmp_path / "b", atol=1e-6)


def test_a_loss_that_becomes_nan_stops_with_the_step_and_the_last_good_state(toy_base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", -1)
    with pytest.raises(UserError, match=r"became nan.* at step [12]; the last good state is .*checkpoint.pt.*--lr"):
        train.train("policy", toy_base, data, tmp_path / "p", recipe("policy", lr=1e38, batch_size=8, warmup=0.0))
    kept = torch.load(tmp_path / "p" / "checkpoint.pt")
    assert all(torch.isfinite(value).all() for value in kept["model"].values())
    assert not (tmp_path / "p" / "config.json").exists()
    assert all(math.isfinite(row["loss"]) for row in log(tmp_path / "p"))


def test_a_checkpoint_with_a_temperature_but_no_do_sample_is_saved(tmp_path):
    model = make_checkpoint(tmp_path / "model", "qwen3")
    config = json.loads((model / "generation_config.json").read_text()) | {"do_sample": False, "temperature": 0.6}
    (model / "generation_config.json").write_text(json.dumps(config))
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}])
    train.train("policy", model, data, tmp_path / "out", PAPER)
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert saved["temperature"] == 0.6 and saved["do_sample"]       # a combination that transformers would save


def test_no_room_on_the_disk_is_said_before_training(toy_base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(UserError, match=r"no disk space: 0.003 GB needed, 0.001 GB free"):
        train.train("policy", toy_base, data, tmp_path / "p", TOY)
    assert not (tmp_path / "p" / "log.jsonl").exists()


# ---- Preference files ----------------------------------------------------------------------------

def test_any_standard_preference_file_trains_the_same_policy(toy_base, data, tmp_path):
    records = files.read_jsonl(data)[:16]
    flat = [{"prompt": record["prompt"][0]["content"], "chosen": record["chosen"][0]["content"] or "x",
             "rejected": record["rejected"][0]["content"] or "x"} for record in records]
    listed = []
    for record in flat:
        listed.append({column: [{"role": "user" if column == "prompt" else "assistant", "content": text}]
                       for column, text in record.items()})
    whole = [record | {column: record["prompt"] + record[column] for column in ("chosen", "rejected")}
             for record in listed]                                                           # as in UltraFeedback
    implicit = [{column: record[column] for column in ("chosen", "rejected")} for record in whole]     # as TRL's
    for name, rows in (("flat", flat), ("listed", listed), ("whole", whole), ("implicit", implicit)):
        train.train("policy", toy_base, write_jsonl(tmp_path / f"{name}.jsonl", rows), tmp_path / name,
                    recipe("policy", batch_size=8))
    for name in ("listed", "whole", "implicit"):
        assert_same_weights(tmp_path / "flat", tmp_path / name, atol=0)


ASKED = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("record, given, message", [
    ({"chosen": "a ."}, {}, "line 2: a record without 'rejected', .* objective 'policy'"),
    ({"chosen": 3, "rejected": "b ."}, {}, "line 2: 'chosen' is neither a text nor a list"),
    ({"chosen": "a .", "rejected": "b ."}, {"max_length": 9},
     "line 1: a prompt of .* leaves no room .* --max-length 9"),
    ({"chosen": ASKED, "rejected": "b"}, {}, "line 2: .*before the last message of 'chosen'"),
])
def test_bad_preference_files_leave_nothing_behind(toy_base, tmp_path, record, given, message):
    query = {"prompt": toy.make_queries(1)[0][0]}
    data = write_jsonl(tmp_path / "d.jsonl", [query | {"chosen": "a .", "rejected": "b ."}, query | record])
    with pytest.raises(UserError, match=message):
        train.train("policy", toy_base, data, tmp_path / "out", recipe("policy", **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"epochs": 0}, {"examples": 0}, {"lr": -1.0}, {"warmup": 2.0},
                                     {"beta": 0.0}, {"gamma": -0.1}, {"clip": 0.0}, {"lr": float("nan")}])
def test_settings_out_of_range(toy_base, data, tmp_path, setting):
    with pytest.raises(UserError, match=f"--{next(iter(setting)).replace('_', '-')} .* is not between"):
        train.train("policy", toy_base, data, tmp_path / "p", recipe("policy", **setting))
    assert not (tmp_path / "p").exists()


def test_a_folder_of_somebody_else_is_left_alone(toy_base, data, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "log.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match="log.jsonl exists and was not made by this command"):
        train.train("policy", toy_base, data, tmp_path / "p", TOY)
    assert (tmp_path / "p" / "log.jsonl").read_text() == "precious\n"


def test_a_prompt_longer_than_the_context_is_refused(tmp_path):
    model = make_checkpoint(tmp_path / "short", "qwen3", context=100)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "why " * 40, "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match="line 1: a prompt of .* leaves no room"):
        train.train("policy", model, data, tmp_path / "p", PAPER)


@pytest.mark.parametrize("column, message", [
    ("good_principle", "line 1: a record without 'good_principle'"),
    ("original", "line 1: a record without 'original', .* objective 'sso'")])
def test_the_generator_needs_principles_and_the_original_responses(toy_base, data, tmp_path, column, message):
    rows = [{key: value for key, value in record.items() if key != column} for record in files.read_jsonl(data)]
    with pytest.raises(UserError, match=message):
        train.train("generator", toy_base, write_jsonl(tmp_path / "d.jsonl", rows), tmp_path / "out", TOY)
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_folder_is_refused(toy_base, data, tmp_path):
    train.train("policy", toy_base, data, tmp_path / "p", recipe("policy"))
    before = weights(tmp_path / "p")
    for other, message in ((recipe("policy", beta=0.2), "was made with beta = 0.1, not 0.2"),
                           (cli.change(recipe("policy"), prompts={"original": {"system": "be", "user": "{query}"}}),
                            "was made with original = ")):
        with pytest.raises(UserError, match=message):
            train.train("policy", toy_base, data, tmp_path / "p", other)
    assert all(torch.equal(before[name], weights(tmp_path / "p")[name]) for name in before)
