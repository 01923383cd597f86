"""Step 1, by a model or by a server. The form of an answer is `sso.PROMPTS["principles"]`.

A model here, which may be small, writes in two stages, without a parser: it goes on with an answer
that is begun for it, first with the bad principle, then with the good one. A server cannot be
relied on to go on with a begun answer: it writes both, and their labels are looked for.
"""

import re

import sso
from plumbing.records import UserError
from plumbing.sampling import sample

LENGTH = 8      # words in a row that repeat a worked example


def check_form(form):
    """UserError if the form of step 1, which a recipe may replace, is not what is needed."""
    for number, example in enumerate(form["examples"], 1):
        if not isinstance(example, dict) or set(example) != {"query", "bad", "good"} or any(
                not isinstance(text, str) for text in example.values()):
            raise UserError(f"[[prompts.principles.examples]] number {number} of the recipe is not "
                            "of three texts: query, bad, good")
    if not 0 <= form["answer"].find("{bad}") < form["answer"].find("{good}") or not form["end"]:
        raise UserError("[prompts.principles] of the recipe: answer has to hold {bad} and behind "
                        "it {good}, and end a text")


def begun_answer(bad=None, prompts=sso.PROMPTS):
    """The answer to `sso.principle_messages` up to the bad principle; or with that one, up to the
    good one."""
    answer = prompts["principles"]["answer"]
    if bad is None:
        return answer.split("{bad}")[0].rstrip()
    return sso.fill(answer.split("{good}")[0], bad=bad).rstrip()


def cut(text, prompts=sso.PROMPTS):
    """The principle that a model's text begins with, on one line."""
    return " ".join(text.strip().split(prompts["principles"]["end"])[0].split())


def in_two_stages(chat, messages, seeds, settings, prompts):
    """(pairs (bad, good) of principles, tokens) by a model that goes on with a begun answer."""
    end = prompts["principles"]["end"]
    begun = [begun_answer(prompts=prompts)] * len(messages)
    first = sample(chat, messages, [f"{seed} bad" for seed in seeds], settings, begun, end)
    bad = [cut(answer.text, prompts) for answer in first.responses]
    begun = [begun_answer(principle, prompts) for principle in bad]
    second = sample(chat, messages, [f"{seed} good" for seed in seeds], settings, begun, end)
    good = [cut(answer.text, prompts) for answer in second.responses]
    return list(zip(bad, good)), first.tokens + second.tokens


def in_one_answer(server, messages, seeds, settings, prompts):
    """The same by a server, with room for both in one answer."""
    settings = settings | {"max_new_tokens": 2 * settings["max_new_tokens"]}
    answers = sample(server, messages, seeds, settings)
    return [labelled(answer.text, prompts) for answer in answers.responses], answers.tokens


def labelled(text, prompts=sso.PROMPTS):
    """The (bad, good) principles of an answer behind their labels, which may stand in bold, as
    headings, or behind a preamble; (None, None) without both labels."""
    form = prompts["principles"]["answer"]
    found = []
    for part in re.split("{bad}|{good}", form)[:2]:
        label = re.escape(part.strip(" :#\n"))
        found.append(re.search(rf"(?im)\b{label}[*_\s]*(:|$)[*_\s]*", text))
    if not all(found) or found[0].end() > found[1].start():
        return None, None
    bad = text[found[0].end():found[1].start()]
    good = text[found[1].end():]
    return tuple(cut(part.strip(" *_#>-\n"), prompts).rstrip(" *_#") for part in (bad, good))


def runs_of_words(text):
    words = re.findall(r"\w+", text.lower())
    starts = range(max(1, len(words) - LENGTH + 1))
    return {" ".join(words[start:start + LENGTH]) for start in starts}


def fault(bad, good, prompts=sso.PROMPTS):
    """Why a pair of principles is of no use, or None. Small models repeat the worked examples."""
    if bad is None:
        return "no label"
    if not bad or not good:
        return "empty"
    if bad.lower() == good.lower():
        return "good equals bad"
    made = runs_of_words(bad) | runs_of_words(good)
    for example in prompts["principles"]["examples"]:
        if made & (runs_of_words(example["bad"]) | runs_of_words(example["good"])):
            return "repeats an example"
    return None


def with_principles(record, bad, good, prompts=sso.PROMPTS):
    """A record with its principles; the fixed pair, and why, where the made one is of no use."""
    reason = fault(bad, good, prompts)
    if reason:
        bad = prompts["fallback_bad"]
        good = prompts["fallback_good"]
    return record | {"good_principle": good, "bad_principle": bad, "fallback": reason}
