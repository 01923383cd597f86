"""The paper's functions against independent computations: loops, F.cross_entropy, autograd, scalars."""

import math

import pytest
import torch
import torch.nn.functional as F

import generate
import sso

RECORD = {"prompt": [{"role": "user", "content": "Name a fruit."}], "good_principle": "be exact", "bad_principle": "be vague",
          "chosen": [{"role": "assistant", "content": "A plum."}], "chosen_finished": True,
          "rejected": [{"role": "assistant", "content": "Something that grows, I think, on a tr"}], "rejected_finished": False,
          "original": [{"role": "assistant", "content": "Fruit: fig"}], "original_finished": True}


def encoded(tokenizer, end_id, objective="sso", max_length=4096):
    return sso.encode_pairs(tokenizer, end_id, sso.preference_pairs(RECORD, objective), max_length)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return generate.load_chat(checkpoint)


def naive_logp(model, prompt, response):
    """log π(y|x) by a Python loop over one unpadded sequence: the model's own logits, a softmax a token."""
    logits = model(torch.tensor([prompt + response])).logits[0].double()
    return sum(torch.log(torch.softmax(logits[len(prompt) + i - 1], -1)[token]) for i, token in enumerate(response))


def loss_of(logps):
    """A number that a swap of responses, rows or examples would change."""
    return (torch.arange(1., logps.numel() + 1).view_as(logps) * logps).sum()


@pytest.mark.parametrize("logit_bytes", [2**28, 4 * 7 * 300])     # all response tokens in one chunk, and in many
def test_a_row_of_the_tree_equals_separate_sequences_in_value_and_gradient(loaded, logit_bytes, monkeypatch):
    """Against a Python loop over unpadded sequences, and against F.cross_entropy over right-padded ones."""
    model, pad_id = loaded.model, loaded.pad_id
    monkeypatch.setattr(sso, "LOGIT_BYTES", logit_bytes)
    examples = [encoded(loaded.tokenizer, loaded.end_id), [pair[::2] + pair[1:2] for pair in encoded(
        loaded.tokenizer, loaded.end_id)], [([5, 6, 7], [8], [9, 10])] * 2]         # of all lengths, a token even
    sums, counts = sso.pair_logps(model, examples, pad_id)
    assert sums.shape == (2, 2, 3) and sums.dtype == torch.float32
    loop, entropy = torch.zeros_like(sums, dtype=torch.float64), torch.zeros_like(sums)
    for b, example in enumerate(examples):
        for r, (prompt, *both) in enumerate(example):
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt + y) for y in both], batch_first=True)
            logits = model(ids).logits[:, len(prompt) - 1:-1]
            for side, response in enumerate(both):
                assert counts[side, r, b] == len(response)
                loop[side, r, b] = naive_logp(model, prompt, response)
                entropy[side, r, b] = -F.cross_entropy(logits[side, :len(response)], torch.tensor(response), reduction="sum")
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(sums), parameters)
    for other in (loop, entropy):
        assert ((other - sums) / other).abs().max() < 1e-5
        for a, b in zip(gradients, torch.autograd.grad(loss_of(other), parameters)):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.mark.parametrize("spoil", ["use_cache", "2-D mask", "positions"])
def test_what_makes_transformers_ignore_the_layout_is_seen(loaded, spoil, monkeypatch):
    """The test above is not blind, nor is the check at loading: with the layout lost, both fail."""
    forward, pair = loaded.model.base_model.forward, [encoded(loaded.tokenizer, loaded.end_id)]
    right = sso.pair_logps(loaded.model, pair, loaded.pad_id)[0]

    def spoiled(input_ids, position_ids, attention_mask, use_cache):
        assert not use_cache and attention_mask.dtype == torch.bool and attention_mask.ndim == 4
        if spoil == "use_cache":        # as a model with a cache would be called: the mask does not go along
            return forward(input_ids=input_ids, position_ids=position_ids, use_cache=True)
        if spoil == "2-D mask":
            attention_mask = torch.ones_like(input_ids)
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
                       position_ids=None if spoil == "positions" else position_ids)
    monkeypatch.setattr(loaded.model.base_model, "forward", spoiled)
    wrong = sso.pair_logps(loaded.model, pair, loaded.pad_id)[0]
    assert torch.allclose(wrong[0], right[0], rtol=1e-5) and ((wrong[1] - right[1]) / right[1]).abs().max() > 1e-4


def test_the_mask_shows_each_token_the_prompt_and_its_own_response():
    rows = sso.tree_rows([([1, 2], [3, 4], [5]), ([6], [7], [8])], pad_id=0)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    assert rows.position_ids[0].tolist() == [0, 1, 2, 3, 2] and rows.position_ids[1, :3].tolist() == [0, 1, 1]
    sees = [[rows.input_ids[i][seen].tolist() for seen in sso.tree_mask(rows.segments)[i, 0]] for i in range(2)]
    assert sees[0] == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 5]] and sees[1][:3] == [[6], [6, 7], [6, 8]]
    assert rows.targets.tolist() == [3, 4, 5, 7, 8] and rows.lengths == [2, 1, 1, 1]
    flat = rows.input_ids.flatten()
    assert flat[rows.sources].tolist() == [2, 3, 2, 6, 6] and flat[rows.ends].tolist() == [4, 5, 7, 8]


def test_the_head_equals_autograd_and_the_library_in_a_low_precision_too(monkeypatch):
    """Values and gradients of TokenLogps against log_softmax under autograd, under bf16 autocast within its rounding."""
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    targets, g = torch.randint(97, (50,)), torch.randn(50)
    monkeypatch.setattr(sso, "LOGIT_BYTES", 4 * 97 * 12)        # five chunks, the last of two rows
    expected = (hidden @ head.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad((g * expected).sum(), [hidden, head])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        logps = sso.TokenLogps.apply(hidden.to(dtype), head, targets)
        got = torch.autograd.grad((g * logps).sum(), [hidden, head])
        assert logps.dtype == got[1].dtype == torch.float32
        for a, b in zip((logps, *got), (expected, *wanted)):
            assert (a - b).norm() < tolerance * b.norm()
    if hasattr(F, "linear_cross_entropy"):
        torch.testing.assert_close(-F.linear_cross_entropy(hidden, head, targets, reduction="none"), expected)


def test_padding_and_company_do_not_change_a_logp(loaded):
    pair = encoded(loaded.tokenizer, loaded.end_id)
    alone = sso.pair_logps(loaded.model, [pair], loaded.pad_id)[0][..., 0]
    together = sso.pair_logps(loaded.model, [pair, [(pair[0][0] * 5, *pair[0][1:])] * 2], loaded.pad_id)[0][..., 0]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-4)


def test_the_vocabulary_is_reached_by_response_tokens_only_a_chunk_at_a_time(loaded, monkeypatch):
    """Every matrix product with the head: one a chunk forward, and recomputed in all chunks but the last."""
    from torch.utils._python_dispatch import TorchDispatchMode
    vocabulary, chunk, heights = loaded.model.get_output_embeddings().weight.shape[0], 20, []
    monkeypatch.setattr(sso, "LOGIT_BYTES", 4 * vocabulary * chunk)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default and out.shape[-1] == vocabulary:
                heights.append(out.shape[0])
            return out
    with Watch():
        logps, tokens = sso.pair_logps(loaded.model, [encoded(loaded.tokenizer, loaded.end_id)] * 2, loaded.pad_id)
        whole, rest = divmod(tokens.sum().item(), chunk)
        assert rest and heights == [rest] + [chunk] * whole
        logps.sum().backward()
    assert heights[whole + 1:] == [chunk] * (whole - 1) + [rest]
    loaded.model.zero_grad()


def test_what_is_supervised_is_the_response_and_one_end_of_turn_token(loaded):
    model, tokenizer, end_id = loaded.model, loaded.tokenizer, loaded.end_id
    end = tokenizer.decode([end_id])
    assert end in ("<|im_end|>", "<|eot_id|>")
    prompt, winner, loser = encoded(tokenizer, end_id)[0]
    rows = sso.tree_rows([(prompt, winner, loser)], loaded.pad_id)
    supervised = [tokenizer.decode(ids) for ids in rows.targets.split(rows.lengths)]
    assert supervised == ["A plum." + end, "Something that grows, I think, on a tr"]
    assert tokenizer.decode(prompt).endswith({"qwen2": "<|im_start|>assistant\n", "qwen3": "</think>\n\n",
                                              "llama": "assistant<|end_header_id|>\n\n"}[model.config.model_type])
    # A text of another tool that carries the token already gets no second one; a response cut to fit has none.
    assert sso.encode_response(tokenizer, end_id, "A plum." + end, True) == winner
    cut = encoded(tokenizer, end_id, max_length=len(prompt) + 3)[0][1]
    assert tokenizer.decode(cut) == "A p"


def test_the_end_of_turn_is_the_templates_not_the_end_of_text():
    from conftest import make_tokenizer
    tokenizer = make_tokenizer("llama")
    tokenizer.eos_token = "<|end_of_text|>"                          # as in Llama 3's first release
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert sso.end_of_turn_id(tokenizer, stops) == stops[1]


def test_each_term_has_the_prompt_winner_and_loser_of_the_paper():
    good, bad = ([{"role": "system", "content": sso.PROMPTS[role].format(principle=principle)}] + RECORD["prompt"]
                 for role, principle in (("good", "be exact"), ("bad", "be vague")))
    y_plus, y_minus = ("A plum.", True), ("Something that grows, I think, on a tr", False)
    y_original = ("Fruit: fig", True)
    assert sso.preference_pairs(RECORD, "sso") == [(good, y_plus, y_minus), (bad, y_original, y_plus)]   # Eq. 2, Eq. 4
    assert sso.preference_pairs(RECORD, "policy") == [(RECORD["prompt"], y_plus, y_minus)]
    assert "good response" in good[0]["content"] and "bad response" in bad[0]["content"]


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
    policy, ref = torch.tensor([[-3.0, -8.0], [-6.0, -2.0]], requires_grad=True), torch.tensor([[-4.0, -5.0], [-5.0, -9.0]])
    tokens, beta = torch.tensor([[2, 4], [5, 7]]), 0.25
    losses, rewards = sso.ipo_loss(policy, ref, tokens, beta)
    h = [1 / 2 - (-1 / 5), -3 / 4 - 7 / 7]                   # mean log-ratio of the winner less that of the loser
    assert losses.tolist() == pytest.approx([(x - 1 / (2 * beta)) ** 2 for x in h])
    assert rewards.flatten().tolist() == pytest.approx([beta / 2, -beta * 3 / 4, -beta / 5, beta])
    losses[0].backward()
    assert policy.grad[:, 0].tolist() == pytest.approx([2 * (h[0] - 2) / 2, -2 * (h[0] - 2) / 5])
    assert sso.ipo_loss(ref, ref, tokens, beta)[0].tolist() == [1 / (4 * beta ** 2)] * 2         # step zero


def test_bradley_terry_by_hand():
    rewards = torch.tensor([[[2.0, -1.0]], [[0.5, 1.0]]], requires_grad=True)        # (2, R, B): winners, losers
    losses, parts = sso.reward_loss(rewards)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(2.0))])
    assert parts["chosen_rewards"].tolist() == [[2.0, -1.0]] and parts["rejected_rewards"].tolist() == [[0.5, 1.0]]
    losses.sum().backward()
    assert rewards.grad[0, 0].tolist() == pytest.approx([-1 / (1 + math.exp(1.5)), -1 / (1 + math.exp(-2.0))])


X, Y = {"good": 0, "bad": 1, "original": 2}, {"good": "A plum.", "bad": "Something that grows, I think, on a tr", "original": "Fruit: fig"}
PAPER = {   # (prompt, winner, loser), as Section 4.2, Table 3, Table 4, Section 5.3 and version 1 have them
    "sso": [("good", "good", "bad"), ("bad", "original", "good")], "plus": [("good", "good", "bad")],
    "minus": [("bad", "original", "good")], "eq3": [("good", "good", "bad"), ("bad", "bad", "good")],
    "policy": [("original", "good", "bad")], "original": [("original", "good", "original")],
    "joint": [("original", "good", "bad"), ("good", "good", "bad"), ("bad", "original", "good")]}


@pytest.mark.parametrize("base", ["dpo", "ipo"])
@pytest.mark.parametrize("objective", PAPER)
def test_every_objective_is_the_by_hand_sum_over_the_papers_pairs(qwen3, objective, base):
    """Also version 1: L + W·g·(L+ + L-), with α = 0.66 and g = 0.1."""
    import train
    chat, beta, gamma = generate.load_chat(qwen3), 0.3, 0.7
    assert PAPER.keys() == sso.PAIRS.keys()
    example = encoded(chat.tokenizer, chat.end_id, objective)
    ref = torch.linspace(-100, -90, 2 * len(example)).view(2, -1, 1)
    s = {"objective": objective, "base": base, "beta": beta, "gamma": gamma}
    losses, _ = train.losses_of(chat, [example], ref, s)

    def response(role):
        return sso.encode_response(chat.tokenizer, chat.end_id, Y[role], role != "bad")      # y- was cut off
    terms, mean = [], {}
    for r, (prompt, winner, loser) in enumerate(PAPER[objective]):
        x = sso.encode_prompt(chat.tokenizer, sso.role_messages(prompt, RECORD))
        w, l = (naive_logp(chat.model, x, response(role)) for role in (winner, loser))
        ratios, sizes = [w - ref[0, r, 0], l - ref[1, r, 0]], [len(response(role)) for role in (winner, loser)]
        if base == "dpo":
            value = -torch.log(torch.sigmoid(beta * (ratios[0] - ratios[1])))
        else:
            value = (ratios[0] / sizes[0] - ratios[1] / sizes[1] - 1 / (2 * beta)) ** 2
        terms.append(value - gamma * w / sizes[0])
        mean |= {(prompt, winner): w / sizes[0], (prompt, loser): l / sizes[1]}
    weights = [1.0] * len(terms)
    if objective == "joint":
        W = torch.sigmoid(-(0.66 * mean["original", "good"] + 0.34 * mean["original", "bad"]))
        weights = [1.0, 0.1 * W, 0.1 * W]
    by_hand = sum(weight * term for weight, term in zip(weights, terms))
    assert losses.item() == pytest.approx(by_hand.item(), rel=1e-4)
    parameters = list(chat.model.parameters())
    for a, b in zip(torch.autograd.grad(losses.sum(), parameters), torch.autograd.grad(by_hand, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_sso_loss_is_eq_1_2_4_by_hand_in_value_and_gradient(loaded):
    model, tokenizer, end_id = loaded.model, loaded.tokenizer, loaded.end_id
    beta, gamma = 0.3, 0.7
    examples = [encoded(tokenizer, end_id)]
    (x_plus, y_plus, y_minus), (x_minus, y_original, _) = examples[0]
    ref = torch.linspace(-100, -90, 4).view(2, 2, 1)         # any reference: winners of L+ and L-, then losers
    logps, tokens = sso.pair_logps(model, examples, loaded.pad_id)
    losses, parts = sso.sso_loss(logps, ref, tokens, beta, gamma)

    def term(x, winner, loser, ref_winner, ref_loser):       # L_base(x, w, l) + γ L_sft(x, w)
        w, l = naive_logp(model, x, winner), naive_logp(model, x, loser)
        return -torch.log(torch.sigmoid(beta * (w - ref_winner) - beta * (l - ref_loser))) - gamma * w / len(winner)
    plus = term(x_plus, y_plus, y_minus, ref[0, 0, 0].double(), ref[1, 0, 0].double())             # Eq. 2
    minus = term(x_minus, y_original, y_plus, ref[0, 1, 0].double(), ref[1, 1, 0].double())        # Eq. 4
    assert losses.item() == pytest.approx((plus + minus).item(), rel=1e-4)                         # Eq. 1
    assert parts["loss"][:, 0].tolist() == pytest.approx([plus.item(), minus.item()], rel=1e-4)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(losses.sum(), parameters), torch.autograd.grad(plus + minus, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_step_zero_is_ln_2_a_pair(loaded):
    model, tokenizer, end_id = loaded.model, loaded.tokenizer, loaded.end_id
    logps, tokens = sso.pair_logps(model, [encoded(tokenizer, end_id)] * 3, loaded.pad_id)
    _, parts = sso.sso_loss(logps, logps.detach(), tokens, 0.1, 0.1)
    assert parts["base"].shape == (2, 3) and torch.allclose(parts["base"], torch.tensor(math.log(2)))


def test_pair_logps_puts_each_pair_where_it_belongs(loaded):
    model, tokenizer, end_id = loaded.model, loaded.tokenizer, loaded.end_id
    one, other = encoded(tokenizer, end_id), [pair[::2] + pair[1:2] for pair in encoded(tokenizer, end_id)]  # swapped
    logps, tokens = sso.pair_logps(model, [one, other], loaded.pad_id)
    for r, (prompt, winner, loser) in enumerate(one):
        assert tokens[:, r].tolist() == [[len(winner), len(loser)], [len(loser), len(winner)]]
        torch.testing.assert_close(logps[0, r, 0], naive_logp(model, prompt, winner).float(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(logps[:, r, 0].flip(0), logps[:, r, 1], rtol=1e-5, atol=1e-4)


def test_micro_batches_hold_every_example_once_within_the_budget():
    examples = [[([1] * n, [2] * (n % 7 + 1), [3] * (n % 5 + 1))] * 2 for n in (40, 3, 9, 27, 3, 14, 90, 8)]
    groups = sso.micro_batches(examples, budget=200)
    assert sorted(i for group in groups for i in group) == list(range(8)) and len(groups) > 2
    for group in groups:
        width = max(len(p) + len(w) + len(l) for i in group for p, w, l in examples[i])
        assert len(group) == 1 or 2 * len(group) * width <= 200


@pytest.mark.parametrize("answer, expected", [
    ("Be vague.\n### Good Guideline\nBe exact.", ("Be vague.", "Be exact.")),
    ("### Bad Guideline\nBe vague.\n\n### Good Guideline:\nBe exact.\n\n### Query\nNext", ("Be vague.", "Be exact.")),
    ("**Bad Guideline:** Be vague.\n### good guideline Be\nexact.", ("Be vague.", "Be exact.")),
    ("Be vague.", ("", "")), ("### Good Guideline\nBe exact.", ("", "")), ("Be vague.\n### Good Guideline\n", ("", "")), ("", ("", "")),
])
def test_guidelines_are_parsed_or_refused_as_a_pair(answer, expected):
    assert sso.parse_guidelines(answer) == expected


def test_the_guideline_prompt_asks_for_the_bad_one_first_and_shows_three_examples():
    text = sso.guideline_messages("Why {is} the sky blue?")[0]["content"]
    assert text.endswith("### Query\nWhy {is} the sky blue?\n### Bad Guideline")
    headings = [line for line in text.split("\n") if line.startswith("###")]
    assert headings == ["### Query", "### Bad Guideline", "### Good Guideline"] * 3 + ["### Query", "### Bad Guideline"]
