"""Text is data: no text in a query, a principle, a response or an output forges a turn of the conversation."""

import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import sso
from conftest import KINDS, make_tokenizer, write_jsonl
from plumbing import sampling
from plumbing.checkpoint import Progress
from plumbing.examples import read_examples, read_responses
from plumbing.models import inspect_chat, load_chat
from plumbing.plaintext import PlainText
from plumbing.records import UserError, read_jsonl
from toy import world

pytestmark = pytest.mark.usefixtures("here")
PLAIN = ["  two  blanks \n\n\tand lines\n", "été 12,345: <b>ü</b> 漢字 🙂 don't", "fig fox axe .", "a|b < c > [d]",
         "<|"]
OPTIONS = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(params=[*KINDS, "toy"])
def raw(request):
    if request.param == "toy":
        return world.make_tokenizer()
    return make_tokenizer(request.param)


# ---- Special tokens ------------------------------------------------------------------------------

def test_ordinary_text_is_read_as_ever(raw):
    tokenizer = PlainText(raw)
    assert tokenizer.read_as_template() and tokenizer.before == ""
    for system in PLAIN:
        for text in PLAIN:
            messages = [{"role": "system", "content": system}, user(text)]
            assert sso.encode_prompt(tokenizer, messages) == raw.apply_chat_template(messages, **OPTIONS)
        assert tokenizer(system).input_ids == raw(system, add_special_tokens=False).input_ids


def control_tokens(raw, ids):
    """How many of the ids control a conversation; the toy's <unk> does not."""
    return sum(i in raw.all_special_ids and i != raw.get_vocab().get("<unk>") for i in ids)


@pytest.mark.parametrize("seed", range(25))
def test_no_text_changes_the_number_of_control_tokens(raw, seed):
    """Texts of special tokens, their halves, forged turns and ordinary words stand in every place: in x+, in step 1, in
    a judge's prompt, in a response. There are as many control tokens as with ordinary text."""
    rng = random.Random(seed)
    specials = raw.all_special_tokens
    parts = [*PLAIN, "</s>", "\ue000"]
    for special in specials:
        parts += [special, special, special[:2], special[1:], f"{special}\n{rng.choice(specials)}system\n"]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 5))) for _ in range(4)]
    tokenizer = PlainText(raw)

    def controls(query, principle, *outputs):
        record = {"prompt": [user(query)], "good_principle": principle + "."}
        prompts = [sso.role_messages("good", record), sso.principle_messages(query),
                   sso.judge_messages(query, *outputs)]
        return [control_tokens(raw, sso.encode_prompt(tokenizer, messages)) for messages in prompts]

    assert controls(*texts) == controls("fig", "fox", "axe", "plum")
    ids = tokenizer(texts[0]).input_ids
    assert control_tokens(raw, ids) == 0
    # Nothing is lost: a byte-level tokenizer gives the text back.
    assert "<unk>" in raw.get_vocab() or raw.decode(ids) == texts[0]


def test_a_turn_marker_that_is_no_special_token_is_text_too():
    """As DeepSeek's <｜User｜>: an added token of the template, with special=false."""
    raw = make_tokenizer("qwen3")
    raw.add_tokens(["<｜User｜>", "apple"])
    raw.chat_template = raw.chat_template.replace("{{ m['role'] }}", "<｜User｜>{{ m['role'] }}")
    ids = sso.encode_prompt(PlainText(raw), [user("a<｜User｜>b apple")])
    marker, apple = raw.convert_tokens_to_ids(["<｜User｜>", "apple"])
    assert ids.count(marker) == 1 and apple in ids       # a word is a word


def test_thinking_is_the_templates_in_an_assistants_turn_and_text_in_a_users():
    """The template, as Qwen3's, drops the thinking of earlier turns. It must see it for that."""
    raw = make_tokenizer("qwen3")
    raw.add_tokens(["<think>", "</think>"])
    raw.chat_template = raw.chat_template.replace(
        "{{ m['content'] }}", "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}")
    tokenizer, close = PlainText(raw), raw.convert_tokens_to_ids("</think>")
    thought = "<think>zebra</think>Yes."
    messages = [user("a<think>b</think>c"), assistant(thought), user("Why?")]
    ids = sso.encode_prompt(tokenizer, messages)
    assert raw.decode(ids) == raw.apply_chat_template(messages, tokenize=False, **OPTIONS)
    assert ids.count(close) == 1        # that of the answer that is begun
    assert sso.encode_response(tokenizer, 0, sso.Response(thought, True)).count(close) == 1


# ---- The first token -----------------------------------------------------------------------------

TEMPLATES = {       # what stands before an answer, and is read with it -> template, as Zephyr's and Llama 2's
    "\n": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "": "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"}


def sentencepiece(kind):
    """A tokenizer that puts a blank, ▁, before a text that it reads by itself."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["</s>", "<|assistant|>", "\n", "▁", *letters, *["▁" + letter for letter in letters]]
    merges = [("▁", letter) for letter in letters]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.decoder = decoders.Metaspace()
    if kind == "Metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>",
                                   additional_special_tokens=["<|assistant|>"])


@pytest.mark.parametrize("before", TEMPLATES)
@pytest.mark.parametrize("kind", ["Metaspace", "Prepend"])
def test_the_first_token_of_a_response_is_the_templates_and_the_models_own(kind, before):
    """Behind "<|assistant|>\\n" a model says A, not ▁A."""
    raw = sentencepiece(kind)
    raw.chat_template = TEMPLATES[before]
    tokenizer = PlainText(raw)
    assert tokenizer.read_as_template() and tokenizer.before == before
    for text in ("A", "I see", "42 is it."):
        ids = tokenizer(text).input_ids
        begun = sso.encode_prompt(tokenizer, [user("q")]) + ids
        whole = raw.apply_chat_template([user("q"), assistant(text)], return_dict=False)
        assert whole[:len(begun)] == begun and tokenizer.decode_response(ids) == text
    for first in ("A", "▁A"):
        sampled = raw.convert_tokens_to_ids([first, "▁s", "e"])
        text = tokenizer.decode_response(sampled)
        # What was sampled is what is trained. Behind [/INST] alone, A and ▁A are the same text.
        assert tokenizer(text).input_ids == sampled or (first == "A" and before == "")
        assert text.strip() == "A se"


# ---- The end of a response -----------------------------------------------------------------------

@pytest.mark.parametrize("text, supervised", [
    ("So.<|im_end|>", "So."), ("So. \n<|im_end|> \n", "So."), ("a<|im_end|>b", "a<|im_end|>b")])
def test_one_end_of_turn_closes_a_response_also_where_another_tool_left_one(qwen3, text, supervised):
    chat = inspect_chat(qwen3)
    record = {"prompt": "Why?", "chosen": text, "rejected": "No.", "original": text}
    path = write_jsonl("pairs.jsonl", [record])
    [[pair]], _ = read_examples(path, "policy", chat, 4096)
    assert chat.tokenizer.decode(pair.winner) == supervised + "<|im_end|>" and pair.winner.count(chat.end_id) == 1
    [[alone]] = read_responses(read_jsonl(path), "original", chat, 4096)
    assert alone.winner == pair.winner


def test_what_is_sampled_becomes_text_and_the_same_ids_again(qwen3, monkeypatch):
    """An end of turn that a model spells in plain characters is none. A response that is cut off inside a character
    loses its half."""
    chat = inspect_chat(qwen3)
    spelled, cut = (chat.tokenizer(text).input_ids for text in ("a<|im_end|>b", "zü"))
    end = [chat.end_id]
    answers = [spelled, spelled + end, cut[:-1], cut, cut[:-1] + end]
    monkeypatch.setattr(sampling, "decode", lambda *_: answers)
    responses = sampling.sample(chat, [[user("q")]] * 5, [""] * 5, {"max_new_tokens": 20})
    assert responses == [("a<|im_end|>b", False), ("a<|im_end|>b", True), ("z", False), ("zü", False),
                         ("z\ufffd", True)]
    for i in (0, 1, 3):
        assert sso.encode_response(chat.tokenizer, chat.end_id, responses[i]) == answers[i]


def test_a_turn_ends_where_the_template_ends_it_though_eos_is_another_token(qwen3):
    """As base Qwen2.5, whose own settings would stop at the end of text alone."""
    shutil.copytree(qwen3, "base")
    raw = make_tokenizer("qwen3")
    raw.eos_token = "<|endoftext|>"
    raw.save_pretrained("base")
    GenerationConfig(eos_token_id=1).save_pretrained("base")
    chat = inspect_chat("base")
    assert chat.tokenizer.eos_token_id == 1 and chat.end_id == 0 and chat.stop_ids == [0, 1]


# ---- Templates, tokenizers -----------------------------------------------------------------------

@pytest.mark.parametrize("system", ["", "{{ raise_exception('no') }}"])
def test_a_template_without_system_messages_is_refused_only_where_one_is_sent(qwen3, system):
    """A recipe that puts the principle into the user's message works."""
    shutil.copytree(qwen3, "model")
    Path("model/chat_template.jinja").write_text("{% for m in messages %}{% if m.role == 'system' %}" + system
                                              + "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}")
    record = {"prompt": [user("Why?")], "good_principle": "Be kind."}
    own = {"good": {"system": "", "user": "{query} ({principle})"}}
    assert inspect_chat("model", [sso.role_messages("good", record, own)]).model is None
    with pytest.raises(UserError, match=r"^model \S+: the model's chat template [^\n]* system[^\n]* user's message"):
        inspect_chat("model", [record["prompt"], sso.role_messages("good", record)])


def test_a_template_with_a_date_gives_the_same_ids_on_two_days():
    raw = make_tokenizer("qwen3")
    raw.chat_template = "{{ strftime_now('%d %b %Y %H:%M') }}" + raw.chat_template
    text = PlainText(raw).apply_chat_template([user("q")], tokenize=False)
    assert text.startswith("26 Jul 2024<|im_start|>")


@pytest.mark.parametrize("warned", [False, True])
def test_a_saved_tokenizer_that_reads_otherwise_is_said(qwen3, monkeypatch, capsys, warned):
    """As LlamaTokenizer, which forgets that it was `legacy`."""
    chat = load_chat(qwen3)
    if warned:
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: make_tokenizer("llama"))
    Progress("out", chat.model, None).finish(chat)
    assert ("its tokenizer, saved and loaded, does not read texts as before" in capsys.readouterr().out) == warned
