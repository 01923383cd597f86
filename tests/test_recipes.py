"""Recipes: the paper's values, each explained; what another recipe or --set changes, and nothing else."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import sso
from conftest import PAPER, ROOT, run_here
from plumbing import command, models, recipes
from plumbing.principles import check_form, fault
from plumbing.recipes import change, read_recipe, set_one, stage_settings
from plumbing.records import UserError, read_jsonl

TEXT = recipes.PAPER.read_text()


def test_the_papers_recipe_has_the_papers_values():
    """Section 5.1."""
    both = {"lr": 5e-7, "beta": 0.1, "epochs": 1, "base_loss": "dpo"}
    expected = {"generator": both | {"gamma": 0.1, "batch_size": 32, "examples": 8_000, "objective": "sso"},
                "policy": both | {"gamma": 0.0, "batch_size": 256, "examples": 60_000, "objective": "policy"},
                "responses": {"temperature": 0.7, "top_p": 0.8, "max_new_tokens": 2048}}
    for section, settings in expected.items():
        assert settings.items() <= PAPER[section].items()
    examples = {"examples": PAPER["prompts"]["principles"]["examples"]}
    assert PAPER["prompts"] == sso.PROMPTS | {"principles": sso.PROMPTS["principles"] | examples}


def test_every_setting_of_the_papers_recipe_is_explained_where_it_first_appears():
    """But the reward model's, which are all ours, as its heading says."""
    explained = dict(reversed(re.findall(r"^(\w+) = [^#\n]*?(?: +# (\S.*))?$", TEXT, re.M)))
    for name, section in tomllib.loads(TEXT).items():
        assert name == "prompts" or all(explained[setting] for setting in section)


def test_help_ends_with_the_papers_settings(capsys):
    with pytest.raises(SystemExit):
        run_here("python train.py generator --help")
    assert capsys.readouterr().out.strip().endswith(TEXT.split("# Worked examples")[0].strip())


def test_the_worked_examples_of_the_papers_recipe_are_of_its_kind():
    examples = PAPER["prompts"]["principles"]["examples"]
    assert len(examples) == 8
    for number, example in enumerate(examples):
        for text in (example["bad"], example["good"]):
            assert 30 <= len(text.split()) <= 60 and "\n" not in text
        others = {"principles": {"examples": examples[:number] + examples[number + 1:]}}
        assert fault(example["bad"], example["good"], others) is None
    queries = {record["prompt"][0]["content"] for record in read_jsonl(ROOT / "data/queries.jsonl")}
    assert not queries & {example["query"] for example in examples}


def test_every_recipe_that_is_shipped_can_be_used():
    for path in (ROOT / "recipes").glob("*.toml"):
        recipe = read_recipe(path)
        check_form(recipe["prompts"]["principles"])
        for stage in PAPER.keys() - {"prompts"}:
            stage_settings(recipe, stage)


@pytest.mark.parametrize("text, section, name, value", [
    ("policy.lr=1e-4", "policy", "lr", 1e-4), ("policy.lr=2", "policy", "lr", 2.0),
    ("policy.base_loss=ipo", "policy", "base_loss", "ipo"),
    ("prompts.fallback_bad='7'", "prompts", "fallback_bad", "7"),
    ("prompts.fallback_bad=x = y.z", "prompts", "fallback_bad", "x = y.z"),
    ('prompts.bad={user = "{principle}"}', "prompts", "bad", PAPER["prompts"]["bad"] | {"user": "{principle}"})])
def test_a_setting_is_a_number_a_word_or_a_quoted_text(text, section, name, value):
    recipe = change(PAPER)
    set_one(recipe, text)
    assert recipe == change(PAPER, **{section: {name: value}}) and type(recipe[section][name]) is type(value)


def test_a_recipe_changes_only_what_it_says_and_a_flag_overrides_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text('run = {seed = 5}\n[responses]\ntemperature = 1\nmax_new_tokens = 9\n'
                               '[prompts.good]\nsystem = "Do: {principle}"')
    given = []

    def responses(model, out, recipe, roles=tuple(sso.COLUMNS), rounds: int = 1):
        given.append((model, list(roles), rounds, recipe))

    for flags in ("", "--set responses.temperature=0 --set responses.top_p=1 --seed 6 --roles good bad --rounds 2"):
        monkeypatch.setattr(sys, "argv", f"x.py --model m --out o --recipe my.toml {flags}".split())
        command.run("", responses)
    good = {"system": "Do: {principle}", "user": "{query}"}
    recipe = change(PAPER, run={"seed": 5}, responses={"temperature": 1.0, "max_new_tokens": 9}, prompts={"good": good})
    changed = change(recipe, run={"seed": 6}, responses={"temperature": 0.0, "top_p": 1.0})
    assert given == [("m", ["good", "bad", "original"], 1, recipe), ("m", ["good", "bad"], 2, changed)]
    assert sso.PROMPTS["good"]["system"] != good["system"]         # the constant is nobody's to change


THREE = "number 2 of the recipe is not of three texts: query, bad, good"
ORDER = "answer has to hold {bad} and behind it {good}"
GOOD = {"query": "q", "bad": "b", "good": "g"}


@pytest.mark.parametrize("change, message", [
    ({"examples": [GOOD, {"query": "q", "bad": "b"}]}, THREE), ({"examples": [GOOD, GOOD | {"good": 3}]}, THREE),
    ({"examples": [GOOD, "q"]}, THREE), ({"answer": "{good} {bad}"}, ORDER), ({"answer": "{bad}"}, ORDER),
    ({"end": ""}, "and end a text")])
def test_a_form_of_step_1_that_cannot_work_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_form(PAPER["prompts"]["principles"] | change)


def test_bf16_on_a_cpu_is_a_setting_of_the_command_that_runs(tmp_path):
    """Of each command anew: several may run in a process."""
    line = (f"python generate.py written --principles {ROOT}/data/features.jsonl --queries {ROOT}/data/queries.jsonl "
            f"--out {tmp_path}/principles.jsonl")
    for value in (1, 0):
        run_here(f"{line} --set run.bf16_on_cpu={value}")
        assert models.bf16_on_cpu == value and models.precision() == (torch.bfloat16 if value else torch.float32)
