"""Checkpoints made in the test: randomly initialised Qwen2, Qwen3 and Llama chat models, and a toy base model."""

import copy
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"      # before the imports below read it: no test may reach for a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite runs on the CPU
os.environ["OMP_NUM_THREADS"] = "1"     # tiny tensors: a second thread gains little, and loses much beside a neighbour

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import generate
from lab import toy
from plumbing import cli

CHATML = ("{%- if messages[0]['role'] != 'system' and DEFAULT %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
          "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n"
          "{% if enable_thinking is defined and enable_thinking is false %}THINK{% endif %}{% endif %}")
KINDS = {   # family -> (config, model, chat template, special tokens: the end of turn, the end of text, others)
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, CHATML.replace("DEFAULT", "true").replace("THINK", ""),
              ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM,
              CHATML.replace("DEFAULT", "false").replace("THINK", "<think>\n\n</think>\n\n"),
              ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]),
    "llama": (LlamaConfig, LlamaForCausalLM,
              "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
              "{{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
              "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
              ["<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]),
}


def make_tokenizer(kind):
    """A byte-level tokenizer with the family's special tokens and chat template. Llama's has no pad token."""
    *_, template, specials = KINDS[kind]
    vocab = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    end, text_end, start = specials[:3]
    if kind != "llama":
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token=end, pad_token=text_end, unk_token=text_end)
        tokenizer.add_special_tokens({"additional_special_tokens": specials})
    else:
        backend = Tokenizer(models.BPE(vocab, []))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=end,
                                            additional_special_tokens=specials)
    tokenizer.chat_template = template
    return tokenizer


def make_checkpoint(folder, kind, context=8192, **sampling):
    """Save a tiny, randomly initialised chat model of a family with the sampling settings given."""
    config_class, model_class, _, specials = KINDS[kind]
    tokenizer = make_tokenizer(kind)
    ids = tokenizer.convert_tokens_to_ids(specials)
    torch.manual_seed(0)
    model = model_class(config_class(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=48, max_position_embeddings=context, tie_word_embeddings=kind != "llama",
        initializer_range=0.2, eos_token_id=ids[0], bos_token_id=ids[2], pad_token_id=None))
    model.generation_config = GenerationConfig(eos_token_id=ids[:2], do_sample=True, **sampling)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=KINDS)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param) / "model", request.param,
                           temperature=0.6, top_k=20, repetition_penalty=1.1)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("q3") / "model", "qwen3")


PAPER = cli.read_recipe()
TOY = cli.change(cli.read_recipe(toy.RECIPE), principles={"batch_size": 16}, responses={"batch_size": 16})


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory):
    """A toy base model trained for a few seconds: enough to run on, not to show anything."""
    out = tmp_path_factory.mktemp("toy") / "base"
    toy.build(out, seed=3, steps=150)
    return out


@pytest.fixture(scope="session")
def toy_data(toy_base, tmp_path_factory):
    """A folder with queries, principles and responses of the toy base model."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "queries.jsonl", [{"prompt": query} for query in toy.make_queries(5)[0][:48]])
    generate.principles(toy_base, folder / "queries.jsonl", folder / "principles.jsonl", TOY)
    generate.responses(toy_base, folder / "principles.jsonl", folder / "responses.jsonl", TOY)
    return folder


@pytest.fixture(scope="session", autouse=True)
def default_run(request, tmp_path_factory):
    """`python run.py` in a clean copy, beside the other tests, for the test that looks at its end."""
    if not any(item.name == "test_the_first_command_of_the_readme" for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("clean")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for room in ("plumbing", "lab", "recipes", "lessons"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        process = subprocess.Popen([sys.executable, "run.py"], cwd=folder, stdout=out, stderr=err)
        yield process, folder
        process.kill()


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def command(*words, check=True, **kwargs):
    """Run a command line as a user would, from the repository's root."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, **kwargs)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(line, monkeypatch):
    """Run a command line, "python SCRIPT.py ..." or "python -m lab.MODULE ...", in this process and the current folder:
    as the user's, without the seconds of imports."""
    _, *words = shlex.split(line)
    if words[0] == "-m":
        words[:2] = [words[1].replace(".", "/") + ".py"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


class ThisProcess:
    """In place of a multiprocessing context and of its pool: what is asked for is done here."""

    def __init__(self, *processes):
        pass

    def Pool(self, processes):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def imap_unordered(self, function, values):
        return map(function, values)


@pytest.fixture
def small_study(toy_base, monkeypatch):
    """The study on few queries, with a grid of one cell and its seeds in this process; returns its study.toml."""
    from lab import study
    small = copy.deepcopy(study.STUDY)
    small |= {"search_seeds": [6], "search_rounds": 1}
    small["grid"] = {stage: [{"lr": 1e-3, "epochs": 1}] for stage in small["grid"]}
    small["best"] = dict.fromkeys(small["best"], [0, 0])
    small["best_rounds"] = dict.fromkeys(small["best_rounds"], [0, 0])
    small["best_reward"] = dict.fromkeys(small["best_reward"], 0)
    load_toml = cli.load_toml       # `python -m lab.study` in this process reads it anew
    monkeypatch.setattr(cli, "load_toml", lambda path: small if Path(path).name == "study.toml" else load_toml(path))
    monkeypatch.setattr(study, "STUDY", small)
    monkeypatch.setattr(study, "TOY", cli.change(study.TOY, principles={"max_new_tokens": 12}, generator={"epochs": 1},
                                                 responses={"max_new_tokens": 6}))
    monkeypatch.setattr(toy, "QUERIES", 8)
    monkeypatch.setattr(toy, "HELDOUT", 8)
    monkeypatch.setattr(toy, "build", lambda out, *args, **how: shutil.copytree(toy_base, out))
    monkeypatch.setattr(multiprocessing, "get_context", ThisProcess)
    return small
