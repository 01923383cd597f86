"""What a command line needs: recipes, a flag for each of their settings, errors of one line.

recipes/paper.toml has every setting; another recipe says what it changes. A trailing comment there
is the help of the setting's flag.
"""

import argparse
import contextlib
import copy
import inspect
import re
import runpy
import sys
import tomllib
from pathlib import Path

import sso
from plumbing.files import UserError
from plumbing.guard import guarded, locked

PAPER = Path(__file__).parent.parent / "recipes" / "paper.toml"
CHOICES = {"objective": sso.PAIRS, "base_loss": sso.BASE_LOSSES, "roles": sso.COLUMNS}
BOUNDS = {      # of numbers; the others are above 0, and whole ones at least 1
    "top_p": (1e-12, 1), "warmup": (0, 1), "recompute_layers": (0, 1), "compile": (0, 1),
    "long": (0, 1), "memory": (0, 1), "worked_examples": (0, 1), "seed": (0, 2**40),
    "rounds": (0, 1000),
    **dict.fromkeys(("micro_batch_tokens", "temperature", "gamma", "weight_decay", "answers"),
                    (0, 10**9))}


# ---- Recipes -------------------------------------------------------------------------------------

def load_toml(path):
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:      # no such file; not TOML or UTF-8
        raise UserError(f"--recipe {path}: {error}") from None


def loss_settings():
    """Settings that a base loss of one's own names, beside those of the paper's recipe."""
    names = set()
    for loss in sso.BASE_LOSSES.values():
        names |= set(inspect.signature(loss).parameters)
    return names - {"policy_logps", "ref_logps", "tokens", "others"}


def update(settings, given, place, extra=()):
    """Put given values in the place of settings: known ones, or `extra`, and of the same type."""
    for key, value in given.items():
        if key not in settings and key not in extra:
            raise UserError(f"{place} has no {key!r}; it has {', '.join(settings)}")
        known = settings.get(key, value)
        if isinstance(known, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(known):
            raise UserError(f"{place} {key} = {value!r} is not of the type of {known!r}")
        if isinstance(value, dict):
            update(known, value, f"{place} {key}:")
        else:
            settings[key] = value


def read_recipe(path=None):
    """The settings of every stage and the prompts: those of the paper, and over them a recipe's
    own."""
    recipe = load_toml(PAPER)
    prompts = copy.deepcopy(sso.PROMPTS)
    update(prompts, recipe["prompts"], "recipes/paper.toml prompts:")
    recipe["prompts"] = prompts
    if path:
        given = load_toml(path)
        extra = {"generator": loss_settings(), "policy": loss_settings()}
        for section in given:
            if section not in recipe or not isinstance(given[section], dict):
                raise UserError(f"--recipe {path}: no [{section}]; there are {', '.join(recipe)}")
            update(recipe[section], given[section], f"--recipe {path}: [{section}]",
                   extra.get(section, ()))
        check_principles(recipe["prompts"]["principles"], f"--recipe {path}")
    return recipe


def check_principles(form, place):
    """UserError if worked examples, or the form of an answer, are not what step 1 needs."""
    for number, example in enumerate(form["examples"], 1):
        if not isinstance(example, dict) or set(example) != {"query", "bad", "good"} or any(
                not isinstance(text, str) for text in example.values()):
            raise UserError(f"{place}: [[prompts.principles.examples]] number {number} is not of "
                            "three texts: query, bad, good")
    if not 0 <= form["answer"].find("{bad}") < form["answer"].find("{good}") or not form["end"]:
        raise UserError(f"{place}: [prompts.principles]: answer has to hold {{bad}} and behind it "
                        "{good}, and end a text")


def change(recipe, **sections):
    """A copy of a recipe with some settings changed: change(recipe, policy={"lr": 1e-4})."""
    changed = copy.deepcopy(recipe)
    for section, settings in sections.items():
        changed[section] |= settings
    return changed


def stage_settings(recipe, stage):
    """The settings of a stage, with the run's seed. UserError if one is out of its range."""
    settings, paper = recipe["run"] | recipe[stage], load_toml(PAPER)
    for key, value in settings.items():
        if key not in paper["run"] | paper[stage]:      # of a base loss of one's own
            continue
        flag = f"{stage}: --{key.replace('_', '-')} {value}"
        if key in CHOICES:
            if value not in CHOICES[key]:
                raise UserError(f"{flag} is none of {', '.join(CHOICES[key])}")
            continue
        if not isinstance(value, (int, float)):
            raise UserError(f"{flag} is no number")
        check_number(flag, key, value)
    return settings


def check_number(flag, name, value):
    """UserError if a number is out of its range."""
    usual = (1, 10**9) if isinstance(value, int) else (1e-12, 1e300)
    least, most = BOUNDS.get(name, usual)
    if not least <= value <= most:
        raise UserError(f"{flag} is not between {least} and {most}")


# ---- Flags ---------------------------------------------------------------------------------------

HELP = {        # of flags that are no settings: the parameters of commands
    "model": "chat model: checkpoint folder or Hugging Face id",
    "queries": "JSONL file: a 'prompt' a line",
    "heldout": "JSONL file: queries of the report (a tenth of --queries)",
    "principles": "JSONL file: 'good_principle' and 'bad_principle' a line",
    "principle_model": "chat model that writes the principles (the model itself)",
    "data": "JSONL preference file",
    "roles": "responses to sample (all)",
    "originals": "sample yo for the first so many queries alone (for all)",
    "objective": "row of sso.PAIRS (sso); policy is PBAA",
    "base_loss": "L_base of both trainings (the recipe's)",
    "rounds": "each from the policy before",
    "policy": "chat model under which p(.) is measured",
    "grader": "Python file with grade(query, response, finished), 0 to 1",
    "judge": "chat model that compares two outputs",
    "server": "URL, as http://localhost:8000/v1, of an OpenAI-compatible server for --judge and "
              "--principle-model (generate.py: for --model); its key: OPENAI_API_KEY",
    "judge_pairs": "comparisons of a file that a judge sees (200, as in Section 6.3)",
    "out": "what to write",
    "seeds": "1 to so many",
    "processes": "of one thread each",
    "results_file": "JSON file of results",
    "plot": "picture to draw, too (needs matplotlib)",
    "world": "of lab/toy.toml",
    "long": "1: principles of 30 to 60 words (0)", "seed": "of what is drawn",
    "count": "at most so many queries, and so many held out",
    "files": "JSONL", "folders": "of runs of run.py",
}
SEVERAL = ("files", "folders", "roles")


def comments():
    """{setting: its trailing comment where it first stands in the paper's recipe}."""
    text = PAPER.read_text(encoding="utf-8")
    found = re.findall(r"^(\w+) = \S+ +# (.*)$", text, re.MULTILINE)
    return dict(reversed(found))


def recipe_of_command_line(without_model=None):
    """The recipe that the command line names: it has to be known before the flags are. One without
    a --model has another default."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--model")
    args, _ = parser.parse_known_args()
    if args.recipe is None and args.model is None:
        return read_recipe(without_model)
    return read_recipe(args.recipe)


def add_settings(parser, recipe, stages):
    """--recipe, --seed, and a flag for each setting of the stages: --lr, or of several
    --policy.lr."""
    parser.add_argument("--recipe", help="TOML file of settings and prompts (recipes/paper.toml)")
    for stage in ("run", *stages):
        for key, value in recipe[stage].items():
            if key in CHOICES and len(stages) > 1:      # a whole run has flags of its own for these
                continue
            flag = key.replace("_", "-")
            if stage != "run" and len(stages) > 1:
                flag = f"{stage}.{flag}"
            text = f"{comments().get(key, '')} ({value})".replace("%", "%%")
            parser.add_argument(f"--{flag}", dest=f"{stage}.{key}", type=type(value), default=value,
                                metavar="V", help=text)


def add_flag(parser, parameter):
    """A flag for a parameter of a command, required if it has no default; files and folders need no
    flag. Its type is that of its annotation or its default."""
    name, options = parameter.name, {"help": HELP.get(parameter.name)}
    if name in SEVERAL:
        options["nargs"] = "+"
    if name in ("files", "folders"):
        parser.add_argument(name, **options)
        return
    if parameter.annotation is not parameter.empty:
        options["type"] = parameter.annotation
    if parameter.default is parameter.empty:
        options["required"] = True
    else:
        options["default"] = parameter.default
    parser.add_argument(f"--{name.replace('_', '-')}", choices=CHOICES.get(name), **options)


def main(description, *commands, without_model=None):
    """Run a script. A command is (name, function, stages of the recipe whose settings are flags);
    the function's parameters are its flags; `out: Path` is a folder. One that stands alone needs no
    name on the command line."""
    recipe = recipe_of_command_line(without_model)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    if len(commands) > 1:
        subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, stages in commands:
        command = parser
        if len(commands) > 1:
            command = subparsers.add_parser(name, help=function.__doc__.split("\n")[0],
                                            allow_abbrev=False)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name == "recipe":
                add_settings(command, recipe, stages)
            else:
                add_flag(command, parameter)
        command.add_argument("--debug", action="store_true", help="show where an error came from")
        command.set_defaults(function=function)
    args = vars(parser.parse_args())
    function = args.pop("function")
    args.pop("debug")
    for name in [name for name in args if "." in name]:
        section, key = name.split(".")
        recipe[section][key] = args.pop(name)
    for name, value in args.items():
        if isinstance(value, (int, float)):
            check_number(f"--{name.replace('_', '-')} {value}", name, value)
    if "recipe" in args:
        args["recipe"] = recipe
    with contextlib.ExitStack() as lock:
        if "out" in args:
            annotation = inspect.signature(function).parameters["out"].annotation
            lock.enter_context(locked(args["out"], is_folder=annotation is Path))
        function(**args)


# ---- A grader ------------------------------------------------------------------------------------

def load_grader(path):
    """The function grade(query, response) of a grader's file. What goes wrong in it names the
    query."""
    if not Path(path).is_file():
        raise UserError(f"--grader {path}: no such file")
    try:
        graders = runpy.run_path(str(path))
    except Exception as error:              # of any kind: the file is the user's own
        raise UserError(f"--grader {path}: {type(error).__name__}: {error}") from error
    if "grade" not in graders:
        raise UserError(f"--grader {path}: it has no function grade(query, response, finished)")

    def grade(query, response):
        place = f"--grader {path}, on the query {query[:60]!r}"
        try:
            mark = float(graders["grade"](query, response.text, response.finished))
        except Exception as error:
            raise UserError(f"{place}: {type(error).__name__}: {error}") from error
        if not 0 <= mark <= 1:
            raise UserError(f"{place}: {mark} is no mark from 0 to 1")
        return mark
    return grade


def run(description, *commands, without_model=None):
    """`main`, but what goes wrong ends in one line and a code that is not zero."""
    with guarded("--debug" in sys.argv):
        main(description, *commands, without_model=without_model)
