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


class Watch:
    """Watches a policy's training on a file that has yo. To be made before the training."""

    def __init__(self, chat, data, settings, prompts):
        self.chat = chat
        self.budget = settings["micro_batch_tokens"]
        self.examples = read_responses(read_jsonl(data), "original", chat, settings["max_length"],
                                       prompts)[:ANSWERS]
        if self.examples:
            self.before = self.probability()

    def probability(self):
        """p(original): the mean of exp(mean token log-prob)."""
        logps, tokens = score(self.chat, self.examples, self.budget, name="p(original)")
        return (logps / tokens)[0, 0].exp().mean().item()

    def look(self, step, steps):
        """p(original) for a step's line of the log, every eighth step and at the last one. Warns as
        long as half of it is gone."""
        if not self.examples or (step % STEPS and step < steps - 1):
            return {}
        now = self.probability()
        if now < self.before / 2:
            tqdm.write(f"warning: step {step}: p(original) fell from {self.before:.2f} to "
                       f"{now:.2f}: the policy unlearns its own answers. Lower policy.lr, and see "
                       "whether its pairs are accurate (eval.py preflight)")
        return {"p(original)": now, "p(original) before": self.before}
