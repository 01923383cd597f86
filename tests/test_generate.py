"""Sampling: what is drawn does not depend on company or interruption; bad input ends in one line."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
import transformers

import generate
import sso
import toy
import train
from conftest import ROOT, command, make_checkpoint, write_jsonl

GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12}
CHATS = [[{"role": "user", "content": text}] for text in ("Hi", "Name a fruit that is not a plum, please.", "Why?")]


def test_left_padding_changes_nothing(checkpoint):
    chat = generate.load_sampler(checkpoint)
    together = generate.sample(chat, CHATS, 0, GREEDY)
    assert together == [generate.sample(chat, [messages], 0, GREEDY)[0] for messages in CHATS]
    assert len({text for text, *_ in together}) > 1


def test_the_checkpoints_sampling_settings_are_not_applied_and_it_says_so(tmp_path, capsys):
    samples = []
    for name, sampling in {"plain": {}, "odd": {"top_k": 1, "repetition_penalty": 9.0, "temperature": 0.1, "min_p": 0.9,
                                                "no_repeat_ngram_size": 1}}.items():
        chat = generate.load_sampler(make_checkpoint(tmp_path / name, "qwen2", **sampling))
        samples.append(generate.sample(chat, CHATS, 1, {"temperature": 0.7, "top_p": 0.8, "max_new_tokens": 20}))
    assert samples[0] == samples[1]
    assert "'repetition_penalty': 9.0" in "".join(capsys.readouterr())


@pytest.mark.parametrize("stop", [0, 1])       # both the end of turn and the end of text end a response
def test_a_response_ends_at_any_stop_id_and_only_then_is_finished(qwen3, monkeypatch, stop):
    chat = generate.load_sampler(qwen3)
    texts = chat.tokenizer(["ab", "abcd"]).input_ids
    def fake(input_ids, **_):
        assert input_ids.shape[0] == 2
        return torch.cat([input_ids, torch.tensor([texts[0] + [stop, 1], texts[1]])], 1)
    monkeypatch.setattr(chat.model, "generate", fake)
    assert generate.sample(chat, CHATS[:2], 0, GREEDY) == [("ab", True, 3), ("abcd", False, 4)]


def test_responses_stand_under_the_right_prompts(toy_base, toy_data):
    """Each role's response is the one that its own prompt and the batch's seed give, whatever the other roles."""
    records = generate.read_jsonl(toy_data / "responses.jsonl")
    chat = generate.load_sampler(toy_base)
    s = generate.resolve(toy_base, "responses", {"temperature": 0.0})
    for role, column in sso.COLUMNS.items():
        out = toy_data / f"greedy_{role}.jsonl"
        generate.responses(toy_base, toy_data / "principles.jsonl", out, roles=(role,), temperature=0.0)
        greedy = generate.read_jsonl(out)
        again = generate.sample(chat, [sso.role_messages(role, r, toy.PROMPTS) for r in greedy], 0, s)
        assert [r[column][-1]["content"] for r in greedy] == [text for text, *_ in again]
    assert list(records[0]) == ["prompt", "good_principle", "bad_principle", "fallback", "chosen", "chosen_finished",
                                "rejected", "rejected_finished", "original", "original_finished"]
    queries = [r["prompt"] for r in generate.read_jsonl(toy_data / "queries.jsonl")]
    places = [queries.index(r["prompt"]) for r in records]
    assert places == sorted(places)                    # in the order of the input


def test_an_interrupted_file_continued_has_the_same_bytes(toy_base, toy_data, tmp_path):
    whole = (toy_data / "responses.jsonl").read_bytes()
    out, calls = tmp_path / "responses.jsonl", []
    real = generate.sample
    def interrupted(*args):                            # Ctrl-C in the middle of the second batch
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)
    generate.sample = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            generate.responses(toy_base, toy_data / "principles.jsonl", out, batch_size=16)
    finally:
        generate.sample = real
    partial = tmp_path / "responses.jsonl.partial"
    lines = partial.read_text().split("\n")
    assert not out.exists() and len(lines) == 17
    partial.write_text("\n".join(lines[:16]) + "\n" + lines[0][:40])     # as if killed within a line, too
    generate.responses(toy_base, toy_data / "principles.jsonl", out, batch_size=16)
    assert out.read_bytes() == whole and not partial.exists()


def test_a_killed_command_continued_has_the_same_bytes(toy_base, tmp_path):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": query} for query in toy.make_queries(6)[0][:400]])
    words = [sys.executable, "generate.py", "principles", "--model", toy_base, "--queries", queries, "--batch-size", "4", "--out"]
    process = subprocess.Popen([*words, tmp_path / "a.jsonl"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "a.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size > 2000):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].endswith("interrupted; the same command continues where it stopped\n")
    assert process.returncode and partial.stat().st_size and not (tmp_path / "a.jsonl").exists()
    for name in "ab":
        command(*words[1:], tmp_path / f"{name}.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


# transformers asks psutil for the memory of a CPU, and before 5.23 fails without it.
needs_psutil = pytest.mark.skipif(transformers.__version__ < "5.23" and not find_spec("psutil"), reason="no psutil")
SIZES = {"num_blocks": 64, "max_batch_tokens": 512, "max_requests_per_batch": 64}   # CUDA's are found by transformers


@pytest.fixture
def continuous(monkeypatch):
    """What CUDA uses, on the CPU."""
    monkeypatch.setattr(generate, "decode", lambda *args: generate.decode_continuously(*args, **SIZES))
    monkeypatch.setattr(generate, "BATCHES", 2)


@needs_psutil
def test_continuous_batching_answers_greedily_as_static_batches_do(toy_base, toy_data, continuous):
    chat = generate.load_sampler(toy_base)
    prompts = [r["prompt"] for r in generate.read_jsonl(toy_data / "principles.jsonl")]
    s = {"temperature": 0.0, "top_p": 0.8, "max_new_tokens": 4}       # short, so that some are cut off
    answers = generate.sample(chat, prompts, 0, s)
    assert {finished for _, finished, _ in answers} == {True, False}
    generate.decode = generate.decode_static        # the fixture puts it back
    assert generate.sample(chat, prompts, 0, s) == answers


@needs_psutil
def test_continuous_batching_has_the_same_seeds_and_the_same_resume(toy_base, toy_data, tmp_path, continuous, monkeypatch):
    def run(out, **given):
        generate.responses(toy_base, toy_data / "principles.jsonl", out, batch_size=8, **given)
        return out.read_bytes()
    whole = run(tmp_path / "a.jsonl")
    assert run(tmp_path / "b.jsonl") == whole != run(tmp_path / "c.jsonl", seed=1)
    calls, real = [], generate.sample
    def interrupted(*args):
        calls.append(len(args[1]))
        if len(calls) == 5:         # in the second batch of 16
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(generate, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "d.jsonl")
    assert calls == [16] * 5 and len((tmp_path / "d.jsonl.partial").read_text().splitlines()) == 16
    assert run(tmp_path / "d.jsonl") == whole


def test_continuous_batching_that_gives_up_is_an_error(toy_base, continuous, monkeypatch):
    chat = generate.load_sampler(toy_base)
    monkeypatch.setattr(chat.model, "generate_batch", lambda rows, **how: {})
    with pytest.raises(sso.UserError, match="gave up"):
        generate.sample(chat, CHATS[:1], 0, {"temperature": 0.7, "top_p": 0.8, "max_new_tokens": 4})


def test_every_batch_and_every_seed_draws_anew(toy_base, tmp_path):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "name three tools except : axe saw file"}] * 16)
    texts = {}
    for seed in (0, 1):
        generate.responses(toy_base, queries, tmp_path / f"{seed}.jsonl", roles=("original",), batch_size=8, seed=seed)
        drawn = [r["original"][0]["content"] for r in generate.read_jsonl(tmp_path / f"{seed}.jsonl")]
        texts[seed, 0], texts[seed, 1] = drawn[:8], drawn[8:]
    assert len({tuple(drawn) for drawn in texts.values()}) == 4


def test_the_sampling_settings_reach_generate(qwen3, monkeypatch):
    chat, seen = generate.load_sampler(qwen3), []
    monkeypatch.setattr(chat.model, "generate", lambda input_ids, **how: seen.append(how) or input_ids)
    for temperature, tokens in ((0.7, 30), (0.0, 10**9)):
        generate.sample(chat, CHATS, 0, {"temperature": temperature, "top_p": 0.8, "max_new_tokens": tokens})
    assert [(how["do_sample"], how.get("temperature"), how.get("top_p"), how.get("top_k")) for how in seen] == [
        (True, 0.7, 0.8, 0), (False, None, None, None)]
    longest = max(len(sso.encode_prompt(chat.tokenizer, messages)) for messages in CHATS)
    assert [how["max_new_tokens"] for how in seen] == [30, chat.context - longest]      # never past the context


def test_pairs_that_teach_nothing_are_skipped_in_training_and_counted(toy_base, toy_data, tmp_path, monkeypatch, capsys):
    """Of every three queries one gets equal responses, one an empty rejected one. The file keeps a line a query."""
    def fake(chat, prompts, seed, settings):
        good = seed % 3 == 0                           # the seeds of a batch's roles are consecutive
        return [((["same", "yes", "yes"] if good else [" same", "  ", "no"])[i % 3], True, 1) for i in range(len(prompts))]
    monkeypatch.setattr(generate, "sample", fake)
    out = tmp_path / "pairs.jsonl"
    generate.responses(toy_base, toy_data / "principles.jsonl", out, roles=("good", "bad"), batch_size=48)
    assert len(generate.read_jsonl(out)) == 48
    records, examples, dropped = generate.read_pairs(out, "policy", generate.load_chat(toy_base), 256)
    assert dropped == {"chosen equals rejected": 16, "empty response": 16} and len(records) == len(examples) == 16
    assert {r["rejected"][0]["content"] for r in records} == {"no"}
    assert "'chosen equals rejected': 16" in capsys.readouterr().out
    train.train("policy", toy_base, out, tmp_path / "p")
    printed = capsys.readouterr().out
    assert "16 examples; skipped: " in printed and "'empty response': 16" in printed
    write_jsonl(out, [{"prompt": r["prompt"], "chosen": "a", "rejected": "a"} for r in records])
    with pytest.raises(sso.UserError, match="no pair is left: {'chosen equals rejected': 16}"):
        generate.read_pairs(out, "policy", generate.load_chat(toy_base), 256)


def test_an_example_of_several_terms_is_skipped_only_if_all_of_them_are_equal():
    same, other = ([], ("a", True), (" a ", True)), ([], ("a", True), ("b", True))
    assert generate.teaches_nothing([same, same]) == "chosen equals rejected" and not generate.teaches_nothing([same, other])
    assert generate.teaches_nothing([other, ([], ("a", True), (" ", True))]) == "empty response"


def test_principles_from_a_file_are_the_querys_own_or_two_general_ones(toy_base, tmp_path):
    general = [{"good_principle": f"g{i}.", "bad_principle": f"b{i}."} for i in range(4)]
    own = {"prompt": "Mine?", "good_principle": "mine, good", "bad_principle": "mine, bad"}
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Mine?", "n": 1}] + [{"prompt": f"Yours {i}?"} for i in range(60)])
    words = ["generate.py", "principles", "--queries", queries, "--out", tmp_path / "p.jsonl", "--principles"]
    command(*words, write_jsonl(tmp_path / "w.jsonl", [*general, own]))
    first, *rest = generate.read_jsonl(tmp_path / "p.jsonl")
    assert (first["good_principle"], first["bad_principle"], first["n"]) == ("mine, good", "mine, bad", 1)
    assert all(re.fullmatch(r"g(\d)\. g(\d)\.", r["good_principle"]) for r in rest)
    assert all(r["bad_principle"] == r["good_principle"].replace("g", "b") for r in rest)
    drawn = [r["good_principle"] for r in rest]
    assert len(set(drawn)) > 8 and not any(text[:2] == text[4:6] for text in drawn)
    for records, message in (([own], "q.jsonl, line 2: .*w2.jsonl has no principles for this query"),
                             ([{"good_principle": "x"}], "w2.jsonl, line 1: a record without a 'bad_principle'")):
        with pytest.raises(sso.UserError, match=message):
            generate.written_principles(write_jsonl(tmp_path / "w2.jsonl", records), queries, tmp_path / "p2.jsonl")
        assert not list(tmp_path.glob("p2*"))
    shipped = generate.read_jsonl(ROOT / "data/features.jsonl", needs=("feature", "good_principle", "bad_principle"))
    assert {"safety", "logicality", "comprehensiveness", "helpfulness", "literariness", "accuracy", "engagement"} < {
        r["feature"] for r in shipped}


def test_a_query_without_guidelines_gets_the_fixed_pair_and_is_counted(qwen3, tmp_path, capsys):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Hi"}, {"prompt": [{"role": "user", "content": "Why?"}]}])
    generate.principles(qwen3, queries, tmp_path / "p.jsonl", max_new_tokens=4)
    records = generate.read_jsonl(tmp_path / "p.jsonl")
    assert {r["good_principle"] for r in records} == {sso.PROMPTS["fallback_good"]}
    assert {r["bad_principle"] for r in records} == {sso.PROMPTS["fallback_bad"]} and all(r["fallback"] for r in records)
    assert "2 queries, 2 with the fixed pair" in capsys.readouterr().out


def test_separators_inside_a_text_do_not_split_a_line(tmp_path):
    texts = ["a\u2028b\x85c\r\nd", "zwei\nZeilen"]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"prompt": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8", newline="")
    assert [r["prompt"][0]["content"] for r in generate.read_jsonl(path)] == texts


# ---- Bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("text, message", [
    (None, "no such file"), ("", "an empty file"), ('{"prompt": "a"}\n{"prompt": \n', "line 2: not a JSON object"),
    ('{"prompt": "a"}\n\n{"prompt": "b"}', "line 2: not a JSON object"), ('{"query": "a"}', "line 1: a record without a 'prompt'"),
    ('"a"', "line 1: not a JSON object"), (b'{"prompt": "\xff"}', "line 1: not a JSON object.*utf-8"),
    ('{"prompt": "\\ud800"}', "line 1: not a JSON object.*surrogates"), ('{"prompt": "  "}', "line 1: a record without a 'prompt'"),
    ('{"prompt": [{"role": "user"}]}', "line 1: 'prompt' is neither a text nor a list of messages"),
    ('{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}', "line 1: a query is one user message"),
])
def test_bad_query_files(toy_base, tmp_path, text, message):
    path = tmp_path / "q.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(sso.UserError, match=message) as error:
        generate.principles(toy_base, path, tmp_path / "out.jsonl")
    assert str(path) in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_bad_models(tmp_path, qwen3):
    (tmp_path / "empty").mkdir()
    no_template = make_checkpoint(tmp_path / "base", "qwen3")
    (no_template / "chat_template.jinja").unlink()
    no_system = make_checkpoint(tmp_path / "gemma-like", "qwen3")
    (no_system / "chat_template.jinja").write_text("{% for m in messages %}{{ raise_exception('no') if m.role == 'system' }}{% endfor %}")
    silent = make_checkpoint(tmp_path / "silent", "qwen3")
    (silent / "chat_template.jinja").write_text("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Hi"}])
    for model, message in ((tmp_path / "none", "no such folder.*offline"), ("nobody/no-such-model", "hub.*hf download"),
                           (tmp_path / "empty", "not a checkpoint folder"), (no_template, "has no chat template"),
                           (no_system, "has no system message"), (silent, "has no system message")):
        with pytest.raises(sso.UserError, match=message) as error:
            generate.principles(model, queries, tmp_path / "out.jsonl")
        assert str(model) in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tmp_path):
    """Granite divides its logits, Gemma squashes them: the head alone would give wrong log-probs, silently."""
    from transformers import GraniteConfig, GraniteForCausalLM
    path = make_checkpoint(tmp_path / "granite", "qwen3")
    GraniteForCausalLM(GraniteConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                     intermediate_size=48, logits_scaling=3.0)).save_pretrained(path)
    with pytest.raises(sso.UserError, match="changes its logits after the output head"):
        generate.load_chat(path)


def test_rows_end_where_a_sliding_window_would_begin_to_matter(tmp_path):
    """One mask for all layers is exact only within the window."""
    from transformers import MistralConfig, MistralForCausalLM
    path = make_checkpoint(tmp_path / "mistral", "qwen3")
    small = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=48, max_position_embeddings=500)
    for window, context in ((90, 90), (None, 500)):
        MistralForCausalLM(MistralConfig(**small, sliding_window=window)).save_pretrained(path)
        assert generate.load_chat(path).context == context


def test_a_prompt_longer_than_the_context(tmp_path):
    model = make_checkpoint(tmp_path / "short", "qwen3", context=300)
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "why " * 100 + "on earth"}])
    with pytest.raises(sso.UserError, match="context of 300.*on earth"):
        generate.principles(model, queries, tmp_path / "out.jsonl")


def test_other_settings_are_refused_by_name_and_nothing_is_overwritten(toy_base, toy_data, capsys):
    out = toy_data / "principles.jsonl"
    before = out.read_bytes()
    with pytest.raises(sso.UserError, match="temperature = 0.7, not 0.9"):
        generate.principles(toy_base, toy_data / "queries.jsonl", out, batch_size=16, temperature=0.9)
    other = write_jsonl(toy_data / "others.jsonl", [{"prompt": toy.make_queries(9)[0][0]}])
    with pytest.raises(sso.UserError, match="queries = 'queries.jsonl', not 'others.jsonl'"):
        generate.principles(toy_base, other, out, batch_size=16)
    generate.principles(toy_base, toy_data / "queries.jsonl", out, batch_size=16)
    assert out.read_bytes() == before and "complete" in capsys.readouterr().out
    mine = toy_data / "mine.jsonl"
    mine.write_text("precious")
    with pytest.raises(sso.UserError, match="was not made by this command"):
        generate.principles(toy_base, toy_data / "queries.jsonl", mine)
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"temperature": -1.0}, {"top_p": 1.1}, {"max_new_tokens": 0},
                                     {"seed": -1}, {"temperature": float("nan")}])
def test_settings_out_of_range(toy_base, toy_data, tmp_path, setting):
    flag = f"--{next(iter(setting)).replace('_', '-')}"
    with pytest.raises(sso.UserError, match=f"{flag} .* is not between"):
        generate.principles(toy_base, toy_data / "queries.jsonl", tmp_path / "o.jsonl", **setting)
    assert not list(tmp_path.iterdir())


def test_an_input_edited_in_place_is_noticed(toy_base, tmp_path):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": query} for query in toy.make_queries(2)[0][:4]])
    generate.principles(toy_base, queries, tmp_path / "p.jsonl")
    write_jsonl(queries, [{"prompt": query} for query in toy.make_queries(3)[0][:4]])
    with pytest.raises(sso.UserError, match="was made with content of queries"):
        generate.principles(toy_base, queries, tmp_path / "p.jsonl")


def test_settings_bind_once_something_is_made_and_no_stale_part_is_continued(toy_base, toy_data, tmp_path):
    """After a failure that made nothing the corrected command runs; a part of another run is never mixed in."""
    out, queries = tmp_path / "p.jsonl", toy_data / "queries.jsonl"
    generate.write_text(*generate.claim(out, generate.resolve(toy_base, "principles", {}), {"model": toy_base}))
    generate.principles(toy_base, queries, out, temperature=0.9)
    for file in (out, tmp_path / "p.jsonl.args.json"):
        file.unlink()
    (tmp_path / "p.jsonl.partial").write_text('{"prompt": "stale"}\n' * 256)
    with pytest.raises(sso.UserError, match="p.jsonl.partial exists and was not made by this command"):
        generate.principles(toy_base, queries, out)


def test_the_toy_model_refuses_other_queries(toy_base, tmp_path):
    import eval as evaluation
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Why?"}])
    with pytest.raises(sso.UserError, match="'Why.' is not a query of the toy world"):
        evaluation.policies({"base": toy_base}, queries, tmp_path)


def test_a_command_ends_in_one_line_and_a_code(tmp_path, monkeypatch):
    done = command("generate.py", "principles", "--model", tmp_path, "--queries", tmp_path / "none.jsonl", "--out", tmp_path / "o",
                   check=False)
    assert done.returncode and done.stderr == f"error: {tmp_path / 'none.jsonl'}: no such file\n"

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(SystemExit, match="No space left on device; what was finished is kept"):
        generate.run(full)
