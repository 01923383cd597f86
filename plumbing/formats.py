"""A record as people have it, as a record of ours: a prompt and responses, lists of messages."""

ROLES = ("system", "user", "assistant")
PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input")      # of Alpaca, Orca, ...
CONTEXT_NAMES = ("input", "context")        # the second half of a prompt: Alpaca's, Dolly's
CONVERSATIONS = ("messages", "conversation")        # with the answer: UltraFeedback, WildChat

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
HH_SIGN = "\n\nHuman:"
HH = ("the text format of HH-RLHF; for each record r: r['prompt'] = r['chosen'].rpartition("
      "'\\n\\nAssistant:')[0].removeprefix('\\n\\nHuman:').strip(); for c in ('chosen', "
      "'rejected'): r[c] = r[c].rpartition('\\n\\nAssistant:')[2].strip()   (of several turns, make a list of "
      "messages)")


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
    if "prompt" not in record and str(record.get("chosen")).startswith(HH_SIGN):
        raise ValueError(f"'chosen' is in {HH}")
    for column in ("prompt", *columns):
        if column in record:
            record[column] = as_messages(column, record[column])
    heads = [record[column][0] for column in columns if column in record]
    if "prompt" in record and ("system" in record or any(m["role"] == "system" for m in heads)):
        move_system(record, heads)


def find_prompt(record):
    """Find the prompt under the names that other tools give it."""
    for name in PROMPT_NAMES[1:]:
        if name in record:
            for other in CONTEXT_NAMES:
                if other != name and record.get(other):
                    raise ValueError(f"an {other!r} beside {name!r}: join them into a 'prompt'")
            record["prompt"] = record[name]
            return
    for name in CONVERSATIONS:
        if isinstance(record.get(name), list):
            record["prompt"] = before_the_answer(record[name])
            return
    if isinstance(record.get("chosen"), list):
        record["prompt"] = record["chosen"][:-1]                # TRL's "implicit prompt"


def before_the_answer(messages):
    """A conversation up to its last turn of the assistant."""
    roles = [message.get("role") for message in messages if isinstance(message, dict)]
    if "assistant" not in roles:
        return messages
    return messages[:len(roles) - 1 - roles[::-1].index("assistant")]


def as_messages(column, value):
    """A prompt or a response as a list of chat messages; a text becomes one message."""
    if isinstance(value, str):
        role = "user" if column == "prompt" else "assistant"
        value = [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not value or not isinstance(value, list):
        raise ValueError(f"{column!r} is neither a text nor a list of messages")
    messages = []
    for message in value:
        if isinstance(message, dict) and "from" in message:
            raise ValueError(f"{column!r} is in the format of ShareGPT: rename 'from' and 'value' "
                             "to 'role' and 'content', human to user, gpt to assistant")
        content = isinstance(message, dict) and message.get("content")
        if isinstance(content, list):
            content = joined(column, content)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise ValueError(f"{column!r} is neither a text nor a list of messages")
        if message["role"] not in ROLES:
            raise ValueError(f"{column!r} has a message of role {message['role']!r}; known are "
                             f"{', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": content})
    last = messages[-1]
    if column == "prompt" and not last["content"].strip():
        raise ValueError("the last message of 'prompt' is empty")
    wanted = "user" if column == "prompt" else "assistant"
    if last["role"] != wanted:
        raise ValueError(f"the last message of {column!r} is of the {last['role']}; it has to be "
                         f"of the {wanted}")
    if last["content"].startswith(HH_SIGN):
        raise ValueError(f"{column!r} is in {HH}")
    return messages


def joined(column, parts):
    """The text of a message in parts. ValueError if one of them is no text."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{column!r} has a part of type {kind!r}; a message is text alone")
    return "".join(part["text"] for part in parts)


def move_system(record, heads):
    """Put a system message before the prompt: of the column 'system', or the one with which all
    responses begin; `heads` are their first messages."""
    prompt = record["prompt"]
    system = record.get("system")
    if isinstance(system, str) and system.strip() and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}] + prompt
    if heads and heads[0]["role"] == "system" and heads.count(heads[0]) == len(heads):
        if prompt[0] != heads[0]:
            prompt = heads[:1] + prompt
    record["prompt"] = prompt
    record.pop("system", None)
