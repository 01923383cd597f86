"""The graders for real models: lab/facts.py and lab/form.py, their queries, their principles by hand."""

import json
import random
import re

import pytest

import generate
import sso
from conftest import TOY, run_here, write_jsonl
from lab import facts, form, toy
from plumbing import cli, files
from plumbing.files import UserError

WORLDS = {"facts": facts, "form": form}


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


# ---- Marks ---------------------------------------------------------------------------------------

FACT_MARKS = {      # kind -> a query, and answers with their marks
    "capital": ("What is the capital of France?", {
        "Paris": 1, "PARIS!": 1, "The capital of France is Paris.": 1, "**Paris**": 1, "It is Paris, not Lyon.": 1,
        "": 0, "Lyon.": 0, "Paris or Lyon.": 0, "Madrid, or maybe Paris": 0, "It is not Paris.": 0,
        "It isn't Paris.": 0, "It isn’t Paris.": 0,
        "Comparison is odious.": 0, "The capital of France is France.": 0}),
    "plural": ('What is the plural of the noun "mouse"?', {
        'The plural of "mouse" is "mice".': 1, "Mice.": 1, "mouses": 0, "mice or mouses": 0, "mouse": 0, "dice": 0}),
    "past": ('What is the past tense of the verb "go"?', {
        "Went": 1, "The past tense of go is 'went'.": 1, "goed": 0, "went, or goed": 0, "gone": 0, "It will go.": 0}),
    "opposite": ('What is the opposite of "cold"?', {
        "The opposite of cold is hot.": 1, "Warm.": 1, "hot or warm": 1, "hot or dry": 0, "chilly": 0, "cold": 0}),
    "sum": ("What is 7 plus 5?", {
        "12": 1, "7 + 5 = 12.": 1, "Twelve": 1, "12 is what 7 and 5 make.": 1, "13": 0, "12 or 13": 0, "7 + 5": 0,
        "-12": 0, "= -12": 0, "7-5=2": 0, "It is 1.2": 0, "twenty": 0, "112": 0}),
    "difference": ("What is 12 minus 4?", {
        "12-4=8": 1, "eight": 1, "The answer is 8.": 1, "-8": 0, "7": 0, "8.5": 0, "12 minus 4": 0,
        "one answer: 8": 1}),
    "product": ("What is 6 times 7?", {
        "6 × 7 = 42": 1, "6x7 is 42.": 1, "\\(6 \\cdot 7 = 42\\)": 1, "42, since 5 times 7 is 35": 0, "43": 0,
        "67": 0}),
    "element": ("Which chemical element has the symbol Al?", {
        "Aluminium": 1, "Al is aluminum.": 1, "It's aluminum (aluminium).": 1, "Aluminium or argon": 0, "Al": 0}),
    "day": ("Which day of the week comes right after Monday?", {
        "Tuesday": 1, "The day after Monday is tuesday.": 1, "Wednesday": 0, "Tuesday or Wednesday": 0, "Monday": 0}),
    "month": ("Which month comes right after June?", {
        "July": 1, "After June comes July.": 1, "May or July": 0, "August": 0, "June": 0}),
    "legs": ("How many legs does a spider have?", {
        "8": 1, "A spider has eight legs.": 1, "Six": 0, "6 or 8": 0, "Many.": 0, "88": 0}),
    "colour": ("What colour is an elephant?", {
        "Grey": 1, "Elephants are gray.": 1, "grey or gray": 1, "Grey and brown": 0, "Greyish": 0, "pink": 0}),
    "first_letter": ('What is the first letter of the word "table"?', {
        "T": 1, 'It is a "t".': 1, "The letter 'T'.": 1, "t or e": 0, "E": 0, "table": 0, "It's hard.": 0}),
    "last_letter": ('What is the last letter of the word "book"?', {
        "K": 1, 'A book ends with "k".': 1, "B": 0, "b ... k": 0, "book": 0}),
    "next": ("Which whole number comes right after 49?", {
        "50": 1, "After 49 comes 50.": 1, "Fifty.": 1, "48": 0, "50 or 51": 0, "49": 0}),
    "continent": ("On which continent is Peru?", {
        "South America": 1, "Peru lies in South America.": 1, "America": 0, "North America": 0,
        "South America or North America": 0, "South of America": 0}),
    "country": ("In which country is the city of Rotterdam?", {
        "The Netherlands": 1, "Holland": 1, "Holland, that is the Netherlands": 1, "Belgium": 0,
        "The Netherlands or Belgium": 0, "Rotterdam": 0}),
    "language": ("Which language do most people in Iran speak?", {
        "Persian": 1, "They speak Farsi.": 1, "Arabic": 0, "Persian and Arabic": 0, "Iranian": 0}),
    "roman": ("Which number is the Roman numeral XIV?", {
        "14": 1, "XIV is fourteen.": 1, "16": 0, "X is 10 and IV is 4": 0, "XIV": 0}),
    "count": ("How many grams are in a kilogram?", {
        "1000": 1, "1,000 grams.": 1, "100": 0, "10,000": 0, "1000 or 100": 0, "Many grams.": 0}),
    "young": ("What is a young dog called?", {
        "A puppy": 1, "pup": 1, "A young dog is a puppy, or pup.": 1, "kitten": 0, "puppy or cub": 0, "dog": 0}),
}

FIVE = "One two three four five"
FORM_MARKS = {      # kind -> a demand, and answers with their marks
    "at_most": ("Answer in at most 12 words.", {
        " ".join("abcdefghijkl"): 1, " ".join("abcdefghijklm"): 0, "They like it - and they show it.": 1,
        "a b c d e": 1, "a b c d": 0, "yes yes yes yes yes yes": 0, "": 0, "  \n ": 0}),
    "at_least": ("Answer in at least 25 words.", {
        " ".join("abcdefghijklmnopqrstuvwxy"): 1, " ".join("abcdefghijklmnopqrstuvwx"): 0, "very " * 30: 0, FIVE: 0}),
    "sentences": ("Answer in exactly 3 sentences.", {
        "They like it. They rest! Who knows?": 1, 'They like it... They say "purr." They rest.': 1,
        "They like it, e.g. at night. They rest. Who knows": 1, "It is 3.5 a day. They rest. Who knows.": 1,
        "They like it. They rest now.": 0, "They like it. They rest. They eat. Who knows.": 0,
        "1. They like it.\n2. They rest.\n3. Who knows.": 1}),
    "paragraphs": ("Write exactly 2 paragraphs, with an empty line between them.", {
        "They like it.\n\nThey rest a lot.": 1, "They like it.\n \n\nThey rest a lot.\n": 1,
        "They like it.\nThey rest a lot.": 0, "They like\n\nit.\n\nThey rest a lot.": 0, "They like it and rest.": 0}),
    "numbered": ("Answer as a numbered list of 3 items.", {
        "1. They rest.\n2. They eat.\n3. They play.": 1, "So:\n\n1) Rest\n\n2) Food\n\n3) Play": 1,
        "**1.** rest\n**2. Food**\n3. play now": 0, "1. Rest now\n2. Eat well": 0, "- rest\n- eat\n- play\n": 0,
        "1. Rest 2. Eat 3. Play": 0, "1. a\n2. b\n3. c\n4. d": 0}),
    "bullets": ('Answer with exactly 2 bullet points, each on a line that starts with "- ".', {
        "- They rest.\n- They eat well.": 1, "So:\n- They rest.\n\n- They eat.": 1, "They rest - and - they eat.": 0,
        "- They rest and they eat.": 0, "1. They rest.\n2. They eat.": 0, "- They rest.\n- They eat.\n- Play.": 0}),
    "lower": ("Write everything in lower case.", {
        "they like it, i think.": 1, "They like it, i think.": 0, "they like it, I think.": 0}),
    "upper": ("Use capital letters only.", {
        "THEY LIKE IT, I THINK.": 1, "THEY LIKE IT, I THINk.": 0, "They like it, I think.": 0}),
    "no_comma": ("Answer without commas.", {"They like it and rest.": 1, "They like it, and rest.": 0}),
    "question": ("End your answer with a question.", {
        "They like it. Do you know?": 1, 'They ask: "Do you know?"': 1, "Do you know? They like it.": 0,
        "Why do cats purr?": 0, "Why do cats purr? End your answer with a question. Do you?": 0}),
    "exclamation": ("End your answer with an exclamation mark.", {
        "They like it very much!": 1, "Oh! They like it much.": 0, "They like it very much.": 0}),
    "digit": ("Mention a figure, in digits.", {
        "They purr 25 times a second.": 1, "25 times a second they purr.": 1, "They purr two times a second.": 0,
        "1. They like it.\n2. They rest.": 0, "1. They like 3 meals.\n2. They rest.": 1, "They like all of it 3.": 1}),
    "quoted": ("Wrap the whole answer in quotation marks.", {
        '"They like it very much."': 1, "“They like it.\nThey rest.”": 1, '"They" like it very much.': 0,
        'They like it very "much."': 0, "They like it very much.": 0}),
    "brackets": ("Put one remark in round brackets.", {
        "They like it (I think).": 1, "They like it [I think].": 0, "They like it very () much": 0,
        "1) They like it all": 0}),
    "one_line": ("Answer in one single line.", {
        "They like it. They rest a lot.\n": 1, "They like it.\nThey rest a lot.": 0}),
    "begin": ('Begin your answer with the word "Well".', {
        "Well, they like it much.": 1, "**WELL** they like it much": 1, "Wellness is what they like.": 0,
        "Well-being is what they like.": 0, "They like it very well.": 0, '"Well" is the word they like.': 0}),
    "end": ('End your answer with the words "Good luck".', {
        "They like it and rest. Good luck!": 1, "They like it and rest, good luck": 1,
        "Good luck with what they like.": 0, 'The last words are "Good luck."': 0, "They like it very much.": 0}),
    "avoid": ('Do not use the word "the".', {
        "They like it and rest.": 1, "Then they bathe and rest.": 1, "They like the warm place.": 0,
        "The cats like warm days.": 0}),
    "once": ('Use the word "time" exactly once.', {
        "They rest all the time.": 1, "Time to rest, they say.": 1, "They rest many times, sometimes.": 0,
        "Time and time they rest, too.": 0, 'Use the word "time" exactly once.': 0,
        'The word "time" is used here.': 0, "One uses 'time' very often.": 0}),
    "twice": ('Use the word "good" exactly twice.', {
        "Good cats like some good food.": 1, "Good cats like all the food.": 0,
        "Good good cats like some good food.": 0, 'The words "good" and "good" are here.': 0,
        'Good, good: use the word "good" exactly twice!': 0}),
}


def test_every_kind_has_marks():
    assert set(FACT_MARKS) == set(facts.KINDS) and set(FORM_MARKS) == set(form.KINDS)
    for kind, (query, marks) in FACT_MARKS.items():
        assert facts.parse(query).kind == kind and {0, 1} == set(marks.values())
    for kind, (demand, marks) in FORM_MARKS.items():
        assert form.parse(f"Why do cats purr? {demand}").kind == kind and {0, 1} == set(marks.values())


@pytest.mark.parametrize("kind", FACT_MARKS)
def test_marks_of_facts(kind):
    query, marks = FACT_MARKS[kind]
    assert {answer: facts.grade(query, answer) for answer in marks} == marks


@pytest.mark.parametrize("kind", FORM_MARKS)
def test_marks_of_forms(kind):
    demand, marks = FORM_MARKS[kind]
    assert {answer: form.grade(f"Why do cats purr? {demand}", answer) for answer in marks} == marks


# ---- The worlds ----------------------------------------------------------------------------------

def all_queries(world):
    return [text for texts in world.make_queries().values() for text in texts]


def test_there_are_enough_queries_and_none_twice(world):
    made = world.make_queries()
    queries, heldout = made["queries"], made["heldout"]
    assert len(world.KINDS) >= 12 and len(queries) >= 400 and len(heldout) >= 100
    assert len(set(queries + heldout)) == len(queries + heldout)
    kinds = [world.parse(query).kind for query in heldout]
    assert min(kinds.count(kind) for kind in world.KINDS) >= 3
    assert {world.parse(query).kind for query in queries[:100]} == set(world.KINDS)
    assert world.make_queries() == made and world.make_queries(seed=1)["heldout"] != heldout


def test_nothing_held_out_is_asked_in_other_words():
    made = facts.make_queries()
    asked, held = [{facts.parse(text)[:2] for text in made[name]} for name in ("queries", "heldout")]
    assert not asked & held
    assert asked == {facts.parse(text)[:2] for text in made["queries"][:len(asked)]}     # every fact once at first
    assert len(asked | held) == sum(map(len, facts.FACTS.values())) == len(facts.QUERIES) / 3
    made = form.make_queries()
    asked, held = [{form.parse(text).question for text in made[name]} for name in ("queries", "heldout")]
    assert not asked & held and asked | held == set(form.QUESTIONS) and len(asked | held) == len(form.QUESTIONS)


def test_every_fact_marks_its_own_answers_and_no_others():
    for kind in facts.FACTS:
        for fact in facts.FACTS[kind]:
            query, right = facts.ask(fact, 0), fact.right
            assert facts.parse(f" {query}\n") == fact
            for answer in right:
                assert facts.grade(query, answer) == facts.grade(query, f"The answer is {answer.upper()}.") == 1, fact
            asked = facts.normalise(query)
            others = {answer for other in facts.FACTS[kind] for answer in other.right} - set(right)
            others = sorted(other for other in others if facts.normalise(other) not in asked)
            for other in random.Random(query).sample(others, 2):
                assert facts.grade(query, other) == facts.grade(query, f"{right[0]} or {other}") == 0, (fact, other)


def test_an_echo_is_no_answer(world):
    for query in all_queries(world):
        assert world.grade(query, query) == 0, query


NUMERALS = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
OPERATIONS = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}


def solve(fact):
    """The right answer to what can be worked out; None for other kinds."""
    if fact.kind in ("sum", "difference", "product"):
        a, operation, b = fact.thing.split()
        return str(OPERATIONS[operation](int(a), int(b)))
    if fact.kind in ("first_letter", "last_letter"):
        return fact.thing[0 if fact.kind == "first_letter" else -1]
    if fact.kind == "next":
        return str(int(fact.thing.split()[1]) + 1)
    if fact.kind == "roman":
        values = [NUMERALS[letter] for letter in fact.thing]
        return str(sum(-a if a < b else a for a, b in zip(values, values[1:] + [0])))
    if fact.kind in ("day", "month"):
        order = [fact.thing.split()[1] for fact in facts.FACTS[fact.kind] if fact.thing.startswith("after")]
        side, thing = fact.thing.split()
        return order[(order.index(thing) + (1 if side == "after" else -1)) % len(order)]


def test_what_can_be_worked_out_is_right():
    solved = [fact for kind in facts.FACTS for fact in facts.FACTS[kind] if solve(fact)]
    assert len(solved) > 200 and [fact for fact in solved if fact.right != [solve(fact)]] == []


def obey(kind, word):
    """An answer that meets a demand."""
    number = int(word) if word.isdigit() else 0
    sentence = "They like it very much."
    return {
        "at_most": "they just like it so", "at_least": " ".join(f"word{i}" for i in range(50)),
        "sentences": " ".join([sentence] * number), "paragraphs": "\n\n".join([sentence] * number),
        "numbered": "\n".join(f"{i}. they like it very much" for i in range(1, number + 1)),
        "bullets": "\n".join(["- they like it very much"] * number),
        "lower": "they like it very much.", "upper": "THEY LIKE IT VERY MUCH.", "no_comma": "They like it very much.",
        "question": "They like it very much?", "exclamation": "They like it very much!",
        "digit": "They like it 9 times.", "quoted": '"They like it very much."',
        "brackets": "They like it (very much).",
        "one_line": "They like it very much.", "begin": f"{word} they like it very much.",
        "end": f"They like it very much. {word}.", "avoid": "They like it very much.",
        "once": f"They like it very much, {word}.", "twice": f"They {word} like it very much, {word}.",
    }[kind]


DISOBEY = ("They, all of them,\n\nLike to rest and the cat is the one of the house who, of all in it, is best.\n\n"
           "- x.\n- y.\n- z.\n- u.\n- v.\n\n1. X\n\nOf course.")


def test_every_demand_marks_what_obeys_it_and_not_what_ignores_it():
    seen = set()
    for query in all_queries(form):
        _, demand, kind, word = form.parse(query)
        seen.add(demand)
        assert form.grade(query, obey(kind, word)) == 1, (query, obey(kind, word))
        ignored = "They like it very much." if kind == "at_least" else DISOBEY
        assert form.grade(query, ignored) == 0, query
        if word.isdigit() and kind not in ("at_least", "at_most"):
            assert form.grade(query, obey(kind, str(int(word) + 1))) == 0, query
    assert seen == set(form.DEMANDS)


@pytest.mark.parametrize("query", ["Why?", "Why do cats purr?", "Why do cats purr? Answer in at most 13 words.", "",
                                   "What is the capital of Atlantis?", "sort these words : plum fox axe red"])
def test_queries_of_others_are_refused(world, query):
    with pytest.raises(UserError, match=f"{re.escape(repr(query))} is not a query of lab/"):
        world.grade(query, "Paris.")
    with pytest.raises(UserError, match=re.escape(f"on the query {query!r}: UserError")):
        cli.load_grader(world.__file__)(query, sso.Response("Paris.", True))


# ---- The commands and their files ----------------------------------------------------------------

def write_world(name, options, folder, monkeypatch):
    run_here(f"python -m lab.{name} --out {folder} {options}", monkeypatch)
    return {part: folder / f"{part}.jsonl" for part in ("queries", "heldout", "principles")}


@pytest.mark.parametrize("name", WORLDS)
def test_a_command_writes_queries_and_principles(name, tmp_path, monkeypatch):
    world = WORLDS[name]
    paths = write_world(name, "", tmp_path / "a", monkeypatch)
    made = world.make_queries()
    written = {}
    for part in made:
        records = [json.loads(line) for line in paths[part].read_text().splitlines()]
        assert records == [{"prompt": text} for text in made[part]]
        out = tmp_path / f"{part}.jsonl"
        generate.written_principles(paths["principles"], paths[part], out, TOY)
        written |= {record["prompt"][0]["content"]: record for record in files.read_jsonl(out)}
    assert set(written) == set(all_queries(world))
    for text, record in written.items():
        kind = world.KINDS[world.parse(text).kind]
        assert record["good_principle"] in kind["good"] and record["bad_principle"] in kind["bad"]
    used = {record[f"{side}_principle"] for record in written.values() for side in ("good", "bad")}
    assert used == {text for kind in world.KINDS.values() for side in ("good", "bad") for text in kind[side]}

    again = write_world(name, "", tmp_path / "b", monkeypatch)
    other = write_world(name, "--seed 1", tmp_path / "c", monkeypatch)
    for part in paths:
        assert again[part].read_bytes() == paths[part].read_bytes() != other[part].read_bytes()
    drawn = [{record["prompt"][0]["content"]: record for record in files.read_jsonl(made["principles"])}
             for made in (paths, other)]
    assert any(drawn[0][text] != drawn[1][text] for text in drawn[0].keys() & drawn[1].keys())


@pytest.mark.parametrize("name", WORLDS)
def test_long_principles_begin_with_the_short_ones(name, tmp_path, monkeypatch):
    short = files.read_jsonl(write_world(name, "", tmp_path / "a", monkeypatch)["principles"])
    long = files.read_jsonl(write_world(name, "--long 1", tmp_path / "b", monkeypatch)["principles"])
    for side in ("good_principle", "bad_principle"):
        for brief, full in zip(short, long, strict=True):
            assert full["prompt"] == brief["prompt"] and len(brief[side].split()) < 25
            assert full[side].startswith(f"{brief[side]} ")
            assert 30 <= len(full[side].split()) <= 60


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The toy world's tokenizer and model, without the seconds of a training."""
    folder = tmp_path_factory.mktemp("untrained")
    tokenizer = toy.make_tokenizer()
    tokenizer.save_pretrained(folder)
    toy.make_model(tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", WORLDS)
def test_a_toy_model_can_be_asked(name, untrained, tmp_path, monkeypatch):
    """Most words are unknown to it, and long prompts have to fit into its context: nothing breaks."""
    paths = write_world(name, "--long 1", tmp_path / "world", monkeypatch)
    records = sorted(files.read_jsonl(paths["principles"]), key=lambda record: -len(str(record)))[:24]
    principles = write_jsonl(tmp_path / "principles.jsonl", records)
    out = tmp_path / "responses.jsonl"
    generate.responses(untrained, principles, out, cli.change(TOY, responses={"max_new_tokens": 8}))
    grade = cli.load_grader(WORLDS[name].__file__)
    for record in files.read_jsonl(out):
        for column in sso.COLUMNS.values():
            response = sso.Response(record[column][0]["content"], record[f"{column}_finished"])
            assert grade(record["prompt"][0]["content"], response) in (0, 1)
