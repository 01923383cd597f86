"""The graders for real models: lab/facts.py, lab/form.py, lab/code.py, their queries, their principles by hand."""

import random
import re

import pytest

import generate
import sso
from conftest import TOY, run_here
from lab import code, facts, form, mixed
from plumbing.grader import load_grader
from plumbing.records import UserError, read_jsonl

WORLDS = {"facts": facts, "form": form}
KINDS = {facts: facts.KINDS, form: form.kinds_of("form")}
OTHERS = ("line", "language", "tone")       # worlds of lab/form.py


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

DEMANDS |= {      # of other worlds
    "Answer in German.": (
        ["Sie schnurren, wenn sie zufrieden sind und es warm ist."],
        ["They purr when they are content and it is warm.", "Ils ronronnent quand ils sont bien.", "In German: die Katze."]),
    "Answer in French.": (
        ["Ils ronronnent pour la joie, et dans le calme."],
        ["They purr when they are content.", "Sie schnurren, wenn sie zufrieden sind."]),
    "Answer in Spanish.": (
        ["Los gatos ronronean para la calma y por el calor."],
        ["They purr when they are content.", "Il gatto fa le fusa."]),
    "Answer in Italian.": (
        ["I gatti fanno le fusa per la gioia e non per il freddo."],
        ["They purr when they are content.", "Los gatos ronronean mucho."]),
    "Talk like a pirate.": (
        ["Ahoy, they purr for joy!", "Arrr, they like it so.", "They like it, ye see."],
        ["They like it very much!", "They are in the army, like yellow cats."]),
    "Sound thrilled.": (["Oh! They like it so much!"], ["They like it very much!", "They like it very much."]),
    "Sound unsure.": (
        ["Perhaps they like it, or maybe not."],
        ["They like it very much.", "Maybe they like it very much."]),
    "Answer as a letter.": (
        ["Dear friend,\nthey like it very much.\nYours, Tom"],
        ["Dear friend, they like it.", "They like it.\nYours, Tom", "Oh dear, they like it.\nYours"]),
}

CATS = "Why do cats purr? "
MARKS = FACTS | {CATS + demand: answers for demand, answers in DEMANDS.items()}
MARKS["What is a volcano?"] = (
    ["A mountain that spits hot fire.", "It spits fire" + " and ash" * 8 + "."],
    ["A mountain.\nIt spits hot fire and ash.", "It spits fire" + " and ash" * 9 + ".", "A volcano is what?"])


def test_every_kind_has_marks():
    assert {facts.parse(query).kind for query in FACTS} == set(facts.KINDS)
    assert {form.parse(CATS + demand).kind for demand in DEMANDS} | {"line"} == set(form.KINDS)


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
    assert min(kinds.count(kind) for kind in KINDS[world]) >= 3
    assert {world.parse(query).kind for query in queries[:100]} == set(KINDS[world])


@pytest.mark.parametrize("name", OTHERS)
def test_other_worlds_have_200_queries_held_out_whose_thing_no_query_asks_for(name, tmp_path, monkeypatch):
    run_here(f"python -m lab.form --out {tmp_path} --world {name}", monkeypatch)
    asked, held = [[form.parse(record["prompt"][0]["content"]) for record in read_jsonl(tmp_path / f"{part}.jsonl")]
                   for part in ("queries", "heldout")]
    assert len(set(asked)) == len(asked) >= 256 and len(set(held)) == len(held) == 200
    assert not {query.question for query in asked} & {query.question for query in held}
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
    assert used == {text for kind in KINDS[world] for side in ("good", "bad") for text in world.KINDS[kind][side]}
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
