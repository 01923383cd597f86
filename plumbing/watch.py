"""A look at a policy while it trains: how probable its own plain answers still are.

A policy that unlearns to speak has a log that looks like success: loss near 0, accuracy 1, a wide
margin. What gives it away is p(original), the probability of the answers yo that it gave before.
"""

from tqdm import tqdm

import sso
from plumbing import files
from plumbing.chat import score

ANSWERS = 32
STEPS = 8           # between two looks


class Watch:
    """Of a policy's training on a file that has yo. To be made of the model before its training."""

    def __init__(self, chat, data, settings, prompts=sso.PROMPTS):
        self.chat, self.budget, self.examples = chat, 4 * settings["micro_batch_tokens"], []
        if not sso.trains_generator(settings["objective"]):
            records = files.read_jsonl(data)
            self.examples = files.read_responses(data, records, "original", chat,
                                                 settings["max_length"], prompts)[:ANSWERS]
        if self.examples:
            self.before = self.probability()

    def probability(self):
        """p(original): the mean of exp(mean token log-prob)."""
        logps, tokens = score(self.chat, self.examples, self.budget, name="p(original)")
        return (logps / tokens)[0, 0].exp().mean().item()

    def look(self, step, steps):
        """What a step's line of the log has of it, after its update: every eighth's and the last's.
        Warns as long as half of it is gone."""
        if not self.examples or (step % STEPS and step < steps - 1):
            return {}
        now = self.probability()
        if now < self.before / 2:
            tqdm.write(f"warning: step {step}: p(original) fell from {self.before:.2f} to "
                       f"{now:.2f}: the policy unlearns its own answers. Lower --lr, and see "
                       "whether its pairs are accurate (eval.py preflight)")
        return {"p(original)": now, "p(original) before": self.before}
