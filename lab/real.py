"""The method on real weights: SmolLM2, or any small chat model.

    python -m lab.real base --model models/smollm2 --out runs/miniature/base
    python -m lab.real arms --model runs/miniature/base --recipe lab/miniature.toml \
        --out runs/miniature/1 --seed 1
    python -m lab.real ways --model models/smollm2 --principles runs/facts/principles.jsonl \
        --grader lab/facts.py --out runs/ways/facts

`base` teaches a chat model the toy world's tasks and principles in plain English (a short
supervised training), so that it follows principles as the toy's base does; this file is their
grader. `arms` runs steps 1 to 4 from one model for PBAA, SSO, y+ over yo and L+ alone, in a grid of
learning rates if lists of them are given, and measures all of it; report.json has also what every
step took: seconds, tokens a second, the peak of memory. `ways` compares ways of giving a principle.
"""

import json
import random
import re
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import eval as evaluation
import generate
import sso
import train
from lab import results, toy
from plumbing import cli, files
from plumbing.chat import load_chat, load_tokenizer, micro_batches
from plumbing.checkpoint import save_model
from plumbing.tables import print_table

RECIPE = cli.read_recipe(Path(__file__).with_name("miniature.toml"))
WAYS = cli.load_toml(Path(__file__).with_name("ways.toml"))
ARMS = {"PBAA": "policy", "SSO": "sso", "y+ over yo": "original", "L+ only": "plus"}


# ---- The toy's texts as plain English ------------------------------------------------------------

def english(text):
    """A text of the toy world, where every sign is a word: "sort these words : fox axe"."""
    text = re.sub(r" (?=[:.!])", "", text)
    return text[:1].upper() + text[1:]


def words(text):
    """The toy's form of a text in English."""
    return " ".join(re.findall(r"\w+|[:.!]", text.lower()))


def grade(query, response, finished=True):
    return toy.grade(words(query), words(response), finished)


def make_chat(rng):
    """(messages, answer): one of the toy base's training examples, in English."""
    system, query, answer = toy.make_chat(rng)
    principles = re.fullmatch("bad guideline (.*) ### good guideline (.*)", answer)
    if principles:
        form = RECIPE["prompts"]["principles"]
        bad, good = map(english, principles.groups())
        messages = sso.principle_messages(english(query), RECIPE["prompts"])
        return messages, sso.fill(form["answer"], bad=bad, good=good)
    messages = [{"role": "user", "content": english(query)}]
    if system:
        messages = [{"role": "system", "content": english(system)}] + messages
    return messages, english(answer)


def base(model, out: Path, chats: int = 1600, lr: float = 2e-4, batch_size: int = 16,
         seed: int = 0):
    """Teach a chat model the toy's tasks and principles: minus the log-prob of a token of the
    answer."""
    if (out / "config.json").exists():
        print(f"{out}: complete")
        return
    chat = load_chat(model)
    rng = random.Random(seed)
    examples = []
    for _ in range(chats):
        messages, answer = make_chat(rng)
        ids = sso.encode_response(chat.tokenizer, chat.end_id, sso.Response(answer, finished=True))
        examples.append([sso.Pair(sso.encode_prompt(chat.tokenizer, messages), ids, ids[:1])])
    optimizer = train.make_optimizer(chat.model, weight_decay=0.0)
    batches = train.make_batches(chats, batch_size, 1, seed)
    bar = tqdm(batches, desc=str(out))
    for step, indices in enumerate(bar):
        batch = [examples[i] for i in indices]
        optimizer.zero_grad()
        total = 0.0
        for group in micro_batches(batch, 1024):
            logps, tokens = chat.pair_logps(chat.model, [batch[i] for i in group], chat.pad_id)
            loss = sso.sft_loss(logps[0], tokens[0]).sum() / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(chat.model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, len(batches), lr, warmup=0.05)
        optimizer.step()
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)
    out.mkdir(parents=True, exist_ok=True)
    save_model(chat, out)


# ---- Costs of a step -----------------------------------------------------------------------------

class Costs:
    """What steps took, kept in a file. A step that was complete before takes no time, and what it
    took at first stays; of one that was interrupted, the costs are those of its end."""

    def __init__(self, path):
        self.path, self.steps = Path(path), {}
        if self.path.exists():
            self.steps = json.loads(self.path.read_text())

    def measure(self, name, step, *args, **options):
        results.begin_peak()
        began = time.time()
        step(*args, **options)
        if name not in self.steps:
            self.steps[name] = {"seconds": time.time() - began, "peak bytes": results.peak_bytes()}
            self.save()

    def train(self, name, stage, model, data, out, recipe):
        """Step 3 or 4; its speed is that of the median update, in tokens of responses."""
        self.measure(name, train.train, stage, model, data, out, recipe)
        speeds = [row["tokens_per_second"] for row in files.read_jsonl(out / "log.jsonl", needs=())]
        self.steps[name]["tokens a second"] = statistics.median(speeds)
        self.save()

    def sample(self, name, model, data, out, recipe, roles):
        """Responses of some roles; their speed is over all of the step, with loading the model."""
        self.measure(name, generate.responses, model, data, out, recipe, roles)
        tokenizer, tokens = load_tokenizer(model), 0
        for record in files.read_jsonl(out):
            for role in roles:
                response = sso.record_response(record, role)
                tokens += len(tokenizer(response.text).input_ids) + response.finished
        self.steps[name]["tokens a second"] = tokens / self.steps[name]["seconds"]
        self.save()

    def save(self):
        files.write_text(self.path, json.dumps(self.steps, indent=1))


# ---- The arms ------------------------------------------------------------------------------------

def make_pairs(arm, lr, model, folder, recipe, costs):
    """Step 3 of an arm. Returns the file of its pairs, its generator's or the model's own, and the
    objective that a policy is trained with on them."""
    objective, responses = ARMS[arm], folder / "responses.jsonl"
    if not sso.trains_generator(objective):
        return responses, objective
    out = folder / arm / f"generator {lr:g}"
    own = cli.change(recipe, generator={"objective": objective, "lr": lr})
    costs.train(f"{arm}: generator {lr:g}", "generator", model, responses, out, own)
    pairs = out / "pairs.jsonl"
    costs.sample(f"{arm}: pairs of {lr:g}", out, responses, pairs, recipe, ("good", "bad"))
    return pairs, "policy"


def run_arm(arm, lrs, model, folder, recipe, costs):
    """Steps 3 and 4 of an arm for all pairs of learning rates: yields a cell's name, its pairs,
    their objective, and the folder of its policy, which has answers.jsonl."""
    generator_lrs, policy_lrs = lrs
    if not sso.trains_generator(ARMS[arm]):
        generator_lrs = [None]
    for generator_lr in generator_lrs:
        pairs, objective = make_pairs(arm, generator_lr, model, folder, recipe, costs)
        for lr in policy_lrs:
            cell = f"policy {lr:g}"
            if generator_lr:
                cell = f"generator {generator_lr:g}, policy {lr:g}"
            out = folder / arm / cell
            own = cli.change(recipe, policy={"objective": objective, "lr": lr})
            costs.train(f"{arm}, {cell}", "policy", model, pairs, out, own)
            costs.sample(f"{arm}, {cell}: answers", out, folder / "heldout.jsonl",
                         out / "answers.jsonl", recipe, ("original",))
            yield f"{arm}, {cell}", pairs, objective, out


def draw_queries(folder, queries, heldout, count, seed):
    """Write `count` of the queries, and of those held out, of files or of the miniature."""
    if queries:
        records, held = files.read_queries(queries), files.read_queries(heldout)
        random.Random(seed).shuffle(records)
    else:
        records, held = toy.make_records(seed)
        for record in records + held:
            record["prompt"] = english(record["prompt"])
    files.write_text(folder / "queries.jsonl", files.as_lines(records[:count]))
    files.write_text(folder / "heldout.jsonl", files.as_lines(held[:count]))


def read_lrs(text, recipe, stage):
    """The numbers of a list as "5e-6,2e-5"; without one, the recipe's."""
    if not text:
        return [recipe[stage]["lr"]]
    return [float(lr) for lr in text.split(",")]


def arms(model, recipe, out: Path, queries=None, heldout=None, principles=None, grader=__file__,
         count: int = 160, generator_lrs="", policy_lrs="", names=",".join(ARMS)):
    """Run the arms from one model: by default in the miniature, with `count` queries of each
    kind."""
    out, seed, costs = Path(out), recipe["run"]["seed"], Costs(Path(out, "costs.json"))
    critic, _ = evaluation.load_critic(grader=grader)
    draw_queries(out, queries, heldout, count, seed)
    write = generate.written_principles if principles else generate.principles
    costs.measure("principles", write, principles or model, out / "queries.jsonl",
                  out / "principles.jsonl", recipe)
    costs.sample("responses", model, out / "principles.jsonl", out / "responses.jsonl", recipe,
                 tuple(sso.COLUMNS))
    costs.sample("base: answers", model, out / "heldout.jsonl", out / "answers.jsonl", recipe,
                 ("original",))
    lrs = read_lrs(generator_lrs, recipe, "generator"), read_lrs(policy_lrs, recipe, "policy")
    answers, of_pairs, rows = {"base": out / "answers.jsonl"}, {}, {}
    for arm in names.split(","):
        for cell, pairs, objective, folder in run_arm(arm, lrs, model, out, recipe, costs):
            key = (pairs, objective)
            if key not in of_pairs:
                of_pairs[key] = evaluation.measure_pairs(pairs, model, critic, recipe, objective)
            last = files.read_jsonl(folder / "log.jsonl", needs=())[-1]
            after = {name: last[name] for name in last if name.startswith("p(original)")}
            rows[cell] = of_pairs[key] | {f"policy's {name}": after[name] for name in after}
            answers[cell] = folder / "answers.jsonl"
            write_report(out, model, recipe, costs, answers, rows, critic)
    evaluation.print_report(json.loads((out / "report.json").read_text())["rows"])


def write_report(out, model, recipe, costs, answers, rows, critic):
    """Write report.json, of the cells that are complete."""
    measures = evaluation.measure_answers(answers, critic)
    for name in rows:
        measures[name] |= rows[name]
    stages = ("run", "principles", "responses", "generator", "policy")
    report = {"rows": measures, "costs": costs.steps, "model": Path(model).name,
              "settings": {stage: recipe[stage] for stage in stages}}
    results.write(out / "report.json", **report)


# ---- Ways of giving a principle ------------------------------------------------------------------

def ways(model, principles, grader, recipe, out: Path, count: int = 100):
    """Compare the ways of lab/ways.toml of giving a principle, on `count` queries with
    principles."""
    records = files.read_jsonl(principles)
    records = random.Random(recipe["run"]["seed"]).sample(records, count)
    drawn, plain = Path(out, "principles.jsonl"), Path(out, "original.jsonl")
    files.write_text(drawn, files.as_lines(records))
    critic, _ = evaluation.load_critic(grader=grader)
    rows = {}
    generate.responses(model, drawn, plain, recipe, ("original",))
    for name, prompts in WAYS.items():
        own = cli.change(recipe, prompts={role: sso.PROMPTS[role] | prompts
                                          for role in ("good", "bad")})
        path = Path(out, f"{name}.jsonl")
        generate.responses(model, plain, path, own, ("good", "bad"))
        pairs = files.read_jsonl(path)
        rows[name] = evaluation.measure_quality(pairs, sso.PAIRS["policy"]["L"], critic)
    results.write(out / "report.json", rows=rows, model=Path(model).name,
                  seed=recipe["run"]["seed"])
    print_table(rows, ["y+", "yo", "y-", "accuracy", "y+ over yo"])


if __name__ == "__main__":
    cli.run(__doc__, ("base", base, []), ("ways", ways, ["responses"]),
            ("arms", arms, ["principles", "responses", "generator", "policy"]))
