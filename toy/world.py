"""The offline world: a tiny chat model, trained from scratch in about two minutes.

    python -m toy.world base --out runs/toy-base [--seed 0]         # how toy/base was made
    python -m toy.world principles --world on-policy --queries Q.jsonl --out written.jsonl

There are four tasks with lists. A program grades the answers: this file is a grader (`--grader
toy/world.py`). The world shows SSO's mechanism end to end without a download. It is no evidence for
the paper. Without a principle the model is sometimes right, and often slightly wrong, lazy or
rambling. Under a good principle it is mostly right. Under a bad one it mostly answers in ways that
it never uses otherwise. It has also learned to write principles. recipes/toy.toml has its prompts
and settings.
"""

import os
import random
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import sso
from plumbing import command
from plumbing.outputs import Output
from plumbing.recipes import load_toml, read_recipe
from plumbing.records import UserError, as_lines, read_queries, write_text

BASE = Path(__file__).with_name("base")         # the trained model, seed 0
RECIPE = Path(__file__).parent.parent / "recipes" / "toy.toml"
PROMPTS = read_recipe(RECIPE)["prompts"]
WORLD = load_toml(Path(__file__).with_suffix(".toml"))      # the texts and shares of this world
TASKS, ANSWERS, WORLDS = WORLD["tasks"], WORLD["answers"], WORLD["worlds"]
GOOD_PRINCIPLES, BAD_PRINCIPLES = WORLD["good_principles"], WORLD["bad_principles"]
QUERIES, HELDOUT = 1024, 1024


# ---- The tasks -----------------------------------------------------------------------------------

CATEGORIES = {category: items.split() for category, items in WORLD["categories"].items()}
CATEGORY_OF = {}            # item -> category
for category, items in CATEGORIES.items():
    CATEGORY_OF |= dict.fromkeys(items, category)
ASKED = {}                  # what a query says before its items -> task, category or None
for task, phrases in TASKS.items():
    for phrase in phrases:
        known = [None]
        if "{cat}" in phrase:
            known = CATEGORIES
        ASKED |= {phrase.format(cat=category): (task, category) for category in known}


class Query(NamedTuple):
    task: str
    category: str           # None where the task has none
    items: list


def parse(text):
    """The `Query` of a query's text; UserError if it is none of this world."""
    asked, colon, items = text.partition(": ")
    items = items.split()
    if asked + colon not in ASKED or not items or not set(items) <= CATEGORY_OF.keys():
        raise UserError(f"{text[:60]!r} is not a query of the toy world, the only ones its "
                        "model is for")
    return Query(*ASKED[asked + colon], items)


def make_query(rng):
    """A random query's text: the items always stand at its end."""
    task, category = rng.choice(list(TASKS)), rng.choice(list(CATEGORIES))
    if task == "filter":                # two of the four words belong to the category
        others = [item for item in CATEGORY_OF if CATEGORY_OF[item] != category]
        items = rng.sample(CATEGORIES[category], 2) + rng.sample(others, 2)
        rng.shuffle(items)
    elif task == "name":
        items = rng.sample(CATEGORIES[category], 3)
    else:
        items = rng.sample(list(CATEGORY_OF), 4)
    return rng.choice(TASKS[task]).format(cat=category) + " ".join(items)


def solve(query, rng):
    """A right answer to a `Query`, as a list of words."""
    if query.task == "sort":
        return sorted(query.items)
    if query.task == "reverse":
        return query.items[::-1]
    if query.task == "filter":
        return [item for item in query.items if CATEGORY_OF[item] == query.category]
    return rng.sample([item for item in CATEGORIES[query.category] if item not in query.items], 3)


def grade(query, response, finished=True):
    """Quality of a response in [0, 1], from its text alone: the share of right content, less for
    more than three extra words, less a tenth unless it ends with a full stop and an end-of-turn
    token."""
    query, words = parse(query), response.split()
    given = [word for word in words if word in CATEGORY_OF]
    extra = [word for word in words if word.isalpha() and word not in CATEGORY_OF]
    if query.task == "name":
        right = set(CATEGORIES[query.category]) - set(query.items)
        size = 3
        content = len(set(given) & right) / max(3, len(given))
    else:
        right = solve(query, None)
        size = max(1, len(right))           # of a query without an answer: nothing is right
    if query.task in ("sort", "reverse"):
        matches = sum(a == b for a, b in zip(given, right))
        content = matches / max(len(given), len(right))
    if query.task == "filter":
        overlap = len(set(given) & set(right)) / max(1, len(set(given) | set(right)))
        content = overlap * len(set(given)) / max(1, len(given))        # less for repetitions
    content *= size / (size + 0.5 * max(0, len(extra) - 3))
    if not finished or not words or words[-1] != ".":
        content *= 0.9
    return content


# ---- What the model learns from ------------------------------------------------------------------

def draw(rng, shares):
    return rng.choices(list(shares), list(shares.values()))[0]


def principle(query, rng, kind):
    """A principle's text for a query's text: a good one, or a bad one of the given kind."""
    task, category, _ = parse(query)
    if kind == "good":
        return rng.choice(GOOD_PRINCIPLES[task]).format(cat=category)
    topic = WORLD["topics"][task].format(cat=category)
    return rng.choice(BAD_PRINCIPLES[kind]).format(topic=topic)


def write_principles(query, world, seed):
    """A record of principles for a query's text, written by hand in a world."""
    rng = random.Random(f"{world} {seed} {query}")
    return {"prompt": query, "good_principle": principle(query, rng, "good"),
            "bad_principle": principle(query, rng, draw(rng, WORLDS[world]))}


def slip(words, query, rng):
    """A right answer with one mistake."""
    if query.task in ("sort", "reverse"):           # two neighbours swapped
        i = rng.randrange(3)
        words[i], words[i + 1] = words[i + 1], words[i]
    elif len(words) > 1 and rng.random() < .5:      # one word less
        words.pop(rng.randrange(len(words)))
    else:                                           # one wrong word
        wrong = rng.choice([item for item in CATEGORY_OF if item not in words])
        words[rng.randrange(len(words))] = wrong
    return words


def answer(query, rng, mode):
    """An answer's text to a query's text in one of the modes: a key of ANSWERS, or "off"."""
    query = parse(query)
    words = solve(query, rng)
    if mode == "off":
        mode = draw(rng, {kind: 1. for kind in BAD_PRINCIPLES if kind != "lazy"})
    if mode == "slip":
        words = slip(words, query, rng)
    chatter, filler = WORLD["chatter"].split(), WORLD["filler"].split()
    start = rng.randrange(4)
    return ANSWERS[mode].format(
        listed=" ".join(words), items=" ".join(query.items),
        filler=" ".join(filler[:rng.randint(7, 10)]),
        chatter=" ".join(chatter[start:start + rng.randint(7, 12)]),
        loop=" ".join([rng.choice(query.items)] * rng.randint(6, 9)))


def make_chat(rng):
    """One training example: (system or None, user, assistant)."""
    query = make_query(rng)
    share = rng.random()
    if share < .38:
        return None, query, answer(query, rng, draw(rng, WORLD["unasked"]))
    good, kind = principle(query, rng, "good"), draw(rng, WORLDS["default"])
    bad = principle(query, rng, kind)
    if share < .68:
        return good, query, answer(query, rng, draw(rng, WORLD["under_good"]))
    if share < .90:
        mode = kind
        if rng.random() > WORLD["obeyed"]:
            mode = draw(rng, WORLD["unasked"])
        elif kind == "lazy":
            mode = draw(rng, WORLD["under_lazy"])
        return bad, query, answer(query, rng, mode)
    form = PROMPTS["principles"]
    return form["system"], query, sso.fill(form["answer"], bad=bad, good=good)


# ---- Tokenizer, model, training ------------------------------------------------------------------

STEPS = 3000
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def texts_of(value):
    """All the texts in a table of tables and lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return []
    return [text for part in value for text in texts_of(part)]


def make_tokenizer():
    """A word-level tokenizer over exactly the words of this world, with a ChatML template."""
    texts = ["system user assistant", *CATEGORIES, *texts_of(WORLD),
             *texts_of(PROMPTS["principles"]), PROMPTS["fallback_good"], PROMPTS["fallback_bad"]]
    words = {word for text in texts for word in re.sub(r"{\w+}", " ", text).split()}
    vocab = {word: i for i, word in enumerate(SPECIALS + sorted(words))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        unk_token="<unk>", additional_special_tokens=["<|im_start|>"], chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False)


def encode_chat(vocab, system, user, assistant):
    """(prompt ids, response ids), as the chat template gives them but forty times faster. A test
    compares the two."""
    prompt = f"<|im_start|> user {user} <|im_end|> <|im_start|> assistant"
    if system:
        prompt = f"<|im_start|> system {system} <|im_end|> {prompt}"
    response = f"{assistant} <|im_end|>"
    return [vocab[word] for word in prompt.split()], [vocab[word] for word in response.split()]


def make_batches(chats, size, rng):
    """Shuffled batches of chats of like length, each (input_ids, labels) of shape (N, T), as
    transformers has them."""
    def length(chat):
        return len(chat[0]) + len(chat[1]), rng.random()        # at random among equals

    ordered = sorted(chats, key=length)
    groups = [ordered[start:start + size] for start in range(0, len(chats), size)]
    rng.shuffle(groups)
    batches = []
    for group in groups:
        ids = [torch.tensor(prompt + response) for prompt, response in group]
        labels = [torch.tensor([-100] * len(prompt) + response) for prompt, response in group]
        batches.append((pad_sequence(ids, batch_first=True),
                        pad_sequence(labels, batch_first=True, padding_value=-100)))
    return batches


def make_model(tokenizer):
    """The untrained model. It is a Qwen3, which is Qwen2 with a norm on queries and keys:
    transformers 5 gives a checkpoint of Qwen2 its own byte-level tokenizer, whatever tokenizer.json
    says."""
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, intermediate_size=170, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.05, bos_token_id=None,
        eos_token_id=end, pad_token_id=pad))
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    return model


def build(out, seed=0, steps=STEPS, batch_size=64):
    """Train the base model on synthetic chats and save it as a checkpoint folder."""
    torch.set_num_threads(1)                    # see plumbing/models.py
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    vocab = tokenizer.get_vocab()
    chats = [encode_chat(vocab, *make_chat(rng)) for _ in range(60_000)]
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01,
                                  fused=True)

    def warm_up_then_linear(step):
        return min((step + 1) / 50, 1, (steps - step) / (0.7 * steps))

    schedule = LambdaLR(optimizer, warm_up_then_linear)
    queue = []
    bar = tqdm(range(steps), desc="toy base")
    for _ in bar:
        if not queue:
            queue = make_batches(chats, batch_size, rng)
        input_ids, labels = queue.pop()
        hidden = model.model(input_ids, use_cache=False).last_hidden_state[:, :-1]  # (N, T-1, D)
        targets = labels[:, 1:]                 # position t predicts token t+1
        scored = targets != -100                # (N, T-1): the response
        loss = F.cross_entropy(model.lm_head(hidden[scored]), targets[scored])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    model.save_pretrained(f"{out}.tmp")     # renamed when whole: a kill never leaves half a model
    tokenizer.save_pretrained(f"{out}.tmp")
    os.replace(f"{out}.tmp", out)


def base(out, seed: int = 0, steps: int = STEPS):
    """Train the base model from scratch unless it is there. UserError if another one is there."""
    output = Output(out, {"seed": seed, "steps": steps}, {})
    if not output.is_complete():
        output.write_note()
        build(out, seed, steps)


def make_queries(seed=0, rounds=1):
    """The queries of a run's rounds, and its held-out queries. No query is there twice."""
    rng, queries = random.Random(f"queries {seed}"), {}
    while len(queries) < HELDOUT + rounds * QUERIES:
        queries[make_query(rng)] = None
    return list(queries)[HELDOUT:], list(queries)[:HELDOUT]


def make_records(seed=0, rounds=1):
    """`make_queries` as records."""
    queries, heldout = make_queries(seed, rounds)
    return [{"prompt": query} for query in queries], [{"prompt": query} for query in heldout]


def principles(queries, world, out, seed: int = 0):
    """Write the principles of a control world, which are by hand."""
    if world not in WORLDS:
        raise UserError(f"--world '{world}' is none of {', '.join(WORLDS)}")
    texts = [record["prompt"][0]["content"] for record in read_queries(queries)]
    write_text(out, as_lines([write_principles(text, world, seed) for text in texts]))


if __name__ == "__main__":
    command.run(__doc__, base, principles)
