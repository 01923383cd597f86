"""The offline world: a tiny chat model, trained from scratch in a minute or two.

    python toy.py base --out runs/toy-base [--seed 0]
    python toy.py study --seeds 5 [--rounds 6] [--plot FILE]       # the paper's tables in miniature: study.py

A program grades its answers to four list tasks. It shows SSO's mechanism end to end without a download; it is
no evidence for the paper. Without a principle the model is sometimes right, often slightly wrong, lazy or
rambling; under a good principle mostly right; under a bad one it mostly answers in ways that it never uses
unasked. It has also learned to write principles. The checkpoint is a Qwen3 folder; `toy_world` in its
config.json tells the scripts to use this file's prompts, settings and grader in place of the paper's.
"""

import argparse
import os
import random
import re

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import sso

# ---- What replaces the paper's prompts and settings ----------------------------------------------

PROMPTS = {"guideline": "### query {query} ### bad guideline", "good": "{principle}", "bad": "{principle}",
           "fallback_good": "give the list in order", "fallback_bad": "forget the list"}
# The paper's learning rate of 5e-7 does nothing to 0.1 M parameters. How they were chosen: README.
SETTINGS = {
    "principles": sso.SETTINGS["principles"] | {"batch_size": 256, "max_new_tokens": 40},
    "responses": sso.SETTINGS["responses"] | {"batch_size": 256, "max_new_tokens": 24},
    "generator": sso.SETTINGS["generator"] | {"lr": 6e-4, "epochs": 4, "weight_decay": 0.0, "warmup": 0.1,
                                              "micro_batch_tokens": 16384},
    "policy": sso.SETTINGS["policy"] | {"lr": 3e-4, "batch_size": 32, "weight_decay": 0.0, "warmup": 0.1,
                                        "micro_batch_tokens": 16384},
    "reward": sso.SETTINGS["reward"] | {"lr": 1e-3, "epochs": 3, "batch_size": 32, "weight_decay": 0.0,
                                        "warmup": 0.1, "micro_batch_tokens": 16384},
}
QUERIES, HELDOUT = 1024, 1024

# ---- The tasks -----------------------------------------------------------------------------------

CATEGORIES = {"fruits": "apple banana cherry fig grape lemon mango plum".split(),
              "animals": "bear cat dog fox goat horse lion wolf".split(),
              "colors": "black blue brown green pink red white yellow".split(),
              "tools": "axe drill file hammer knife rake saw wrench".split()}
ITEMS = {item: category for category, items in CATEGORIES.items() for item in items}
TASKS = {"sort": ["sort these words : ", "put in order : "],
         "reverse": ["reverse these words : ", "say backwards : "],
         "name": ["name three {cat} except : ", "list three {cat} but not : "],
         "filter": ["keep only the {cat} : ", "pick the {cat} from : "]}
TASK_OF = {phrase.split()[0]: task for task, phrases in TASKS.items() for phrase in phrases}

GOOD_PRINCIPLES = {
    "sort": ["put every word in order from a to z", "go from a to z and use each word once",
             "order the words by letter and drop none"],
    "reverse": ["start with the last word and go back to the first", "turn the words around and drop none",
                "say each word once from last to first"],
    "name": ["give three {cat} that are not in the query", "choose three new {cat} and use each once",
             "find three other {cat} and add no more"],
    "filter": ["use each word that is one of the {cat} and drop the rest", "keep all {cat} and nothing else",
               "check each word and say only the {cat}"]}
BAD_PRINCIPLES = {   # kind of answer -> principles; {topic} ties them to the task
    "chatter": ["chat about {topic} and give no list", "talk of the weather in place of {topic}"],
    "refuse": ["say that you can not help with {topic}"],
    "loop": ["say one word of {topic} again and again"],
    "pirate": ["talk like a pirate about {topic}", "be a pirate and speak of {topic}"],
    "drama": ["make a drama of {topic}", "be loud and full of noise about {topic}"],
    "lazy": ["copy the query and do not care about {topic}"]}
TOPICS = {"sort": "the order", "reverse": "the last word", "name": "three {cat}", "filter": "the {cat}"}

CHATTER = ("well the weather is so nice today and i like to talk with you about it for a while "
           "my friend").split()
FILLER = "and i hope that this is of some use to you today my good friend".split()
ANSWERS = {"good": "{listed} .", "slip": "{listed} .", "lazy": "{items} .", "ramble": "{listed} {filler} .",
           "chatter": "{chatter} .", "refuse": "sorry but i can not help with that .", "loop": "{loop}",
           "pirate": "arr matey {listed} arr .", "drama": "oh my ! {listed} ! ! !"}

# How the model answers without a principle, under a good one, and under a lazy one.
UNASKED = {"good": .14, "slip": .32, "lazy": .36, "ramble": .17, "off": .01}
UNDER_GOOD = {"good": .78, "slip": .14, "lazy": .03, "ramble": .05}
UNDER_LAZY = {"good": .05, "slip": .25, "lazy": .55, "ramble": .15}
OBEYED = .95         # share of bad principles that are followed; the rest is answered as if unasked
# World -> share of each kind of bad principle. The model learns in the first; in the others, the controls, its
# principles are written by hand. In "on-policy" every bad principle asks for what the model does unasked:
# rejected responses are on-policy without SSO, whose advantage has to vanish. Bad principles of "junk" ask for
# worthless answers (PBAA's pairs are all accurate), those of "style" for right ones in an odd style.
WORLDS = {"default": {"chatter": .20, "refuse": .15, "loop": .10, "pirate": .25, "drama": .20, "lazy": .10},
          "on-policy": {"lazy": 1.}, "junk": {"chatter": .4, "refuse": .3, "loop": .3},
          "style": {"pirate": .5, "drama": .5}}


def parse(query):
    """(task, category or None, items) of a query's text."""
    words = query.split()
    if not words or words[0] not in TASK_OF or ":" not in words:
        raise sso.UserError(f"{query[:60]!r} is not a query of the toy world, the only ones its model is for")
    category = next((word for word in words if word in CATEGORIES), None)
    return TASK_OF[words[0]], category, words[words.index(":") + 1:]


def make_query(rng):
    """A random query: the items always stand at its end."""
    task, cat = rng.choice(list(TASKS)), rng.choice(list(CATEGORIES))
    if task == "filter":     # two of the four words belong to the category
        items = rng.sample(CATEGORIES[cat], 2) + rng.sample([w for w in ITEMS if ITEMS[w] != cat], 2)
        rng.shuffle(items)
    else:
        items = rng.sample(CATEGORIES[cat], 3) if task == "name" else rng.sample(list(ITEMS), 4)
    return rng.choice(TASKS[task]).format(cat=cat) + " ".join(items)


def solve(query, rng):
    """A right answer, as a list of words."""
    task, cat, items = parse(query)
    if task == "sort":
        return sorted(items)
    if task == "reverse":
        return items[::-1]
    if task == "filter":
        return [w for w in items if ITEMS[w] == cat]
    return rng.sample([w for w in CATEGORIES[cat] if w not in items], 3)


def grade(query, response, finished=True):
    """Quality of a response in [0, 1], from its text alone: share of right content, less for more than three
    extra words, less a tenth unless it ends with a full stop and an end-of-turn token."""
    task, cat, items = parse(query)
    words = response.split()
    given = [w for w in words if w in ITEMS]
    extra = sum(w.isalpha() and w not in ITEMS for w in words)
    if task in ("sort", "reverse"):
        right = solve(query, None)
        content = sum(a == b for a, b in zip(given, right)) / max(len(given), len(right))
    elif task == "filter":
        right = solve(query, None)
        content = len(set(given) & set(right)) / len(set(given) | set(right))
        content *= len(set(given)) / max(1, len(given))
    else:
        right = set(CATEGORIES[cat]) - set(items)
        content = len(set(given) & right) / max(3, len(given))
    size = 3 if task == "name" else len(right)
    content *= size / (size + 0.5 * max(0, extra - 3))
    return content * (1. if finished and words and words[-1] == "." else 0.9)


# ---- What the model learns from ------------------------------------------------------------------

def draw(rng, shares):
    return rng.choices(list(shares), list(shares.values()))[0]


def principle(query, rng, kind):
    """A principle's text for a query: a good one, or a bad one of the given kind."""
    task, cat, _ = parse(query)
    text = rng.choice(GOOD_PRINCIPLES[task] if kind == "good" else BAD_PRINCIPLES[kind])
    return text.format(topic=TOPICS[task].format(cat=cat), cat=cat)


def write_principles(query, world, seed):
    """A record of principles for a query, written by hand in a world."""
    rng = random.Random(f"{world} {seed} {query}")
    return {"prompt": query, "good_principle": principle(query, rng, "good"),
            "bad_principle": principle(query, rng, draw(rng, WORLDS[world]))}


def answer(query, rng, mode):
    """An answer's text in one of the modes."""
    task, cat, items = parse(query)
    words = solve(query, rng)
    if mode == "off":
        mode = draw(rng, {kind: 1. for kind in BAD_PRINCIPLES if kind != "lazy"})
    if mode == "slip":
        if task in ("sort", "reverse"):        # two neighbours swapped
            i = rng.randrange(3)
            words[i], words[i + 1] = words[i + 1], words[i]
        elif len(words) > 1 and rng.random() < .5:
            words.pop(rng.randrange(len(words)))
        else:                                  # one wrong word
            words[rng.randrange(len(words))] = rng.choice([w for w in ITEMS if w not in words])
    listed = " ".join(words)
    start = rng.randrange(4)
    blanks = {"listed": listed, "items": " ".join(items), "filler": " ".join(FILLER[:rng.randint(7, 10)]),
              "chatter": " ".join(CHATTER[start:start + rng.randint(7, 12)]),
              "loop": " ".join([rng.choice(items)] * rng.randint(6, 9))}
    return ANSWERS[mode].format(**blanks)


def make_chat(rng):
    """One training example: (system or None, user, assistant)."""
    query = make_query(rng)
    share = rng.random()
    if share < .38:
        return None, query, answer(query, rng, draw(rng, UNASKED))
    good, kind = principle(query, rng, "good"), draw(rng, WORLDS["default"])
    bad = principle(query, rng, kind)
    if share < .68:
        return good, query, answer(query, rng, draw(rng, UNDER_GOOD))
    if share < .90:
        if rng.random() > OBEYED:
            mode = draw(rng, UNASKED)
        else:
            mode = draw(rng, UNDER_LAZY) if kind == "lazy" else kind
        return bad, query, answer(query, rng, mode)
    return None, PROMPTS["guideline"].format(query=query), f"{bad} ### good guideline {good}"


# ---- Tokenizer, model, training ------------------------------------------------------------------

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_tokenizer():
    """A word-level tokenizer over exactly the words of this file, with a ChatML template."""
    texts = ["system user assistant ### good guideline", *ITEMS, *CATEGORIES, *PROMPTS.values(),
             *TOPICS.values(), *ANSWERS.values(), *CHATTER, *FILLER]
    for table in (TASKS, GOOD_PRINCIPLES, BAD_PRINCIPLES):
        texts += [text for alternatives in table.values() for text in alternatives]
    words = {word for text in texts for word in re.sub(r"{\w+}", " ", text).split()}
    vocab = {word: i for i, word in enumerate(SPECIALS + sorted(words))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"], chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False)


def encode_chat(vocab, system, user, assistant):
    """(prompt ids, response ids): what the chat template gives, forty times faster (a test compares them)."""
    turns = [("system", system)] if system else []
    prompt = "".join(f"<|im_start|> {role} {text} <|im_end|> " for role, text in turns + [("user", user)])
    return ([vocab[word] for word in f"{prompt} <|im_start|> assistant".split()],
            [vocab[word] for word in f"{assistant} <|im_end|>".split()])


def batches(chats, size, rng):
    """Shuffled batches of chats of like length, each (input_ids, labels) of shape (N, T), as transformers has them."""
    order = sorted(range(len(chats)), key=lambda i: (len(chats[i][0]) + len(chats[i][1]), rng.random()))
    groups = [order[i:i + size] for i in range(0, len(order), size)]
    rng.shuffle(groups)
    ids = [torch.tensor(prompt + response) for prompt, response in chats]
    labels = [torch.tensor([-100] * len(prompt) + response) for prompt, response in chats]
    return [(pad_sequence([ids[i] for i in group], batch_first=True),
             pad_sequence([labels[i] for i in group], batch_first=True, padding_value=-100)) for group in groups]


def use_one_thread():
    """Tensors this small gain little from a second thread, and lose a factor of dozens when another program
    runs on its core."""
    torch.set_num_threads(1)


def build(out, seed=0, steps=3000, batch_size=64):
    """Train the base model on synthetic chats and save it as a checkpoint folder."""
    use_one_thread()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    vocab = tokenizer.get_vocab()
    chats = [encode_chat(vocab, *make_chat(rng)) for _ in range(60_000)]
    end, pad = vocab["<|im_end|>"], vocab["<|endoftext|>"]
    # Qwen3 is Qwen2 with a norm on queries and keys. Not Qwen2, since transformers 5 gives a checkpoint of
    # that type its own byte-level tokenizer, whatever tokenizer.json says.
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(vocab), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, intermediate_size=170, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.05, bos_token_id=None,
        eos_token_id=end, pad_token_id=pad, toy_world=True))
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01,
                                  fused=True)
    warmup_then_linear = lambda step: min((step + 1) / 50, 1, (steps - step) / (0.7 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_linear)
    queue = []
    bar = tqdm(range(steps), desc="toy base")
    for _ in bar:
        if not queue:
            queue = batches(chats, batch_size, rng)
        input_ids, labels = queue.pop()
        hidden = model.base_model(input_ids, use_cache=False).last_hidden_state[:, :-1]     # (N, T-1, D)
        scored = labels[:, 1:] != -100      # position t predicts token t+1
        loss = F.cross_entropy(model.lm_head(hidden[scored]), labels[:, 1:][scored])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(f"{out}.tmp")     # renamed when whole: a kill never leaves half a model
    tokenizer.save_pretrained(f"{out}.tmp")
    os.replace(f"{out}.tmp", out)


def make_queries(seed=0, rounds=1):
    """The queries of a run's rounds and its held-out queries, without any query twice."""
    rng, queries = random.Random(f"queries {seed}"), {}
    while len(queries) < HELDOUT + rounds * QUERIES:
        queries[make_query(rng)] = None
    return list(queries)[HELDOUT:], list(queries)[:HELDOUT]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("base", help="train the base model from scratch")
    command.add_argument("--out", required=True, metavar="DIR", help="folder to save the checkpoint in")
    command.add_argument("--seed", type=int, default=0)
    import study        # which needs the scripts, which need this file
    study.add_arguments(commands.add_parser("study", help="the paper's tables in miniature"))
    args = vars(parser.parse_args())
    if args.pop("command") == "study":
        return study.run(**args)
    if os.path.exists(args["out"]):
        parser.error(f"--out {args['out']} exists")
    build(**args)


if __name__ == "__main__":
    import generate
    generate.run(main)
