"""Step 1, by a model here or on a server. `sso.PROMPTS["principles"]` has the form of an answer.

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
    """UserError if a recipe has replaced the form of step 1 by one that lacks something."""
    for number, example in enumerate(form["examples"], 1):
        if not isinstance(example, dict) or set(example) != {"query", "bad", "good"} or any(
                not isinstance(text, str) for text in example.values()):
            raise UserError(f"[[prompts.principles.examples]] number {number} of the recipe is not "
                            "of three texts: query, bad, good")
    if not 0 <= form["answer"].find("{bad}") < form["answer"].find("{good}") or not form["end"]:
        raise UserError("[prompts.principles] of the recipe: answer has to hold {bad} and behind "
                        "it {good}, and end a text")


def begun_answer(kind, principles, prompts):
    """The answer to `sso.principle_messages` up to the principle of a kind, "bad" or "good", with
    the principles {kind: text} that stand before it."""
    begun = prompts["principles"]["answer"].split("{" + kind + "}")[0]
    return sso.fill(begun, **principles).rstrip()


def cut(text, prompts):
    """The principle that a model's text begins with, on one line."""
    return " ".join(text.strip().split(prompts["principles"]["end"])[0].split())


def in_two_stages(chat, messages, seeds, settings, prompts):
    """Pairs (bad, good) of principles. A model continues a begun answer."""
    pairs = [{} for _ in messages]
    for kind in ("bad", "good"):
        begun = [begun_answer(kind, pair, prompts) for pair in pairs]
        answers = sample(chat, messages, [f"{seed} {kind}" for seed in seeds], settings, begun,
                         prompts["principles"]["end"])
        for pair, answer in zip(pairs, answers):
            pair[kind] = cut(answer.text, prompts)
    return [(pair["bad"], pair["good"]) for pair in pairs]


def in_one_answer(server, messages, seeds, settings, prompts):
    """The same by a server, which writes both principles in one answer."""
    settings = settings | {"max_new_tokens": 2 * settings["max_new_tokens"]}
    answers = sample(server, messages, seeds, settings)
    return [labelled(answer.text, prompts) for answer in answers]


def labelled(text, prompts=sso.PROMPTS):
    """The (bad, good) principles behind their labels in an answer. Labels may be bold, be headings,
    or come after a preamble. (None, None) if one is missing."""
    form = prompts["principles"]["answer"]
    bad, good = (re.escape(part.strip(" :#\n")) for part in re.split("{bad}|{good}", form)[:2])
    end = r"[*_\s]*(?::|$)"             # of a label
    found = re.search(rf"(?ims)\b{bad}{end}(.*?)\b{good}{end}(.*)", text)
    if not found:
        return None, None
    return tuple(cut(part.strip(" *_#>-\n"), prompts).rstrip(" *_#") for part in found.groups())


def runs_of_words(text):
    words = re.findall(r"\w+", text.lower())
    starts = range(max(1, len(words) - LENGTH + 1))
    return {" ".join(words[start:start + LENGTH]) for start in starts}


def fault(bad, good, prompts=sso.PROMPTS):
    """Why a pair of principles cannot be used, or None. Small models repeat the worked examples."""
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


def with_principles(record, bad, good, prompts):
    """A record with its principles. If they cannot be used, it gets the fixed pair and the
    reason."""
    reason = fault(bad, good, prompts)
    if reason:
        bad = prompts["fallback_bad"]
        good = prompts["fallback_good"]
    return record | {"good_principle": good, "bad_principle": bad, "fallback": reason}
