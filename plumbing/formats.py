"""A record as people have it, as a record of ours: a prompt and responses, lists of messages."""

ROLES = ("system", "user", "assistant")
PROMPT_NAMES = ("instruction", "question", "query", "input")        # of Alpaca, Orca, ...
CONTEXT_NAMES = ("input", "context")        # the second half of a prompt: Alpaca's, Dolly's
# Conversations with the answer: UltraFeedback, WildChat; TRL's "implicit prompt".
CONVERSATIONS = ("messages", "conversation", "chosen")

# Formats that do not fit: a column that gives one away, its name, and Python that makes a record r
# fit.
FOREIGN = {
    "conversations": ("ShareGPT", "roles = {'human': 'user', 'gpt': 'assistant'}; r['prompt'] = "
                      "[{'role': roles.get(m['from'], m['from']), 'content': m['value']} for m in "
                      "r['conversations']]"),
    "answers": ("Nectar", "texts = [a['answer'] for a in sorted(r['answers'], key=lambda a: "
                "a['rank'])]; r['chosen'] = texts[0]; r['rejected'] = texts[-1]"),
    "better_response_id": ("PKU-SafeRLHF", "i = r['better_response_id']; r['chosen'] = "
                           "r[f'response_{i}']; r['rejected'] = r[f'response_{1 - i}']"),
    "overall_preference": ("HelpSteer3", "i = int(r['overall_preference'] > 0); pair = "
                           "[r['response1'], r['response2']]; r['prompt'] = r['context']; "
                           "r['chosen'] = pair[i]; r['rejected'] = pair[1 - i]"),
    "helpfulness": ("HelpSteer", "it has ratings, no pairs: of two records with one prompt, the "
                    "response of the higher helpfulness becomes 'chosen', the other 'rejected'"),
}
HH = ("the text format of HH-RLHF; for each record r: r['prompt'] = r['chosen'].rpartition("
      "'\\n\\nAssistant:')[0].removeprefix('\\n\\nHuman:').strip(); for c in ('chosen', "
      "'rejected'): r[c] = r[c].rpartition('\\n\\nAssistant:')[2].strip()   (of several turns, "
      "make a list of messages)")


def unify(record, columns):
    """Give a record its prompt, and make lists of messages of its prompt and of the response
    columns that are used. ValueError says what does not fit, and how to make it fit."""
    for name in ("prompt", *columns, *PROMPT_NAMES, *CONVERSATIONS):
        if record.get(name, "") is None:
            del record[name]
    if "prompt" not in record:
        find_prompt(record)
    for sign, (name, line) in FOREIGN.items():
        if sign in record and not {"prompt", *columns[:1]} <= record.keys():
            raise ValueError(f"a record in the format of {name}; for each record r: {line}")
    for column in ("prompt", *columns):
        if column in record:
            record[column] = as_messages(column, record[column])
    if "prompt" in record:
        add_system(record, [record[column][0] for column in columns if column in record])


def find_prompt(record):
    """Find the prompt under the names that other tools give it."""
    for name in PROMPT_NAMES:
        if name in record:
            for other in CONTEXT_NAMES:
                if other != name and record.get(other):
                    raise ValueError(f"an {other!r} beside {name!r}: join them into a 'prompt'")
            record["prompt"] = record[name]
            return
    for name in CONVERSATIONS:
        messages = record.get(name)
        if messages and isinstance(messages, list):
            answered = isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
            record["prompt"] = messages[:-1] if answered else messages
            return


def as_messages(column, value):
    """A prompt or a response as a list of chat messages; a text becomes one message."""
    wanted = "user" if column == "prompt" else "assistant"
    if isinstance(value, str):
        value = {"role": wanted, "content": value}
    if isinstance(value, dict):
        value = [value]
    messages = []
    try:
        for message in value:
            role = message["role"]
            if role not in ROLES:
                raise ValueError(f"{column!r} has a message of role {role!r}; known are "
                                 f"{', '.join(ROLES)}")
            messages.append({"role": role, "content": text_of(column, message["content"])})
        last = messages[-1]
    except (LookupError, TypeError):
        raise ValueError(f"{column!r} is neither a text nor a list of messages (ShareGPT: rename "
                         "'from' and 'value' to 'role' and 'content', human to user, gpt to "
                         "assistant)") from None
    if column == "prompt" and not last["content"].strip():
        raise ValueError("the last message of 'prompt' is empty")
    if last["role"] != wanted:
        raise ValueError(f"the last message of {column!r} is of the {last['role']}; it has to be "
                         f"of the {wanted}")
    if last["content"].startswith("\n\nHuman:"):
        raise ValueError(f"{column!r} is in {HH}")
    return messages


def text_of(column, content):
    """The text of a message, which may be in parts. ValueError if one of them is no text."""
    if isinstance(content, list):
        for part in content:
            if part["type"] != "text":
                raise ValueError(f"{column!r} has a part of type {part['type']!r}; a message is "
                                 "text alone")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise TypeError
    return content


def add_system(record, firsts):
    """Put a system message before a prompt without one: of the column 'system', or the one with
    which all responses begin; `firsts` are their first messages."""
    system = record.pop("system", None)
    if isinstance(system, str) and system.strip():
        firsts = [{"role": "system", "content": system}]
    if firsts and firsts[0]["role"] == "system" and firsts.count(firsts[0]) == len(firsts):
        if record["prompt"][0]["role"] != "system":
            record["prompt"] = firsts[:1] + record["prompt"]
