"""Short Python functions: queries, principles by hand, and a grader that runs what was written.

    python -m lab.code --out runs/code [--count 128] [--long 1] [--seed 0]

This file is a grader (`--grader lab/code.py`) for real models: 1 if the function returns what it
should in every call, else 0. The code of an answer runs in a process of its own with limits of time
and memory. It cannot use files, other programs or the network, and imports only what CHILD has
imported. This keeps a small model's mistakes harmless, but it is no prison: whoever names this
grader runs the code of a model.
"""

import functools
import json
import random
import re
import resource     # for CHILD: where it is missing, as on Windows, that is said at once
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from lab import facts
from plumbing import command
from plumbing.recipes import load_toml
from plumbing.records import UserError

WORLD = load_toml(Path(__file__).with_suffix(".toml"))
HELDOUT = 0.35      # share of the functions
SECONDS = 5
RIGHT = 42          # exit code of CHILD

# The process: it reads the code and the calls, gives up its rights, and runs them.
CHILD = """
import bisect, collections, copy, dataclasses, datetime, decimal, enum, fractions, functools, heapq
import itertools, json, math, operator, random, re, resource, statistics, string, sys, time, typing
given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))

def refuse(event, arguments):
    if event.split(".")[0] in ("open", "os", "socket", "subprocess", "shutil", "ctypes"):
        raise PermissionError(event)

sys.addaudithook(refuse)        # there is no way to take it away again
names = {"__name__": "answer"}
right = True
try:
    exec(given["code"], names)
    for call, expected in given["calls"]:
        right &= eval(call, names) == eval(expected, {"math": math, "collections": collections})
except BaseException:           # SystemExit, too
    right = False
if right:
    sys.exit(%d)
""" % RIGHT


# ---- The functions -------------------------------------------------------------------------------

class Function(NamedTuple):
    kind: str           # there is one
    head: str           # double(x)
    what: str           # that it returns
    calls: tuple        # pairs of expressions that should be equal

    @property
    def name(self):
        return self.head.partition("(")[0]


def read_function(line):
    head, what, expression, *calls = line.split(" | ")
    name, _, parameters = head.rstrip(")").partition("(")
    pairs = []
    for arguments in calls:
        pairs.append((f"{name}({arguments})", f"(lambda {parameters}: {expression})({arguments})"))
    return Function("function", head, what, tuple(pairs))


FUNCTIONS = [read_function(line) for line in WORLD["functions"].strip().split("\n")]
QUERIES = {}            # text of a query -> its function
for function in FUNCTIONS:
    for text in WORLD["ask"]:
        QUERIES[text.format(head=function.head, what=function.what)] = function


def parse(text):
    """The `Function` that a query asks for; UserError if it is none of this world."""
    if text.strip() not in QUERIES:
        raise UserError(f"{text[:60]!r} is not a query of lab/code.toml")
    return QUERIES[text.strip()]


# ---- The grader ----------------------------------------------------------------------------------

def find_code(response, name):
    """The first code block that defines a function; without one the whole response."""
    for block in re.findall(r"```\w*\n(.*?)(?:```|\Z)", response, re.DOTALL):
        if f"def {name}" in block:
            return block
    return response


@functools.cache
def runs(code, calls):
    """Whether all calls of some code give what they should."""
    try:
        child = subprocess.run([sys.executable, "-I", "-c", CHILD], text=True, timeout=SECONDS,
                               input=json.dumps({"code": code, "calls": calls}),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False
    return child.returncode == RIGHT


def grade(query, response, finished=True):
    """1 if a response has the function, and it is right, else 0."""
    function = parse(query)
    return float(runs(find_code(response, function.name), function.calls))


# ---- The query files -----------------------------------------------------------------------------

def make_queries(seed=0):
    """{"queries": texts, "heldout": texts}, no function in both. A first third of each asks for
    every function once, the next thirds ask again in other words."""
    rng = random.Random(seed)
    shuffled = rng.sample(FUNCTIONS, len(FUNCTIONS))
    size = round(HELDOUT * len(shuffled))
    texts = {}
    for name, functions in (("queries", shuffled[size:]), ("heldout", shuffled[:size])):
        asked = []
        for turn in range(len(WORLD["ask"])):
            for number, function in enumerate(functions):
                text = WORLD["ask"][(number + turn) % len(WORLD["ask"])]
                asked.append(text.format(head=function.head, what=function.what))
        texts[name] = asked
    return texts


def write(out, count: int = 10**6, long: int = 0, seed: int = 0):
    """Write `count` queries, as many held out, or all, and principles: short ones, or long."""
    facts.write_world(out, WORLD, parse, make_queries(seed), count, long, seed)


if __name__ == "__main__":
    command.run(__doc__, write)
