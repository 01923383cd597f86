"""Short facts with one right answer: queries, principles by hand, and a program that grades.

    python -m lab.facts --out runs/facts [--count 128] [--long 1] [--seed 0]

This file is a grader (`--grader lab/facts.py`) for real models: an answer is right, 1, or wrong, 0.
The candidates are the answers to all queries of a kind, and some decoys. If a query asks for a
number, every number is a candidate. A right answer names the right candidate anywhere in its text,
and no other. What the query itself names does not count, and neither does what is denied ("not
Lyon"). So hedging ("Paris or Lyon") is wrong, and so is a right number after others on the way.
"""

import random
import re
from pathlib import Path
from typing import NamedTuple

from plumbing import command
from plumbing.recipes import load_toml
from plumbing.records import UserError, as_lines, write_text

WORLD = load_toml(Path(__file__).with_suffix(".toml"))
KINDS = WORLD["kinds"]
PHRASINGS = 3               # ways to ask of each kind
HELDOUT = 0.2               # share of each kind's facts


# ---- The facts -----------------------------------------------------------------------------------

class Fact(NamedTuple):
    kind: str
    thing: str
    right: list             # spellings and synonyms of the one right answer


def read_pairs(text):
    """The entries "thing: answer" of a text as pairs."""
    pairs = []
    for entry in text.split(","):
        thing, answer = entry.split(":")
        pairs.append((thing.strip(), answer.strip()))
    return pairs


def ask(fact, phrasing):
    """The text of a query for a fact."""
    return KINDS[fact.kind]["ask"][phrasing % PHRASINGS].format(fact.thing)


FACTS = {}                  # kind -> its facts
QUERIES = {}                # text of a query -> its fact
for kind in KINDS:
    pairs = read_pairs(KINDS[kind]["facts"])
    FACTS[kind] = [Fact(kind, thing, answer.split("|")) for thing, answer in pairs]
    for fact in FACTS[kind]:
        for phrasing in range(PHRASINGS):
            QUERIES[ask(fact, phrasing)] = fact


def parse(text):
    """The `Fact` that a query's text asks for; UserError if it is none of this world."""
    if text.strip() not in QUERIES:
        raise UserError(f"{text[:60]!r} is not a query of lab/facts.toml")
    return QUERIES[text.strip()]


# ---- The grader ----------------------------------------------------------------------------------

NUMBER_WORDS = dict(read_pairs(WORLD["numbers"]))
NUMBER = r"(?:(?<!\S)-)?\d+(?:\.\d+)?"
WORD = r"[^\W\d_]+(?:['-][^\W\d_]+)*"


def normalise(text):
    """The words of a text, in lower case, and its numbers, in digits, with a space around each;
    without what is denied."""
    text = text.lower().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)           # 1,000
    words = re.findall(f"{NUMBER}|{WORD}", text)
    text = " ".join(NUMBER_WORDS.get(word, word) for word in words)
    return re.sub(r" (not|\w+n't) (an? |the )?\S+", "", f" {text} ")


def find_candidates(fact, said):
    """What could be meant as an answer to the query for a fact; of numbers, those that were
    said."""
    if fact.right[0].isdigit():
        return re.findall(NUMBER, said)
    candidates = [decoy.format(fact.thing) for decoy in KINDS[fact.kind].get("decoys", [])]
    for other in FACTS[fact.kind]:
        candidates += other.right
    return candidates


def grade(query, response, finished=True):
    """1 if a response names the right answer and no other, else 0; whether it was cut off later
    does not matter."""
    fact = parse(query)
    asked = normalise(query)
    said = normalise(response)
    named = set()
    for candidate in map(normalise, find_candidates(fact, said)):
        if candidate in said and candidate not in asked:
            named.add(candidate)
    return float(bool(named) and named <= set(map(normalise, fact.right)))


# ---- The query files -----------------------------------------------------------------------------

def write_principles(text, world, kind, long, seed):
    """A record of principles for a query's text, by hand: a sentence of its kind; long ones go on
    with two general sentences."""
    record = {"prompt": text}
    for side in ("good", "bad"):
        rng = random.Random(f"{seed} {side} {text}")
        sentences = [rng.choice(world["kinds"][kind][side])]
        if long:
            sentences += rng.sample(world["general"][side], 2)
        record[f"{side}_principle"] = " ".join(sentences)
    return record


def write_world(out, world, parse, texts, count, long, seed):
    """Write queries.jsonl and heldout.jsonl, of `count` texts each, and principles.jsonl for
    both."""
    principles = []
    for name in texts:
        chosen = texts[name][:count]
        for text in chosen:
            principles.append(write_principles(text, world, parse(text).kind, long, seed))
        records = [{"prompt": text} for text in chosen]
        write_text(f"{out}/{name}.jsonl", as_lines(records))
    write_text(f"{out}/principles.jsonl", as_lines(principles))


def make_queries(seed=0):
    """{"queries": texts, "heldout": texts}, no fact in both. A first third of the queries asks for
    every fact once, the next thirds ask again in other words."""
    rng = random.Random(seed)
    kept = []
    held = []
    for facts in FACTS.values():
        shuffled = rng.sample(facts, len(facts))
        size = round(HELDOUT * len(facts))
        held += shuffled[:size]
        kept += shuffled[size:]
    rng.shuffle(kept)
    rng.shuffle(held)
    queries = []
    for again in range(PHRASINGS):
        queries += [ask(fact, number + again) for number, fact in enumerate(kept)]
    return {"queries": queries, "heldout": [ask(fact, i) for i, fact in enumerate(held)]}


def write(out, count: int = 10**6, long: int = 0, seed: int = 0):
    """Write `count` queries, as many held out, or all, and principles: short ones, or long."""
    write_world(out, WORLD, parse, make_queries(seed), count, long, seed)


if __name__ == "__main__":
    command.run(__doc__, write)
