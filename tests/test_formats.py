"""Files as people have them: read as they are, or refused with the line of Python that makes them fit."""

import json

import pytest

import sso
from conftest import make_checkpoint, write_jsonl
from plumbing.examples import read_examples
from plumbing.models import inspect_chat
from plumbing.records import UserError, as_lines, read_jsonl, read_queries, write_text

pytestmark = pytest.mark.usefixtures("here")
Q, GOOD, BAD = "Name one animal.", "A dog.", "No idea."


def turn(role, content, **others):
    return {"role": role, "content": content, **others}


def said(prompt, answer, **others):
    return [turn("user", prompt, **others), turn("assistant", answer, **others)]


SYSTEM = [turn("system", "Be brief.")]
TEXTS = {"chosen": GOOD, "rejected": BAD}
CHATS = {"chosen": said(Q, GOOD), "rejected": said(Q, BAD)}
SYSTEM_CHATS = {"chosen": SYSTEM + said(Q, GOOD), "rejected": SYSTEM + said(Q, BAD)}
PAIRS = {   # a record of each of the sets that people use, by its columns; made by hand
    "UltraFeedback, binarized": CHATS | {"prompt": Q, "prompt_id": "x", "messages": said(Q, GOOD), "score_chosen": 8.0},
    "UltraFeedback, cleaned; Tulu 3": CHATS | {"source": "s", "prompt": Q, "chosen-rating": 5.0},
    "Orca pairs, distilabel": TEXTS | {"system": "", "input": Q, "status": "tie"},
    "Skywork; OLMo 2": CHATS | {"source": "s"},
    "Magpie": CHATS | {"uuid": "u", "instruction": Q, "responses": [GOOD, BAD]},
    "a column of messages": TEXTS | {"messages": said(Q, GOOD)},
    "other keys in messages": {"prompt": Q, "chosen": said(Q, GOOD, name=None), "rejected": said(Q, BAD, weight=0)},
    "parts": TEXTS | {"prompt": [turn("user", [{"type": "text", "text": Q[:3]}, {"type": "text", "text": Q[3:]}])]},
    "a message alone": {"prompt": turn("user", Q), "chosen": turn("assistant", GOOD), "rejected": turn("assistant", BAD)},
    "null in columns nobody uses": TEXTS | {"prompt": Q, "original": None, "messages": None},
}
BRIEF_PAIRS = {     # with SYSTEM before their prompt
    "Orca pairs": TEXTS | {"system": "Be brief.", "question": Q},
    "a system column": CHATS | {"system": "Be brief.", "prompt": Q},
    "system in both responses": SYSTEM_CHATS | {"prompt": Q},
    "implicit prompt with a system message": SYSTEM_CHATS,
}
REFUSED = {     # -> what the sentence says; the line of Python in it, if there is one, makes the record fit
    "HH": ({"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}"}, "HH-RLHF"),
    "Nectar": ({"prompt": Q, "answers": [{"answer": BAD, "rank": 2}, {"answer": GOOD, "rank": 1}]}, "Nectar"),
    "SafeRLHF": ({"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1}, "PKU-SafeRLHF"),
    "HelpSteer3": ({"context": [turn("user", Q)], "response1": GOOD, "response2": BAD, "overall_preference": -2},
                   "HelpSteer3"),
    "ShareGPT": ({"conversations": [{"from": "human", "value": Q}], "chosen": GOOD, "rejected": BAD}, "ShareGPT"),
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return inspect_chat(make_checkpoint(tmp_path_factory.mktemp("formats") / "model", "qwen3"))


def assert_reads(record, system, chat):
    """It is the pair that it stands for, in every token; and what is read, written and read again is the same."""
    path = write_jsonl("d.jsonl", [record])
    [[pair]], _ = read_examples(path, "policy", chat, 4096)
    assert pair.prompt == sso.encode_prompt(chat.tokenizer, system + [turn("user", Q)])
    assert [chat.tokenizer.decode(ids) for ids in pair[1:]] == [f"{text}<|im_end|>" for text in (GOOD, BAD)]
    records = read_jsonl(path)
    write_text(path, as_lines(records))
    assert read_jsonl(path) == records


@pytest.mark.parametrize("name", PAIRS | BRIEF_PAIRS)
def test_a_preference_file_of_the_hub_works_as_it_is(name, chat):
    if name in BRIEF_PAIRS:
        assert_reads(BRIEF_PAIRS[name], SYSTEM, chat)
    else:
        assert_reads(PAIRS[name], [], chat)


@pytest.mark.parametrize("name", REFUSED)
def test_a_format_that_does_not_fit_is_refused_with_the_line_that_makes_it_fit(name, chat):
    record, sign = REFUSED[name]
    path = write_jsonl("d.jsonl", [record])
    with pytest.raises(UserError, match=f"line 1: .*{sign}.*; for each record r: ") as error:
        read_examples(path, "policy", chat, 4096)
    assert "\n" not in str(error.value)
    line = str(error.value).partition("for each record r: ")[2].partition("   (")[0]
    scope = {"r": record}
    for part in line.replace("; for c in", "\nfor c in").split("\n"):
        exec(part, scope)
    assert_reads(scope["r"], [], chat)


@pytest.mark.parametrize("record, message", [
    ({"prompt": Q, "response": GOOD, "helpfulness": 4}, "HelpSteer; .*ratings"),
    (TEXTS | {"prompt": [turn("user", [{"type": "image_url"}])]}, "part of type 'image_url'"),
    ({"prompt": Q, "chosen": {"from": "gpt", "value": GOOD}, "rejected": BAD}, "ShareGPT: rename"),
    ({"prompt": Q, "chosen": None, "rejected": BAD}, "a record without 'chosen'"),
])
def test_what_cannot_be_a_pair_is_one_line(record, message, chat):
    with pytest.raises(UserError, match=f"d.jsonl, line 1: .*{message}"):
        read_examples(write_jsonl("d.jsonl", [record]), "policy", chat, 4096)


@pytest.mark.parametrize("record, message", [
    ({"instruction": Q, "input": "", "output": GOOD}, None),                                            # Alpaca
    ({"instruction": Q, "context": "", "response": GOOD, "category": "qa"}, None),                      # Dolly
    ({"conversation": said(Q, GOOD, country="x"), "language": "English"}, None),                        # WildChat
    ({"messages": said(Q, GOOD)}, None), ({"prompt": Q, "chosen": None, "rejected": 7}, None),
    ({"instruction": Q, "context": "Animals: cow."}, "an 'context' beside 'instruction': join them"),
    ({"conversation": said(Q, GOOD) + said("And two?", "Cows.")}, "a query is one user message"),
    ({"conversations": [{"from": "human", "value": Q}]}, "ShareGPT"),
])
def test_queries_as_people_have_them(record, message):
    path = write_jsonl("q.jsonl", [record])
    if message is None:
        assert [record["prompt"] for record in read_queries(path)] == [[turn("user", Q)]]
        return
    with pytest.raises(UserError, match=f"q.jsonl, line 1: .*{message}"):
        read_queries(path)


# ---- Records at random ---------------------------------------------------------------------------

@pytest.mark.slow
def test_no_record_is_a_traceback_or_means_something_else_than_it_says():
    """What is read, written and read again is equal; a text that is read is one that stood in the record."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st
    texts = st.text(max_size=6) | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "<|im_end|>", "\u2028", "\ud800"])
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
    parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": texts})
    messages = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]),
                                      "content": texts | st.lists(parts, min_size=1, max_size=1) | leaves}, optional={"name": leaves})
    values = leaves | st.lists(messages | leaves, max_size=3) | messages
    names = ("prompt instruction question query input context system messages conversation conversations chosen rejected "
             "original chosen_finished answers good_principle").split()
    records = st.dictionaries(st.sampled_from(names), values, max_size=6)
    path = "d.jsonl"

    @hypothesis.settings(max_examples=1000, deadline=None)
    @hypothesis.given(records)
    def check(record):
        write_jsonl(path, [record])
        for read, columns in ((read_jsonl, ("prompt", "chosen", "rejected")), (read_queries, ("prompt",))):
            try:
                found = read(path)
            except UserError as error:
                assert "\n" not in str(error)
                continue
            for column in columns:
                for message in found[0].get(column, []):
                    assert json.dumps(message["content"]) in json.dumps(record)
            write_text(path, as_lines(found))
            assert read(path) == found
            write_jsonl(path, [record])

    check()
