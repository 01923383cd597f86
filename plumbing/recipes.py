"""Recipes: every setting of every stage, and the prompts.

recipes/paper.toml has them all; another recipe, or --set, says what it changes.
"""

import copy
import inspect
import tomllib
from pathlib import Path

import sso
from plumbing.records import UserError

PAPER = Path(__file__).parent.parent / "recipes" / "paper.toml"
CHOICES = {"objective": sso.PAIRS, "base_loss": sso.BASE_LOSSES, "logps": ("plain", "fast")}
WHOLE = (1, 10**9)      # bounds of whole numbers
REAL = (1e-12, 1e300)   # of others
BOUNDS = {
    "top_p": (1e-12, 1), "warmup": (0, 1), "recompute_layers": (0, 1), "bf16_on_cpu": (0, 1),
    **dict.fromkeys(("seed", "lora_rank", "micro_batch_tokens"), (0, 10**9)),
    **dict.fromkeys(("temperature", "gamma", "weight_decay"), (0, 10**9))}


def load_toml(path):
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:      # no such file; not TOML or UTF-8
        raise UserError(f"--recipe {path}: {error}") from None


def update(settings, given, place):
    """Replace settings by given values: known ones, of the same type. A base loss may name settings
    of its own, behind log-probs and numbers of tokens."""
    own = []
    for loss in sso.BASE_LOSSES.values():
        own += list(inspect.signature(loss).parameters)[3:]
    for key, value in given.items():
        if key not in settings and not ("base_loss" in settings and key in own):
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
    """{section: settings}: the paper's, and over them those of the recipe in a file."""
    recipe = load_toml(PAPER)
    prompts = copy.deepcopy(sso.PROMPTS)
    update(prompts, recipe["prompts"], "recipes/paper.toml prompts:")
    recipe["prompts"] = prompts
    if path:
        update(recipe, load_toml(path), f"--recipe {path}:")
    return recipe


def set_one(recipe, text):
    """Change one setting, given as "policy.lr=1e-6": a recipe of one entry."""
    name, _, value = text.partition("=")
    section, _, key = name.partition(".")
    try:
        value = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        pass                                # a word without quotes
    update(recipe, {section: {key: value}}, f"--set {text}:")


def change(recipe, **sections):
    """A copy of a recipe with some settings changed: change(recipe, policy={"lr": 1e-4})."""
    changed = copy.deepcopy(recipe)
    for section, settings in sections.items():
        changed[section] |= settings
    return changed


def stage_settings(recipe, stage):
    """The settings of a stage, with the run's seed. UserError if one is out of its range."""
    settings = recipe["run"] | recipe[stage]
    paper = load_toml(PAPER)
    for key in paper["run"] | paper[stage]:         # a base loss of one's own may have more
        value = settings[key]
        if key in CHOICES:
            if value not in CHOICES[key]:
                raise UserError(f"{stage}.{key} = {value} is none of {', '.join(CHOICES[key])}")
            continue
        usual = WHOLE if isinstance(value, int) else REAL
        least, most = BOUNDS.get(key, usual)
        if not least <= value <= most:
            raise UserError(f"{stage}.{key} = {value} is not between {least} and {most}")
    return settings
