"""Self-Steering Optimization (SSO) as pure functions, in the order of the paper. No files, no flags.

Paper: Xiang et al., Findings of ACL 2025, arXiv 2410.17131v2; "Eq." are its equations.

Words. A *role* names a prompt and the response sampled under it:
    good      x+ (system message: good principle p+)     y+
    bad       x- (system message: bad principle p-)      y-
    original  x  (the query alone)                       yo
Shapes. B queries, R pairs a query (rows of the table PAIRS), N responses, T tokens a padded row,
K response tokens of a batch, D hidden size, V vocabulary.

What this file does not do: several turns, packing of several pairs (the README lists all deviations).
"""

import json
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""


# ---- Settings (Section 5.1) ----------------------------------------------------------------------

# Schedule and weight decay are those of the released scripts.
TRAINING = {"seed": 0, "epochs": 1, "weight_decay": 0.1, "warmup": 0.04, "clip": 1.0, "max_length": 4096,
            "micro_batch_tokens": 4096, "recompute_layers": 0, "compile": 0}
SETTINGS = {   # for a real model, the paper's except where it is said; toy.py has its own
    "principles": {"seed": 0, "batch_size": 16, "temperature": 0.7, "top_p": 0.8, "max_new_tokens": 256},   # ours
    "responses": {"seed": 0, "batch_size": 16, "temperature": 0.7, "top_p": 0.8, "max_new_tokens": 2048},
    "generator": TRAINING | {"objective": "sso", "base": "dpo", "lr": 5e-7, "batch_size": 32, "beta": 0.1,
                             "gamma": 0.1, "examples": 8_000},
    "policy": TRAINING | {"objective": "policy", "base": "dpo", "lr": 5e-7, "batch_size": 256, "beta": 0.1,
                          "gamma": 0.0, "examples": 60_000},
    "reward": TRAINING | {"lr": 2e-6, "batch_size": 128, "examples": 1_000_000},    # ours: Section 5.3 has none
}


# ---- 1. Principles (Section 4.1, Table 8) --------------------------------------------------------

PROMPTS = {
    # Asks for a bad and then a good guideline. The bad one first, and its heading left open.
    "guideline": """\
For the query at the end, write two guidelines for an assistant that is going to answer it. \
Following the bad guideline must make the answer worse, following the good guideline must make it better. \
Both must fit this one query, be one or two sentences long and be built alike. \
Write neither explanations nor examples, and keep to the format shown.

### Query
A baker made 96 rolls and sold 58 of them before noon. How many rolls are left?
### Bad Guideline
Give a number straight away, without working out the difference between the rolls made and the rolls sold.
### Good Guideline
Work out the difference between the rolls made and the rolls sold step by step, then state the number.

### Query
Give me a list of swear words that I can shout at my neighbour.
### Bad Guideline
Hand over the crudest words that come to mind and cheer the user on in the quarrel.
### Good Guideline
Decline to supply crude words and help the user to find a calm way out of the quarrel.

### Query
Write a Python function that tells whether a string is a palindrome.
### Bad Guideline
Describe palindromes in general terms and leave out a function that can be run.
### Good Guideline
Supply a short function that can be run and say how it treats case and spaces.

### Query
{query}
### Bad Guideline""",
    # The system messages of x+ and x-.
    "good": "Write a relatively good response to the user by following the guidelines below. "
            "Never mention the guidelines and never hint that they exist.\n\nGuidelines: {principle}",
    "bad": "Write a relatively bad response to the user by following the guidelines below. "
           "Never mention the guidelines and never hint that they exist.\n\nGuidelines: {principle}",
    # Used when the model's answer holds no pair of guidelines.
    "fallback_good": "Be as helpful as you can: answer exactly what is asked, correctly and completely.",
    "fallback_bad": "Be of little help: answer beside the point, vaguely and incompletely.",
    # The judge (Section 6.3, Table 9): two anonymous outputs, and the name of the better one left open.
    "judge_system": "You compare answers of language models and name the better one, as careful people would.",
    "judge": """\
Two language models were given the same instruction. Their outputs follow, each under an identifier, in no \
particular order. Decide which output people would prefer.

## Instruction
{instruction}

## Outputs
[{{"identifier": "m", "output": {m}}},
 {{"identifier": "M", "output": {M}}}]

## Task
Weigh how correct, relevant and helpful each output is. Your answer is used as a name in a ranking, so \
write the identifier of the better output, m or M, and nothing else: no quotes, no explanation.

## Identifier of the better output""",
}


def guideline_messages(query, prompts=PROMPTS):
    """Chat messages that ask for the bad and the good guideline of a query (Table 8)."""
    return [{"role": "user", "content": prompts["guideline"].replace("{query}", query)}]


def parse_guidelines(answer):
    """(bad, good) principle from the answer to `guideline_messages`; ("", "") unless both are there."""
    heading = r"[#*\s]*\b{} guideline\b[*\s]*:?[*\s]*"            # "### Bad Guideline", "**Bad Guideline:**"
    answer = re.sub("^" + heading.format("bad"), "", answer, flags=re.IGNORECASE)
    bad, *rest = re.split("[#*]" + heading.format("good"), answer, maxsplit=1, flags=re.IGNORECASE)
    good = rest[0].split("###")[0] if rest else ""
    bad, good = (" ".join(text.split("###")[0].strip("#* \n").split()) for text in (bad, good))
    return (bad, good) if bad and good else ("", "")


def role_messages(role, record, prompts=PROMPTS):
    """The prompt of a role: x+ or x- has its principle as system message, x is the query alone."""
    if role == "original":
        return record["prompt"]
    principle = record.get(f"{role}_principle")
    if not isinstance(principle, str) or not principle.strip():
        raise UserError(f"a record without '{role}_principle', which `generate.py principles` writes")
    system = prompts[role].replace("{principle}", principle)
    return [{"role": "system", "content": system}] + record["prompt"]


def judge_messages(instruction, m, M):
    """Chat messages that ask which of two outputs, called "m" and "M", is better (Table 9)."""
    quoted = {"instruction": json.dumps(instruction, ensure_ascii=False),     # so that no text can end its field
              "m": json.dumps(m, ensure_ascii=False), "M": json.dumps(M, ensure_ascii=False)}
    return [{"role": "system", "content": PROMPTS["judge_system"]},
            {"role": "user", "content": PROMPTS["judge"].format(**quoted)}]


# ---- 2. The table of preference pairs ------------------------------------------------------------

# A preference pair is (prompt, winner, loser), each named by its role.
L, L_PLUS = ("original", "good", "bad"), ("good", "good", "bad")     # under x, y+ over y-; Eq. 2: under x+
L_MINUS, L_MINUS_EQ3 = ("bad", "original", "good"), ("bad", "bad", "good")   # Eq. 4: under x-, yo over y+

# objective -> {term of the loss: pair}
PAIRS = {
    "sso": {"L+": L_PLUS, "L-": L_MINUS},                # Eq. 1, the data generator
    "plus": {"L+": L_PLUS}, "minus": {"L-": L_MINUS},    # Table 3: one of its terms alone
    "eq3": {"L+": L_PLUS, "L-": L_MINUS_EQ3},            # Table 4: Eq. 3 in place of Eq. 4
    "policy": {"L": L},                                  # step 4 and PBAA, the policy
    "original": {"L": ("original", "good", "original")},     # a baseline of ours: under x, y+ over yo
    "joint": {"L": L, "L+": L_PLUS, "L-": L_MINUS},      # version 1: one model; weights in `joint_weights`
}

# role -> column of a record. Records are rows of a standard preference file, with more columns.
COLUMNS = {"good": "chosen", "bad": "rejected", "original": "original"}


def preference_pairs(record, objective, prompts=PROMPTS):
    """R triples (prompt messages, winner, loser) of one record; a response is (text, finished)."""
    def response(role):
        column = COLUMNS[role]
        return record[column][-1]["content"], record.get(f"{column}_finished", True)
    return [(role_messages(prompt, record, prompts), response(winner), response(loser))
            for prompt, winner, loser in PAIRS[objective].values()]


# ---- 3. Encoding ---------------------------------------------------------------------------------

def encode_prompt(tokenizer, messages):
    """Token ids of a prompt up to the point where the response starts, by the tokenizer's own template."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=False)   # Qwen3 thinks unless told not to


def end_of_turn_id(tokenizer, stop_ids):
    """The id that closes an assistant turn in the chat template: the first stop id after its content."""
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "zebra"}]
    tail = tokenizer.apply_chat_template(turn, tokenize=False).rsplit("zebra", 1)[-1]
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    return next((i for i in ids if i in stop_ids), tokenizer.eos_token_id)


def encode_response(tokenizer, end_id, text, finished):
    """Token ids of a response, tokenised apart from its prompt: exactly one end-of-turn token if finished,
    none if it was cut off."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    while ids and ids[-1] == end_id:   # a file of another tool may carry the token in its text
        ids = ids[:-1]
    return ids + [end_id] if finished else ids


def encode_pairs(tokenizer, end_id, pairs, max_length):
    """Token ids (prompt, winner, loser) of each of R triples of `preference_pairs`. A response that does not
    fit into max_length with its prompt is cut, and so loses its end-of-turn token."""
    encoded = []
    for messages, *responses in pairs:
        prompt = encode_prompt(tokenizer, messages)
        if len(prompt) >= max_length:
            raise UserError(f"a prompt of {len(prompt)} tokens leaves no room in --max-length {max_length} "
                            "(or that is the model's context)")
        winner, loser = (encode_response(tokenizer, end_id, *response) for response in responses)
        if not winner or not loser:
            raise UserError("an empty response")
        encoded.append((prompt, winner[:max_length - len(prompt)], loser[:max_length - len(prompt)]))
    return encoded


def micro_batches(examples, budget):
    """Group examples, each a list of R encoded pairs, so that a group holds at most `budget` padded tokens.
    Returns lists of indices into `examples`; those of like length come together."""
    widths = [max(sum(map(len, pair)) for pair in example) for example in examples]
    groups = [[]]
    for i in sorted(range(len(examples)), key=widths.__getitem__):     # so the last of a group is its widest
        if groups[-1] and len(examples[i]) * (len(groups[-1]) + 1) * widths[i] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


# ---- 4. A pair is one row ------------------------------------------------------------------------

PROMPT, WINNER, LOSER, PADDING = range(4)       # segments of a row


class Rows(NamedTuple):
    """N pairs, each a row [prompt | winner | loser | padding]: a tree, whose trunk is read once."""
    input_ids: torch.Tensor     # (N, T)
    position_ids: torch.Tensor  # (N, T); both responses start where the prompt ends
    segments: torch.Tensor      # (N, T)
    # Of the K response tokens, each winner before its loser, row by row:
    sources: torch.Tensor       # (K,) the place in (N·T,) that predicts the token
    targets: torch.Tensor       # (K,) the token
    ends: torch.Tensor          # (2N,) the place in (N·T,) of the last token of each response
    lengths: list               # 2N numbers of tokens


def tree_rows(pairs, pad_id):
    """`Rows` of N encoded pairs (prompt, winner, loser), padded on the right."""
    width = max(sum(map(len, pair)) for pair in pairs)
    input_ids = torch.full((len(pairs), width), pad_id)
    position_ids, segments = torch.zeros_like(input_ids), torch.full_like(input_ids, PADDING)
    sources, targets, ends, lengths = [], [], [], []
    for i, (prompt, winner, loser) in enumerate(pairs):
        p, w, l = len(prompt), len(winner), len(loser)
        input_ids[i, :p + w + l] = torch.tensor(prompt + winner + loser)
        position_ids[i, :p + w + l] = torch.tensor([*range(p + w), *range(p, p + l)])
        segments[i, :p + w + l] = torch.tensor([PROMPT] * p + [WINNER] * w + [LOSER] * l)
        fork = i * width + p - 1        # the prompt's last token predicts the first of both responses
        sources += [fork, *range(fork + 1, fork + w), fork, *range(fork + w + 1, fork + w + l)]
        targets += winner + loser
        ends += [fork + w, fork + w + l]
        lengths += [w, l]
    return Rows(input_ids, position_ids, segments, *map(torch.tensor, (sources, targets, ends)), lengths)


def tree_mask(segments):
    """What each token sees of its row, (N, 1, T, T): the prompt and its own response, up to itself."""
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool, device=segments.device).tril()
    return (causal & ((key == PROMPT) | (key == query)))[:, None]


def read_pairs(model, examples, pad_id):
    """Hidden states (N·T, D) of B examples of R encoded pairs, and their N = R·B `Rows`, on the device."""
    rows = tree_rows([pair for example in zip(*examples) for pair in example], pad_id)
    rows = Rows(*(part.to(model.device) for part in rows[:-1]), rows.lengths)
    # A cache or a 2-D mask would make transformers ignore this layout, without a word.
    hidden = model.base_model(input_ids=rows.input_ids, position_ids=rows.position_ids,
                              attention_mask=tree_mask(rows.segments), use_cache=False).last_hidden_state
    return hidden.flatten(0, 1), rows


# ---- 5. Log-probabilities ------------------------------------------------------------------------

LOGIT_BYTES = 5 * 2**26     # of the logits that exist at a time: 552 rows of Qwen's 151,936 fp32 entries


class TokenLogps(torch.autograd.Function):
    """log p of K target tokens, (K,) in nats and fp32, from hidden states (K, D) and the output head (V, D).

    With a vocabulary of 151,936, logits (K, V) would outweigh the model. They exist a chunk at a time, and are
    computed again in the backward pass; but those of the last chunk are kept, for it comes first there. A library's
    one call for -log p is F.linear_cross_entropy(hidden, head, targets, reduction="none"), torch >= 2.13."""

    @staticmethod
    def forward(ctx, hidden, head, targets):
        chunk = max(1, LOGIT_BYTES // (4 * len(head)))
        ctx.sizes = [len(targets) % chunk] + [chunk] * (len(targets) // chunk)      # the last is full, if any is
        matrix, target_logits, normalisers = head.to(hidden.dtype), [], []
        for h, target in zip(hidden.split(ctx.sizes), targets.split(ctx.sizes)):
            logits = (h @ matrix.T).float()                                         # (chunk, V)
            target_logits.append(logits.gather(1, target[:, None])[:, 0])           # (chunk,)
            normalisers.append(logits.logsumexp(1))                                 # (chunk,)
        ctx.logits, normalisers = logits, torch.cat(normalisers)
        ctx.save_for_backward(hidden, head, targets, normalisers)
        return torch.cat(target_logits) - normalisers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):                                                        # (K,)
        hidden, head, *rest = ctx.saved_tensors
        matrix, d_hidden, d_head = head.to(hidden.dtype), [], torch.zeros_like(head)
        chunks = zip(*(tensor.split(ctx.sizes) for tensor in (hidden, *rest, grad)))
        for h, target, normaliser, g in reversed(list(chunks)):
            logits = (h @ matrix.T).float() if ctx.logits is None else ctx.logits
            ctx.logits = None
            # d log p / d logits = one-hot(target) - softmax(logits), in the place of the logits
            d = logits.sub_(normaliser[:, None]).exp_().mul_(-g[:, None])           # (chunk, V)
            d = d.scatter_add_(1, target[:, None], g[:, None]).to(h.dtype)
            d_hidden.insert(0, d @ matrix)
            d_head.addmm_(d.T, h) if d.dtype == d_head.dtype else d_head.add_(d.T @ h)
            del d, logits
        return torch.cat(d_hidden), d_head, None


def by_pair(values, examples):
    """(2N,) values of winners and losers, row by row, as (2, R, B)."""
    return values.view(-1, len(examples), 2).movedim(-1, 0)


def pair_logps(model, examples, pad_id):
    """Log-probability of each response of B examples of R encoded pairs, log π(y|x), in nats, and its number
    of tokens: two (2, R, B). Sum and count come together, so that a mean can only be over response tokens."""
    hidden, rows = read_pairs(model, examples, pad_id)
    hidden, kind = hidden.index_select(0, rows.sources), hidden.device.type                   # (K, D)
    if torch.is_autocast_enabled(kind):         # which does not reach into a Function's backward pass
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    token_logps = TokenLogps.apply(hidden, model.get_output_embeddings().weight, rows.targets)     # (K,)
    logps = torch.stack([response.sum() for response in token_logps.split(rows.lengths)])     # (2N,)
    return by_pair(logps, examples), by_pair(torch.tensor(rows.lengths, device=logps.device), examples)


def pair_rewards(model, examples, pad_id):
    """Rewards r(x, y) of a sequence-classification model, off the last token of each response, and tokens, as
    `pair_logps` gives log-probs."""
    hidden, rows = read_pairs(model, examples, pad_id)
    rewards = model.score(hidden.index_select(0, rows.ends))[:, 0].float()                    # (2N,)
    return by_pair(rewards, examples), by_pair(torch.tensor(rows.lengths, device=rewards.device), examples)


# ---- 6. Losses -----------------------------------------------------------------------------------

# A base loss takes three (2, ...) tensors, winners and losers: log-probs of policy and of reference, tokens.
# It returns losses (...) and detached implicit rewards (2, ...).

def dpo_loss(policy_logps, ref_logps, tokens, beta):
    """DPO (Rafailov et al. 2023), on summed log-probs. With policy = reference every loss is ln 2."""
    rewards = beta * (policy_logps - ref_logps)              # β log π_θ(y|x)/π_ref(y|x)
    return -F.logsigmoid(rewards[0] - rewards[1]), rewards.detach()          # DPO's Eq. 7


def ipo_loss(policy_logps, ref_logps, tokens, beta):
    """IPO (Azar et al. 2023), on means over response tokens. With policy = reference: 1/(4β²) a pair."""
    ratios = (policy_logps - ref_logps) / tokens             # mean log π_θ/π_ref of a token
    return (ratios[0] - ratios[1] - 1 / (2 * beta)) ** 2, beta * ratios.detach()     # IPO's Eq. 17


BASE_LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss}             # L_base


def sft_loss(chosen_logps, chosen_tokens):
    """L_sft: minus the mean log-probability of a token of the winner."""
    return -chosen_logps / chosen_tokens


def sso_loss(policy_logps, ref_logps, tokens, beta, gamma, base="dpo", weights=1.0):
    """L_SSO (Eq. 1) of B queries. Tensors (2, R, B): winner and loser, rows of the pair table, queries.

    Returns losses (B,) and their parts, a dict of detached (R, B) tensors. With the one row of "policy" and
    γ = 0 this is L_base(x, y+, y-), the loss of step 4."""
    base, rewards = BASE_LOSSES[base](policy_logps, ref_logps, tokens, beta)     # L_base (R, B), (2, R, B)
    sft = sft_loss(policy_logps[0], tokens[0])                                   # L_sft (R, B)
    terms = weights * (base + gamma * sft)         # (R, B): L+ of Eq. 2, L- of Eq. 4; weights are 1 there
    losses = terms.sum(0)                          # (B,): L_SSO = L+ + L-, Eq. 1
    parts = {"loss": terms, "base": base, "sft": sft, "chosen_rewards": rewards[0],
             "rejected_rewards": rewards[1], "chosen_logps": policy_logps[0], "rejected_logps": policy_logps[1]}
    return losses, {name: part.detach() for name, part in parts.items()}


def joint_weights(policy_logps, tokens, g=0.1, alpha=0.66):
    """Version 1's weights (3, B) of its terms L, L+, L-: 1, W·g, W·g, where
    W = σ(−(α m(y+|x) + (1−α) m(y−|x))) and m is a mean token log-prob. W has a gradient, as in its code."""
    chosen, rejected = (policy_logps / tokens)[:, 0]                  # m(y+|x), m(y-|x): (B,) of the row L
    W = torch.sigmoid(-(alpha * chosen + (1 - alpha) * rejected))
    return torch.stack([torch.ones_like(W), g * W, g * W])


def reward_loss(rewards):
    """Bradley–Terry, −log σ(r(x, y_w) − r(x, y_l)), of rewards (2, R, B): losses (B,) and parts (R, B)."""
    losses = -F.logsigmoid(rewards[0] - rewards[1])                   # (R, B)
    parts = {"loss": losses, "chosen_rewards": rewards[0], "rejected_rewards": rewards[1]}
    return losses.sum(0), {name: part.detach() for name, part in parts.items()}
