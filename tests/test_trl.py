"""Training by TRL: that it is the training of train.py."""

from importlib.util import find_spec

import pytest
import torch

import train
from conftest import PAPER, command, log, make_checkpoint, run_here
from lab import trl_generator
from plumbing.models import load_chat
from plumbing.recipes import change
from plumbing.records import UserError

needs_trl = pytest.mark.skipif(not find_spec("trl"), reason="TRL is not installed (it is optional)")
SETTINGS = {"batch_size": 2, "lr": 3e-3, "warmup": 0.3}


def assert_same_training(ours, trls, rewards=True):
    """The same losses, gradient norms and learning rates, at first to five digits; the same weights and tokenizer."""
    for our_row, trl_row in zip(log(ours), log(trls), strict=True):
        later = our_row["step"] > 0
        for name in ("step", "loss", "grad_norm", "lr"):
            assert trl_row[name] == pytest.approx(our_row[name], rel=1e-4 if later else 1e-5), name
        for name in ("chosen_rewards", "rejected_rewards", "margin", "reward_accuracy"):
            if rewards and later:
                assert trl_row[name] == pytest.approx(our_row[name], rel=1e-3, abs=1e-4), name
    chats = load_chat(ours), load_chat(trls)
    for a, b in zip(*(chat.model.parameters() for chat in chats), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert chats[1].model.config.use_cache
    assert len({chat.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
                for chat in chats}) == 1
    assert not list(trls.parent.glob("*.trl"))


@needs_trl
@pytest.mark.parametrize("family, stage, changed", [
    ("qwen3", "generator", {"epochs": 2}), ("qwen3", "policy", {}),
    ("llama", "generator", {"base_loss": "ipo", "objective": "plus", "recompute_layers": 1})])
def test_trls_training_is_that_of_train(family, stage, changed, random_responses, tmp_path, capsys):
    model = make_checkpoint(tmp_path / "model", family)
    recipe = change(PAPER, **{stage: SETTINGS | changed})
    ours, trls = tmp_path / "ours", tmp_path / "trls"
    train.train(stage, model, random_responses, ours, recipe)
    trl_generator.trl_train(stage, model, random_responses, trls, recipe)
    assert_same_training(ours, trls, rewards="base_loss" not in changed)        # TRL's rewards of IPO are sums
    capsys.readouterr()
    trl_generator.trl_train(stage, model, random_responses, trls, recipe)       # each takes the other's folder for its own
    train.train(stage, model, random_responses, trls, recipe)
    assert capsys.readouterr().out == 2 * f"{trls}: complete\n"


@needs_trl
@pytest.mark.slow
def test_two_processes_train_as_one(qwen3, random_responses, tmp_path):
    rest = ["generator", "--model", qwen3, "--data", random_responses]
    for name, value in SETTINGS.items():
        rest += ["--set", f"generator.{name}={value}"]
    command("train.py", *rest, "--out", tmp_path / "ours")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = command(*launcher, "-m", "lab.trl_generator", *rest, "--out", tmp_path / "trls")
    assert done.stdout.count("5 examples; skipped") == 1    # the first process alone reads the data
    assert_same_training(tmp_path / "ours", tmp_path / "trls")


def test_without_trl_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^error: TRL is not installed: pip install trl==[0-9.]+$"):
        run_here(f"python -m lab.trl_generator policy --model m --data d --out {tmp_path}/out")
    assert not list(tmp_path.iterdir())


@needs_trl
@pytest.mark.parametrize("settings, processes, message", [
    ({"base_loss": "own"}, 1, "TRL does not have the base loss own"),
    ({"lora_rank": 4}, 1, "lora_rank is for train.py"),
    ({"batch_size": 5}, 4, "batch_size = 5: 4 processes cannot share 10 pairs equally")])
def test_what_trl_cannot_do_is_refused(settings, processes, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=message):
        trl_generator.make_config(tmp_path, PAPER["generator"] | settings)
