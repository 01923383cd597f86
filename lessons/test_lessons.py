"""The tests of the exercises. Each asks what the exercise asks, of the student's file."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import generate
import sso
import train
from plumbing.recipes import change, read_recipe
from plumbing.records import as_lines, read_jsonl, write_text
from toy import world

TOY_RUN = Path("runs/toy")


@pytest.fixture
def exercise(request, folder):
    """The names in the file of the exercise that a test is of: test_01_... is of 01_*.py."""
    number = request.function.__name__.split("_")[1]
    [path] = folder.glob(f"{number}_*.py")
    return SimpleNamespace(**runpy.run_path(str(path)))


@pytest.fixture
def toy_run():
    if not (TOY_RUN / "report.json").exists():
        pytest.fail("this exercise looks at the first run: python run.py")
    return TOY_RUN


# ---- 1 -------------------------------------------------------------------------------------------

@pytest.fixture
def model():
    torch.manual_seed(0)
    return sso.TinyModel()


def by_a_loop(model, prompt, response):
    """log π(y|x) of one response alone, a token at a time."""
    total = 0.0
    for position in range(len(response)):
        logits = model(torch.tensor([prompt + response[:position]])).logits[0, -1]
        total = total - F.cross_entropy(logits, torch.tensor(response[position]))
    return total


def test_01_the_log_probability_of_a_response(exercise, model):
    prompt, response = [5, 7, 11], [13, 17, 19, 23]
    logits = model(torch.tensor([prompt + response])).logits[0]
    logp = exercise.response_logp(logits, torch.tensor(prompt + response), len(prompt))
    torch.testing.assert_close(torch.as_tensor(logp), by_a_loop(model, prompt, response))


def test_01_pairs_of_all_lengths(exercise, model):
    examples = [([1, 2, 3], [4, 5], [6]), ([7], [8, 9, 10, 11], [12, 13]), ([14, 15], [16], [17, 18, 19])]
    logps, tokens = exercise.pair_logps(model, examples, 0)
    assert logps.shape == tokens.shape == (2, 3)
    for column, (prompt, winner, loser) in enumerate(examples):
        torch.testing.assert_close(logps[0, column], by_a_loop(model, prompt, winner))
        torch.testing.assert_close(logps[1, column], by_a_loop(model, prompt, loser))
    assert tokens.tolist() == [[2, 4, 1], [1, 2, 3]]


def test_01_padding_counts_for_nothing_even_where_it_looks_like_a_token(exercise, model):
    examples = [([1, 2], [3], [3]), ([1, 2], [3, 4, 5, 6], [3])]
    for pad_id in (0, 3):
        logps, _ = exercise.pair_logps(model, examples, pad_id)
        assert logps[0, 0].item() == pytest.approx(by_a_loop(model, [1, 2], [3]).item(), abs=1e-5)
    logps.sum().backward()              # and it can be trained
    assert model.head.weight.grad.abs().sum() > 0


# ---- 2 -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base_loss", ["dpo", "ipo"])
def test_02_the_loss_of_a_pair_at_step_zero(exercise, base_loss):
    logps, tokens = torch.tensor([[[-5.0]], [[-9.0]]]), torch.tensor([[[4]], [[6]]])
    loss, parts = sso.sso_loss(logps, logps, tokens, base_loss, 0.3, beta=0.2)
    assert exercise.expected_loss(base_loss, 0.2, 0.3, parts["sft"].item()) == pytest.approx(loss.item())


def test_02_what_a_first_line_gives_away(exercise):
    ln2 = math.log(2)
    rows = [({"base": ln2, "chosen_rewards": 0.0, "rejected_rewards": 0.0}, 0),
            ({"base": ln2 + 1e-7, "chosen_rewards": 1e-8, "rejected_rewards": -1e-8}, 0),
            ({"base": 0.71, "chosen_rewards": -0.2, "rejected_rewards": -0.17}, 1),
            ({"base": ln2, "chosen_rewards": -0.4, "rejected_rewards": -0.4}, 1),    # margins of zero hide it
            ({"base": 32 * ln2, "chosen_rewards": 0.0, "rejected_rewards": 0.0}, 2)]
    for row, fault in rows:
        assert exercise.what_is_wrong(row, 0.1) == exercise.FAULTS[fault], row


# ---- 3 -------------------------------------------------------------------------------------------

def test_03_the_rows_of_the_equations(exercise):
    expected = {"L": sso.L, "L+": sso.L_PLUS, "L- of Eq. 3": sso.L_MINUS_EQ3, "L- of Eq. 4": sso.L_MINUS}
    for name, row in expected.items():
        assert tuple(exercise.TABLE[name]) == tuple(row), name


def test_03_what_they_ask_for(exercise):
    sentences = [exercise.sentence(row) for row in (sso.L, sso.L_PLUS, sso.L_MINUS_EQ3, sso.L_MINUS)]
    assert sentences == ["under x say y+ rather than y-", "under x+ say y+ rather than y-",
                         "under x- say y- rather than y+", "under x- say yo rather than y+"]


# ---- 4 -------------------------------------------------------------------------------------------

def right(token_logps, is_response):
    return -token_logps[is_response].mean()


FAULTY = {
    "divided by the padded width": lambda logps, mask: -(logps * mask).sum() / len(logps),
    "over the prompt, too": lambda logps, mask: -logps[:mask.nonzero().max() + 1].mean(),
    "over the padding, too": lambda logps, mask: -logps[mask.nonzero().min():].mean(),
    "a sum": lambda logps, mask: -(logps * mask).sum(),
    "of the wrong sign": lambda logps, mask: logps[mask].mean(),
}


def test_04_the_right_mean_is_not_accused(exercise):
    assert exercise.is_wrong(right) is False


@pytest.mark.parametrize("fault", FAULTY)
def test_04_a_faulty_mean_is_found(exercise, fault):
    assert exercise.is_wrong(FAULTY[fault]) is True


# ---- 5 -------------------------------------------------------------------------------------------

def word(now, before):
    if abs(now - before) < 0.1:
        return "as it was"
    return "higher" if now > before else "lower"


def test_05_where_the_rejected_responses_go(exercise, toy_run):
    recipe, out = read_recipe(world.RECIPE), Path("runs/lessons")
    base, responses = world.BASE, toy_run / "responses.jsonl"
    assert set(exercise.PREDICTION.values()) <= {"higher", "lower", "as it was"}, "predict first"
    eq3 = change(recipe, generator={"objective": "eq3"})
    train.train("generator", base, responses, out / "eq3", eq3)
    generate.responses(out / "eq3", responses, out / "eq3.jsonl", recipe, ("good", "bad"))
    before = exercise.p_rejected(responses, base, recipe)
    assert before == pytest.approx(evaluation.measure_pairs(responses, base, None, recipe)["p(rejected)"]["mean"])
    measured = {"Eq. 4": exercise.p_rejected(toy_run / "pairs.jsonl", base, recipe),
                "Eq. 3": exercise.p_rejected(out / "eq3.jsonl", base, recipe)}
    print(f"p(rejected): of the policy's own pairs {before:.3f}; of the generators {measured}")
    for name, value in measured.items():
        assert exercise.SEEN[name] == word(value, before), f"{name}: {before:.3f} became {value:.3f}"
    assert len(exercise.EXPLANATION.split()) >= 40, "explain it"


# ---- 6 -------------------------------------------------------------------------------------------

def test_06_bad_principles_that_ask_for_what_the_model_does_unasked(exercise, toy_run):
    recipe, out = read_recipe(world.RECIPE), Path("runs/lessons")
    records = read_jsonl(toy_run / "responses.jsonl")[:256]
    for record in records:
        record["bad_principle"] = exercise.bad_principle(record["prompt"][0]["content"])
    for file in out.glob("control*"):
        file.unlink()
    write_text(out / "control_principles.jsonl", as_lines(records))
    generate.responses(world.BASE, out / "control_principles.jsonl", out / "control.jsonl", recipe, ("bad",))
    critic, _ = evaluation.load_critic(grader=world.__file__)
    measures = evaluation.measure_pairs(out / "control.jsonl", world.BASE, critic, recipe)
    rejected, original = measures["p(rejected)"]["mean"], measures["p(original)"]["mean"]
    print(f"p(rejected) {rejected:.3f}, p(original) {original:.3f}, accuracy {measures['accuracy']['mean']:.3f}")
    assert measures["accuracy"]["mean"] > 0.75, "the pairs have to stay accurate"
    assert abs(rejected - original) < 0.1, f"p(rejected) is {rejected:.3f}, p(original) {original:.3f}"
    assert exercise.PREDICTION in ("kept", "lost") and exercise.SEEN == "lost"
