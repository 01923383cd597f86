"""The lessons: every exercise is red on its blank and green on its solution; the notebook runs from top to bottom."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from lab import smollm, toy

NUMBERS = ["01", "02", "03", "04", "05", "06"]
ON_THE_FIRST_RUN = ("05", "06")


def outcomes(folder, *words):
    """{number of an exercise: set of the outcomes of its tests}, as `python -m pytest lessons` has them."""
    done = subprocess.run([sys.executable, "-m", "pytest", "lessons", "-rA", "-q", "-p", "no:cacheprovider", *words],
                          cwd=folder, capture_output=True, text=True)
    found = {}
    for outcome, number in re.findall(r"^(PASSED|FAILED|ERROR) \S+::test_(\d\d)_", done.stdout, re.MULTILINE):
        found.setdefault(number, set()).add(outcome)
    assert found, done.stdout + done.stderr
    return found


def test_each_exercise_is_red_on_its_blank_and_green_on_its_solution(default_run):
    folder, numbers, words = ROOT, [number for number in NUMBERS if number not in ON_THE_FIRST_RUN], []
    if default_run:                             # two exercises look at the first run of a reader
        process, folder = default_run
        assert process.wait() == 0
        numbers = NUMBERS
    words = ["-k", " or ".join(numbers)]
    assert outcomes(folder, *words) == {number: {"FAILED"} for number in numbers}
    assert outcomes(folder, "--solutions", *words) == {number: {"PASSED"} for number in numbers}


def test_every_exercise_says_what_it_asks_and_has_a_solution():
    files = sorted(path.name for path in (ROOT / "lessons").glob("0*.py"))
    assert [name[:2] for name in files] == NUMBERS
    assert files == sorted(path.name for path in (ROOT / "lessons/solutions").glob("0*.py"))
    for name in files:
        text = (ROOT / "lessons" / name).read_text()
        assert re.match(rf'"""Exercise {int(name[:2])}: .* \d+ minutes', text), name
        assert "Hand in: " in text and f"python -m pytest lessons -k {name[:2]}" in text
        teacher = (ROOT / "lessons/README.md").read_text()
        assert f"`{name}`" in teacher


def test_the_lessons_do_not_run_with_the_projects_own_tests():
    assert "testpaths = tests" in (ROOT / "pytest.ini").read_text()


def test_the_notebook_runs_from_top_to_bottom(toy_base, tmp_path, monkeypatch, capsys):
    """On few queries, and on a base model of seconds. Its outputs are not committed."""
    notebook = json.loads((ROOT / "lessons/walkthrough.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells) and len(cells) > 12
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sso.py").touch()               # as in the project's folder
    monkeypatch.setattr(toy, "build", lambda out, *args, **how: shutil.copytree(toy_base, out))
    monkeypatch.setattr(smollm, "weights_folder", lambda: None)
    names = {}
    for cell in cells:
        exec("".join(cell["source"]).replace("QUERIES = 512", "QUERIES = 48"), names)
    printed = capsys.readouterr().out
    assert "L_base at step zero: 0.6931" in printed and "quality" in printed
    hand = re.findall(r"by hand (\d\.\d+), sso.sso_loss (\d\.\d+)", printed)
    assert len(hand) == 2 and all(one == other for one, other in hand)
    for one, other in re.findall(r"^L[+-] (\[.*\]) (\[.*\])$", printed, re.MULTILINE):
        assert json.loads(one) == pytest.approx(json.loads(other), abs=2e-3)
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert "Colab" in text and "requirements.txt" in text
