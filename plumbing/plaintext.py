"""Text is data: what stands in a query, a principle, a response or a judged output never becomes a
control token, and so never forges a turn of the conversation."""

import re
from types import SimpleNamespace

import jinja2

from plumbing.files import UserError

CUTS = [chr(code) for code in range(0xE000, 0xF8FF)]    # private characters: no text has them all
# Some templates have today's date: steps of two days would differ.
TODAY = "{%- macro strftime_now(format) %}26 Jul 2024{% endmacro -%}"


def special_tokens(tokenizer):
    """{text: id} of the tokens that control a conversation: special ones, and those that the chat
    template writes (DeepSeek's of turns are not special)."""
    template = tokenizer.get_chat_template()
    specials = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    for i, token in tokenizer.added_tokens_decoder.items():
        text = str(token)
        if token.special or (text.strip() and text in template):
            specials[text] = i
    return specials


class PlainText:
    """A tokenizer whose special tokens come from its chat template alone. Text that spells one, as
    `<|im_end|>`, is cut in two inside of it, and each part read by itself; other text is read as
    ever."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        longest_first = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self.specials = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __getattr__(self, name):
        if name == "tokenizer":             # not made yet, as when it is copied
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __len__(self):
        return len(self.tokenizer)

    def cut(self, text, cut):
        return self.specials.sub(lambda found: found[0][:1] + cut + found[0][1:], text)

    def read(self, text, cut):
        ids = []
        for part in text.split(cut):
            ids += self.tokenizer(part, add_special_tokens=False).input_ids
        return ids

    def __call__(self, text, add_special_tokens=False):
        """The ids of a text, without any of the template."""
        cut = unused([text])
        return SimpleNamespace(input_ids=self.read(self.cut(text, cut), cut))

    def apply_chat_template(self, messages, tokenize=True, return_dict=False, **options):
        """The ids of a conversation; its text if not `tokenize`. UserError if the template refuses
        it."""
        cut = unused([message["content"] for message in messages])
        safe = [message | {"content": self.cut(message["content"], cut)} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                safe, tokenize=False, **options,
                chat_template=TODAY + self.tokenizer.get_chat_template())
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the model's chat template refuses messages of {roles}: {error}"
                            ) from None
        if not tokenize:
            return text.replace(cut, "")
        return self.read(text, cut)


def unused(texts):
    return next(cut for cut in CUTS if not any(cut in text for text in texts))
