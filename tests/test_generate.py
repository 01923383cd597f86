"""Sampling, principles and responses: right tokens, whoever stands beside; the right prompts; the same bytes again."""

import os
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

import generate
import sso
from conftest import PAPER, TOY, TOY_BASE, run_here, texts, write_jsonl
from plumbing import sampling
from plumbing.examples import teaches_nothing
from plumbing.principles import with_principles
from plumbing.recipes import change
from plumbing.records import UserError, read_jsonl
from plumbing.sampling import decode, draw, load_sampler, sample
from test_models import CHATS, GREEDY, build, greedy_alone
from toy import world

pytestmark = pytest.mark.usefixtures("here")
PREFIXED = [[{"role": "system", "content": "Be kind and brief. " * 5}] + messages for messages in CHATS]
WARM = TOY["responses"]


@pytest.fixture(scope="module")
def toy_sampler():
    return load_sampler(TOY_BASE)


def spy(chat, monkeypatch):
    """The shapes of what the model reads, as a list that grows."""
    shapes = []
    forward = chat.model.forward

    def seen(input_ids, **options):
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids, **options)

    monkeypatch.setattr(chat.model, "forward", seen)
    return shapes


def say(steps, monkeypatch):
    """Of the model nothing is asked: the tokens of each step are given, one for each row."""
    steps = iter(steps)
    monkeypatch.setattr(sampling, "draw", lambda *args: torch.tensor(next(steps)))


# ---- Tokens --------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8), (2.0, 0.5), (0.5, 1e-9)])
def test_tokens_are_drawn_from_what_transformers_keeps_as_often_as_it_says(temperature, top_p):
    """By a chi-square test of each of three rows, which a right draw fails once in a million times."""
    logits = 1.5 * torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    rng = random.Random(0)
    tokens = draw(logits.repeat(10_000, 1), [rng] * 30_000, temperature, top_p).view(-1, 3)
    kept = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits)).softmax(1)
    for row, expected in enumerate(kept * len(tokens)):
        counts = tokens[:, row].bincount(minlength=12)
        assert not counts[expected == 0].any()
        expected, counts = expected[expected > 0], counts[expected > 0]
        chi_square = ((counts - expected) ** 2 / expected).sum()
        # The upper tail of chi-square with k degrees of freedom at x is Q(k/2, x/2).
        assert torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).clamp(min=0.5), chi_square / 2) > 1e-6
    assert draw(logits, None, 0, top_p).equal(logits.argmax(1))


def test_an_answer_depends_on_its_prompt_and_seed_alone(toy_sampler, toy_data):
    """Not on who stands beside it, on the order, or on the batch size. The seed holds the role as well."""
    prompts = [record["prompt"] for record in read_jsonl(toy_data / "queries.jsonl")]
    seeds = [f"{number}" for number in range(len(prompts))]
    together = sample(toy_sampler, prompts, seeds, WARM)
    assert sample(toy_sampler, prompts[::-1], seeds[::-1], WARM) == together[::-1]
    for prompt, seed, response in list(zip(prompts, seeds, together))[:12]:
        assert sample(toy_sampler, [prompt], [seed], WARM) == [response]
    for seed in (0, 1):
        recipe = change(TOY, run={"seed": seed}, responses={"batch_size": 5})
        generate.responses(TOY_BASE, toy_data / "principles.jsonl", f"{seed}", recipe)
    assert Path("0").read_bytes() == (toy_data / "responses.jsonl").read_bytes() != Path("1").read_bytes()
    twins = [{"prompt": "name three tools except : axe", "good_principle": "be", "bad_principle": "be"}] * 8
    generate.responses(TOY_BASE, write_jsonl("twins.jsonl", twins), "t", TOY, ["good", "bad"])
    good, bad = texts("t", "chosen"), texts("t", "rejected")
    assert len(set(good)) > 1 and good != bad


def test_rows_whose_answers_are_over_leave_once_they_are_more_than_a_quarter(toy_sampler, monkeypatch):
    lengths = [3, 8, 1, 5, 7, 2, 6, 4]
    shapes = spy(toy_sampler, monkeypatch)

    def choose(logits, rows):       # a row says its own number plus ten, and at its end 2
        step = len(shapes)
        return torch.tensor([2 if lengths[i] <= step else 10 + i for i in rows])

    answers = decode(toy_sampler, [[5, 6], [7]] * 4, choose, lambda i, ids: ids[-1] == 2)
    assert answers == [[10 + i] * (length - 1) + [2] for i, length in enumerate(lengths)]
    assert shapes == [(8, 2), (8, 1), (8, 1), (5, 1), (5, 1), (3, 1), (2, 1), (1, 1)]


def test_what_prompts_begin_with_is_read_once_where_the_model_reads_that_right(checkpoint, monkeypatch):
    chat = load_sampler(checkpoint)
    assert chat.shares_prefix and not load_sampler(build("OLMo 3", Path.cwd())).shares_prefix
    encoded = [sso.encode_prompt(chat.tokenizer, messages) for messages in PREFIXED]
    shared = len(os.path.commonprefix(encoded))
    width = max(map(len, encoded))
    shapes = spy(chat, monkeypatch)
    expected = {True: [(1, shared), (4, width - shared)], False: [(4, width), (4, 1)]}
    answers = []
    for shares, first in expected.items():
        shapes.clear()
        answers.append(sample(chat._replace(shares_prefix=shares), PREFIXED, [""] * 4, GREEDY))
        assert shapes[:2] == first
    assert answers[0] == answers[1]
    twins = sample(chat, PREFIXED[:1] * 2, [""] * 2, GREEDY)        # prompts that share all
    assert twins == [answers[0][0]] * 2
    shapes.clear()
    sample(chat, CHATS[1:3], [""] * 2, GREEDY)                      # little is shared
    assert shapes[0][0] == 2


@pytest.mark.parametrize("stop", [0, 1])       # the end of turn, and the end of text
def test_a_response_ends_at_any_stop_id_at_its_limit_or_behind_its_end(qwen3, monkeypatch, stop):
    """It is finished by a stop id alone."""
    chat = load_sampler(qwen3)
    a, b, c, d, line = chat.tokenizer("abcd\n").input_ids
    steps = [[a, a], [b, b], [stop, c], [d], [a]]

    def answers(chat=chat, max_new_tokens=4, **how):
        say(steps, monkeypatch)
        return sample(chat, [CHATS[0]] * 2, ["", ""], GREEDY | {"max_new_tokens": max_new_tokens}, **how)

    assert answers() == [("ab", True), ("abcd", False)]
    context = len(sso.encode_prompt(chat.tokenizer, CHATS[0])) + 2
    assert answers(chat._replace(context=context)) == answers(max_new_tokens=2) == [("ab", False)] * 2
    steps = [[line, a], [a, line], [line, b], [b]]          # a line's end before the text is none
    assert answers(end="\n") == [("\na\n", False), ("a\n", False)]
    assert sample(chat, [], [], GREEDY) == []


def test_an_answer_that_is_begun_is_gone_on_with(qwen3):
    chat = load_sampler(qwen3)
    begun = ["Bad: ", "", "Bad: a longer one", "B"]
    responses = sample(chat, CHATS, [""] * 4, GREEDY, begun)
    for messages, start, response in zip(CHATS, begun, responses):
        ids = sso.encode_prompt(chat.tokenizer, messages) + chat.tokenizer(start).input_ids
        alone = [i for i in greedy_alone(chat.model, ids, chat.stop_ids) if i not in chat.stop_ids]
        text = chat.tokenizer.decode(alone, skip_special_tokens=True)
        assert response.text.rstrip("\ufffd") == text.rstrip("\ufffd")


# ---- Principles ----------------------------------------------------------------------------------

def test_principles_from_a_file_are_the_querys_own_or_two_general_ones():
    general = [{"good_principle": f"g{i}.", "bad_principle": f"b{i}."} for i in range(4)]
    own = {"prompt": "Mine?", "good_principle": "mine, good", "bad_principle": "mine, bad"}
    write_jsonl("q.jsonl", [{"prompt": "Mine?", "n": 1}] + [{"prompt": f"Yours {i}?"} for i in range(60)])
    write_jsonl("w.jsonl", [*general, own])
    drawn = []
    for seed in (0, 1):
        run_here(f"python generate.py written --queries q.jsonl --principles w.jsonl --out p{seed} --seed {seed}")
        first, *rest = read_jsonl(f"p{seed}")
        assert first.items() > {"good_principle": "mine, good", "bad_principle": "mine, bad", "n": 1}.items()
        drawn.append([record["good_principle"] for record in rest])
        assert [record["bad_principle"] for record in rest] == [text.replace("g", "b") for text in drawn[-1]]
    for text in drawn[0]:
        found = re.fullmatch(r"g(\d)\. g(\d)\.", text)
        assert found[1] != found[2]
    assert len(set(drawn[0])) > 8 and drawn[0] != drawn[1]
    with pytest.raises(UserError, match="q.jsonl, line 2: .*w2.jsonl has no principles for it"):
        generate.written(write_jsonl("w2.jsonl", [own]), "q.jsonl", "p2", PAPER)
    assert not list(Path().glob("p2*"))


EXAMPLE = {"query": "How far is the moon?", "bad": "Talk of cheese and of nothing else for many lines, please.",
           "good": "Say it."}
FORM = change(PAPER, prompts={"principles": PAPER["prompts"]["principles"] | {"examples": [EXAMPLE]}})
FIXED = (sso.PROMPTS["fallback_good"], sso.PROMPTS["fallback_bad"])


@pytest.mark.parametrize("good, bad, fault", [
    ("Be exact.", "Be vague.", None),
    ("Be exact.", "", "empty"),
    ("", "Be vague.", "empty"),
    ("be So.", "Be so.", "good equals bad"),
    ("Be exact.", "Talk of cheese; and of nothing else for many LINES", "repeats an example"),      # nine words of it
    ("Please, talk of cheese and of nothing else for a day", "Be vague.", "repeats an example"),    # eight of them
    ("Please, talk of cheese and of nothing else", "Be vague.", None),                              # seven
    ("Be exact.", "Say it", "repeats an example"),                                                  # a whole short one
    ("Be exact.", "Say it now", None),
])
def test_a_pair_of_principles_of_no_use_is_replaced_by_the_fixed_one_and_says_why(good, bad, fault):
    kept = FIXED if fault else (good, bad)
    assert with_principles({"n": 1}, bad, good, FORM["prompts"]) == {
        "n": 1, "fallback": fault, "good_principle": kept[0], "bad_principle": kept[1]}


def test_principles_are_made_in_two_stages_of_a_begun_answer(qwen3, monkeypatch, capsys):
    """The second goes on from the first; a line's end, and what follows, is cut off; faults are counted."""
    asked = []

    def fake(chat, prompts, seeds, settings, begun, end):
        asked.append((seeds, begun, end))
        texts = []
        for messages, start in zip(prompts, begun):
            query = messages[-1]["content"]
            assert messages == sso.principle_messages(query, FORM["prompts"])
            kind = "good" if "Good guideline:" in start else "bad"
            said = {"B": "\n", "D": " Say it."}
            texts.append(said.get(query, f" Be {kind}  at {query}.\nGood guideline: no"))
        return [sso.Response(text, True) for text in texts]

    monkeypatch.setattr("plumbing.principles.sample", fake)
    queries = write_jsonl("q.jsonl", [{"prompt": text, "n": text} for text in ("A", "B", "CC", "D")])
    generate.principles(qwen3, queries, "p.jsonl", change(FORM, principles={"batch_size": 2}))
    keys = ("n", "good_principle", "bad_principle", "fallback")
    assert [tuple(map(record.get, keys)) for record in read_jsonl("p.jsonl")] == [
        ("A", "Be good at A.", "Be bad at A.", None), ("B", *FIXED, "empty"),
        ("CC", "Be good at CC.", "Be bad at CC.", None), ("D", *FIXED, "good equals bad")]
    # The longest query is asked first.
    assert asked[0] == (["0 principles 2 bad", "0 principles 0 bad"], ["Bad guideline:"] * 2, "\n")
    assert asked[1][:2] == (["0 principles 2 good", "0 principles 0 good"],
                            [f"Bad guideline: Be bad at {query}.\nGood guideline:" for query in ("CC", "A")])
    printed = capsys.readouterr().out
    assert "with the fixed pair of principles: {'empty': 1, 'good equals bad': 1}\n" in printed


# ---- Responses -----------------------------------------------------------------------------------

def test_responses_stand_under_the_right_prompts_in_the_order_of_the_queries(toy_sampler, toy_data):
    greedy = change(TOY, responses={"temperature": 0.0})
    generate.responses(TOY_BASE, toy_data / "principles.jsonl", "r.jsonl", greedy)
    records = read_jsonl("r.jsonl")
    for role, column in sso.COLUMNS.items():
        messages = [sso.role_messages(role, record, world.PROMPTS) for record in records]
        again = sample(toy_sampler, messages, [""] * 48, greedy["responses"])
        assert [sso.record_response(record, role) for record in records] == again, role
    queries = texts(toy_data / "queries.jsonl", "prompt")
    assert texts("r.jsonl", "prompt") == queries != sorted(queries, key=len, reverse=True)


def test_yo_is_sampled_for_the_first_queries_alone(toy_data):
    """The first of the file, not of the order in which they are sampled."""
    generate.responses(TOY_BASE, toy_data / "principles.jsonl", "r.jsonl", TOY, originals=7)
    expected = read_jsonl(toy_data / "responses.jsonl")
    for record in expected[7:]:
        del record["original"], record["original_finished"]
    assert read_jsonl("r.jsonl") == expected


def test_an_interrupted_file_continued_has_the_same_bytes(toy_data, monkeypatch):
    out, calls = Path("responses.jsonl"), []

    def counting(chat, prompts, *others):
        calls.append(len(prompts))
        if len(calls) == 8:             # Ctrl-C in the middle of the third batch of 16
            raise KeyboardInterrupt
        return sample(chat, prompts, *others)

    def again():
        generate.responses(TOY_BASE, toy_data / "principles.jsonl", out, TOY)

    monkeypatch.setattr(generate, "sample", counting)
    with pytest.raises(KeyboardInterrupt):
        again()
    partial = Path("responses.jsonl.partial")
    first, second, rest = partial.read_text().split("\n")
    assert not out.exists() and not rest
    partial.write_text(f"{first}\n{second[:-3]}")           # as if killed while it wrote the second batch
    again()
    assert out.read_bytes() == (toy_data / "responses.jsonl").read_bytes() and not partial.exists()
    assert calls == [16] * 14           # the first batch is not made again


def test_pairs_that_teach_nothing_are_counted_where_they_are_sampled(toy_data, monkeypatch, capsys):
    """Of every three queries one gets equal responses, cut off, one an empty rejected one. All stay in the file."""
    def fake(chat, prompts, seeds, settings):
        texts = ["fig", "axe", "axe"] if "good" in seeds[0] else [" fig", "  ", "fox"]
        return [sso.Response(texts[i % 3], i % 3 > 0) for i in range(len(prompts))]

    monkeypatch.setattr(generate, "sample", fake)
    recipe = change(TOY, responses={"batch_size": 48})
    generate.responses(TOY_BASE, toy_data / "principles.jsonl", "pairs.jsonl", recipe, roles=("good", "bad"))
    printed = capsys.readouterr().out
    assert "48 records; cut off by max_new_tokens: {'good': '33.3%', 'bad': '33.3%'}; skipped in training: {" in printed
    assert "'chosen equals rejected': 16" in printed and "'empty response': 16" in printed
    assert "warning: responses are cut off so often" in printed


def test_an_example_of_several_terms_is_skipped_only_if_all_of_them_are_equal():
    def pair(winner, loser):
        return sso.Pair([], sso.Response(winner, True), sso.Response(loser, True))

    same, other = pair("a", " a "), pair("a", "b")
    assert teaches_nothing([same, same]) == "chosen equals rejected"
    assert teaches_nothing([same, other]) is teaches_nothing([other, same]) is None
    assert teaches_nothing([other, pair("a", " ")]) == teaches_nothing([pair("\n", "b"), other]) == "empty response"


def test_near_the_context_an_answer_does_not_depend_on_a_longer_prompt_beside_it(toy_sampler):
    """Each prompt has its own room; and what an answer begins with counts as a part of its prompt."""
    short, long = ([{"role": "user", "content": text}] for text in (
        "sort these words : plum axe red fox", "sort these words : " + "fox " * 20))
    settings = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 24}
    alone, = sample(toy_sampler, [short], ["0"], settings)
    room = len(sso.encode_prompt(toy_sampler.tokenizer, long)) + 3
    beside, cut = sample(toy_sampler._replace(context=room), [short, long], ["0", "0"], settings)
    assert beside == alone and alone.finished and len(cut.text.split()) <= 3
    with pytest.raises(UserError, match="leaves no room in the model's context"):
        sample(toy_sampler._replace(context=room), [long], ["0"], settings, ["fox fox fox"])
