"""The whole path: on real architectures, by every objective, over rounds, and killed at any moment."""

import json
import multiprocessing
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import run
import sso
import train
from conftest import GRADER, PAPER, TOY, TOY_BASE, log, run_here, texts, times, write_jsonl
from plumbing import checkpoint as checkpoints
from plumbing.outputs import fingerprint
from plumbing.recipes import change
from plumbing.records import UserError, read_json, read_jsonl
from toy import world

pytestmark = pytest.mark.usefixtures("here")
OUT = Path("run")
SMALL = ("--set principles.max_new_tokens=6 --set responses.max_new_tokens=6 --set generator.lr=1e-3 "
         "--set policy.lr=1e-3 --set policy.batch_size=3 --set generator.batch_size=2")
FEW = change(TOY, principles={"max_new_tokens": 24}, responses={"max_new_tokens": 8}, generator={"epochs": 1})


def write_queries(count):
    return write_jsonl("q.jsonl", [{"prompt": query} for query in world.make_queries(5)[0][:count]])


def small_run(recipe=FEW, count=12, out=OUT, grader=world.__file__, **options):
    """A run of the toy's model on a few queries, graded. Returns its report."""
    run.run(recipe, model=TOY_BASE, queries=write_queries(count), out=out, grader=grader, **options)
    return read_json(out / "report.json")


def note(path):
    return read_json(f"{path}.args.json")


def named(path):
    """An input as notes have it."""
    return f"{path.name} with content {fingerprint(path)}"


# ---- The whole path ------------------------------------------------------------------------------

def assert_files_of_the_field(checkpoint):
    """Ordinary folders, tokenizer and template included; a standard preference file."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name in ("generator", "policy", "pbaa"):
        model = AutoModelForCausalLM.from_pretrained(OUT / name)
        assert model.dtype == torch.float32
        templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (OUT / name, checkpoint)]
        assert templates[0] == templates[1]
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters()))
        assert model.generation_config.repetition_penalty == base.generation_config.repetition_penalty == 1.1
    for line in (OUT / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        roles = [message["role"] for message in pair["prompt"] + pair["chosen"] + pair["rejected"]]
        assert roles == ["user", "assistant", "assistant"]


def assert_made_of(checkpoint):
    """Each step is made of what the paper says: the original policy is trained, not the generator."""
    made_of = {"principles.jsonl": (checkpoint, "queries.jsonl"), "responses.jsonl": (checkpoint, "principles.jsonl"),
               "generator": (checkpoint, "responses.jsonl"), "pairs.jsonl": (OUT / "generator", "responses.jsonl"),
               "policy": (checkpoint, "pairs.jsonl"), "pbaa": (checkpoint, "responses.jsonl"),
               "answers_base.jsonl": (checkpoint, "heldout.jsonl"),
               "answers_PBAA.jsonl": (OUT / "pbaa", "heldout.jsonl"),
               "answers_SSO.jsonl": (OUT / "policy", "heldout.jsonl")}
    for name, (model, data) in made_of.items():
        assert {named(model), named(OUT / data)} < set(map(str, note(OUT / name).values())), name


@pytest.mark.parametrize("checkpoint", [pytest.param("qwen2", marks=pytest.mark.slow), "qwen3",
                                        pytest.param("llama", marks=pytest.mark.slow)], indirect=True)
def test_the_whole_path_on_a_checkpoint(checkpoint, capsys):
    """Qwen2, Qwen3 and Llama, with their own templates: all four steps, again without doing anything, continued."""
    prompts = ["Name a fruit.", "Why is the sky blue?", "Write a haiku about rain.", "2 + 2?", "Say hi.", "And you?"]
    write_jsonl("q.jsonl", [{"prompt": prompt, "source": "me"} for prompt in prompts])
    line = f"python run.py --model {checkpoint} --queries q.jsonl --out run {SMALL}"
    run_here(line)
    printed = capsys.readouterr().out
    report = read_json(OUT / "report.json")
    assert list(report) == ["base", "PBAA", "SSO"] and "| SSO " in printed
    assert printed.count("Preflight, 5 queries") == printed.count("is not known: give --grader or --judge") == 2
    for name in ("PBAA", "SSO"):
        assert 0 < report[name]["p(chosen)"]["mean"] < 1
        assert not {"accuracy", "ties", "quality", "win rate", "y+"} & report[name].keys()          # there is no critic
    assert_files_of_the_field(checkpoint)
    held, used = set(texts(OUT / "heldout.jsonl", "prompt")), set(texts(OUT / "queries.jsonl", "prompt"))
    assert len(held) == 1 and held | used == set(prompts) and not held & used

    assert_made_of(checkpoint)

    before = times(OUT)
    run_here(line)
    assert before == times(OUT)
    weights = (OUT / "policy/model.safetensors").read_bytes()
    shutil.rmtree(OUT / "policy")
    (OUT / "report.json").unlink()
    run_here(line)
    assert (OUT / "policy/model.safetensors").read_bytes() == weights and read_json(OUT / "report.json") == report

    with pytest.raises(SystemExit, match="error: .*generator was made with beta = 0.1, not 0.3: choose another --out"):
        run_here(f"{line} --set generator.beta=0.3")
    (OUT / "heldout.jsonl").write_text('{"prompt": "Another?"}\n')
    with pytest.raises(SystemExit, match="answers_base.jsonl was made with principles = 'heldout.jsonl with content "):
        run_here(line)


def test_without_a_model_the_toy_world_is_run_in_rounds_each_from_the_policy_before(monkeypatch, capsys):
    monkeypatch.setattr(world, "QUERIES", 8)
    monkeypatch.setattr(world, "HELDOUT", 6)
    writer = shutil.copytree(TOY_BASE, Path("writer"))
    run_here("python run.py --seed 4 --rounds 2 --principle-model writer --set generator.epochs=1")
    out = Path("runs/toy")
    report = read_json(out / "report.json")
    assert list(report) == ["base", "PBAA", "SSO 1", "SSO 2"]
    queries, heldout = world.make_queries(4, rounds=2)
    assert texts(out / "heldout.jsonl", "prompt") == heldout
    before = TOY_BASE
    for number in (1, 2):
        folder = out / f"round{number}"
        assert texts(folder / "queries.jsonl", "prompt") == queries[number - 1::2]
        for part in ("responses.jsonl", "generator", "policy"):
            assert note(folder / part)["model"] == named(before)
            assert note(folder / part)["seed"] == 4                 # the run's is that of every step
        assert note(folder / "principles.jsonl")["model"] == named(writer)
        assert note(folder / "pairs.jsonl")["model"] == named(folder / "generator")
        measures = evaluation.measure_pairs(folder / "pairs.jsonl", before, None, FEW)      # under the policy before
        assert report[f"SSO {number}"]["p(rejected)"]["mean"] == pytest.approx(measures["p(rejected)"]["mean"],
                                                                               rel=1e-4)
        before = folder / "policy"
    assert note(out / "round1/generator")["lr"] == 6e-4             # of recipes/toy.toml
    assert report["SSO 2"]["quality"]["n"] == 6                     # by the world's own grader
    # At the end two held-out queries, with the answers of all policies.
    said = capsys.readouterr().out.partition("Answers to held-out queries\n\n")[2]
    expected = []
    for number in (0, 1):
        expected.append(["query", *heldout[number].split()])
        for name in report:
            answer = texts(out / f"answers_{name.replace(' ', '_')}.jsonl", "original")[number]
            expected.append([*name.split(), *answer.split()])
    assert [line.split() for line in said.splitlines() if line.strip()] == expected


def test_what_is_trained_on_is_looked_at_before_and_reported_as_the_measures_have_it(monkeypatch, capsys):
    """The policy's own responses before step 3, the generator's pairs before step 4; once, and printed again."""
    done, stage, measure = [], train.train, evaluation.measure_pairs
    monkeypatch.setattr(train, "train", lambda name, *args: (done.append(name), stage(name, *args)))
    monkeypatch.setattr(evaluation, "measure_pairs",
                        lambda path, *args, **how: (done.append(path.name), measure(path, *args, **how))[1])
    report = small_run()
    assert done == ["responses.jsonl", "generator", "pairs.jsonl", "policy", "policy",      # the second of them is PBAA
                    "responses.jsonl", "pairs.jsonl"]                                       # and the report's
    for name, file in (("PBAA", "responses"), ("SSO", "pairs")):
        measures = measure(OUT / f"{file}.jsonl", TOY_BASE, GRADER, FEW)
        assert {"accuracy", "p(chosen)", "p(rejected)", "p(original)", "y+", "yo", "y-"} < measures.keys()
        assert {key: report[name][key] for key in measures} == measures == read_json(OUT / f"{file}.preflight.json")
    answers = {name: OUT / f"answers_{name}.jsonl" for name in report}
    for name, measures in evaluation.measure_answers(answers, GRADER).items():
        assert {key: report[name][key] for key in measures} == measures
    # Both arms have the same queries and principles; the generator has answered anew, and left yo as it was.
    assert texts(OUT / "responses.jsonl", "original") == texts(OUT / "pairs.jsonl", "original")
    assert texts(OUT / "responses.jsonl", "chosen") != texts(OUT / "pairs.jsonl", "chosen")
    done.clear()
    small_run()
    assert "responses.jsonl" not in done and capsys.readouterr().out.count("Preflight, 10 queries") == 4


# ---- Everything that is compared -----------------------------------------------------------------

@pytest.mark.parametrize("objective, originals, terms", [
    ("policy", 4, None), ("original", 10, None), ("plain", 4, None),        # of all queries where the policy needs yo
    ("plus", 4, {"L+"}), ("eq3", 4, {"L+", "L-"})])
def test_an_objective_trains_the_generator_or_without_one_the_policy(objective, originals, terms, monkeypatch):
    """`plain` is one of our own: under x say y- rather than y+."""
    monkeypatch.setitem(sso.PAIRS, "plain", {"C": sso.Pair("original", winner="bad", loser="good")})
    recipe = change(FEW, generator={"examples": 4, "base_loss": "ipo"}, policy={"base_loss": "ipo"})
    report = small_run(recipe, objective=objective)
    assert sum("original" in record for record in read_jsonl(OUT / "responses.jsonl")) == originals
    policy, generator = note(OUT / "policy"), OUT / "generator"
    assert list(report) == ["base", "PBAA"] + [objective] * (objective != "policy")
    assert policy["base_loss"] == "ipo" and generator.exists() == (OUT / "pairs.jsonl").exists() == bool(terms)
    if terms:
        assert policy["objective"] == "policy" and policy["data"] == named(OUT / "pairs.jsonl")
        assert note(generator)["objective"] == objective and note(generator)["base_loss"] == "ipo"
        assert {key.split()[1] for key in log(generator)[0] if " " in key} == (terms if len(terms) > 1 else set())
    else:
        assert policy["objective"] == objective and policy["data"] == named(OUT / "responses.jsonl")
    if objective == "original":         # its loser is yo
        assert report["original"]["p(rejected)"] == report["PBAA"]["p(original)"] != report["PBAA"]["p(rejected)"]
    if objective == "plain":            # its winner is y-
        assert report["plain"]["p(chosen)"] == report["PBAA"]["p(rejected)"]
        assert report["plain"]["accuracy"]["mean"] == pytest.approx(1 - report["PBAA"]["accuracy"]["mean"])


RECIPE = """
[run]
seed = 9
[responses]
max_new_tokens = 7
batch_size = 5
[generator]
objective = "eq3"
lr = 2e-3
epochs = 2
base_loss = "ipo"
beta = 0.3
[policy]
lr = 3e-3
batch_size = 4
warmup = 0.5
[prompts.good]
system = "{principle}"
user = "{query}"
[prompts.bad]
system = "{principle}"
user = "{query}"
[prompts.original]
system = ""
user = "sort {query}"
"""


def test_a_recipe_and_principles_by_hand_reach_every_stage_and_a_flag_overrides_them():
    Path("mine.toml").write_text(RECIPE)
    write_queries(12)
    run_here("python -m toy.world principles --world on-policy --queries q.jsonl --out written.jsonl --seed 1")
    run_here(f"python run.py --model {TOY_BASE} --queries q.jsonl --recipe mine.toml --principles written.jsonl "
             "--out run --set policy.lr=4e-3")
    for record in read_jsonl(OUT / "principles.jsonl"):
        by_hand = world.write_principles(record["prompt"][0]["content"], "on-policy", 1)
        assert record.items() >= (by_hand | {"prompt": record["prompt"]}).items()
        assert record["bad_principle"].startswith("copy the query")
    sampling = {"max_new_tokens": 7, "batch_size": 5, "seed": 9, "temperature": PAPER["responses"]["temperature"]}
    role = {"system": "{principle}", "user": "{query}"}
    generator = {"objective": "eq3", "lr": 2e-3, "epochs": 2, "base_loss": "ipo", "beta": 0.3, "seed": 9, "good": role,
                 "gamma": PAPER["generator"]["gamma"]}
    policy = {"lr": 4e-3, "batch_size": 4, "warmup": 0.5, "base_loss": "dpo", "seed": 9, "epochs": 1,
              "original": {"system": "", "user": "sort {query}"}}
    expected = {"responses.jsonl": sampling | {"good": role}, "pairs.jsonl": sampling | {"bad": role},
                "answers_PBAA.jsonl": sampling | {"original": policy["original"]}, "generator": generator,
                "policy": policy, "pbaa": policy}
    for name, settings in expected.items():
        made = note(OUT / name)
        assert {key: made.get(key) for key in settings} == settings, name


def test_held_out_queries_of_another_run_make_the_tables_comparable():
    one = small_run(objective="policy", count=20)
    how = {"objective": "policy", "out": Path("second")}
    other = small_run(heldout="run/heldout.jsonl", **how)
    heldout = texts("run/heldout.jsonl", "prompt")
    assert texts("second/heldout.jsonl", "prompt") == heldout
    assert one["base"] == other["base"] and one["PBAA"]["answers"] == other["PBAA"]["answers"] == 2
    used = set(texts("second/queries.jsonl", "prompt"))
    assert len(used) >= 10 and not used & set(heldout)
    write_jsonl("h.jsonl", [{"prompt": "sort these words : plum fox axe red"}])
    with pytest.raises(UserError,
                       match="made with heldout = 'heldout.jsonl with content .*, not 'h.jsonl with content"):
        small_run(heldout="h.jsonl", **how)


def test_the_report_is_made_anew_for_another_critic_or_other_policies():
    seen = []

    def report_of(recipe=FEW, grader=None, **judged_by):
        """How many are measured: the accuracy of pairs, the quality of answers, p of pairs."""
        report = small_run(recipe, 30, grader=grader, objective="policy", **judged_by)
        seen.append((OUT / "report.json").stat().st_mtime_ns)
        return [report["PBAA"].get(name, {}).get("n") for name in ("accuracy", "quality", "p(chosen)")]

    for mark in (1, 1, 0):              # an edited grader is another one
        Path("grader.py").write_text(f"def grade(query, response, finished):\n    return {mark}\n")
        assert report_of(grader="grader.py") == [27, 3, 27]
    for number in (4, 2):
        assert report_of(judge=TOY_BASE, judge_pairs=number) == [number, min(3, number), 27]
    report_of(change(FEW, prompts={"judge": FEW["prompts"]["judge"] | {"system": "Judge."}}), judge=TOY_BASE,
              judge_pairs=2)
    assert report_of() == [None, None, 27]
    shutil.rmtree(OUT / "policy")                      # another policy in its place
    (OUT / "answers_PBAA.jsonl").unlink()
    other = change(FEW, policy={"lr": 1e-2})
    report_of(other)
    assert seen[0] == seen[1] and seen[1:] == sorted(set(seen))
    (OUT / "report.json.args.json").unlink()
    with pytest.raises(UserError, match="report.json exists and was not made by this command; .* move or delete it"):
        report_of(other)


# ---- Killed at any moment ------------------------------------------------------------------------

OUTPUTS = ["queries.jsonl", "principles.jsonl", "responses.jsonl", "generator/config.json", "pairs.jsonl",
           "policy/config.json", "pbaa/config.json", "answers_SSO.jsonl", "report.json"]


def live(folder, words):
    """`python run.py` with a checkpoint before every step."""
    log = open(f"{folder}.log", "a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    checkpoints.SAVE_SECONDS = 0
    run_here(f"python run.py --out {folder} {words}")


def start(folder, words):
    """A process that has imported everything: a fork of this one."""
    process = multiprocessing.get_context("fork").Process(target=live, args=(folder, words))
    process.start()
    return process


def kill(process, folder, stage, delay):
    """Kill a run some seconds after a stage began, a training among its steps. Whether it had not come to its end."""
    if OUTPUTS[stage].endswith("config.json"):
        ready = folder / Path(OUTPUTS[stage]).parent.with_suffix(".partial") / "checkpoint.pt"
        delay /= 4
    else:
        ready = [folder.parent, *(folder / name for name in OUTPUTS)][stage]
    while process.is_alive() and not ready.exists():
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode in (0, -9), Path(f"{folder}.log").read_text()[-2000:]
    return process.exitcode < 0


def results(folder):
    """{name: bytes} of all that a run has made. What a step took is another every time."""
    made = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            made[str(path.relative_to(folder))] = re.sub(rb'"seconds": [\d.e+-]+', b"", path.read_bytes())
    return made


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(monkeypatch):
    """In each of its stages at a random moment."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    rng = random.Random(0)
    words = (f"--model {TOY_BASE} --queries {write_queries(20)} --recipe {world.RECIPE} "
             f"--grader {world.__file__} --set principles.batch_size=4 --set responses.batch_size=4 "
             "--set generator.batch_size=4 --set generator.epochs=2 --set policy.batch_size=4")
    whole, killed = Path("whole"), Path("killed")
    began = time.time()
    process = start(whole, words)
    process.join()
    assert process.exitcode == 0, Path(f"{whole}.log").read_text()[-2000:]
    ends = [began] + [(whole / file).stat().st_mtime for file in OUTPUTS]
    hits = 0
    for stage in range(len(OUTPUTS)):
        process = start(killed, words)
        delay = rng.random() * (ends[stage + 1] - ends[stage])
        hits += kill(process, killed, stage, delay)
        for partial in killed.glob("*.jsonl.partial"):      # its last lines are torn
            os.truncate(partial, max(0, partial.stat().st_size - rng.randrange(1000)))
    process = start(killed, words)
    process.join()
    assert process.exitcode == 0, Path(f"{killed}.log").read_text()[-2000:]
    assert hits >= 0.8 * len(OUTPUTS)
    expected, found = results(whole), results(killed)
    assert found.keys() == expected.keys() and len(expected) > 40
    assert [name for name in expected if found[name] != expected[name]] == []
