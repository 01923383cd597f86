"""What surrounds a command: its flags, a lock on its output, and errors of one line.

A command is a function, and its parameters are its flags. --set changes settings.
"""

import argparse
import contextlib
import errno
import inspect
import signal
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

import sso
from plumbing import memory, models
from plumbing.recipes import PAPER, read_recipe, set_one
from plumbing.records import UserError

HELP = {
    "model": "chat model: checkpoint folder or Hugging Face id",
    "queries": "JSONL file: a 'prompt' a line",
    "heldout": "JSONL file: queries of the report (default: a tenth of --queries)",
    "principles": "JSONL file: 'good_principle' and 'bad_principle' a line",
    "principle_model": "chat model that writes the principles (default: the model itself)",
    "data": "JSONL preference file",
    "roles": "responses to sample (default: all)",
    "originals": "sample yo only for the first N queries (default: for all)",
    "objective": "entry of sso.PAIRS; policy is PBAA (default: generator.objective)",
    "rounds": "rounds of the method; each starts from the policy of the one before",
    "policy": "chat model under which p(.) is measured",
    "grader": "Python file with grade(query, response, finished), 0 to 1",
    "judge": "chat model that compares two outputs",
    "server": "URL, as http://localhost:8000/v1, of an OpenAI-compatible server for --judge and "
              "--principle-model (generate.py: for --model); its key: OPENAI_API_KEY",
    "judge_pairs": "comparisons of a file that a judge sees (default: 200, Section 6.3)",
    "out": "what to write",
    # Of the lab
    "count": "number of queries, at most",
    "long": "1: long principles",
    "names": "what to run, with commas (default: see above)",
    "strong": "chat model, or a folder of the principles that it wrote",
    "world": "what its texts are drawn from",
    "base": "chat model (default: a seed trains its own)",
}
SETTINGS = PAPER.read_text(encoding="utf-8").partition("# Worked examples")[0].replace("%", "%%")
CHOICES = {"roles": sso.COLUMNS, "objective": sso.PAIRS}
SEVERAL = {"files": "+", "folders": "+", "roles": "+"}


# ---- Flags ---------------------------------------------------------------------------------------

def add_flags(parser, function):
    """Add a flag for each parameter of a command. It is required if the parameter has no default,
    and its type is the annotation. Files and folders need no flag. --set and --seed change the
    recipe."""
    parameters = dict(inspect.signature(function).parameters)
    if parameters.pop("recipe", None):
        parser.add_argument("--recipe", help="TOML file of settings and prompts")
        parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE",
                            help="change a setting, as policy.lr=1e-6; may be repeated")
        parser.add_argument("--seed", dest="set", action="append", metavar="SEED",
                            type="run.seed={}".format, help="short for --set run.seed=SEED")
        parser.epilog = SETTINGS
    for name, parameter in parameters.items():
        options = {"help": HELP.get(name), "choices": CHOICES.get(name),
                   "nargs": SEVERAL.get(name), "type": function.__annotations__.get(name)}
        if name not in ("files", "folders"):
            options |= {"default": parameter.default,
                        "required": parameter.default is parameter.empty}
            name = f"--{name.replace('_', '-')}"
        parser.add_argument(name, **options)
    parser.set_defaults(function=function)


def parse(description, functions, default_recipe):
    """The function that the command line names, and its arguments."""
    style = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=description, **style)
    if len(functions) == 1:
        add_flags(parser, functions[0])
    else:
        subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
        for function in functions:
            title = function.__doc__.split("\n")[0]
            add_flags(subparsers.add_parser(function.__name__, help=title, **style), function)
    args = vars(parser.parse_args())
    function = args.pop("function")
    for name, parameter in inspect.signature(function).parameters.items():
        least = int(parameter.default != 0)
        if isinstance(args[name], int) and args[name] < least:
            raise UserError(f"--{name.replace('_', '-')} is at least {least}")
    if "recipe" in args:
        args["recipe"] = read_recipe(args["recipe"] or default_recipe(args))
        for text in args.pop("set"):
            set_one(args["recipe"], text)
        models.bf16_on_cpu = bool(args["recipe"]["run"]["bf16_on_cpu"])
    return function, args


# ---- A lock on the output ------------------------------------------------------------------------

@contextlib.contextmanager
def locked(out):
    """Lock OUT, a file or a folder. UserError if another process holds it, or if it cannot be
    written. The lock ends with its process, however the process dies."""
    path = Path(out).parent / f".{Path(out).name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path).acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process is at work on {out}; wait for its end, or choose another "
                        "--out") from None
    except OSError as error:
        raise UserError(f"--out {out}: nothing can be written there ({error.strerror})") from None
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


# ---- Errors --------------------------------------------------------------------------------------

def reason(error):
    """What went wrong and what to do, in one line. None for a bug of this project."""
    if memory.ran_out(error):
        return (f"{error}; lower --set STAGE.micro_batch_tokens (training) or STAGE.batch_size "
                "(sampling)")
    if getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error):
        return f"no disk space ({error}); what was finished is kept, the same command continues"
    if isinstance(error, (UserError, OSError, SafetensorError)):
        return str(error)
    return None


def run(description, *functions, default_recipe=lambda args: None):
    """Run the function of a script that the command line names. Bad input, a full disk, Ctrl-C and
    SIGTERM end in one line and an exit code that is not zero."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        function, args = parse(description, functions, default_recipe)
        with contextlib.ExitStack() as stack:
            if "out" in args:
                stack.enter_context(locked(args["out"]))
            function(**args)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command continues where it stopped")
    except Exception as error:
        known = reason(error)
        if known is None:
            raise
        sys.exit("error: " + " ".join(known.split()))
