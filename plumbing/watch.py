"""A look at a policy while it trains: how probable its own plain answers still are.

A policy that unlearns to speak has a log that looks like success: loss near 0, accuracy 1, a wide
margin. What gives it away is p(original), the probability of the answers yo that it gave before.
"""

from tqdm import tqdm

from plumbing.examples import read_responses
from plumbing.records import read_jsonl
from plumbing.scoring import score

ANSWERS = 32
STEPS = 8           # between two looks


def make_watch(chat, data, settings, prompts):
    """The function that looks, for a training on a file that has yo; to be made before it."""
    examples = read_responses(read_jsonl(data), "original", chat, settings["max_length"], prompts)
    examples = examples[:ANSWERS]

    def probability():
        """p(original): the mean of exp(mean token log-prob)."""
        logps, tokens = score(chat, examples, settings["micro_batch_tokens"], name="p(original)")
        return (logps / tokens)[0, 0].exp().mean().item()

    before = probability() if examples else 0.0

    def look(step, steps):
        """p(original) for a step's line of the log, every eighth step and at the last one. Warns as
        long as half of it is gone."""
        if not examples or (step % STEPS and step < steps - 1):
            return {}
        now = probability()
        if now < before / 2:
            tqdm.write(f"warning: step {step}: p(original) fell from {before:.2f} to {now:.2f}: "
                       "the policy unlearns its own answers. Lower policy.lr, and see whether its "
                       "pairs are accurate (eval.py preflight)")
        return {"p(original)": now, "p(original) before": before}
    return look
