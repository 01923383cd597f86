"""Steps 1 and 2 of SSO, and the sampling of step 4: a model writes principles and answers by them.

    python generate.py principles --model M --queries Q.jsonl --out principles.jsonl
    python generate.py responses --model M --principles principles.jsonl --out responses.jsonl
    python generate.py responses --model GENERATOR --principles responses.jsonl --roles good bad \\
        --out pairs.jsonl
    python generate.py written --principles data/features.jsonl --queries Q.jsonl --out P.jsonl

Responses are a standard preference file (prompt, chosen, rejected as lists of messages) with more
columns. A file gets its final name when it is complete. An interrupted command, given again,
continues it.

Simpler than the paper's set-up: the model itself writes the principles. A pair that cannot be used
is replaced by a fixed one.
"""

import random
from functools import partial

import sso
from plumbing import command, sampling
from plumbing.examples import print_counts
from plumbing.outputs import Output, grow
from plumbing.principles import check_form, in_one_answer, in_two_stages, with_principles
from plumbing.recipes import stage_settings
from plumbing.records import UserError, as_lines, for_each, read_jsonl, read_queries, write_text
from plumbing.sampling import load_sampler, sample


# ---- Step 1: principles --------------------------------------------------------------------------

def principles(model, queries, out, recipe, server=None):
    """Write each query to OUT with a bad and a good principle, which a chat model writes."""
    settings = stage_settings(recipe, "principles")
    prompts = recipe["prompts"]
    check_form(prompts["principles"])
    texts = {name: prompts[name] for name in ("principles", "fallback_good", "fallback_bad")}
    records = read_queries(queries)
    output = Output(out, settings | texts | {"server": server},
                    {"model": model, "queries": queries})
    if output.is_complete():
        print(f"{out}: complete")
        return
    asked = [sso.principle_messages(record["prompt"][0]["content"], prompts) for record in records]
    chat = load_sampler(model, server, probes=asked[:1])
    sampling.check_context(chat, asked, queries)
    output.write_note()

    write = in_one_answer if server else in_two_stages

    def make(batch):
        seeds = [f"{settings['seed']} principles {i}" for i in batch]
        pairs = write(chat, [asked[i] for i in batch], seeds, settings, prompts)
        return [with_principles(records[i], *pair, prompts) for i, pair in zip(batch, pairs)]

    made = grow(out, records, make, *sampling.sizes(chat, settings))
    print_counts(out, made)
    for record in made[:3]:
        print(f"\n  query {record['prompt'][0]['content']}\n  good  {record['good_principle']}\n"
              f"  bad   {record['bad_principle']}")


def written(principles, queries, out, recipe):
    """Step 1 without a model, from a file of principles.

    A principle with a prompt belongs to that query. For each other query two of the principles
    without a prompt are drawn, and joined."""
    seed = stage_settings(recipe, "run")["seed"]
    keys = ("good_principle", "bad_principle")
    by_query, general = {}, []
    for record in read_jsonl(principles, needs=keys, uses=()):
        if "prompt" in record:
            by_query[record["prompt"][-1]["content"]] = record
        else:
            general.append(record)
    made = []
    for number, record in enumerate(read_queries(queries), 1):
        query = record["prompt"][0]["content"]
        if query in by_query:
            chosen = [by_query[query]]
            record["fallback"] = by_query[query].get("fallback")
        elif len(general) >= 2:
            chosen = random.Random(f"{seed} {query}").sample(general, 2)
        else:
            raise UserError(f"{queries}, line {number}: {principles} has no principles for it")
        for key in keys:
            record[key] = " ".join(each[key] for each in chosen)
        made.append(record)
    output = Output(out, {"seed": seed}, {"principles": principles, "queries": queries})
    if not output.is_complete():
        output.write_note()
        write_text(out, as_lines(made))


# ---- Step 2: responses ---------------------------------------------------------------------------

def responses(model, principles, out, recipe, roles=tuple(sso.COLUMNS),
              originals: int = None, server=None):
    """Write the records of PRINCIPLES to OUT with the model's responses to the prompts of some
    roles: y+ (chosen), y- (rejected), yo (original). Other columns stay. `originals`: sample yo
    only for the first N queries, those that a generator is trained on."""
    settings = stage_settings(recipe, "responses")
    prompts = recipe["prompts"]
    records = read_jsonl(principles, uses=())
    messages = {}
    for role in roles:
        prompt_of = partial(sso.role_messages, role, prompts=prompts)
        messages[role] = for_each(f"{principles}, line", prompt_of, records)
    texts = {role: prompts[role] for role in roles}
    output = Output(out, settings | texts | {"originals": originals, "server": server},
                    {"model": model, "principles": principles})
    if output.is_complete():
        print(f"{out}: complete")
        return
    chat = load_sampler(model, server, probes=[messages[role][0] for role in roles])
    for role in roles:
        sampling.check_context(chat, messages[role], principles)
    output.write_note()

    def make(batch):
        made = {i: dict(records[i]) for i in batch}
        for role in roles:
            asked = batch
            if role == "original" and originals is not None:
                asked = [i for i in batch if i < originals]
            seeds = [f"{settings['seed']} {role} {i}" for i in asked]
            answers = sample(chat, [messages[role][i] for i in asked], seeds, settings)
            for i, response in zip(asked, answers):
                column = sso.COLUMNS[role]
                made[i][column] = [{"role": "assistant", "content": response.text}]
                made[i][f"{column}_finished"] = response.finished
        return list(made.values())

    print_counts(out, grow(out, records, make, *sampling.sizes(chat, settings)))


if __name__ == "__main__":
    command.run(__doc__, principles, written, responses)
