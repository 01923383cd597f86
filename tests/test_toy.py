"""The toy world: its grader, its model, its queries."""

import random
import re
import re
import statistics
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import eval as evaluation
import generate
import sso
from conftest import GRADER, TOY, TOY_BASE, run_here, write_jsonl
from plumbing.grader import load_grader
from plumbing.principles import begun_answer, cut
from plumbing.recipes import load_toml
from plumbing.records import UserError
from plumbing.sampling import load_sampler
from toy import world

pytestmark = pytest.mark.usefixtures("here")
MARKS = load_toml(Path(__file__).with_name("marks.toml"))["toy"]


@pytest.mark.parametrize("query", MARKS)
def test_the_toy_world_is_a_grader(query):
    """An unfinished answer loses a tenth, once. Queries of others are refused."""
    grade = load_grader(world.__file__)
    for response, quality in MARKS[query].items():
        assert grade(query, sso.Response(response, True)) == pytest.approx(quality), response
        unfinished = grade(query, sso.Response(response, False))
        assert unfinished == pytest.approx(0.9 * quality if response.endswith(".") else quality), response
    for other in ("Why?", "keep only the fruits : kiwi dog", "sort these words : "):
        with pytest.raises(UserError, match=f"'{re.escape(other)}' is not a query of the toy world"):
            grade(other, sso.Response("", True))


def test_solutions_are_right_and_every_other_mode_is_worse_except_in_style():
    rng = random.Random(0)
    queries = [world.make_query(rng) for _ in range(400)]
    mean = {}
    for mode in world.ANSWERS:
        mean[mode] = statistics.fmean(world.grade(query, world.answer(query, rng, mode)) for query in queries)
    assert mean["good"] == mean["pirate"] == 1 and mean["drama"] == pytest.approx(0.9)
    assert 0.4 < mean["slip"] < 0.7 and 0.1 < mean["lazy"] < 0.4 and 0.4 < mean["ramble"] < 0.7
    assert mean["chatter"] == mean["refuse"] == 0 and mean["loop"] < 0.2


def test_what_it_is_trained_on_is_what_its_template_and_prompts_give():
    """All of it in its vocabulary; and principles in the two stages in which they are asked for."""
    tokenizer, rng = AutoTokenizer.from_pretrained(TOY_BASE), random.Random(1)
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    two_stages = 0
    for _ in range(300):
        system, user, assistant = world.make_chat(rng)
        messages = [{"role": "user", "content": user}]
        if system == TOY["prompts"]["principles"]["system"]:
            messages = sso.principle_messages(user, TOY["prompts"])
            bad = cut(assistant.removeprefix(begun_answer("bad", {}, TOY["prompts"])), TOY["prompts"])
            good = assistant.removeprefix(begun_answer("good", {"bad": bad}, TOY["prompts"]) + " ")
            assert good in {world.principle(user, rng, "good") for _ in range(100)}
            two_stages += 1
        elif system:
            record = {"prompt": messages, "good_principle": system}
            messages = sso.role_messages("good", record, TOY["prompts"])
        prompt, response = world.encode_chat(tokenizer.get_vocab(), system, user, assistant)
        assert prompt == sso.encode_prompt(tokenizer, messages)
        assert response == sso.encode_response(tokenizer, end_id, sso.Response(assistant, finished=True))
        assert tokenizer.decode(response, skip_special_tokens=True) == assistant
        assert tokenizer.unk_token_id not in prompt + response
    assert two_stages > 10
    fixed = tokenizer([TOY["prompts"]["fallback_good"], TOY["prompts"]["fallback_bad"]]).input_ids
    assert tokenizer.unk_token_id not in fixed[0] + fixed[1]


def test_the_command_that_made_its_model_makes_a_folder_that_loads():
    run_here(f"python -m toy.world base --out base --steps 3")
    made, base = load_sampler("base"), load_sampler(TOY_BASE)
    assert made.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert made.tokenizer.chat_template == base.tokenizer.chat_template
    assert made.stop_ids == base.stop_ids and made.model.config.to_diff_dict() == base.model.config.to_diff_dict()


@pytest.mark.slow
def test_its_model_trained_again_is_as_good():
    """Plain answers, and under good principles: bytes differ from machine to machine."""
    world.build("again")
    records = [world.write_principles(query, "default", 0) for query in world.make_queries()[1][:256]]
    principles = write_jsonl("p.jsonl", records)
    plain, good = [], []
    for model in (TOY_BASE, Path("again")):
        out = f"{model.name}.jsonl"
        generate.responses(model, principles, out, TOY)
        measures = evaluation.measure_pairs(out, model, GRADER, TOY)
        plain.append(measures["yo"]["mean"])
        good.append(measures["y+"]["mean"])
    assert plain[0] == pytest.approx(plain[1], abs=0.04) and min(good) >= 0.85


def test_no_held_out_query_is_trained_on_and_every_round_has_its_own():
    queries, heldout = world.make_queries(0, rounds=3)
    assert len(set(queries) | set(heldout)) == 3 * world.QUERIES + world.HELDOUT
    assert world.make_queries(0) == (queries[:world.QUERIES], heldout)


def test_the_control_worlds_write_their_kinds_of_bad_principles():
    queries = world.make_queries(0)[1]
    for name, kinds in world.WORLDS.items():
        written = [world.write_principles(query, name, 0)["bad_principle"] for query in queries]
        for kind, texts in world.BAD_PRINCIPLES.items():
            pattern = "|".join(text.replace("{topic}", ".*") for text in texts)
            share = statistics.fmean(bool(re.fullmatch(pattern, text)) for text in written)
            assert share == pytest.approx(kinds.get(kind, 0), abs=0.05) and bool(share) == (kind in kinds)
