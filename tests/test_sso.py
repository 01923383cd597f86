"""The paper's functions, and their fast form, against independent computations: loops, F.cross_entropy, scalars."""

import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import sso
import train
from conftest import ROOT, make_tokenizer
from plumbing import chat, fast
from plumbing.plaintext import PlainText
from sso import Pair, Response

Y = {"good": "A plum.", "bad": "Something that grows, I think, on a tr", "original": "Fruit: fig"}
RECORD = {"prompt": [{"role": "user", "content": "Name a fruit."}],
          "good_principle": "be exact", "bad_principle": "be vague",
          "chosen": [{"role": "assistant", "content": Y["good"]}], "chosen_finished": True,
          "rejected": [{"role": "assistant", "content": Y["bad"]}], "rejected_finished": False,
          "original": [{"role": "assistant", "content": Y["original"]}], "original_finished": True}


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return chat.load_chat(checkpoint)


def encoded(loaded, objective="sso", max_length=4096):
    """The record as an example: R pairs of token ids."""
    pairs = sso.preference_pairs(RECORD, objective)
    return [sso.encode_pair(loaded.tokenizer, loaded.end_id, pair, max_length) for pair in pairs]


def examples_of(loaded, R, B):
    """B examples of R pairs, of all lengths, down to one token; no two responses have the same log-prob."""
    pairs = encoded(loaded, "joint")
    pairs += [Pair(pair.prompt[3:], pair.loser[:9], pair.winner) for pair in pairs]
    pairs += [Pair([5, 6, 7], [8], [9, 10]), Pair([11, 5], [6, 7, 8, 9], [10])]
    return [pairs[R * b:R * b + R] for b in range(B)]


def naive_logp(model, prompt, response):
    """log π(y|x) by a Python loop over one unpadded sequence: the model's own logits, a softmax a token."""
    logits = model(torch.tensor([prompt + response])).logits[0].double()
    total = 0
    for i, token in enumerate(response):
        total = total + torch.log(torch.softmax(logits[len(prompt) + i - 1], -1)[token])
    return total


def loss_of(logps):
    """A number that a swap of responses, rows or examples would change."""
    return (torch.arange(1., logps.numel() + 1).view_as(logps) * logps).sum()


def assert_same(value, expected, model, values=1e-5):
    """Two (2, R, B), and the gradients of a function of each by the model's weights, are the same."""
    assert value.shape == expected.shape
    assert ((value - expected) / expected).abs().max() < values
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(value), parameters)
    for a, b in zip(gradients, torch.autograd.grad(loss_of(expected), parameters)):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


# ---- Log-probabilities ---------------------------------------------------------------------------

def test_log_probs_are_those_of_separate_sequences_in_value_and_gradient(loaded):
    """The plain form against a Python loop over unpadded sequences, and against F.cross_entropy over padded ones."""
    model = loaded.model
    examples = examples_of(loaded, R=2, B=4)
    sums, counts = sso.pair_logps(model, examples, loaded.pad_id)
    assert sums.shape == counts.shape == (2, 2, 4) and sums.dtype == torch.float32
    loop = torch.zeros(2, 2, 4, dtype=torch.float64)
    entropy = torch.zeros(2, 2, 4)
    for b, example in enumerate(examples):
        for r, (prompt, *both) in enumerate(example):
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt + y) for y in both], batch_first=True)
            logits = model(ids).logits[:, len(prompt) - 1:-1]
            for side, response in enumerate(both):
                assert counts[side, r, b] == len(response)
                loop[side, r, b] = naive_logp(model, prompt, response)
                entropy[side, r, b] = -F.cross_entropy(logits[side, :len(response)], torch.tensor(response),
                                                       reduction="sum")
    for expected in (loop, entropy):
        sums, _ = sso.pair_logps(model, examples, loaded.pad_id)
        assert_same(sums, expected, model)


@pytest.mark.parametrize("logit_bytes", [2**28, 4 * 7 * 300], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("R, B", [(1, 3), (2, 3), (3, 2)])
def test_a_pair_as_one_row_has_the_log_probs_of_the_plain_form(loaded, R, B, logit_bytes, monkeypatch):
    """With R and B that differ, and no two responses alike, an exchange of any two axes is seen."""
    monkeypatch.setattr(fast, "LOGIT_BYTES", logit_bytes)
    examples = examples_of(loaded, R, B)
    logps, tokens = fast.pair_logps(loaded.model, examples, loaded.pad_id)
    plain, plain_tokens = sso.pair_logps(loaded.model, examples, loaded.pad_id)
    assert len(set(plain.flatten().tolist())) == 2 * R * B
    assert logps.shape == (2, R, B) and torch.equal(tokens, plain_tokens)
    assert_same(logps, plain, loaded.model)


@pytest.mark.parametrize("pair_logps", [sso.pair_logps, fast.pair_logps], ids=["plain", "fast"])
def test_padding_and_company_do_not_change_a_logp(loaded, pair_logps):
    pairs = encoded(loaded)
    company = Pair(pairs[0].prompt * 5, pairs[0].winner, pairs[0].loser)
    alone, _ = pair_logps(loaded.model, [pairs], loaded.pad_id)
    together, _ = pair_logps(loaded.model, [pairs, [company, company]], loaded.pad_id)
    torch.testing.assert_close(alone[:, :, 0], together[:, :, 0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spoil", ["use_cache", "2-D mask", "positions"])
def test_what_makes_transformers_ignore_the_layout_is_seen(loaded, spoil, monkeypatch):
    """The tests above are not blind, nor is the check at loading: with the layout lost, both fail."""
    forward, example = loaded.model.base_model.forward, encoded(loaded)
    right, _ = fast.pair_logps(loaded.model, [example], loaded.pad_id)
    assert fast.reads_rows(loaded.model)

    def spoiled(input_ids, position_ids=None, attention_mask=None, use_cache=None, **others):
        if position_ids is None:        # the plain form
            return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **others)
        assert not use_cache and attention_mask.dtype == torch.bool and attention_mask.ndim == 4
        if spoil == "use_cache":        # as a model with a cache would be called: the mask does not go along
            return forward(input_ids=input_ids, position_ids=position_ids, use_cache=True)
        if spoil == "2-D mask":
            attention_mask = torch.ones_like(input_ids)
        if spoil == "positions":
            position_ids = None
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, position_ids=position_ids)

    monkeypatch.setattr(loaded.model.base_model, "forward", spoiled)
    wrong, _ = fast.pair_logps(loaded.model, [example], loaded.pad_id)
    assert torch.allclose(wrong[0], right[0], rtol=1e-5)
    assert ((wrong[1] - right[1]) / right[1]).abs().max() > 1e-4
    assert not fast.reads_rows(loaded.model)


def test_the_mask_shows_each_token_the_prompt_and_its_own_response():
    rows = fast.make_rows([([1, 2], [3, 4], [5]), ([6], [7], [8])], pad_id=0, device="cpu")
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    assert rows.position_ids[0].tolist() == [0, 1, 2, 3, 2]
    assert rows.position_ids[1, :3].tolist() == [0, 1, 1]
    mask = fast.make_mask(rows.segments)
    assert mask.shape == (2, 1, 5, 5)
    sees = []
    for row in range(2):
        sees.append([rows.input_ids[row][seen].tolist() for seen in mask[row, 0]])
    assert sees[0] == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 5]]
    assert sees[1][:3] == [[6], [6, 7], [6, 8]]
    assert rows.targets.tolist() == [3, 4, 5, 7, 8] and rows.lengths == [2, 1, 1, 1]
    flat = rows.input_ids.flatten()
    assert flat[rows.sources].tolist() == [2, 3, 2, 6, 6]
    assert flat[rows.ends].tolist() == [4, 5, 7, 8]


def test_the_head_equals_autograd_and_the_library_in_a_low_precision_too(monkeypatch):
    """Values and gradients of TokenLogps against log_softmax under autograd, in bf16 within its rounding."""
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    targets, g = torch.randint(97, (50,)), torch.randn(50)
    monkeypatch.setattr(fast, "LOGIT_BYTES", 4 * 97 * 12)        # five chunks, the first of two rows
    expected = (hidden @ head.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad((g * expected).sum(), [hidden, head])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        logps = fast.TokenLogps.apply(hidden.to(dtype), head, targets)
        got = torch.autograd.grad((g * logps).sum(), [hidden, head])
        assert logps.dtype == got[1].dtype == torch.float32
        for a, b in zip((logps, *got), (expected, *wanted)):
            assert (a - b).norm() < tolerance * b.norm()
    if hasattr(F, "linear_cross_entropy"):
        library = -F.linear_cross_entropy(hidden, head, targets, reduction="none")
        torch.testing.assert_close(library, expected)


def test_the_vocabulary_is_reached_by_response_tokens_only_a_chunk_at_a_time(loaded, monkeypatch):
    """Every matrix product with the head: one a chunk forward, and recomputed in all chunks but the last."""
    from torch.utils._python_dispatch import TorchDispatchMode
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    chunk, heights = 20, []
    monkeypatch.setattr(fast, "LOGIT_BYTES", 4 * vocabulary * chunk)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default and out.shape[-1] == vocabulary:
                heights.append(out.shape[0])
            return out

    with Watch():
        logps, tokens = fast.pair_logps(loaded.model, [encoded(loaded)] * 2, loaded.pad_id)
        whole, rest = divmod(tokens.sum().item(), chunk)
        assert rest and heights == [rest] + [chunk] * whole
        logps.sum().backward()
    assert heights[whole + 1:] == [chunk] * (whole - 1) + [rest]
    loaded.model.zero_grad()


def test_micro_batches_hold_every_example_once_within_the_budget():
    examples = []
    for n in (40, 3, 9, 27, 3, 14, 90, 8):
        examples.append([Pair([1] * n, [2] * (n % 7 + 1), [3] * (n % 5 + 1))] * 2)
    groups = chat.micro_batches(examples, budget=200)
    assert sorted(i for group in groups for i in group) == list(range(8)) and len(groups) > 2
    for group in groups:
        width = max(len(p) + len(w) + len(l) for i in group for p, w, l in examples[i])
        assert len(group) == 1 or 2 * len(group) * width <= 200
    alike = [[Pair([1] * 5, [2] * 3, [3] * 2)] * 2] * 7         # two rows of 10 tokens each
    assert [len(group) for group in chat.micro_batches(alike, budget=60)] == [3, 3, 1]
    assert [len(group) for group in chat.micro_batches(alike, budget=59)] == [2, 2, 2, 1]


# ---- Encoding ------------------------------------------------------------------------------------

def test_what_is_supervised_is_the_response_and_one_end_of_turn_token(loaded):
    tokenizer, end_id = loaded.tokenizer, loaded.end_id
    end = tokenizer.decode([end_id])
    assert end in ("<|im_end|>", "<|eot_id|>")
    pair = encoded(loaded)[0]
    rows = fast.make_rows([pair], loaded.pad_id, "cpu")
    supervised = [tokenizer.decode(ids) for ids in rows.targets.split(rows.lengths)]
    assert supervised == [tokenizer.decode(pair.winner), tokenizer.decode(pair.loser)] == [Y["good"] + end, Y["bad"]]
    start = {"qwen2": "<|im_start|>assistant\n", "qwen3": "</think>\n\n", "llama": "assistant<|end_header_id|>\n\n"}
    assert tokenizer.decode(pair.prompt).endswith(start[loaded.model.config.model_type])


def test_a_response_is_cut_to_the_room_beside_its_prompt(loaded):
    prompt, winner, loser = encoded(loaded)[0]
    _, cut, _ = encoded(loaded, max_length=len(prompt) + 3)[0]
    assert loaded.tokenizer.decode(cut) == "A p"
    _, cut, other = encoded(loaded, max_length=len(prompt) + len(winner) - 1)[0]        # the end of turn goes first
    assert cut == winner[:-1] and other == loser[:len(winner) - 1]
    pair = sso.preference_pairs(RECORD, "plus")[0]
    for length, pair, message in ((len(prompt), pair, f"a prompt of {len(prompt)} tokens leaves no room"),
                                  (4096, pair._replace(loser=Response("", finished=False)), "an empty response")):
        with pytest.raises(ValueError, match=message):
            sso.encode_pair(loaded.tokenizer, loaded.end_id, pair, length)


def test_the_end_of_turn_is_the_templates_not_the_end_of_text():
    tokenizer = make_tokenizer("llama")
    tokenizer.eos_token = "<|end_of_text|>"                          # as in Llama 3's first release
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert chat.end_of_turn_id("model", PlainText(tokenizer)) == end


# ---- Prompts and pairs ---------------------------------------------------------------------------

def test_each_term_has_the_prompt_winner_and_loser_of_the_paper():
    good, bad = [], []
    for role, messages, principle in (("good", good, "be exact"), ("bad", bad, "be vague")):
        system = sso.PROMPTS[role]["system"].replace("{principle}", principle)
        messages += [{"role": "system", "content": system}] + RECORD["prompt"]
    y_plus, y_minus = Response("A plum.", True), Response("Something that grows, I think, on a tr", False)
    y_original = Response("Fruit: fig", True)
    assert sso.preference_pairs(RECORD, "sso") == [(good, y_plus, y_minus),         # Eq. 2
                                                   (bad, y_original, y_plus)]       # Eq. 4
    assert sso.preference_pairs(RECORD, "policy") == [(RECORD["prompt"], y_plus, y_minus)]
    assert "good response" in good[0]["content"] and "bad response" in bad[0]["content"]
    assert good[0]["content"].endswith("be exact") and bad[0]["content"].endswith("be vague")


def test_no_text_that_is_filled_in_is_filled_in_itself():
    assert sso.fill("{a} {b} {c}", a="{b}", b="{a}") == "{b} {a} {c}"
    record = RECORD | {"prompt": [{"role": "user", "content": "What is {principle} or {query} in Python?"}]}
    system, user = sso.role_messages("good", record | {"good_principle": "Explain {query}."})
    assert user == record["prompt"][0] and system["content"].endswith("Guidelines: Explain {query}.")


@pytest.mark.parametrize("principle", [None, "", " \n", 3])
def test_a_role_without_its_principle_is_refused(principle):
    with pytest.raises(ValueError, match="a record without 'bad_principle'; `generate.py principles` writes it"):
        sso.role_messages("bad", RECORD | {"bad_principle": principle})
    assert sso.role_messages("original", RECORD | {"bad_principle": principle}) == RECORD["prompt"]


def test_a_data_generator_is_what_never_answers_the_plain_query():
    assert [objective for objective in sso.PAIRS if sso.trains_generator(objective)] == ["sso", "plus", "minus", "eq3"]


def test_worked_examples_are_earlier_turns_before_the_query():
    form = {"system": "Write.", "answer": "Bad: {bad}\nGood: {good}", "end": "\n",
            "examples": [{"query": "A {bad}?", "bad": "b {good}", "good": "g"}, {"query": "B?", "bad": "c", "good": "h"}]}
    messages = sso.principle_messages("Why {is} the sky {bad}?", {"principles": form})
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in messages] == [
        "Write.", "A {bad}?", "Bad: b {good}\nGood: g", "B?", "Bad: c\nGood: h", "Why {is} the sky {bad}?"]
    assert sso.principle_messages("Q", {"principles": form | {"system": "", "examples": []}}) == [
        {"role": "user", "content": "Q"}]


# ---- Losses --------------------------------------------------------------------------------------

def test_dpo_and_sft_by_hand():
    # winner: log-prob -3 against -4 of the reference; loser: -6 against -5. Margin 0.5·(1 + 1) = 1.
    policy_chosen = torch.tensor([-3.0], requires_grad=True)
    policy, ref = torch.stack([policy_chosen, torch.tensor([-6.0])]), torch.tensor([[-4.0], [-5.0]])
    losses, rewards = sso.dpo_loss(policy, ref, torch.tensor([[7], [2]]), beta=0.5)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)
    assert rewards.flatten().tolist() == [0.5, -0.5] and not rewards.requires_grad
    losses.sum().backward()
    assert policy_chosen.grad.item() == pytest.approx(-0.5 / (1 + math.exp(1)), rel=1e-6)
    assert sso.sft_loss(torch.tensor([-6.0]), torch.tensor([4])).item() == 1.5


def test_ipo_is_its_formula_on_means_over_response_tokens():
    policy = torch.tensor([[-3.0, -8.0], [-6.0, -2.0]], requires_grad=True)
    ref = torch.tensor([[-4.0, -5.0], [-5.0, -9.0]])
    tokens, beta = torch.tensor([[2, 4], [5, 7]]), 0.25
    losses, rewards = sso.ipo_loss(policy, ref, tokens, beta)
    h = [1 / 2 - (-1 / 5), -3 / 4 - 7 / 7]                   # mean log-ratio of the winner less that of the loser
    assert losses.tolist() == pytest.approx([(x - 1 / (2 * beta)) ** 2 for x in h])
    assert rewards.flatten().tolist() == pytest.approx([beta / 2, -beta * 3 / 4, -beta / 5, beta])
    assert not rewards.requires_grad
    losses[0].backward()
    assert policy.grad[:, 0].tolist() == pytest.approx([2 * (h[0] - 2) / 2, -2 * (h[0] - 2) / 5])


def test_step_zero_is_ln_2_a_pair_and_for_ipo_a_quarter_of_beta_to_the_minus_2():
    torch.manual_seed(0)
    logps, tokens = -50 * torch.rand(2, 2, 3), torch.randint(1, 9, (2, 2, 3))
    for base_loss, value in (("dpo", math.log(2)), ("ipo", 1 / (4 * 0.3 ** 2))):
        _, parts = sso.sso_loss(logps, logps, tokens, base_loss, gamma=0.1, beta=0.3)
        assert parts["base"].shape == (2, 3) and torch.allclose(parts["base"], torch.tensor(value))


def test_sso_loss_is_eq_1_2_4_by_hand_in_value_and_gradient(loaded):
    model, beta, gamma = loaded.model, 0.3, 0.7
    examples = [encoded(loaded)]
    (x_plus, y_plus, y_minus), (x_minus, y_original, _) = examples[0]
    ref = torch.linspace(-100, -90, 4).view(2, 2, 1)         # any reference: winners of L+ and L-, then losers
    logps, tokens = loaded.pair_logps(model, examples, loaded.pad_id)
    losses, parts = sso.sso_loss(logps, ref, tokens, "dpo", gamma, beta=beta)

    def term(x, winner, loser, ref_winner, ref_loser):       # L_base(x, w, l) + γ L_sft(x, w)
        w, l = naive_logp(model, x, winner), naive_logp(model, x, loser)
        return -torch.log(torch.sigmoid(beta * (w - ref_winner) - beta * (l - ref_loser))) - gamma * w / len(winner)

    plus = term(x_plus, y_plus, y_minus, ref[0, 0, 0].double(), ref[1, 0, 0].double())             # Eq. 2
    minus = term(x_minus, y_original, y_plus, ref[0, 1, 0].double(), ref[1, 1, 0].double())        # Eq. 4
    assert losses.item() == pytest.approx((plus + minus).item(), rel=1e-4)                         # Eq. 1
    assert parts["loss"][:, 0].tolist() == pytest.approx([plus.item(), minus.item()], rel=1e-4)
    assert not any(part.requires_grad for part in parts.values())
    parameters = list(model.parameters())
    by_hand = torch.autograd.grad(plus + minus, parameters)
    for a, b in zip(torch.autograd.grad(losses.sum(), parameters), by_hand):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_version_1_weighs_all_three_terms_by_hand_in_value_and_gradient():
    """W·(L + g·(L+ + L-)) with W = σ(-(0.66 m(y+|x) + 0.34 m(y-|x))), through which the gradient flows."""
    policy = torch.tensor([[[-4.0], [-6.0], [-9.0]], [[-2.0], [-8.0], [-5.0]]], requires_grad=True)     # (2, 3, 1)
    ref = torch.tensor([[[-5.0], [-5.0], [-7.0]], [[-3.0], [-4.0], [-6.0]]])
    tokens = torch.tensor([[[8], [3], [4]], [[5], [2], [9]]])
    beta, gamma = 0.2, 0.5
    weights = sso.joint_weights(policy, tokens)
    losses, parts = sso.sso_loss(policy, ref, tokens, "dpo", gamma, weights=weights, beta=beta)
    gradient, = torch.autograd.grad(losses.sum(), policy)

    # by hand, with names for the log-probs: under x y+ and y-, under x+ y+ and y-, under x- yo and y+
    a, b, c, d, e, f = values = [torch.tensor(v, dtype=torch.float64, requires_grad=True)
                                 for v in (-4.0, -2.0, -6.0, -8.0, -9.0, -5.0)]
    L = -torch.log(torch.sigmoid(beta * ((a + 5) - (b + 3)))) - gamma * a / 8
    L_plus = -torch.log(torch.sigmoid(beta * ((c + 5) - (d + 4)))) - gamma * c / 3
    L_minus = -torch.log(torch.sigmoid(beta * ((e + 7) - (f + 6)))) - gamma * e / 4
    W = 1 / (1 + torch.exp(0.66 * a / 8 + 0.34 * b / 5))
    by_hand = W * (L + 0.1 * (L_plus + L_minus))
    assert losses.item() == pytest.approx(by_hand.item(), rel=1e-5)
    expected = torch.stack(torch.autograd.grad(by_hand, values)).view(3, 2).T
    torch.testing.assert_close(gradient[:, :, 0].double(), expected, rtol=1e-5, atol=1e-7)
    assert weights[:, 0].tolist() == pytest.approx([W.item(), 0.1 * W.item(), 0.1 * W.item()])


PAPERS_PAIRS = {    # (prompt, winner, loser), as Section 4.2, Table 3, Table 4, Section 5.3 and version 1 have them
    "sso": [("good", "good", "bad"), ("bad", "original", "good")],
    "plus": [("good", "good", "bad")],
    "minus": [("bad", "original", "good")],
    "eq3": [("good", "good", "bad"), ("bad", "bad", "good")],
    "policy": [("original", "good", "bad")],
    "original": [("original", "good", "original")],
    "joint": [("original", "good", "bad"), ("good", "good", "bad"), ("bad", "original", "good")]}


@pytest.mark.parametrize("base", ["dpo", "ipo"])
@pytest.mark.parametrize("objective", PAPERS_PAIRS)
def test_what_every_objective_trains_by_is_the_by_hand_sum_over_the_papers_pairs(qwen3, objective, base):
    """As the training does it, forward and backward. Also version 1."""
    loaded, beta, gamma = chat.load_chat(qwen3), 0.3, 0.7
    assert PAPERS_PAIRS.keys() == sso.PAIRS.keys()
    example = encoded(loaded, objective)
    ref = torch.linspace(-100, -90, 2 * len(example)).view(2, -1, 1)
    settings = {"objective": objective, "base_loss": base, "beta": beta, "gamma": gamma, "micro_batch_tokens": 4096}
    parts = train.accumulate_gradient(loaded, [example], ref, settings)

    def response(role):
        return sso.encode_response(loaded.tokenizer, loaded.end_id, Response(Y[role], role != "bad"))  # y- was cut off

    terms, mean = [], {}
    for r, (prompt, winner, loser) in enumerate(PAPERS_PAIRS[objective]):
        x = sso.encode_prompt(loaded.tokenizer, sso.role_messages(prompt, RECORD))
        w, l = naive_logp(loaded.model, x, response(winner)), naive_logp(loaded.model, x, response(loser))
        w_ratio, l_ratio = w - ref[0, r, 0], l - ref[1, r, 0]
        w_size, l_size = len(response(winner)), len(response(loser))
        if base == "dpo":
            value = -torch.log(torch.sigmoid(beta * (w_ratio - l_ratio)))
        else:
            value = (w_ratio / w_size - l_ratio / l_size - 1 / (2 * beta)) ** 2
        terms.append(value - gamma * w / w_size)
        mean |= {(prompt, winner): w / w_size, (prompt, loser): l / l_size}
    by_hand = sum(terms)
    if objective == "joint":
        W = torch.sigmoid(-(0.66 * mean["original", "good"] + 0.34 * mean["original", "bad"]))
        by_hand = W * (terms[0] + 0.1 * (terms[1] + terms[2]))
    assert parts["loss"].sum().item() == pytest.approx(by_hand.item(), rel=1e-4)
    parameters = list(loaded.model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(by_hand, parameters)):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3)


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
NUMBER = r"([+-]?\d+\.\d+)"


def test_the_worked_example_needs_torch_alone_and_prints_the_numbers_of_the_equations(tmp_path):
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    (tmp_path / "empty").mkdir()
    began = time.time()
    done = subprocess.run([sys.executable, ROOT / "sso.py"], cwd=tmp_path / "empty", capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path / "guard"), "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    assert time.time() - began < 30 and not list((tmp_path / "empty").iterdir())
    text = done.stdout

    # The prompts, and what is supervised.
    assert all(f"\n{symbol}, the {role} prompt" in text
               for symbol, role in (("x+", "good"), ("x-", "bad"), ("x", "original")))
    assert f"Guidelines: {sso.EXAMPLE['good_principle']}<|im_end|>" in text
    y_plus, y_minus, y_original = (sso.EXAMPLE[column][0]["content"] + "<|im_end|>\n"
                                   for column in ("chosen", "rejected", "original"))
    assert f"winner, the good response: {y_plus}      loser, the bad response: {y_minus}" in text
    assert f"winner, the original response: {y_original}      loser, the good response: {y_plus}" in text

    # Log-probs at step zero by the loop, under the model of the same seed.
    torch.manual_seed(0)
    model, tokenizer = sso.TinyModel(), sso.ByteTokenizer()
    pairs = [sso.encode_pair(tokenizer, sso.END, pair, 4096) for pair in sso.preference_pairs(sso.EXAMPLE, "sso")]
    logps = [[float(number) for number in found]
             for found in re.findall(rf"log π_θ +{NUMBER} +log π_ref +{NUMBER} +changed by {NUMBER}", text)]
    assert len(logps) == 8                  # twice: L+ winner, L+ loser, L- winner, L- loser
    own = [naive_logp(model, x, y).item() for x, winner, loser in pairs for y in (winner, loser)]
    assert [reference for _, reference, _ in logps] == pytest.approx(own * 2, abs=6e-4)
    assert [now for now, _, _ in logps[:4]] == pytest.approx(own, abs=6e-4)
    assert [changed for *_, changed in logps] == pytest.approx([now - ref for now, ref, _ in logps], abs=2e-3)

    # Each term, and their sum, by sso_loss from the log-probs in print; before the step and after it.
    tokens = torch.tensor([[len(y) for y in pair[1:]] for pair in pairs]).T[:, :, None]
    terms = [[float(number) for number in found] for found in re.findall(
        rf"L_base \+ γ · L_sft = {NUMBER} \+ 0\.1 · {NUMBER} = {NUMBER} +\(reward margin {NUMBER}\)", text)]
    sums = [float(number) for number in re.findall(rf"L_SSO = L\+ \+ L- = {NUMBER}", text)]
    assert len(terms) == 4 and len(sums) == 2
    for moment in range(2):
        policy, reference, _ = torch.tensor(logps[4 * moment:4 * moment + 4]).T.reshape(3, 2, 2)
        loss, parts = sso.sso_loss(policy.T[:, :, None], reference.T[:, :, None], tokens, "dpo", 0.1, beta=0.1)
        margin = parts["chosen_rewards"] - parts["rejected_rewards"]
        printed = torch.tensor(terms[2 * moment:2 * moment + 2])
        expected = torch.stack([parts["base"], parts["sft"], parts["loss"], margin])[:, :, 0].T
        torch.testing.assert_close(printed, expected, rtol=0, atol=3e-4)
        assert sums[moment] == pytest.approx(loss.item(), abs=3e-4)
    assert [base for base, *_ in terms[:2]] == [0.6931, 0.6931]
    assert terms[2][3] > 0.01 and terms[3][3] > 0.01 and sums[1] < sums[0]

    # d L_SSO / d log π: -β σ(0) - γ / tokens of a winner, β σ(0) of a loser.
    found = re.findall(rf"L[+-] winner {NUMBER}, loser {NUMBER}", text)
    assert [float(number) for row in found for number in row] == pytest.approx(
        [-0.05 - 0.1 / len(pairs[0].winner), 0.05, -0.05 - 0.1 / len(pairs[1].winner), 0.05], abs=6e-5)
