"""The lab: reward models and RewardBench's sections; the study, its tables and its search; the figures."""

import json
import math
import shutil
import statistics
import sys
from functools import partial

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eval as evaluation
import generate
import plumbing.chat
import sso
import train
from conftest import TOY, run_here, write_jsonl
from lab import figures, reward, study, toy
from plumbing import cli, files
from plumbing.chat import score
from plumbing.files import UserError, read_examples
from plumbing.tables import stat


def settings(**changed):
    return cli.change(TOY, reward=changed)


def read_json(path):
    return json.loads(path.read_text())


# ---- Reward models -------------------------------------------------------------------------------

def test_a_reward_model_learns_its_pairs_and_is_an_ordinary_folder(checkpoint, tmp_path, monkeypatch, capsys):
    """On Qwen2, Qwen3 and Llama: the longer answer wins. Two files are mixed."""
    def records(start, count):
        return [{"prompt": f"q{i}", "chosen": "yes " * (3 + i % 4), "rejected": "no", "subset": "ab"[i % 2]}
                for i in range(start, start + count)]
    data = [write_jsonl(tmp_path / f"{i}.jsonl", records(20 * i, 20)) for i in range(2)]
    out, test = tmp_path / "reward", write_jsonl(tmp_path / "test.jsonl", records(50, 30))
    run_here(f"python -m lab.reward train {data[0]} {data[1]} --model {checkpoint} --out {out} --epochs 5 "
             "--batch-size 10 --lr 1e-2", monkeypatch)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and rows[-1]["loss"] < min(0.1, rows[0]["loss"]) and rows[-1]["accuracy"] == 1
    assert "by a random head (about ln 2)" in "".join(capsys.readouterr())
    run_here(f"python -m lab.reward eval {test} --model {out}", monkeypatch)
    printed = capsys.readouterr().out
    for row in ("a                 | 15    | 1.000 ± 0.000", "mean over subsets | -     | 1.000        ",
                "all               | 30    | 1.000 ± 0.000"):
        assert f"| {row} " in printed
    # The rewards are what the saved folder gives to the chat template's text, with transformers alone.
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.num_labels == 1
    chat = reward.load_reward(out)
    assert chat.pad_id == model.config.pad_token_id != chat.end_id
    examples, _ = read_examples(test, "policy", chat, 4096)
    rewards, tokens = score(chat, examples, 3000, reward.pair_rewards)
    for i in (0, 7):
        record = files.read_jsonl(test)[i]
        for side, column in enumerate(("chosen", "rejected")):
            prompt = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, tokenize=False,
                                                   enable_thinking=False)
            text = prompt + record[column][0]["content"] + tokenizer.decode([chat.end_id])
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            assert model(ids).logits.item() == pytest.approx(rewards[side, 0, i].item(), abs=1e-4)
            assert tokens[side, 0, i] == len(examples[i][0][1 + side])


def test_a_reward_model_is_trained_by_bradley_terry(toy_base, toy_data, tmp_path):
    """One step moves the weights as AdamW on the naive loss of the head's last-token rewards does."""
    reward.train_reward([toy_data / "responses.jsonl"], toy_base, tmp_path / "r",
                        settings(batch_size=1000, epochs=1, lr=1e-3, warmup=0.0, micro_batch_tokens=900))
    torch.manual_seed(0)
    chat = reward.load_reward(toy_base)
    start = {name: value.clone() for name, value in chat.model.state_dict().items()}
    examples, _ = read_examples(toy_data / "responses.jsonl", "policy", chat, 256)
    margins = []
    for [(prompt, *responses)] in examples:
        w, l = (chat.model.score(chat.model.model(torch.tensor([prompt + ids])).last_hidden_state[:, -1])
                for ids in responses)
        margins.append((w - l).squeeze())
    loss = -torch.stack(margins).sigmoid().log().mean()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(chat.model.parameters(), 1.0)
    torch.optim.AdamW(chat.model.parameters(), lr=1e-3, weight_decay=0.0).step()
    row = read_json(tmp_path / "r/log.jsonl")
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(grad_norm.item(), rel=1e-3)
    assert row["margin"] == pytest.approx(torch.stack(margins).mean().item(), rel=1e-3, abs=1e-6)
    assert row["accuracy"] == pytest.approx(sum(margin.item() > 0 for margin in margins) / len(margins))
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r").state_dict()
    for name, value in chat.model.state_dict().items():
        assert ((value - trained[name]).abs() < 1e-5).float().mean() > 0.98, name
        assert (trained[name] - start[name]).abs().max() == pytest.approx(1e-3, rel=0.05), name


def test_rewards_leave_the_head_in_fp32_under_autocast_too(toy_base, toy_data, monkeypatch):
    """bf16 has 8 bits: two rewards near each other would be one. Layers are bf16, the head is not."""
    chat = reward.load_reward(toy_base)
    examples, _ = read_examples(toy_data / "responses.jsonl", "policy", chat, 256)
    exact, _ = score(chat, examples, 3000, reward.pair_rewards)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    heads = []
    chat.model.score.register_forward_hook(lambda module, inputs, output: heads.append((inputs[0].dtype, output.dtype)))
    monkeypatch.setattr(plumbing.chat, "autocast", autocast)
    monkeypatch.setattr(reward, "autocast", autocast)
    rewards, _ = score(chat, examples, 3000, reward.pair_rewards)
    row = reward.accumulate_gradient(chat, examples, TOY["reward"])
    assert set(heads) == {(torch.float32, torch.float32)} and rewards.dtype == torch.float32
    assert not torch.equal(rewards, rewards.bfloat16().float())
    assert not torch.equal(rewards, exact) and torch.allclose(rewards, exact, atol=0.1 * exact.std().item() + 0.02)
    assert math.isfinite(row["loss"]) and all(p.grad.dtype == torch.float32 for p in chat.model.parameters())


def test_a_reward_training_that_is_interrupted_continues_to_the_same_weights(toy_base, toy_data, tmp_path, monkeypatch):
    recipe, data = settings(batch_size=8, epochs=2), toy_data / "responses.jsonl"
    reward.train_reward([data], toy_base, tmp_path / "whole", recipe)
    steps = []
    accumulate = reward.accumulate_gradient
    def interrupted(*args):
        steps.append(len(steps))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return accumulate(*args)
    monkeypatch.setattr(reward, "accumulate_gradient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reward.train_reward([data], toy_base, tmp_path / "again", recipe)
    reward.train_reward([data], toy_base, tmp_path / "again", recipe)
    for name in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert len(steps) == 1 + len((tmp_path / "whole/log.jsonl").read_text().splitlines())
    assert not (tmp_path / "again/checkpoint.pt").exists()


def test_an_example_more_or_less_is_another_training(toy_base, toy_data, tmp_path, capsys):
    """Files that were trained on are part of what was made: also those that the new command does not name."""
    data, recipe = toy_data / "responses.jsonl", settings(epochs=1)
    reward.train_reward([data, data], toy_base, tmp_path / "r", recipe)
    with pytest.raises(UserError, match="r was made with data 1 = '../../.*responses.jsonl', not None"):
        reward.train_reward([data], toy_base, tmp_path / "r", recipe)
    capsys.readouterr()
    reward.train_reward([data, data], toy_base, tmp_path / "r", recipe)
    assert capsys.readouterr().out == f"{tmp_path / 'r'}: complete\n"


def test_of_several_files_some_examples_of_each_are_taken(qwen3, tmp_path):
    chat = reward.load_reward(qwen3)
    data = []
    for name in "ab":
        records = [{"prompt": f"{name}{i}", "chosen": "yes", "rejected": "no"} for i in range(30)]
        data.append(write_jsonl(tmp_path / f"{name}.jsonl", records))
    of = {"max_length": 4096, "seed": 0, "examples": 20}
    first, again = reward.read_all(data, chat, of), reward.read_all(data, chat, of)
    texts = [chat.tokenizer.decode(pair.prompt) for [pair] in first]
    assert first == again and len(first) == 20 and 5 < sum("user\na" in text for text in texts) < 15
    alone = reward.read_all(data[:1], chat, of)
    assert [f"a{i}" in chat.tokenizer.decode(pair.prompt) for i, [pair] in enumerate(alone)] == [True] * 20


def test_a_model_without_a_reward_head_is_refused(qwen3, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(SystemExit, match="it has no reward head; `python -m lab.reward train` trains one"):
        run_here(f"python -m lab.reward eval {data} --model {qwen3}", monkeypatch)


def test_a_file_without_a_useful_pair_is_refused_in_one_line(qwen3, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "a"}])
    with pytest.raises(UserError, match="d.jsonl: no pair is left"):
        measured(qwen3, data, [[], []], monkeypatch)


# ---- Accuracy of reward models -------------------------------------------------------------------

def measured(qwen3, path, rewards, monkeypatch):
    """`measure_reward` of a file, by a model whose rewards of chosen and rejected are these."""
    chat = reward.load_reward(qwen3)
    chat.model.config.architectures = ["Qwen3ForSequenceClassification"]
    monkeypatch.setattr(reward, "load_reward", lambda path: chat)
    if rewards[0]:
        monkeypatch.setattr(reward, "score", lambda chat, examples, *how: (torch.tensor(rewards)[:, None], None))
    return reward.measure_reward(qwen3, path, TOY)


def by_subset(path, **right):
    """A file with so many prompts of each subset, and rewards of which so many are right: name=(right, of)."""
    records, chosen = [], []
    for name, (count, total) in right.items():
        for i in range(total):
            records.append({"prompt": f"{name} {i}", "chosen": "a", "rejected": "b", "subset": name.replace("_", "-")})
            chosen.append(2.0 if i < count else 0.5 if i > count else 1.0)      # one wrong prompt is a tie
    return write_jsonl(path, records), [chosen, [1.0] * len(chosen)]


def test_reward_accuracy_by_hand(qwen3, tmp_path, monkeypatch):
    path, rewards = by_subset(tmp_path / "d.jsonl", easy=(1, 1), hard=(1, 3))       # hard: right, a tie, wrong
    rows = measured(qwen3, path, rewards, monkeypatch)
    assert rows["easy"] == {"pairs": 1, "accuracy": stat([1.0])}
    assert rows["hard"] == {"pairs": 3, "accuracy": stat([1.0, 0.5, 0.0])}
    assert rows["mean over subsets"] == {"accuracy": pytest.approx((1 + 0.5) / 2)}
    assert rows["all"] == {"pairs": 4, "accuracy": stat([1.0, 1.0, 0.5, 0.0])}
    assert list(rows) == ["easy", "hard", "mean over subsets", "all"]           # without sections: not RewardBench


def test_a_file_without_subsets_has_one_accuracy_and_useless_pairs_are_left_out(qwen3, tmp_path, monkeypatch):
    records = [{"prompt": "q", "chosen": c, "rejected": r} for c, r in (("a", "b"), ("a", "a"), ("a", ""), ("b", "a"))]
    rows = measured(qwen3, write_jsonl(tmp_path / "d.jsonl", records), [[1.0, 0.0], [0.0, 1.0]], monkeypatch)
    assert rows == {"all": {"pairs": 2, "accuracy": stat([1.0, 0.0])}}


def test_rewardbenchs_sections_by_hand(qwen3, tmp_path, monkeypatch):
    """Prompts count alike within a section; but math as much as all code; the four sections alike."""
    path, rewards = by_subset(tmp_path / "d.jsonl", **{
        "alpacaeval_easy": (4, 4), "mt_bench_easy": (0, 2),                                 # 4 + 0.5 of 6
        "llmbar_natural": (3, 4),                                                           # 3 + 0.5 of 4
        "donotanswer": (0, 1), "refusals_offensive": (5, 5),                                # 0.5 + 5 of 6
        "math_prm": (7, 8), "hep_cpp": (0, 1), "hep_python": (2, 4)})                       # 7.5 / 8; 0.5 + 2.5 of 5
    rows = measured(qwen3, path, rewards, monkeypatch)
    sections = {"Chat": (6, 4.5 / 6), "Chat Hard": (4, 3.5 / 4), "Safety": (6, 5.5 / 6),
                "Reasoning": (13, (7.5 / 8 + 3 / 5) / 2)}
    for name, (pairs, accuracy) in sections.items():
        assert rows[f"section {name}"] == {"pairs": pairs, "accuracy": pytest.approx(accuracy)}
    mean = statistics.fmean(accuracy for _, accuracy in sections.values())
    assert rows["average (of four sections)"] == {"accuracy": pytest.approx(mean)}
    subsets = [1, 0.25, 3.5 / 4, 0.5, 1, 7.5 / 8, 0.5, 2.5 / 4]
    assert rows["mean over subsets"]["accuracy"] == pytest.approx(statistics.fmean(subsets))
    assert rows["mean over subsets"]["accuracy"] != pytest.approx(mean, abs=0.01)
    assert list(rows)[-1] == "all" and rows["all"]["pairs"] == 29


def test_reasoning_may_have_math_or_code_alone_and_a_section_without_prompts_takes_all_away():
    full = {"alpacaeval-easy": [1.0], "llmbar-natural": [1.0], "donotanswer": [0.0]}
    for part in ({"math-prm": [1.0, 0.0, 0.0, 0.0]}, {"hep-go": [1.0], "hep-js": [0.0] * 3}):
        rows = reward.section_rows(full | part)
        assert rows["section Reasoning"]["accuracy"] == 0.25
        assert rows["average (of four sections)"]["accuracy"] == pytest.approx(2.25 / 4)
    assert reward.section_rows(full) == reward.section_rows({}) == {}


def test_the_sections_are_those_of_rewardbench():
    """github.com/allenai/reward-bench, rewardbench/constants.py: the 23 subsets of its core set."""
    names = [name for subsets in reward.SECTIONS.values() for name in subsets.split()]
    assert len(names) == len(set(names)) == 23 and list(reward.SECTIONS) == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    assert reward.SECTIONS["Reasoning"].split()[0] == "math-prm"
    assert sum(name.startswith("hep-") for name in names) == 6 and sum("alpacaeval" in name for name in names) == 3


# ---- The study's tables --------------------------------------------------------------------------

def cell(mean):
    return {"mean": mean, "se": 0.1, "n": 4}


REPORTS = [{"base": {"quality": cell(b)}, "pbaa": {"quality": cell(p), "accuracy": cell(p / 2)},
            "sso": {"quality": cell(s), "accuracy": cell(s / 2)}, "sso 1": {"quality": cell(s)}}
        for b, p, s in ((0.1, 0.5, 0.7), (0.2, 0.7, 0.8), (0.3, 0.6, 0.9))]
RUNS = [study.means_of(report) for report in REPORTS]
GAIN = {"mean": pytest.approx(0.2), "se": pytest.approx(statistics.stdev([0.2, 0.1, 0.3]) / math.sqrt(3)), "n": 3}


def test_a_table_of_the_study_by_hand():
    """Mean ± sd over seeds; the paired difference with its standard error."""
    table = {"columns": ["quality", "accuracy"],
             "rows": [["PBAA", "pbaa", "pbaa", "29.5"], ["SSO", "sso", "pbaa", "35.0"]]}
    rows = study.table_rows(RUNS, table)
    assert rows["SSO"] == {"quality": {"mean": pytest.approx(0.8), "sd": pytest.approx(0.1)}, "paired": GAIN,
                           "accuracy": {"mean": pytest.approx(0.4), "sd": pytest.approx(0.05)}, "paper": "35.0"}
    assert rows["PBAA"]["paper"] == "29.5" and "paired" not in rows["PBAA"]
    one = study.table_rows(RUNS[:1], table)["SSO"]
    assert one["quality"] == {"mean": 0.7, "sd": 0.0} and one["paired"]["se"] == 0


def test_a_cell_that_a_seed_does_not_have_is_left_empty():
    assert study.over_runs(RUNS, "sso 2", ["quality"]) == study.over_runs(RUNS, "base", ["accuracy"]) == {}
    assert study.paired(RUNS, "sso", "none", "quality") is None
    assert study.over_runs(RUNS + [{"sso": {}}], "sso", ["quality"]) == {}


def test_a_curve_over_rounds_begins_with_the_base_model():
    curve = study.curve_rows(RUNS, ["pbaa", "sso"], "quality", 2)["SSO"]
    assert curve["0"]["mean"] == pytest.approx(0.2) and curve["1"]["mean"] == pytest.approx(0.8) and curve["2"] is None


def test_several_runs_of_the_whole_method_in_one_table(tmp_path, monkeypatch, capsys):
    """`python -m lab.study report`: mean ± sd over runs, and every paired difference."""
    for number, row in enumerate(REPORTS):
        files.write_text(tmp_path / str(number) / "report.json", json.dumps(row))
    run_here(f"python -m lab.study report {tmp_path}/0 {tmp_path}/1 {tmp_path}/2", monkeypatch)
    printed, paired = capsys.readouterr().out.split("paired difference")
    assert "| sso   | 0.800 ± 0.100" in printed and "| pbaa  | 0.600 ± 0.100" in printed
    assert f"| sso - pbaa   | 0.200 ± {GAIN['se'].expected:.3f}" in paired and "| pbaa - base " in paired
    with pytest.raises(SystemExit, match="error: .*none/report.json"):
        run_here("python -m lab.study report none", monkeypatch)


def test_every_row_of_the_tables_is_made_by_the_study(tmp_path, monkeypatch):
    """With the work itself left out: what each row would be trained and measured on."""
    made = []
    def run_arm(row, settings, folder, out, *others):
        made.append(row)
        study.write_report(out, row, {"quality": cell(0.5)})
    def run_reward(name, settings, folder, pairs, out, seed):
        run_arm(f"reward {name}", settings, folder, out)
    def prepare(folder, seed):
        study.write_report(folder, "base", {"quality": cell(0.5)})
    for function in (run_arm, run_reward, prepare):
        monkeypatch.setattr(study, function.__name__, function)
    monkeypatch.setattr(study, "answer", lambda *args: None)
    study.study_seed(tmp_path / "seed1", 1, rounds=4)
    rows, = study.collect(tmp_path, [1])
    needed = set()
    for table in study.STUDY["tables"]:
        for _, row, other, _ in table["rows"]:
            needed |= {row, other}
    for curve in study.STUDY["curves"]:
        needed |= {f"{arm} {number}" for arm in curve["arms"] for number in range(1, min(4, curve["rounds"]) + 1)}
    assert needed <= rows.keys() and len(made) == len(set(made))
    assert {row.split("@")[0] for row in study.STUDY["best"]} <= study.STUDY["arms"].keys()
    assert {row.split("@")[1] for row in study.STUDY["best"] if "@" in row} == study.STUDY["sources"].keys()
    assert "joint 3" in rows and "joint 4" not in rows                      # version 1 had three rounds
    assert not set(study.STUDY["search_seeds"]) & set(range(1, 6))          # the search's seeds are never reported
    for arm in {arm for curve in study.STUDY["curves"] for arm in curve["arms"]}:
        assert arm in study.STUDY["labels"] and arm in study.STUDY["best_rounds"]


def test_an_arm_has_its_objective_its_loss_and_the_cells_of_its_grid():
    grid = study.STUDY["grid"]
    recipe = study.recipe_of("sso-ipo", (2, 3), seed=7)
    ipo = {"base_loss": "ipo", "beta": 0.5}
    assert recipe["generator"] == study.TOY["generator"] | ipo | {"objective": "sso"} | grid["generator"][2]
    assert recipe["policy"] == study.TOY["policy"] | ipo | {"objective": "policy"} | grid["policy"][3]
    assert recipe["run"]["seed"] == 7
    assert study.recipe_of("original", (0, 1), 0)["policy"]["objective"] == "original"
    default = study.recipe_of("eq3", (), 0)
    assert default["generator"] == study.TOY["generator"] | {"objective": "eq3"}
    assert default["policy"] == study.TOY["policy"]


# ---- The search ----------------------------------------------------------------------------------

def test_the_search_finds_the_best_cell_over_its_seeds(tmp_path, capsys):
    """On hand-made reports: the best mean over seeds, not the best single one; rewards by accuracy."""
    for row in ("sso", "sso rounds", "reward graded"):
        of = "accuracy" if row.startswith("reward") else "quality"
        for cell_of_grid, values in (("0/0", (0.9, 0.2)), ("0/1", (0.6, 0.7)), ("2/1", (0.1, 0.2))):
            for seed, value in zip((0, 6), values):
                path = tmp_path / f"seed{seed}/search/{row}/{cell_of_grid}/report.json"
                measures = {"quality": {"mean": 1 - value}, "accuracy": {"mean": 1 - value}} | {of: {"mean": value}}
                files.write_text(path, json.dumps({row: measures}))
    study.print_search(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [f"| {row:13} | (0, 1)    | 0.650 |" for row in ("reward graded", "sso", "sso rounds")]


def test_the_search_is_the_same_whatever_the_order_of_the_files(tmp_path, monkeypatch, capsys):
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"seed0/search/sso/0/{number}/report.json")
        files.write_text(paths[-1], json.dumps({"sso": {"quality": {"mean": 0.5}}}))
    class Root:
        def __init__(self, paths):
            self.glob = lambda pattern: iter(paths)
    study.print_search(Root(paths))
    study.print_search(Root(paths[::-1]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == lines[3:]


def test_the_search_in_small_shares_generators_and_tries_every_cell(small_study, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(small_study, "best", {"pbaa": [0, 0], "sso": [1, 0]})
    monkeypatch.setitem(small_study, "best_rounds", {"sso": [1, 0]})
    monkeypatch.setitem(small_study, "best_reward", {"graded+sso": 0})
    monkeypatch.setitem(small_study, "sources", {})
    for stage in ("generator", "policy"):
        monkeypatch.setitem(small_study["grid"], stage, [{"lr": 1e-3, "epochs": 1}, {"lr": 3e-3, "epochs": 1}])
    trained = {"generator": {}, "policy": {}}
    real = train.train
    def noted(stage, model, data, out, recipe):
        trained[stage][str(out.relative_to(tmp_path))] = recipe[stage]["lr"], str(data.relative_to(tmp_path))
        real(stage, model, data, out, recipe)
    monkeypatch.setattr(train, "train", noted)
    study.search(out=tmp_path, processes=1)
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["pbaa", "reward graded+sso", "sso", "sso rounds"]
    place = "seed6/search/sso"
    policies, data = trained["policy"], "seed6/responses.jsonl"
    generators = {out: made for out, made in trained["generator"].items() if "rounds" not in out}
    assert generators == {f"{place}/0/generator-sso": (1e-3, data), f"{place}/1/generator-sso": (3e-3, data)}
    for i in range(2):
        for j, lr in enumerate((1e-3, 3e-3)):
            assert policies[f"{place}/{i}/{j}/policy"] == (lr, f"{place}/{i}/pairs.jsonl")
    assert [policies[f"seed6/search/pbaa/0/{j}/policy"][1] for j in range(2)] == [data] * 2
    assert "seed6/search/pbaa/1/0/policy" not in policies                           # it has no generator
    assert {f"seed6/search/sso rounds/1/{j}/1/policy" for j in range(2)} < policies.keys()
    note = read_json(tmp_path / "seed6/search/reward graded+sso/0/0/args.json")
    assert (note["data 0"], note["data 1"]) == ("../../../../graded-queries.jsonl", "../../../sso/1/pairs.jsonl")


# ---- The study itself ----------------------------------------------------------------------------

def made_of(path, *keys):
    note = read_json(path)
    return tuple(note.get(key) for key in keys)


def test_the_study_in_small_continues_and_prints_every_table(small_study, tmp_path, monkeypatch, capsys):
    """Interrupted before its reward models, and again in a round; then it is whole, and nothing was made twice."""
    fewer = [row for row in small_study["best"] if "@" not in row]      # of those with other principles: two
    monkeypatch.setitem(small_study, "best", dict.fromkeys(fewer + ["pbaa@junk", "sso@weak"], [0, 0]))
    monkeypatch.setitem(small_study, "best_rounds", dict.fromkeys(["sso", "joint"], [0, 0]))
    monkeypatch.setitem(small_study, "best_reward", dict.fromkeys(["pbaa", "graded+sso"], 0))
    monkeypatch.setitem(small_study, "defaults", ["sso"])
    run, seed = partial(study.run, seeds=1, rounds=1, out=tmp_path, processes=1), tmp_path / "seed1"
    def made_now():
        names = ("responses.jsonl", "pairs.jsonl", "answers.jsonl")
        return {path: path.stat().st_mtime_ns for path in seed.rglob("*")
                if path.suffix == ".safetensors" or path.name in names}
    def stop(*args):
        raise KeyboardInterrupt
    weights = {}
    for name in ("run_reward", "run_rounds"):
        with monkeypatch.context() as patch:
            patch.setattr(study, name, stop)
            with pytest.raises(KeyboardInterrupt):
                run()
        assert weights.items() <= made_now().items()
        weights = made_now()
    assert (seed / "rewards").exists() and not (seed / "rounds").exists() and len(weights) > 50
    capsys.readouterr()
    run()
    printed = capsys.readouterr().out
    for table in study.STUDY["tables"] + study.STUDY["curves"]:
        assert table["title"] in printed
    assert weights.items() <= {path: path.stat().st_mtime_ns for path in weights}.items()
    measures, = study.collect(tmp_path, [1])
    made = {"base", *small_study["best"], "sso default", "reward pbaa", "reward graded+sso"}
    assert measures.keys() == made | {"sso 1", "joint 1", "sso rounds", "joint rounds"}
    for table in study.STUDY["tables"]:
        for _, row, *_ in table["rows"]:
            plain = {"y+", "yo", "y-", "p(original)"} if row == "best-of-4" else set()      # has no yo beside its pairs
            assert row not in made or set(table["columns"]) - plain <= measures[row].keys()
    cells = {line.split("|")[1].strip(): line for line in printed.split("Table 1 ")[0].splitlines() if line[:1] == "|"}
    assert f"{measures['sso']['quality']:.3f} ± 0.000" in cells["SSO"] and "35.0 / 43.0" in cells["SSO"]
    gain = measures["sso"]["quality"] - measures["pbaa"]["quality"]
    assert f" {gain:.3f} ± 0.000" in cells["SSO"]
    run_here(f"python -m lab.study tables --results-file {tmp_path / 'study.json'}", monkeypatch)
    assert capsys.readouterr().out == printed

    # Who is made from what.
    arms = seed / "arms"
    for arm, data in (("pbaa", "../../../responses.jsonl"), ("sso", "../pairs.jsonl"), ("two", "../pairs.jsonl"),
                      ("best-of-4", "../../../graded-queries.jsonl"), ("original", "../../../responses.jsonl"),
                      ("pbaa@junk", "../../../principles-junk/responses.jsonl"), ("sso@weak", "../pairs.jsonl")):
        assert made_of(arms / arm / "policy/args.json", "data", "model") == (data, "../../../base")
    assert made_of(arms / "sso@weak/generator-sso/args.json", "data", "model") == (
        "../../../principles-weak/responses.jsonl", "../../../base")
    assert made_of(seed / "principles-weak/principles.jsonl.args.json", "model") == ("model",)
    assert made_of(seed / "principles-weak/responses.jsonl.args.json", "model") == ("../base",)
    assert made_of(seed / "rewards/graded+sso/args.json", "data 0", "data 1", "model") == (
        "../../graded-queries.jsonl", "../../arms/sso/pairs.jsonl", "../../base")
    assert made_of(seed / "rewards/pbaa/args.json", "data 0") == ("../../responses.jsonl",)
    for source, world in (("on-policy", "on-policy"), ("hand", "default")):
        for record in files.read_jsonl(seed / f"principles-{source}/principles.jsonl"):
            by_hand = toy.write_principles(record["prompt"][0]["content"], world, 1)
            assert record["bad_principle"] == by_hand["bad_principle"]

    # Two generators answer one role each: y+ is what L+'s says under x+, y- what L-'s says under x-.
    texts = lambda path, role: [record[sso.COLUMNS[role]] for record in files.read_jsonl(path)]
    for role, objective in (("good", "plus"), ("bad", "minus")):
        assert made_of(arms / f"two/generator-{objective}/args.json", "objective", "data") == (
            objective, "../../../responses.jsonl")
        for other in ("plus", "minus"):
            alone = tmp_path / f"{role}-{other}.jsonl"
            recipe = study.recipe_of("two", [0, 0], 1)
            generate.responses(arms / f"two/generator-{other}", seed / "responses.jsonl", alone, recipe, (role,))
            assert (texts(alone, role) == texts(arms / "two/pairs.jsonl", role)) == (objective == other)

    # A second round starts from the policy of the first, with queries of its own.
    study.run_rounds("sso", [0, 0], seed, seed / "rounds/sso", 1, 2)
    second = seed / "rounds/sso/2"
    for name in ("generator-sso/args.json", "policy/args.json"):
        assert made_of(second / name, "model") == ("../../1/policy",)
    assert made_of(second / "responses.jsonl.args.json", "model") == ("../1/policy",)
    assert made_of(second / "principles.jsonl.args.json", "model") == ("../../../base",)
    first, fresh = (files.read_jsonl(seed / f"rounds/sso/{number}/queries.jsonl") for number in (1, 2))
    assert len(fresh) == 8 and not {str(record) for record in first} & {str(record) for record in fresh}
    assert weights.items() <= {path: path.stat().st_mtime_ns for path in weights}.items()

    # What was lost is made again, to the same tables; another best cell is refused.
    shutil.rmtree(arms / "sso/policy")
    (arms / "sso/report.json").unlink()
    capsys.readouterr()
    run()
    again = capsys.readouterr().out
    assert again == printed
    anew = [path.parent.name for path in weights if path.stat().st_mtime_ns != weights[path]]
    assert anew == ["policy"]
    monkeypatch.setitem(small_study["grid"], "policy", [{"lr": 2e-3, "epochs": 1}])
    with pytest.raises(UserError, match="arms/pbaa/policy was made with lr = 0.001, not 0.002: choose another --out"):
        run()


def test_graded_pairs_are_the_best_over_the_worst_of_several_plain_answers(toy_base, tmp_path):
    records = [{"prompt": query} for query in toy.make_queries(5)[0][:12]]
    write_jsonl(tmp_path / "queries.jsonl", records)
    shutil.copytree(toy_base, tmp_path / "base")
    study.graded_pairs(tmp_path, "queries", 3, seed=2)
    samples = [files.read_jsonl(tmp_path / f"sample{number}-queries.jsonl") for number in (1, 2, 3)]
    expected = []
    for answers in zip(*samples):
        query = answers[0]["prompt"][0]["content"]
        marks = [toy.grade(query, answer["original"][0]["content"], answer["original_finished"]) for answer in answers]
        if max(marks) > min(marks):
            best, worst = answers[marks.index(max(marks))], answers[marks.index(min(marks))]
            expected.append((query, best["original"], worst["original"]))
    pairs = files.read_jsonl(tmp_path / "graded-queries.jsonl")
    assert [(pair["prompt"][0]["content"], pair["chosen"], pair["rejected"]) for pair in pairs] == expected
    assert len(expected) > 3
    assert samples[0] != samples[1] != samples[2]


@pytest.mark.parametrize("words, message", [
    ("--seeds 0", "--seeds 0 is not between 1 and"), ("--processes 0", "--processes 0 is not between 1 and"),
    ("--rounds -1", "--rounds -1 is not between 0 and"),
    ("--seeds 6", "--seeds is below 6: settings come from it")])
def test_a_study_that_cannot_be_is_refused(words, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        run_here(f"python -m lab.study run --out {tmp_path / 'study'} {words}", monkeypatch)
    assert not (tmp_path / "study").exists()


def test_a_seed_works_in_a_folder_of_its_own_and_writes_its_log(tmp_path, capsys):
    study.work(print, tmp_path, 3)
    assert (tmp_path / "seed3/log.txt").read_text() == f"{tmp_path / 'seed3'} 3\n" and capsys.readouterr().out == ""


def test_an_error_in_a_seeds_process_comes_through(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        study.run_seeds(files.read_jsonl, tmp_path / "none", [1], 1)


# ---- Figures -------------------------------------------------------------------------------------

def test_a_plot_without_matplotlib_says_what_to_do_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "pyplot", None)
    with pytest.raises(UserError, match="^figures need matplotlib, which is optional: pip install matplotlib$"):
        study.run(plot="x.png", out=tmp_path / "study")
    assert not (tmp_path / "study").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)            # that is, importing it fails
    for words in ("pairs none.jsonl --policy none", "log none.jsonl"):
        with pytest.raises(SystemExit, match="^error: figures need matplotlib, which is optional: pip install mat"):
            run_here(f"python -m lab.figures {words} --out x.png", monkeypatch)


def test_figure_3_has_the_mean_of_both_probabilities_for_its_x():
    cells = {"p(chosen)": {"mean": 0.5, "sd": 0.1}, "p(rejected)": {"mean": 0.3, "sd": 0.2}}
    assert figures.both(cells) == (pytest.approx(0.4), pytest.approx(0.15))
    of_one_run = {name: {"mean": 0.5, "se": 0.2} for name in cells}
    assert figures.both(of_one_run) == (0.5, pytest.approx(0.2))


def test_figure_1_is_of_each_response_of_a_file(toy_base, toy_data, tmp_path):
    records = files.read_jsonl(toy_data / "responses.jsonl")
    lists = figures.distributions(toy_data / "responses.jsonl", toy_base, TOY)
    measures = evaluation.measure_pairs(toy_data / "responses.jsonl", toy_base, None, TOY)
    assert lists.keys() == {"chosen", "rejected", "original"} and len(lists["rejected"]) <= len(records)
    for column, values in lists.items():
        assert measures[f"p({column})"] == stat(values)
    for record in records:
        del record["original"]
    write_jsonl(tmp_path / "d.jsonl", records)
    assert figures.distributions(tmp_path / "d.jsonl", toy_base, TOY).keys() == {"chosen", "rejected"}


def test_the_study_in_small_draws_its_figures(small_study, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for name in ("best", "best_rounds"):
        monkeypatch.setitem(small_study, name, {"pbaa": [0, 0], "sso": [0, 0]})
    monkeypatch.setitem(small_study, "best_reward", {})
    monkeypatch.setitem(small_study, "defaults", [])
    monkeypatch.setitem(small_study, "sources", {})
    for table in small_study["tables"]:
        table["rows"] = [row for row in table["rows"] if row[1] in ("pbaa", "sso")]
    monkeypatch.setitem(small_study, "curves", [{"title": "t", "arms": ["pbaa", "sso"], "rounds": 9}])
    study.run(seeds=1, rounds=2, plot=str(tmp_path / "f.png"), out=tmp_path / "study", processes=1)
    assert (tmp_path / "f.png").stat().st_size > 10_000 and "f.png: drawn" in capsys.readouterr().out


def test_the_figures_of_files_and_logs(toy_base, toy_data, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    data = toy_data / "responses.jsonl"
    run_here(f"python -m lab.figures pairs {data} --policy {toy_base} --grader {toy.__file__} "
             f"--out {tmp_path / 'f/3.png'}", monkeypatch)
    log = write_jsonl(tmp_path / "log.jsonl", [{"step": i, "loss": 1 / (1 + i), "margin": i} for i in range(5)])
    run_here(f"python -m lab.figures log {log} --out {tmp_path / 'c.png'}", monkeypatch)
    assert (tmp_path / "f/3.png").stat().st_size > 10_000 and (tmp_path / "c.png").stat().st_size > 10_000
    for words, message in ((f"pairs {data} --policy {toy_base} --out x.png", "Figure 3 needs a critic"),
                           (f"log {log} --out {tmp_path / 'x.none'}", "x.none: ")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            run_here(f"python -m lab.figures {words}", monkeypatch)
    _, axes = pyplot.subplots()
    figures.figure3({name: {"p(chosen)": cell(x), "p(rejected)": cell(x + 0.2), "accuracy": cell(y)}
                     for name, x, y in (("PBAA", 0.2, 0.7), ("SSO", 0.5, 0.9))}, axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["PBAA", "SSO"]
    arrow, = axes.texts
    assert arrow.xyann == (pytest.approx(0.3), 0.7) and arrow.xy == (pytest.approx(0.6), 0.9)
