"""The whole path: on real architectures, by every objective, over rounds, and killed at any moment."""

import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import generate
import run
import sso
import train
from conftest import ROOT, TOY, make_checkpoint, run_here, write_jsonl
from lab import toy
from plumbing import cli, files
from plumbing.files import UserError

SMALL = ("--principles.max-new-tokens 6 --responses.max-new-tokens 6 --responses.batch-size 4 --generator.lr 1e-3 "
         "--policy.lr 1e-3 --policy.batch-size 3 --generator.batch-size 2 --policy.micro-batch-tokens 900")
FEW = cli.change(TOY, principles={"max_new_tokens": 24}, responses={"max_new_tokens": 8}, generator={"epochs": 1})


def small_run(base, tmp_path, recipe=FEW, count=16, **options):
    """A run on a few queries, graded. Returns its folder and its report."""
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": query} for query in toy.make_queries(5)[0][:count]])
    options = {"model": base, "queries": queries, "out": tmp_path / "run", "grader": toy.__file__} | options
    run.run(copy.deepcopy(recipe), **options)
    return options["out"], read_json(options["out"] / "report.json")


def read_json(path):
    return json.loads(path.read_text())


def made_from(folder, name):
    """The model that an output of a folder was made from."""
    path = folder / name
    if path.is_dir():
        return (path / read_json(path / "args.json")["model"]).resolve()
    return (path.parent / read_json(folder / f"{name}.args.json")["model"]).resolve()


def texts(path, column):
    return [record[column][-1]["content"] for record in files.read_jsonl(path)]


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---- The whole path ------------------------------------------------------------------------------

def test_the_whole_path_on_a_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    """Qwen2, Qwen3 and Llama, with their own templates: all four steps, again without doing anything, continued."""
    prompts = ["Name a fruit.", "Why is the sky blue?", "Write a haiku about rain.", "2 + 2?", "Say hi.", "And you?"]
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": prompt, "source": "me"} for prompt in prompts])
    out = tmp_path / "run"
    line = f"python run.py --model {checkpoint} --queries {queries} --out {out} {SMALL}"
    run_here(line, monkeypatch)
    printed = capsys.readouterr().out
    report = read_json(out / "report.json")
    assert list(report) == ["base", "PBAA", "SSO"] and "| SSO " in printed
    assert printed.count("Preflight, 5 queries") == printed.count("is not known: give --grader or --judge") == 2
    for name in ("PBAA", "SSO"):
        assert 0 < report[name]["p(chosen)"]["mean"] < 1
        assert not {"accuracy", "ties", "quality", "win rate", "y+"} & report[name].keys()          # there is no critic
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name in ("generator", "policy", "pbaa"):                 # ordinary folders, tokenizer and template included
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out / name), AutoTokenizer.from_pretrained(out / name)
        assert model.dtype == torch.float32
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(checkpoint).chat_template
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters()))
        assert model.generation_config.repetition_penalty == base.generation_config.repetition_penalty == 1.1
    pairs = [json.loads(text) for text in (out / "pairs.jsonl").read_text().splitlines()]
    assert all([message["role"] for message in pair["prompt"] + pair["chosen"] + pair["rejected"]]
               == ["user", "assistant", "assistant"] for pair in pairs)
    held, used = set(texts(out / "heldout.jsonl", "prompt")), set(texts(out / "queries.jsonl", "prompt"))
    assert len(held) == 1 and held | used == set(prompts) and not held & used

    before = times(out)
    run_here(line, monkeypatch)
    assert before == times(out)
    weights = (out / "policy/model.safetensors").read_bytes()
    shutil.rmtree(out / "policy")
    (out / "report.json").unlink()
    run_here(line, monkeypatch)
    assert (out / "policy/model.safetensors").read_bytes() == weights and read_json(out / "report.json") == report

    for other, message in ((line + " --seed 1", "was made with seed = 0, not 1"),
                           (line + " --generator.beta 0.3", "generator was made with beta = 0.1, not 0.3"),
                           (line.replace("--generator.lr 1e-3", ""), "generator was made with lr = 0.001, not 5e-07")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            run_here(other, monkeypatch)
    # Each step is made of what the paper says: the original policy is trained, not the generator.
    made_of = {name: read_json(out / name) for name in (
        "generator/args.json", "policy/args.json", "pbaa/args.json", "pairs.jsonl.args.json")}
    base, lr = os.path.relpath(checkpoint, out / "policy"), 1e-3
    assert [(note["model"], note.get("data"), note.get("lr")) for note in made_of.values()] == [
        (base, "../responses.jsonl", lr), (base, "../pairs.jsonl", lr), (base, "../responses.jsonl", lr),
        ("generator", None, None)]
    assert made_from(out, "responses.jsonl") == made_from(out, "principles.jsonl") == checkpoint


def test_without_a_model_the_toy_world_is_run(toy_base, tmp_path, monkeypatch):
    seeds = []
    def build(out, seed=0, steps=0):
        seeds.append(seed)
        shutil.copytree(toy_base, out)
    monkeypatch.setattr(toy, "build", build)
    monkeypatch.setattr(toy, "QUERIES", 8)
    monkeypatch.setattr(toy, "HELDOUT", 6)
    monkeypatch.chdir(tmp_path)
    line = "python run.py --seed 4 --generator.epochs 1 --rounds 2"
    run_here(line, monkeypatch)
    out = tmp_path / "runs/toy"
    before = times(out)
    run_here(line, monkeypatch)
    assert seeds == [4] and before == times(out)
    queries, heldout = toy.make_queries(4, rounds=2)
    assert texts(out / "heldout.jsonl", "prompt") == heldout
    assert [texts(out / f"round{number}/queries.jsonl", "prompt") for number in (1, 2)] == [queries[::2], queries[1::2]]
    note = read_json(out / "round1/generator/args.json")
    assert note["lr"] == 6e-4 and note["epochs"] == 1 and note["seed"] == 4         # of recipes/toy.toml; of the flags
    assert made_from(out / "round1", "policy") == out / "base"
    grades = [toy.grade(record["prompt"][0]["content"], record["original"][0]["content"], record["original_finished"])
              for record in files.read_jsonl(out / "answers_SSO_2.jsonl")]
    assert read_json(out / "report.json")["SSO 2"]["quality"]["mean"] == pytest.approx(sum(grades) / 6)


def test_the_run_says_who_is_better_as_the_measures_do(toy_base, tmp_path):
    """What the report holds, measured again from the files: p(.) under the policy that the pairs are for."""
    out, report = small_run(toy_base, tmp_path)
    grader, _ = evaluation.load_critic(grader=toy.__file__)
    for name, pairs in (("PBAA", "responses.jsonl"), ("SSO", "pairs.jsonl")):
        measures = evaluation.measure_pairs(out / pairs, toy_base, grader, FEW)
        assert {key: report[name][key] for key in measures} == measures
        assert {"accuracy", "p(chosen)", "p(rejected)", "p(original)", "y+", "yo", "y-"} < measures.keys()
    answers = {name: out / f"answers_{name}.jsonl" for name in report}
    for name, measures in evaluation.measure_answers(answers, grader).items():
        assert {key: report[name][key] for key in measures} == measures
    for name, policy in (("base", toy_base), ("PBAA", out / "pbaa"), ("SSO", out / "policy")):
        assert made_from(out, f"answers_{name}.jsonl") == policy
    # Both arms have the same queries and principles; the generator has answered anew, and left yo as it was.
    assert made_from(out, "pairs.jsonl") == out / "generator" != made_from(out, "policy")
    assert texts(out / "responses.jsonl", "original") == texts(out / "pairs.jsonl", "original")
    assert texts(out / "responses.jsonl", "chosen") != texts(out / "pairs.jsonl", "chosen")


# ---- Everything that is compared -----------------------------------------------------------------

def sampled_originals(out):
    return sum("original" in record for record in files.read_jsonl(out / "responses.jsonl"))


@pytest.mark.parametrize("objective", ["policy", "original", "joint"])
def test_without_a_generator_the_policys_own_pairs_are_used(toy_base, tmp_path, objective):
    recipe = FEW
    if objective != "joint":
        recipe = cli.change(FEW, generator={"examples": 4})
    out, report = small_run(toy_base, tmp_path, recipe, objective=objective, base_loss="ipo")
    note = read_json(out / "policy/args.json")
    assert sampled_originals(out) == {"policy": 4}.get(objective, 14)       # of all queries where the policy needs yo
    assert not (out / "generator").exists() and not (out / "pairs.jsonl").exists()
    assert (note["data"], note["base_loss"], note["objective"]) == ("../responses.jsonl", "ipo", objective)
    assert list(report) == {"policy": ["base", "PBAA"]}.get(objective, ["base", "PBAA", objective])
    if objective == "original":
        assert report["original"]["p(rejected)"] == report["PBAA"]["p(original)"] != report["PBAA"]["p(rejected)"]


def test_a_policy_that_learns_from_yo_has_it_for_all_queries(toy_base, tmp_path):
    out, _ = small_run(toy_base, tmp_path, cli.change(FEW, generator={"examples": 4}), objective="joint")
    assert sampled_originals(out) == 14


@pytest.mark.parametrize("objective", ["plus", "minus", "eq3"])
def test_an_ablation_trains_the_generator_by_its_rows_and_the_policy_as_ever(toy_base, tmp_path, objective):
    out, report = small_run(toy_base, tmp_path, cli.change(FEW, generator={"examples": 4}), objective=objective)
    assert sampled_originals(out) == 4                                      # of those that the generator is trained on
    policy = read_json(out / "policy/args.json")
    assert read_json(out / "generator/args.json")["objective"] == objective and objective in report
    assert policy["objective"] == "policy" and policy["data"] == "../pairs.jsonl"
    first = json.loads((out / "generator/log.jsonl").read_text().splitlines()[0])
    terms = {key.split()[-1] for key in first if " L" in key}
    assert terms == ({"L+", "L-"} if objective == "eq3" else set())


def test_an_objective_of_ones_own_goes_through_the_whole_pipeline(toy_base, tmp_path, monkeypatch):
    """One row added to the table: under x+ yo rather than y-, under x- y- rather than yo."""
    terms = {"A": sso.Pair("good", winner="original", loser="bad"),
             "B": sso.Pair("bad", winner="bad", loser="original")}
    monkeypatch.setitem(sso.PAIRS, "mine", terms)
    out, report = small_run(toy_base, tmp_path, objective="mine")
    first = json.loads((out / "generator/log.jsonl").read_text().splitlines()[0])
    assert read_json(out / "generator/args.json")["objective"] == "mine" and {"loss A", "loss B"} < first.keys()
    assert list(report) == ["base", "PBAA", "mine"] and read_json(out / "policy/args.json")["objective"] == "policy"
    assert made_from(out, "pairs.jsonl") == out / "generator"
    # One that answers the plain query trains the policy, without a generator.
    monkeypatch.setitem(sso.PAIRS, "plain", {"C": sso.Pair("original", winner="bad", loser="good")})
    out, report = small_run(toy_base, tmp_path, objective="plain", out=tmp_path / "plain")
    assert not (out / "generator").exists() and read_json(out / "policy/args.json")["objective"] == "plain"
    assert report["plain"]["p(chosen)"] == report["PBAA"]["p(rejected)"]                    # y- is the winner here
    assert report["plain"]["accuracy"]["mean"] == pytest.approx(1 - report["PBAA"]["accuracy"]["mean"])


def simpo_loss(policy_logps, ref_logps, tokens, beta, margin, **others):
    """SimPO (Meng et al. 2024): mean log-probs, no reference, a margin."""
    rewards = beta * policy_logps / tokens
    return -torch.nn.functional.logsigmoid(rewards[0] - rewards[1] - margin), rewards.detach()


def test_a_base_loss_of_ones_own_goes_through_the_pipeline_and_reads_no_reference(toy_base, tmp_path, monkeypatch):
    monkeypatch.setitem(sso.BASE_LOSSES, "simpo", simpo_loss)
    monkeypatch.setattr(sso, "REFERENCE_FREE", {"simpo"})
    passes = []
    score = train.score
    monkeypatch.setattr(train, "score", lambda *args, **how: passes.append(how) or score(*args, **how))
    small_run(toy_base, tmp_path, out=tmp_path / "dpo")
    assert len(passes) == 3                                                     # generator, policy and PBAA
    path = tmp_path / "simpo.toml"
    path.write_text('[generator]\nbeta = 2\nmargin = 0.5\n[policy]\nbeta = 2.0\nmargin = 0.25\n')
    recipe = cli.read_recipe(path)
    recipe = cli.change(FEW, **{stage: {key: recipe[stage][key] for key in ("beta", "margin")}
                                for stage in ("generator", "policy")})
    out, report = small_run(toy_base, tmp_path, recipe, base_loss="simpo")
    assert len(passes) == 3 and list(report) == ["base", "PBAA", "SSO"]
    for name, margin in (("generator", 0.5), ("policy", 0.25), ("pbaa", 0.25)):
        note, rows = read_json(out / name / "args.json"), (out / name / "log.jsonl").read_text().splitlines()
        assert (note["base_loss"], note["margin"], note["beta"]) == ("simpo", margin, 2)
        assert json.loads(rows[0])["base"] != pytest.approx(math.log(2), abs=1e-4)


def test_every_round_is_a_folder_that_starts_from_the_policy_before(toy_base, tmp_path):
    writer = shutil.copytree(toy_base, tmp_path / "writer")
    how = {"rounds": 3, "principle_model": writer, "count": 24}
    out, report = small_run(toy_base, tmp_path, **how)
    assert list(report) == ["base", "PBAA", "SSO 1", "SSO 2", "SSO 3"]
    seen, before = [], toy_base
    for number in (1, 2, 3):
        folder = out / f"round{number}"
        for part in ("generator", "policy", "responses.jsonl"):
            assert made_from(folder, part) == before
        assert made_from(folder, "principles.jsonl") == writer
        assert made_from(folder, "pairs.jsonl") == folder / "generator"
        assert read_json(folder / "policy/args.json")["data"] == "../pairs.jsonl"
        measures = evaluation.measure_pairs(folder / "pairs.jsonl", before, None, FEW)      # under the policy before
        assert report[f"SSO {number}"]["p(rejected)"] == measures["p(rejected)"]
        seen += texts(folder / "queries.jsonl", "prompt")
        before = folder / "policy"
    assert made_from(out, "pbaa") == toy_base and made_from(out, "answers_SSO_2.jsonl") == out / "round2/policy"
    held = texts(out / "heldout.jsonl", "prompt")
    assert len(set(seen)) == len(seen) and not set(seen) & set(held) and len(seen) + len(held) == 24
    made = times(out)
    small_run(toy_base, tmp_path, **how)
    assert made == times(out)


def test_principles_by_hand_of_a_control_world(toy_base, tmp_path, monkeypatch):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": query} for query in toy.make_queries(5)[0][:16]])
    written, out = tmp_path / "written.jsonl", tmp_path / "run"
    run_here(f"python -m lab.toy principles --world on-policy --queries {queries} --out {written} --seed 1",
             monkeypatch)
    run_here(f"python run.py --model {toy_base} --queries {queries} --recipe {toy.RECIPE} --principles {written} "
             f"--out {out} --generator.epochs 1 --responses.max-new-tokens 8 --seed 3", monkeypatch)
    for record in files.read_jsonl(out / "principles.jsonl"):
        by_hand = toy.write_principles(record["prompt"][0]["content"], "on-policy", 1)
        assert [record[key] for key in ("good_principle", "bad_principle")] == [
            by_hand[key] for key in ("good_principle", "bad_principle")]
        assert record["bad_principle"].startswith("copy the query")
    # The run's seed is that of every step.
    notes = ("principles.jsonl.args.json", "responses.jsonl.args.json", "generator/args.json", "policy/args.json",
             "answers_SSO.jsonl.args.json")
    assert [read_json(out / note)["seed"] for note in notes] == [3] * 5


def test_a_recipe_reaches_every_stage_and_a_flag_overrides_it(toy_base, tmp_path, monkeypatch):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("""
[run]
seed = 9
[principles]
max_new_tokens = 20
temperature = 0.5
[responses]
max_new_tokens = 7
batch_size = 5
[generator]
lr = 2e-3
epochs = 2
base_loss = "ipo"
beta = 0.3
[policy]
lr = 3e-3
batch_size = 4
warmup = 0.5
[prompts]
fallback_good = "go from a to z"
[prompts.good]
system = "{principle}"
user = "{query}"
[prompts.bad]
system = "{principle}"
user = "{query}"
[prompts.original]
system = ""
user = "sort {query}"
""")
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": query} for query in toy.make_queries(5)[0][:12]])
    out = tmp_path / "run"
    # The paper's prompt for principles is too long for the toy model: they are written by hand.
    written = write_jsonl(tmp_path / "w.jsonl",
                          [toy.write_principles(query, "junk", 1) for query in texts(queries, "prompt")])
    run_here(f"python run.py --model {toy_base} --queries {queries} --recipe {recipe} --principles {written} "
             f"--out {out} --policy.lr 4e-3", monkeypatch)
    paper = cli.read_recipe()
    def note(name):
        return read_json(out / name)
    for name in ("responses.jsonl", "pairs.jsonl", "answers_base.jsonl", "answers_PBAA.jsonl"):
        made = note(f"{name}.args.json")
        assert (made["max_new_tokens"], made["batch_size"], made["seed"]) == (7, 5, 9)
        assert made["temperature"] == paper["responses"]["temperature"]
    assert note("responses.jsonl.args.json")["good"] == {"system": "{principle}", "user": "{query}"}
    assert note("answers_base.jsonl.args.json")["original"]["user"] == "sort {query}"
    generator = {"lr": 2e-3, "epochs": 2, "base_loss": "ipo", "beta": 0.3, "seed": 9,
                 "gamma": paper["generator"]["gamma"]}
    policy = {"lr": 4e-3, "batch_size": 4, "warmup": 0.5, "base_loss": "dpo", "seed": 9, "epochs": 1}
    for name, expected in (("generator", generator), ("policy", policy), ("pbaa", policy)):
        made = note(f"{name}/args.json")
        assert {key: made[key] for key in expected} == expected
    assert note("policy/args.json")["original"]["user"] == "sort {query}" and "good" not in note("policy/args.json")
    principles = tmp_path / "p.jsonl"
    generate.principles(toy_base, queries, principles, cli.change(
        cli.read_recipe(recipe), prompts={"principles": toy.PROMPTS["principles"]}))
    made = read_json(tmp_path / "p.jsonl.args.json")
    expected = {"max_new_tokens": 20, "temperature": 0.5, "seed": 9, "fallback_good": "go from a to z"}
    assert {key: made[key] for key in expected} == expected


def test_held_out_queries_of_another_run_make_the_tables_comparable(toy_base, tmp_path):
    first, one = small_run(toy_base, tmp_path, objective="policy", out=tmp_path / "first", count=20)
    second, other = small_run(toy_base, tmp_path, objective="original", out=tmp_path / "second", count=12,
                              heldout=first / "heldout.jsonl")
    assert (first / "heldout.jsonl").read_bytes() == (second / "heldout.jsonl").read_bytes()
    assert one["base"] == other["base"] and one["PBAA"]["answers"] == other["PBAA"]["answers"] == 2
    held = [record["prompt"] for record in files.read_jsonl(first / "heldout.jsonl")]
    used = [record["prompt"] for record in files.read_jsonl(second / "queries.jsonl")]
    assert len(used) >= 10 and not any(prompt in held for prompt in used)    # no tenth of its own is held out
    assert read_json(second / "heldout.jsonl.args.json")["heldout"] == "../first/heldout.jsonl"
    write_jsonl(tmp_path / "h.jsonl", [{"prompt": "sort these words : plum fox axe red"}])
    with pytest.raises(UserError, match="made with heldout = '../first/heldout.jsonl', not '../h.jsonl'"):
        small_run(toy_base, tmp_path, objective="original", out=second, count=12, heldout=tmp_path / "h.jsonl")


def test_no_query_that_is_held_out_is_trained_on(tmp_path):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": query} for query in toy.make_queries(5)[0][:16]])
    _, held = files.split_queries(queries, None, 0)
    heldout = write_jsonl(tmp_path / "heldout.jsonl", held)
    used, again = files.split_queries(queries, heldout, 0)
    assert again == held and len(used) == 14 and not any(record in held for record in used)


# ---- The preflight and the report's critic -------------------------------------------------------

def test_a_look_is_taken_before_each_training(toy_base, tmp_path, monkeypatch, capsys):
    """At the policy's own responses before step 3, at the generator's pairs before step 4; once, and printed again."""
    done, stage, measure = [], train.train, evaluation.measure_pairs
    monkeypatch.setattr(train, "train", lambda name, *args: (done.append(name), stage(name, *args))[1])
    monkeypatch.setattr(evaluation, "measure_pairs",
                        lambda path, *args, **how: (done.append(path.name), measure(path, *args, **how))[1])
    out, report = small_run(toy_base, tmp_path)
    assert done == ["responses.jsonl", "generator", "pairs.jsonl", "policy", "policy",      # the second of them is PBAA
                    "responses.jsonl", "pairs.jsonl"]                                       # and the report's
    printed = capsys.readouterr().out
    assert printed.count("Preflight, 14 queries") == 2
    for name, row in (("responses", "PBAA"), ("pairs", "SSO")):
        kept = read_json(out / f"{name}.preflight.json")
        assert kept["accuracy"] == report[row]["accuracy"] and kept["y+"] == report[row]["y+"]
        assert kept["p(original)"]["mean"] == pytest.approx(report[row]["p(original)"]["mean"], rel=1e-5)
    done.clear()
    small_run(toy_base, tmp_path)
    assert "responses.jsonl" not in done and capsys.readouterr().out.count("Preflight, 14 queries") == 2


def test_the_report_is_made_anew_for_another_critic_or_other_policies(toy_base, tmp_path):
    how, judge, changed = {"objective": "policy", "count": 30}, str(toy_base), []
    by_grader = {"grader": toy.__file__}
    for judged_by in (by_grader, by_grader, {"judge": judge, "judge_pairs": 4}, {"judge": judge, "judge_pairs": 4},
                      {"judge": judge, "judge_pairs": 2}, {}):
        out, report = small_run(toy_base, tmp_path, **how | {"grader": None} | judged_by)
        changed.append(((out / "report.json").stat().st_mtime_ns, report["PBAA"].get("accuracy", {}).get("n"),
                        report["PBAA"].get("quality", {}).get("n"), report["PBAA"]["p(chosen)"]["n"]))
    when, *numbers = zip(*changed)
    assert when[0] == when[1] < when[2] == when[3] < when[4] < when[5]
    assert list(zip(*numbers)) == [(27, 3, 27)] * 2 + [(4, 3, 27)] * 2 + [(2, 2, 27), (None, None, 27)]
    weights = (out / "policy/model.safetensors").read_bytes()
    shutil.rmtree(out / "policy")                           # another policy in its place
    for answers in out.glob("answers_PBAA*"):
        answers.unlink()
    small_run(toy_base, tmp_path, cli.change(FEW, policy={"lr": 1e-2}), grader=None, **how)
    assert (out / "report.json").stat().st_mtime_ns > when[5]
    assert (out / "policy/model.safetensors").read_bytes() != weights


# ---- What is refused, before anything is written -------------------------------------------------

@pytest.mark.parametrize("words, message", [
    ("--model none/such --queries {two}", "model none/such: no such folder"),
    ("--model {qwen3} --queries {one}", "one.jsonl: at least two queries are needed"),
    ("--model {qwen3} --queries nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--model {qwen3} --queries {two} --heldout nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--model {qwen3} --queries {two} --recipe nowhere.toml", "--recipe nowhere.toml: "),
    ("--model {qwen3} --queries {two} --principle-model none/such", "model none/such: no such folder"),
    ("--model {qwen3} --queries {two} --judge none/such", "model none/such: no such folder"),
    ("--model {qwen3} --queries {two} --grader none.py", "--grader none.py: no such file"),
    ("--model {qwen3} --queries {two} --rounds 2", "--rounds 2: more than the 1 queries"),
    ("--model {qwen3} --queries {two} --policy.lr -1", "policy: --lr -1.0 is not between"),
    ("--model {qwen3} --queries {two} --grader {grader} --judge {qwen3}", "exclude"),
    ("--model {qwen3}", "go together"), ("--queries {two}", "go together"),
    ("--heldout {two}", "--heldout goes with"),
    ("--rounds 0", "--rounds is at least 1"), ("--principles {two} --principle-model {qwen3}", "exclude"),
    ("--judge none/such", "model none/such: no such folder"), ("--grader none.py", "--grader none.py: no such file"),
    ("--model {qwen3} --queries {two} --principles none.jsonl", "none.jsonl: no such file")])
def test_what_cannot_work_leaves_nothing(qwen3, tmp_path, monkeypatch, words, message):
    names = {"two": write_jsonl(tmp_path / "two.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), "qwen3": qwen3,
             "one": write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a"}]), "grader": toy.__file__}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "build", None)
    with pytest.raises(SystemExit) as end:
        run_here(f"python run.py --out mine/run {words.format(**names)}", monkeypatch)
    assert str(end.value).startswith("error: ") and message in str(end.value) and "\n" not in str(end.value)
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("words", ["--objective none", "--base-loss kto", "--rounds two", "--polycy.lr 1"])
def test_flags_that_do_not_exist_are_refused(words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_here(f"python run.py {words}", monkeypatch)
    assert end.value.code == 2 and words.split()[-1].strip("-") in capsys.readouterr().err


def test_queries_that_lie_in_the_folder_are_not_taken_for_the_runs_own(qwen3, tmp_path):
    """Its held-out queries may differ."""
    mine = write_jsonl(tmp_path / "queries.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(UserError, match="queries.jsonl exists and was not made by this command"):
        run.run(copy.deepcopy(FEW), model=qwen3, queries=mine, out=tmp_path)
    assert mine.read_text() == '{"prompt": "a"}\n{"prompt": "b"}\n'


def test_a_judges_trouble_with_a_pair_is_one_line_and_the_run_can_go_on_without_it(qwen3, toy_base, tmp_path):
    judge = make_checkpoint(tmp_path / "judge", "qwen2", context=600)
    with pytest.raises(UserError, match="--judge: comparison 1, of '.* : .*', does not fit into the judge's context"):
        small_run(toy_base, tmp_path, objective="policy", judge=str(judge), grader=None)
    _, report = small_run(toy_base, tmp_path, objective="policy")
    assert report["PBAA"]["accuracy"]["n"] == 14


# ---- Killed at any moment ------------------------------------------------------------------------

# A process imports everything once. Runs are its forked children: each does `python run.py ...` as a command line does,
# with a checkpoint before every step, and is killed by SIGKILL, or lives to its end.
DRIVER = '''
import json, math, os, random, runpy, signal, sys, time
root, words, folders, kills, seed = sys.argv[1], *map(json.loads, sys.argv[2:])
sys.path.insert(0, root)
import eval, generate, train, lab.toy, plumbing.checkpoint
from pathlib import Path
plumbing.checkpoint.SAVE_SECONDS = 0

STAGES = {"queries": "queries.jsonl", "principles": "principles.jsonl", "responses": "responses.jsonl",
          "generator": "generator/config.json", "pairs": "pairs.jsonl", "policy": "policy/config.json",
          "pbaa": "pbaa/config.json", "answers": "answers_SSO.jsonl", "report": "report.json"}

def stage_of(folder):
    """The first stage whose output is not there."""
    for number, file in enumerate(STAGES.values()):
        if not (folder / file).exists():
            return number
    return len(STAGES)

def steps_of(folder, stage):
    """Steps of a training so far; of another stage as many as one likes."""
    if "config.json" not in list(STAGES.values())[stage]:
        return math.inf
    log = folder / list(STAGES)[stage] / "log.jsonl"
    return log.read_text().count("\\n") if log.exists() else 0

def start(folder):
    child = os.fork()
    if child == 0:
        with open(f"{folder}.log", "a") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        sys.argv = ["run.py", "--out", str(folder), *words]
        try:
            runpy.run_path(f"{root}/run.py", run_name="__main__")
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child

def ended(child):
    """Whether it came to its end. An error there is one here."""
    done, status = os.waitpid(child, os.WNOHANG)
    assert status == 0, status
    return done

# An undisturbed run, and how long each of its stages takes.
whole, *folders = map(Path, folders)
seconds, began, at = [], time.time(), 0
child = start(whole)
while not ended(child):
    if stage_of(whole) > at:
        seconds.append((time.time() - began) / (stage_of(whole) - at))
        seconds += [seconds[-1]] * (stage_of(whole) - at - 1)
        began, at = time.time(), stage_of(whole)
    time.sleep(0.001)
seconds += [seconds[-1]] * (len(STAGES) - len(seconds))

# Each folder is killed `kills` times, in its stages in turn: at a random moment of a stage, or of a training's steps
# from some on; at the latest when the next stage begins. What a kill has left of a growing file is torn somewhere in
# its last lines. Then the run goes on to its end.
rng, hits = random.Random(seed), []
for folder in folders:
    all_of_them = list(range(len(STAGES)))
    plan = sorted(all_of_them * (kills // len(STAGES)) + rng.sample(all_of_them, kills % len(STAGES)))
    for aim in plan:
        aim = max(aim, stage_of(folder))
        if aim == len(STAGES):
            break
        steps, moment = rng.choice((0, 2, 3)), math.inf
        delay = rng.random() * seconds[aim]
        if steps and steps_of(folder, aim) < math.inf:
            delay /= 4
        child = start(folder)
        while not ended(child):
            stage, now = stage_of(folder), time.time()
            if stage == aim and steps_of(folder, aim) >= steps:
                moment = min(moment, now + delay)
            if stage > aim or now >= moment:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                assert status in (0, signal.SIGKILL)
                if status:                                      # it had not come to its end just now
                    hits.append([*STAGES, "end"][stage_of(folder)])
                for partial in folder.glob("*.partial"):
                    os.truncate(partial, max(0, partial.stat().st_size - rng.randrange(1000)))
                break
            time.sleep(0.001)
    child = start(folder)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
print(json.dumps({"hits": hits, "seconds": seconds}))
'''


def results(folder):
    """{name: bytes} of all that a run has made. A speed is another every time."""
    made = {}
    for path in sorted(folder.rglob("*")):
        if path.name.endswith((".jsonl", ".safetensors", "args.json", "report.json")):
            made[str(path.relative_to(folder))] = re.sub(rb'"tokens_per_second": [\d.e+-]+', b"", path.read_bytes())
    return made


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(toy_base, tmp_path):
    """Ten times, in every stage, at moments drawn at random. SSO_KILLS=100 kills as often, ten times in a run."""
    kills = int(os.environ.get("SSO_KILLS", 10))
    seed = random.randrange(2**32) if "SSO_KILLS" in os.environ else 0
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": query} for query in toy.make_queries(5)[0][:20]])
    folders = [tmp_path / name for name in ("whole", *(f"killed{number}" for number in range(math.ceil(kills / 10))))]
    words = (f"--model {toy_base} --queries {queries} --recipe {toy.RECIPE} --grader {toy.__file__} "
             "--principles.batch-size 4 --principles.max-new-tokens 24 --responses.batch-size 4 "
             "--responses.max-new-tokens 8 --generator.batch-size 4 --generator.epochs 2 --policy.batch-size 4").split()
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    arguments = [json.dumps(value) for value in (words, [str(folder) for folder in folders], 10, seed)]
    done = subprocess.run([sys.executable, driver, ROOT, *arguments], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    hits = json.loads(done.stdout.splitlines()[-1])["hits"]
    print(hits, "seed", seed)
    assert len(hits) >= 0.9 * kills and len(set(hits)) >= 5, hits
    whole = results(folders[0])
    assert {"queries.jsonl", "pairs.jsonl", "policy/model.safetensors", "pbaa/log.jsonl", "report.json"} < whole.keys()
    for folder in folders[1:]:
        killed = results(folder)
        assert killed.keys() == whole.keys()
        assert [name for name in whole if killed[name] != whole[name]] == [], (hits, seed)
