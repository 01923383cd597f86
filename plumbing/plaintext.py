"""Text is data: what stands in a query, a principle, a response or a judged output never becomes a
control token, and so never forges a turn of the conversation."""

import re
from types import SimpleNamespace

import jinja2

from plumbing.records import UserError

CUT = "\ud800"          # half of a surrogate pair: no text that was read has one
THINKING = ("<think>", "</think>")      # an assistant's own, which the template reads
PROBES = ("zebra", "A", "I see", "42 is it.")
# Some templates have today's date: steps of two days would differ.
TODAY = "{%- macro strftime_now(format) %}26 Jul 2024{% endmacro -%}"


def inside_of(texts):
    """A pattern that finds the place behind the first character of each of some texts."""
    places = [f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in texts]
    return re.compile("|".join(places) or "(?!)")


class PlainText:
    """A tokenizer whose special tokens come from its chat template alone. Text that spells one, as
    `<|im_end|>`, is cut in two inside of it, and each part is read by itself."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.before = ""
        # The tokens that control a conversation: {text: id} of special ones, and of those that the
        # chat template writes (DeepSeek's of turns are not special).
        self.specials = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        for i, token in tokenizer.added_tokens_decoder.items():
            text = str(token)
            if token.special or (text.strip() and text in tokenizer.get_chat_template()):
                self.specials[text] = i
        self.inside = inside_of(self.specials)
        self.inside_answers = inside_of(self.specials.keys() - set(THINKING))

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def cut(self, text, role="assistant"):
        """A text of a role with a cut inside of everything in it that spells a special token."""
        inside = self.inside
        if role == "assistant":
            inside = self.inside_answers
        return inside.sub(CUT, text)

    def read(self, text):
        ids = []
        for part in text.split(CUT):
            ids += self.tokenizer(part, add_special_tokens=False).input_ids
        return ids

    def __call__(self, text, add_special_tokens=False):
        """The ids of an assistant's text, as they stand behind the text `before`."""
        ids = self.read(self.before + self.cut(text))
        return SimpleNamespace(input_ids=ids[len(self.read(self.before)):])

    def decode_response(self, ids):
        """The text of an assistant's ids, as they stand behind the text `before`."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self.read(self.before)
        text = self.tokenizer.decode(before + ids, **options)
        return text[len(self.tokenizer.decode(before, **options)):]

    def apply_chat_template(self, messages, tokenize=True, **options):
        """The ids of a conversation; its text if not `tokenize`. UserError if the template refuses
        it, or leaves its system message out."""
        safe = [message | {"content": self.cut(message["content"], message["role"])}
                for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                safe, tokenize=False, **options,
                chat_template=TODAY + self.tokenizer.get_chat_template())
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the model's chat template refuses messages of {roles} ({error}); a "
                            "recipe can put principles into the user's message ([prompts])"
                            ) from None
        plain = text.replace(CUT, "")
        first = messages[0]
        if first["role"] == "system" and first["content"].strip() not in plain:
            raise UserError("the model's chat template has no system message; a recipe can put "
                            "principles into the user's message ([prompts])")
        if not tokenize:
            return plain
        return self.read(text)

    def read_as_template(self):
        """Choose `before` so that a response reads as in the template, and return whether that is
        possible. SentencePiece puts a blank before a text that it reads by itself: "A" becomes the
        token "▁A", which the model never says behind a line's end."""
        user = [{"role": "user", "content": "q"}]
        asked = self.apply_chat_template(user, tokenize=False, add_generation_prompt=True)

        def reads(text):
            ids = self(text).input_ids
            whole = self.apply_chat_template(user + [{"role": "assistant", "content": text}])
            return any(whole[i:i + len(ids)] == ids for i in range(len(whole)))

        for self.before in ("", asked[-1:]):
            if all(map(reads, PROBES)):
                return True
        self.before = ""
        return False
