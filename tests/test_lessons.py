"""The lessons: every exercise is red on its blank and green on its solution; the notebook runs from top to bottom."""

import json
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from test_readme import first_run

EXERCISES = sorted(path.name for path in (ROOT / "lessons").glob("0*.py"))
NOTEBOOK = json.loads((ROOT / "lessons/walkthrough.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("words, outcome", [([], "FAILED"), (["--solutions"], "PASSED")])
def test_each_exercise_is_red_on_its_blank_and_green_on_its_solution(words, outcome):
    """As `python -m pytest lessons` has it. Two exercises look at the first run of a reader."""
    folder, _ = first_run()
    done = subprocess.run([sys.executable, "-m", "pytest", "lessons", "-rA", "-q", *words], cwd=folder,
                          capture_output=True, text=True)
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S+::test_(\d\d)_", done.stdout, re.MULTILINE)
    assert set(found) == {(outcome, name[:2]) for name in EXERCISES}, done.stdout


def test_every_exercise_says_what_it_asks_and_has_a_solution():
    assert EXERCISES == sorted(path.name for path in (ROOT / "lessons/solutions").glob("0*.py")) and len(EXERCISES) == 6
    teacher = (ROOT / "lessons/README.md").read_text(encoding="utf-8")
    for name in EXERCISES:
        text = (ROOT / "lessons" / name).read_text(encoding="utf-8")
        assert re.match(rf'"""Exercise {int(name[:2])}: .* \d+ minutes', text), name
        assert "Hand in: " in text and f"python -m pytest lessons -k {name[:2]}" in text and f"`{name}`" in teacher


def test_the_notebook_is_committed_without_outputs_and_runs_on_colab():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CELLS) and len(CELLS) > 12
    text = "".join("".join(cell["source"]) for cell in CELLS)
    assert "Colab" in text and "requirements.txt" in text


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sso.py").touch()               # as in the project's folder
    monkeypatch.setattr("lab.gguf.smollm2", lambda: None)
    names = {}
    for cell in CELLS:
        exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert printed.count("L_base at step zero: 0.6931") == 3
    # By hand and by sso.py: two log-probs of each term, then its loss.
    pairs = re.findall(r"^L[+-] (\[.*\]) (\[.*\])$", printed, re.MULTILINE)
    pairs += re.findall(r"^L[+-]: by hand (\S+), sso.sso_loss (\S+)$", printed, re.MULTILINE)
    assert len(pairs) == 4
    for one, other in pairs:
        assert json.loads(one) == pytest.approx(json.loads(other), abs=2e-3)
    quality = {name: float(mean) for name, mean in re.findall(r"^(\w+) +quality (\S+) ±", printed, re.MULTILINE)}
    assert quality["SSO"] > quality["PBAA"] > quality["base"]
