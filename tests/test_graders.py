"""The graders for real models: lab/facts.py, lab/form.py, lab/code.py, their queries, their principles by hand."""

import random
import re
from pathlib import Path

import pytest

import generate
import sso
from conftest import TOY, run_here, texts
from lab import code, facts, form
from plumbing.grader import load_grader
from plumbing.recipes import load_toml
from plumbing.records import UserError, read_jsonl

WORLDS = {"facts": facts, "form": form}
KINDS = {facts: facts.KINDS, form: form.kinds_of("form")}
OTHERS = ("line", "language", "tone")       # worlds of lab/form.py


@pytest.fixture(params=WORLDS.values(), ids=WORLDS)
def world(request):
    return request.param


# ---- Marks ---------------------------------------------------------------------------------------

CATS = "Why do cats purr? "
EXPECTED = load_toml(Path(__file__).with_name("marks.toml"))
MARKS = EXPECTED["facts"] | EXPECTED["line"] | {CATS + demand: marks for demand, marks in EXPECTED["form"].items()}


def test_every_kind_has_marks():
    assert {facts.parse(query).kind for query in EXPECTED["facts"]} == set(facts.KINDS)
    assert {form.parse(CATS + demand).kind for demand in EXPECTED["form"]} | {"line"} == set(form.KINDS)


@pytest.mark.parametrize("query", MARKS)
def test_marks(query):
    right, wrong = MARKS[query]["right"], MARKS[query]["wrong"]
    grade = facts.grade if query in EXPECTED["facts"] else form.grade
    assert [answer for answer in right + wrong if grade(query, answer)] == right


# ---- The worlds ----------------------------------------------------------------------------------

def test_there_are_enough_queries_and_none_twice(world):
    queries, heldout = world.make_queries().values()
    assert len(set(queries)) >= 400 and len(set(heldout)) >= 100
    assert len(set(queries + heldout)) == len(queries + heldout)
    kinds = [world.parse(query).kind for query in heldout]
    assert min(kinds.count(kind) for kind in KINDS[world]) >= 3
    assert {world.parse(query).kind for query in queries[:100]} == set(KINDS[world])


@pytest.mark.parametrize("name", OTHERS)
def test_other_worlds_have_200_queries_held_out_whose_thing_no_query_asks_for(name, tmp_path):
    run_here(f"python -m lab.form --out {tmp_path} --world {name}")
    asked, held = [[form.parse(record["prompt"][0]["content"]) for record in read_jsonl(tmp_path / f"{part}.jsonl")]
                   for part in ("queries", "heldout")]
    assert len(set(asked)) == len(asked) >= 256 and len(set(held)) == len(held) == 200
    thing_of = {way.format(thing): thing for thing in form.THINGS for way in form.ASKED}
    assert not {thing_of[query.question] for query in asked} & {thing_of[query.question] for query in held}
    assert {query.kind for query in asked} == {query.kind for query in held} == set(form.kinds_of(name))


@pytest.mark.parametrize("world, part", [(facts, slice(0, 2)), (form, slice(0, 1))], indirect=["world"])
def test_nothing_held_out_is_asked_in_other_words(world, part):
    asked, held = [[world.parse(text)[part] for text in texts] for texts in world.make_queries().values()]
    assert not set(asked) & set(held)
    assert set(asked) == set(asked[:len(set(asked))])       # each once at first


def test_every_fact_marks_its_own_answers_and_no_others():
    for kind, known in facts.FACTS.items():
        for fact in known:
            query, right = facts.ask(fact, 0), fact.right
            asked = facts.normalise(query)
            for answer in right:
                assert facts.grade(query, answer) == facts.grade(query, f"The answer is {answer.upper()}.") == 1, fact
            others = {answer for other in known for answer in other.right} - set(right)
            others = sorted(other for other in others if facts.normalise(other) not in asked)
            for other in random.Random(query).sample(others, 2):
                assert facts.grade(query, other) == facts.grade(query, f"{right[0]} or {other}") == 0, (fact, other)


def test_an_echo_is_no_answer(world):
    for query in sum(world.make_queries().values(), []):
        assert world.grade(query, query) == 0, query


IGNORED = ("They, all of them,\n\nLike to rest and the cat is the one of the house who, of all in it, is best.\n\n"
           "- x.\n- y.\n- z.\n- u.\n- v.\n\n1. X\n\nOf course.")


def test_every_demand_marks_what_obeys_it_and_not_what_ignores_it():
    seen = set()
    for query in sum(form.make_queries().values(), []):
        _, demand, kind, word = form.parse(query)
        seen.add(demand)
        ignored = "They like it very much." if kind == "at_least" else IGNORED
        assert form.grade(query, ignored) == 0, query
        if kind in EXPECTED["repeated"]:
            part = EXPECTED["repeated"][kind]
            assert form.grade(query, part * int(word)) == 1, query
            assert form.grade(query, part * (int(word) + 1)) == 0, query
        else:
            assert form.grade(query, EXPECTED["obeyed"][kind].replace("{}", word)) == 1, query
    assert seen == {demand for demand, (kind, _) in form.DEMANDS.items() if kind in KINDS[form]}


@pytest.mark.parametrize("query", ["Why?", "Why do cats purr?", "Why do cats purr? Answer in at most 13 words.", "",
                                   "What is the capital of Atlantis?", "sort these words : plum fox axe red"])
def test_queries_of_others_are_refused(world, query):
    with pytest.raises(UserError, match=re.escape(f"{query!r}: UserError: {query!r} is not a query of lab/")):
        load_grader(world.__file__)(query, sso.Response("Paris.", True))


# ---- Python functions ----------------------------------------------------------------------------

def code_mark(head, body, form="{}"):
    """The mark of a function of lab/code.toml, by its head and what its body is to be."""
    query = next(text for text, function in code.QUERIES.items() if function.head == head)
    return code.grade(query, form.format(f"def {head}:\n    {body}\n"))


@pytest.mark.parametrize("form", ["{}", "Sure:\n```python\n{}```\nIt prints 3.", "```py\n{}", "```\nx\n```\n```\n{}```"])
def test_code_is_found_and_run(form):
    assert code_mark("double(x)", "return 2 * x", form) == 1
    assert code_mark("double(x)", "return x * x", form) == 0
    assert code_mark("double(x)", "import statistics, dataclasses; return 2 * x", form) == 1


@pytest.mark.parametrize("body", [
    "print(2 * x)", "raise SystemExit(42)", "[0] * 10**9; return 2 * x", "open('/dev/null'); return 2 * x",
    "import os; os.system('true'); return 2 * x", "import os; os.listdir('.'); return 2 * x",
    "import os; os.fork(); return 2 * x", "import socket; socket.socket(); return 2 * x",
    "import subprocess; subprocess.run(['true']); return 2 * x"])
def test_code_that_is_wrong_or_reaches_out_is_marked_0(body):
    assert code_mark("double(x)", body) == 0


def test_code_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(code, "SECONDS", 0.5)
    assert code_mark("double(x)", "while True: pass") == 0


@pytest.mark.slow
def test_every_function_of_the_world_passes_its_own_calls_and_another_does_not():
    for line in code.WORLD["functions"].strip().split("\n"):
        head, _, expression, *_ = line.split(" | ")
        assert code_mark(head, f"import math, collections; return {expression}") == 1, head
        assert code_mark(head, "return 'zebra'") == 0, head


def test_no_function_is_held_out_and_asked_for():
    asked, held = [{code.parse(text).head for text in texts} for texts in code.make_queries().values()]
    assert not asked & held and len(asked | held) == len(code.FUNCTIONS)


# ---- The commands and their files ----------------------------------------------------------------

def write_world(name, options, out):
    """{part: records} of what a world's command writes."""
    run_here(f"python -m lab.{name} --out {out} {options}")
    return {part.stem: read_jsonl(part) for part in Path(out).iterdir()}


@pytest.mark.parametrize("name, world", WORLDS.items())
def test_a_command_writes_queries_and_principles(name, world, here):
    written = write_world(name, "", "a")
    for part, queries in world.make_queries().items():
        assert texts(f"a/{part}.jsonl", "prompt") == queries
        generate.written("a/principles.jsonl", f"a/{part}.jsonl", part, TOY)
        for query, record in zip(queries, read_jsonl(part), strict=True):
            kind = world.KINDS[world.parse(query).kind]
            assert record["good_principle"] in kind["good"] and record["bad_principle"] in kind["bad"]
    other = write_world(name, "--seed 1 --count 9", "b")
    assert len(other["heldout"]) == 9 and other["queries"] != written["queries"][:9]
    long = write_world(name, "--long 1", "c")
    for brief, full in zip(written["principles"], long["principles"], strict=True):
        for side in ("good_principle", "bad_principle"):
            assert full[side].startswith(f"{brief[side]} ") and len(brief[side].split()) < 25
            assert 30 <= len(full[side].split()) <= 60
