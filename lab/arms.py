"""An arm of an experiment: steps 3 and 4 by one objective, with its loss and its settings.

    generator-sso/  pairs-sso.jsonl         step 3, and the sampling of step 4
    policy/  answers.jsonl  report.json     step 4, and what it gave: {name of the arm: measures}

What is complete is not made again. OUT.costs.json, beside each output, says what its step took.
lab/study.py runs arms in the toy world, and lab/real.py on real weights.
"""

import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import eval as evaluation
import generate
import sso
import train
from lab import results
from plumbing.recipes import change
from plumbing.records import as_lines, read_jsonl, write_text
from run import measured


class Start(NamedTuple):
    """What arms share."""
    policy: Path
    heldout: Path               # held-out queries
    answers: Path               # of the base model to them; win rates are over these
    grader: Path
    responses: Path = None      # of the policy, by steps 1 and 2


def timed(step, source, data, out, *arguments):
    """Run a step that writes OUT. The seconds and the peak memory of its first run go to
    OUT.costs.json."""
    costs = Path(f"{out}.costs.json")
    results.begin_peak()
    began = time.time()
    step(source, data, out, *arguments)
    if not costs.exists():
        write_text(costs, json.dumps({"seconds": time.time() - began,
                                      "peak bytes": results.peak_bytes()}))


def begin(writer, queries, policy, folder, recipe):
    """Steps 1 and 2 in a folder. WRITER is a chat model that writes principles, or a file of them.
    Returns the file of the policy's responses."""
    write = generate.principles
    if Path(writer).is_file():
        write = generate.written
    principles = folder / "principles.jsonl"
    timed(write, writer, queries, principles, recipe)
    responses = folder / "responses.jsonl"
    timed(generate.responses, policy, principles, responses, recipe)
    return responses


def generators(objective):
    """The generators of an arm: {objective: roles in which it answers}."""
    if objective == "two":      # one for each of L+ and L-, as the paper's Limitations suggest
        return {"plus": ("good",), "minus": ("bad",)}
    if objective != "cross" and sso.trains_generator(objective):
        return {objective: ("good", "bad")}
    return {}


def cross(source, out, seed):
    """Write pairs of y+ over the plain answer to another query: MIPO's way (arXiv 2603.19294) to
    have a loser without a bad principle and without a generator."""
    records = read_jsonl(source)
    order = random.Random(seed).sample(range(len(records)), len(records))
    for this, other in zip(order, order[1:] + order[:1]):
        records[this]["rejected"] = records[other]["original"]
        records[this]["rejected_finished"] = records[other]["original_finished"]
    write_text(out, as_lines(records))


def make_pairs(objective, start, out, recipe):
    """Step 3 and the sampling of step 4. Returns the file of the policy's pairs. If the arm has no
    generator, these are the policy's own responses."""
    pairs = start.responses
    if objective == "cross":
        pairs = out / "pairs.jsonl"
        cross(start.responses, pairs, recipe["run"]["seed"])
    for name, roles in generators(objective).items():
        own = change(recipe, generator={"objective": name})
        generator = out / f"generator-{name}"
        timed(train.generator, start.policy, start.responses, generator, own)
        source = pairs
        pairs = out / f"pairs-{name}.jsonl"
        timed(generate.responses, generator, source, pairs, own, roles)
    return pairs


def measure(name, model, start, out, recipe, pairs=None):
    """Sample a model's plain answers to held-out queries. Writes and returns OUT/report.json:
    measures of these answers, and of the pairs that the model was trained on."""
    answers = out / "answers.jsonl"
    timed(generate.responses, model, start.heldout, answers, recipe, ("original",))

    def measures(critic, limit):
        row = evaluation.measure_answers({"base": start.answers, name: answers}, critic)[name]
        if pairs:
            row |= evaluation.measure_pairs(pairs, start.policy, critic, recipe,
                                            recipe["policy"]["objective"])
            last = read_jsonl(model / "log.jsonl", needs=())[-1]
            row["policy's p(original)"] = last.get("p(original)")       # None: pairs without yo
        return {name: row}

    inputs = {"model": model, "answers": answers}
    return measured(out / "report.json", {"grader": start.grader}, inputs, recipe, measures)


def run_arm(name, objective, start, out, recipe, shared=None):
    """Run an arm, and return its report. Its objective is an entry of `sso.PAIRS`, "two" or
    "cross". Arms that only differ in their policy may share the folder of generator and pairs."""
    if objective in sso.PAIRS and not generators(objective):
        recipe = change(recipe, policy={"objective": objective})
    pairs = make_pairs(objective, start, shared or out, recipe)
    timed(train.policy, start.policy, pairs, out / "policy", recipe)
    return measure(name, out / "policy", start, out, recipe, pairs)
