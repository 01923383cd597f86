"""Training of adapters by the optional library peft: what trains, what is saved, and that a merge changes nothing."""

import re

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import assert_same_weights, make_checkpoint, run_here
from plumbing import checkpoint, lora
from plumbing.checkpoint import Progress
from plumbing.examples import read_examples
from plumbing.models import load_chat
from plumbing.recipes import read_recipe
from plumbing.scoring import score

pytest.importorskip("peft")
RECIPE = read_recipe()


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param) / "model", request.param)


def fit(model, data, out, **settings):
    """The generator's training of three steps of 16, on rank 4, in this process."""
    recipe = read_recipe()
    recipe["generator"] |= {"lora_rank": 4, "batch_size": 16, "lr": 1e-2, "warmup": 0.0} | settings
    train.generator(model, data, out, recipe)


def test_what_is_saved_is_an_ordinary_model_with_the_log_probs_that_were_trained(model, toy_data, tmp_path, monkeypatch):
    """Both forms of log-probs just before the merge equal those of the folder, read anew. Embeddings, norms and the head stay."""
    data = toy_data / "responses.jsonl"
    seen = {}

    def merge(trained):
        chat = load_chat(model)._replace(model=trained)
        seen["class"] = type(trained)
        seen["logps"] = score(chat, read_examples(data, "sso", chat, 4096, RECIPE["prompts"])[0])[0]
        lora.merge_adapters(trained)

    monkeypatch.setattr(train, "merge_adapters", merge)
    fit(model, data, tmp_path / "g")
    for form in ("plain", "fast"):
        chat = load_chat(tmp_path / "g", form)
        assert type(chat.model) is seen["class"]
        logps, _ = score(chat, read_examples(data, "sso", chat, 4096, RECIPE["prompts"])[0])
        torch.testing.assert_close(logps, seen["logps"], rtol=0, atol=1e-3)     # sums over 60 tokens and more
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "g"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj.weight" in name}


def test_an_interrupted_training_of_adapters_continues_to_the_same_weights(model, toy_data, tmp_path, monkeypatch):
    write = Progress.log

    def log_and_stop(progress, row):
        write(progress, row)
        if progress.step == 2:
            raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Progress, "log", log_and_stop)
        patch.setattr(checkpoint, "SAVE_SECONDS", -1)
        fit(model, toy_data / "responses.jsonl", tmp_path / "a")
    kept = torch.load(tmp_path / "a.partial/checkpoint.pt")["model"]
    assert kept and all("lora" in name for name in kept)            # and none of the weights
    for name in "ab":
        fit(model, toy_data / "responses.jsonl", tmp_path / name)
    assert_same_weights(tmp_path / "a", tmp_path / "b", atol=1e-6)


def test_rank_and_seed_are_settings_and_the_first_loss_is_that_of_the_model(model, toy_data, tmp_path, capsys):
    line = f"python train.py generator --model {model} --data {toy_data}/responses.jsonl --set generator.lora_rank=2"
    run_here(f"{line} --out {tmp_path}/g")
    said = capsys.readouterr().out
    trained, total = map(int, re.search(r"([\d,]+) of ([\d,]+) parameters train", said.replace(",", "")).groups())
    assert f"memory: {4 * (total + 3 * trained) / 1e9:.3g} GB for weights, gradients and AdamW" in said
    assert "L_base at step zero: 0.6931 (ln 2 = 0.6931)" in said and "adapters of rank 2: " in said
    with pytest.raises(SystemExit, match="was made with lora_rank = 2, not 3"):
        run_here(f"{line[:-1]}3 --out {tmp_path}/g")
