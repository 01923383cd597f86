"""The paper's functions, and their fast form, against independent computations: loops, scalars, what is printed."""

import math
import os
import random
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sso
from conftest import KINDS, ROOT, naive_logp, write_jsonl
from plumbing import fast, models
from plumbing.examples import read_examples
from plumbing.records import UserError
from sso import Pair, Response

COLUMNS = {"good": "chosen", "bad": "rejected", "original": "original"}


def make_record(query, **texts):
    """A record with the texts of y+, y- and yo, of which y- was cut off."""
    record = {"prompt": [{"role": "user", "content": query}], "good_principle": "be exact", "bad_principle": "be vague",
              "rejected_finished": False}
    for role, text in texts.items():
        record[COLUMNS[role]] = [{"role": "assistant", "content": text}]
    return record


RECORD = make_record("Name a fruit.", good="A plum.", bad="Something that grows, I think, on a tr",
                     original="Fruit: fig")
OTHER = make_record("Why?", good="So it is.", bad="N", original="Who knows why it should be so?")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return models.load_chat(checkpoint)


def encoded(chat, record=RECORD, objective="sso", max_length=4096):
    """A record as an example: R pairs of token ids."""
    return [sso.encode_pair(chat.tokenizer, chat.end_id, pair, max_length)
            for pair in sso.preference_pairs(record, objective)]


def assert_same_gradients(model, value, expected):
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value, parameters)
    for a, b in zip(gradients, torch.autograd.grad(expected, parameters)):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


# ---- Log-probabilities ---------------------------------------------------------------------------

def random_examples(R, B):
    """B examples of R pairs. Lengths differ, and go down to one token."""
    rng = random.Random(0)

    def ids(least, most):
        return rng.choices(range(5, 250), k=rng.randint(least, most))

    pairs = [Pair(ids(2, 30), ids(1, 20), ids(1, 20)) for _ in range(R * B)]
    return [pairs[R * b:R * b + R] for b in range(B)]


@pytest.mark.parametrize("R, B", [(1, 3), (3, 2)])
@pytest.mark.parametrize("form, chunk", [(sso.pair_logps, 512), (fast.pair_logps, 512), (fast.pair_logps, 7)])
def test_log_probs_are_those_of_separate_sequences_in_values_and_gradients(loaded, monkeypatch, form, chunk, R, B):
    """R and B differ, and so do all log-probs: an exchange of any two axes is seen."""
    monkeypatch.setattr(fast, "CHUNK", chunk)
    examples = random_examples(R, B)
    logps, tokens = form(loaded.model, examples, loaded.pad_id)
    assert logps.shape == tokens.shape == (2, R, B) and logps.dtype == torch.float32
    expected = torch.zeros(2, R, B, dtype=torch.double)
    for b, example in enumerate(examples):
        for r, (prompt, *responses) in enumerate(example):
            assert tokens[:, r, b].tolist() == [len(response) for response in responses]
            expected[:, r, b] = torch.stack([naive_logp(loaded.model, prompt, response) for response in responses])
    assert ((logps - expected) / expected).abs().max() < 1e-5
    factors = torch.arange(1., logps.numel() + 1).view_as(logps)
    assert_same_gradients(loaded.model, (factors * logps).sum(), (factors * expected).sum())
    with torch.autocast("cpu", torch.bfloat16):             # within the rounding of bf16, and in fp32 again at the end
        rounded, _ = form(loaded.model, examples, loaded.pad_id)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, logps)
    torch.testing.assert_close(rounded, logps, rtol=0.03, atol=0.3)


@pytest.mark.parametrize("lost", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_the_layout_of_a_row_is_not_read_by_rows(loaded, lost, monkeypatch, capsys):
    forward = loaded.model.base_model.forward
    assert models.choose_logps(loaded, "fast").pair_logps is fast.pair_logps
    monkeypatch.setattr(loaded.model.base_model, "forward", lambda **options: forward(**options | {lost: None}))
    assert models.choose_logps(loaded, "fast").pair_logps is sso.pair_logps
    assert "does not read a pair as one row; log-probs come from the plain form" in capsys.readouterr().out


def test_the_vocabulary_is_reached_by_response_tokens_only_a_chunk_at_a_time(loaded, monkeypatch):
    """Every matrix product with the head: one a chunk forward, and one a chunk again in the backward pass. So it is by our
    own loop; torch's function gets the same tokens, and the size of a chunk."""
    given = []
    examples = random_examples(2, 3)

    def library(hidden, head, targets, reduction, options):
        given.append((len(hidden), len(targets), options.batch_chunk_size))
        return entropy(hidden, head, targets, reduction=reduction, options=options)

    monkeypatch.setattr(fast, "CHUNK", 20)
    entropy = getattr(F, "linear_cross_entropy", None)
    if entropy:                                             # torch 2.13
        monkeypatch.setattr(F, "linear_cross_entropy", library)
        by_torch, tokens = fast.pair_logps(loaded.model, examples, loaded.pad_id)
        assert given == [(tokens.sum(), tokens.sum(), 20)]
        monkeypatch.delattr(F, "linear_cross_entropy")
        by_torch.sum().backward()
        gradient = loaded.model.get_output_embeddings().weight.grad.clone()
        loaded.model.zero_grad()
    heights = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default and out.shape[-1] == loaded.model.config.vocab_size:
                heights.append(len(out))
            return out

    with Watch():
        logps, tokens = fast.pair_logps(loaded.model, examples, loaded.pad_id)
        whole, rest = divmod(tokens.sum().item(), 20)
        chunks = [20] * whole + [rest]
        assert heights == chunks and len(chunks) > 3
        logps.sum().backward()
    assert sorted(heights) == sorted(chunks * 2)
    if entropy:
        torch.testing.assert_close(logps, by_torch, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded.model.get_output_embeddings().weight.grad, gradient, rtol=1e-4, atol=1e-5)
    loaded.model.zero_grad()


@pytest.mark.parametrize("has_units", [False, True])
def test_precision_is_what_the_card_has_units_for(monkeypatch, has_units):
    """A T4 emulates bf16, and has no units for it."""
    assert models.precision() == torch.float32          # of the CPU
    monkeypatch.setattr(models, "bf16_on_cpu", True)
    assert models.precision() == torch.bfloat16
    monkeypatch.setattr(models, "bf16_on_cpu", False)
    used = []
    monkeypatch.setattr(models, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or has_units)
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: used.append((*args, how["enabled"])))
    models.autocast()
    assert used == [("cuda", torch.bfloat16, has_units)]
    assert models.precision() == (torch.bfloat16 if has_units else torch.float32)


# ---- Encoding ------------------------------------------------------------------------------------

def test_what_is_supervised_is_the_response_and_one_end_of_turn_token(loaded):
    *_, specials = KINDS[loaded.model.config.model_type]
    prompt, *responses = map(loaded.tokenizer.decode, encoded(loaded)[0])
    assert responses == ["A plum." + specials[0], "Something that grows, I think, on a tr"]
    assert prompt.endswith(("<|im_start|>assistant\n", "</think>\n\n", "assistant<|end_header_id|>\n\n"))


def test_a_response_is_cut_to_the_room_beside_its_prompt(loaded):
    """The end of turn goes first."""
    prompt, winner, loser = encoded(loaded)[0]
    assert winner[-1] == loaded.end_id
    for room in (3, len(winner) - 1, len(winner)):
        assert encoded(loaded, max_length=len(prompt) + room)[0] == (prompt, winner[:room], loser[:room])
    for length in (len(prompt) - 1, len(prompt)):
        assert encoded(loaded, max_length=length)[0] == (prompt, [], [])


@pytest.mark.parametrize("context, max_length", [(80, 4096), (4096, 80)])
def test_records_that_do_not_fit_or_teach_nothing_are_skipped_and_counted(qwen3, tmp_path, context, max_length):
    chat = models.inspect_chat(qwen3)._replace(context=context)
    good = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    changes = [{}, {"prompt": "Why " * 20}, {"chosen": "a" * 99 + "b", "rejected": "a" * 99 + "c"},
               {"rejected": " So. "}, {"chosen": " "}, {}, {"rejected": None}]
    path = write_jsonl(tmp_path / "d.jsonl", [good | change for change in changes])
    examples, skipped = read_examples(path, "policy", chat, max_length, limit=6)
    assert len(examples) == 2 and skipped == {
        "no room behind the prompt in max_length 80": 1, "chosen equals rejected up to max_length": 1,
        "chosen equals rejected": 1, "empty response": 1}
    with pytest.raises(UserError, match="line 7: a record without 'rejected'"):
        read_examples(path, "policy", chat, max_length, limit=7)


# ---- Prompts and pairs ---------------------------------------------------------------------------

def test_a_role_has_its_principle_in_a_system_message_before_the_users_own():
    own = {"role": "system", "content": "Be brief."}
    for role, principle in (("good", "be exact"), ("bad", "be vague")):
        system, query = sso.role_messages(role, RECORD)
        assert [query] == RECORD["prompt"] and system["role"] == "system"
        assert f"{role} response" in system["content"] and system["content"].endswith(principle)
        messages = sso.role_messages(role, RECORD | {"prompt": [own, query]})
        assert messages == [own | {"content": system["content"] + "\n\nBe brief."}, query]
    assert sso.role_messages("original", RECORD) == RECORD["prompt"]


def test_no_text_that_is_filled_in_is_filled_in_itself():
    assert sso.fill("{a} {b} {c}", a="{b}", b="{a}") == "{b} {a} {c}"
    record = make_record("What is {principle} or {query} in Python?") | {"good_principle": "Explain {query}."}
    system, query = sso.role_messages("good", record)
    assert query == record["prompt"][0] and system["content"].endswith("Guidelines: Explain {query}.")


def test_worked_examples_are_earlier_turns_before_the_query():
    form = {"system": "Write.", "answer": "Bad: {bad}\nGood: {good}", "end": "\n",
            "examples": [{"query": "A {bad}?", "bad": "b {good}", "good": "g"},
                         {"query": "B?", "bad": "c", "good": "h"}]}
    messages = sso.principle_messages("Why {is} the sky {bad}?", {"principles": form})
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in messages] == [
        "Write.", "A {bad}?", "Bad: b {good}\nGood: g", "B?", "Bad: c\nGood: h", "Why {is} the sky {bad}?"]


# ---- Losses --------------------------------------------------------------------------------------

PAPERS_PAIRS = {    # (prompt, winner, loser), as Section 4.2, Table 3, Table 4 and Section 5.3 have them
    "sso": [("good", "good", "bad"), ("bad", "original", "good")],
    "plus": [("good", "good", "bad")],
    "minus": [("bad", "original", "good")],
    "eq3": [("good", "good", "bad"), ("bad", "bad", "good")],
    "policy": [("original", "good", "bad")],
    "original": [("original", "good", "original")]}


@pytest.mark.parametrize("base_loss", ["dpo", "ipo"])
@pytest.mark.parametrize("objective", PAPERS_PAIRS)
def test_an_objective_is_the_sum_over_the_papers_pairs_by_hand_in_value_and_gradient(qwen3, objective, base_loss):
    """Of two queries, from their texts on: Eq. 1, 2 and 4, L_sft, and the rewards."""
    chat, beta, gamma = models.load_chat(qwen3), 0.3, 0.7
    assert sso.trains_generator(objective) == (objective not in ("policy", "original"))
    roles = PAPERS_PAIRS[objective]
    ref = torch.linspace(-100, -90, 4 * len(roles)).view(2, -1, 2)              # any reference
    examples = [encoded(chat, record, objective) for record in (RECORD, OTHER)]
    logps, tokens = sso.pair_logps(chat.model, examples, chat.pad_id)
    losses, parts = sso.sso_loss(logps, ref, tokens, base_loss, gamma, beta=beta)
    assert not any(part.requires_grad for part in parts.values())
    by_hand = [0, 0]
    for b, record in enumerate((RECORD, OTHER)):
        for r, (prompt, *responses) in enumerate(roles):
            x = sso.encode_prompt(chat.tokenizer, sso.role_messages(prompt, record))
            log, ratio, size = [], [], []               # of winner and loser
            for side, role in enumerate(responses):
                text = record[COLUMNS[role]][0]["content"]
                y = sso.encode_response(chat.tokenizer, chat.end_id, Response(text, finished=role != "bad"))
                size.append(len(y))
                log.append(naive_logp(chat.model, x, y))
                ratio.append(log[side] - ref[side, r, b])
            if base_loss == "dpo":
                base = -torch.log(torch.sigmoid(beta * (ratio[0] - ratio[1])))
            else:
                ratio = [ratio[0] / size[0], ratio[1] / size[1]]
                base = (ratio[0] - ratio[1] - 1 / (2 * beta)) ** 2
            by_hand[b] += base - gamma * log[0] / size[0]
            rewards = [parts[name][r, b].item() for name in ("chosen_rewards", "rejected_rewards")]
            assert rewards == pytest.approx([beta * ratio[0].item(), beta * ratio[1].item()], rel=1e-4)
            assert parts["base"][r, b].item() == pytest.approx(base.item(), rel=1e-4)
    assert losses.tolist() == pytest.approx([value.item() for value in by_hand], rel=1e-4)
    assert PAPERS_PAIRS.keys() == sso.PAIRS.keys() - {"v1"}         # of lab/version1.py, where it is imported
    assert_same_gradients(chat.model, losses[0] + 2 * losses[1], by_hand[0] + 2 * by_hand[1])


# ---- python sso.py -------------------------------------------------------------------------------

GUARD = """
import sys

class Absent:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("transformers", "tokenizers", "safetensors", "tqdm", "plumbing"):
            raise ImportError(f"sso.py needs torch alone, not {name}")

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError("no network")

sys.meta_path.insert(0, Absent())
sys.addaudithook(watch)
"""


def worked_example(tmp_path):
    """What `python sso.py` prints, without network and other packages."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    done = subprocess.run([sys.executable, ROOT / "sso.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path / "guard"), "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["guard"]
    return done.stdout


def test_the_worked_example_needs_torch_alone_and_prints_the_numbers_of_the_equations(tmp_path):
    text = worked_example(tmp_path)

    def numbers(pattern):
        found = re.findall(pattern.replace("#", r"([+-]?\d+\.\d+)"), text)
        return torch.tensor([[float(number) for number in row] for row in found])

    # The prompts, and what is supervised.
    assert f"Guidelines: {sso.EXAMPLE['good_principle']}<|im_end|>" in text
    y_plus, y_minus, y_original = (sso.EXAMPLE[column][0]["content"] + "<|im_end|>\n" for column in COLUMNS.values())
    assert f"winner, the good response: {y_plus}      loser, the bad response: {y_minus}" in text
    assert f"winner, the original response: {y_original}      loser, the good response: {y_plus}" in text

    # Log-probs at step zero by the loop, under the model of the same seed.
    torch.manual_seed(0)
    model, tokenizer = sso.TinyModel(), sso.ByteTokenizer()
    pairs = [sso.encode_pair(tokenizer, sso.END, pair, 4096) for pair in sso.preference_pairs(sso.EXAMPLE, "sso")]
    own = []
    for prompt, winner, loser in pairs:
        own.append([naive_logp(model, prompt, winner).item(), naive_logp(model, prompt, loser).item()])
    printed = numbers("log π_θ +# +log π_ref +# +changed by #")
    # Before and after the step; L+ and L-; winner and loser.
    logps, ref, changed = printed.view(2, 2, 2, 3).unbind(-1)
    torch.testing.assert_close(ref, torch.tensor([own, own]), rtol=0, atol=6e-4)
    torch.testing.assert_close(logps[0], ref[0], rtol=0, atol=6e-4)
    torch.testing.assert_close(changed, logps - ref, rtol=0, atol=2e-3)

    # Each term, and their sum.
    margin = 0.1 * (changed[..., 0] - changed[..., 1])
    base = torch.log(1 + torch.exp(-margin))
    sft = -logps[..., 0] / torch.tensor([len(pair.winner) for pair in pairs])
    terms = numbers(r"L_base \+ γ · L_sft = # \+ 0\.1 · # = # +\(reward margin #\)").view(2, 2, 4)
    torch.testing.assert_close(terms, torch.stack([base, sft, base + 0.1 * sft, margin], -1), rtol=0, atol=3e-4)
    sums = numbers(r"L_SSO = L\+ \+ L- = (#)")[:, 0]
    torch.testing.assert_close(sums, terms[..., 2].sum(1), rtol=0, atol=3e-4)
    assert terms[0, 0, 0].item() == pytest.approx(math.log(2), abs=1e-4)
    assert margin[1].min() > 0.01 and sums[1] < sums[0]
