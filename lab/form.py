"""Everyday questions with one demand on the form of the answer, that a program checks.

    python -m lab.form --out runs/form [--count 128] [--long 1] [--seed 0]
    python -m lab.form --world line --out runs/line     # or language, or tone

This file is a grader (`--grader lab/form.py`) for real models: 1 if the demand is met, else 0. It
does not judge what is said. But fewer than five different words are no answer; repeated words of
the question and the demand do not count. A word in quotation marks is mentioned, not used. A
response that was cut off is judged as it stands. In the world `line` the demand is hidden: only the
principles tell that an answer should be one line of at most 20 words.
"""

import random
import re
from pathlib import Path
from typing import NamedTuple

from lab import facts
from plumbing import command
from plumbing.recipes import load_toml
from plumbing.records import UserError

WORLD = load_toml(Path(__file__).with_suffix(".toml"))
KINDS = WORLD["kinds"]
QUESTIONS = WORLD["questions"].strip().split("\n")
THINGS = WORLD["things"].replace("\n", " ").strip().split(", ")
ASKED = WORLD["asked"].strip().split("\n")          # of each thing
THINGS_ASKED = {asked.format(thing) for thing in THINGS for asked in ASKED}
WORLDS = {      # topics; how one asks about them; how many are held out, and in how many turns
    "form": (QUESTIONS, ["{}"], 20, 7),
    "language": (THINGS, ASKED, 200, 1), "tone": (THINGS, ASKED, 200, 1),
    "line": (THINGS, ASKED, 200, 1)}
LEAST_WORDS = 5             # different ones, of an answer


# ---- The grader ----------------------------------------------------------------------------------

class Query(NamedTuple):
    question: str
    demand: str
    kind: str
    word: str               # or number; empty where the kind has none


DEMANDS = {}                # text of a demand -> (kind, word)
for kind in KINDS:
    for word in KINDS[kind].get("words", [""]):
        for demand in KINDS[kind]["ask"]:
            DEMANDS[demand.format(word)] = kind, word


def parse(text):
    """The `Query` of a query's text; UserError if it is none of this world."""
    question, mark, demand = text.strip().partition("? ")
    question += mark.strip()
    known = question in THINGS_ASKED or demand and question in QUESTIONS
    if not known or demand not in DEMANDS:
        raise UserError(f"{text[:60]!r} is not a query of lab/form.toml")
    return Query(question, demand, *DEMANDS[demand])


def grade(query, response, finished=True):
    """1 if a response is an answer and meets the demand, else 0."""
    query = parse(query)
    own = response.lower()
    for given in (query.question, query.demand.rstrip(".")):
        own = own.replace(given.lower(), "")
    if len(set(own.split())) < LEAST_WORDS:
        return 0.0
    text = response.strip()
    if query.word:
        text = re.sub(rf"[\"'“]{query.word}\W?[\"'”]", "", text)     # mentioned, not used
    kind = KINDS[query.kind]
    found = re.findall(kind["pattern"].replace("{}", query.word), text)
    number = {"n": query.word}
    least, most = [float(number.get(times, times)) for times in kind["times"]]
    return float(least <= len(found) <= most)


# ---- The query files -----------------------------------------------------------------------------

def kinds_of(world):
    return [kind for kind in KINDS if KINDS[kind].get("world", "form") == world]


def combine(topics, asked, kinds, turns, rng):
    """A question about every topic, with a demand, and so in each turn. The ways to ask and the
    kinds of demand take turns, too."""
    texts = []
    for turn in range(turns):
        for number, topic in enumerate(topics):
            question = asked[turn % len(asked)].format(topic)
            kind = kinds[(number + turn) % len(kinds)]
            demands = [demand for demand in DEMANDS if DEMANDS[demand][0] == kind]
            texts.append(f"{question} {rng.choice(demands)}".strip())
    return texts


def make_queries(seed=0, world="form"):
    """{"queries": texts, "heldout": texts} of a world, no topic in both; each turn of the queries
    asks about every topic once."""
    rng = random.Random(seed)
    kinds = kinds_of(world)
    pool, asked, held, turns = WORLDS[world]
    topics = rng.sample(pool, len(pool))
    return {"queries": combine(topics[held:], asked, kinds, max(len(kinds), len(asked)), rng),
            "heldout": combine(topics[:held], asked, kinds, turns, rng)}


def write(out, count: int = 10**6, long: int = 0, seed: int = 0, world="form"):
    """Write `count` queries of a world (form, language, tone, line), as many held out, or all, and
    principles: short ones, or long."""
    if world not in WORLDS:
        raise UserError(f"--world {world}: it is one of {', '.join(WORLDS)}")
    facts.write_world(out, WORLD, parse, make_queries(seed, world), count, long, seed)


if __name__ == "__main__":
    command.run(__doc__, write)
