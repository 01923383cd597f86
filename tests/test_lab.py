"""The lab: version 1, reward models and RewardBench's sections, arms, the study and its tables, figures."""

import json
import math
import shutil
import statistics
import sys
from collections import ChainMap
from functools import partial

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eval as evaluation
import generate
import sso
from conftest import GRADER, TOY, TOY_BASE, log, run_here, texts, times, write_jsonl
from lab import arms, figures, reward, study
from plumbing import scoring
from plumbing.examples import read_examples
from plumbing.outputs import fingerprint
from plumbing.recipes import change
from plumbing.records import UserError, read_json, read_jsonl, write_text
from plumbing.scoring import score
from plumbing.tables import stat
from toy import world

pytestmark = pytest.mark.usefixtures("here")


# ---- Version 1 -----------------------------------------------------------------------------------

def test_version_1_weighs_all_three_terms_by_hand_in_value_and_gradient():
    """W·(L + g·(L+ + L-)) with W = σ(-(0.66 m(y+|x) + 0.34 m(y-|x))), through which the gradient flows."""
    assert sso.PAIRS["v1"] == {"L": ("original", "good", "bad"), "L+": ("good", "good", "bad"),
                               "L-": ("bad", "original", "good")}
    torch.manual_seed(0)
    ref, policy = -9 * torch.rand(2, 3, 1), (-9 * torch.rand(2, 3, 1)).requires_grad_()
    tokens = torch.randint(2, 9, (2, 3, 1))
    losses, _ = sso.sso_loss(policy, ref, tokens, "v1-ipo", gamma=0.0, beta=0.2, objective="v1")
    losses.sum().backward()

    def ipo(r):
        w, l = (policy[side, r] - ref[side, r] for side in (0, 1))
        return (w / tokens[0, r] - l / tokens[1, r] - 1 / 0.4) ** 2

    mean = 0.66 * policy[0, 0] / tokens[0, 0] + 0.34 * policy[1, 0] / tokens[1, 0]
    by_hand = (ipo(0) + 0.1 * (ipo(1) + ipo(2))) / (1 + torch.exp(mean))
    torch.testing.assert_close(losses, by_hand)
    torch.testing.assert_close(policy.grad, torch.autograd.grad(by_hand, policy)[0])


# ---- Reward models -------------------------------------------------------------------------------

def test_a_reward_model_learns_its_pairs_and_is_an_ordinary_folder(checkpoint, capsys):
    """On Qwen2, Qwen3 and Llama: the longer answer wins. Two files are mixed."""
    for name in range(3):
        records = [{"prompt": f"q{name}{i}", "chosen": "yes " * (3 + i % 4), "rejected": "no"} for i in range(20)]
        write_jsonl(f"{name}.jsonl", records)
    line = f"--model {checkpoint} --out reward --set reward.batch_size=10 --set reward.lr=1e-2 --set reward.epochs=5"
    run_here(f"python -m lab.reward train 0.jsonl 1.jsonl {line}")
    run_here("python -m lab.reward eval 2.jsonl --model reward")
    assert "| all | 20    | 1.000 ± 0.000 |" in capsys.readouterr().out
    # The rewards are what the saved folder gives to the chat template's text, with transformers alone.
    model = AutoModelForSequenceClassification.from_pretrained("reward")
    tokenizer = AutoTokenizer.from_pretrained("reward")
    chat = reward.load_reward("reward")
    assert chat.pad_id == model.config.pad_token_id != chat.end_id
    rewards, _ = score(chat, read_examples("2.jsonl", "policy", chat, 4096)[0])
    for i, record in enumerate(read_jsonl("2.jsonl")[:4]):
        text = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, tokenize=False,
                                             enable_thinking=False)
        for side, column in enumerate(("chosen", "rejected")):
            response = record[column][0]["content"] + tokenizer.decode([chat.end_id])
            ids = tokenizer(text + response, add_special_tokens=False, return_tensors="pt").input_ids
            assert model(ids).logits.item() == pytest.approx(rewards[side, 0, i].item(), abs=1e-4)
    # A file more or less is another training; a model without the head has no rewards.
    with pytest.raises(SystemExit, match="reward was made with data 1 = '1.jsonl with content"):
        run_here(f"python -m lab.reward train 0.jsonl {line}")
    with pytest.raises(SystemExit, match="it has no reward head; `python -m lab.reward train` trains one"):
        run_here(f"python -m lab.reward eval 2.jsonl --model {checkpoint}")


def test_a_reward_model_is_trained_by_bradley_terry(toy_responses):
    """One step moves the weights as AdamW on the naive loss of the head's last-token rewards does. Two files give 30
    examples each."""
    reward.train([toy_responses, toy_responses], TOY_BASE, "r", change(TOY, reward={
        "batch_size": 1000, "epochs": 1, "lr": 1e-3, "warmup": 0.0, "micro_batch_tokens": 900, "examples": 30}))
    torch.manual_seed(0)
    chat = reward.load_reward(TOY_BASE)
    losses = []
    for [(prompt, *responses)] in read_examples(toy_responses, "policy", chat, 256, limit=30)[0]:
        w, l = (chat.model.score(chat.model.model(torch.tensor([prompt + ids])).last_hidden_state[0, -1])
                for ids in responses)
        losses.append(-(w - l).sigmoid().log())
    torch.cat(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(chat.model.parameters(), 1.0)
    torch.optim.AdamW(chat.model.parameters(), lr=1e-3, weight_decay=0.0).step()
    trained = AutoModelForSequenceClassification.from_pretrained("r").state_dict()
    for name, value in chat.model.state_dict().items():
        assert ((value - trained[name]).abs() < 1e-5).float().mean() > 0.98, name


def test_rewards_leave_the_head_in_fp32_under_autocast(toy_responses, monkeypatch):
    """bf16 has 8 bits: two rewards near each other would be one."""
    chat = reward.load_reward(TOY_BASE)
    examples, _ = read_examples(toy_responses, "policy", chat, 256)
    exact, _ = score(chat, examples)
    monkeypatch.setattr(scoring, "autocast", partial(torch.autocast, "cpu", torch.bfloat16))
    rewards, _ = score(chat, examples)
    assert not torch.equal(rewards, rewards.bfloat16().float())
    assert not torch.equal(rewards, exact) and torch.allclose(rewards, exact, atol=0.1 * exact.std().item() + 0.02)


def test_accuracies_and_rewardbenchs_sections_by_hand(qwen3, monkeypatch):
    """Prompts count alike within a section; but math as much as all code; the four sections alike. Of each subset a sign
    a pair: right 1, wrong 0, a tie t. The longer response has the larger reward."""
    def rewards(model, examples, pad_id):
        lengths = [[len(winner), len(loser)] for [(_, winner, loser)] in examples]
        return torch.tensor(lengths).float().T[:, None], torch.ones(2, 1, len(examples), dtype=torch.long)

    chat = reward.load_reward(qwen3)._replace(pair_logps=rewards)
    chat.model.config.architectures = ["Qwen3ForSequenceClassification"]
    monkeypatch.setattr(reward, "load_reward", lambda path: chat)
    records = [{"prompt": "q", "chosen": "a", "rejected": text} for text in ("a", "")]      # of no use
    with pytest.raises(UserError, match="d.jsonl: no pair is left"):
        reward.accuracies(qwen3, write_jsonl("d.jsonl", records), TOY)
    subsets = {"alpacaeval-easy": "1111", "mt-bench-easy": "t0", "llmbar-natural": "111t", "donotanswer": "t",
               "refusals-offensive": "11111", "math-prm": "1111111t", "hep-cpp": "t", "hep-python": "11t0"}
    for subset, marks in subsets.items():
        for mark in marks:
            chosen, rejected = {"1": ("aa", "b"), "0": ("b", "aa"), "t": ("a", "b")}[mark]
            records.append({"prompt": "q", "chosen": chosen, "rejected": rejected, "subset": subset})
    rows = reward.accuracies(qwen3, write_jsonl("d.jsonl", records), TOY)
    sections = {"Chat": 4.5 / 6, "Chat Hard": 3.5 / 4, "Safety": 5.5 / 6, "Reasoning": (7.5 / 8 + 3 / 5) / 2}
    for name, accuracy in sections.items():
        assert rows[name] == {"accuracy": pytest.approx(accuracy)}
    assert rows["average of sections"] == {"accuracy": pytest.approx(statistics.fmean(sections.values()))}
    assert rows["hep-python"] == {"pairs": 4, "accuracy": stat([1.0, 1.0, 0.5, 0.0])}
    assert rows["all"]["pairs"] == 29 and rows["all"]["accuracy"]["mean"] == pytest.approx(24 / 29)
    # Reasoning may have math or code alone; a section without prompts takes all away.
    full = {"alpacaeval-easy": [1.0], "llmbar-natural": [1.0], "donotanswer": [0.0]}
    for part in ({"math-prm": [1.0, 0.0, 0.0, 0.0]}, {"hep-go": [1.0], "hep-js": [0.0] * 3}):
        assert reward.section_rows(full | part)["average of sections"]["accuracy"] == pytest.approx(2.25 / 4)
    assert reward.section_rows(full) == {}
    # github.com/allenai/reward-bench, rewardbench/constants.py: the 23 subsets of its core set.
    assert len(set(" ".join(sum(reward.SECTIONS.values(), [])).split())) == 23


# ---- Arms ----------------------------------------------------------------------------------------

def test_an_arm_with_two_generators(toy_data, toy_responses, tmp_path):
    """L+ trains the one that answers y+ under x+, L- the one that answers y- under x-. Two policies share them."""
    recipe = change(TOY, generator={"epochs": 1}, policy={"epochs": 1, "lr": 1e-3})
    heldout = toy_data / "queries.jsonl"
    generate.responses(TOY_BASE, heldout, "answers.jsonl", recipe, ("original",))
    start = arms.Start(TOY_BASE, heldout, "answers.jsonl", world.__file__, toy_responses)
    reports = []
    for lr in (1e-3, 3e-3):
        own = change(recipe, policy={"lr": lr})
        reports.append(arms.run_arm("two", "two", start, tmp_path / f"{lr}", own, shared=tmp_path)["two"])
    made = times(tmp_path, "*.safetensors")
    assert len(made) == 4 and reports[0]["quality"] != reports[1]["quality"]
    for role, objective in (("good", "plus"), ("bad", "minus")):
        trained = read_json(f"generator-{objective}.args.json")
        assert trained["objective"] == objective and trained["data"].endswith(fingerprint(toy_responses))
        generate.responses(f"generator-{objective}", toy_responses, f"{role}.jsonl", recipe, (role,))
        column = sso.COLUMNS[role]
        assert texts("pairs-minus.jsonl", column) == texts(f"{role}.jsonl", column) != texts(toy_responses, column)
    assert read_json("0.001/policy.args.json")["data"].endswith(fingerprint("pairs-minus.jsonl"))
    # The measures are those of eval.py, and the last of the log.
    answers = {"base": start.answers, "two": "0.001/answers.jsonl"}
    last = log("0.001/policy")[-1]["p(original)"]
    assert reports[0] == (evaluation.measure_answers(answers, GRADER)["two"] | {"policy's p(original)": last}
                          | evaluation.measure_pairs("pairs-minus.jsonl", TOY_BASE, GRADER, recipe))
    # Once more, nothing is made.
    assert arms.run_arm("two", "two", start, tmp_path / "0.001", recipe, shared=tmp_path)["two"] == reports[0]
    assert times(tmp_path, "*.safetensors") == made


# ---- The study's tables --------------------------------------------------------------------------

def cell(mean):
    return {"mean": mean, "se": 0.1, "n": 4}


def test_the_tables_of_the_study_by_hand(capsys):
    """Mean ± sd over seeds; the paired difference with its standard error; a cell that a seed lacks is empty."""
    reports = [{"base": {"quality": cell(b)}, "pbaa": {"quality": cell(p), "pairs": 4},
                "sso": {"quality": cell(s)}, "sso 1": {"quality": cell(s)}}
               for b, p, s in ((0.1, 0.5, 0.7), (0.2, 0.7, 0.8), (0.3, 0.6, 0.9))]
    runs = [study.means_of(report) for report in reports]
    table = {"columns": ["quality"], "rows": [["A", "sso", "pbaa", "2"], ["B", "two", "two", "-"]]}
    error = statistics.stdev([0.2, 0.1, 0.3]) / math.sqrt(3)
    assert study.table_rows(runs, table) == {
        "A": {"quality": {"mean": pytest.approx(0.8), "sd": pytest.approx(0.1)}, "paper": "2",
              "paired": {"mean": pytest.approx(0.2), "se": pytest.approx(error), "n": 3}},
        "B": {"quality": None, "paper": "-"}}
    assert study.over_runs(runs + [{"sso": {}}], "sso", "quality") is None
    # `tables` prints them from a file; a curve over rounds begins with the base model.
    write_text("study.json", json.dumps({"runs": runs, "rounds": 2}))
    run_here("python -m lab.study tables --results-file study.json")
    printed = capsys.readouterr().out
    assert all(table["title"] in printed for table in study.STUDY["tables"] + study.STUDY["curves"])
    assert "| SSO        | 0.200 ± 0.100 | 0.800 ± 0.100 | - |" in printed.split("Over rounds: quality")[1]
    # `report` compares several runs of run.py.
    for number, report in enumerate(reports):
        write_text(f"{number}/report.json", json.dumps(report))
    run_here("python -m lab.study report 0 1 2")
    printed, paired = capsys.readouterr().out.split("paired difference")
    assert "| sso   | 0.800 ± 0.100" in printed and f"| sso - pbaa   | 0.200 ± {error:.3f}" in paired


def test_every_row_of_the_tables_is_made_from_what_it_says(tmp_path, monkeypatch):
    """With the work itself left out: what each row would be trained with."""
    made, toml, folder = {}, study.STUDY, tmp_path / "seed1"

    def run_arm(row, objective, start, out, recipe, shared=None):
        made[row] = objective, start, out, recipe, shared
        return {row: {}}

    def train_reward(data, model, out, recipe):
        made[out.parts[-3]] = data, recipe["reward"]

    monkeypatch.setattr(arms, "run_arm", run_arm)
    monkeypatch.setattr(arms, "begin", lambda *args: args[-2] / "responses.jsonl")
    monkeypatch.setattr(arms, "measure", lambda *args: {"base": {}})
    monkeypatch.setattr(study, "graded_pairs", print)
    monkeypatch.setattr(world, "build", lambda out, *args: shutil.copytree(TOY_BASE, out))
    monkeypatch.setattr(reward, "train", train_reward)
    monkeypatch.setattr(reward, "accuracies", lambda *args: {"all": {}})
    study.run_seed(tmp_path, TOY_BASE, list((toml["best"] | toml["default"]).items()), 4, 1)
    for curve in toml["curves"]:
        for arm in curve["arms"].values():      # version 1 had three rounds
            assert [f"{arm} {i}" in made for i in range(1, 6)] == [i <= min(4, curve["rounds"]) for i in range(1, 6)]
    assert not set(toml["search_seeds"]) & set(toml["seeds"])

    objective, start, out, recipe, shared = made["sso-ipo"]
    assert (objective, out.parent, recipe["run"]["seed"]) == ("sso", shared, 1)
    for stage, index in (("generator", 2), ("policy", 3)):
        settings = {"base_loss": "ipo", "beta": 0.5} | toml["grid"][stage][index]
        assert recipe[stage] == study.TOY[stage] | settings
    for row, source in (("sso@weak", "weak"), ("pbaa@on-policy", "on-policy"), ("best-of-4", "graded"), ("two", "base")):
        assert made[row][1].responses == folder / source / "responses.jsonl"
    assert made["reward graded+sso"] == ([folder / "graded/responses.jsonl", made["sso"][4] / "pairs-sso.jsonl"],
                                         study.TOY["reward"] | toml["grid"]["reward"][5])
    # Each round starts from the policy before, with queries of its own.
    first, second = made["joint 1"], made["joint 2"]
    assert (first[0], second[3]["policy"]["base_loss"]) == ("v1", "v1-ipo")
    assert (first[1].policy, second[1].policy) == (TOY_BASE, first[2] / "policy")
    assert second[1].responses == second[2] / "responses.jsonl"
    queries = [set(map(str, read_jsonl(made[row][2] / "queries.jsonl"))) for row in ("sso 1", "sso 2", "joint 2")]
    assert len(queries[0]) == world.QUERIES and not queries[0] & queries[1] and queries[1] == queries[2]


def test_the_search_tries_every_cell_and_takes_the_best_over_its_seeds(monkeypatch, capsys):
    """By the mean, not by the best single seed; reward models by accuracy."""
    marks = {(2, 1): (0.6, 0.7), (0, 4): (0.6, 0.7), (0, 0): (0.9, 0.2)}
    asked = {}

    def run_seeds(seeds, out, base, cells, rounds):
        reports = [["base"], ["base"]]
        for row, found in cells:
            asked.setdefault(row, []).append(found)
            for report, mark in zip(reports, marks.get(found, (0.1, 0.1))):
                report.append({row: {"accuracy" if "reward" in row else "quality": mark}})
        return reports

    monkeypatch.setattr(study, "run_seeds", run_seeds)
    study.search()
    lines = capsys.readouterr().out.splitlines()
    assert len(set(asked["sso"])) == len(set(asked["two"])) == 36 and asked["sso rounds"][0] == (2, 0)
    assert asked["pbaa"] == asked["best-of-4"] == asked["reward sso"] == [(0, second) for second in range(6)]
    for row, best in (("pbaa", (0, 4)), ("reward graded", (0, 4)), ("sso rounds", (2, 1))):
        assert f"| {row:18} | {best}    | 0.650 |" in lines


# ---- The study itself ----------------------------------------------------------------------------

def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_the_study_in_small_continues(tmp_path, monkeypatch):
    """Interrupted at its first reward model; then it is whole, and nothing was made twice. Every table has its cells."""
    monkeypatch.setattr(study, "TOY", change(study.TOY, responses={"max_new_tokens": 8}, principles={"max_new_tokens": 12}))
    for settings in sum(study.STUDY["grid"].values(), []):
        monkeypatch.setitem(settings, "epochs", 1)
    for name in ("QUERIES", "HELDOUT"):
        monkeypatch.setattr(world, name, 12)
    monkeypatch.setattr(world, "build", lambda out, *args, **options: shutil.copytree(TOY_BASE, out))
    cells = list((study.STUDY["best"] | study.STUDY["default"]).items())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reward, "load_reward", interrupt)
        study.run_seed(tmp_path, None, cells, 1, 1)
    made = times(tmp_path, "*.safetensors")
    assert len(made) > 30
    means = dict(ChainMap(*study.run_seed(tmp_path, None, cells, 1, 1)))
    assert times(tmp_path, "*.safetensors").items() > made.items()
    for table in study.STUDY["tables"]:
        for _, row, *_ in table["rows"]:
            plain = {"y+", "yo", "y-", "p(original)"} if row == "best-of-4" else set()      # has no yo beside its pairs
            assert set(table["columns"]) - plain <= means[row].keys()
    # Of several plain answers the best over the worst, by the grader.
    marks = {}
    for record in read_jsonl("seed1/graded/answers.jsonl"):
        query = record["prompt"][0]["content"]
        marks.setdefault(query, []).append(world.grade(query, *sso.record_response(record, "original")))
    pairs = read_jsonl("seed1/graded/responses.jsonl")
    assert len(pairs) == sum(max(of_query) > min(of_query) for of_query in marks.values()) > 3
    for record in pairs:
        query = record["prompt"][0]["content"]
        found = [world.grade(query, *sso.record_response(record, role)) for role in ("good", "bad")]
        assert found == [max(marks[query]), min(marks[query])]


@pytest.mark.slow
def test_a_seed_has_a_process_of_its_own_whose_log_is_a_file_and_whose_errors_come_through(tmp_path):
    with pytest.raises(UserError, match="none"):
        study.run_seeds([1], tmp_path, tmp_path / "none", [], 0)
    assert (tmp_path / "seed1/log.txt").exists()


# ---- Figures -------------------------------------------------------------------------------------

def test_a_figure_without_matplotlib_says_what_to_do_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)            # that is, importing it fails
    for words in ("pairs none.jsonl --policy none", "report none.json", "log none.jsonl"):
        with pytest.raises(SystemExit, match="^error: figures need matplotlib, which is optional: pip install mat"):
            run_here(f"python -m lab.figures {words} --out x.png")


def test_figure_1_is_of_each_response_of_a_file(toy_responses):
    lists = figures.distributions(toy_responses, TOY_BASE, TOY)
    measures = evaluation.measure_pairs(toy_responses, TOY_BASE, None, TOY)
    assert [stat(lists[column]) for column in lists] == [measures[f"p({column})"] for column in sso.COLUMNS.values()]


def test_figure_3_has_the_mean_of_both_probabilities_for_its_x():
    """And an arrow from the first point to the second. (The commands: test_readme.py.)"""
    _, axes = pytest.importorskip("matplotlib.pyplot").subplots()
    figures.figure3({name: {"p(chosen)": cell(x), "p(rejected)": cell(x + 0.2), "accuracy": cell(y)}
                     for name, x, y in (("PBAA", 0.2, 0.7), ("SSO", 0.5, 0.9))}, axes)
    arrow, = axes.texts
    assert arrow.xyann == (pytest.approx(0.3), 0.7) and arrow.xy == (pytest.approx(0.6), 0.9)
