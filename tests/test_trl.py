"""Training by TRL: that it is the training of train.py."""

import json
import random
import sys
from importlib.util import find_spec

import pytest
import torch

from conftest import PAPER, command, make_checkpoint, run_here, write_jsonl
from lab import trl_generator
from plumbing import cli
from plumbing.chat import load_chat
from plumbing.files import UserError

needs_trl = pytest.mark.skipif(not find_spec("trl"), reason="TRL is not installed (it is optional)")
WORDS = "seven green lamps hum softly near old river stones while cats watch two boats".split()
FLAGS = "--batch-size 2 --lr 3e-3 --warmup 0.3"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five queries: with batches of two the last of an epoch is smaller. Some responses are cut
    off."""
    rng = random.Random(0)

    def text():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))

    records = []
    for i in range(5):
        record = {"prompt": text(), "good_principle": text(), "bad_principle": text()}
        for column in ("chosen", "rejected", "original"):
            record |= {column: f"{text()} {len(record)}", f"{column}_finished": rng.random() < 0.5}
        records.append(record)
    return write_jsonl(tmp_path_factory.mktemp("trl") / "responses.jsonl", records)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_training(ours, trls, rewards=True):
    """The same losses, gradient norms and learning rates, at first to five digits; the same
    weights; and notes by which each command takes the folder of the other for its own."""
    logs = read_log(ours), read_log(trls)
    for our_row, trl_row in zip(*logs, strict=True):
        assert our_row["step"] == trl_row["step"]
        tolerance = 1e-5 if our_row["step"] == 0 else 1e-4
        for name in ("loss", "grad_norm", "lr"):
            assert trl_row[name] == pytest.approx(our_row[name], rel=tolerance), name
        for name in ("chosen_rewards", "rejected_rewards", "margin", "accuracy"):
            if rewards and our_row["step"] > 0:
                assert trl_row[name] == pytest.approx(our_row[name], rel=1e-3, abs=1e-4), name
    assert (ours / "args.json").read_text() == (trls / "args.json").read_text()
    chats = load_chat(ours), load_chat(trls)
    for a, b in zip(*(chat.model.parameters() for chat in chats), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert chats[1].model.config.use_cache
    for name in ("stop_ids", "end_id", "pad_id", "context"):
        assert getattr(chats[0], name) == getattr(chats[1], name)
    tokenizers = [chat.tokenizer for chat in chats]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert not (trls / "rows").exists() and not (trls / "saving").exists()


@needs_trl
@pytest.mark.parametrize("family, command_line", [
    ("qwen3", "generator --epochs 2"),
    ("llama", "generator --epochs 1 --base-loss ipo --objective plus --recompute-layers 1"),
    ("qwen3", "policy --epochs 1"),
])
def test_trls_training_is_that_of_train(family, command_line, data, tmp_path, monkeypatch, capsys):
    model = make_checkpoint(tmp_path / "model", family)
    rest = f"{command_line} {FLAGS} --model {model} --data {data} --out"
    ours, trls = tmp_path / "ours", tmp_path / "trls"
    run_here(f"python train.py {rest} {ours}", monkeypatch)
    monkeypatch.delitem(sys.modules, "lab.trl_generator")   # runpy warns of a module it runs again
    run_here(f"python -m lab.trl_generator {rest} {trls}", monkeypatch)
    assert_same_training(ours, trls, rewards="ipo" not in command_line)     # TRL's rewards are sums
    capsys.readouterr()
    run_here(f"python -m lab.trl_generator {rest} {trls}", monkeypatch)
    run_here(f"python train.py {rest} {trls}", monkeypatch)
    assert capsys.readouterr().out == 2 * f"{trls}: complete\n"


@needs_trl
def test_two_processes_train_as_one(qwen3, data, tmp_path):
    rest = ["generator", *FLAGS.split(), "--model", qwen3, "--data", data, "--out"]
    command("train.py", *rest, tmp_path / "ours")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = command(*launcher, "-m", "lab.trl_generator", *rest, tmp_path / "trls")
    assert done.stdout.count("5 examples; skipped") == 1    # the first process alone reads the data
    assert_same_training(tmp_path / "ours", tmp_path / "trls")


def test_without_trl_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(trl_generator, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^TRL is not installed: pip install trl==[0-9.]+$"):
        trl_generator.trl_train_generator("m", "d", tmp_path / "out", PAPER)
    assert not (tmp_path / "out").exists()


@needs_trl
@pytest.mark.parametrize("settings, processes, message", [
    ({"objective": "joint"}, 1, "TRL does not have --objective joint with --base-loss dpo"),
    ({"batch_size": 5}, 4, "--batch-size 5: 4 processes cannot share 10 pairs equally"),
])
def test_what_trl_cannot_do_is_refused(settings, processes, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    recipe = cli.change(PAPER, generator=settings)
    with pytest.raises(UserError, match=message):
        trl_generator.trl_train_generator("m", "d", tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
