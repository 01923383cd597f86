"""Every command of the README and the guide, as it stands there; every table, link and name of all pages.

    python tests/test_readme.py         # writes the numbers of lines and tokens anew into README.md
"""

import ast
import functools
import io
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from importlib import import_module
from pathlib import Path

import pytest

from conftest import ROOT, TOY_BASE, log, run_here, write_jsonl

import eval as evaluation
import sso
from lab import bench, study
from plumbing.recipes import load_toml
from plumbing.records import read_json
from plumbing.tables import print_table, show
from toy import world

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "docs/GUIDE.md", "docs/RESULTS.md", "docs/COSTS.md", "lessons/README.md")}
README = PAGES["README.md"]
COMMANDS_OF = README + PAGES["docs/GUIDE.md"]
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", COMMANDS_OF, re.DOTALL))
COMMANDS = [line for line in BLOCKS.replace("\\\n", "").splitlines() if line.strip() and not line.startswith("#")]
MEAN = r"[-−]?\d+\.\d{3}\s±\s\d+\.\d{3}"        # with its error
CLEAN = tempfile.TemporaryDirectory()       # until the end of the tests
SETUP = "pip install -r requirements.txt && "
MODULES = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))}


# ---- Names, links, numbers -----------------------------------------------------------------------

def test_the_test_command_of_the_readme_is_what_ci_runs():
    assert SETUP + "python -m pytest" in COMMANDS and SETUP + "python -m pytest" in (ROOT / ".ci/run").read_text()


def test_every_function_and_file_that_a_page_names_exists():
    text = "".join(PAGES.values())
    names = re.findall(rf"`(?:plumbing\.|lab\.|toy\.)?({'|'.join(MODULES)})\.(\w+)", text)
    assert len(names) > 10
    for module, name in names:
        assert name in ("py", "toml", "json") or hasattr(import_module(MODULES[module]), name), f"{module}.{name}"
    for file in re.findall(r"`((?:\w+/)?\w[\w.-]*\.(?:py|toml|txt))`", text):
        assert list(ROOT.rglob(file)), file


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


def numbers_anew(text):
    """A page with the right numbers: `[what](file.py#L7 "name")`, since line 7 defines that name; and a script's tokens
    of code, if they are off by more than 3 %."""
    def line_of(found):
        file, _, name = found.groups()
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        right = [i for i, line in enumerate(lines, 1) if re.match(rf"(def|class) {name}\(|{name} = ", line)]
        assert len(right) == 1, f"{file}: {name} is defined on lines {right}"
        return f']({file}#L{right[0]} "{name}")'

    def size_of(found):
        file, tokens = found.groups()
        right = tokens_of_code(ROOT / file)
        near = int(tokens.replace(",", "")) == pytest.approx(right, rel=0.03)
        return found[0] if near else f"`{file}` | {right:,} |"

    text = re.sub(r"\]\(([\w/.]+\.py)#L(\d+) \"(\w+)\"\)", line_of, text)
    return re.sub(r"`([\w/]+\.py)` \| ([\d,]+) \|", size_of, text)


def test_every_link_leads_somewhere_and_to_the_line_that_defines_what_it_names():
    assert README == numbers_anew(README), "put right by `python tests/test_readme.py`"
    assert README.count(".py#L") == len(re.findall(r"\.py#L\d+ \"\w+\"\)", README)) > 20
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s#]+)", text):
            assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), (page, target)


# ---- Tables --------------------------------------------------------------------------------------

def print_all(tables, columns=None):
    for rows in tables:
        print_table(rows, columns or list(next(iter(rows.values()))))


def print_run(found):
    evaluation.print_report(found["rows"])
    for measures in found.get("preflight", {}).values():
        evaluation.print_preflight(measures)


def print_real(found):
    print_all([seed["rows"] for seed in found["seeds"].values()],
              ["quality", "accuracy", "p(chosen)", "p(rejected)", "policy's p(original)"])
    rows = {}
    for step, cost in found["seeds"]["1"]["costs"].items():
        rows[step] = {"minutes": f"{cost['seconds'] / 60:.1f}", "peak GB": f"{cost['peak bytes'] / 1e9:.1f}"}
        if "tokens a second" in cost:
            rows[step]["tokens a second"] = f"{cost['tokens a second']:.0f}"
    print_all([rows], ["minutes", "tokens a second", "peak GB"])


def print_arms(found):
    columns = ["quality", "SSO better by", "accuracy", "p(chosen)", "p(rejected)", "policy's p(original)", "words", "by seed"]
    print_all([found["rows"]], [column for column in columns if any(column in row for row in found["rows"].values())])
    if "generators" in found:
        print_all([found["generators"]], ["y+", "yo", "y-", "accuracy"])


def print_bench(found):
    print_all(found["tables"], bench.COLUMNS)


def print_writers(found):
    print_all([found["rows"]], ["preflight", "accuracy, PBAA", "accuracy, SSO", "base", "PBAA", "SSO", "SSO less PBAA"])
    print_all([found["other policies"]])


PRINTERS = {    # file of results -> how its tables are printed
    **dict.fromkeys(["first-run", "smollm2-run", "qwen-run", "qwen-too-hard"], print_run),
    "miniature": print_real, "figure3-smollm2": print_real,
    "ways": lambda found: print_all(found["all seeds"].values(), ["y+", "yo", "y-", "accuracy", "y+ over yo"]),
    "step1": lambda found: print_all([found["rows"]]),
    "bf16": lambda found: print_all([found["rows"]]), "lora": lambda found: print_all([found["rows"]]),
    "worlds": lambda found: print_all([found["rows"]], ["y+", "yo", "y-", "accuracy", "y+ over yo", "p(chosen)",
                                                        "p(original)", "p(rejected)", "fallback", "verdict"]),
    "qwen-writers": print_writers, "qwen-gpu": print_arms, "qwen-small": print_arms,
    "study-again": lambda found: print_all([found["rows"]], ["quality", "less PBAA, paired", "accuracy", "p(rejected)"]),
    "study": lambda found: study.print_tables(found["runs"], found["rounds"]),
    **dict.fromkeys(["bench-trl", "bench-smollm2-trl", "bench-smollm2-sampling", "bench-memory"], print_bench)}


def results_of(name):
    """A committed file of results. It says where it is from."""
    found = read_json(ROOT / f"results/{name}.json")
    assert {"command", "machine", "commit", "versions"} <= found.keys()
    return found


def table_lines(text):
    """The rows of tables in which there are numbers."""
    return {line for line in text.splitlines() if re.match(r"\|.*\d", line)}


def cells_of(results):
    """Every mean with its error in a file of results, as it is printed."""
    if isinstance(results, list):
        results = dict(enumerate(results))
    if isinstance(results, dict) and {"mean", "se"} <= results.keys():
        yield show(results)
    elif isinstance(results, dict):
        for part in results.values():
            yield from cells_of(part)


def test_every_table_and_every_number_with_an_error_is_of_a_committed_file_of_results(capsys):
    assert {path.stem for path in (ROOT / "results").glob("*.json")} == set(PRINTERS)
    text = "".join(PAGES.values())
    lines, known = table_lines(text), set()
    for name, printer in PRINTERS.items():
        found = results_of(name)
        printer(found)
        printed = table_lines(capsys.readouterr().out)
        assert len(printed) > 1 and printed <= lines, name
        known |= set(cells_of(found)) | set(re.findall(MEAN, " ".join(printed)))
    runs = results_of("study")["runs"]          # what the prose says of the study are paired differences of two rows
    for a in runs[0]:
        for b in runs[0]:
            known |= {show(study.paired(runs, a, b, column)) for column in ("quality", "accuracy")}
    said = {" ".join(each.split()).replace("−", "-") for each in re.findall(MEAN, text)}
    assert len(said) > 400 and {each for each in said if each not in known and f"-{each}" not in known} == set()


def test_what_the_guide_says_of_its_run_on_smollm2():
    found = results_of("smollm2-run")
    guide = PAGES["docs/GUIDE.md"]
    assert f"{found['seconds'] / 60:.0f} minutes, {found['peak bytes'] / 1e9:.1f} GB" in guide
    assert found["command"] in guide
    replaced = sum(map(int, re.findall(r": (\d+)", found["principles"])))
    assert f"{replaced} in 128 were replaced" in PAGES["docs/RESULTS.md"]


# ---- Commands ------------------------------------------------------------------------------------

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


@functools.cache
def first_run():
    """`python run.py` in a clean copy, once: its folder, and what it printed."""
    folder = Path(CLEAN.name)
    for file in [*ROOT.glob("*.py"), ROOT / "pytest.ini"]:
        shutil.copy(file, folder)
    for room in ("plumbing", "toy", "recipes", "lessons"):          # not the lab: the scripts stand without it
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "run.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout + done.stderr


@pytest.mark.slow
def test_the_first_command_of_the_readme():
    """It ends with the tables, and the policy of SSO is the best of the three."""
    assert COMMANDS[0] == SETUP + "python run.py"
    folder, printed = first_run()
    report = read_json(folder / "runs/toy/report.json")
    assert re.search(r"\n\| SSO +\| \d+ +\|", printed) and "L_base at step zero: 0.6931" in printed
    quality = {name: row["quality"]["mean"] for name, row in report.items()}
    assert quality["SSO"] > quality["PBAA"] > quality["base"]
    assert report["SSO"]["p(rejected)"]["mean"] > 1.5 * report["PBAA"]["p(rejected)"]["mean"]
    for row in report.values():
        assert show(row["quality"]) in printed


@pytest.fixture
def place(qwen3, here, monkeypatch):
    """A folder as the project's, with few queries and a tiny checkpoint for SmolLM2."""
    for room in ("toy", "lab", "recipes", "results"):
        Path(room).symlink_to(ROOT / room)
    Path("data").mkdir()
    for path in (ROOT / "data").glob("*.jsonl"):
        Path("data", path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    shutil.copytree(qwen3, "models/smollm2")
    monkeypatch.setattr(world, "QUERIES", 8)
    monkeypatch.setattr(world, "HELDOUT", 8)


@pytest.mark.slow
def test_the_objective_and_the_losses_of_ones_own_run(place, monkeypatch):
    """The blocks of Python, as they stand there. SimPO scores no reference."""
    own, simpo = re.findall(r"```python\n(.*?)```", COMMANDS_OF, re.DOTALL)
    monkeypatch.setattr(sso, "REFERENCE_FREE", set())
    for table in (sso.PAIRS, sso.BASE_LOSSES):
        monkeypatch.setitem(table, "mine", None)        # both tables are as before at the end
        monkeypatch.delitem(table, "mine")
    exec(own, {})
    assert read_json("runs/mine/generator.args.json")["objective"] == "mine"
    assert list(read_json("runs/mine/report.json")) == ["base", "PBAA", "mine"]
    assert log("runs/hinge/policy")[0]["base"] == 1.0                         # max(0, 1 - 0): policy = reference
    monkeypatch.setattr("train.score", None)            # what would score the reference
    exec(simpo, {})
    note = read_json("runs/simpo/policy.args.json")
    assert (note["base_loss"], note["margin"], note["beta"]) == ("simpo", 0.5, 2.0)


@pytest.fixture
def small_study(monkeypatch):
    """The study with a grid of one cell, in forks of this process, from the base model that is there."""
    get_context = multiprocessing.get_context
    small = load_toml(ROOT / "lab/study.toml")
    small |= {"search_seeds": [6], "search_rounds": 1}
    small["grid"] = dict.fromkeys(small["grid"], [{"lr": 1e-3, "epochs": 1}])
    for name in ("best", "default"):
        small[name] = dict.fromkeys(small[name], [0, 0])
    small["rewards"] = dict.fromkeys(small["rewards"], ["base/responses.jsonl"])
    monkeypatch.setattr("plumbing.recipes.load_toml",
                        lambda path: small if Path(path).name == "study.toml" else load_toml(path))
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: get_context("fork"))
    monkeypatch.setattr(world, "build", lambda out, *args: shutil.copytree(TOY_BASE, out))


SKIPPED = (SETUP, "pip ", "python -c", "python -m lab.gguf")       # by CI; needs the network; tested with lab/gguf.py


@pytest.mark.slow
def test_every_other_command(place, qwen3, small_study, capsys):
    """In their order, with few queries, a tiny checkpoint for Qwen, and a study of one seed and one round."""
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in "abcdefgh"]
    write_jsonl("data/ultrafeedback.jsonl",         # what the command above it writes
                [{"chosen": chat, "rejected": chat[:1] + chats[0][1:]} for chat in chats[1:]])
    run_here("python run.py")
    commands = [line for line in COMMANDS if not line.startswith(SKIPPED)]
    assert len(commands) > 20
    for line in commands:
        for number, few in (("--seeds 5", "--seeds 1"), ("--rounds 6", "--rounds 1"), ("128", "8"), ("1024", "8"),
                            ("--queries 32", "--queries 2")):
            line = line.replace(number, few)
        if "Qwen/" in line or "models/smollm2" in line:
            line = re.sub(r"Qwen/Qwen2.5-\S+", str(qwen3), line)
            line += " --set principles.max_new_tokens=6 --set responses.max_new_tokens=6"
        try:
            run_here(line)
        except SystemExit as end:           # matplotlib is optional
            assert "lab.figures" in line and "need matplotlib" in str(end), (line, end)
    printed = capsys.readouterr().out
    assert "paired difference" in printed and "Table 2: reward models" in printed and "Over rounds: quality" in printed


if __name__ == "__main__":
    (ROOT / "README.md").write_text(numbers_anew(README), encoding="utf-8")
