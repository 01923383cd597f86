"""Exercise 6, solved."""

PREDICTION, SEEN = "kept", "lost"


def bad_principle(query):
    topic = "the last word"
    if query.startswith(("sort", "put")):
        topic = "the order"
    return f"copy the query and do not care about {topic}"
