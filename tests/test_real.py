"""The runs on real weights, on a tiny model: that they run, continue, and measure what they say."""

import hashlib
import json
import random

import pytest

import sso
import train
from conftest import log, make_checkpoint, run_here, times, write_jsonl
from lab import arms, real
from plumbing.models import load_chat
from plumbing.recipes import load_toml
from plumbing.records import read_json, read_jsonl
from toy import world

SMALL = "--set principles.max_new_tokens=4 --set responses.max_new_tokens=8"


@pytest.fixture
def grader(tmp_path):
    (tmp_path / "grader.py").write_text("def grade(query, response, finished):\n    return len(set(response)) / 200\n")
    return tmp_path / "grader.py"


def test_the_miniature_is_the_toy_world_in_english():
    records, _ = world.make_records(0)
    for record in records[:50]:
        query = record["prompt"]
        assert real.words(real.english(query)) == query
        assert real.grade(real.english(query), "Fox, owl.", True) == world.grade(query, "fox owl .", True)
    assert real.english("sort these words : fox axe .") == "Sort these words: fox axe."
    for seed in range(30):
        system, query, toy_answer = world.make_chat(random.Random(seed))
        *before, user = real.make_chat(random.Random(seed))[0]
        answer = real.make_chat(random.Random(seed))[1]
        if toy_answer.startswith("bad guideline"):
            system = "Write guidelines."
            answer = answer.replace("Bad guideline:", "bad guideline").replace("\nGood guideline:", " ### good guideline")
        assert user == {"role": "user", "content": real.english(query)} and real.words(answer) == toy_answer.replace("### ", "")
        assert before == ([{"role": "system", "content": real.english(system)}] if system else [])


def test_a_base_model_is_trained_on_its_answers_alone(qwen3, tmp_path):
    """The first step's loss is by hand minus the mean log-prob of a token of the answer, a mean over 16 chats."""
    out = tmp_path / "base"
    run_here(f"python -m lab.real base --model {qwen3} --out {out} --chats 80")
    rows = log(out)
    assert len(rows) == 5 and rows[-1]["loss"] < rows[0]["loss"]
    chat, rng = load_chat(qwen3), random.Random(0)
    losses = []
    for messages, answer in [real.make_chat(rng) for _ in range(80)]:
        prompt = sso.encode_prompt(chat.tokenizer, messages)
        ids = sso.encode_response(chat.tokenizer, chat.end_id, sso.Response(answer, True))
        logps, _ = sso.pair_logps(chat.model, [[sso.Pair(prompt, ids, ids)]], chat.pad_id)
        losses.append(-logps[0].item() / len(ids))
    first = train.make_batches(80, 16, 1, seed=0)[0]
    assert rows[0]["loss"] == pytest.approx(sum(losses[i] for i in first) / 16, rel=1e-4)


def test_arms_of_real_weights_report_their_measures_and_costs(qwen3, tmp_path):
    """In the miniature; once more, and nothing is made again; with another learning rate, and arms are added."""
    line = (f"python -m lab.real arms --model {qwen3} --recipe lab/miniature.toml --out {tmp_path} --count 9 {SMALL} "
            "--names PBAA,SSO")
    run_here(line)
    report = read_json(tmp_path / "report.json")
    names = ["PBAA, policy 2e-05", "SSO, generator 2e-05, policy 2e-05"]
    assert list(report["rows"]) == ["base", *names] and report["settings"]["policy"]["lr"] == 2e-5
    for name in names:
        row = report["rows"][name]
        assert {"quality", "win rate", "accuracy", "p(chosen)", "p(rejected)", "p(original)"} <= row.keys()
        assert row["answers"] == row["pairs"] == 9
        assert row["policy's p(original)"] == log(tmp_path / name / "policy")[-1]["p(original)"]
    steps = {"principles.jsonl", "responses.jsonl", "base/answers.jsonl",
             "SSO, generator 2e-05/generator-sso", "SSO, generator 2e-05/pairs-sso.jsonl"}
    steps |= {f"{name}/{step}" for name in names for step in ("policy", "answers.jsonl")}
    assert report["costs"].keys() == {f"{step}.costs.json" for step in steps}
    assert all(cost["seconds"] > 0 and cost["peak bytes"] > 1e8 for cost in report["costs"].values())
    assert report["weights"] == {"model.safetensors": hashlib.sha256((qwen3 / "model.safetensors").read_bytes()).hexdigest()}
    before = times(tmp_path, "*.args.json")
    run_here(line)
    assert read_json(tmp_path / "report.json") == report and before == times(tmp_path, "*.args.json")
    run_here(f"{line} --set policy.lr=1e-3")
    assert list(read_json(tmp_path / "report.json")["rows"])[3:] == ["PBAA, policy 0.001", "SSO, generator 2e-05, policy 0.001"]
    assert before.items() < times(tmp_path, "*.args.json").items()


def test_a_loser_may_be_the_plain_answer_to_another_query(tmp_path):
    """Each is the loser of one other query, and of none that it answers."""
    records = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad", "original": f"yo {i}", "original_finished": i > 3}
               for i in range(9)]
    arms.cross(write_jsonl(tmp_path / "r.jsonl", records), tmp_path / "pairs.jsonl", seed=0)
    made = read_jsonl(tmp_path / "pairs.jsonl")
    losers = [sso.record_response(record, "bad") for record in made]
    assert sorted(losers) == [sso.Response(f"yo {i}", i > 3) for i in range(9)]
    for i, record in enumerate(made):
        assert losers[i].text != f"yo {i}" and sso.record_response(record, "good").text == f"good {i}"


def test_seeds_are_compared_over_queries(qwen3, grader, tmp_path, capsys):
    """The gain of an arm is paired: of each query the mean over the seeds, then mean and standard error over queries."""
    marks = {"base": [[20, 40], [60, 80]], "SSO": [[100, 140], [100, 180]]}     # of an arm and a seed: its answers' marks
    for name, seeds in marks.items():
        for seed, lengths in enumerate(seeds):
            answers = [{"prompt": f"q{i}", "original": "".join(map(chr, range(100, 100 + length)))}
                       for i, length in enumerate(lengths)]
            (tmp_path / f"{seed}/{name}").mkdir(parents=True)
            write_jsonl(tmp_path / f"{seed}/{name}/answers.jsonl", answers)
            rows = {each: {"quality": {"mean": 0.5}} for each in marks}
            (tmp_path / f"{seed}/report.json").write_text(json.dumps({"rows": rows}))
    run_here(f"python -m lab.real compare {tmp_path}/0 {tmp_path}/1 --grader {grader} --first SSO --out {tmp_path}/both.json")
    rows = read_json(tmp_path / "both.json")["rows"]
    gains = [(100 + 100 - 20 - 60) / 400, (140 + 180 - 40 - 80) / 400]          # the grader's mark is a share of 200
    assert rows["base"]["SSO better by"] == pytest.approx({"mean": sum(gains) / 2, "se": abs(gains[0] - gains[1]) / 2, "n": 2})
    assert rows["SSO"]["SSO better by"]["mean"] == 0
    assert "SSO better by" in capsys.readouterr().out


def test_worlds_are_looked_at_with_the_principles_of_each_writer(qwen3, tmp_path):
    line = (f"python -m lab.real worlds --model {qwen3} --out {tmp_path} --count 3 --names line,facts "
            "--set principles.max_new_tokens=4")
    run_here(f"{line} --strong {make_checkpoint(tmp_path / 'strong', 'llama')}")
    report = read_json(tmp_path / "report.json")
    assert list(report["rows"]) == [f"{world}, {writer}" for world in ("line", "facts")
                                    for writer in ("hand", "itself", "stronger")]
    for row in report["rows"].values():
        assert row["pairs"] == row["accuracy"]["n"] == 3 and row["verdict"] and {"y+", "yo", "y-", "accuracy", "p(rejected)"} <= row.keys()
    principles = {writer: read_jsonl(tmp_path / f"line/{writer}/principles.jsonl") for writer in ("hand", "itself", "stronger")}
    assert len({json.dumps(records) for records in principles.values()}) == 3
    assert read_json(tmp_path / "line/original.jsonl.args.json")["max_new_tokens"] == 64
    for name in ("line", "facts"):          # the same principles as files
        path = tmp_path / f"{name}/stronger/principles.jsonl"
        records = [record | {"fallback": "empty"} for record in read_jsonl(path)]
        write_jsonl(tmp_path / f"strong/{name}.jsonl", records)
        for made in path.parent.glob("*.jsonl*"):
            made.unlink()
    run_here(f"{line} --strong {tmp_path}/strong")
    for name, row in read_json(tmp_path / "report.json")["rows"].items():
        assert row["fallback"]["mean"] == (1 if "stronger" in name else report["rows"][name]["fallback"]["mean"])
        assert row["p(rejected)"] == report["rows"][name]["p(rejected)"]


def test_arms_draw_the_queries_of_a_file_by_seed_and_take_its_principles(qwen3, grader, tmp_path):
    principles = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{i}", "good_principle": f"good {i}",
                                                     "bad_principle": "bad"} for i in range(12)])
    held = write_jsonl(tmp_path / "held.jsonl", [{"prompt": f"q{i}"} for i in range(3)])
    drawn = []
    for seed in (1, 2):
        run_here(f"python -m lab.real arms --model {qwen3} --recipe lab/miniature.toml --out {tmp_path}/{seed} --seed {seed} "
                 f"--count 4 {SMALL} --names PBAA --grader {grader} --queries {principles} --heldout {held} "
                 f"--principles {principles}")
        records = read_jsonl(tmp_path / f"{seed}/responses.jsonl")
        drawn.append([record["prompt"][0]["content"] for record in records])
        assert [record["good_principle"] for record in records] == [f"good {query[1:]}" for query in drawn[-1]]
    assert drawn[0] != drawn[1] and len(drawn[0]) == 4 and not {"q0", "q1", "q2"} & set(drawn[0] + drawn[1])


def test_ways_of_giving_a_principle_are_compared_on_the_same_queries(qwen3, grader, tmp_path):
    principles = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{i}", "good_principle": "good", "bad_principle": "bad"}
                                                    for i in range(4)])
    out = tmp_path / "ways"
    run_here(f"python -m lab.real ways --model {qwen3} --principles {principles} --grader {grader} --out {out} "
             "--recipe recipes/small.toml --set responses.max_new_tokens=4")
    rows = read_json(out / "report.json")["rows"]
    assert list(rows) == list(load_toml("lab/ways.toml"))
    assert len({row["yo"]["mean"] for row in rows.values()}) == 1       # yo is the same for all
    # The paper's way is that of sso.PROMPTS, whatever the recipe's is.
    assert read_json(out / "paper.jsonl.args.json")["good"] == sso.PROMPTS["good"]
    assert read_json(out / "system.jsonl.args.json")["bad"] == {"system": "{principle}", "user": "{query}"}
