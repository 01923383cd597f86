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
from safetensors.torch import load_file

import generate
import sso
import toy
import train
from conftest import ROOT, command, make_checkpoint, write_jsonl


def weights(folder):
    return load_file(folder / "model.safetensors")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_weights(a, b, atol):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


@pytest.mark.parametrize("budget", [1, 300, 1200])
def test_gradient_accumulation_gives_the_same_update_for_any_micro_batch_size(toy_base, toy_data, budget):
    """Compares gradients: AdamW divides by their size, and would blow rounding up where they are nearly zero."""
    chat = generate.load_chat(toy_base)
    _, examples, _ = generate.read_pairs(toy_data / "responses.jsonl", "sso", chat, 256)
    ref = generate.score(chat, examples, 1000)[0]
    ref += torch.randn(ref.shape, generator=torch.Generator().manual_seed(0))      # margins that are not zero
    gradients, parts = [], []
    for tokens in (10**9, budget):
        chat.model.zero_grad()
        s = {"micro_batch_tokens": tokens, "beta": 0.1, "gamma": 0.1, "objective": "sso", "base": "dpo"}
        part = train.accumulate_gradient(chat, examples, ref, s)
        parts.append(train.metrics(sso.PAIRS["sso"], part))
        gradients.append([p.grad.clone() for p in chat.model.parameters()])
    assert len(sso.micro_batches(examples, budget)) > 2
    for whole, split in zip(*gradients):
        torch.testing.assert_close(whole, split, rtol=0, atol=1e-6 * max(1, whole.abs().max().item()))
    assert parts[0] == pytest.approx(parts[1], rel=1e-4)


def test_the_whole_training_does_not_depend_on_the_micro_batch_size(toy_base, toy_data, tmp_path):
    for tokens in (600, 10**6):
        train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / str(tokens), micro_batch_tokens=tokens,
                    recompute_layers=int(tokens == 600), batch_size=16, epochs=1, lr=1e-4)
    assert_same_weights(tmp_path / "600", tmp_path / "1000000", atol=1e-6)


def test_layers_computed_again_give_the_same_gradient_from_fewer_activations(checkpoint):
    """Fewer bytes are saved for the backward pass, no dropout is turned on, and nothing else changes."""
    chat = generate.load_chat(checkpoint)
    examples = [[([5] * 30, [6, 7] * 20, [8] * 25)]] * 3
    gradients, saved = [], []
    for on in (0, 1):
        train.spare(chat.model, {"compile": 0, "recompute_layers": on})
        chat.model.zero_grad()
        saved.append(0)
        def pack(tensor):
            saved[-1] += tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logps = sso.pair_logps(chat.model, examples, chat.pad_id)[0]
        (logps * torch.arange(1., 7).view_as(logps)).sum().backward()
        gradients.append([p.grad.clone() for p in chat.model.parameters()])
    assert saved[1] < 0.6 * saved[0]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not any(module.training for module in chat.model.modules() if not hasattr(module, "gradient_checkpointing"))


def test_compiled_layers_train_the_same_policy_and_are_not_compiled_for_every_width(toy_base, toy_data, tmp_path, monkeypatch):
    """With a backend that needs no C++ compiler: what dynamo makes of the model, and how often."""
    compile, made = torch.nn.Module.compile, []
    def backend(graph, inputs):
        made.append(graph)
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(self, backend=backend, **how))
    widths, read = set(), sso.tree_mask
    monkeypatch.setattr(sso, "tree_mask", lambda segments: widths.add(segments.shape) or read(segments))
    for on in (0, 1):
        train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / str(on), compile=on, epochs=1, lr=1e-4,
                    batch_size=16, micro_batch_tokens=150)
    assert_same_weights(tmp_path / "0", tmp_path / "1", atol=1e-6)
    assert len(widths) > 5 and 0 < len(made) <= 8


def test_reference_is_every_examples_logp_before_training(toy_base, toy_data):
    chat = generate.load_chat(toy_base)
    _, examples, _ = generate.read_pairs(toy_data / "responses.jsonl", "sso", chat, 256)
    ref, tokens = generate.score(chat, examples, 500)
    assert ref.shape == (2, 2, len(examples)) and not ref.requires_grad
    assert tokens[:, :, 3].tolist() == [[len(pair[side]) for pair in examples[3]] for side in (1, 2)]
    for i in (0, 7, len(examples) - 1):
        alone, _ = sso.pair_logps(chat.model, [examples[i]], chat.pad_id)
        torch.testing.assert_close(ref[:, :, i], alone[:, :, 0], rtol=1e-5, atol=1e-4)


def test_generator_and_policy_do_one_step_by_hand(toy_base, toy_data, tmp_path):
    """One step of each stage moves the weights as AdamW on the naive loss does."""
    data = toy_data / "responses.jsonl"
    for stage, objective, gamma in (("generator", "sso", 0.3), ("policy", "policy", 0.0)):
        out = tmp_path / stage
        train.train(stage, toy_base, data, out, batch_size=1000, epochs=1, lr=1e-3, gamma=gamma, beta=0.2, warmup=0.0,
                    clip=0.5)
        chat = generate.load_chat(toy_base)
        _, examples, _ = generate.read_pairs(data, objective, chat, 256)
        loss = 0
        for example in examples:
            for prompt, winner, loser in example:
                logits = [chat.model(torch.tensor([prompt + r])).logits[0].log_softmax(-1) for r in (winner, loser)]
                w, l = (sum(lp[len(prompt) + i - 1, token] for i, token in enumerate(r)) for lp, r in zip(logits, (winner, loser)))
                margin = 0.2 * ((w - w.detach()) - (l - l.detach()))      # policy = reference at step zero
                loss = loss - torch.log(torch.sigmoid(margin)) - gamma * w / len(winner)
        (loss / len(examples)).backward()
        torch.nn.utils.clip_grad_norm_(chat.model.parameters(), 0.5)
        torch.optim.AdamW(chat.model.parameters(), lr=1e-3, weight_decay=0.0).step()
        trained = generate.load_chat(out).model.state_dict()
        assert log(out)[0]["loss"] == pytest.approx(loss.item() / len(examples), rel=1e-4)
        moved = {k: (v - generate.load_chat(toy_base).model.state_dict()[k]).abs().max().item() for k, v in trained.items()}
        assert max(moved.values()) == pytest.approx(1e-3, rel=0.01)
        for name, value in chat.model.state_dict().items():
            close = (value - trained[name]).abs() < 1e-5        # a gradient of about 0 may have either sign
            assert close.float().mean() > 0.99, name


def test_schedule_and_order():
    assert [train.learning_rate(s, 10, 1.0, 0.2) for s in (0, 1, 2, 6, 9)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 7 / 8))])
    assert train.learning_rate(0, 1, 1.0, 0.04) == 1.0
    steps = train.batches(10, 4, 2, seed=0)
    assert [len(step) for step in steps] == [4, 4, 2] * 2
    assert sorted(sum(steps[:3], [])) == sorted(sum(steps[3:], [])) == list(range(10)) and steps[:3] != steps[3:]
    assert steps == train.batches(10, 4, 2, seed=0) != train.batches(10, 4, 2, seed=1)


def test_the_schedule_is_applied(toy_base, toy_data, tmp_path, monkeypatch):
    """AdamW's first step moves weights by the learning rate: here a quarter of --lr, the first of four warm-up steps."""
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    monkeypatch.setattr(train, "save_model", lambda chat, out: None)
    train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / "p", batch_size=24, epochs=1, lr=1e-3, warmup=1.0)
    kept, before = torch.load(tmp_path / "p/checkpoint.pt"), generate.load_chat(toy_base).model.state_dict()
    assert kept["step"] == 1 and len(log(tmp_path / "p")) == 2       # two steps, the checkpoint taken between them
    assert max((kept["model"][k] - before[k]).abs().max().item() for k in before) == pytest.approx(5e-4, rel=0.01)


def test_weight_decay_is_on_matrices_only(toy_base):
    model = generate.load_chat(toy_base).model
    groups = train.make_optimizer(model, {"lr": 1.0, "weight_decay": 0.1}).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2} and {p.ndim for p in groups[1]["params"]} == {1}


def test_step_zero_is_printed_and_every_step_logged(toy_base, toy_data, tmp_path, capsys):
    train.train("generator", toy_base, toy_data / "responses.jsonl", tmp_path / "g", batch_size=16, epochs=1)
    printed, rows = "".join(capsys.readouterr()), log(tmp_path / "g")
    assert "loss a pair at step zero: 0.6931 (ln 2" in printed and "L-: prompt '<|im_start|> system" in printed
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) == 3
    assert {"loss", "loss L+", "loss L-", "base", "sft", "chosen_rewards", "rejected_rewards", "margin", "accuracy",
            "chosen_logps", "rejected_logps", "lr", "grad_norm", "tokens_per_second"} <= rows[0].keys()
    assert rows[0]["base"] == pytest.approx(math.log(2)) and rows[0]["margin"] == pytest.approx(0, abs=1e-6)
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss L+"] + row["loss L-"], rel=1e-5)
        assert row["loss"] == pytest.approx(2 * (row["base"] + 0.1 * row["sft"]), rel=1e-5)
        assert row["margin"] == pytest.approx(row["chosen_rewards"] - row["rejected_rewards"], abs=1e-5)


def test_training_moves_the_margin_and_leaves_the_base_alone(toy_base, toy_data, tmp_path):
    before = weights(toy_base)
    train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / "p", batch_size=16, epochs=6, lr=1e-3)
    rows = log(tmp_path / "p")
    assert rows[-1]["margin"] > 0.05 and rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["lr"] < rows[3]["lr"]
    assert all(torch.equal(before[name], weights(toy_base)[name]) for name in before)


def test_ctrl_c_and_then_the_same_command_gives_the_same_weights(toy_base, toy_data, tmp_path):
    words = ["train.py", "generator", "--model", toy_base, "--data", toy_data / "responses.jsonl", "--batch-size", "4",
             "--epochs", "8", "--out"]
    process = subprocess.Popen([sys.executable, *map(str, words), tmp_path / "a"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not ((tmp_path / "a" / "log.jsonl").exists() and len(log(tmp_path / "a")) > 2):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].endswith("interrupted; the same command continues where it stopped\n") and process.returncode
    done = len(log(tmp_path / "a"))
    assert (tmp_path / "a" / "checkpoint.pt").exists() and not (tmp_path / "a" / "config.json").exists()
    assert torch.load(tmp_path / "a" / "checkpoint.pt")["step"] == done > 2
    for name in "ab":
        command(*words, tmp_path / name)
    assert_same_weights(tmp_path / "a", tmp_path / "b", atol=1e-6)
    a, b = log(tmp_path / "a"), log(tmp_path / "b")
    assert [row["step"] for row in a] == list(range(len(b))) and a[-1]["loss"] == pytest.approx(b[-1]["loss"], abs=1e-4)
    assert not (tmp_path / "a" / "checkpoint.pt").exists()
    assert "complete" in command(*words, tmp_path / "a").stdout


def test_ctrl_c_within_an_update_is_held_back_until_it_is_whole(toy_base, toy_data, tmp_path, monkeypatch):
    """The second update is applied, then Ctrl-C comes before it is counted: it must be neither lost nor done twice."""
    how, real, calls = {"batch_size": 16, "epochs": 1, "lr": 1e-3}, torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        result = real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / "a", **how)
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load(tmp_path / "a/checkpoint.pt")["step"] == len(log(tmp_path / "a")) == 2
    for name in "ab":
        train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / name, **how)
    assert_same_weights(tmp_path / "a", tmp_path / "b", atol=1e-6)


def test_a_loss_that_becomes_nan_stops_with_the_step_and_the_last_good_state(toy_base, toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    with pytest.raises(sso.UserError, match=r"became nan.* at step [12]; the last good state is .*checkpoint.pt.*--lr"):
        train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / "p", lr=1e38, batch_size=8, warmup=0.0)
    kept = torch.load(tmp_path / "p" / "checkpoint.pt")
    assert all(torch.isfinite(value).all() for value in kept["model"].values())
    assert not (tmp_path / "p" / "config.json").exists()
    assert all(math.isfinite(row["loss"]) for row in log(tmp_path / "p"))


def test_a_checkpoint_with_a_temperature_but_no_do_sample_is_saved(tmp_path):
    model = make_checkpoint(tmp_path / "model", "qwen3")
    config = json.loads((model / "generation_config.json").read_text()) | {"do_sample": False, "temperature": 0.6}
    (model / "generation_config.json").write_text(json.dumps(config))
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}])
    train.train("policy", model, data, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.6


def test_no_room_on_the_disk_is_said_before_training(toy_base, toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(sso.UserError, match=r"no disk space: 0.003 GB needed, 0.001 GB free"):
        train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / "p")


# ---- Preference files ----------------------------------------------------------------------------

def test_any_standard_preference_file_trains_the_same_policy(toy_base, toy_data, tmp_path):
    records = generate.read_jsonl(toy_data / "responses.jsonl")[:16]
    flat = [{"prompt": r["prompt"][0]["content"], "chosen": r["chosen"][0]["content"] or "x",
             "rejected": r["rejected"][0]["content"] or "x"} for r in records]
    listed = [{c: [{"role": "user" if c == "prompt" else "assistant", "content": t}] for c, t in r.items()} for r in flat]
    whole = [r | {c: r["prompt"] + r[c] for c in ("chosen", "rejected")} for r in listed]      # as in UltraFeedback
    implicit = [{c: r[c] for c in ("chosen", "rejected")} for r in whole]               # as TRL's implicit prompt
    for name, rows in (("flat", flat), ("listed", listed), ("whole", whole), ("implicit", implicit)):
        train.train("policy", toy_base, write_jsonl(tmp_path / f"{name}.jsonl", rows), tmp_path / name, epochs=2)
    assert_same_weights(tmp_path / "flat", tmp_path / "listed", atol=0)
    assert_same_weights(tmp_path / "flat", tmp_path / "whole", atol=0)
    assert_same_weights(tmp_path / "flat", tmp_path / "implicit", atol=0)


@pytest.mark.parametrize("record, given, message", [
    ({"chosen": "a ."}, {}, "line 2: a record without 'rejected', which objective 'policy' needs"),
    ({"chosen": 3, "rejected": "b ."}, {}, "line 2: 'chosen' is neither a text nor a list"),
    ({"chosen": "a .", "rejected": "b ."}, {"max_length": 9}, "line 1: a prompt of .* leaves no room .* --max-length 9"),
    ({"chosen": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], "rejected": "b"}, {},
     "line 2: what comes before the last message of 'chosen' is not the prompt"),
])
def test_bad_preference_files_leave_nothing_behind(toy_base, tmp_path, record, given, message):
    query = {"prompt": toy.make_queries(1)[0][0]}
    data = write_jsonl(tmp_path / "d.jsonl", [query | {"chosen": "a .", "rejected": "b ."}, query | record])
    with pytest.raises(sso.UserError, match=message):
        train.train("policy", toy_base, data, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"epochs": 0}, {"examples": 0}, {"lr": -1.0}, {"warmup": 2.0},
                                     {"beta": 0.0}, {"lr": float("nan")}])
def test_settings_out_of_range(toy_base, toy_data, tmp_path, setting):
    with pytest.raises(sso.UserError, match=f"--{next(iter(setting)).replace('_', '-')} .* is not between"):
        train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / "p", **setting)
    assert not (tmp_path / "p").exists()


def test_a_folder_of_somebody_else_is_left_alone(toy_base, toy_data, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "log.jsonl").write_text("precious\n")
    with pytest.raises(sso.UserError, match="log.jsonl exists and was not made by this command"):
        train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / "p")
    assert (tmp_path / "p" / "log.jsonl").read_text() == "precious\n"


def test_a_prompt_longer_than_the_context_is_refused(tmp_path):
    model = make_checkpoint(tmp_path / "short", "qwen3", context=100)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "why " * 40, "chosen": "a", "rejected": "b"}])
    with pytest.raises(sso.UserError, match="line 1: a prompt of .* leaves no room"):
        train.train("policy", model, data, tmp_path / "p")


def test_the_generator_needs_principles(toy_base, toy_data, tmp_path):
    rows = [r | {"good_principle": 3} for r in generate.read_jsonl(toy_data / "responses.jsonl")]
    with pytest.raises(sso.UserError, match="line 1: a record without 'good_principle'"):
        train.train("generator", toy_base, write_jsonl(tmp_path / "d.jsonl", rows), tmp_path / "out")


def test_the_generator_needs_the_original_responses(toy_base, toy_data, tmp_path):
    rows = [{k: v for k, v in r.items() if k != "original"} for r in generate.read_jsonl(toy_data / "responses.jsonl")]
    with pytest.raises(sso.UserError, match="line 1: a record without 'original', which objective 'sso' needs"):
        train.train("generator", toy_base, write_jsonl(tmp_path / "d.jsonl", rows), tmp_path / "out")


def test_another_run_in_the_folder_is_refused(toy_base, toy_data, tmp_path):
    train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / "p", epochs=1)
    before = weights(tmp_path / "p")
    with pytest.raises(sso.UserError, match="was made with beta = 0.1, not 0.2"):
        train.train("policy", toy_base, toy_data / "responses.jsonl", tmp_path / "p", epochs=1, beta=0.2)
    assert all(torch.equal(before[name], weights(tmp_path / "p")[name]) for name in before)
