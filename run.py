"""SSO from end to end: the paper's Figure 2 as code, and the baseline PBAA beside it.

    python run.py                       # the toy world: offline, under a minute
    python run.py --model M --queries Q.jsonl --recipe R.toml --out runs/NAME       # any chat model

One run is one folder. Each step reads the files of the steps before it. A step that is complete is
skipped, so the same command continues what was interrupted.
"""

import json
from functools import partial
from pathlib import Path

import eval as evaluation
import generate
import sso
import train
from plumbing import command
from plumbing.models import inspect_chat
from plumbing.outputs import Output, write_queries
from plumbing.recipes import PAPER, change, stage_settings
from plumbing.records import UserError, read_json, read_jsonl, split_queries, write_text
from toy import world

STAGES = ["principles", "responses", "generator", "policy"]
SHOWN = 2           # held-out queries whose answers are printed
LABELS = {"sso": "SSO", "policy": "PBAA"}


def run_round(policy, folder, recipe, objective, write_principles, judged_by):
    """Steps 1 to 4, from a policy, in a folder with queries.jsonl. A preflight looks at the pairs
    before each training."""
    principles = folder / "principles.jsonl"
    responses = folder / "responses.jsonl"
    pairs = pairs_of(folder, objective)

    # Step 1. A good and a bad principle, p+ and p-, for each query.
    write_principles(folder / "queries.jsonl", principles, recipe)

    # Step 2. The policy's responses: y+ under p+, y- under p-, and yo without a principle. The
    # generator needs yo for the queries that it trains on. The policy needs it for all queries if
    # its own pairs have yo.
    originals = recipe["generator"]["examples"]
    for pair in sso.PAIRS[recipe["policy"]["objective"]].values():
        if "original" in (pair.winner, pair.loser):
            originals = None
    generate.responses(policy, principles, responses, recipe, originals=originals)
    preflight(responses, policy, recipe, judged_by)

    # Step 3. The data generator is trained by L_SSO (Eq. 1), and samples new y+ and y-: the pairs.
    if sso.trains_generator(objective):
        train.train("generator", policy, responses, folder / "generator", recipe)
        generate.responses(folder / "generator", responses, pairs, recipe, roles=("good", "bad"))
        preflight(pairs, policy, recipe, judged_by)

    # Step 4. The policy (not the generator), by L_base(x, y+, y-) on the pairs.
    train.train("policy", policy, pairs, folder / "policy", recipe)


def pairs_of(folder, objective):
    """The pairs that the policy trains on: the generator's, or without step 3 its own responses."""
    if sso.trains_generator(objective):
        return folder / "pairs.jsonl"
    return folder / "responses.jsonl"


def run_all(model, folders, out, recipe, objective, write_principles, judged_by):
    """Rounds of the method, each from the policy of the one before, then the baseline and the
    report."""
    policies = {"base": model}
    pairs = {}
    policy = model
    for number, folder in enumerate(folders, 1):
        run_round(policy, folder, recipe, objective, write_principles, judged_by)

        # The baseline PBAA has no step 3: the policy is trained on its own y+ and y-.
        if number == 1 and objective != "policy":
            plain = change(recipe, policy={"objective": "policy"})
            train.train("policy", policy, folder / "responses.jsonl", out / "pbaa", plain)
            policies["PBAA"] = out / "pbaa"
            pairs["PBAA"] = (folder / "responses.jsonl", policy, "policy")

        name = LABELS.get(objective, objective)
        if len(folders) > 1:
            name = f"{name} {number}"
        policies[name] = folder / "policy"
        pairs[name] = (pairs_of(folder, objective), policy, recipe["policy"]["objective"])
        policy = folder / "policy"      # where the next round starts
    report(out, policies, pairs, recipe, judged_by)


def measured(path, judged_by, inputs, recipe, measure):
    """The measures in a JSON file. If they are not there yet, measure(critic, limit) makes them."""
    output = Output(path, recipe["prompts"]["judge"], inputs | judged_by)
    if not output.is_complete(remake=True):
        critic, limit = evaluation.load_critic(**judged_by, prompts=recipe["prompts"])
        measures = measure(critic, limit)
        path.unlink(missing_ok=True)        # so that no old one stands beside the new note
        output.write_note()
        write_text(path, json.dumps(measures, indent=1))
    return read_json(path)


def preflight(pairs, policy, recipe, judged_by):
    """Print whether pairs, sampled for a policy, are worth a training."""
    def measure(critic, limit):
        return evaluation.measure_pairs(pairs, policy, critic, recipe, limit=limit,
                                        only=evaluation.PREFLIGHT)

    path = pairs.with_suffix(".preflight.json")
    inputs = {"pairs": pairs, "policy": policy}
    evaluation.print_preflight(measured(path, judged_by, inputs, recipe, measure))


def report(out, policies, pairs, recipe, judged_by):
    """Sample every policy's answers to the held-out queries, and write report.json from these and
    from the pairs: {name: (file, the policy they are for, the objective that uses them)}."""
    heldout = out / "heldout.jsonl"
    answers = {name: out / f"answers_{name.replace(' ', '_')}.jsonl" for name in policies}

    def measure(critic, limit):
        for name, policy in policies.items():
            generate.responses(policy, heldout, answers[name], recipe, ["original"])
        rows = evaluation.measure_answers(answers, critic, limit)
        for name, (file, policy, used_in) in pairs.items():
            rows[name] |= evaluation.measure_pairs(file, policy, critic, recipe, used_in, limit)
        return rows

    inputs = {f"policy {name}": policy for name, policy in policies.items()}
    inputs["heldout"] = heldout
    measured(out / "report.json", judged_by, inputs, recipe, measure)
    evaluation.report([out])
    print_answers(answers)


def print_answers(paths):
    """Print the first held-out queries with the answers of every policy."""
    answers = {name: read_jsonl(path) for name, path in paths.items()}
    print("\nAnswers to held-out queries\n")
    for records in list(zip(*answers.values()))[:SHOWN]:
        print(f"  {'query':6} {records[0]['prompt'][-1]['content']}")
        for name, record in zip(answers, records):
            print(f"  {name:6} {sso.record_response(record, 'original').text}")
        print()


def check(recipe, model, queries, heldout, principles, principle_model, rounds, judge, server):
    """UserError if two flags exclude each other, a setting is out of range, or a model cannot be
    used."""
    if (model is None) != (queries is None):
        raise UserError("--model and --queries go together")
    if heldout and not queries:
        raise UserError("--heldout goes with --queries")
    if principles and principle_model:
        raise UserError("--principles and --principle-model exclude each other")
    if server and not (principle_model or judge):
        raise UserError("--server goes with --principle-model or --judge; --model is trained here")
    if principles:
        read_jsonl(principles, needs=(), uses=())
    for stage in STAGES:
        stage_settings(recipe, stage)
    if model:
        inspect_chat(model)
    if principle_model and not server:      # a server may be gone once it has written them
        inspect_chat(principle_model)


def run(recipe, model=None, queries=None, heldout=None, principles=None, principle_model=None,
        objective=None, rounds: int = 1, out="runs/toy", grader=None, judge=None,
        judge_pairs: int = evaluation.JUDGE_PAIRS, server=None):
    """Run the whole method and the baseline. Without a model they run in the toy world."""
    out = Path(out)
    seed = recipe["run"]["seed"]
    objective = objective or recipe["generator"]["objective"]
    check(recipe, model, queries, heldout, principles, principle_model, rounds, judge, server)
    stage = "policy"
    if sso.trains_generator(objective):
        stage = "generator"
    recipe = change(recipe, **{stage: {"objective": objective}})
    if model is None and judge is None:
        grader = grader or world.__file__
    judged_by = {"grader": grader, "judge": judge, "judge_pairs": judge_pairs,
                 "server": judge and server}
    evaluation.load_critic(**judged_by)             # before anything is written

    folders = [out]
    if rounds > 1:
        folders = [out / f"round{number}" for number in range(1, rounds + 1)]
    if model:
        records, heldout_records = split_queries(queries, heldout, seed)
    else:
        model = world.BASE
        records, heldout_records = world.make_records(seed, rounds)
    write_queries(out, folders, records, heldout_records, {"seed": seed, "objective": objective},
                  {"queries": queries, "heldout": heldout, "principles": principles})
    write_principles = partial(generate.principles, principle_model or model,
                               server=principle_model and server)
    if principles:
        write_principles = partial(generate.written, principles)
    run_all(model, folders, out, recipe, objective, write_principles, judged_by)


def default_recipe(args):
    """The toy's recipe, unless a model is given."""
    if args["model"]:
        return PAPER
    return world.RECIPE


if __name__ == "__main__":
    command.run(__doc__, run, default_recipe=default_recipe)
