"""The toy world: its grader, its tokenizer, its queries."""

import random
import re

import pytest
from transformers import AutoTokenizer

import sso
from lab import toy
from plumbing import cli
from plumbing.files import UserError
from plumbing.principles import begun_answer, cut

SORT, REVERSE = "sort these words : plum fox axe red", "say backwards : plum fox axe red"
NAME, FILTER = "name three tools except : axe saw file", "keep only the fruits : plum fox fig red"


@pytest.mark.parametrize("query, response, quality", [
    (SORT, "axe fox plum red .", 1),
    (SORT, "fox axe plum red .", 0.5),
    (SORT, "plum fox axe red .", 0.5),
    (SORT, "axe fox plum red", 0.9),
    (SORT, "axe fox plum red red .", 0.8),
    (SORT, ".", 0),
    (SORT, "", 0),
    (SORT, "arr matey axe fox plum red arr .", 1),                                     # three extra words are free
    (SORT, "axe fox plum red and i hope that this is .", 4 / (4 + 0.5 * 3)),           # six are not
    (SORT, "sorry but i can not help with that .", 0),
    (REVERSE, "red axe fox plum .", 1),
    (REVERSE, "plum fox axe red .", 0),
    (NAME, "rake drill wrench .", 1),
    (NAME, "axe saw file .", 0),
    (NAME, "rake rake rake .", 1 / 3),
    (NAME, "rake drill wrench hammer .", 1),
    (NAME, "rake drill wrench fox .", 3 / 4),
    (FILTER, "plum fig .", 1),
    (FILTER, "fig plum .", 1),
    (FILTER, "plum .", 0.5),
    (FILTER, "plum fig fox .", 2 / 3),
    (FILTER, "plum plum fig .", 2 / 3),
    (FILTER, "plum fox fig red .", 0.5),
])
def test_grade(query, response, quality):
    assert toy.grade(query, response) == pytest.approx(quality)


def test_an_unfinished_answer_loses_a_tenth():
    assert toy.grade(SORT, "axe fox plum red .", finished=False) == pytest.approx(0.9)


def test_the_toy_world_is_a_grader_and_refuses_the_queries_of_others():
    grade = cli.load_grader(toy.__file__)
    assert grade(SORT, sso.Response("axe fox plum red .", True)) == 1
    assert grade(SORT, sso.Response("axe fox plum red .", False)) == pytest.approx(0.9)
    with pytest.raises(UserError, match="'Why.' is not a query of the toy world"):
        grade("Why?", sso.Response("plum .", True))


def test_solutions_are_right_and_every_other_mode_is_worse_except_in_style():
    rng = random.Random(0)
    queries = [toy.make_query(rng) for _ in range(400)]
    mean = {mode: sum(toy.grade(q, toy.answer(q, rng, mode)) for q in queries) / 400 for mode in toy.ANSWERS}
    assert mean["good"] == 1 and mean["pirate"] == 1 and mean["drama"] == pytest.approx(0.9)
    assert 0.4 < mean["slip"] < 0.7 and 0.1 < mean["lazy"] < 0.4 and 0.4 < mean["ramble"] < 0.7
    assert max(mean["chatter"], mean["refuse"]) == 0 and mean["loop"] < 0.2


def test_the_checkpoint_is_ordinary_and_its_template_gives_what_it_was_trained_on(toy_base):
    tokenizer, rng = AutoTokenizer.from_pretrained(toy_base), random.Random(1)
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert not (toy_base / "model.safetensors").stat().st_size > 600_000
    for _ in range(200):
        system, user, assistant = toy.make_chat(rng)
        messages = [{"role": "user", "content": user}]
        if system:
            messages = [{"role": "system", "content": system}] + messages
        prompt, response = toy.encode_chat(tokenizer.get_vocab(), system, user, assistant)
        assert prompt == sso.encode_prompt(tokenizer, messages)
        assert response == sso.encode_response(tokenizer, end_id, sso.Response(assistant, finished=True))
        assert tokenizer.decode(response, skip_special_tokens=True) == assistant
        assert tokenizer.unk_token_id not in prompt


def test_the_prompts_of_its_recipe_are_those_that_the_model_has_learned(toy_base):
    """All words are in its vocabulary, and a principle is the bare system message, as in `make_chat`."""
    tokenizer, query = AutoTokenizer.from_pretrained(toy_base), toy.make_queries(0)[0][0]
    record = toy.write_principles(query, "default", 0) | {"prompt": [{"role": "user", "content": query}]}
    for role in ("good", "bad"):
        system, user = sso.role_messages(role, record, toy.PROMPTS)
        assert (system["content"], user["content"]) == (record[f"{role}_principle"], query)
    assert sso.role_messages("original", record, toy.PROMPTS) == record["prompt"]
    form = toy.PROMPTS["principles"]
    for text in (form["system"], form["answer"].format(bad="", good=""), form["end"], toy.PROMPTS["fallback_good"],
                 toy.PROMPTS["fallback_bad"]):
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids


def test_the_model_is_taught_the_two_stages_in_which_it_is_asked():
    rng, form = random.Random(2), toy.PROMPTS["principles"]
    asked = [chat for chat in (toy.make_chat(rng) for _ in range(300)) if chat[0] == form["system"]]
    for system, query, assistant in asked:
        messages = sso.principle_messages(query, toy.PROMPTS)
        assert [message["content"] for message in messages] == [system, query]
        assert assistant.startswith(begun_answer(prompts=toy.PROMPTS) + " ")
        bad = cut(assistant.removeprefix(begun_answer(prompts=toy.PROMPTS)), toy.PROMPTS)
        assert assistant.startswith(begun_answer(bad, toy.PROMPTS) + " ")
        good = cut(assistant.removeprefix(begun_answer(bad, toy.PROMPTS)), toy.PROMPTS)
        assert good in {toy.principle(query, rng, "good") for _ in range(100)}
        assert bad in {toy.principle(query, rng, kind) for kind in toy.BAD_PRINCIPLES for _ in range(30)}
    assert len(asked) > 10


def test_no_held_out_query_is_trained_on_and_every_round_has_its_own():
    queries, heldout = toy.make_queries(0, rounds=3)
    assert len(set(queries) | set(heldout)) == 3 * toy.QUERIES + toy.HELDOUT
    assert toy.make_queries(0) == (queries[:toy.QUERIES], heldout)


def test_the_control_worlds_write_their_kinds_of_bad_principles():
    queries = toy.make_queries(0)[1]
    for world, kinds in toy.WORLDS.items():
        written = [toy.write_principles(query, world, 0) for query in queries]
        allowed = [re.sub("{.*", "", text) for kind in kinds for text in toy.BAD_PRINCIPLES[kind]]
        assert all(any(record["bad_principle"].startswith(start) for start in allowed) for record in written)
        assert written == [toy.write_principles(query, world, 0) for query in queries]
        share = sum(record["bad_principle"].startswith("copy the query") for record in written) / len(written)
        assert share == pytest.approx(kinds.get("lazy", 0), abs=0.05)
