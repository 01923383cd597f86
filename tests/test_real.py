"""The lab's runs on real weights, on a tiny model: that they run, resume and measure what they say."""

import json
from pathlib import Path

import pytest

import sso
from conftest import run_here, write_jsonl
from lab import facts, form, mixed, real, toy
from plumbing import cli, files
from plumbing.chat import load_chat

SMALL = "--principles.max-new-tokens 4 --responses.max-new-tokens 8 --policy.epochs 1 --generator.epochs 1"


def test_the_miniature_is_the_toy_world_in_english():
    records, held = toy.make_records(0)
    for record in records[:50] + held[:50]:
        query = record["prompt"]
        assert real.words(real.english(query)) == query
        assert real.grade(real.english(query), "Sorry but i can not help with that.") == toy.grade(query, "sorry but i can not help with that .")
    query = "Sort these words: fox axe."
    assert real.english("sort these words : fox axe .") == query and real.words(query) == "sort these words : fox axe ."


def test_a_base_model_learns_its_chats_and_is_made_once(qwen3, tmp_path, capsys, monkeypatch):
    def loss(model):
        chat, rng, total = load_chat(model), real.random.Random(0), 0.0
        for _ in range(16):
            messages, answer = real.make_chat(rng)
            prompt = sso.encode_prompt(chat.tokenizer, messages)
            ids = sso.encode_response(chat.tokenizer, chat.end_id, sso.Response(answer, True))
            logps, tokens = sso.pair_logps(chat.model, [[sso.Pair(prompt, ids, ids)]], chat.pad_id)
            total += sso.sft_loss(logps[0], tokens[0]).item() / 16
        return total

    out = tmp_path / "base"
    run_here(f"python -m lab.real base --model {qwen3} --out {out} --chats 32 --batch-size 4 --lr 3e-3", monkeypatch)
    assert loss(out) < loss(qwen3) - 0.5
    run_here(f"python -m lab.real base --model {qwen3} --out {out}", monkeypatch)
    assert "complete" in capsys.readouterr().out


def test_the_arms_run_in_a_grid_of_learning_rates_and_report_every_cell(qwen3, tmp_path, monkeypatch):
    command = (f"python -m lab.real arms --model {qwen3} --recipe lab/miniature.toml --out {tmp_path} --count 9 {SMALL} "
               "--generator-lrs 1e-4,1e-3 --policy-lrs 1e-3 --names PBAA,SSO")
    run_here(command, monkeypatch)
    report = json.loads((tmp_path / "report.json").read_text())
    cells = ["PBAA, policy 0.001", "SSO, generator 0.0001, policy 0.001", "SSO, generator 0.001, policy 0.001"]
    assert list(report["rows"]) == ["base", *cells]
    for cell in cells:
        row = report["rows"][cell]
        assert {"quality", "accuracy", "p(chosen)", "p(rejected)", "p(original)"} <= row.keys()
        assert row["answers"] == row["pairs"] == 9
        last = files.read_jsonl(tmp_path / cell.split(", ")[0] / cell.partition(", ")[2] / "log.jsonl", needs=())[-1]
        assert row["policy's p(original)"] == last["p(original)"]
        assert row["policy's p(original) before"] == last["p(original) before"]
    first, second = [report["rows"][cell]["p(rejected)"] for cell in cells[1:]]
    assert first != second                              # pairs of two generators
    logs = {cell: files.read_jsonl(tmp_path / "SSO" / f"generator {cell}" / "log.jsonl", needs=())
            for cell in ("0.0001", "0.001")}
    assert max(row["lr"] for row in logs["0.001"]) == 1e-3 and max(row["lr"] for row in logs["0.0001"]) == 1e-4
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert costs["principles"]["seconds"] > 0
    for step in ("responses", "PBAA, policy 0.001", "SSO: generator 0.001", "SSO: pairs of 0.001"):
        assert costs[step]["tokens a second"] > 0 and costs[step]["peak bytes"] > 1e8
    run_here(command, monkeypatch)                                   # complete: what it took stays
    assert json.loads((tmp_path / "costs.json").read_text()) == costs


def test_a_mixed_run_draws_its_queries_and_takes_principles_from_a_file(qwen3, tmp_path, monkeypatch):
    run_here(f"python -m lab.mixed --out {tmp_path} --count 6", monkeypatch)
    queries = files.read_jsonl(tmp_path / "queries.jsonl")
    texts = [record["prompt"][0]["content"] for record in queries]
    assert len(texts) == 12 and all(text in facts.QUERIES for text in texts[::2])
    for text in texts[1::2]:
        assert form.parse(text) and text not in facts.QUERIES
    assert mixed.grade("What is the capital of France?", "Paris") == 1.0
    assert mixed.grade(texts[1], "") == form.grade(texts[1], "") == 0.0
    principles = [record | {"good_principle": "Be right.", "bad_principle": "Be wrong."} for record in queries]
    write_jsonl(tmp_path / "principles.jsonl", principles)
    drawn = []
    for seed in (1, 2):
        out = tmp_path / str(seed)
        run_here(f"python -m lab.real arms --model {qwen3} --recipe lab/miniature.toml --out {out} --count 4 {SMALL} "
                 f"--seed {seed} --names PBAA --grader lab/mixed.py --queries {tmp_path / 'queries.jsonl'} "
                 f"--heldout {tmp_path / 'heldout.jsonl'} --principles {tmp_path / 'principles.jsonl'}", monkeypatch)
        drawn.append([record["prompt"] for record in files.read_jsonl(out / "queries.jsonl")])
        assert {record["good_principle"] for record in files.read_jsonl(out / "responses.jsonl")} == {"Be right."}
    assert drawn[0] != drawn[1] and len(drawn[0]) == 4


def test_ways_of_giving_a_principle_are_compared_on_the_same_queries(qwen3, tmp_path, capsys, monkeypatch):
    run_here(f"python -m lab.facts --out {tmp_path}", monkeypatch)
    run_here(f"python -m lab.real ways --model {qwen3} --principles {tmp_path / 'principles.jsonl'} "
             f"--grader lab/facts.py --recipe recipes/small.toml --out {tmp_path / 'ways'} --count 4 --max-new-tokens 4", monkeypatch)
    notes = [(tmp_path / f"ways/{name}.jsonl.args.json").read_text() for name in ("paper", "query-principle")]
    assert notes[0] != notes[1]         # the paper's way is that of sso.PROMPTS, whatever the recipe's is
    report = json.loads((tmp_path / "ways/report.json").read_text())
    assert list(report["rows"]) == list(cli.load_toml("lab/ways.toml"))
    asked = {tuple(record["prompt"][0]["content"] for record in files.read_jsonl(tmp_path / "ways" / f"{name}.jsonl"))
             for name in report["rows"]}
    assert len(asked) == 1 and len(next(iter(asked))) == 4
    assert len({row["yo"]["mean"] for row in report["rows"].values()}) == 1       # yo is the same for all
