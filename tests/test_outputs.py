"""What an output was made from: settings, names and contents bind, places do not. Any text fits into a line."""

import json
import os

import pytest

import generate
from conftest import TOY, TOY_BASE, write_jsonl
from plumbing.outputs import Output, fingerprint
from plumbing.records import UserError, read_json, read_jsonl

SETTINGS = {"lr": 0.1, "seed": 0}


@pytest.fixture(params=["file", "folder"])
def make(request, tmp_path):
    """Makes an output with its settings, as a file or a model's folder, in a run's folder with its data."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("data", "same"):
        write_jsonl(run / f"{name}.jsonl", [{"prompt": "a"}])
    if request.param == "folder":
        (run / "out").mkdir()
        (run / "out.partial").mkdir()

    def make(settings=SETTINGS, data="data.jsonl", run=run):
        return Output(run / "out", settings, {"data": run / data})
    return make


def fill(path):
    if path.is_dir():
        path = path / "log.jsonl"
    path.write_text("precious")


def refused(output, message):
    with pytest.raises(UserError, match=message) as error:
        output.is_complete()
    assert "\n" not in str(error.value)


def test_what_is_begun_is_continued_and_what_is_complete_is_skipped(make):
    output = make()
    assert not output.is_complete()
    output.write_note()
    assert not make({"lr": 0.2}).is_complete()              # nothing is in it yet, so nothing binds
    for path, complete in ((output.partial, False), (output.path, True)):
        fill(path)
        assert make().is_complete() == complete
        no_effect = {"micro_batch_tokens": 7, "recompute_layers": 1, "logps": "plain"}
        assert make(SETTINGS | no_effect).is_complete() == complete
        how = "was made with {}: choose another --out, or delete .*" + f"{path}.*{output.note_path} to make it again"
        refused(make({"lr": 0.2, "seed": 0}), how.format("lr = 0.1, not 0.2"))
        refused(make(SETTINGS | {"beta": 0.1}), how.format("beta = None, not 0.1"))
        refused(make({"lr": 0.1}), how.format("seed = 0, not None"))
        refused(make(data="same.jsonl"), "data = 'data.jsonl with content .*', not 'same.jsonl with content ")
    data = output.path.with_name("data.jsonl")
    write_jsonl(data, [{"prompt": "b"}])                    # the same place and size, another content
    refused(make(), "data = 'data.jsonl with content .*', not 'data.jsonl with content ")


def test_a_runs_folder_may_be_moved_or_reached_by_a_link(make, tmp_path):
    output = make()
    output.write_note()
    fill(output.path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert make(run=tmp_path / "link").is_complete()
    os.rename(tmp_path / "run", tmp_path / "moved")
    assert make(run=tmp_path / "moved").is_complete()


def test_a_command_notes_its_prompts_and_inputs_and_does_nothing_twice(toy_data, monkeypatch, capsys):
    queries, out = toy_data / "queries.jsonl", toy_data / "principles.jsonl"
    texts = {name: TOY["prompts"][name] for name in ("principles", "fallback_good", "fallback_bad")}
    assert read_json(f"{out}.args.json") == TOY["principles"] | texts | {
        "seed": 0, "server": None, "queries": f"queries.jsonl with content {fingerprint(queries)}",
        "model": f"base with content {fingerprint(TOY_BASE)}"}
    monkeypatch.setattr(generate, "load_sampler", None)
    generate.principles(TOY_BASE, queries, out, TOY)
    generate.responses(TOY_BASE, out, toy_data / "responses.jsonl", TOY)
    assert capsys.readouterr().out.count("complete") == 2


def test_separators_inside_a_text_do_not_split_a_line(tmp_path):
    texts = ["a\u2028b\x85c\r\nd", "zwei\nZeilen"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(lines), encoding="utf-8", newline="")
    assert [record["prompt"][0]["content"] for record in read_jsonl(path)] == texts
