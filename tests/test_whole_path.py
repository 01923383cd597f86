"""Every command of the README, as it stands there; the whole path on real architectures; what the report says."""

import json
import math
import os
import re
import runpy
import shlex
import shutil
import statistics
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
import sso
import toy
from conftest import ROOT, command, write_jsonl

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.replace("\\\n", "").splitlines()
            if line.strip() and not line.startswith("#")]
SETUP = "pip install -r requirements.txt && "
SMALL = ("--principles.max-new-tokens 6 --responses.max-new-tokens 6 --responses.batch-size 4 --generator.lr 1e-3 --policy.lr 1e-3 "
         "--policy.batch-size 3 --generator.batch-size 2 --policy.micro-batch-tokens 900")


def run_here(line, monkeypatch):
    """Run a command line in this process, in the current folder: as the user's, without the seconds of imports."""
    script, *words = shlex.split(line)[1:]
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_test_command_of_the_readme_is_what_ci_runs():
    assert SETUP + "python -m pytest" in COMMANDS and SETUP + "python -m pytest" in (ROOT / ".ci/run").read_text()


def test_every_function_and_file_that_the_readme_names_exists():
    names = re.findall(r"`(sso|generate|train|eval|toy|study|figures|bench)\.(\w+)", README)
    assert len(names) > 20
    for module, name in names:
        assert name == "py" or hasattr(__import__(module), name), f"{module}.{name}"
    for script, lines in re.findall(r"`(\w+\.py)` \| (\d+) \|", README):
        assert abs(len((ROOT / script).read_text().splitlines()) - int(lines)) <= 5, script


def test_every_other_command_of_the_readme(toy_base, qwen3, small_study, tmp_path, monkeypatch, capsys):
    """In the order of the README, with a toy base trained for seconds, few queries, a tiny checkpoint for Qwen, and a
    study of one seed and one round."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    write_jsonl(tmp_path / "data/queries.jsonl", generate.read_jsonl(ROOT / "data/queries.jsonl")[:12])
    run_here("python train.py", monkeypatch)
    ran = []
    for line in COMMANDS:
        if line.startswith((SETUP, "pip ")):
            continue
        line = line.replace("Qwen/Qwen2.5-0.5B-Instruct", str(qwen3)).replace("--seeds 5", "--seeds 1").replace("--rounds 6", "--rounds 1")
        line += f" {SMALL}" if line.startswith(f"python train.py --model {qwen3}") else ""
        try:
            run_here(line, monkeypatch)
        except SystemExit as end:              # matplotlib is optional
            assert "--plot" in line and "needs matplotlib" in str(end) and not find_spec("matplotlib"), line
        ran.append(line)
    printed = capsys.readouterr().out
    assert len(ran) > 20 and "no judge" in printed and "paired difference" in printed
    assert "Table 2: reward models" in printed and ("Over rounds: quality" in printed or not find_spec("matplotlib"))
    for script in ("train.py", "generate.py", "eval.py", "toy.py", "bench.py"):
        assert f"`{script}`" in README and any(script in line for line in ran)


def test_the_whole_path_on_a_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    """Qwen2, Qwen3 and Llama, with their own templates: all four steps, again without doing anything, and continued."""
    prompts = ["Name a fruit.", "Why is the sky blue?", "Write a haiku about rain.", "2 + 2?", "Say hi.", "What is DPO?"]
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": prompt, "source": "me"} for prompt in prompts])
    line, out = f"python train.py --model {checkpoint} --queries {queries} --out {tmp_path / 'run'} {SMALL}", tmp_path / "run"
    run_here(line, monkeypatch)
    printed = capsys.readouterr().out
    assert "no judge" in printed and "| SSO " in printed
    report = json.loads((out / "report.json").read_text())
    for name in ("PBAA", "SSO"):
        assert 0 < report[name]["p(chosen)"]["mean"] < 1 and report[name]["accuracy"] == "no judge"
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name in ("generator", "policy", "pbaa"):                 # ordinary folders, tokenizer and template included
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out / name), AutoTokenizer.from_pretrained(out / name)
        assert model.dtype == torch.float32 and tokenizer.chat_template == AutoTokenizer.from_pretrained(checkpoint).chat_template
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters()))
        assert model.generation_config.repetition_penalty == base.generation_config.repetition_penalty == 1.1
    pairs = [json.loads(text) for text in (out / "pairs.jsonl").read_text().splitlines()]
    assert all([m["role"] for m in pair["prompt"] + pair["chosen"] + pair["rejected"]] == ["user", "assistant", "assistant"]
               for pair in pairs)
    held, used = ({r["prompt"][0]["content"] for r in generate.read_jsonl(out / f"{n}.jsonl")} for n in ("heldout", "queries"))
    assert len(held) == 1 and held | used == set(prompts) and not held & used

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    run_here(line, monkeypatch)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    weights = (out / "policy/model.safetensors").read_bytes()
    shutil.rmtree(out / "policy")
    (out / "report.json").unlink()
    run_here(line, monkeypatch)
    assert (out / "policy/model.safetensors").read_bytes() == weights and (out / "report.json").exists()

    with pytest.raises(SystemExit, match="error: .*was made with seed = 0, not 1"):
        run_here(line + " --seed 1", monkeypatch)
    with pytest.raises(SystemExit, match="error: .*generator was made with beta = 0.1, not 0.3"):
        run_here(line + " --generator.beta 0.3", monkeypatch)
    with pytest.raises(SystemExit, match="error: .*generator was made with lr = 0.001, not 5e-07"):
        run_here(line.replace("--generator.lr 1e-3", ""), monkeypatch)
    # Each step is made of what the paper says: the original policy is trained, not the generator.
    made_of = {name: json.loads((out / name).read_text()) for name in (
        "generator/args.json", "policy/args.json", "pbaa/args.json", "pairs.jsonl.args.json")}
    base, lr = os.path.relpath(checkpoint, out / "policy"), 1e-3
    assert [(note["model"], note.get("data"), note.get("lr")) for note in made_of.values()] == [
        (base, "../responses.jsonl", lr), (base, "../pairs.jsonl", lr), (base, "../responses.jsonl", lr),
        ("generator", None, None)]


def test_a_run_with_a_bad_model_or_queries_leaves_nothing(qwen3, tmp_path, monkeypatch):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a"}])
    for model, file, message in ((tmp_path / "none", queries, "no such folder"), (qwen3, one, "at least two queries"),
                                 (qwen3, tmp_path / "nowhere.jsonl", "nowhere.jsonl: no such file")):
        with pytest.raises(SystemExit, match=message):
            run_here(f"python train.py --model {model} --queries {file} --out {tmp_path / 'run'}", monkeypatch)
        assert not (tmp_path / "run").exists()
    # A split that lies there already is not taken for this run's own: its held-out queries may differ.
    (tmp_path / "mine").mkdir()
    mine = write_jsonl(tmp_path / "mine/queries.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(SystemExit, match="queries.jsonl exists and was not made by this command"):
        run_here(f"python train.py --model {qwen3} --queries {mine} --out {tmp_path / 'mine'}", monkeypatch)


def test_report_of_several_runs_by_hand(tmp_path):
    """Mean ± sd over runs; the paired difference with its standard error, on hand-made numbers."""
    import eval as evaluation
    qualities = [(0.4, 0.5, 0.7), (0.5, 0.7, 0.8), (0.6, 0.6, 0.9)]
    for i, row in enumerate(qualities):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "report.json").write_text(json.dumps(
            {name: {"quality": {"mean": q, "se": 0.1, "n": 5}} for name, q in zip(("base", "PBAA", "SSO"), row)}))
    printed = command("eval.py", "report", *(tmp_path / str(i) for i in range(3))).stdout
    assert "0.800 ± 0.100" in printed and "0.600 ± 0.100" in printed           # SSO and PBAA, mean ± sd
    gains = [c - b for _, b, c in qualities]
    assert f"{statistics.fmean(gains):.3f} ± {statistics.stdev(gains) / math.sqrt(3):.3f}" in printed
    assert evaluation.stat([1.0, 2.0, 3.0, 6.0]) == {"mean": 3.0, "se": pytest.approx(statistics.stdev([1, 2, 3, 6]) / 2), "n": 4}


def test_data_measures_by_hand(toy_base, tmp_path):
    """On-policy probability is exp(mean token log-prob) without principle; accuracy and ties are the grader's."""
    import eval as evaluation
    query = "sort these words : plum fox axe red"
    rows = [("axe fox plum red .", "plum fox axe red ."), ("axe fox plum red .", "axe fox plum red . ."),
            ("fox axe plum red .", "axe fox plum red .")]
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": query, "chosen": c, "rejected": r, "good_principle": "x"} for c, r in rows])
    measures, chat = evaluation.data(path, toy_base), generate.load_chat(toy_base)
    def probability(text):
        prompt = sso.encode_prompt(chat.tokenizer, [{"role": "user", "content": query}])
        response = sso.encode_response(chat.tokenizer, chat.end_id, text, True)
        logits = chat.model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return math.exp(sum(logits[len(prompt) + i - 1, t].item() for i, t in enumerate(response)) / len(response))
    assert measures["p(chosen)"]["mean"] == pytest.approx(statistics.fmean(probability(c) for c, _ in rows), rel=1e-4)
    assert measures["p(rejected)"]["mean"] == pytest.approx(statistics.fmean(probability(r) for _, r in rows), rel=1e-4)
    assert measures["ties"]["mean"] == pytest.approx(1 / 3)
    assert measures["accuracy"] == evaluation.stat([1.0, 0.5, 0.0])              # a tie is a half
    both = statistics.fmean(probability(text) for row in rows for text in row)
    assert measures["p(both)"]["mean"] == pytest.approx(both, rel=1e-4)
    lists = evaluation.distributions(path, toy_base)
    assert lists["rejected"] == pytest.approx([probability(r) for _, r in rows], rel=1e-4) and "original" not in lists
    records = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(tmp_path / "e.jsonl", records + [records[0] | {"rejected": rows[0][0]}] * 5)         # equal pairs
    with_equal = evaluation.data(tmp_path / "e.jsonl", toy_base)
    assert with_equal["ties"] == evaluation.stat([0.0, 1.0, 0.0] + [1.0] * 5) and with_equal["pairs"] == 3
    # y+ over yo: the rejected response is the original one.
    write_jsonl(tmp_path / "o.jsonl", [r | {"original": r["rejected"], "rejected": "x"} for r in records])
    assert evaluation.data(tmp_path / "o.jsonl", toy_base, rows="original")["p(rejected)"] == measures["p(rejected)"]
    assert measures["tokens chosen"]["mean"] == 6 and measures["tokens rejected"]["mean"] == pytest.approx(19 / 3)


def test_policy_measures_by_hand(toy_base, tmp_path, monkeypatch):
    """Quality by the grader; wins, ties and losses against the first model; dropped pairs as ties."""
    import eval as evaluation
    queries = ["sort these words : plum fox axe red", "say backwards : plum fox axe red", "keep only the tools : axe red saw fig"]
    right, wrong = ["axe fox plum red .", "red axe fox plum .", "axe saw ."], ["plum fox axe red .", "plum .", "axe ."]
    answers = {"a": [(right[0], True), (wrong[1], True), (right[2], True)],
               "b": [(right[0], True), (right[1], True), (right[2], False)]}
    def fake(model, queries_file, out, roles, **given):
        write_jsonl(out, [{"prompt": q, "original": text, "original_finished": finished}
                          for q, (text, finished) in zip(queries, answers[model.name])])
        assert roles == ("original",) and given == {"seed": 4}
    monkeypatch.setattr(generate, "responses", fake)
    monkeypatch.setattr(generate, "world", lambda model: toy)
    rows = evaluation.policies({name: tmp_path / name for name in "ab"}, None, tmp_path, seed=4)
    assert rows["a"]["quality"]["mean"] == pytest.approx(2 / 3) and rows["b"]["quality"]["mean"] == pytest.approx(2.9 / 3)
    assert [rows["b"][key] for key in ("win", "tie", "loss")] == [pytest.approx(1 / 3)] * 3
    assert rows["b"]["win rate"]["mean"] == 0.5 and rows["a"]["win rate"]["mean"] == 0.5 and rows["a"]["tie"] == 1
    assert rows["b"]["finished"]["mean"] == pytest.approx(2 / 3) and rows["b"]["answers"] == 3
    answers["b"][1], answers["b"][2] = (wrong[1], True), (wrong[2], True)
    worse = evaluation.policies({name: tmp_path / name for name in "ab"}, None, tmp_path, seed=4)["b"]
    assert worse["loss"] == pytest.approx(1 / 3) and worse["win"] == 0 and worse["win rate"]["mean"] == pytest.approx(1 / 3)


def test_the_first_command_of_the_readme(default_run):
    """`python train.py` on a clean checkout ends with the table, and the policy of SSO is the best of the three."""
    assert COMMANDS[0] == SETUP + "python train.py"
    process, folder = default_run                   # started when the session started: it takes minutes
    assert process.wait() == 0, (folder / "stderr").read_text()[-2000:]
    printed, report = (folder / "stdout").read_text(), json.loads((folder / "runs/toy/report.json").read_text())
    assert re.search(r"\n\| SSO +\| \d+ +\|", printed) and "loss a pair at step zero: 0.6931" in printed
    quality = {name: row["quality"]["mean"] for name, row in report.items()}
    assert quality["SSO"] > quality["PBAA"] > quality["base"]
    assert report["SSO"]["p(rejected)"]["mean"] > 1.5 * report["PBAA"]["p(rejected)"]["mean"]
    for name, row in report.items():
        assert f"{row['quality']['mean']:.3f} ± {row['quality']['se']:.3f}" in printed
    # What the report says of the pairs, computed again by a loop over the file.
    records = [json.loads(line) for line in (folder / "runs/toy/pairs.jsonl").read_text().splitlines()]
    grades = [[toy.grade(r["prompt"][0]["content"], r[c][0]["content"], r[f"{c}_finished"]) for c in ("chosen", "rejected")]
              for r in records]
    assert len(records) == toy.QUERIES
    scores = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in grades]
    assert report["SSO"]["pairs"] == sum(r["chosen"][0]["content"] != r["rejected"][0]["content"] for r in records)
    assert report["SSO"]["accuracy"]["mean"] == pytest.approx(statistics.fmean(scores))
    assert report["SSO"]["accuracy"]["se"] == pytest.approx(statistics.stdev(scores) / math.sqrt(toy.QUERIES))
    assert report["SSO"]["ties"]["mean"] == pytest.approx(scores.count(0.5) / toy.QUERIES)
