"""The method on real weights: SmolLM2, Qwen, or any small chat model.

    python -m lab.real worlds --model models/qwen --strong models/qwen-1.5b \\
        --recipe recipes/qwen.toml --out runs/worlds
    python -m lab.real base --model models/smollm2 --out runs/miniature/base
    python -m lab.real arms --model runs/miniature/base --recipe lab/miniature.toml \\
        --out runs/miniature/1 --seed 1
    python -m lab.real compare runs/miniature/1 runs/miniature/2 --grader lab/real.py \\
        --first "SSO, generator 2e-05, policy 2e-05" --out runs/miniature/both.json
    python -m lab.real ways --model models/smollm2 --principles runs/facts/principles.jsonl \\
        --grader lab/facts.py --out runs/ways/facts

`worlds` tries several kinds of query, with principles by hand, by the model itself and by a
stronger one: where can this model steer itself? `base` teaches a chat model the toy world's tasks
and principles in plain English, by a short supervised training. It then follows principles as the
toy's base does, and this file grades its answers. `arms` runs PBAA, SSO, y+ over yo and L+ alone
from one model (lab/arms.py), and with --names also y+ over the answer to another query.
OUT/report.json has the measures of all arms, and the seconds and the peak memory of every step. The
same command with other learning rates adds arms to it. `compare` takes several seeds as one. `ways`
compares prompts around a principle.
"""

import random
import re
import statistics
from pathlib import Path

import torch

import eval as evaluation
import generate
import sso
import train
from lab import arms as lab_arms, code, facts, form, results
from plumbing import command
from plumbing.outputs import write_queries
from plumbing.recipes import change, load_toml, read_recipe
from plumbing.records import (UserError, as_lines, read_json, read_jsonl, split_queries,
                              write_text)
from plumbing.tables import print_table, stat
from toy import world

RECIPE = read_recipe(Path(__file__).with_name("miniature.toml"))
WAYS = load_toml(Path(__file__).with_name("ways.toml"))
# Tokens of an answer, at most, in each world.
TOKENS = {"line": 64, "code": 128, "language": 48, "tone": 64, "facts": 32, "form": 64}
ARMS = {"PBAA": "policy", "SSO": "sso", "y+ over yo": "original", "L+ only": "plus",
        "y+ over another's yo": "cross"}
MEASURED = 64       # queries of a world whose p(.) is measured
FIRST = "PBAA,SSO,y+ over yo,L+ only"       # those that run without --names


# ---- The toy's texts as plain English ------------------------------------------------------------

def english(text):
    """A text of the toy world, where every sign is a word: "sort these words : fox axe"."""
    text = re.sub(r" (?=[:.!])", "", text)
    return text[:1].upper() + text[1:]


def words(text):
    """The toy's form of a text in English."""
    return " ".join(re.findall(r"\w+|[:.!]", text.lower()))


def grade(query, response, finished):
    return world.grade(words(query), words(response), finished)


def make_chat(rng):
    """(messages, answer): one of the toy base's training examples, in English."""
    system, query, answer = world.make_chat(rng)
    principles = re.fullmatch("bad guideline (.*) ### good guideline (.*)", answer)
    if principles:
        bad, good = map(english, principles.groups())
        answer = sso.fill(RECIPE["prompts"]["principles"]["answer"], bad=bad, good=good)
        return sso.principle_messages(english(query), RECIPE["prompts"]), answer
    messages = [{"role": "user", "content": english(query)}]
    if system:
        messages.insert(0, {"role": "system", "content": english(system)})
    return messages, english(answer)


def no_loss(policy_logps, ref_logps, tokens, **others):
    """A base loss of 0: what is left is γ L_sft, a supervised training on the winner."""
    return torch.zeros_like(policy_logps[0]), torch.zeros_like(policy_logps)


sso.BASE_LOSSES["none"] = no_loss
sso.REFERENCE_FREE.add("none")


def base(model, out, chats: int = 1600):
    """Teach a chat model the toy's tasks and principles."""
    rng = random.Random(0)
    records = []
    for _ in range(chats):
        messages, answer = make_chat(rng)
        records.append({"prompt": messages, "chosen": answer, "rejected": "Not looked at."})
    data = f"{out}.jsonl"
    write_text(data, as_lines(records))
    settings = {"base_loss": "none", "gamma": 1.0, "lr": 2e-4, "batch_size": 16}
    train.policy(model, data, out, change(RECIPE, policy=settings))


# ---- The arms ------------------------------------------------------------------------------------

def known(name, names):
    """The name. UserError unless it is one of the names."""
    if name not in names:
        raise UserError(f"{name!r} is none of: {'; '.join(names)}")
    return name


def arms(model, recipe, out: Path, queries=None, heldout=None, principles=None, grader=__file__,
         count: int = 160, names=FIRST):
    """Run arms from one model: by default in the miniature, with `count` queries of each kind."""
    seed = recipe["run"]["seed"]
    names = [known(name, ARMS) for name in names.split(",")]
    if queries:
        records, held = split_queries(queries, heldout, seed)
        random.Random(seed).shuffle(records)
    else:
        records, held = world.make_records(seed)
        for record in records + held:
            record["prompt"] = english(record["prompt"])
    write_queries(out, [out], records[:count], held[:count], {"seed": seed, "count": count},
                  {"queries": queries, "heldout": heldout})
    responses = lab_arms.begin(principles or model, out / "queries.jsonl", model, out, recipe)
    start = lab_arms.Start(model, out / "heldout.jsonl", out / "base" / "answers.jsonl", grader,
                           responses)
    rows = lab_arms.measure("base", model, start, out / "base", recipe)
    report = out / "report.json"
    if report.exists():
        rows |= read_json(report)["rows"]
    for name in names:
        shared, label = labels(name, recipe)
        rows |= lab_arms.run_arm(label, ARMS[name], start, out / label, recipe, out / shared)
        costs = {}
        for path in sorted(out.rglob("*.costs.json")):
            costs[str(path.relative_to(out))] = read_json(path)
        results.write(report, weights=results.sha256(model), rows=rows, costs=costs,
                      settings=recipe)
    evaluation.print_report(rows)


def labels(name, recipe):
    """The names of an arm's generator with its pairs, and of the whole arm, by learning rates."""
    if any(lab_arms.generators(ARMS[name])):
        name += f", generator {recipe['generator']['lr']}"
    return name, f"{name}, policy {recipe['policy']['lr']}"


def compare(folders, grader, first, out, recipe):
    """Several seeds of the same arms, with the same held-out queries. Writes and prints the quality
    of each arm, and how much better than it the arm FIRST answers, paired: a query's mark is its
    mean over the seeds, the standard error is over queries."""
    critic, _ = evaluation.load_critic(grader=grader)
    reports = [read_json(Path(folder, "report.json")) for folder in folders]
    known(first, reports[0]["rows"])
    marks = {}          # name -> of each query the mean over the seeds
    for name in reports[0]["rows"]:
        seeds = []
        for folder in folders:
            queries, answers = evaluation.read_answers(Path(folder, name, "answers.jsonl"))
            seeds.append([mark for mark, _ in critic(list(zip(queries, answers, answers)))])
        marks[name] = list(map(statistics.mean, zip(*seeds)))
    rows = {}
    for name in marks:
        gains = [ours - theirs for ours, theirs in zip(marks[first], marks[name])]
        rows[name] = {"quality": stat(marks[name]), f"{first} better by": stat(gains)}
        rows[name]["seeds"] = [report["rows"][name]["quality"]["mean"] for report in reports]
    results.write(out, rows=rows, reports=reports)
    print_table(rows, ["quality", f"{first} better by"])


# ---- Prompts around a principle ------------------------------------------------------------------

def ways(model, principles, grader, recipe, out: Path):
    """Compare the prompts of lab/ways.toml around a principle, on a file of principles."""
    critic, _ = evaluation.load_critic(grader=grader)
    plain = out / "original.jsonl"
    generate.responses(model, principles, plain, recipe, ("original",))
    rows = {}
    for name, prompts in WAYS.items():
        roles = {role: sso.PROMPTS[role] | prompts for role in ("good", "bad")}
        path = out / f"{name}.jsonl"
        generate.responses(model, plain, path, change(recipe, prompts=roles), ("good", "bad"))
        rows[name] = evaluation.measure_quality(read_jsonl(path), sso.L, critic)
    results.write(out / "report.json", rows=rows)
    print_table(rows, ["y+", "yo", "y-", "accuracy", "y+ over yo"])


# ---- Where can a model steer itself? -------------------------------------------------------------

def write_world(name, out, count, seed):
    """Write a world's files by its own program. Returns its grader."""
    if name in form.WORLDS:
        form.write(out, count, seed=seed, world=name)
        return form.__file__
    world = {"facts": facts, "code": code}[name]
    world.write(out, count, seed=seed)
    return world.__file__


def worlds(model, recipe, out: Path, strong=None, names=",".join(TOKENS), count: int = 200):
    """The preflight of a model on `count` queries of each world, with principles of several
    writers. STRONG is a model, or a folder of the principles that it wrote, <world>.jsonl."""
    seed = recipe["run"]["seed"]
    rows = {}
    for name in [known(name, TOKENS) for name in names.split(",")]:
        folder = out / name
        critic, _ = evaluation.load_critic(grader=write_world(name, folder, count, seed))
        own = change(recipe, responses={"max_new_tokens": TOKENS[name]})
        plain = folder / "original.jsonl"
        lab_arms.timed(generate.responses, model, folder / "queries.jsonl", plain, own,
                       ("original",))
        for writer, source in {"hand": folder / "principles.jsonl", "itself": model,
                               "stronger": strong}.items():
            if not source:
                continue
            write = generate.principles
            file = Path(source, f"{name}.jsonl")
            if file.exists():
                source = file
            if Path(source).is_file():
                write = generate.written
            principles = folder / writer / "principles.jsonl"
            lab_arms.timed(write, source, plain, principles, own)
            responses = folder / writer / "responses.jsonl"
            lab_arms.timed(generate.responses, model, principles, responses, own, ("good", "bad"))
            records = read_jsonl(responses)
            # p(.) costs as much as sampling, and varies less: a part of the queries will do.
            row = evaluation.measure_pairs(responses, model, None, own, only=MEASURED)
            row |= evaluation.measure_quality(records, sso.L, critic)
            row["fallback"] = stat([bool(record.get("fallback")) for record in records])
            row["verdict"] = evaluation.verdict(row).split(":")[0]
            rows[f"{name}, {writer}"] = row
            results.write(out / "report.json", weights=results.sha256(model), rows=rows,
                          settings=own)
    print_table(rows, ["y+", "yo", "y-", "accuracy", "y+ over yo", "p(chosen)", "p(original)",
                       "p(rejected)", "fallback", "verdict"])


if __name__ == "__main__":
    command.run(__doc__, base, arms, compare, ways, worlds)
