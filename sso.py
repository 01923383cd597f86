"""Self-Steering Optimization (SSO): the paper as pure functions of torch, in its own order.

    python sso.py       # a worked example in numbers: no files, no network, a few seconds

Paper: Xiang et al., Findings of ACL 2025, arXiv 2410.17131v2; "Eq." are its equations.

Notation
    x             a query
    p+, p-        a good and a bad principle, written for this query
    x+, x-        the query under p+, under p-
    y+, y-, yo    the responses of the policy under x+, under x-, and to x alone
    role          names a prompt and the response sampled under it: "good" is x+ and y+, "bad" is
                  x- and y-, "original" is x and yo
    π_θ, π_ref    the model that is trained, and the same model before its training
    log π(y|x)    the log-probability of the whole response, in nats

Shapes
    B queries; R pairs a query, one for each term of its objective (PAIRS); N = 2·R·B responses;
    T tokens of a padded sequence; V entries of the vocabulary. A leading 2: (winner, loser).

The columns of a file are named as in any preference data set, with `original` as one more.
Not here: queries of several turns, several pairs packed into one sequence.
"""

import json
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


# ---- 1. Principles (Section 4.1, Table 8) --------------------------------------------------------

# A recipe may replace any of these texts. {query} and {principle} are filled in.
PROMPTS = {
    # Asks for principles ("guidelines"). Worked examples (recipes/paper.toml has eight) are earlier
    # turns of the conversation. Each has a query, a bad and a good principle. The model continues
    # an answer that is begun for it: first after "Bad guideline:", then after "Good guideline:".
    # Each of the two stops at the text "end".
    "principles": {
        "system": "For each query write two guidelines for an assistant that is going to answer "
                  "it. Following the bad guideline must make the answer worse, following the good "
                  "guideline must make it better. Both fit this one query, are comprehensive and "
                  "detailed, and are built alike.",
        "examples": [],
        "answer": "Bad guideline: {bad}\nGood guideline: {good}",
        "end": "\n"},
    # Used when the model wrote no usable pair of principles.
    "fallback_good": "Be as helpful as you can: answer exactly what is asked, correctly and "
                     "completely.",
    "fallback_bad": "Be of little help: answer beside the point, vaguely and incompletely.",

    # The prompt of each role, x+, x- and x: a system message ("" for none) and a user message.
    "good": {
        "system": "Write a relatively good response to the user by following the guidelines below. "
                  "Never mention the guidelines and never hint that they exist.\n\n"
                  "Guidelines: {principle}",
        "user": "{query}"},
    "bad": {
        "system": "Write a relatively bad response to the user by following the guidelines below. "
                  "Never mention the guidelines and never hint that they exist.\n\n"
                  "Guidelines: {principle}",
        "user": "{query}"},
    "original": {"system": "", "user": "{query}"},

    # The judge (Section 6.3, Table 9) names the better one of two anonymous outputs.
    "judge": {
        "system": "You compare answers of language models and name the better one, as careful "
                  "people would.",
        "user": """\
Two language models were given the same instruction. Their outputs follow, each under an \
identifier, in no particular order. Decide which output people would prefer.

## Instruction
{query}

## Outputs
[{"identifier": "m", "output": {m}},
 {"identifier": "M", "output": {M}}]

## Task
Weigh how correct, relevant and helpful each output is. Your answer is used as a name in a \
ranking, so write the identifier of the better output, m or M, and nothing else: no quotes, no \
explanation.

## Identifier of the better output"""},
}


def fill(template, **texts):
    """Replace each {name} in a template by the text of that name. Braces in a text stay."""
    return re.sub(r"{(\w+)}", lambda found: texts.get(found[1], found[0]), template)


def principle_messages(query, prompts=PROMPTS):
    """Chat messages that ask a model for the bad and the good principle of a query (Table 8)."""
    form = prompts["principles"]
    messages = []
    if form["system"]:
        messages.append({"role": "system", "content": form["system"]})
    for example in form["examples"]:
        messages.append({"role": "user", "content": example["query"]})
        messages.append({"role": "assistant", "content": fill(form["answer"], **example)})
    return messages + [{"role": "user", "content": query}]


# ---- 2. Prompts x+, x-, x and the table of preference pairs --------------------------------------

# role -> column of a record, which is a line of a preference file. `original` is a column of ours.
COLUMNS = {"good": "chosen", "bad": "rejected", "original": "original"}


class Response(NamedTuple):
    text: str
    finished: bool      # whether it ended its turn; if not, the length limit cut it off


class Pair(NamedTuple):
    """Under the prompt the winner is preferred to the loser: roles, texts, or token ids."""
    prompt: Any
    winner: Any
    loser: Any


# Step 4, and PBAA. The prompt has no principle. The policy learns to answer a plain query as it
# answered under a good principle, and not as it answered under a bad one.
L = Pair("original", winner="good", loser="bad")

# Eq. 2. Under a good principle say y+ rather than y-. This keeps the pairs accurate: the answers
# under p+ and under p- stay apart, and the better one is the answer under p+.
L_PLUS = Pair("good", winner="good", loser="bad")

# Eq. 4. Under a bad principle say yo, what the policy says when nobody steers it, rather than y+.
# So the generator's bad responses become *on-policy*: the policy would say them anyway. That
# matters because step 4 pushes them down. Pushing down what the policy never says teaches little.
L_MINUS = Pair("bad", winner="original", loser="good")

# Eq. 3, the obvious alternative: under a bad principle say y- rather than y+. It also pushes y+ and
# y- apart. But nothing ties y- to the policy: it stays where a bad principle puts it.
L_MINUS_EQ3 = Pair("bad", winner="bad", loser="good")

# A baseline of ours, without a generator: y+ against yo. yo is on-policy by itself.
L_ORIGINAL = Pair("original", winner="good", loser="original")

# objective -> {term of the loss: preference pair}. A new objective is a new entry.
PAIRS = {
    "sso": {"L+": L_PLUS, "L-": L_MINUS},               # Eq. 1: the data generator
    "plus": {"L+": L_PLUS},                             # Table 3: one of its terms alone
    "minus": {"L-": L_MINUS},                           # Table 3: the other
    "eq3": {"L+": L_PLUS, "L-": L_MINUS_EQ3},           # Table 4: Eq. 3 in place of Eq. 4
    "policy": {"L": L},                                 # step 4; without step 3 this is PBAA
    "original": {"L": L_ORIGINAL},                      # our baseline
}


# L+ and L- together are Eq. 1: L+ keeps y+ and y- apart, and L- pulls y- to the policy. Alone, L+
# drives y- away from the policy, and L- lets y+ sink to yo (docs/RESULTS.md). Both train one model,
# so each also moves what the other is about. The paper's Limitations suggest two generators;
# lab/study.py tries them.

def trains_generator(objective):
    """Whether an objective trains a data generator, which only answers x+ and x-, never x."""
    return all(pair.prompt != "original" for pair in PAIRS[objective].values())


def role_messages(role, record, prompts=PROMPTS):
    """The prompt of a role, x+, x- or x, as chat messages. ValueError if it lacks a principle."""
    *earlier, query = record["prompt"]
    principle = record.get(f"{role}_principle", "")
    if role != "original" and (not isinstance(principle, str) or not principle.strip()):
        raise ValueError(f"a record without '{role}_principle'; `generate.py principles` writes it")
    texts = {"query": query["content"], "principle": principle}
    system = fill(prompts[role]["system"], **texts)
    messages = earlier + [query | {"content": fill(prompts[role]["user"], **texts)}]
    if system and earlier and earlier[0]["role"] == "system":       # the user's own
        messages[0] = {"role": "system", "content": f"{system}\n\n{earlier[0]['content']}"}
    elif system:
        messages = [{"role": "system", "content": system}] + messages
    return messages


def judge_messages(query, m, M, prompts=PROMPTS):
    """Chat messages that ask which of two outputs, called "m" and "M", is better (Table 9)."""
    texts = {"query": query, "m": m, "M": M}
    for name, text in texts.items():        # as JSON, so that no text can end its own field, and
        text = json.dumps(text, ensure_ascii=False)     # none can write <|im_end|> or [INST]
        texts[name] = text.replace("<", "\\u003c").replace("[", "\\u005b")
    return [{"role": "system", "content": prompts["judge"]["system"]},
            {"role": "user", "content": fill(prompts["judge"]["user"], **texts)}]


def record_response(record, role):
    column = COLUMNS[role]
    return Response(record[column][-1]["content"], record.get(f"{column}_finished", True))


def preference_pairs(record, objective, prompts=PROMPTS):
    """The R pairs (prompt messages, winner, loser) of a record: the entries of PAIRS, with texts in
    place of roles."""
    pairs = []
    for roles in PAIRS[objective].values():
        pairs.append(Pair(role_messages(roles.prompt, record, prompts),
                          winner=record_response(record, roles.winner),
                          loser=record_response(record, roles.loser)))
    return pairs


# ---- 3. Encoding ---------------------------------------------------------------------------------

def encode_prompt(tokenizer, messages):
    """Token ids of a prompt up to where the response starts, by the tokenizer's chat template."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=False)    # Qwen3 thinks unless told not to


# Prompt and response are tokenised separately, and their ids are joined. If they were tokenised
# together, a token might lie across the boundary. Then other tokens than the sampled ones would be
# trained.

def encode_response(tokenizer, end_id, response):
    """Token ids of a response. A finished one ends with one end-of-turn token, which is trained
    like any other. One that was cut off has none."""
    ids = tokenizer(response.text, add_special_tokens=False).input_ids
    if response.finished:
        ids = ids + [end_id]
    return ids


def encode_pair(tokenizer, end_id, pair, max_length):
    """A pair as token ids. Prompt and response have at most max_length tokens: the end of a
    response that is too long is cut off. If the prompt leaves no room, the responses are empty."""
    prompt = encode_prompt(tokenizer, pair.prompt)
    room = max(0, max_length - len(prompt))
    winner = encode_response(tokenizer, end_id, pair.winner)
    loser = encode_response(tokenizer, end_id, pair.loser)
    return Pair(prompt, winner[:room], loser[:room])


# ---- 4. Log-probabilities ------------------------------------------------------------------------

def pair_logps(model, examples, pad_id):
    """log π(y|x), in nats, of every response of B examples, and how many tokens each has: two
    tensors (2, R, B). An example is R pairs of token ids. logps / tokens is a mean over tokens."""
    # A row for each response: [prompt | response | padding], winner and loser one after the other.
    rows = []
    for example in examples:
        for prompt, winner, loser in example:
            rows += [(prompt, winner), (prompt, loser)]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id, device=model.device)                 # (N, T)
    is_response = torch.zeros_like(input_ids, dtype=torch.bool)                             # (N, T)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        is_response[row, len(prompt):end] = True

    # Attention is causal, so no token sees the padding behind it. The logits are by far the largest
    # tensor: 8 rows of 1,024 tokens by Qwen's 151,936 entries are 5 GB. plumbing/fast.py avoids
    # them.
    logits = model(input_ids=input_ids, use_cache=False).logits.float()                  # (N, T, V)
    logps = logits[:, :-1].log_softmax(-1)      # position t predicts token t+1         (N, T-1, V)
    token_logps = logps.gather(2, input_ids[:, 1:, None])[:, :, 0]                        # (N, T-1)
    token_logps = token_logps.masked_fill(~is_response[:, 1:], 0.0)                       # (N, T-1)

    # Rows were laid out example by example, pair by pair, winner before loser: N = B · R · 2.
    shape = (len(examples), len(examples[0]), 2)
    sums = token_logps.sum(1).view(shape).permute(2, 1, 0)                               # (2, R, B)
    counts = is_response.sum(1).view(shape).permute(2, 1, 0)                             # (2, R, B)
    return sums, counts


# ---- 5. Losses -----------------------------------------------------------------------------------

# A base loss, L_base(prompt, winner, loser), takes three tensors (2, ...): log-probs under the
# policy, log-probs under the reference, and numbers of tokens. Then come the settings that it
# names; `others` takes the rest. It returns losses (...) and detached implicit rewards (2, ...).

def dpo_loss(policy_logps, ref_logps, tokens, beta, **others):
    """DPO (Rafailov et al. 2023), on summed log-probs. With policy = reference: ln 2 a pair."""
    rewards = beta * (policy_logps - ref_logps)                     # β log π_θ(y|x) / π_ref(y|x)
    margin = rewards[0] - rewards[1]
    return -F.logsigmoid(margin), rewards.detach()                  # DPO's Eq. 7


def ipo_loss(policy_logps, ref_logps, tokens, beta, **others):
    """IPO (Azar et al. 2023), on means over response tokens. With policy = reference: 1/(4β²)."""
    ratios = (policy_logps - ref_logps) / tokens                   # mean log π_θ / π_ref of a token
    margin = ratios[0] - ratios[1]
    return (margin - 1 / (2 * beta)) ** 2, beta * ratios.detach()   # IPO's Eq. 17


BASE_LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss}    # a new base loss is a new function here,
REFERENCE_FREE = set()                              # and here too if it does not look at ref_logps


def sft_loss(chosen_logps, chosen_tokens):
    """L_sft: minus the mean log-probability of a token of the winner."""
    return -chosen_logps / chosen_tokens


def sso_loss(policy_logps, ref_logps, tokens, base_loss, gamma, **settings):
    """L_SSO (Eq. 1) of B queries, from tensors (2, R, B). Returns losses (B,) and a dict of their
    parts, each (R, B) and detached. With the pair L and γ = 0 it is step 4's L_base(x, y+, y-)."""
    # L_base only looks at the difference of winner and loser, and is content if both fall. γ L_sft
    # keeps the winner itself probable, so that the generator goes on speaking like a model.
    preference, rewards = BASE_LOSSES[base_loss](policy_logps, ref_logps, tokens, **settings)
    sft = sft_loss(policy_logps[0], tokens[0])                      # (R, B)
    terms = preference + gamma * sft                              # (R, B): L+ of Eq. 2, L- of Eq. 4
    losses = terms.sum(0)                                           # (B,): L_SSO = L+ + L-, Eq. 1
    parts = {"loss": terms, "base": preference, "sft": sft,
             "chosen_rewards": rewards[0], "rejected_rewards": rewards[1],
             "chosen_logps": policy_logps[0], "rejected_logps": policy_logps[1]}
    return losses, {name: part.detach() for name, part in parts.items()}


# ---- A worked example: python sso.py -------------------------------------------------------------

START, END = 256, 257       # ids behind the 256 bytes


class ByteTokenizer:
    """One token a byte, and a ChatML template: all that is used above of a real tokenizer."""

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=list(text.encode()))

    def apply_chat_template(self, messages, **options):
        ids = []
        for message in messages:
            ids += [START, *f"{message['role']}\n{message['content']}".encode(), END]
        return ids + [START, *b"assistant\n"]

    def decode(self, ids):
        names = {START: b"<|im_start|>", END: b"<|im_end|>"}
        return b"".join(names.get(i, bytes([i % 256])) for i in ids).decode()


class TinyModel(torch.nn.Module):
    """A random transformer of one layer of attention."""
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(258, 64)
        self.position = torch.nn.Embedding(1024, 64)
        self.attention = torch.nn.Linear(64, 3 * 64)
        self.head = torch.nn.Linear(64, 258)

    def forward(self, input_ids, **options):
        positions = torch.arange(input_ids.shape[1])                            # (T,)
        hidden = self.embedding(input_ids) + self.position(positions)           # (N, T, D)
        query, key, value = self.attention(hidden).chunk(3, -1)
        hidden = hidden + F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return SimpleNamespace(logits=self.head(hidden))                        # (N, T, V)


EXAMPLE = {
    "prompt": [{"role": "user", "content": "How many legs does a spider have?"}],
    "good_principle": "Give the number and name the class of animals.",
    "bad_principle": "Talk about insects in place of spiders.",
    "chosen": [{"role": "assistant", "content": "Eight: spiders are arachnids."}],
    "rejected": [{"role": "assistant", "content": "Insects have six legs, and bees can fly."}],
    "original": [{"role": "assistant", "content": "Spiders have eight legs."}],
}


def print_numbers(logps, ref_logps, parts, gamma):
    """Print every number of Eq. 1, 2 and 4 for one query: tensors (2, R, 1), parts of
    `sso_loss`."""
    for row, (term, roles) in enumerate(PAIRS["sso"].items()):
        for side, name in enumerate(("winner", "loser")):
            logp, ref_logp = logps[side, row].item(), ref_logps[side, row].item()
            print(f"  {term} {name:6}   log π_θ {logp:9.3f}   log π_ref {ref_logp:9.3f}   "
                  f"changed by {logp - ref_logp:+.3f}")
        part = {name: values[row].item() for name, values in parts.items()}
        margin = part["chosen_rewards"] - part["rejected_rewards"]
        print(f"  {term} = L_base + γ · L_sft = {part['base']:.4f} + {gamma} · {part['sft']:.4f} = "
              f"{part['loss']:.4f}   (reward margin {margin:+.4f})")
    print(f"  L_SSO = L+ + L- = {parts['loss'].sum():.4f}")


def worked_example(beta=0.1, gamma=0.1):
    """One query, from its principles to one step of the data generator, in print."""
    torch.manual_seed(0)
    model, tokenizer = TinyModel(), ByteTokenizer()
    print("A record: a query x, its principles p+ and p-, the policy's responses y+, y- and yo\n")
    for name, value in EXAMPLE.items():
        print(f"  {name:15} {value}")
    for role, symbol in (("good", "x+"), ("bad", "x-"), ("original", "x")):
        prompt = encode_prompt(tokenizer, role_messages(role, EXAMPLE))
        print(f"\n{symbol}, the {role} prompt, by the chat template\n\n{tokenizer.decode(prompt)}")

    print("The generator's pairs (Eq. 1)\n")
    example = []
    for (term, roles), pair in zip(PAIRS["sso"].items(), preference_pairs(EXAMPLE, "sso")):
        ids = encode_pair(tokenizer, END, pair, max_length=4096)
        example.append(ids)
        print(f"  {term} under the {roles.prompt} prompt")
        print(f"      winner, the {roles.winner} response: {tokenizer.decode(ids.winner)}")
        print(f"      loser, the {roles.loser} response: {tokenizer.decode(ids.loser)}")

    logps, tokens = pair_logps(model, [example], pad_id=0)                      # (2, 2, 1) each
    ref_logps = logps.detach()              # the reference is the model before its first update
    loss, parts = sso_loss(logps, ref_logps, tokens, "dpo", gamma, beta=beta)
    print("\nStep zero. Policy = reference: margins are 0, and L_base is ln 2 = 0.6931\n")
    print_numbers(logps, ref_logps, parts, gamma)
    loss.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
        logps, _ = pair_logps(model, [example], pad_id=0)
    _, parts = sso_loss(logps, ref_logps, tokens, "dpo", gamma, beta=beta)
    print("\nAfter one step. Winners have become more probable and losers less, under both "
          "prompts:\ny+ rises under x+, where it wins, and falls under x-, where it loses.\n")
    print_numbers(logps, ref_logps, parts, gamma)


if __name__ == "__main__":
    worked_example()
