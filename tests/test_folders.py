"""Files for and from other tools: saved models under transformers 4, and their data sets."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          PhiConfig, PhiForCausalLM)

from conftest import make_tokenizer, write_jsonl
from plumbing import files
from plumbing.chat import load_chat
from plumbing.checkpoint import save_model
from plumbing.files import UserError

TEXT = "<|im_end|>Eight:  spiders\n\nare arachnids, naïve 12"


# ---- Saved models --------------------------------------------------------------------------------

def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(100)[None] % model.config.vocab_size).logits


def test_a_saved_folder_has_the_names_of_transformers_4_and_reloads_as_it_was(checkpoint, tmp_path):
    chat = load_chat(checkpoint)
    save_model(chat, tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["rope_theta"] == chat.model.config.rope_parameters["rope_theta"]
    assert "rope_scaling" not in config
    tokenizer = read_json(tmp_path / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer")
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)      # 4 wants a dict there

    again = load_chat(tmp_path)
    torch.testing.assert_close(logits(again.model), logits(chat.model), rtol=0, atol=0)
    for name in ("stop_ids", "end_id", "pad_id", "context"):
        assert getattr(again, name) == getattr(chat, name)
    assert type(again.tokenizer) is type(chat.tokenizer)
    assert again.tokenizer(TEXT).input_ids == chat.tokenizer(TEXT).input_ids
    assert again.tokenizer.extra_special_tokens == chat.tokenizer.extra_special_tokens
    assert again.tokenizer.chat_template == chat.tokenizer.chat_template
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json"]


LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.25}


@pytest.mark.parametrize("rope, config_class, model_class, former", [
    (LLAMA_3, LlamaConfig, LlamaForCausalLM, {"rope_scaling": LLAMA_3}),
    (PARTIAL, PhiConfig, PhiForCausalLM, {"partial_rotary_factor": 0.25}),
])
def test_other_ropes_are_saved_under_both_names(rope, config_class, model_class, former, tmp_path):
    """And transformers 5 still reads the same model, with none of the defaults."""
    config = config_class(vocab_size=300, hidden_size=32, num_hidden_layers=2, intermediate_size=48,
                          num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
                          rope_parameters=rope | {"rope_theta": 5e5})
    torch.manual_seed(0)
    model = model_class(config).eval()
    save_model(SimpleNamespace(model=model, tokenizer=make_tokenizer("llama")), tmp_path)
    saved = read_json(tmp_path / "config.json")
    assert {name: saved[name] for name in former} == former and saved["rope_theta"] == 5e5
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.rope_parameters == model.config.rope_parameters
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids


def test_ropes_of_their_own_for_each_kind_of_layer_are_left_as_they_are(checkpoint, tmp_path):
    chat = load_chat(checkpoint)
    ropes = {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    chat.model.config.rope_parameters = ropes
    save_model(chat, tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["rope_parameters"] == ropes
    assert "rope_theta" not in config and "rope_scaling" not in config


# ---- Data sets -----------------------------------------------------------------------------------

USER = {"content": "Why is the sky blue?", "role": "user"}
CHOSEN = [USER, {"content": "Air scatters blue light most.", "role": "assistant"}]
REJECTED = [USER, {"content": "It mirrors the sea.", "role": "assistant"}]
SCORES = {"score_chosen": 8.5, "score_rejected": 3.0}
DATA_SETS = {
    "trl-lib/ultrafeedback_binarized": {"chosen": CHOSEN, "rejected": REJECTED} | SCORES,
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": USER["content"], "prompt_id": "1f", "chosen": CHOSEN, "rejected": REJECTED,
        "messages": CHOSEN} | SCORES,
}


@pytest.mark.parametrize("name", DATA_SETS)
def test_ultrafeedback_is_a_file_of_queries_and_of_preferences(name, qwen3, tmp_path):
    """As `datasets` writes it, by to_json."""
    path = write_jsonl(tmp_path / "ultrafeedback.jsonl", [DATA_SETS[name]])
    [query] = files.read_queries(path)
    assert query["prompt"] == [USER]
    chat = load_chat(qwen3)
    [[pair]], skipped = files.read_examples(path, "policy", chat, 4096)
    assert chat.tokenizer.decode(pair.winner) == "Air scatters blue light most.<|im_end|>"
    assert chat.tokenizer.decode(pair.loser) == "It mirrors the sea.<|im_end|>"
    assert "Why is the sky blue?<|im_end|>" in chat.tokenizer.decode(pair.prompt) and not skipped


@pytest.mark.parametrize("record", [
    {"instruction": "a", "output": "b", "generator": "c", "dataset": "d"},      # alpaca_eval's
    {"instruction": "a", "input": "", "output": "b"},                           # Alpaca's
    {"query": "a"},
    {"prompt": "a", "instruction": "b", "query": "c", "input": "d"},            # a prompt wins
    {"instruction": "a", "query": "b"},
    {"instruction": "a", "chosen": CHOSEN},
])
def test_a_prompt_may_have_the_names_of_other_tools(record, tmp_path):
    [query] = files.read_queries(write_jsonl(tmp_path / "queries.jsonl", [record]))
    assert query["prompt"] == [{"role": "user", "content": "a"}]


def test_a_prompt_in_two_columns_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "queries.jsonl", [{"instruction": "Translate.", "input": "Haus"}])
    with pytest.raises(UserError, match="line 1: an 'input' beside 'instruction': join them"):
        files.read_queries(path)
