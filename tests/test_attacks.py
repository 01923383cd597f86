"""Bad input, a row a case: a command, the files that it meets, the one line that it has to end in. The name of a case
says what is wrong."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, make_checkpoint, run_here, write_jsonl
from lab import toy

RECORD = {"prompt": "Why?", "good_principle": "Be kind.", "bad_principle": "Be rude.", "chosen": "So.", "rejected": "No.",
          "original": "Well."}
QUERIES = "python generate.py principles --model model --queries bad.jsonl --out new.jsonl"
RESPONSES = "python generate.py responses --model model --principles bad.jsonl --out new.jsonl"
POLICY = "python train.py policy --model model --data bad.jsonl --out new"
GENERATOR = "python train.py generator --model model --data bad.jsonl --out new"
RUN = "python run.py --model model --queries good.jsonl --out new"
ANSWERS = "python eval.py answers good.jsonl"


def line(**changes):
    """A good record with changes; None takes a key away."""
    return json.dumps({key: value for key, value in (RECORD | changes).items() if value is not None})


def message(role="assistant", content="So."):
    return {"role": role, "content": content}


GOOD = (json.dumps(RECORD) + "\n") * 2
CASES = {}      # name -> command, {file: its content}, the line
for name, text, expected in (       # ---- files of queries, and of any records
        ("empty file", "", "bad.jsonl: an empty file"), ("blank file", " \n\n", "bad.jsonl: an empty file"),
        ("no JSON", '{"prompt": "a"}\nb', "bad.jsonl, line 2: not a JSON object"),
        ("line cut off", '{"prompt": "a"}\n{"prom', "bad.jsonl, line 2: not a JSON object"),
        ("list", '["a"]', "bad.jsonl, line 1: not a JSON object"), ("number", "7", "bad.jsonl, line 1: not a JSON object"),
        ("text", '"a"', "bad.jsonl, line 1: not a JSON object"), ("null", "null", "bad.jsonl, line 1: not a JSON object"),
        ("one JSON list of records", '[{"prompt": "a"},\n{"prompt": "b"}]', "bad.jsonl, line 1: not a JSON object"),
        ("blank line between", '{"prompt": "a"}\n\n{"prompt": "b"}', "bad.jsonl, line 2: not a JSON object"),
        ("not UTF-8", b'{"prompt": "\xff"}', "bad.jsonl, line 1: not a JSON object"),
        ("half a surrogate pair", '{"prompt": "\\ud800"}', "bad.jsonl, line 1: not a JSON object"),
        ("NUL bytes", b'\0\0\0', "bad.jsonl, line 1: not a JSON object"),
        ("nested too deep", '{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}", "bad.jsonl, line 1: not a JSON object"),
        ("no prompt", '{"text": "a"}', "bad.jsonl, line 1: a record without a 'prompt'"),
        ("empty prompt", '{"prompt": ""}', "bad.jsonl, line 1: a record without a 'prompt'"),
        ("blank prompt", '{"prompt": " \\n"}', "bad.jsonl, line 1: a record without a 'prompt'"),
        ("prompt null", '{"prompt": null}', "line 1: 'prompt' is neither a text nor a list of messages"),
        ("prompt a number", '{"prompt": 7}', "line 1: 'prompt' is neither a text nor a list of messages"),
        ("prompt an object", '{"prompt": {"role": "user"}}', "line 1: 'prompt' is neither a text nor a list"),
        ("prompt an empty list", '{"prompt": []}', "line 1: 'prompt' is neither a text nor a list"),
        ("prompt a list of texts", '{"prompt": ["a"]}', "line 1: 'prompt' is neither a text nor a list"),
        ("message without role", '{"prompt": [{"content": "a"}]}', "line 1: 'prompt' is neither a text nor a list"),
        ("message without content", '{"prompt": [{"role": "user"}]}', "line 1: 'prompt' is neither a text nor a list"),
        ("content null", '{"prompt": [{"role": "user", "content": null}]}', "line 1: 'prompt' is neither a text"),
        ("content empty", '{"prompt": [{"role": "user", "content": " "}]}', "line 1: the last message of 'prompt' is empty"),
        ("unknown role", '{"prompt": [{"role": "boss", "content": "a"}]}', "line 1: .*role 'boss'; known are system, user"),
        ("query of the assistant", '{"prompt": [{"role": "assistant", "content": "a"}]}', "line 1: a query is one user m"),
        ("query of two messages", json.dumps({"prompt": [message("user"), message("user")]}), "line 1: a query is one user"),
        ("Alpaca's input", '{"instruction": "a", "input": "b"}', "line 1: an 'input' beside 'instruction'"),
        ("instruction a list", '{"instruction": ["a"]}', "line 1: 'prompt' is neither a text nor a list"),
        ("query longer than the context", json.dumps({"prompt": "a" * 9000}), "leaves no room in the model's context of 8192"),
        ):
    CASES[f"queries: {name}"] = (QUERIES, {"bad.jsonl": text}, expected)
CASES["queries: no file"] = (QUERIES, {}, "bad.jsonl: no such file")
CASES["queries: a folder"] = (QUERIES.replace("bad.jsonl", "model"), {}, "model: no such file")
CASES["queries: one alone"] = ("python run.py --model model --queries bad.jsonl --out new", {"bad.jsonl": line()},
                               "bad.jsonl: at least two queries are needed")
CASES["queries: one, twice"] = ("python run.py --model model --queries bad.jsonl --out new", {"bad.jsonl": GOOD},
                                "bad.jsonl: at least two queries are needed")
for name, changes, expected in (    # ---- principles
        ("missing", {"good_principle": None}, "line 2: a record without 'good_principle'; `generate.py principles`"),
        ("bad one missing", {"bad_principle": None}, "line 2: a record without 'bad_principle'"),
        ("empty", {"good_principle": " "}, "line 2: a record without 'good_principle'"),
        ("a number", {"bad_principle": 3}, "line 2: a record without 'bad_principle'")):
    CASES[f"principles: {name}"] = (RESPONSES, {"bad.jsonl": line() + "\n" + line(**changes)}, "bad.jsonl, " + expected)
    CASES[f"principles of a generator's data: {name}"] = (
        GENERATOR, {"bad.jsonl": line() + "\n" + line(**changes)}, "bad.jsonl, " + expected)
for name, changes, expected in (    # ---- pairs
        ("no chosen", {"chosen": None}, "a record without 'chosen', needed for objective 'policy'"),
        ("no rejected", {"rejected": None}, "a record without 'rejected', needed for objective 'policy'"),
        ("chosen a number", {"chosen": 7}, "'chosen' is neither a text nor a list of messages"),
        ("rejected an empty list", {"rejected": []}, "'rejected' is neither a text nor a list of messages"),
        ("chosen without content", {"chosen": [{"role": "assistant"}]}, "'chosen' is neither a text nor a list of messages"),
        ("chosen ends with the user", {"chosen": [message("user")]},
         "the last message of 'chosen' is of the user; a response is the assistant's"),
        ("unknown role", {"rejected": [message("gpt")]}, "'rejected' has a message of role 'gpt'"),
        ("finished a text", {"chosen_finished": "no"}, "'chosen_finished' is 'no': it is true or false"),
        ("finished a number", {"rejected_finished": 1}, "'rejected_finished' is 1: it is true or false"),
        ("finished null", {"original_finished": None}, None),
        ("other turns before", {"chosen": [message("user", "Other?"), message()]},
         "before the last message of 'chosen' stands not the prompt")):
    if expected:
        CASES[f"pairs: {name}"] = (POLICY, {"bad.jsonl": line() + "\n" + line(**changes)}, "bad.jsonl, line 2: " + expected)
CASES["pairs: finished null"] = (POLICY, {"bad.jsonl": line() + "\n" + json.dumps(RECORD | {"chosen_finished": None})},
                                 "line 2: 'chosen_finished' is None: it is true or false")
CASES["pairs: no yo for a generator"] = (GENERATOR, {"bad.jsonl": line(original=None)},
                                         "line 1: a record without 'original', needed for objective 'sso'")
CASES["pairs: all equal"] = (POLICY, {"bad.jsonl": line(rejected="So. ")}, "no pair is left: .*'chosen equals rejected': 1")
CASES["pairs: all empty"] = (POLICY, {"bad.jsonl": line(chosen=" ")}, "no pair is left: .*'empty response': 1")
CASES["pairs: nothing but an end token"] = (POLICY, {"bad.jsonl": line(chosen="<|im_end|>\n")},
                                            "no pair is left: .*'empty response': 1")
CASES["pairs: no room for the prompt"] = (POLICY + " --max-length 8", {"bad.jsonl": GOOD},
                                          r"line 1: a prompt of \d+ tokens leaves no room in --max-length 8")
for flag, value in (                # ---- settings
        ("lr", "0"), ("lr", "-1"), ("lr", "nan"), ("lr", "inf"), ("beta", "0"), ("beta", "inf"), ("gamma", "-0.1"),
        ("gamma", "inf"), ("weight-decay", "inf"), ("weight-decay", "-1"), ("warmup", "1.5"), ("warmup", "nan"),
        ("clip", "0"), ("clip", "inf"), ("epochs", "0"), ("batch-size", "0"), ("batch-size", "-4"), ("examples", "0"),
        ("max-length", "0"), ("micro-batch-tokens", "-1"), ("recompute-layers", "2"), ("seed", "-1"), ("seed", str(10**23))):
    CASES[f"setting: --{flag} {value}"] = (POLICY + f" --{flag} {value}", {"bad.jsonl": GOOD},
                                           f"policy: --{flag} {re.escape(value)}.* is not between")
for flag, value in (("temperature", "-1"), ("temperature", "inf"), ("temperature", "nan"), ("top-p", "0"), ("top-p", "1.1"),
                    ("max-new-tokens", "0"), ("batch-size", "0")):
    CASES[f"setting: --{flag} {value} of sampling"] = (RESPONSES + f" --{flag} {value}", {"bad.jsonl": GOOD},
                                                       f"responses: --{flag} {value}.* is not between")
for name, words, expected in (      # ---- flags
        ("unknown", POLICY + " --lrr 1", "unrecognized arguments: --lrr 1"),
        ("no text for a number", POLICY + " --lr high", "--lr: invalid float value: 'high'"),
        ("half a number", POLICY + " --epochs 1.5", "--epochs: invalid int value: '1.5'"),
        ("missing", "python train.py policy --data bad.jsonl --out new", "required: --model"),
        ("no command", "python train.py", "required: COMMAND"), ("unknown command", "python train.py both", "invalid choice"),
        ("unknown objective", POLICY + " --objective dpo", "policy: --objective dpo is none of sso, plus"),
        ("unknown base loss", POLICY + " --base-loss kto", "policy: --base-loss kto is none of dpo, ipo"),
        ("unknown role", RESPONSES + " --roles great", "invalid choice: 'great'"),
        ("originals negative", RESPONSES + " --originals -1", "--originals -1 is not between"),
        ("rounds 0", RUN + " --rounds 0", "--rounds is at least 1"),
        ("rounds negative", RUN + " --rounds -2", "--rounds -2 is not between"),
        ("rounds huge", RUN + " --rounds 100000", "--rounds 100000 is not between"),
        ("all queries held out", RUN + " --heldout good.jsonl", "good.jsonl: all of its queries are held out by good.jsonl"),
        ("no room for an answer", RUN + " --policy.max-length 9", r"policy: --max-length 9 leaves no room .* query of \d+ tok"),
        ("more rounds than queries", RUN + " --rounds 9", "--rounds 9: more than the 1 queries"),
        ("model alone", "python run.py --model model --out new", "--model and --queries go together"),
        ("queries alone", "python run.py --queries good.jsonl --out new", "--model and --queries go together"),
        ("heldout alone", "python run.py --heldout good.jsonl --out new", "--heldout goes with --queries"),
        ("two sources of principles", RUN + " --principles good.jsonl --principle-model model", "exclude each other"),
        ("server for nothing", RUN + " --server http://localhost:1/v1", "--server goes with --principle-model or --judge"),
        ("two critics", ANSWERS + " --grader grader.py --judge model", "--grader and --judge exclude each other"),
        ("judge pairs 0", ANSWERS + " --judge model --judge-pairs 0", "--judge-pairs 0 is not between"),
        ("server that is not there", ANSWERS + " --judge m --server http://localhost:1/v1", "--server http://localhost:1/v1"),
        ("bench without queries", "python -m lab.bench --model model --queries 0", "--queries 0 is not between"),
        ("bench with negative answers", "python -m lab.bench --model model --answers -1", "--answers -1 is not between"),
        ("bench without repeats", "python -m lab.bench --model model --repeats 0", "--repeats 0 is not between"),
        ("bench without layers", "python -m lab.bench --layers -2", "--layers -2 is not between"),
        ("facts of no count", "python -m lab.facts --out new --count 0", "--count 0 is not between"),
        ("a toy world that is none", "python -m lab.toy principles --world x --queries good.jsonl --out new.jsonl", "world"),
        ("report of no run", "python eval.py report none", "none/report.json: no such file"),
        ("other queries in two files", ANSWERS + " other.jsonl", "other.jsonl: answers to other queries than those of the"),
        ):
    CASES[f"flag: {name}"] = (words, {"bad.jsonl": GOOD}, expected)
for name, text, expected in (       # ---- graders
        ("syntax error", "def grade(:", "--grader bad.py: SyntaxError"), ("none", "x = 1", "--grader bad.py: it has no function"),
        ("fails at loading", "1 / 0", "--grader bad.py: ZeroDivisionError"),
        ("fails", "def grade(q, r, f): return {}[q]", "--grader bad.py, on the query 'When\\?': KeyError"),
        ("too many", "def grade(q, r, f): return 2", "bad.py, on the query 'When\\?': 2.0 is no mark from 0 to 1"),
        ("NaN", "def grade(q, r, f): return float('nan')", "on the query 'When\\?': nan is no mark"),
        ("a text", "def grade(q, r, f): return 'good'", "on the query 'When\\?': ValueError"),
        ("of one argument", "def grade(q): return 1", "on the query 'When\\?': TypeError")):
    CASES[f"grader: {name}"] = (ANSWERS + " --grader bad.py", {"bad.py": text}, expected)
CASES["grader: no file"] = (ANSWERS + " --grader bad.py", {}, "--grader bad.py: no such file")
for name, text, expected in (       # ---- recipes
        ("no TOML", "[policy", "--recipe bad.toml: Expected ']'"), ("no section", "lr = 1.0", r"--recipe bad.toml: no \[lr\]"),
        ("unknown setting", "[policy]\nlrr = 1.0", r"bad.toml: \[policy\] has no 'lrr'; it has objective"),
        ("wrong type", "[policy]\nlr = 'x'", r"bad.toml: \[policy\] lr = 'x' is not of the type of 5e-07"),
        ("out of range", "[policy]\nlr = -1.0", "policy: --lr -1.0 is not between"),
        ("infinite", "[policy]\nlr = inf", "policy: --lr inf is not between"),
        ("not UTF-8", b"\xff", "--recipe bad.toml: .*utf-8"),
        ("nested too deep", "a = " + "[" * 100_000, "--recipe bad.toml: ")):
    CASES[f"recipe: {name}"] = (POLICY.replace("bad.jsonl", "good.jsonl") + " --recipe bad.toml", {"bad.toml": text}, expected)
CASES["recipe: no file"] = (POLICY + " --recipe none.toml", {}, "--recipe none.toml: ")
for name, text, expected in (       # ---- what stands in the place of an output
        ("foreign output", {"new.jsonl": "mine"}, "new.jsonl exists and was not made by this command; choose another --out"),
        ("foreign partial", {"new.jsonl.partial": "mine"}, "new.jsonl.partial exists and was not made by this command"),
        ("note empty", {"new.jsonl": "x", "new.jsonl.args.json": ""}, "new.jsonl.args.json: no JSON, .*; delete it"),
        ("note cut", {"new.jsonl": "x", "new.jsonl.args.json": '{"temp'}, "new.jsonl.args.json: no JSON, .*; delete it"),
        ("note a list", {"new.jsonl": "x", "new.jsonl.args.json": "[]"}, "new.jsonl.args.json: not written by a command of"),
        ("note of another", {"new.jsonl": "x", "new.jsonl.args.json": "{}"}, "new.jsonl was made with .*: choose another --out")):
    CASES[f"output: {name}"] = (RESPONSES, {"bad.jsonl": GOOD} | text, expected)
CASES |= {
    "output: a folder": (RESPONSES.replace("new.jsonl", "model"), {"bad.jsonl": GOOD}, "model.* not made by this command"),
    "output: a file as folder": (POLICY.replace("--out new", "--out good.jsonl"), {"bad.jsonl": GOOD},
                                 "--out good.jsonl: nothing can be written there"),
    "output: below a file": (RESPONSES.replace("new.jsonl", "good.jsonl/new.jsonl"), {"bad.jsonl": GOOD},
                             "--out good.jsonl/new.jsonl: nothing can be written there"),
    "output: where nobody may write": (RESPONSES.replace("new.jsonl", "/proc/new/new.jsonl"), {"bad.jsonl": GOOD},
                                       "--out /proc/new/new.jsonl: nothing can be written there"),
    "output: foreign folder": (POLICY, {"bad.jsonl": GOOD, "new/config.json": "{}"}, "new/config.json exists and was not made"),
    "output: report empty": ("python eval.py report run", {"run/report.json": ""}, "run/report.json: no JSON"),
    "output: report foreign": ("python eval.py report run", {"run/report.json": "[1]"}, "run/report.json: not written by"),
    "output: run in a folder with queries": (RUN.replace("--out new", "--out run"), {"run/queries.jsonl": GOOD},
                                             "run/queries.jsonl exists and was not made by this command"),
}
MODELS = {      # name -> what is done to a good checkpoint, the line
    "no folder": (shutil.rmtree, "model bad: no such folder, nor can it be reached"),
    "empty folder": (lambda path: [file.unlink() for file in path.iterdir()], "model bad: not a checkpoint folder"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "model bad: it cannot be loaded"),
    "weights cut": (lambda path: os.truncate(path / "model.safetensors", 3000), "model bad: it cannot be loaded"),
    "weights no weights": (lambda path: (path / "model.safetensors").write_bytes(b"mine"), "model bad: it cannot be loaded"),
    "weights pickled alone": (lambda path: torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
                              or (path / "model.safetensors").unlink(), "model bad: it cannot be loaded"),
    "a tensor missing": (lambda path: change_weights(path, lambda weights: weights.pop("model.norm.weight")),
                         "model bad: its files lack 1 tensors of the model, such as model.norm.weight; they would be random"),
    "a tensor renamed": (lambda path: change_weights(path, lambda weights: weights.update(
                         x=weights.pop("model.norm.weight"))), "model bad: its files lack 1 tensors"),
    "a tensor of another shape": (lambda path: change_weights(path, lambda weights: weights.update(
                                  {"model.norm.weight": torch.ones(7)})), "model bad: "),
    "NaN": (lambda path: change_weights(path, lambda weights: weights["model.norm.weight"].fill_(float("nan"))),
            "model bad: model.norm.weight has weights that are NaN or infinite"),
    "config no JSON": (lambda path: (path / "config.json").write_text("{"), "model bad: "),
    "config of no model": (lambda path: (path / "config.json").write_text('{"model_type": "none"}'), "model bad: "),
    "tokenizer no JSON": (lambda path: (path / "tokenizer.json").write_text("{"), "model bad: not a checkpoint folder"),
    "no template": (lambda path: (path / "chat_template.jinja").unlink(), "model bad: it has no chat template"),
    "template broken": (lambda path: template(path, "{% for"), "model bad: "),
    "template without system message": (lambda path: template(path, "{{ messages[-1].content }}<|im_end|>"),
                                        "model bad: its chat template has no system message"),
    "template that leaves <think> open": (
        lambda path: template(path, "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}<think>"),
        "model bad: its chat template leaves <think> open before an answer"),
    "template without an end of turn": (lambda path: template(path, "{% for m in messages %}{{ m.content }}\n{% endfor %}"),
                                        "model bad: its chat template closes an answer with no special token"),
    "template that refuses a system message": (
        lambda path: template(path, "{{ raise_exception('no system') if messages[0].role == 'system' }}"),
        "model bad: the model's chat template refuses messages of system, user: no system"),
    "code of its own": (lambda path: (path / "config.json").write_text(json.dumps(
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}})), "model bad: "),
}


def template(path, text):
    (path / "chat_template.jinja").write_text(text)


def change_weights(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def contents(folder):
    """{file: hash} of all that exists."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(qwen3, tmp_path, monkeypatch):
    """The current folder: a model, a grader, a good file, answers to another query."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(qwen3)
    (tmp_path / "good.jsonl").write_text(GOOD.replace("Why?", "When?", 1))
    (tmp_path / "other.jsonl").write_text(line(prompt="Where?"))
    (tmp_path / "grader.py").write_text("def grade(query, response, finished):\n    return 1\n")
    return tmp_path


def ends_in_one_line(words, expected, folder, monkeypatch, capsys):
    """It does, its code is not zero, and what there was is as it was."""
    before = contents(folder)
    with pytest.raises(SystemExit) as end:
        run_here(words, monkeypatch)
    printed = capsys.readouterr()
    said = end.value.code
    if said == 2:                       # argparse's: its own last line
        said = printed.err.strip().splitlines()[-1]
    assert isinstance(said, str) and "\n" not in said and re.search(expected, said), said
    assert "likely" not in said, said                                   # a bug of this project
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_line_and_changes_nothing(name, place, monkeypatch, capsys):
    words, texts, expected = CASES[name]
    for file, text in texts.items():
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).write_bytes(text.encode() if isinstance(text, str) else text)
    if name == "queries: one alone" or name.startswith("flag: more rounds"):
        monkeypatch.setattr(toy, "build", None)
    ends_in_one_line(words, expected, place, monkeypatch, capsys)


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_ends_in_one_line(name, place, qwen3, monkeypatch, capsys):
    spoil, expected = MODELS[name]
    shutil.copytree(qwen3, place / "bad")
    spoil(place / "bad")
    ends_in_one_line(RESPONSES.replace("--model model", "--model bad").replace("bad.jsonl", "good.jsonl"), expected, place,
                     monkeypatch, capsys)


def test_there_are_enough_cases():
    assert len(CASES) + len(MODELS) >= 120


# ---- What is not a bad file ----------------------------------------------------------------------

def start(words, folder, **options):
    """A command as a process of its own, in a folder."""
    return subprocess.Popen([sys.executable, str(ROOT / words.split()[0]), *words.split()[1:]], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_the_second_of_two_processes_in_a_folder_says_who_is_at_work_and_ends(place, monkeypatch, capsys):
    """Of a file's folder, of a training's, and of one above it; beside it another may work."""
    (place / "runs/x").mkdir(parents=True)
    holder = os.open(place / "runs/x", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    for words in (RESPONSES.replace("new.jsonl", "runs/x/new.jsonl"), POLICY.replace("--out new", "--out runs/x"),
                  POLICY.replace("--out new", "--out runs/x/policy"), POLICY.replace("--out new", "--out runs/x/a/b/c")):
        ends_in_one_line(words.replace("bad.jsonl", "good.jsonl"),
                         r"(process \d+|another process) is at work in .*runs/x; wait for its end, or choose another --out",
                         place, monkeypatch, capsys)
    run_here(RESPONSES.replace("bad.jsonl", "good.jsonl").replace("new.jsonl", "runs/y/new.jsonl --max-new-tokens 2"),
             monkeypatch)
    os.close(holder)
    with open(place / "runs/x/.one.jsonl.lock", "w") as file:       # one and the same file
        fcntl.flock(file, fcntl.LOCK_EX)
        ends_in_one_line(RESPONSES.replace("bad.jsonl", "good.jsonl").replace("new.jsonl", "runs/x/one.jsonl"),
                         "is at work in runs/x; wait", place, monkeypatch, capsys)
    for name in ("one", "two"):             # released by the death of whoever held it, and by the end of each command
        run_here(RESPONSES.replace("bad.jsonl", "good.jsonl").replace("new.jsonl", f"runs/x/{name}.jsonl --max-new-tokens 2"),
                 monkeypatch)


def test_a_signal_that_was_to_be_ignored_still_is(place):
    """As under nohup, which a terminal that closes must not end."""
    from plumbing import guard
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with guard.guarded(debug=False), guard.uninterrupted():
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(SystemExit, match="interrupted"), guard.guarded(debug=False):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_two_trainings_in_folders_of_their_own_go_on_beside_each_other(place):
    words = POLICY.replace("bad.jsonl", "good.jsonl").replace("python ", "")
    both = [start(words.replace("--out new", f"--out runs/{name}"), place) for name in "ab"]
    for process in both:
        assert process.wait() == 0, process.stderr.read()


@pytest.mark.parametrize("words, limit, left", [
    (RESPONSES + " --max-new-tokens 300", 1500, "new.jsonl.partial"), (POLICY, 30_000, "new")])
def test_a_full_disk_is_one_line_that_names_the_file_and_the_command_goes_on(words, limit, left, place):
    """Where no file may grow beyond a limit: as a disk that is full."""
    import resource
    write_jsonl(place / "bad.jsonl", [RECORD | {"prompt": f"Why {number}?"} for number in range(12)])
    words = words.removeprefix("python ") + " --batch-size 2"
    limited = start(words, place, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, said = limited.communicate()
    assert limited.returncode == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: new") and "no disk space" in last and "the same command continues" in last, said
    assert "Traceback" not in said and (place / left).exists()
    again = start(words, place)
    assert again.wait() == 0, again.stderr.read()
    assert (place / "new.jsonl").exists() or (place / "new/config.json").exists()


def test_an_unforeseen_error_is_one_line_and_has_its_traceback_with_debug(place, monkeypatch):
    from plumbing import files
    def broken(*_):
        raise RuntimeError("of\ntwo lines")

    monkeypatch.setattr(files, "read_jsonl", broken)
    words = RESPONSES.replace("bad.jsonl", "good.jsonl")
    with pytest.raises(SystemExit, match="^error: RuntimeError: of two lines .--debug shows where; a bug of this project"):
        run_here(words, monkeypatch)
    with pytest.raises(RuntimeError):
        run_here(words + " --debug", monkeypatch)


def test_a_terminal_of_ascii_can_show_everything(place):
    (place / "bad.jsonl").write_text(GOOD.replace("Why?", "Wärüm 漢字?"), encoding="utf-8")
    words = QUERIES.removeprefix("python ") + " --max-new-tokens 4"
    process = start(words, place, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    printed, said = process.communicate()
    assert process.returncode == 0, said
    assert "W\\xe4r\\xfcm" in printed


def test_remains_of_a_kill_go_when_the_command_runs_again(place, monkeypatch):
    """Between the last rename and the end a kill leaves the partial file, or the checkpoint, beside what is complete."""
    words = [RESPONSES.replace("bad.jsonl", "good.jsonl") + " --max-new-tokens 2", POLICY.replace("bad.jsonl", "good.jsonl")]
    for command in words:
        run_here(command, monkeypatch)
    before = contents(place)
    for left in ("new.jsonl.partial", "new/checkpoint.pt"):
        (place / left).write_text("left")
    for command in words:
        run_here(command, monkeypatch)
    assert contents(place) == before


@pytest.mark.parametrize("content", [b"", b"cut", None])
def test_a_checkpoint_that_is_none_is_one_line(content, place, monkeypatch, capsys):
    words = POLICY.replace("bad.jsonl", "good.jsonl") + " --epochs 2"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted"):
        from plumbing.checkpoint import Progress
        patch.setattr(Progress, "log", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run_here(words, patch)
    saved = place / "new/checkpoint.pt"
    assert saved.exists()
    if content is None:
        torch.save({"step": 1, "model": {}}, saved)
    else:
        saved.write_bytes(content)
    ends_in_one_line(words, "new/checkpoint.pt: not a checkpoint of this training .*; delete it to begin anew", place,
                     monkeypatch, capsys)


def test_a_partial_file_of_other_records_is_refused_before_the_sampling(place, monkeypatch, capsys):
    words = RESPONSES.replace("bad.jsonl", "good.jsonl") + " --max-new-tokens 2 --batch-size 1"
    run_here(words, monkeypatch)
    made = (place / "new.jsonl").read_text()
    (place / "new.jsonl").unlink()
    first = made.splitlines()[0]
    for left in (first.replace("When?", "How?").replace("Why?", "How?"), "mine", "[1]"):
        (place / "new.jsonl.partial").write_text(left + "\n")
        ends_in_one_line(words, "new.jsonl.partial: not what this command began; delete it", place, monkeypatch, capsys)


def test_all_of_an_input_counts_for_its_identity(place, qwen3, monkeypatch):
    """A byte behind the first MiB of data; a checkpoint's template."""
    from plumbing.files import fingerprint
    path = place / "big.jsonl"
    path.write_bytes(b"a" * 2**21)
    before = fingerprint(path)
    path.write_bytes(b"a" * (2**21 - 1) + b"b")
    os.utime(path, ns=(1, 1))
    assert fingerprint(path) != before
    shutil.copytree(qwen3, place / "copy")
    seen = {fingerprint(place / "copy")}
    for name in ("chat_template.jinja", "config.json", "tokenizer_config.json"):
        (place / "copy" / name).write_text((place / "copy" / name).read_text() + "\n")
        seen.add(fingerprint(place / "copy"))
    assert len(seen) == 4
    (place / "copy/args.json").write_text("{}")             # no part of the model
    assert fingerprint(place / "copy") in seen


def test_queries_that_are_there_twice_are_counted_and_on_one_side_of_the_split(place, capsys):
    from plumbing.files import split_queries
    write_jsonl(place / "twice.jsonl", [{"prompt": f"q{number % 20}"} for number in range(200)])
    queries, held = split_queries("twice.jsonl", None, seed=0)
    texts = [[record["prompt"][0]["content"] for record in part] for part in (queries, held)]
    assert sorted(texts[0] + texts[1]) == sorted(f"q{number}" for number in range(20)) and len(held) == 2
    assert "twice.jsonl: 180 queries are there twice, and left out" in capsys.readouterr().out


def test_a_toy_model_is_not_asked_the_queries_of_another_world(toy_base, place, monkeypatch, capsys):
    ends_in_one_line(QUERIES.replace("bad.jsonl", "good.jsonl").replace("--model model", f"--model {toy_base}"),
                     "good.jsonl, line 1: the model's tokenizer does not know most of its words", place, monkeypatch, capsys)


def test_a_run_in_a_folder_of_another_seed_or_with_edited_heldout_queries_is_refused(toy_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "build", lambda out, *args, **how: shutil.copytree(toy_base, out))
    monkeypatch.setattr(toy, "QUERIES", 8)
    monkeypatch.setattr(toy, "HELDOUT", 4)
    words = "python run.py --out run --principles.max-new-tokens 8 --responses.max-new-tokens 4"
    run_here(words, monkeypatch)
    ends_in_one_line(words + " --seed 7", "was made with seed = 0, not 7: choose another --out", tmp_path, monkeypatch, capsys)
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "run/base", tmp_path / "other/base")
    ends_in_one_line(words.replace("--out run", "--out other") + " --seed 7", "other/base was made with seed = 0, not 7",
                     tmp_path, monkeypatch, capsys)
    held = tmp_path / "run/heldout.jsonl"
    held.write_text(held.read_text().replace("\n", "\n", 1).splitlines()[0] + "\n")
    ends_in_one_line(words, "answers_base.jsonl was made with content of principles = ", tmp_path, monkeypatch, capsys)


def test_a_report_of_another_program_is_not_overwritten(toy_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "build", lambda out, *args, **how: shutil.copytree(toy_base, out))
    monkeypatch.setattr(toy, "QUERIES", 8)
    monkeypatch.setattr(toy, "HELDOUT", 4)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.json").write_text("mine")
    words = "python run.py --out run --principles.max-new-tokens 8 --responses.max-new-tokens 4"
    ends_in_one_line(words, "run/report.json was not made by this command; move or delete it", tmp_path, monkeypatch, capsys)
