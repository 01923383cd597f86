"""Every command of the README, as it stands there, and every name in it."""

import ast
import io
import json
import math
import re
import shutil
import statistics
import tokenize
from importlib import import_module
from importlib.util import find_spec

import pytest

from conftest import ROOT, run_here, write_jsonl

import eval as evaluation
import sso
import train
from lab import bench, study, toy
from plumbing import cli, files
from plumbing.tables import print_table, show

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "GUIDE.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README + GUIDE, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines()
            if line.strip() and not line.startswith("#")]
SETUP = "pip install -r requirements.txt && "
SMALL = ("--principles.max-new-tokens 6 --responses.max-new-tokens 6 --responses.batch-size 4 --generator.lr 1e-3 "
         "--policy.lr 1e-3 --policy.batch-size 3 --generator.batch-size 2 --policy.micro-batch-tokens 900")
MODULES = {"sso": "sso", "generate": "generate", "train": "train", "eval": "eval", "run": "run"} | {
    name: f"plumbing.{name}" for name in ("chat", "checkpoint", "cli", "fast", "files", "principles", "sampling",
                                          "server", "tables", "watch")} | {
    name: f"lab.{name}" for name in ("bench", "facts", "figures", "form", "real", "reward", "smollm", "study", "toy")}


def test_the_test_command_of_the_readme_is_what_ci_runs():
    assert SETUP + "python -m pytest" in COMMANDS and SETUP + "python -m pytest" in (ROOT / ".ci/run").read_text()


def test_every_function_and_file_that_the_readme_names_exists():
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in
                   ("README.md", "GUIDE.md", "COSTS.md", "RESULTS.md", "lessons/README.md"))
    names = re.findall(rf"`(?:plumbing\.|lab\.)?({'|'.join(MODULES)})\.(\w+)", text)
    assert len(names) > 10
    for module, name in names:
        assert name in ("py", "toml", "json") or hasattr(import_module(MODULES[module]), name), f"{module}.{name}"
    for file in re.findall(r"`((?:plumbing/|lab/|recipes/|data/)?\w[\w.-]*\.(?:py|toml|txt))`", text):
        assert list(ROOT.rglob(file)), file
    sizes = re.findall(r"`([\w/]+\.py)` \| ([\d,]+) \|", README)
    assert len(sizes) == 5
    for script, tokens in sizes:
        assert tokens_of_code(ROOT / script) == pytest.approx(int(tokens.replace(",", "")), rel=0.03), script


def test_every_link_to_a_line_of_code_leads_to_the_definition_that_it_names():
    """`[what](file.py#L7 "name")`: line 7 defines that name; every other link is to a file that is there."""
    links = re.findall(r"\]\(([\w/.]+\.py)#L(\d+) \"(\w+)\"\)", README)
    assert len(links) > 20
    for file, number, name in links:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        right = [i for i, line in enumerate(lines, 1) if re.match(rf"def {name}\(|{name} = ", line)]
        assert right == [int(number)], f"{file}: {name} is on line {right}, README.md says {number}"
    assert README.count(".py#L") == len(links)
    for page in ("README.md", "GUIDE.md", "RESULTS.md", "COSTS.md", "lessons/README.md"):
        for target in re.findall(r"\]\(([^)\s#]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), (page, target)


def test_the_readmes_five_rows_are_those_of_the_committed_first_run(capsys):
    rows = json.loads((ROOT / "results/first-run.json").read_text())["rows"]
    evaluation.print_report(rows)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 9 and all(line in README for line in printed)


def test_what_the_readmes_commands_gave_on_smollm2_is_in_the_committed_file(capsys):
    found, text = results_of("smollm2-run.json"), (ROOT / "RESULTS.md").read_text("utf-8")
    evaluation.print_report(found["rows"])
    for measures in found["preflight"].values():
        evaluation.print_preflight(measures)
    printed = table_lines(capsys.readouterr().out)
    assert len(printed) == 15 and all(line in text for line in printed)
    assert f"{found['seconds'] / 60:.0f} minutes, {found['peak bytes'] / 1e9:.1f} GB" in README
    assert found["command"] in README
    replaced = sum(map(int, re.findall(r": (\d+)", found["principles"])))
    assert f"{replaced} in 128 were replaced" in text


def test_the_tables_of_the_runs_on_real_weights_are_those_of_the_committed_files(capsys):
    text = (ROOT / "RESULTS.md").read_text("utf-8").split("# The toy world")[0]
    columns = ["quality", "accuracy", "p(chosen)", "p(rejected)", "policy's p(original)"]
    found = set()
    for name in ("miniature.json", "figure3-smollm2.json"):
        results = results_of(name)
        assert "settings" in results and len(results["seeds"]) > 1
        for seed, run_of_it in results["seeds"].items():
            print_table(run_of_it["rows"], columns)
            lines = capsys.readouterr().out.splitlines()
            assert len(lines) > 4 and all(line in text for line in lines), (name, seed)
            for step in run_of_it["costs"].values():
                assert step["seconds"] >= 0 and step["peak bytes"] > 1e8
        found |= set(cells_of(results))
    found |= set(cells_of(results_of("ways.json")))
    # What the prose says is a cell of the files, or a paired difference in them.
    said = re.findall(r"[-−]?\d\.\d{3}\s±\s\d\.\d{3}", re.sub(r"(?m)^\|.*$", "", text))
    assert len(said) > 4 and {" ".join(each.split()).replace("−", "-") for each in said} <= found | {f"-{each}" for each in found} | {
        each[1:] for each in found if each.startswith("-")}


def test_the_ways_of_giving_a_principle_are_those_of_the_committed_file(capsys):
    text = (ROOT / "RESULTS.md").read_text("utf-8")
    for rows in results_of("ways.json")["all seeds"].values():
        print_table(rows, ["y+", "yo", "y-", "accuracy", "y+ over yo"])
        printed = table_lines(capsys.readouterr().out)
        assert len(printed) == 6 and all(line in text for line in printed)


def test_step_1_by_reason_is_that_of_the_committed_file(capsys):
    rows = results_of("step1.json")["rows"]
    assert len(rows) == 2 and all(sum(row.values()) == 256 for row in rows.values())
    print_table(rows, list(next(iter(rows.values()))))
    printed = table_lines(capsys.readouterr().out)
    assert len(printed) == 3 and all(line in (ROOT / "RESULTS.md").read_text("utf-8") for line in printed)


def cells_of(results):
    """Every mean with its error in a file of results, as it is printed."""
    if isinstance(results, list):
        results = dict(enumerate(results))
    if isinstance(results, dict) and {"mean", "se"} <= results.keys():
        yield show(results)
    elif isinstance(results, dict):
        for part in results.values():
            yield from cells_of(part)


def results_of(name):
    """A committed file of results. It says where it is from."""
    found = json.loads((ROOT / "results" / name).read_text())
    assert {"command", "machine", "commit", "versions"} <= found.keys()
    return found


def table_lines(printed):
    return [line for line in printed.splitlines() if line.startswith("|") and set(line) - set("|- ")]


def test_the_studys_tables_and_differences_are_those_of_the_committed_file(capsys):
    found, text = results_of("study.json"), (ROOT / "RESULTS.md").read_text("utf-8").split("# The toy world")[1]
    study.print_tables(found["runs"], found["rounds"])
    printed = table_lines(capsys.readouterr().out)
    assert len(printed) > 80 and table_lines(text) == [line for line in table_lines(text) if line in printed]
    assert set(printed) <= set(table_lines(text))
    # What the prose says, "0.116 ± 0.035", is a paired difference of two rows in some column.
    names, said = list(found["runs"][0]), re.findall(r"[-−]?\d\.\d{3} ± \d\.\d{3}", re.sub(r"(?m)^\|.*$", "", text))
    differences = set()
    for column in ("quality", "accuracy"):
        for a in names:
            for b in names:
                differences.add(show(study.paired(found["runs"], a, b, column)))
    assert len(said) > 8 and {each.replace("−", "-") for each in said} <= differences


def test_the_table_of_peak_memory_is_that_of_the_committed_benchmark(capsys):
    rows, = results_of("bench-memory.json")["tables"]
    print_table(rows, ["extra GiB"])
    printed = table_lines(capsys.readouterr().out)
    assert len(printed) > 3 and all(line in (ROOT / "COSTS.md").read_text("utf-8") for line in printed)


@pytest.mark.parametrize("name", ["bench", "bench-trl", "bench-smollm2-trl", "bench-smollm2-sampling",
                                  "bench-smollm2-step1", "bench-toy"])
def test_the_tables_of_the_benchmark_are_those_of_the_committed_files(name, capsys):
    for rows in results_of(f"{name}.json")["tables"]:
        print_table(rows, bench.COLUMNS)
        assert len(rows) > 1 and capsys.readouterr().out in (ROOT / "COSTS.md").read_text("utf-8")


def test_the_steps_of_the_runs_on_real_weights_cost_what_the_committed_files_say():
    text = (ROOT / "COSTS.md").read_text("utf-8")
    for name in ("miniature.json", "figure3-smollm2.json"):
        for step, cost in results_of(name)["seeds"]["1"]["costs"].items():
            speed = f"{cost['tokens a second']:.0f}" if "tokens a second" in cost else "-"
            cells = [step, f"{cost['seconds'] / 60:.1f}", speed, f"{cost['peak bytes'] / 1e9:.1f}"]
            assert any([cell.strip() for cell in line.split("|")[1:-1]] == cells for line in text.splitlines()), step


def tokens_of_code(path):
    """Names, operators and literals of a Python file; not comments, docstrings and line breaks."""
    text, documentation = path.read_text(encoding="utf-8"), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            documentation |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    count = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]        # an f-string is one token, as it is before Python 3.12
        if kind == "FSTRING_END":
            depth -= 1
        elif depth == 0 and token.type not in no_code and token.start[0] not in documentation:
            count += 1
        if kind == "FSTRING_START":
            depth += 1
    return count


def test_the_shortened_worked_example_is_of_what_sso_prints(capsys):
    """In its order; but for the last digits, which are those of one machine."""
    example, = re.findall(r"Shortened:\n\n```\n(.*?)```", README, re.DOTALL)
    sso.worked_example()
    printed = re.sub(r"\d\.\d+", "#", capsys.readouterr().out)
    at = 0
    for part in re.sub(r"\d\.\d+", "#", example).split("...\n"):
        for line in part.splitlines(keepends=True):
            assert line in printed[at:], line
            at = printed.index(line, at) + len(line)


def test_the_readmes_objective_and_loss_of_ones_own_run(toy_base, tmp_path, monkeypatch):
    """The blocks of Python of README and guide, as they stand there, in the toy world with few queries; SimPO scores no
    reference."""
    blocks = re.findall(r"```python\n(.*?)```", README + GUIDE, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.setattr(toy, "QUERIES", 24)
    monkeypatch.setattr(toy, "HELDOUT", 8)
    monkeypatch.setattr(toy, "build", lambda out, *args, **how: shutil.copytree(toy_base, out))
    monkeypatch.setattr(sso, "PAIRS", sso.PAIRS | {})
    monkeypatch.setattr(sso, "BASE_LOSSES", sso.BASE_LOSSES | {})
    monkeypatch.setattr(sso, "REFERENCE_FREE", set())
    monkeypatch.setitem(cli.CHOICES, "objective", sso.PAIRS)
    monkeypatch.setitem(cli.CHOICES, "base_loss", sso.BASE_LOSSES)
    exec(blocks[0], {})
    made_from = json.loads((tmp_path / "runs/mine/generator/args.json").read_text())
    assert made_from["objective"] == "mine" and "mine" in json.loads((tmp_path / "runs/mine/report.json").read_text())
    first = files.read_jsonl(tmp_path / "runs/hinge/policy/log.jsonl", needs=())[0]
    assert first["base"] == 1.0                     # max(0, 1 - 0): policy = reference
    monkeypatch.setattr(train, "score", None)       # what would score the reference
    exec(blocks[1], {})
    made_from = json.loads((tmp_path / "runs/simpo/policy/args.json").read_text())
    assert (made_from["base_loss"], made_from["margin"], made_from["beta"]) == ("simpo", 0.5, 2.0)


def test_every_other_command_of_the_readme(toy_base, qwen3, small_study, tmp_path, monkeypatch, capsys):
    """In the order of the README, with a toy base trained for seconds, few queries, a tiny checkpoint for Qwen, and a
    study of one seed and one round."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "recipes", "lab", "results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    write_jsonl(tmp_path / "data/queries.jsonl", files.read_jsonl(ROOT / "data/queries.jsonl")[:12])
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in "abcdefgh"]
    write_jsonl(tmp_path / "data/ultrafeedback.jsonl",      # what the command above it writes
                [{"chosen": chat, "rejected": chat[:1] + chats[0][1:]} for chat in chats[1:]])
    shutil.copytree(qwen3, tmp_path / "models/smollm2")
    run_here("python run.py", monkeypatch)
    ran = []
    for line in COMMANDS:
        if line.startswith((SETUP, "pip ", "python -c")):      # the last one needs the network
            continue
        line = line.replace("Qwen/Qwen2.5-0.5B-Instruct", str(qwen3))
        line = line.replace("--seeds 5", "--seeds 1").replace("--rounds 6", "--rounds 1").replace("128", "8")
        if line.startswith((f"python run.py --model {qwen3}", "python run.py --model models/smollm2")):
            line += f" {SMALL}"
        try:
            run_here(line, monkeypatch)
        except SystemExit as end:              # matplotlib is optional
            assert "lab.figures" in line and "need matplotlib" in str(end) and not find_spec("matplotlib"), (line, end)
        ran.append(line)
    printed = capsys.readouterr().out
    assert len(ran) > 20 and "paired difference" in printed
    assert "Table 2: reward models" in printed and "Over rounds: quality" in printed
    for script in ("run.py", "train.py", "generate.py", "eval.py"):
        assert f"`{script}`" in README + GUIDE and any(script in line for line in ran)


def test_the_first_command_of_the_readme(default_run):
    """`python run.py` on a clean checkout ends with the tables, and the policy of SSO is the best of the three."""
    assert COMMANDS[0] == SETUP + "python run.py"
    process, folder = default_run                   # started when the session started: it takes minutes
    assert process.wait() == 0, (folder / "stderr").read_text()[-2000:]
    printed, report = (folder / "stdout").read_text(), json.loads((folder / "runs/toy/report.json").read_text())
    assert re.search(r"\n\| SSO +\| \d+ +\|", printed) and "L_base at step zero: 0.6931" in printed + (
        folder / "stderr").read_text()
    quality = {name: row["quality"]["mean"] for name, row in report.items()}
    assert quality["SSO"] > quality["PBAA"] > quality["base"]
    assert report["SSO"]["p(rejected)"]["mean"] > 1.5 * report["PBAA"]["p(rejected)"]["mean"]
    for name, row in report.items():
        assert f"{row['quality']['mean']:.3f} ± {row['quality']['se']:.3f}" in printed
    # What the report says of the pairs, computed again by a loop over the file.
    records = [json.loads(line) for line in (folder / "runs/toy/pairs.jsonl").read_text().splitlines()]
    scores = []
    for record in records:
        query, marks = record["prompt"][0]["content"], []
        for column in ("chosen", "rejected"):
            text = record[column][0]["content"]
            marks.append(toy.grade(query, text, record[f"{column}_finished"]) if text.strip() else -1)
        scores.append(1.0 if marks[0] > marks[1] else 0.5 if marks[0] == marks[1] else 0.0)
    assert len(records) == report["SSO"]["pairs"] == toy.QUERIES
    assert report["SSO"]["accuracy"]["mean"] == pytest.approx(statistics.fmean(scores))
    assert report["SSO"]["accuracy"]["se"] == pytest.approx(statistics.stdev(scores) / math.sqrt(toy.QUERIES))
    assert report["SSO"]["ties"]["mean"] == pytest.approx(scores.count(0.5) / toy.QUERIES)
