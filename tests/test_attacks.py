"""Bad input, a row a case: a command, the files that it meets, the one line that it has to end in. The name of a case
says what is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig

from conftest import ROOT, change_json, log, run_here, write_jsonl
from plumbing.checkpoint import Progress
from plumbing.outputs import fingerprint
from plumbing.records import split_queries

pytestmark = pytest.mark.usefixtures("place")
RECORD = {"prompt": "Why?", "good_principle": "Be kind.", "bad_principle": "Be rude.", "chosen": "So.",
          "rejected": "No.",
          "original": "Well."}
QUERIES = "python generate.py principles --model model --queries bad.jsonl --out new.jsonl"
RESPONSES = "python generate.py responses --model model --principles bad.jsonl --out new.jsonl"
POLICY = "python train.py policy --model model --data bad.jsonl --out new"
GENERATOR = "python train.py generator --model model --data bad.jsonl --out new"
RUN = "python run.py --model model --queries good.jsonl --out new"
TOY = "python run.py --out new"
ANSWERS = "python eval.py answers good.jsonl"


def line(**changes):
    """A good record with changes; None takes a key away."""
    return json.dumps({key: value for key, value in (RECORD | changes).items() if value is not None})


def message(role="assistant", content="So."):
    return {"role": role, "content": content}


GOOD = (json.dumps(RECORD) + "\n") * 2
CASES = {}      # name -> command, {file: its content}, the line

# ---- Files of queries, and of any records
NONE, PROMPT = "line 1: not a JSON object", "line 1: 'prompt' is neither a text nor a list of messages"
for name, text, expected in (
        ("empty file", "", "an empty file"), ("blank file", " \n\n", "an empty file"),
        ("no JSON", '{"prompt": "a"}\nb', "line 2: not a JSON object"),
        ("blank line between", '{"prompt": "a"}\n\n{"prompt": "b"}', "line 2: not a JSON object"),
        ("one JSON list of records", '[{"prompt": "a"},\n{"prompt": "b"}]', NONE),
        ("not UTF-8", b'{"prompt": "\xff"}', NONE), ("half a surrogate pair", '{"prompt": "\\ud800"}', NONE),
        ("nested too deep", '{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}", NONE),
        ("no prompt", '{"text": "a"}', "line 1: a record without a 'prompt'"),
        ("blank prompt", '{"prompt": " \\n"}', "line 1: the last message of 'prompt' is empty"),
        ("prompt null", '{"prompt": null}', "line 1: a record without a 'prompt'"),
        ("prompt a number", '{"prompt": 7}', PROMPT),
        ("prompt an object", '{"prompt": {"role": "user"}}', PROMPT),
        ("prompt an empty list", '{"prompt": []}', PROMPT),
        ("message without role", '{"prompt": [{"content": "a"}]}', PROMPT),
        ("content null", '{"prompt": [{"role": "user", "content": null}]}', PROMPT),
        ("unknown role", '{"prompt": [{"role": "boss", "content": "a"}]}',
         "line 1: .*role 'boss'; known are system, user"),
        ("query of the assistant", '{"prompt": [{"role": "assistant", "content": "a"}]}',
         "line 1: the last message of .* is of the ass"),
        ("Alpaca's input", '{"instruction": "a", "input": "b"}', "line 1: an 'input' beside 'instruction'"),
        ("instruction a list", '{"instruction": ["a"]}', PROMPT)):
    CASES[f"queries: {name}"] = (QUERIES, {"bad.jsonl": text}, f"bad.jsonl(, |: ){expected}")
CASES["queries: no file"] = (QUERIES, {}, "bad.jsonl: no such file")
CASES["queries: a folder"] = (QUERIES.replace("bad.jsonl", "model"), {}, "model: no such file")
CASES["queries: longer than the context"] = (QUERIES, {"bad.jsonl": line(prompt="a" * 9000)},
                                             "a prompt of .* leaves no room in the model's context of 8192; .* 'a+'")
for name, text in (("one alone", line()), ("one, twice", GOOD)):
    CASES[f"queries: {name}"] = (RUN.replace("good", "bad"), {"bad.jsonl": text},
                                 "bad.jsonl: at least two queries are needed")

# ---- Principles and pairs
for name, changes, expected in (
        ("missing", {"good_principle": None}, "a record without 'good_principle'; `generate.py principles`"),
        ("empty", {"good_principle": " "}, "a record without 'good_principle'"),
        ("a number", {"bad_principle": 3}, "a record without 'bad_principle'")):
    for words in (RESPONSES, GENERATOR):
        CASES[f"principles: {name}, {words[7:15]}"] = (words, {"bad.jsonl": line() + "\n" + line(**changes)},
                                                       f"bad.jsonl, line 2: {expected}")
for name, changes, expected in (
        ("no rejected", {"rejected": None}, "a record without 'rejected', needed for objective 'policy'"),
        ("chosen a number", {"chosen": 7}, "'chosen' is neither a text nor a list of messages"),
        ("chosen ends with the user", {"chosen": [message("user")]},
         "the last message of 'chosen' is of the user; it has to be of the assistant"),
        ("finished a number", {"rejected_finished": 1}, "'rejected_finished' is 1: it is true or false"),
        ("other turns before", {"chosen": [message("user", "Other?"), message()]},
         "the messages before the last one of 'chosen' are not the prompt")):
    CASES[f"pairs: {name}"] = (POLICY, {"bad.jsonl": line() + "\n" + line(**changes)}, f"bad.jsonl, line 2: {expected}")
CASES["pairs: finished null"] = (POLICY, {"bad.jsonl": json.dumps(RECORD | {"chosen_finished": None})},
                                 "line 1: 'chosen_finished' is None: it is true or false")
CASES["pairs: no yo for a generator"] = (GENERATOR, {"bad.jsonl": line(original=None)},
                                         "line 1: a record without 'original', needed for objective 'sso'")
CASES["pairs: nothing but an end token"] = (POLICY, {"bad.jsonl": line(chosen="<|im_end|>\n")},
                                            "bad.jsonl: no pair is left: .*'empty response': 1")

# ---- Settings
for words in ("lr=0 lr=-1 lr=nan lr=inf beta=0 beta=inf gamma=-0.1 gamma=inf weight_decay=inf weight_decay=-1 "
              "warmup=1.5 warmup=nan clip=0 clip=inf epochs=0 batch_size=0 batch_size=-4 examples=0 max_length=0 "
              "micro_batch_tokens=-1 recompute_layers=2").split():
    CASES[f"setting: {words}"] = (POLICY + f" --set policy.{words}", {"bad.jsonl": GOOD},
                                  f"policy.{words.replace('=', ' = ')}.* is not between")
for words in "temperature=-1 temperature=inf temperature=nan top_p=0 top_p=1.1 max_new_tokens=0 batch_size=0".split():
    CASES[f"setting: {words} of sampling"] = (RESPONSES + f" --set responses.{words}", {"bad.jsonl": GOOD},
                                              f"responses.{words.replace('=', ' = ')}.* is not between")
for words, expected in (
        ("--seed -1", "policy.seed = -1 is not between"), (f"--seed {10**23}", "policy.seed = 10{23} is not between"),
        ("--seed x", "--set run.seed=x: run: seed = 'x' is not of the type of 0"),
        ("--set lr=1", "--set lr=1: has no 'lr'; it has run, principles"),
        ("--set policy=1", "--set policy=1: policy: has no ''; it has objective"),
        ("--set policy.lrr=1", "--set policy.lrr=1: policy: has no 'lrr'; it has objective"),
        ("--set polycy.lr=1", "--set polycy.lr=1: has no 'polycy'; it has run, principles"),
        ("--set policy.tokens=1", "policy: has no 'tokens'; it has objective"),
        ("--set policy.lr", "policy: lr = '' is not of the type of 5e-07"),
        ("--set policy.lr=high", "policy: lr = 'high' is not of the type of 5e-07"),
        ("--set policy.epochs=1.5", "policy: epochs = 1.5 is not of the type of 1"),
        ("--set policy.objective=dpo", "policy.objective = dpo is none of sso, plus"),
        ("--set policy.base_loss=kto", "policy.base_loss = kto is none of dpo, ipo"),
        ("--set policy.logps=slow", "policy.logps = slow is none of plain, fast"),
        ("--lr 1", "unrecognized arguments: --lr 1"), ("--recipe none.toml", "--recipe none.toml: .*No such file")):
    CASES[f"setting: {words}"] = (f"{POLICY} {words}", {"bad.jsonl": GOOD}, expected)

# ---- Flags
for name, words, expected in (
        ("missing", "python train.py policy --data bad.jsonl --out new", "required: --model"),
        ("no command", "python train.py", "required: COMMAND"),
        ("unknown command", "python train.py both", "invalid choice"),
        ("unknown role", RESPONSES + " --roles great", "invalid choice: 'great'"),
        ("originals negative", RESPONSES + " --originals -1", "--originals is at least 1"),
        ("no number", TOY + " --rounds two", "--rounds: invalid int value: 'two'"),
        ("rounds 0", RUN + " --rounds 0", "--rounds is at least 1"),
        ("more rounds than queries", RUN + " --rounds 9", "--rounds 9: more than the 1 queries"),
        ("all queries held out", RUN + " --heldout good.jsonl",
         "good.jsonl: all of its queries are held out by good.jsonl"),
        ("no held-out queries", RUN + " --heldout none.jsonl", "none.jsonl: no such file"),
        ("no principles", RUN + " --principles none.jsonl", "none.jsonl: no such file"),
        ("no model", RUN.replace("model model", "model none/such"),
         "model none/such: .*; offline, fetch it where there is"),
        ("no principle model", RUN + " --principle-model none/such", "model none/such: "),
        ("no judge", RUN + " --judge none/such", "model none/such: "),
        ("a setting of another stage", RUN + " --set generator.lr=-1", "generator.lr = -1.0 is not between"),
        ("unknown objective", TOY + " --objective none", "argument --objective: invalid choice: 'none'"),
        ("model alone", TOY + " --model model", "--model and --queries go together"),
        ("queries alone", TOY + " --queries good.jsonl", "--model and --queries go together"),
        ("heldout alone", TOY + " --heldout good.jsonl", "--heldout goes with --queries"),
        ("two sources of principles", RUN + " --principles good.jsonl --principle-model model", "exclude each other"),
        ("server for nothing", RUN + " --server http://localhost:1/v1",
         "--server goes with --principle-model or --judge"),
        ("two critics", ANSWERS + " --grader grader.py --judge model", "--grader and --judge exclude each other"),
        ("server that is not there", ANSWERS + " --judge m --server http://localhost:1/v1",
         "--server http://localhost:1/v1"),
        ("a toy world that is none", "python -m toy.world principles --world x --queries toy.jsonl --out new.jsonl",
         "x. is none"),
        ("unknown arm", "python -m lab.real arms --model model --names PBBA --out new", "'PBBA' is none of: PBAA; SSO"),
        ("a peer without a model", "python -m lab.bench --vs transformers", "--vs transformers goes with --model"),
        ("objective of a recipe", TOY + " --set generator.objective=none", "generator.objective = none is none of sso"),
        ("report of no run", "python eval.py report none", "none/report.json: no such file"),
        ("other queries in two files", ANSWERS + " other.jsonl",
         "other.jsonl: answers to other queries than those of the")):
    CASES[f"flag: {name}"] = (words, {"bad.jsonl": GOOD, "toy.jsonl": '{"prompt": "sort these words : axe"}'}, expected)

# ---- Graders and recipes
for name, text, expected in (
        ("syntax error", "def grade(:", ": SyntaxError"), ("none", "x = 1", ": it has no function"),
        ("fails at loading", "1 / 0", ": ZeroDivisionError"),
        ("fails", "def grade(q, r, f): return {}[q]", ", on the query 'When\\?': KeyError"),
        ("too many", "def grade(q, r, f): return 2", ", on the query 'When\\?': 2.0 is no mark from 0 to 1"),
        ("NaN", "def grade(q, r, f): return float('nan')", ", on the query 'When\\?': nan is no mark"),
        ("a text", "def grade(q, r, f): return 'good'", ", on the query 'When\\?': ValueError")):
    CASES[f"grader: {name}"] = (ANSWERS + " --grader bad.py", {"bad.py": text}, "--grader bad.py" + expected)
CASES["grader: no file"] = (ANSWERS + " --grader bad.py", {}, "--grader bad.py: no such file")
for name, text, expected in (
        ("no TOML", "[policy", "Expected ']'"), ("no section", "lr = 1.0", "has no 'lr'"),
        ("unknown setting", "[policy]\nlrr = 1.0", "policy: has no 'lrr'; it has objective"),
        ("section a number", "policy = 1", "policy = 1 is not of the type of {"),
        ("not UTF-8", b"\xff", ".*utf-8"), ("nested too deep", "a = " + "[" * 100_000, "")):
    CASES[f"recipe: {name}"] = (f"{POLICY} --recipe bad.toml", {"bad.jsonl": GOOD, "bad.toml": text},
                                f"bad.toml: {expected}")

# ---- What stands in the place of an output
for name, words, texts, expected in (
        ("foreign", RESPONSES, {"new.jsonl": "mine"},
         "new.jsonl exists and was not made by this command; choose another --out"),
        ("foreign partial", RESPONSES, {"new.jsonl.partial": "mine"},
         "new.jsonl.partial exists and was not made by this"),
        ("note cut", RESPONSES, {"new.jsonl": "x", "new.jsonl.args.json": '{"temp'},
         "new.jsonl.args.json: not the JSON .* delete"),
        ("note a list", RESPONSES, {"new.jsonl": "x", "new.jsonl.args.json": "[]"},
         "new.jsonl.args.json: not written by a"),
        ("note of another", RESPONSES, {"new.jsonl": "x", "new.jsonl.args.json": "{}"},
         "new.jsonl was made with .*: choose an"),
        ("a folder", RESPONSES.replace("new.jsonl", "model"), {}, "model exists and was not made by this command"),
        ("foreign folder", POLICY, {"new/config.json": "{}"}, "new exists and was not made by this command"),
        ("a file as folder", POLICY.replace("new", "good.jsonl"), {},
         "good.jsonl exists and was not made by this command"),
        ("run in a folder with queries", RUN, {"new/queries.jsonl": GOOD},
         "new/queries.jsonl exists and was not made by this"),
        ("below a file", RESPONSES.replace("new.jsonl", "good.jsonl/new"), {},
         "--out good.jsonl/new: nothing can be written"),
        ("where nobody may write", RESPONSES.replace("new", "/proc/x/new"), {},
         "--out /proc/x/new.jsonl: nothing can be wr"),
        ("report foreign", "python eval.py report run", {"run/report.json": "[1]"}, "run/report.json: not written by")):
    CASES[f"output: {name}"] = (words, {"bad.jsonl": GOOD} | texts, expected)


# ---- Models --------------------------------------------------------------------------------------

def remove(path, file):
    (path / file).unlink()


def write(path, file, text):
    (path / file).write_text(text)


def template(path, text):
    write(path, "chat_template.jinja", text)


def change_weights(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def pickle_weights(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    remove(path, "model.safetensors")


def gguf_alone(path):
    shutil.rmtree(path)
    path.mkdir()
    write(path, "model.gguf", "GGUF")


def extra_token(path, text):
    """A tokenizer with a token more than the embedding has rows."""
    tokens = json.loads((path / "tokenizer.json").read_text())
    tokens["added_tokens"].append(tokens["added_tokens"][0] | {"id": 400, "content": text})
    write(path, "tokenizer.json", json.dumps(tokens))


NORM = "model.norm.weight"
WEIGHTS = {     # name -> what is done to the weights of a good checkpoint, the line
    "none": (lambda path: remove(path, "model.safetensors"), ""),
    "cut": (lambda path: os.truncate(path / "model.safetensors", 3000), ""),
    "pickled alone": (pickle_weights, ""),
    "a tensor missing": (lambda path: change_weights(path, lambda weights: weights.pop(NORM)),
                         f"its files lack 1 tensors of the model, such as {NORM}; they would be random"),
    "a tensor of another shape": (
        lambda path: change_weights(path, lambda weights: weights.update({NORM: torch.ones(7)})), ""),
    "NaN": (lambda path: change_weights(path, lambda weights: weights[NORM].fill_(torch.nan)),
            f"{NORM} has weights that are NaN or infinite")}
MODELS = {      # name -> what is done to all but the weights of a good checkpoint, the line
    "no folder": (shutil.rmtree, ".*; offline, fetch it where there is a network"),
    "empty folder": (lambda path: [file.unlink() for file in path.iterdir()], ""),
    "an adapter": (lambda path: write(path, "adapter_config.json", "{}"), "an adapter; merge it into its model"),
    "a folder of a GGUF file": (gguf_alone, "a GGUF file; `python -m lab.gguf` makes a checkpoint folder of it"),
    "quantised": (lambda path: change_json(path / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
                  "its weights are quantised, and cannot be trained; use the original ones"),
    "no cache": (lambda path: MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1).save_pretrained(path),
                 "MambaForCausalLM has no cache of keys and values, which sampling needs"),
    "too large": (lambda path: change_json(path / "config.json", vocab_size=10**12),
                  r"it takes \d.* GB of memory, .* free"),
    "config no JSON": (lambda path: write(path, "config.json", "{"), ""),
    "code of its own": (lambda path: write(path, "config.json", json.dumps(
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}})), ""),
    "tokenizer no JSON": (lambda path: write(path, "tokenizer.json", "{"), ""),
    "no template": (lambda path: remove(path, "chat_template.jinja"), "it has no chat template; use a chat"),
    "template broken": (lambda path: template(path, "{% for"), ""),
    "template that leaves <think> open": (
        lambda path: template(path, "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}<think>"),
        "its chat template leaves <think> open before an answer"),
    "template without an end of turn": (
        lambda path: template(path, "{% for m in messages %}{{ m.content }}\n{% endfor %}"),
        "its chat template closes an answer with no special token"),
    "template of tokens beyond the embedding": (
        lambda path: (extra_token(path, "<new>"),
                      template(path, "{% for m in messages %}{{ m.content }}<new>{% endfor %}")),
        "its chat template writes token 259, '<new>', and its embedding has 259 rows: resize it"),
}


# ---- The tests -----------------------------------------------------------------------------------

def contents():
    """{file: bytes} of all that exists in the current folder."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.fixture
def place(qwen3, here):
    """The current folder: a model, a grader, a good file, answers to another query."""
    Path("model").symlink_to(qwen3)
    Path("good.jsonl").write_text(GOOD.replace("Why?", "When?", 1))
    Path("other.jsonl").write_text(line(prompt="Where?"))
    Path("grader.py").write_text("def grade(query, response, finished):\n    return 1\n")


def ends_in_one_line(words, expected, capsys):
    """It does, its code is not zero, and what there was is as it was. Returns the new files."""
    before = contents()
    with pytest.raises(SystemExit) as end:
        run_here(words)
    said = end.value.code
    if said == 2:                       # argparse's: its own last line
        said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in said and "\n" not in said and re.search(expected, said), said
    after = contents()
    assert {path: after.get(path) for path in before} == before
    return after.keys() - before.keys()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_line_before_anything_is_loaded_or_written(name, monkeypatch, capsys):
    words, texts, expected = CASES[name]
    for file, text in texts.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(text.encode() if isinstance(text, str) else text)
    late = "longer than the context" in name        # only the model's tokenizer says how long it is
    if not late:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    new = ends_in_one_line(words, expected, capsys)
    assert not new or late, new


@pytest.mark.parametrize("name", [*MODELS, *(f"weights: {name}" for name in WEIGHTS)])
def test_a_bad_model_ends_in_one_line(name, qwen3, monkeypatch, capsys):
    shutil.copytree(qwen3, "bad")
    if name in MODELS:
        spoil, expected = MODELS[name]
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    else:
        spoil, expected = WEIGHTS[name.removeprefix("weights: ")]
    spoil(Path("bad"))
    words = RESPONSES.replace("--model model", "--model bad").replace("bad.jsonl", "good.jsonl")
    assert not ends_in_one_line(words, f"^error: model bad: {expected}", capsys)


def test_a_pad_token_beyond_the_embedding_is_no_trouble(qwen3):
    """Another id pads."""
    shutil.copytree(qwen3, "bad")
    extra_token(Path("bad"), "<pad>")
    change_json("bad/tokenizer_config.json", pad_token="<pad>")
    Path("bad.jsonl").write_text(line() + "\n" + line(prompt="Why not?", chosen="So it is."))
    for words in (RESPONSES + " --set responses.max_new_tokens=2", POLICY):
        run_here(words.replace("--model model", "--model bad"))
    assert Path("new.jsonl").exists() and Path("new/model.safetensors").exists()


# ---- What is not a bad file ----------------------------------------------------------------------

def test_the_second_of_two_processes_at_one_output_ends_in_one_line(capsys):
    """A training's folder, and a file. Beside them another may work; and the death of the holder ends its lock."""
    outs = {"runs/x": POLICY.replace("new", "runs/x"), "runs/y.jsonl": RESPONSES.replace("new.jsonl", "runs/y.jsonl")}
    hold = ("import sys, plumbing.command as c\n"
            "with c.locked(sys.argv[1]), c.locked(sys.argv[2]): print(flush=True), input()")
    with subprocess.Popen([sys.executable, "-c", hold, *outs], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as holder:
        holder.stdout.readline()
        Path("bad.jsonl").write_text(GOOD)
        for out, words in outs.items():
            ends_in_one_line(words, f"another process is at work on {out}; wait for its end, or choose another --out",
                             capsys)
        run_here(RESPONSES.replace("new", "runs/z") + " --set responses.max_new_tokens=2")
        holder.kill()
    for words in outs.values():
        run_here(words + " --set responses.max_new_tokens=2")
    assert not list(Path("runs").glob(".*"))


def interrupt_training(monkeypatch):
    """SIGTERM within the first update. Returns the command."""
    write_row = Progress.log

    def log_and_stop(progress, row):
        os.kill(os.getpid(), signal.SIGTERM)
        write_row(progress, row)

    Path("bad.jsonl").write_text(GOOD)
    words = POLICY + " --set policy.epochs=2"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted; the same command continues"):
        patch.setattr(Progress, "log", log_and_stop)
        run_here(words)
    assert len(log("new.partial")) == 1
    assert torch.load("new.partial/checkpoint.pt")["step"] == 1
    return words


def test_a_full_disk_is_one_line_and_the_command_goes_on(monkeypatch):
    """The device /dev/full stands where the file is to be."""
    training = interrupt_training(monkeypatch)
    sampling = RESPONSES + " --set responses.max_new_tokens=2"
    monkeypatch.setattr("plumbing.checkpoint.SAVE_SECONDS", 0)
    for words, file in ((sampling, "new.jsonl.tmp"), (training, "new.partial/checkpoint.tmp"),
                        (training, "new.partial/config.json")):
        Path(file).symlink_to("/dev/full")
        with pytest.raises(SystemExit, match="^error: .*no disk space[^\n]*$"):
            run_here(words)
        Path(file).unlink(missing_ok=True)
    run_here(sampling)
    run_here(training)
    assert Path("new.jsonl").exists() and len(log("new")) == 2


@pytest.mark.parametrize("content", [b"", b"cut", None])
def test_a_checkpoint_that_is_none_is_one_line(content, monkeypatch, capsys):
    words = interrupt_training(monkeypatch)
    checkpoint = Path("new.partial/checkpoint.pt")
    if content is None:
        torch.save({"step": 1, "model": {}}, checkpoint)
    else:
        checkpoint.write_bytes(content)
    ends_in_one_line(words, "new.partial/checkpoint.pt: not a checkpoint of this training .*; delete it to start over",
                     capsys)


def test_a_partial_file_of_something_else_is_refused(capsys):
    Path("bad.jsonl").write_text(GOOD)
    words = RESPONSES + " --set responses.max_new_tokens=2"
    run_here(words)
    Path("new.jsonl").unlink()
    for left in ("mine", "[1]", '{"one": {}}'):
        Path("new.jsonl.partial").write_text(left + "\n")
        ends_in_one_line(words, "new.jsonl.partial: not what this command began; delete it", capsys)


def test_a_bug_of_this_project_shows_its_traceback(monkeypatch):
    monkeypatch.setattr("plumbing.outputs.grow", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here(RESPONSES.replace("bad", "good"))


def test_all_of_an_input_counts_for_its_identity(qwen3):
    """The last byte of data; of a checkpoint its weights, template and settings, not its log."""
    seen = set()
    for last in "ab":
        Path("big.jsonl").write_text("a" * 2**21 + last)
        os.utime("big.jsonl", ns=(1, ord(last)))
        seen.add(fingerprint("big.jsonl"))
    shutil.copytree(qwen3, "copy")
    seen.add(fingerprint("copy"))
    for name in ("chat_template.jinja", "config.json", "model.safetensors", "tokenizer_config.json"):
        content = Path("copy", name).read_bytes()
        Path("copy", name).write_bytes(content[:-1] + b"!")         # of the same size
        seen.add(fingerprint("copy"))
    Path("copy/log.jsonl").write_text("{}")
    assert len(seen) == 7 and fingerprint("copy") in seen


def test_a_query_that_is_there_twice_is_counted_and_on_one_side_of_the_split(capsys):
    write_jsonl("twice.jsonl", [{"prompt": f"q{number % 20}"} for number in range(200)])
    _, held = split_queries("twice.jsonl", None, seed=0)
    write_jsonl("held.jsonl", held)
    for given in (None, "held.jsonl"):
        parts = split_queries("twice.jsonl", given, seed=0)
        queries, held = [{record["prompt"][0]["content"] for record in part} for part in parts]
        assert queries | held == {f"q{number}" for number in range(20)} and (len(queries), len(held)) == (18, 2)
    assert "twice.jsonl: 180 duplicate queries are left out" in capsys.readouterr().out
