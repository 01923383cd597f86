"""Checkpoints made in the tests: randomly initialised Qwen2, Qwen3 and Llama chat models. And the toy's own model.

    python -m pytest            # what a change can break
    python -m pytest --slow     # README's commands, kills, the study, the notebook, the toy's base trained again
"""

import gc
import json
import math
import os
import random
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"      # before the imports below read it: no test may reach for a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite runs on the CPU
os.environ["OMP_NUM_THREADS"] = "1"     # tiny tensors: a second thread gains little, and loses much beside a neighbour

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import eval as evaluation
import generate
import sso
from plumbing.examples import read_examples
from plumbing.models import load_chat
from plumbing.recipes import change, read_recipe
from plumbing.records import read_json, read_jsonl
from toy import world

CHATML = ("{%- if messages[0]['role'] != 'system' and DEFAULT %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
          "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n"
          "{% if enable_thinking is defined and enable_thinking is false %}THINK{% endif %}{% endif %}")
CHATML_TOKENS = ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]
KINDS = {   # family -> (config, model, chat template, special tokens: the end of turn, the end of text, others)
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, CHATML.replace("DEFAULT", "true").replace("THINK", ""),
              CHATML_TOKENS),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM,
              CHATML.replace("DEFAULT", "false").replace("THINK", "<think>\n\n</think>\n\n"),
              CHATML_TOKENS),
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


PAPER = read_recipe()
TOY = change(read_recipe(world.RECIPE), principles={"batch_size": 16}, responses={"batch_size": 16})
TOY_BASE = world.BASE       # for reading alone
GRADER, _ = evaluation.load_critic(grader=world.__file__)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests alone")


def pytest_configure(config):
    """Without --slow all tests but those that are marked slow; with it these alone."""
    config.option.markexpr = "slow" if config.getoption("--slow") else "not slow"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """A folder with queries, principles and responses of the toy's base model."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "queries.jsonl", [{"prompt": query} for query in world.make_queries(5)[0][:48]])
    generate.principles(TOY_BASE, folder / "queries.jsonl", folder / "principles.jsonl", TOY)
    generate.responses(TOY_BASE, folder / "principles.jsonl", folder / "responses.jsonl", TOY)
    return folder


@pytest.fixture(scope="session")
def toy_responses(toy_data):
    return toy_data / "responses.jsonl"


@pytest.fixture
def toy_chat():
    return load_chat(TOY_BASE)


@pytest.fixture
def toy_examples(toy_chat, toy_responses):
    """The responses as the generator's examples."""
    return read_examples(toy_responses, "sso", toy_chat, 256, TOY["prompts"])[0]


@pytest.fixture(scope="session")
def random_responses(tmp_path_factory):
    """Five queries with responses of random letters. Some are cut off."""
    rng = random.Random(0)

    def text():
        return "".join(rng.choices("abcdef .", k=rng.randint(5, 50))) + "."

    records = []
    for i in range(5):
        record = {"prompt": text(), "good_principle": text(), "bad_principle": text()}
        for column in sso.COLUMNS.values():
            record |= {column: text(), f"{column}_finished": rng.random() < 0.5}
        records.append(record)
    return write_jsonl(tmp_path_factory.mktemp("random") / "responses.jsonl", records)


def naive_logp(model, prompt, response):
    """log π(y|x) by a Python loop over one unpadded sequence: the model's own logits, a softmax a token."""
    logits = model(torch.tensor([prompt + response])).logits[0].double()
    total = 0
    for i, token in enumerate(response):
        total = total + torch.log(torch.softmax(logits[len(prompt) + i - 1], -1)[token])
    return total


def probability(chat, prompt, response):
    """exp of the mean log-probability of a token of a response to chat messages."""
    ids = sso.encode_response(chat.tokenizer, chat.end_id, response)
    logp = naive_logp(chat.model, sso.encode_prompt(chat.tokenizer, prompt), ids)
    return math.exp(logp.item() / len(ids))


def texts(path, column):
    return [record[column][-1]["content"] for record in read_jsonl(path)]


def log(folder):
    """The rows of a training's log."""
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def times(folder, pattern="*"):
    """{file: when it was made}."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob(pattern) if path.is_file()}


def change_json(path, **changes):
    Path(path).write_text(json.dumps(read_json(path) | changes))


def assert_same_weights(a, b, atol):
    a, b = (load_file(f"{folder}/model.safetensors") for folder in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


def write_jsonl(path, records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def command(*words):
    """Run a command line as a user would, from the repository's root."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(line):
    """Run a command line, "python SCRIPT.py ..." or "python -m lab.MODULE ...", in this process and the current folder:
    as the user's, without the seconds of imports."""
    _, *words = shlex.split(line)
    if words[0] == "-m":
        words[:2] = [words[1].replace(".", "/") + ".py"]
    with mock.patch.object(sys, "argv", words):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def pytest_collection_finish(session):
    """What is loaded by now stays: collecting garbage need not look at it again and again."""
    gc.freeze()
