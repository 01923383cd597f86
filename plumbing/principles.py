"""Step 1 in two stages, without a parser: the model goes on with an answer that is begun for it,
first with the bad principle, then with the good one. The form is `sso.PROMPTS["principles"]`."""

import re

import sso
from plumbing.records import UserError

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


def runs_of_words(text):
    words = re.findall(r"\w+", text.lower())
    starts = range(max(1, len(words) - LENGTH + 1))
    return {" ".join(words[start:start + LENGTH]) for start in starts}


def fault(bad, good, prompts=sso.PROMPTS):
    """Why a pair of principles is of no use, or None. Small models repeat the worked examples."""
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
