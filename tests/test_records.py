"""Records of other tools: their data sets, and any text in a line."""

import json

import pytest

from conftest import write_jsonl
from plumbing.examples import read_examples
from plumbing.models import load_chat
from plumbing.records import read_jsonl, read_queries

USER = {"content": "Why is the sky blue?", "role": "user"}
CHOSEN = [USER, {"content": "Air scatters blue light most.", "role": "assistant"}]
REJECTED = [USER, {"content": "It mirrors the sea.", "role": "assistant"}]
PAIR = {"chosen": CHOSEN, "rejected": REJECTED, "score_chosen": 8.5, "score_rejected": 3.0}
DATA_SETS = {
    "trl-lib/ultrafeedback_binarized": PAIR,
    "HuggingFaceH4/ultrafeedback_binarized": PAIR | {"prompt": USER["content"], "prompt_id": "1f", "messages": CHOSEN}}


@pytest.mark.parametrize("name", DATA_SETS)
def test_ultrafeedback_is_a_file_of_queries_and_of_preferences(name, qwen3, tmp_path):
    """As `datasets` writes it, by to_json."""
    path = write_jsonl(tmp_path / "ultrafeedback.jsonl", [DATA_SETS[name]])
    assert [record["prompt"] for record in read_queries(path)] == [[USER]]
    chat = load_chat(qwen3)
    [[pair]], skipped = read_examples(path, "policy", chat, 4096)
    prompt, winner, loser = map(chat.tokenizer.decode, pair)
    assert "Why is the sky blue?<|im_end|>" in prompt and not skipped
    assert (winner, loser) == ("Air scatters blue light most.<|im_end|>", "It mirrors the sea.<|im_end|>")


@pytest.mark.parametrize("record", [
    {"instruction": "a", "output": "b", "generator": "c", "dataset": "d"},      # alpaca_eval's
    {"instruction": "a", "input": "", "output": "b"},                           # Alpaca's
    {"query": "a"},
    {"prompt": "a", "instruction": "b", "query": "c", "input": "d"},            # a prompt wins
    {"instruction": "a", "query": "b"},
    {"instruction": "a", "chosen": CHOSEN},
])
def test_a_prompt_may_have_the_names_of_other_tools(record, tmp_path):
    [query] = read_queries(write_jsonl(tmp_path / "queries.jsonl", [record]))
    assert query["prompt"] == [{"role": "user", "content": "a"}]


def test_separators_inside_a_text_do_not_split_a_line(tmp_path):
    texts = ["a\u2028b\x85c\r\nd", "zwei\nZeilen"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(lines), encoding="utf-8", newline="")
    assert [record["prompt"][0]["content"] for record in read_jsonl(path)] == texts
