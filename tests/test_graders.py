"""The graders for real models: lab/facts.py, lab/form.py and both as one, their queries, their principles by hand."""

import random
import re

import pytest

import generate
import sso
from conftest import TOY, run_here
from lab import facts, form, mixed
from plumbing.grader import load_grader
from plumbing.records import UserError, read_jsonl

WORLDS = {"facts": facts, "form": form}


@pytest.fixture(params=WORLDS.values(), ids=WORLDS)
def world(request):
    return request.param


# ---- Marks: of each kind a query, with right and with wrong answers ------------------------------

FACTS = {
    "What is the capital of France?": (
        ["Paris", "PARIS!", "The capital of France is Paris.", "**Paris**", "It is Paris, not Lyon."],
        ["", "Lyon.", "Paris or Lyon.", "Madrid, or maybe Paris", "It is not Paris.", "It isn't Paris.",
         "It isn’t Paris.", "Comparison is odious.", "The capital of France is France."]),
    'What is the plural of the noun "mouse"?': (
        ['The plural of "mouse" is "mice".', "Mice."],
        ["mouses", "mice or mouses", "mouse", "dice"]),
    'What is the past tense of the verb "go"?': (
        ["Went", "The past tense of go is 'went'."],
        ["goed", "went, or goed", "gone", "It will go."]),
    'What is the opposite of "cold"?': (
        ["The opposite of cold is hot.", "Warm.", "hot or warm"],
        ["hot or dry", "chilly", "cold"]),
    "What is 7 plus 5?": (
        ["12", "7 + 5 = 12.", "Twelve", "12 is what 7 and 5 make."],
        ["13", "12 or 13", "7 + 5", "-12", "= -12", "7-5=2", "It is 1.2", "twenty", "112"]),
    "What is 12 minus 4?": (
        ["12-4=8", "eight", "The answer is 8.", "one answer: 8"],
        ["-8", "7", "8.5", "12 minus 4"]),
    "What is 6 times 7?": (
        ["6 × 7 = 42", "6x7 is 42.", "\\(6 \\cdot 7 = 42\\)"],
        ["42, since 5 times 7 is 35", "43", "67"]),
    "Which chemical element has the symbol Al?": (
        ["Aluminium", "Al is aluminum.", "It's aluminum (aluminium)."],
        ["Aluminium or argon", "Al"]),
    "Which day of the week comes right after Monday?": (
        ["Tuesday", "The day after Monday is tuesday."],
        ["Wednesday", "Tuesday or Wednesday", "Monday"]),
    "Which month comes right after June?": (["July", "After June comes July."], ["May or July", "August", "June"]),
    "How many legs does a spider have?": (["8", "A spider has eight legs."], ["Six", "6 or 8", "Many.", "88"]),
    "What colour is an elephant?": (
        ["Grey", "Elephants are gray.", "grey or gray"],
        ["Grey and brown", "Greyish", "pink"]),
    'What is the first letter of the word "table"?': (
        ["T", 'It is a "t".', "The letter 'T'."],
        ["t or e", "E", "table", "It's hard."]),
    'What is the last letter of the word "book"?': (["K", 'A book ends with "k".'], ["B", "b ... k", "book"]),
    "Which whole number comes right after 49?": (["50", "After 49 comes 50.", "Fifty."], ["48", "50 or 51", "49"]),
    "On which continent is Peru?": (
        ["South America", "Peru lies in South America."],
        ["America", "North America", "South America or North America", "South of America"]),
    "In which country is the city of Rotterdam?": (
        ["The Netherlands", "Holland", "Holland, that is the Netherlands"],
        ["Belgium", "The Netherlands or Belgium", "Rotterdam"]),
    "Which language do most people in Iran speak?": (
        ["Persian", "They speak Farsi."],
        ["Arabic", "Persian and Arabic", "Iranian"]),
    "Which number is the Roman numeral XIV?": (["14", "XIV is fourteen."], ["16", "X is 10 and IV is 4", "XIV"]),
    "How many grams are in a kilogram?": (["1000", "1,000 grams."], ["100", "10,000", "1000 or 100", "Many grams."]),
    "What is a young dog called?": (
        ["A puppy", "pup", "A young dog is a puppy, or pup."],
        ["kitten", "puppy or cub", "dog"]),
}
DEMANDS = {       # behind a question
    "Answer in at most 12 words.": (
        ["a b c d e f g h i j k l", "They like it - and they show it.", "a b c d e"],
        ["a b c d e f g h i j k l m", "a b c d", "yes yes yes yes yes yes", "", "  \n "]),
    "Answer in at least 25 words.": (
        ["a b c d e f g h i j k l m n o p q r s t u v w x y"],
        ["a b c d e f g h i j k l m n o p q r s t u v w x", "very " * 30, "One two three four five"]),
    "Answer in exactly 3 sentences.": (
        ["They like it. They rest! Who knows?", 'They like it... They say "purr." They rest.',
         "They like it, e.g. at night. They rest. Who knows", "It is 3.5 a day. They rest. Who knows.",
         "1. They like it.\n2. They rest.\n3. Who knows."],
        ["They like it. They rest now.", "They like it. They rest. They eat. Who knows."]),
    "Write exactly 2 paragraphs, with an empty line between them.": (
        ["They like it.\n\nThey rest a lot.", "They like it.\n \n\nThey rest a lot.\n"],
        ["They like it.\nThey rest a lot.", "They like\n\nit.\n\nThey rest a lot.", "They like it and rest."]),
    "Answer as a numbered list of 3 items.": (
        ["1. They rest.\n2. They eat.\n3. They play.", "So:\n\n1) Rest\n\n2) Food\n\n3) Play"],
        ["**1.** rest\n**2. Food**\n3. play now", "1. Rest now\n2. Eat well", "- rest\n- eat\n- play\n",
         "1. Rest 2. Eat 3. Play", "1. a\n2. b\n3. c\n4. d"]),
    'Answer with exactly 2 bullet points, each on a line that starts with "- ".': (
        ["- They rest.\n- They eat well.", "So:\n- They rest.\n\n- They eat."],
        ["They rest - and - they eat.", "- They rest and they eat.", "1. They rest.\n2. They eat.",
         "- They rest.\n- They eat.\n- Play."]),
    "Write everything in lower case.": (
        ["they like it, i think."],
        ["They like it, i think.", "they like it, I think."]),
    "Use capital letters only.": (["THEY LIKE IT, I THINK."], ["THEY LIKE IT, I THINk.", "They like it, I think."]),
    "Answer without commas.": (["They like it and rest."], ["They like it, and rest."]),
    "End your answer with a question.": (
        ["They like it. Do you know?", 'They ask: "Do you know?"'],
        ["Do you know? They like it.", "Why do cats purr?",
         "Why do cats purr? End your answer with a question. Do you?"]),
    "End your answer with an exclamation mark.": (
        ["They like it very much!"],
        ["Oh! They like it much.", "They like it very much."]),
    "Mention a figure, in digits.": (
        ["They purr 25 times a second.", "25 times a second they purr.", "1. They like 3 meals.\n2. They rest.",
         "They like all of it 3."],
        ["They purr two times a second.", "1. They like it.\n2. They rest."]),
    "Wrap the whole answer in quotation marks.": (
        ['"They like it very much."', "“They like it.\nThey rest.”"],
        ['"They" like it very much.', 'They like it very "much."', "They like it very much."]),
    "Put one remark in round brackets.": (
        ["They like it (I think)."],
        ["They like it [I think].", "They like it very () much", "1) They like it all"]),
    "Answer in one single line.": (["They like it. They rest a lot.\n"], ["They like it.\nThey rest a lot."]),
    'Begin your answer with the word "Well".': (
        ["Well, they like it much.", "**WELL** they like it much"],
        ["Wellness is what they like.", "Well-being is what they like.", "They like it very well.",
         '"Well" is the word they like.']),
    'End your answer with the words "Good luck".': (
        ["They like it and rest. Good luck!", "They like it and rest, good luck"],
        ["Good luck with what they like.", 'The last words are "Good luck."', "They like it very much."]),
    'Do not use the word "the".': (
        ["They like it and rest.", "Then they bathe and rest."],
        ["They like the warm place.", "The cats like warm days."]),
    'Use the word "time" exactly once.': (
        ["They rest all the time.", "Time to rest, they say."],
        ["They rest many times, sometimes.", "Time and time they rest, too.", 'Use the word "time" exactly once.',
         'The word "time" is used here.', "One uses 'time' very often."]),
    'Use the word "good" exactly twice.': (
        ["Good cats like some good food."],
        ["Good cats like all the food.", "Good good cats like some good food.",
         'The words "good" and "good" are here.', 'Good, good: use the word "good" exactly twice!']),
}

CATS = "Why do cats purr? "
MARKS = FACTS | {CATS + demand: answers for demand, answers in DEMANDS.items()}


def test_every_kind_has_marks():
    assert {facts.parse(query).kind for query in FACTS} == set(facts.KINDS)
    assert {form.parse(CATS + demand).kind for demand in DEMANDS} == set(form.KINDS)


@pytest.mark.parametrize("query", MARKS)
def test_marks(query):
    right, wrong = MARKS[query]
    assert [answer for answer in right + wrong if mixed.grade(query, answer)] == right


# ---- The worlds ----------------------------------------------------------------------------------

def test_there_are_enough_queries_and_none_twice(world):
    queries, heldout = world.make_queries().values()
    assert len(set(queries)) >= 400 and len(set(heldout)) >= 100
    assert len(set(queries + heldout)) == len(queries + heldout)
    kinds = [world.parse(query).kind for query in heldout]
    assert min(kinds.count(kind) for kind in world.KINDS) >= 3
    assert {world.parse(query).kind for query in queries[:100]} == set(world.KINDS)


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


NUMERALS = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
SOLVERS = {     # kind -> the right answer for its thing, worked out
    "sum": lambda a, _, b: int(a) + int(b), "difference": lambda a, _, b: int(a) - int(b),
    "product": lambda a, _, b: int(a) * int(b), "next": lambda _, n: int(n) + 1,
    "first_letter": lambda word: word[0], "last_letter": lambda word: word[-1],
    "roman": lambda text: sum(-NUMERALS[a] if NUMERALS[a] < NUMERALS.get(b, 0) else NUMERALS[a]
                              for a, b in zip(text, text[1:] + " "))}


def test_what_can_be_worked_out_is_right():
    for kind, solve in SOLVERS.items():
        for fact in facts.FACTS[kind]:
            assert fact.right == [str(solve(*fact.thing.split()))], fact


OBEYED = {      # kind -> what meets any demand of it; {} is the word or number
    "at_most": "they just like it so", "at_least": " ".join(f"word{i}" for i in range(50)),
    "lower": "they like it very much.", "upper": "THEY LIKE IT VERY MUCH.", "no_comma": "They like it very much.",
    "question": "They like it very much?", "exclamation": "They like it very much!", "digit": "They like it 9 times.",
    "quoted": '"They like it very much."', "brackets": "They like it (very much).",
    "one_line": "They like it very much.", "begin": "{} they like it very much.",
    "end": "They like it very much. {}.", "avoid": "They like it very much.",
    "once": "They like it very much, {}.", "twice": "They {} like it very much, {}."}
REPEATED = {"sentences": "They like it very much. ", "paragraphs": "They like it very much.\n\n",
            "numbered": "1. they like it very much\n", "bullets": "- they like it very much\n"}
IGNORED = ("They, all of them,\n\nLike to rest and the cat is the one of the house who, of all in it, is best.\n\n"
           "- x.\n- y.\n- z.\n- u.\n- v.\n\n1. X\n\nOf course.")


def test_every_demand_marks_what_obeys_it_and_not_what_ignores_it():
    seen = set()
    for query in sum(form.make_queries().values(), []):
        _, demand, kind, word = form.parse(query)
        seen.add(demand)
        ignored = "They like it very much." if kind == "at_least" else IGNORED
        assert form.grade(query, ignored) == 0, query
        if kind in REPEATED:
            assert form.grade(query, REPEATED[kind] * int(word)) == 1, query
            assert form.grade(query, REPEATED[kind] * (int(word) + 1)) == 0, query
        else:
            assert form.grade(query, OBEYED[kind].replace("{}", word)) == 1, query
    assert seen == set(form.DEMANDS)


@pytest.mark.parametrize("query", ["Why?", "Why do cats purr?", "Why do cats purr? Answer in at most 13 words.", "",
                                   "What is the capital of Atlantis?", "sort these words : plum fox axe red"])
def test_queries_of_others_are_refused(world, query):
    with pytest.raises(UserError, match=re.escape(f"{query!r}: UserError: {query!r} is not a query of lab/")):
        load_grader(world.__file__)(query, sso.Response("Paris.", True))


# ---- The commands and their files ----------------------------------------------------------------

def write_world(name, options, folder, monkeypatch):
    """{part: records} of what a world's command writes."""
    run_here(f"python -m lab.{name} --out {folder} {options}", monkeypatch)
    return {part.stem: read_jsonl(part) for part in folder.iterdir()}


@pytest.mark.parametrize("name, world", WORLDS.items())
def test_a_command_writes_queries_and_principles(name, world, tmp_path, monkeypatch):
    written = write_world(name, "", tmp_path / "a", monkeypatch)
    made = world.make_queries()
    used = set()
    for part, texts in made.items():
        assert [record["prompt"][0]["content"] for record in written[part]] == texts
        generate.written(tmp_path / "a/principles.jsonl", tmp_path / f"a/{part}.jsonl", tmp_path / part, TOY)
        for text, record in zip(texts, read_jsonl(tmp_path / part), strict=True):
            kind = world.KINDS[world.parse(text).kind]
            for side in ("good", "bad"):
                assert record[f"{side}_principle"] in kind[side]
                used.add(record[f"{side}_principle"])
    assert used == {text for kind in world.KINDS.values() for side in ("good", "bad") for text in kind[side]}
    assert write_world(name, "", tmp_path / "b", monkeypatch) == written
    other = write_world(name, "--seed 1 --count 9", tmp_path / "c", monkeypatch)
    assert len(other["heldout"]) == 9 and other["queries"] != written["queries"][:9]
    long = write_world(name, "--long 1", tmp_path / "d", monkeypatch)
    for brief, full in zip(written["principles"], long["principles"], strict=True):
        for side in ("good_principle", "bad_principle"):
            assert full[side].startswith(f"{brief[side]} ") and len(brief[side].split()) < 25
            assert 30 <= len(full[side].split()) <= 60


def test_both_worlds_take_turns(tmp_path, monkeypatch):
    written = write_world("mixed", "--count 5", tmp_path, monkeypatch)
    texts = [record["prompt"][0]["content"] for record in written["heldout"]]
    assert [texts[::2], texts[1::2]] == [world.make_queries()["heldout"][:5] for world in WORLDS.values()]
