"""Sampling, files and recipes: what is drawn does not depend on company or interruption; bad input ends in one line."""

import errno
import functools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec

import pytest
import torch
import transformers

import generate
import sso
import train
from conftest import PAPER, ROOT, TOY, make_checkpoint, write_jsonl
from lab import toy
from plumbing import cli, files, sampling
from plumbing.chat import load_chat
from plumbing.files import UserError
from plumbing.principles import fault, with_principles
from plumbing.sampling import TopP, load_sampler, sample

GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12}
CHATS = [[{"role": "user", "content": text}] for text in ("Hi", "Name a fruit that is not a plum, please.", "Why?")]


@pytest.fixture(scope="module")
def toy_sampler(toy_base):
    return load_sampler(toy_base)


def texts_of(path, column):
    return [record[column][-1]["content"] for record in files.read_jsonl(path)]


# ---- Sampling ------------------------------------------------------------------------------------

def test_left_padding_changes_nothing(checkpoint):
    chat = load_sampler(checkpoint)
    together = sample(chat, CHATS, 0, GREEDY).responses
    assert together == [sample(chat, [messages], 0, GREEDY).responses[0] for messages in CHATS]
    assert len({response.text for response in together}) > 1


def test_the_checkpoints_sampling_settings_are_not_applied_and_it_says_so(tmp_path, capsys):
    samples = []
    for name, own in {"plain": {}, "odd": {"top_k": 1, "repetition_penalty": 9.0, "temperature": 0.1, "min_p": 0.9,
                                           "no_repeat_ngram_size": 1}}.items():
        chat = load_sampler(make_checkpoint(tmp_path / name, "qwen2", **own))
        samples.append(sample(chat, CHATS, 1, {"temperature": 0.7, "top_p": 0.8, "max_new_tokens": 20}))
    assert samples[0] == samples[1]
    assert "'repetition_penalty': 9.0" in "".join(capsys.readouterr())


@pytest.mark.parametrize("stop", [0, 1])       # both the end of turn and the end of text end a response
def test_a_response_ends_at_any_stop_id_and_only_then_is_finished(qwen3, monkeypatch, stop):
    chat = load_sampler(qwen3)
    texts = [chat.tokenizer(text).input_ids for text in ("ab", "abcd")]

    def fake(input_ids, **_):
        assert input_ids.shape[0] == 2
        return torch.cat([input_ids, torch.tensor([texts[0] + [stop, 1], texts[1]])], 1)

    monkeypatch.setattr(chat.model, "generate", fake)
    assert sample(chat, CHATS[:2], 0, GREEDY) == ([("ab", True), ("abcd", False)], 3 + 4)
    assert sample(chat, [], 0, GREEDY) == ([], 0)


def test_the_sampling_settings_reach_generate(qwen3, monkeypatch):
    chat, seen = load_sampler(qwen3), []
    monkeypatch.setattr(chat.model, "generate", lambda input_ids, **options: seen.append(options) or input_ids)
    for temperature, top_p, tokens in ((0.7, 1.0, 30), (0.7, 0.8, 30), (0.0, 0.8, 10**9)):
        sample(chat, CHATS, 0, {"temperature": temperature, "top_p": top_p, "max_new_tokens": tokens})
    keys = ("do_sample", "temperature", "top_p", "top_k")
    assert [tuple(options.get(key) for key in keys) for options in seen] == [(True, 0.7, 1.0, 0), (True, 1.0, 1.0, 0),
                                                                           (False, None, None, None)]
    [own] = seen[1]["logits_processor"]                 # in the place of the temperature and top-p of transformers
    assert (own.temperature, own.top_p) == (0.7, 0.8)
    assert "logits_processor" not in seen[0] and "logits_processor" not in seen[2]
    longest = max(len(sso.encode_prompt(chat.tokenizer, messages)) for messages in CHATS)
    assert [options["max_new_tokens"] for options in seen] == [30, 30, chat.context - longest]      # never past it


@pytest.mark.parametrize("first", [1, 40, 512])         # 1: all rows need the fallback
@pytest.mark.parametrize("top_p", [0.1, 0.8, 0.999])
def test_top_p_without_a_sort_keeps_what_transformers_keeps(top_p, first):
    """On flat and on peaked rows, in one batch: some are covered by the likeliest tokens, others are not."""
    scores = torch.randn(24, 300, generator=torch.Generator().manual_seed(0))
    scores *= torch.tensor([0.02, 1.0, 8.0]).repeat(8)[:, None]
    ours = TopP(0.7, top_p, first)(None, scores)
    theirs = transformers.TopPLogitsWarper(top_p)(None, transformers.TemperatureLogitsWarper(0.7)(None, scores))
    assert ours.isfinite().equal(theirs.isfinite())
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))
    kept = theirs.isfinite().sum(1)
    assert kept.min() < 4 and (kept.max() > 40 or top_p == 0.1)


# transformers asks psutil for the memory of a CPU, and before 5.23 fails without it.
needs_psutil = pytest.mark.skipif(transformers.__version__ < "5.23" and not find_spec("psutil"), reason="no psutil")
SIZES = {"num_blocks": 64, "max_batch_tokens": 512, "max_requests_per_batch": 64}   # CUDA's are found by transformers


@pytest.fixture
def continuous(monkeypatch):
    """What CUDA uses, on the CPU."""
    monkeypatch.setattr(sampling, "decode", lambda *args: sampling.decode_continuously(*args, **SIZES))
    monkeypatch.setattr(sampling, "batches_at_once", 2)


@needs_psutil
def test_continuous_batching_answers_greedily_as_static_batches_do(toy_sampler, toy_data, continuous, monkeypatch):
    prompts = [record["prompt"] for record in files.read_jsonl(toy_data / "principles.jsonl")]
    settings = {"temperature": 0.0, "top_p": 0.8, "max_new_tokens": 4}       # short, so that some are cut off
    answers = sample(toy_sampler, prompts, 0, settings)
    assert {response.finished for response in answers.responses} == {True, False}
    monkeypatch.setattr(sampling, "decode", sampling.decode_static)
    assert sample(toy_sampler, prompts, 0, settings) == answers


@needs_psutil
def test_continuous_batching_has_the_same_seeds_and_the_same_resume(toy_base, toy_data, tmp_path, continuous,
                                                                    monkeypatch):
    principles = write_jsonl(tmp_path / "principles.jsonl", files.read_jsonl(toy_data / "principles.jsonl")[:16])

    def run(out, seed=0):
        recipe = cli.change(TOY, run={"seed": seed}, responses={"batch_size": 4})
        generate.responses(toy_base, principles, out, recipe, roles=("good",))
        return out.read_bytes()

    whole = run(tmp_path / "a.jsonl")
    assert whole != run(tmp_path / "other.jsonl", seed=1)
    calls = []

    def interrupted(*args):
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(generate, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b.jsonl")
    done = len((tmp_path / "b.jsonl.partial").read_text().splitlines())
    assert run(tmp_path / "b.jsonl") == whole
    assert calls == [8, 8, 8] and done == 8             # batch_size times batches_at_once


def test_continuous_batching_that_gives_up_is_an_error(toy_sampler, continuous, monkeypatch):
    monkeypatch.setattr(toy_sampler.model, "generate_batch", lambda rows, **options: {})
    with pytest.raises(UserError, match="gave up"):
        sample(toy_sampler, [[{"role": "user", "content": "fox"}]], 0,
               {"temperature": 0.7, "top_p": 0.8, "max_new_tokens": 4})


# ---- Principles and responses --------------------------------------------------------------------

def test_responses_stand_under_the_right_prompts(toy_sampler, toy_base, toy_data):
    """Each role's response is the one that its own prompt gives, whatever the other roles."""
    greedy = cli.change(TOY, responses={"temperature": 0.0})
    for role, column in sso.COLUMNS.items():
        out = toy_data / f"greedy_{role}.jsonl"
        generate.responses(toy_base, toy_data / "principles.jsonl", out, greedy, roles=(role,))
        messages = [sso.role_messages(role, record, toy.PROMPTS) for record in files.read_jsonl(out)]
        again = sample(toy_sampler, messages, 0, greedy["responses"]).responses
        assert texts_of(out, column) == [response.text for response in again]
    records = files.read_jsonl(toy_data / "responses.jsonl")
    assert list(records[0]) == ["prompt", "good_principle", "bad_principle", "fallback", "chosen", "chosen_finished",
                                "rejected", "rejected_finished", "original", "original_finished"]
    queries = [record["prompt"] for record in files.read_jsonl(toy_data / "queries.jsonl")]
    assert [record["prompt"] for record in records] == queries                   # in the order of the input
    lengths = [len(str(query)) for query in queries]
    assert lengths != sorted(lengths, reverse=True)                              # not the order of sampling


def test_every_batch_and_every_seed_draws_anew(toy_base, tmp_path):
    query = {"prompt": "name three tools except : axe saw file", "good_principle": "be", "bad_principle": "be"}
    queries = write_jsonl(tmp_path / "q.jsonl", [query] * 16)
    drawn = set()
    for seed in (0, 1):
        recipe = cli.change(TOY, run={"seed": seed}, responses={"batch_size": 8})
        generate.responses(toy_base, queries, tmp_path / f"{seed}.jsonl", recipe)
        for column in ("chosen", "rejected"):           # under the same prompt
            texts = texts_of(tmp_path / f"{seed}.jsonl", column)
            drawn |= {tuple(texts[:8]), tuple(texts[8:])}
    assert len(drawn) == 8                              # two seeds, two roles, two batches


def test_yo_is_sampled_for_the_first_queries_alone(toy_base, toy_data, tmp_path):
    """The first of the file, not of the order in which they are sampled."""
    out = tmp_path / "r.jsonl"
    generate.responses(toy_base, toy_data / "principles.jsonl", out, TOY, originals=7)
    records = files.read_jsonl(out)
    assert ["original" in record for record in records] == [True] * 7 + [False] * 41
    assert ["original_finished" in record for record in records] == [True] * 7 + [False] * 41
    assert len({record["original"][0]["content"] for record in records[:7]}) > 1
    for column in ("chosen", "rejected"):
        assert texts_of(out, column) == texts_of(toy_data / "responses.jsonl", column)
    with pytest.raises(UserError, match="was made with originals = 7, not 8"):
        generate.responses(toy_base, toy_data / "principles.jsonl", out, TOY, originals=8)


def test_an_interrupted_file_continued_has_the_same_bytes(toy_base, toy_data, tmp_path, monkeypatch):
    whole = (toy_data / "responses.jsonl").read_bytes()
    out, calls = tmp_path / "responses.jsonl", []

    def interrupted(*args):                            # Ctrl-C in the middle of the second batch
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return sample(*args)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate.responses(toy_base, toy_data / "principles.jsonl", out, TOY)
    partial = tmp_path / "responses.jsonl.partial"
    lines = partial.read_text().split("\n")
    assert not out.exists() and len(lines) == 17
    # As if killed while it wrote the second batch: of that some lines are whole, and the last one is not.
    partial.write_text("\n".join(lines[:16] + lines[:3] + [lines[3][:40]]))
    generate.responses(toy_base, toy_data / "principles.jsonl", out, TOY)
    assert out.read_bytes() == whole and not partial.exists()


def test_a_killed_command_continued_has_the_same_bytes(toy_base, tmp_path):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": query} for query in toy.make_queries(6)[0][:48]])
    words = ["generate.py", "principles", "--model", toy_base, "--queries", queries, "--recipe", toy.RECIPE,
             "--batch-size", "4", "--out", tmp_path / "a.jsonl"]
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "a.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size > 2000):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)      # the terminal was closed
    assert process.communicate()[1].endswith("interrupted; the same command continues where it stopped\n")
    assert process.returncode and partial.stat().st_size and not (tmp_path / "a.jsonl").exists()
    for name in "ab":
        generate.principles(toy_base, queries, tmp_path / f"{name}.jsonl",
                            cli.change(TOY, principles={"batch_size": 4}))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_pairs_that_teach_nothing_are_skipped_in_training_and_counted(toy_base, toy_data, tmp_path, monkeypatch,
                                                                      capsys):
    """Of every three queries one gets equal responses, one an empty rejected one. The file keeps a line a query."""
    def fake(chat, prompts, seed, settings, *others):
        good = seed % 3 == 0                           # the seeds of a batch's roles are consecutive
        texts = ["same", "yes", "yes"] if good else [" same", "  ", "no"]
        return sampling.Sampled([sso.Response(texts[i % 3], True) for i in range(len(prompts))], len(prompts))

    monkeypatch.setattr(generate, "sample", fake)
    out = tmp_path / "pairs.jsonl"
    recipe = cli.change(TOY, responses={"batch_size": 48})
    generate.responses(toy_base, toy_data / "principles.jsonl", out, recipe, roles=("good", "bad"))
    assert len(files.read_jsonl(out)) == 48
    printed = capsys.readouterr().out
    assert "48 pairs; of no use in training" in printed
    assert "'chosen equals rejected': 16" in printed and "'empty response': 16" in printed
    chat = load_chat(toy_base)
    examples, skipped = files.read_examples(out, "policy", chat, 256)
    assert skipped == {"chosen equals rejected": 16, "empty response": 16}
    responses = {tuple(chat.tokenizer.decode(ids) for ids in (pair.winner, pair.loser)) for [pair] in examples}
    assert len(examples) == 16 and len(responses) == 1
    train.train("policy", toy_base, out, tmp_path / "p", TOY)
    printed = capsys.readouterr().out
    assert "16 examples; skipped: " in printed and "'empty response': 16" in printed
    write_jsonl(out, [{"prompt": "name", "chosen": "a", "rejected": "a"}] * 16)
    with pytest.raises(UserError, match="no pair is left: {'chosen equals rejected': 16}"):
        files.read_examples(out, "policy", chat, 256)


def test_an_example_of_several_terms_is_skipped_only_if_all_of_them_are_equal():
    def pair(winner, loser):
        return sso.Pair([], sso.Response(winner, True), sso.Response(loser, True))

    same, other = pair("a", " a "), pair("a", "b")
    assert files.teaches_nothing([same, same]) == "chosen equals rejected"
    assert files.teaches_nothing([same, other]) is None and files.teaches_nothing([other, same]) is None
    assert files.teaches_nothing([other, pair("a", " ")]) == "empty response"
    assert files.teaches_nothing([pair("\n", "b"), other]) == "empty response"


def test_principles_from_a_file_are_the_querys_own_or_two_general_ones(tmp_path, monkeypatch):
    general = [{"good_principle": f"g{i}.", "bad_principle": f"b{i}."} for i in range(4)]
    own = {"prompt": "Mine?", "good_principle": "mine, good", "bad_principle": "mine, bad"}
    asked = [{"prompt": "Mine?", "n": 1}] + [{"prompt": f"Yours {i}?"} for i in range(60)]
    queries = write_jsonl(tmp_path / "q.jsonl", asked)
    written = write_jsonl(tmp_path / "w.jsonl", [*general, own])
    monkeypatch.setattr(sys, "argv", ["generate.py", "written", "--queries", str(queries), "--out",
                                      str(tmp_path / "p.jsonl"), "--principles", str(written)])
    runpy.run_path(ROOT / "generate.py", run_name="__main__")
    first, *rest = files.read_jsonl(tmp_path / "p.jsonl")
    assert (first["good_principle"], first["bad_principle"], first["n"]) == ("mine, good", "mine, bad", 1)
    assert all(re.fullmatch(r"g(\d)\. g(\d)\.", record["good_principle"]) for record in rest)
    assert all(record["bad_principle"] == record["good_principle"].replace("g", "b") for record in rest)
    drawn = [record["good_principle"] for record in rest]
    assert len(set(drawn)) > 8 and not any(text[:2] == text[4:6] for text in drawn)
    generate.written_principles(written, queries, tmp_path / "seed.jsonl", cli.change(PAPER, run={"seed": 1}))
    assert [record["good_principle"] for record in files.read_jsonl(tmp_path / "seed.jsonl")[1:]] != drawn
    for records, message in (([own], "q.jsonl, line 2: .*w2.jsonl has no principles for "),
                             ([{"good_principle": "x"}], "w2.jsonl, line 1: a record without a 'bad_principle'")):
        with pytest.raises(UserError, match=message):
            generate.written_principles(write_jsonl(tmp_path / "w2.jsonl", records), queries, tmp_path / "p2.jsonl",
                                        PAPER)
        assert not list(tmp_path.glob("p2*"))


def test_the_features_that_are_shipped_are_principles():
    shipped = files.read_jsonl(ROOT / "data/features.jsonl", needs=("feature", "good_principle", "bad_principle"))
    assert {"safety", "logicality", "comprehensiveness", "helpfulness", "literariness", "accuracy", "engagement"} < {
        record["feature"] for record in shipped}


EXAMPLE = {"query": "How far is the moon?", "bad": "Talk of cheese and of nothing else for many lines, please.",
           "good": "Say it."}
FORM = cli.change(PAPER, prompts={"principles": PAPER["prompts"]["principles"] | {"examples": [EXAMPLE]}})


@pytest.mark.parametrize("bad, good, fault", [
    ("Be vague.", "Be exact.", None),
    ("", "Be exact.", "empty"),
    ("Be vague.", "", "empty"),
    ("Be so.", "be So.", "good equals bad"),
    ("Talk of cheese; and of nothing else for many LINES", "Be exact.", "repeats an example"),      # nine words of it
    ("Be vague.", "Please, talk of cheese and of nothing else for a day", "repeats an example"),    # eight of them
    ("Be vague.", "Please, talk of cheese and of nothing else", None),                              # seven
    ("Say it", "Be exact.", "repeats an example"),                                                  # a whole short one
    ("Say it now", "Be exact.", None),
])
def test_a_pair_of_principles_of_no_use_is_replaced_by_the_fixed_one_and_says_why(bad, good, fault):
    made = with_principles({"n": 1}, bad, good, FORM["prompts"])
    fixed = {"good_principle": sso.PROMPTS["fallback_good"], "bad_principle": sso.PROMPTS["fallback_bad"]}
    own = {"good_principle": good, "bad_principle": bad}
    assert made == {"n": 1, "fallback": fault} | (fixed if fault else own)


def test_principles_are_made_in_two_stages_of_a_begun_answer(qwen3, tmp_path, monkeypatch, capsys):
    """The second one goes on from the first; a line's end, and what follows, is cut off; faults are counted."""
    asked = []

    def fake(chat, prompts, seed, settings, begun, end):
        asked.append((seed, begun, end))
        texts = []
        for messages, start in zip(prompts, begun):
            query, *rest = messages[-1]["content"], start
            assert messages[:-1] == sso.principle_messages("", FORM["prompts"])[:-1]
            kind = "good" if "Good guideline:" in start else "bad"
            texts.append({"B": "\n"}.get(query, f" Be {kind}  at {query}.\nGood guideline: no"))
            if query == "D":
                texts[-1] = " Say it."
        return sampling.Sampled([sso.Response(text, True) for text in texts], 1)

    monkeypatch.setattr(generate, "sample", fake)
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": text, "n": text} for text in ("A", "B", "CC", "D")])
    generate.principles(qwen3, queries, tmp_path / "p.jsonl", cli.change(FORM, principles={"batch_size": 2}))
    fixed = (sso.PROMPTS["fallback_good"], sso.PROMPTS["fallback_bad"])
    keys = ("n", "good_principle", "bad_principle", "fallback")
    assert [tuple(record.get(key) for key in keys) for record in files.read_jsonl(tmp_path / "p.jsonl")] == [
        ("A", "Be good at A.", "Be bad at A.", None), ("B", *fixed, "empty"),
        ("CC", "Be good at CC.", "Be bad at CC.", None), ("D", *fixed, "good equals bad")]
    (bad_seed, begun, end), (good_seed, after, _) = asked[:2]       # the longest queries come first
    assert begun == ["Bad guideline:"] * 2 and end == "\n" and bad_seed != good_seed
    assert after[0] == "Bad guideline: Be bad at CC.\nGood guideline:"
    printed = capsys.readouterr().out
    assert "4 queries; with the fixed pair of principles: {'empty': 1, 'good equals bad': 1}" in printed
    assert printed.count("  query ") == 3 and "  good  Be good at A.\n  bad   Be bad at A." in printed


def test_the_worked_examples_of_the_papers_recipe_are_of_its_kind():
    examples = PAPER["prompts"]["principles"]["examples"]
    assert len(examples) >= 8
    for example in examples:
        assert set(example) == {"query", "bad", "good"}
        assert all(30 <= len(example[kind].split()) <= 60 and "\n" not in example[kind] for kind in ("bad", "good"))
        others = [other for other in examples if other is not example]
        prompts = {"principles": PAPER["prompts"]["principles"] | {"examples": others}}
        assert fault(example["bad"], example["good"], prompts) is None
    queries = {record["prompt"][0]["content"] for record in files.read_jsonl(ROOT / "data/queries.jsonl")}
    assert not queries & {example["query"] for example in examples}


def test_an_answer_that_is_begun_is_gone_on_with_and_ends_at_its_end(checkpoint):
    """Against ids put together here and decoded one at a time without a cache, and cut off behind the end text."""
    chat = load_sampler(checkpoint)
    begun = ["Bad: ", "", "Bad: a longer one"]
    plain = sample(chat, CHATS, 0, GREEDY, begun).responses
    for messages, start, response in zip(CHATS, begun, plain):
        ids = sso.encode_prompt(chat.tokenizer, messages)
        ids = ids + chat.tokenizer(start, add_special_tokens=False).input_ids
        new = []
        while len(new) < 12 and not set(new) & set(chat.stop_ids):
            logits = chat.model(input_ids=torch.tensor([ids + new])).logits[0, -1]
            new.append(logits.argmax().item())
        new = [i for i in new if i not in chat.stop_ids]
        text = chat.tokenizer.decode(new, skip_special_tokens=True)
        assert response.text == (text if response.finished else text.rstrip("\ufffd"))
    end = next(sign for sign in plain[0].text[1:] if sign.isascii() and sign.strip())
    short = sample(chat, CHATS[:1], 0, GREEDY, begun[:1], end).responses[0].text
    assert short == plain[0].text[:plain[0].text.index(end) + 1] and len(short) < len(plain[0].text)


def test_what_prompts_begin_with_is_read_once(checkpoint):
    """Greedy answers of prompts that share much, alone (nothing is shared), and together."""
    chat = load_sampler(checkpoint)
    prompts = [[{"role": "system", "content": "Be kind and brief. " * 5}] + messages for messages in CHATS]
    read, forward = [], chat.model.forward

    @functools.wraps(forward)               # generate() looks at its signature
    def spy(*args, **options):
        read.append(options["input_ids"].numel())
        return forward(*args, **options)

    chat.model.forward = spy
    together = sample(chat, prompts, 0, GREEDY).responses
    tokens = sum(len(sso.encode_prompt(chat.tokenizer, messages)) for messages in prompts)
    assert sum(read) < 0.8 * tokens
    assert together == [sample(chat, [messages], 0, GREEDY).responses[0] for messages in prompts]
    twins = sample(chat, [CHATS[0], CHATS[0]], 0, GREEDY).responses         # prompts that share all
    assert twins == sample(chat, CHATS[:1], 0, GREEDY).responses * 2


def test_a_new_token_copies_none_before_it(checkpoint):
    """All keys stay where they are: the cache of a layer is the same memory from step to step."""
    chat = load_sampler(checkpoint)
    places, forward = [], chat.model.forward

    @functools.wraps(forward)
    def spy(*args, **options):
        output = forward(*args, **options)
        places.append([layer.keys.data_ptr() for layer in output.past_key_values.layers])
        return output

    chat.model.forward = spy
    sample(chat, CHATS, 0, GREEDY)
    first, *later = places[1:]              # behind the pass over what the prompts share
    assert len(later) > 3 and later == [first] * len(later)


def test_separators_inside_a_text_do_not_split_a_line(tmp_path):
    texts = ["a\u2028b\x85c\r\nd", "zwei\nZeilen"]
    path = tmp_path / "q.jsonl"
    lines = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text(lines, encoding="utf-8", newline="")
    assert texts_of(path, "prompt") == texts


# ---- Bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("text, message", [
    (None, "no such file"),
    ("", "an empty file"),
    ('{"prompt": "a"}\n{"prompt": \n', "line 2: not a JSON object"),
    ('{"prompt": "a"}\n\n{"prompt": "b"}', "line 2: not a JSON object"),
    ('{"text": "a"}', "line 1: a record without a 'prompt'"),
    ('"a"', "line 1: not a JSON object"),
    (b'{"prompt": "\xff"}', "line 1: not a JSON object.*utf-8"),
    ('{"prompt": "\\ud800"}', "line 1: not a JSON object.*surrogates"),
    ('{"prompt": "  "}', "line 1: a record without a 'prompt'"),
    ('{"prompt": [{"role": "user"}]}', "line 1: 'prompt' is neither a text nor a list of messages"),
    ('{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}',
     "line 1: a query is one user message"),
])
def test_bad_query_files(toy_base, tmp_path, text, message):
    path = tmp_path / "q.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        generate.principles(toy_base, path, tmp_path / "out.jsonl", TOY)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_a_file_without_principles_is_refused_by_line(toy_base, toy_data, tmp_path):
    records = files.read_jsonl(toy_data / "principles.jsonl")[:2]
    del records[1]["bad_principle"]
    path = write_jsonl(tmp_path / "p.jsonl", records)
    with pytest.raises(UserError, match="p.jsonl, line 2: a record without 'bad_principle'"):
        generate.responses(toy_base, path, tmp_path / "out.jsonl", TOY)
    assert not list(tmp_path.glob("out*"))
    generate.responses(toy_base, path, tmp_path / "good.jsonl", TOY, roles=("good", "original"))


def test_bad_models(tmp_path):
    (tmp_path / "empty").mkdir()
    no_template = make_checkpoint(tmp_path / "base", "qwen3")
    (no_template / "chat_template.jinja").unlink()
    no_system = make_checkpoint(tmp_path / "gemma-like", "qwen3")
    (no_system / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' }}{% endfor %}")
    silent = make_checkpoint(tmp_path / "silent", "qwen3")
    (silent / "chat_template.jinja").write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    no_weights = make_checkpoint(tmp_path / "no_weights", "qwen3")
    (no_weights / "model.safetensors").unlink()
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Hi"}])
    for model, message in ((tmp_path / "none", "no such folder.*offline"),
                           ("nobody/no-such-model", "hub.*hf download"),
                           (tmp_path / "empty", "not a checkpoint folder"),
                           (no_template, "has no chat template"),
                           (no_system, "refuses messages of system, user: no; a system message carries"),
                           (silent, "has no system message"),
                           (no_weights, "it cannot be loaded")):
        with pytest.raises(UserError, match=message) as error:
            generate.principles(model, queries, tmp_path / "out.jsonl", PAPER)
        assert str(model) in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_a_model_that_changes_its_logits_behind_the_head_gets_the_plain_form_and_it_says_so(tmp_path, qwen3, capsys):
    """Granite divides its logits, Gemma squashes them: the head alone would give wrong log-probs, silently."""
    from transformers import GraniteConfig, GraniteForCausalLM
    path = make_checkpoint(tmp_path / "granite", "qwen3")
    GraniteForCausalLM(GraniteConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                     intermediate_size=48, logits_scaling=3.0)).save_pretrained(path)
    capsys.readouterr()
    chat = load_chat(path)
    assert chat.pair_logps is sso.pair_logps
    line, = [line for line in capsys.readouterr().out.splitlines() if line]
    assert str(path) in line and "does not read a pair as one row" in line
    assert load_chat(qwen3).pair_logps is not sso.pair_logps and not capsys.readouterr().out
    # It trains, too, by the right log-probs.
    response = [260, 5, 6]
    logps, _ = chat.pair_logps(chat.model, [[sso.Pair([7, 8, 9], response, [9])]], chat.pad_id)
    token_logps = chat.model(torch.tensor([[7, 8, 9] + response])).logits[0].log_softmax(-1)
    expected = sum(token_logps[2 + i, token] for i, token in enumerate(response))
    torch.testing.assert_close(logps[0, 0, 0], expected, rtol=1e-5, atol=1e-5)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}])
    train.train("policy", path, data, tmp_path / "out", PAPER)
    first = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    example = files.read_examples(data, "policy", chat, 256)[0]
    assert first["chosen_logps"] == pytest.approx(
        sso.pair_logps(chat.model, example, chat.pad_id)[0][0].item(), rel=1e-5)


def test_rows_end_where_a_sliding_window_would_begin_to_matter(tmp_path):
    """One mask for all layers is exact only within the window."""
    from transformers import MistralConfig, MistralForCausalLM
    path = make_checkpoint(tmp_path / "mistral", "qwen3")
    small = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=48, max_position_embeddings=500)
    for window, context in ((90, 90), (None, 500)):
        MistralForCausalLM(MistralConfig(**small, sliding_window=window)).save_pretrained(path)
        assert load_chat(path).context == context


def test_a_prompt_longer_than_the_context(tmp_path):
    model = make_checkpoint(tmp_path / "short", "qwen3", context=300)
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "why " * 100 + "on earth"}])
    with pytest.raises(UserError, match="context of 300.*on earth"):
        generate.principles(model, queries, tmp_path / "out.jsonl", PAPER)


def test_a_command_ends_in_one_line_and_a_code(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", "principles", "--model", "m", "--queries", "none.jsonl",
                                      "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as end:          # with a text for its code: it is printed, and the code is 1
        runpy.run_path(ROOT / "generate.py", run_name="__main__")
    assert end.value.code == "error: none.jsonl: no such file" and not list(tmp_path.iterdir())

    def full(out=str(tmp_path / "x.jsonl")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_memory():
        raise torch.OutOfMemoryError("17 GB")

    def no_hands():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["x.py"])
    for function, message in ((full, "x.jsonl: no disk space .*No space left on device.; what was finished is kept"),
                              (no_memory, "error: 17 GB; lower --micro-batch-tokens"),
                              (no_hands, "interrupted; the same command continues where it stopped")):
        with pytest.raises(SystemExit, match=message):
            cli.run("", ("x", function, []))


# ---- What an output was made from ----------------------------------------------------------------

@pytest.fixture(params=["file", "folder"])
def place(request, tmp_path):
    """Makes an Output with its inputs, as a file and as a model's folder; and where its work and its result are."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a"}])
    write_jsonl(tmp_path / "same.jsonl", [{"prompt": "a"}])
    path = tmp_path / "out"
    work, proof = tmp_path / "out.partial", path
    if request.param == "folder":
        path.mkdir()
        work, proof = path / "log.jsonl", path / "config.json"

    def make(settings={"lr": 0.1, "seed": 0}, data=data):
        return files.Output(path, settings, {"data": data}, folder=request.param == "folder")
    return make, work, proof, data


def test_what_is_complete_is_skipped_and_what_is_begun_is_continued(place):
    make, work, proof, _ = place
    assert not make().is_complete()
    make().write_note()
    work.touch()                                            # nothing is in it yet
    assert not make({"lr": 0.2}).is_complete()              # so nothing binds
    work.write_text("begun")
    assert not make().is_complete()
    proof.write_text("done")
    work.unlink()
    assert make().is_complete()
    assert make({"lr": 0.1, "seed": 0, "micro_batch_tokens": 7, "compile": 1, "recompute_layers": 1}).is_complete()


@pytest.mark.parametrize("state", ["begun", "complete"])
def test_what_has_other_settings_or_inputs_is_refused_by_name(place, state):
    make, work, proof, data = place
    make().write_note()
    made = work if state == "begun" else proof
    made.write_text("precious")
    other = data.with_name("same.jsonl")
    for output, message in ((make({"lr": 0.2, "seed": 0}), "lr = 0.1, not 0.2"),
                            (make({"lr": 0.1, "seed": 0, "beta": 0.1}), "beta = None, not 0.1"),
                            (make({"lr": 0.1}), "seed = 0, not None"),
                            (make(data=other), r"data = '(../)?data.jsonl', not '(../)?same.jsonl'")):
        with pytest.raises(UserError, match=f"was made with {message}: choose another --out, or delete") as error:
            output.is_complete()
        assert str(made) in str(error.value) and str(output.note_path) in str(error.value)
        assert "\n" not in str(error.value)
    write_jsonl(data, [{"prompt": "b"}])                    # the same place and size, another content
    with pytest.raises(UserError, match="was made with content of data = '"):
        make().is_complete()
    assert made.read_text() == "precious"


def test_what_nobodys_command_made_is_refused(place):
    make, work, proof, _ = place
    for path in (work, proof):
        path.write_text("precious")
        with pytest.raises(UserError, match=f"{path} exists and was not made by this command; choose another --out"):
            make().is_complete()
        assert path.read_text() == "precious"
        path.unlink()


def test_another_model_is_noticed_by_its_weights(tmp_path, qwen3):
    """The folder has the same name, and its weights the same size."""
    model = make_checkpoint(tmp_path / "model", "qwen3")
    before = files.fingerprint(model)
    assert before == files.fingerprint(qwen3)               # the same weights
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert files.fingerprint(model) != before


def test_the_commands_refuse_skip_and_overwrite_nothing(toy_base, toy_data, capsys):
    out = toy_data / "principles.jsonl"
    before = out.read_bytes()
    warmer = cli.change(TOY, principles={"temperature": 0.9})
    with pytest.raises(UserError, match="temperature = 0.7, not 0.9"):
        generate.principles(toy_base, toy_data / "queries.jsonl", out, warmer)
    form = TOY["prompts"]["principles"]
    asked = cli.change(TOY, prompts={"principles": form | {"system": "### order"}})
    with pytest.raises(UserError, match="principles = {'system': '### guideline'.*, not {'system': '### order"):
        generate.principles(toy_base, toy_data / "queries.jsonl", out, asked)
    other = write_jsonl(toy_data / "others.jsonl", [{"prompt": toy.make_queries(9)[0][0]}])
    with pytest.raises(UserError, match="queries = 'queries.jsonl', not 'others.jsonl'"):
        generate.principles(toy_base, other, out, TOY)
    generate.principles(toy_base, toy_data / "queries.jsonl", out, TOY)
    generate.responses(toy_base, out, toy_data / "responses.jsonl", TOY)
    assert capsys.readouterr().out.count("complete") == 2 and out.read_bytes() == before
    with pytest.raises(UserError, match="responses.jsonl was made with bad = "):
        plain = cli.change(TOY, prompts={"bad": {"system": "", "user": "{query}"}})
        generate.responses(toy_base, out, toy_data / "responses.jsonl", plain)
    mine = toy_data / "mine.jsonl"
    mine.write_text("precious")
    with pytest.raises(UserError, match="was not made by this command"):
        generate.principles(toy_base, toy_data / "queries.jsonl", mine, TOY)
    assert mine.read_text() == "precious"


def test_settings_bind_once_something_is_made_and_no_stale_part_is_continued(toy_base, toy_data, tmp_path):
    """After a failure that made nothing the corrected command runs; a part of another run is never mixed in."""
    out, queries = tmp_path / "p.jsonl", toy_data / "queries.jsonl"
    files.Output(out, cli.stage_settings(TOY, "principles"), {"model": toy_base}).write_note()
    generate.principles(toy_base, queries, out, cli.change(TOY, principles={"temperature": 0.9}))
    for file in (out, tmp_path / "p.jsonl.args.json"):
        file.unlink()
    (tmp_path / "p.jsonl.partial").write_text('{"prompt": "stale"}\n' * 256)
    with pytest.raises(UserError, match="p.jsonl.partial exists and was not made by this command"):
        generate.principles(toy_base, queries, out, TOY)


def test_each_stage_notes_what_it_used_beside_its_output(toy_base, toy_data):
    note = json.loads((toy_data / "principles.jsonl.args.json").read_text())
    assert note.items() >= (TOY["principles"] | {"seed": 0, "queries": "queries.jsonl"}).items()
    for name in ("principles", "fallback_good", "fallback_bad"):
        assert note[name] == TOY["prompts"][name]
    note = json.loads((toy_data / "responses.jsonl.args.json").read_text())
    assert note.items() >= (TOY["responses"] | {"seed": 0, "principles": "principles.jsonl"}).items()
    for role in sso.COLUMNS:
        assert note[role] == TOY["prompts"][role]


# ---- Recipes -------------------------------------------------------------------------------------

def write_recipe(folder, text):
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_papers_recipe_has_the_papers_values():
    """Section 5.1."""
    generator, policy = PAPER["generator"], PAPER["policy"]
    assert generator["lr"] == policy["lr"] == 5e-7
    assert generator["beta"] == policy["beta"] == 0.1
    assert (generator["gamma"], policy["gamma"]) == (0.1, 0.0)
    assert (generator["batch_size"], policy["batch_size"]) == (32, 256)
    assert (generator["examples"], policy["examples"]) == (8_000, 60_000)
    assert generator["epochs"] == policy["epochs"] == 1
    assert generator["base_loss"] == policy["base_loss"] == "dpo"
    assert (generator["objective"], policy["objective"]) == ("sso", "policy")
    responses = PAPER["responses"]
    assert (responses["temperature"], responses["top_p"], responses["max_new_tokens"]) == (0.7, 0.8, 2048)
    examples = {"examples": PAPER["prompts"]["principles"]["examples"]}
    assert PAPER["prompts"] == sso.PROMPTS | {"principles": sso.PROMPTS["principles"] | examples}
    for stage in ("principles", "responses", "generator", "policy"):
        cli.stage_settings(PAPER, stage)


def first_comments():
    """{setting: its comment where it first appears}, or None there."""
    comments = {}
    for line in cli.PAPER.read_text().partition("\n[[prompts")[0].splitlines():
        found = re.fullmatch(r"(\w+) = [^#]*?(?: +# (\S.*))?", line)
        if found:
            comments.setdefault(found[1], found[2])
    return comments


def test_every_setting_of_the_papers_recipe_is_explained_where_it_first_appears():
    comments = first_comments()
    settings = set()
    for name, section in tomllib.loads(cli.PAPER.read_text()).items():
        if name != "prompts":
            settings |= section.keys()
    assert comments.keys() == settings and all(comments.values())


def test_the_explanation_is_the_help_of_the_settings_flag(monkeypatch, capsys):
    comments = first_comments()
    monkeypatch.setattr(sys, "argv", ["train.py", "generator", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(ROOT / "train.py", run_name="__main__")
    text = " ".join(capsys.readouterr().out.split())
    for key in ("lr", "beta", "gamma", "warmup", "clip"):
        assert f"--{key} V {comments[key]} ({PAPER['generator'][key]})" in text


def test_another_recipe_changes_only_what_it_says(tmp_path):
    path = write_recipe(tmp_path, """
        [policy]
        lr = 1                              # a whole number will do
        [prompts]
        fallback_good = "Be kind."
        """)
    recipe = cli.read_recipe(path)
    assert recipe["policy"] == PAPER["policy"] | {"lr": 1.0} and type(recipe["policy"]["lr"]) is float
    assert recipe["prompts"] == PAPER["prompts"] | {"fallback_good": "Be kind."}
    same = recipe.keys() - {"policy", "prompts"}
    assert recipe.keys() == PAPER.keys() and all(recipe[section] == PAPER[section] for section in same)
    assert sso.PROMPTS["fallback_good"] != "Be kind."        # the constant is nobody's to change


def test_a_recipe_that_sets_one_message_of_a_role_leaves_the_other(tmp_path):
    recipe = cli.read_recipe(write_recipe(tmp_path, '[prompts.good]\nsystem = "Do: {principle}"'))
    assert recipe["prompts"]["good"] == {"system": "Do: {principle}", "user": "{query}"}
    assert sso.PROMPTS["good"]["system"] != "Do: {principle}"


def test_the_recipes_that_are_shipped_can_be_read_and_used():
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        for stage in ("principles", "responses", "generator", "policy"):
            cli.stage_settings(cli.read_recipe(path), stage)


@pytest.mark.parametrize("text, message", [
    ("[polices]\nlr = 1.0", r"\[polices\].* run, principles, responses, generator, policy"),
    ("lr = 1.0", r"\[lr\].* run, principles, "),
    ("policy = 3", "policy"),
    ("[policy]\nlearning_rate = 1.0", r"\[policy\] has no 'learning_rate'; it has objective, base_loss, beta, "),
    ("[responses]\nlr = 1.0", r"\[responses\] has no 'lr'; it has batch_size, temperature, "),
    ("[responses]\nbeta = 1.0", r"\[responses\] has no 'beta'"),
    ("[policy]\ntokens = 1", r"\[policy\] has no 'tokens'"),
    ("[prompts]\ngod = 'x'", r"\[prompts\] has no 'god'; it has principles, "),
    ("[prompts.good]\nsytem = 'x'\nuser = '{query}'", "sytem"),
    ("[prompts.good]\nsystem = 3\nuser = '{query}'", "system"),
    ("[prompts]\ngood = 'x'", r"\[prompts\] good = 'x' is not of the type of {'system': "),
    ("[policy]\nlr = 'high'", r"\[policy\] lr = 'high' is not of the type of 5e-07"),
    ("[policy]\nepochs = 1.5", r"\[policy\] epochs = 1.5 is not of the type of 1"),
    ("[policy]\ncompile = true", r"\[policy\] compile = True is not of the type of 0"),
    ("[policy]\nobjective = 1", r"\[policy\] objective = 1 is not of the type of 'policy'"),
    ("[[prompts.principles.examples]]\nquery = 'q'\nbad = 'b'", "number 1 is not of three texts: query, bad, good"),
    ("[[prompts.principles.examples]]\nquery = 'q'\nbad = 'b'\ngood = 3", "number 1 is not of three texts"),
    ("[prompts.principles]\nexamples = ['q', 'b', 'g']", "number 1 is not of three texts"),
    ("[prompts.principles]\nanswer = '{good} {bad}'", "answer has to hold {bad} and behind it {good}"),
    ("[prompts.principles]\nanswer = 'Bad: {bad}'", "answer has to hold {bad} and behind it {good}"),
    ("[prompts.principles]\nend = ''", "and end a text"),
    ("[policy\nlr = 1.0", "line 1"),
    ("\udcff", "utf-8"),
    (None, "No such file"),
])
def test_a_bad_recipe_ends_in_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "my.toml"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message) as error:
        cli.read_recipe(path)
    assert str(error.value).startswith(f"--recipe {path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"temperature": -1.0}, {"top_p": 1.1}, {"top_p": 0.0},
                                     {"max_new_tokens": 0}, {"seed": -1}, {"temperature": float("nan")}])
def test_settings_out_of_range(toy_base, toy_data, tmp_path, setting):
    section = "run" if "seed" in setting else "principles"
    name, value = next(iter(setting.items()))
    flag = f"principles: --{name.replace('_', '-')} {value}"
    with pytest.raises(UserError, match=f"^{flag} is not between [^\n]*$"):
        generate.principles(toy_base, toy_data / "queries.jsonl", tmp_path / "o.jsonl",
                            cli.change(TOY, **{section: setting}))
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_in_no_table_is_refused_with_those_that_are():
    for setting, names in (("objective", sso.PAIRS), ("base_loss", sso.BASE_LOSSES)):
        message = f"policy: --{setting.replace('_', '-')} nonsense is none of {', '.join(names)}"
        with pytest.raises(UserError, match=re.escape(message)):
            cli.stage_settings(cli.change(PAPER, policy={setting: "nonsense"}), "policy")


def test_a_flag_overrides_the_recipe(tmp_path, monkeypatch):
    path = write_recipe(tmp_path, "[run]\nseed = 5\n[responses]\ntemperature = 0.3\nmax_new_tokens = 9")
    given = []

    def responses(model, principles, out, recipe, roles=tuple(sso.COLUMNS)):
        given.append((model, str(out), list(roles), recipe))

    words = "generate.py --model m --principles p --out o --recipe"
    for flags in ([], ["--temperature", "0", "--seed", "6", "--roles", "good", "bad"]):
        monkeypatch.setattr(sys, "argv", [*words.split(), str(path), *flags])
        cli.main("", ("responses", responses, ["responses"]))
    recipe = cli.read_recipe(path)
    assert recipe["responses"] == PAPER["responses"] | {"temperature": 0.3, "max_new_tokens": 9}
    changed = cli.change(recipe, run={"seed": 6}, responses={"temperature": 0.0})
    assert given == [("m", "o", ["good", "bad", "original"], recipe), ("m", "o", ["good", "bad"], changed)]


def test_a_principle_may_stand_in_the_users_turn(tmp_path, qwen3, monkeypatch):
    recipe = cli.read_recipe(write_recipe(tmp_path, r"""
        [prompts.good]
        system = ""
        user = "{query}\n{principle}"
        [prompts.bad]
        system = "{query}?"
        user = "{principle}!"
        """))
    query = "What is {principle} in {query}?"                   # names of blanks in a query are its own
    record = {"prompt": query, "good_principle": "be exact {query}", "bad_principle": "be vague"}
    path = write_jsonl(tmp_path / "p.jsonl", [record])
    expected = {"good": [{"role": "user", "content": query + "\nbe exact {query}"}],
                "bad": [{"role": "system", "content": query + "?"}, {"role": "user", "content": "be vague!"}],
                "original": [{"role": "user", "content": query}]}
    parsed, = files.read_jsonl(path)
    for role, messages in expected.items():
        assert sso.role_messages(role, parsed, recipe["prompts"]) == messages
    asked = []

    def fake(chat, prompts, seed, settings):
        asked.extend(prompts)
        return sampling.Sampled([sso.Response(f"answer {len(asked)}", True)], 1)

    monkeypatch.setattr(generate, "sample", fake)
    generate.responses(qwen3, path, tmp_path / "r.jsonl", recipe)
    assert asked == list(expected.values())
    chat = load_chat(qwen3)
    examples, _ = files.read_examples(tmp_path / "r.jsonl", "sso", chat, 4096, recipe["prompts"])
    for pair, role in zip(examples[0], ("good", "bad")):
        assert pair.prompt == sso.encode_prompt(chat.tokenizer, expected[role])
