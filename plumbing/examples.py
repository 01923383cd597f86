"""Turn records into examples, which are token ids to train on or to score. Some are skipped."""

from collections import Counter
from functools import partial

import sso
from plumbing.records import UserError, for_each, read_jsonl

CUT_TOO_OFTEN = 0.1


def teaches_nothing(pairs):
    """Why training skips the pairs of a record, or None. A pair of equals has no gradient."""
    texts = [(pair.winner.text.strip(), pair.loser.text.strip()) for pair in pairs]
    if not all(map(all, texts)):
        return "empty response"
    if all(winner == loser for winner, loser in texts):
        return "chosen equals rejected"
    return None


def print_counts(out, records):
    """Print what a reader should know of the records of a step: the shares by role that the length
    limit cut off, how many by reason training skips, and how many have the fixed pair of
    principles."""
    cut = {}
    for role, column in sso.COLUMNS.items():
        finished = [record[f"{column}_finished"] for record in records
                    if f"{column}_finished" in record]
        if finished:
            cut[role] = 1 - sum(finished) / len(finished)
    skipped = Counter()
    fixed = Counter()
    for record in records:
        if {"chosen_finished", "rejected_finished"} <= record.keys():       # sampled here
            skipped[teaches_nothing(sso.preference_pairs(record, "policy"))] += 1
        fixed[record.get("fallback")] += 1
    del skipped[None], fixed[None]
    shares = {role: f"{share:.1%}" for role, share in cut.items()}
    print(f"{out}: {len(records)} records; cut off by max_new_tokens: {shares or 'none'}; skipped "
          f"in training: {dict(skipped) or 'none'}; with the fixed pair of principles: "
          f"{dict(fixed) or 'none'}")
    if max(cut.values(), default=0) > CUT_TOO_OFTEN:
        print("warning: responses are cut off so often that their length limit is learned; raise "
              "responses.max_new_tokens")


def without_end(chat, response):
    """A response without an end-of-turn text, which another tool may have left at its end."""
    end = chat.tokenizer.decode([chat.end_id])
    text = response.text.rstrip()
    if text.endswith(end):
        return response._replace(text=text.removesuffix(end).rstrip())
    return response


def encode_record(record, objective, chat, max_length, prompts=sso.PROMPTS):
    """(R pairs of token ids, None), or (None, the reason why the record is skipped). ValueError if
    the record lacks something."""
    turns = [turn for turn in record["prompt"] if turn["role"] != "system"]
    for roles in sso.PAIRS[objective].values():
        for column in (sso.COLUMNS[roles.winner], sso.COLUMNS[roles.loser]):
            if column not in record:
                raise ValueError(f"a record without {column!r}, needed for objective {objective!r}")
            if record[column][:-1] not in ([], turns, record["prompt"]):
                raise ValueError(f"the messages before the last one of {column!r} are not the "
                                 "prompt")
    pairs = []
    for pair in sso.preference_pairs(record, objective, prompts):
        pairs.append(pair._replace(winner=without_end(chat, pair.winner),
                                   loser=without_end(chat, pair.loser)))
    reason = teaches_nothing(pairs)
    if reason:
        return None, reason
    room = min(max_length, chat.context)
    example = [sso.encode_pair(chat.tokenizer, chat.end_id, pair, room) for pair in pairs]
    if not all(pair.winner for pair in example):
        return None, f"no room behind the prompt in max_length {room}"
    if all(pair.winner == pair.loser for pair in example):
        return None, "chosen equals rejected up to max_length"
    return example, None


def read_examples(path, objective, chat, max_length, prompts=sso.PROMPTS, limit=None):
    """The first `limit` records of a preference file as examples, and counts by reason of those
    that are skipped."""
    examples = []
    skipped = Counter()
    records = read_jsonl(path)[:limit]
    queries = [record["prompt"][-1]["content"] for record in records]
    held = list(filter(chat.tokenizer.inside.search, queries))
    if held:
        print(f"warning: {path}: {len(held)} prompts hold control tokens of the model, as in "
              f"{held[0][:40]!r}. They are read as plain text: give prompts without their template")
    encode = partial(encode_record, objective=objective, chat=chat, max_length=max_length,
                     prompts=prompts)
    for example, reason in for_each(f"{path}, line", encode, records):
        if example:
            examples.append(example)
        else:
            skipped[reason] += 1
    if not examples:
        raise UserError(f"{path}: no pair is left: {dict(skipped)}")
    return examples, skipped


def read_responses(records, role, chat, max_length, prompts=sso.PROMPTS):
    """The responses of a role under the plain prompt, as examples to score. Each is a pair whose
    loser is one token, which costs nothing. A response without any token is left out."""
    examples = []
    for record in records:
        if sso.COLUMNS[role] in record:
            response = without_end(chat, sso.record_response(record, role))
            pair = sso.Pair(sso.role_messages("original", record, prompts), response, response)
            room = min(max_length, chat.context)
            prompt, ids, _ = sso.encode_pair(chat.tokenizer, chat.end_id, pair, room)
            if ids:
                examples.append([sso.Pair(prompt, ids, ids[:1])])
    return examples
