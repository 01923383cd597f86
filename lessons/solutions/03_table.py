"""Exercise 3, solved."""

TABLE = {
    "L": ("original", "good", "bad"),
    "L+": ("good", "good", "bad"),
    "L- of Eq. 3": ("bad", "bad", "good"),
    "L- of Eq. 4": ("bad", "original", "good"),
}
PROMPTS = {"good": "x+", "bad": "x-", "original": "x"}
RESPONSES = {"good": "y+", "bad": "y-", "original": "yo"}


def sentence(row):
    prompt, winner, loser = row
    return f"under {PROMPTS[prompt]} say {RESPONSES[winner]} rather than {RESPONSES[loser]}"
