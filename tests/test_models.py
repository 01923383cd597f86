"""Every kind of small chat model, as a tiny checkpoint of the real class with random weights: a line each."""

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM

import sso
import train
from conftest import PAPER, log, make_tokenizer, naive_logp, write_jsonl
from plumbing import models
from plumbing.recipes import change
from plumbing.sampling import load_sampler, sample

WINDOW = 16         # of models with a window: rows of the tests are longer
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             intermediate_size=48, max_position_embeddings=512, initializer_range=0.2)
WINDOWED = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
              layer_types=["linear_attention", "full_attention"])
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8, mamba_d_ssm=64)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
GEMMA4 = WINDOWED | dict(global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=300,
                         num_kv_shared_layers=0)


# name -> a config, without vocabulary
KINDS = {
    "Falcon-H1": (t.FalconH1Config, MAMBA),
    "Gemma 2": (t.Gemma2Config, WINDOWED),
    "Gemma 3 270M": (t.Gemma3TextConfig, WINDOWED),
    "Gemma 3 4B": (t.Gemma3Config, WINDOWED),
    "Gemma 4": (t.Gemma4TextConfig, GEMMA4),
    "Gemma 4 E2B": (t.Gemma4Config, GEMMA4),
    "Granite": (t.GraniteConfig, dict(logits_scaling=3.0)),
    "Granite-4-H": (t.GraniteMoeHybridConfig, MAMBA | dict(layer_types=["mamba", "attention"], num_local_experts=0,
                                                           shared_intermediate_size=48)),
    "LFM2": (t.Lfm2Config, dict(layer_types=["conv", "full_attention"])),
    "Llama 3.2": (t.LlamaConfig, {}),
    "Ministral 3": (t.Ministral3Config, {}),
    "Mistral 0.1": (t.MistralConfig, dict(sliding_window=WINDOW)),
    "OLMo 2": (t.Olmo2Config, {}),
    "OLMo 3": (t.Olmo3Config, WINDOWED),
    "Phi-3": (t.Phi3Config, dict(sliding_window=WINDOW)),
    "Qwen2": (t.Qwen2Config, {}),
    "Qwen2-MoE": (t.Qwen2MoeConfig, EXPERTS),
    "Qwen3": (t.Qwen3Config, {}),
    "Qwen3-MoE": (t.Qwen3MoeConfig, EXPERTS),
    "Qwen3-Next": (t.Qwen3NextConfig, LINEAR | EXPERTS),
    "Qwen3.5": (t.Qwen3_5TextConfig, LINEAR),
    "Qwen3.5-MoE": (t.Qwen3_5MoeTextConfig, LINEAR | EXPERTS),
    "SmolLM2": (t.LlamaConfig, dict(tie_word_embeddings=True)),
    "SmolLM3": (t.SmolLM3Config, dict(no_rope_layers=[1, 0])),
}


def build(name, folder):
    config_class, options = KINDS[name]
    tokenizer = make_tokenizer("qwen3")
    ids = dict(vocab_size=300, eos_token_id=0, bos_token_id=2, pad_token_id=1)
    text = config_class.sub_configs.get("text_config") if config_class in (t.Gemma3Config, t.Gemma4Config) else None
    if text:
        config = config_class(text_config=text(**SIZES, **ids, **options).to_dict(), vision_config=VISION)
    else:
        config = config_class(**SIZES, **ids, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [0, 1]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CHATS = [[{"role": "user", "content": text}] for text in (
    "Hi", "Name a fruit that is not a plum, please.", "Why?", "Reverse these words: one, two, three, four, five.")]
GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8}


@torch.no_grad()
def greedy_alone(model, ids, stop_ids):
    """transformers' own greedy answer to one prompt, by itself."""
    out = model.generate(torch.tensor([ids]), max_new_tokens=GREEDY["max_new_tokens"], do_sample=False,
                         eos_token_id=stop_ids, pad_token_id=1)
    return out[0, len(ids):].tolist()


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_model_samples_scores_trains_and_is_saved(name, tmp_path):
    path = build(name, tmp_path / "model")
    chat = load_sampler(path)

    # Sampling: left padding, rows that leave, a shared prefix, whoever stands beside.
    prefix = [{"role": "system", "content": "Be kind and brief, and answer in one sentence. "}]
    for chats in (CHATS, [prefix + messages for messages in CHATS]):
        alone = [greedy_alone(chat.model, sso.encode_prompt(chat.tokenizer, messages), chat.stop_ids) for messages in chats]
        together = sample(chat, chats, [""] * 4, GREEDY)
        for ids, response in zip(alone, together):
            assert response.finished == (ids[-1] in chat.stop_ids)
            text = chat.tokenizer.decode(ids, skip_special_tokens=True)
            assert response.text == (text if response.finished else text.rstrip("\ufffd"))

    # Log-probs: rows longer than any window, of unlike length, in the form that is chosen for this model.
    chat = models.choose_logps(chat, "fast")
    rng = torch.Generator().manual_seed(0)
    examples = [[sso.Pair(*(torch.randint(3, 260, (length,), generator=rng).tolist() for length in lengths))]
                for lengths in ((30, 5, 9), (12, 25, 3))]
    for form in (sso.pair_logps, chat.pair_logps):
        logps, tokens = form(chat.model, examples, chat.pad_id)
        for [(prompt, *responses)], sums, counts in zip(examples, logps[:, 0].T.tolist(), tokens[:, 0].T.tolist()):
            alone = [naive_logp(chat.model, prompt, response).item() for response in responses]
            assert sums == pytest.approx(alone, rel=1e-4, abs=1e-3) and counts == list(map(len, responses))

    # Two updates, saved, loaded: the same answers.
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"Why {i}?", "chosen": "So.", "rejected": "No way."}
                                              for i in range(2)])
    recipe = change(PAPER, policy={"lr": 1e-3, "batch_size": 1})
    train.policy(path, data, tmp_path / "policy", recipe)
    first, second = log(tmp_path / "policy")
    assert first["base"] == pytest.approx(0.6931, abs=1e-3) and second["grad_norm"] > 0
    again = load_sampler(tmp_path / "policy")
    for name, parameter in chat.model.named_parameters():
        parameter.data = again.model.get_parameter(name).data
    assert sample(again, CHATS, [""] * 4, GREEDY) == sample(chat, CHATS, [""] * 4, GREEDY)
