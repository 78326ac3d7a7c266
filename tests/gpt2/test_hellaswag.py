"""HellaSwag's two dialects against plain references, on items written here."""

import json
import math

import pytest
import torch

from gpt2 import evaluate, hellaswag, load, parallel, tokenizer
from gpt2.errors import UserError

ITEMS = [
    {
        "ind": 1,
        "activity_label": "Rain",
        "ctx_a": "The cat sat on the mat.",
        "ctx_b": "the dog",
        "ctx": "The cat sat on the mat. the dog",
        "endings": ["sat on the log.", "rode the [substeps] moon  home [title] and sang", "is not", "the the the the"],
        "label": 0,
        "split_type": "indomain",
    },
    {
        "ind": 2,
        "activity_label": "Sitting down [header]",
        "ctx_a": "[header] How to sit [title] Find a mat. [step] Then ",
        "ctx_b": "",
        "ctx": "[header] How to sit [title] Find a mat. [step] Then ",
        "endings": ["sit on it", "eat the log and the mat and the rain", "?", "walk away from the mat  slowly"],
        "label": "2",
    },
    {
        "ind": 3,
        "activity_label": "Dogs",
        "ctx_a": "The dog is under the rain and on the log and on the mat, " * 6,
        "ctx_b": "he",
        "ctx": "The dog is under the rain and on the log and on the mat, " * 6 + "he",
        "endings": ["sat", "sat on the mat and then on the log and then under the rain again", "cats", "mat mat"],
        "label": 1,
    },
]


@pytest.fixture(scope="module")
def parts(finished_run):
    found, model = load.load_run(finished_run("byte"), "cpu")
    with torch.no_grad():  # far from uniform, so that no two endings tie
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model, load.tokenizer_of(found), parallel.World(0, 1, torch.device("cpu"))


def plain_losses(model, tokens, count):
    """The losses of the last `count` tokens, each with as much of what is before it as fits, computed row by row."""
    tokens = tokens[-(model.config.block_size + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]))[0][0].log_softmax(-1)
    losses = [-logits[place - 1, tokens[place]].item() for place in range(1, len(tokens))]
    return losses[-count:]


def test_llm_c_dialect(parts):
    """Context and ending as they are, encoded apart; the mean loss of the ending's tokens decides."""
    model, words, world = parts
    for item in ITEMS:
        sums, means = [], []
        for ending in item["endings"]:
            tail = words.encode(" " + ending).tolist()
            losses = plain_losses(model, words.encode(item["ctx"]).tolist() + tail, len(tail))
            sums.append(sum(losses))
            means.append(sum(losses) / len(losses))
        scores = hellaswag.score(item, words, model, world, torch.float32)
        label = int(item["label"])
        assert scores["llm.c_acc"] == (sums.index(min(sums)) == label)
        assert scores["llm.c_acc_norm"] == (means.index(min(means)) == label)


def test_harness_dialect_cleans_and_divides_by_characters(parts):
    """Written out by hand for these items: what is asked, and what is divided by."""
    model, words, world = parts
    asked = [
        (
            "Rain: The cat sat on the mat. The dog",
            ["sat on the log.", "rode the moon home. and sang", "is not", "the the the the"],
        ),
        (
            "Sitting down : How to sit. Find a mat. Then",
            ["sit on it", "eat the log and the mat and the rain", "?", "walk away from the mat slowly"],
        ),
        ("Dogs: " + ITEMS[2]["ctx_a"] + " He", ITEMS[2]["endings"]),
    ]
    for item, (context, endings) in zip(ITEMS, asked):
        pairs, lengths = hellaswag.harness_pairs(item)
        assert lengths == [len(ending) for ending in endings]
        assert [ending for _, ending in pairs] == [" " + ending for ending in endings]
        assert {given.replace("  ", " ").strip() for given, _ in pairs} == {context.replace("  ", " ").strip()}
        sums = []
        for ending in endings:
            tail = words.encode(" " + ending).tolist()
            sums.append(sum(plain_losses(model, words.encode(pairs[0][0].rstrip()).tolist() + tail, len(tail))))
        scores, label = hellaswag.score(item, words, model, world, torch.float32), int(item["label"])
        norms = [total / length for total, length in zip(sums, lengths)]
        assert scores["harness_acc_norm"] == (norms.index(min(norms)) == label)


def test_rows_in_gpt2s_own_tokens():
    """What the model is asked, by GPT-2's vocabulary: texts as each dialect puts them together, tokenized as one text
    there and as two here; the places of the endings are where their tokens are."""
    words, item = tokenizer.load("gpt2"), ITEMS[0]
    encode = tokenizer.gpt2_encoding().encode
    rows, _ = hellaswag.rows_of(item, words)
    cleaned = ["sat on the log.", "rode the moon home. and sang", "is not", "the the the the"]
    for (tokens, context), ending in zip(rows[:4], cleaned):
        asked = "Rain: The cat sat on the mat. The dog"
        assert tokens == encode(f"{asked} {ending}") and tokens[:context] == encode(asked)
    assert rows[0][0] == [31443, 25, 383, 3797, 3332, 319, 262, 2603, 13, 383, 3290, 3332, 319, 262, 2604, 13]
    for (tokens, context), ending in zip(rows[4:], item["endings"]):
        assert tokens[:context] == encode("The cat sat on the mat. the dog") and tokens[context:] == encode(
            " " + ending
        )
    inputs, targets = hellaswag.batch(rows[:4], 1024, 40)
    for row, (tokens, context) in enumerate(rows[:4]):
        assert inputs[row, : len(tokens) - 1].tolist() == tokens[:-1]
        assert [target for target in targets[row].tolist() if target >= 0] == tokens[context:]


def test_shares_and_errors(parts, monkeypatch):
    monkeypatch.setattr(hellaswag, "score", lambda item, *_: dict.fromkeys(hellaswag.METRICS, item["label"] == 0))
    items = [{"label": label} for label in (0, 0, 1, 0)]
    facts = hellaswag.evaluate(items, None, None, parts[2], None)
    assert facts["harness_acc"] == 0.75 and facts["items"] == 4
    assert facts["llm.c_acc_norm_stderr"] == pytest.approx(torch.tensor([1.0, 1, 0, 1]).std().item() / math.sqrt(4))


def test_the_command_reads_jsonl_and_names_both_dialects(finished_run, command, tmp_path):
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    code, out, err = command(evaluate, finished_run("byte"), "--tokens", 64, "--hellaswag", tmp_path / "items.jsonl")
    assert code == 0, err
    assert all(name in out for name in hellaswag.METRICS)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 1 is no JSON"),
        ("[" * 100_000, "line 1 is no JSON"),
        ("{}", "lacks activity_label"),
        (json.dumps(ITEMS[0] | {"label": ""}), "label ''"),
        (json.dumps(ITEMS[0] | {"endings": 4}), "lacks endings"),
        ("\udcff", "cannot be read as text"),
    ],
)
def test_bad_items_are_one_line(finished_run, command, tmp_path, line, words):
    (tmp_path / "items.jsonl").write_bytes(line.encode(errors="surrogateescape"))
    code, _, err = command(evaluate, finished_run("byte"), "--hellaswag", tmp_path / "items.jsonl")
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1


def test_a_dataset_in_a_folder(parts, tmp_path):
    (tmp_path / "validation.jsonl").write_text(
        "\n".join(json.dumps(item | {"label": str(item["label"]), "ind": 0, "split_type": ""}) for item in ITEMS)
    )
    assert [item["ctx_b"] for item in hellaswag.read_items(tmp_path)] == ["the dog", "", "he"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"label": ""}, "use a split with labels"),
        ({"label": 4}, "use a split with labels"),
        ({"label": "²"}, "use a split with labels"),
        ({"endings": [1, 2]}, "endings that are no texts"),
    ],
)
def test_items_that_cannot_be_scored_are_one_line(tmp_path, change, words):
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(item) for item in [ITEMS[0], ITEMS[1] | change]))
    with pytest.raises(UserError, match=f"item 2 has .*{words}"):
        hellaswag.read_items(tmp_path / "items.jsonl")


@pytest.mark.parametrize("data", [b"\xff\xfe{", b"{", b"[" * 100_000, b"3", b"", b"[]"])
def test_what_is_no_jsonl_of_hellaswag_is_one_line(tmp_path, data):
    (tmp_path / "items.jsonl").write_bytes(data)
    with pytest.raises(UserError) as refused:
        hellaswag.read_items(tmp_path / "items.jsonl")
    assert "\n" not in str(refused.value) and "items.jsonl" in str(refused.value)


def test_a_text_may_hold_what_unicode_takes_for_the_end_of_a_line(tmp_path):
    item = ITEMS[0] | {"ctx_a": "a line\u2028and the next\x85"}
    (tmp_path / "items.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n", encoding="utf-8")
    assert hellaswag.from_file(tmp_path / "items.jsonl") == [item]
