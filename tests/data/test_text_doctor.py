"""The doctor for text: every finding on data made for it, none on clean data, and what the command does with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from steelyard.cli.data import main
from steelyard.data.preferences import TextData, TextRow, read_text_data, tokenize
from steelyard.data.text_doctor import diagnose_text
from steelyard.data.tokenizer import ByteChat


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def pair(prompt, chosen, rejected, where="line 9", **known):
    return TextRow(prompt, (chosen, rejected), (1.0, 0.0), pairs=((0, 1),), where=where, **known)


CLEAN = [
    pair(f"Question {i}?", f"answer {i}" + "." * (i % 2), f"reply {i}" + "." * (2 - i % 2 * 2), f"line {i}")
    for i in range(8)
]


def codes(rows, kind="preference", **options):
    report = diagnose_text(TextData(kind, rows, "made.jsonl"), ByteChat(), **options)
    return {finding.code: finding for finding in report.findings}


def test_clean_data_has_no_findings():
    assert codes(CLEAN, context=64) == {}


FINDINGS = {
    "identical": ([pair("Q", "same", "same")], "fault"),
    "empty-completion": ([pair("Q", " \n", "b")], "fault"),
    "role-order": ([pair([user("a"), user("b")], [assistant("c")], [assistant("d")])], "warning"),
    "control-characters": ([pair("Q", "a\x1b[0m", "b")], "warning"),
    "replacement-characters": ([pair("Q", "caf\ufffd", "b")], "warning"),
    "empty-prompt": ([pair(" ", "a", "b")], "warning"),
    "ties": ([pair("Q", "a", "b", margin=0.0)], "warning"),
    "negative-margin": ([pair("Q", "a", "b", rewards=(1.0, 2.0))], "warning"),
    "contradictions": ([pair("Q", "a", "b", "line 8"), pair("q ", "B", "a")], "warning"),
    "duplicates": ([pair("Q", "Some words", "b", "line 8"), pair(" q", "some  WORDS", "b")], "warning"),
    "repeated-prompts": ([pair("Q", "a", "b", "line 8"), pair("Q", "c", "d")], "note"),
}


@pytest.mark.parametrize("code", FINDINGS)
def test_findings_of_rows(code):
    rows, severity = FINDINGS[code]
    found = codes(CLEAN + rows)
    assert found[code].severity == severity
    assert found[code].sentence.startswith("1 ")
    assert "the first at line 9" in found[code].sentence
    assert set(found) - {code} <= {"repeated-prompts"}


def test_line_feeds_and_tabs_are_text():
    assert codes([*CLEAN, pair("Q\r\n\t", "a\n", "b\n")]) == {}


@pytest.mark.parametrize(
    "roles",
    [["user"], ["system", "user"], ["user", "assistant", "user"], ["user", "assistant", "tool"]],
)
def test_usual_orders_of_roles(roles):
    prompt = [{"role": role, "content": "x"} for role in roles]
    assert "role-order" not in codes([pair(prompt, [assistant("c")], [assistant("d")])])


@pytest.mark.parametrize(
    "roles", [["assistant", "user"], ["user", "assistant"], ["user", "system", "user"], ["system"], ["human"]]
)
def test_odd_orders_of_roles(roles):
    prompt = [{"role": role, "content": "x"} for role in roles]
    assert "role-order" in codes([pair(prompt, [assistant("c")], [assistant("d")])])


def test_context():
    long = pair("Q" * 50, "a", "b", "line 7")
    nearly = pair("Q" * 20, "a" * 30, "b", "line 8")
    found = codes([*CLEAN, long, nearly], context=48)
    assert found["fully-truncated"].sentence.startswith("1 prompts fill the context")
    assert "line 7 (context 48 tokens)" in found["fully-truncated"].sentence
    assert found["over-context"].sentence.startswith("1 completions end beyond")
    assert "line 8" in found["over-context"].sentence
    assert codes([*CLEAN, long, nearly]).keys() <= {"length-bias"}


def test_length_bias_and_its_interval():
    generator = np.random.default_rng(0)
    rows = []
    for i in range(400):
        long, short = "word " * int(generator.integers(6, 9)), "word " * int(generator.integers(1, 5))
        chosen, rejected = (long, short) if generator.random() < 0.8 else (short, long)
        rows.append(pair(f"Q{i}", f"{i} {chosen}", f"{i}! {rejected}"))
    report = diagnose_text(TextData("preference", rows), ByteChat())
    share = report.summary.longer_chosen
    assert share.low < 0.8 < share.high
    assert share.high - share.low < 0.1
    finding = next(finding for finding in report.findings if finding.code == "length-bias")
    assert finding.severity == "warning"
    assert "the longer one" in finding.sentence
    swapped = [pair(row.prompt, row.completions[1], row.completions[0]) for row in rows]
    other = diagnose_text(TextData("preference", swapped), ByteChat())
    assert other.summary.longer_chosen.value == pytest.approx(1 - share.value)
    assert "the shorter one" in next(f.sentence for f in other.findings if f.code == "length-bias")


def test_correlation_of_length_and_score():
    rows = [TextRow(f"Q{i}", ("w" * (i + 1),), rewards=(float(i) + (i % 3),)) for i in range(30)]
    correlation = diagnose_text(TextData("completion", rows), ByteChat()).summary.length_correlation
    lengths, rewards = np.arange(30), np.array([row.rewards[0] for row in rows])
    assert correlation.value == pytest.approx(np.corrcoef(lengths, rewards)[0, 1])
    assert correlation.low < correlation.value < correlation.high <= 1
    margins = [pair(f"Q{i}", "w" * (i + 1), "v" * 15, margin=float(i - 14.5)) for i in range(30)]
    assert diagnose_text(TextData("preference", margins), ByteChat()).summary.length_correlation.value > 0.99


def test_labels_and_rewards():
    rows = [TextRow(f"Q{i}", ("a",), (float(i > 0),)) for i in range(20)]
    found = codes(rows, "unpaired")
    assert found["label-imbalance"].sentence.startswith("95.0% of 20 labels are desirable")
    balanced = [TextRow(f"Q{i}", ("a",), (float(i % 2),)) for i in range(20)]
    assert codes(balanced, "unpaired") == {}
    level = [TextRow("Q", ("a", "b"), rewards=(1.0, 1.0)), TextRow("R", ("a", "b"), rewards=(1.0, 0.0))]
    assert codes(level, "completion")["level-groups"].sentence.startswith("1 of 2 prompts")
    assert "every reward is 1" in codes([level[0], TextRow("R", ("a",), rewards=(1.0,))], "completion")[
        "constant-reward"
    ].sentence  # fmt: skip


def test_leak_into_held_out_rows():
    held = TextData("preference", [pair(" question 3? ", "x", "y", "line 1")], "held.jsonl")
    assert codes(CLEAN, held_out=held)["leak"].sentence == (
        "1 of 1 held-out rows have a prompt that is also in made.jsonl, the first at line 1 of held.jsonl"
    )
    apart = TextData("preference", [pair("other", "x", "y")], "held.jsonl")
    assert "leak" not in codes(CLEAN, held_out=apart)
    texts = [TextRow("", ("one",)), TextRow("", ("two",))]
    assert "leak" in codes(texts, "text", held_out=TextData("text", [TextRow("", ("Two",))]))


def test_summary_and_example():
    data = TextData("preference", [pair("Q", "abc", "d", "line 1"), pair("longer", "ab", "d", "line 2")])
    report = diagnose_text(data, ByteChat())
    assert report.summary.quantiles["prompt"][0] == 2
    assert report.summary.quantiles["prompt"][-1] == 7
    assert report.summary.quantiles["chosen"] == pytest.approx(np.quantile([4, 3], (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)))
    assert report.example == (
        ("BOS", 256, False), ("Q", 81, False), ("a", 97, True), ("b", 98, True), ("c", 99, True), ("EOS", 257, True),
    )  # fmt: skip
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print(console)
    text = console.export_text()
    for words in ("0 faults", "preference data: 2 rows, 2 different prompts, 4 completions, 2 pairs", "EOS", "scored"):
        assert words in text


@pytest.mark.lm
def test_what_a_tokenizer_mends_is_found():
    from steelyard.data.tokenizer import HuggingFaceTokenizer

    from .test_tokenizer import CHATML, bpe

    tokenizer = HuggingFaceTokenizer(bpe("<s>" + CHATML, bos="<s>", add_bos=True))
    rows = [TextRow("<s>the cat", (" sat",)), TextRow("the cat", (" sat<|im_end|> on",))]
    found = {finding.code: finding for finding in diagnose_text(TextData("completion", rows), tokenizer).findings}
    assert found["bos-doubled"].severity == found["eos-inside"].severity == "fault"
    silent = HuggingFaceTokenizer(bpe("{% for m in messages %}{{ m.content }}\n{% endfor %}"))
    rows = [TextRow([user("the cat")], ([assistant("the mat")],))]
    found = {finding.code: finding for finding in diagnose_text(TextData("completion", rows), silent).findings}
    assert found["eos-added"].severity == "warning"


# ----------------------------------------------------------------------------------------------------- command


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.jsonl"
    lines = [{"prompt": row.prompt, "chosen": row.completions[0], "rejected": row.completions[1]} for row in CLEAN]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_command(good, tmp_path, capsys):
    assert main(["check", str(good)]) == 0
    assert "preference data: 8 rows" in capsys.readouterr().out
    assert main(["check", str(good), "--context", "8", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0]["code"] == "fully-truncated"
    assert report["summary"]["kind"] == "preference"
    assert main(["check", str(tmp_path)]) == 0  # a folder of text files
    assert main(["check", str(good), "--held-out", str(good)]) == 1
    assert "8 of 8 held-out" in capsys.readouterr().out.replace("\n", " ")
    assert main(["check", str(good), "--tokenizer", "/absent"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_command_goes_on_after_rows_that_cannot_be_read(good, capsys):
    with good.open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n{"prompt": 3}\nno json\n')
    assert main(["check", str(good), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [finding["code"] for finding in report["findings"]] == ["unreadable"]
    assert "3 rows cannot be read" in report["findings"][0]["sentence"]
    assert "line 9: expected UTF-8, found byte 0xff" in report["findings"][0]["sentence"]
    assert report["summary"]["rows"] == 8


def test_command_where_no_row_can_be_read(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Q", "chosen": 3, "rejected": "b"}\n')
    assert main(["check", str(tmp_path / "bad.jsonl")]) == 1
    assert "1 rows cannot be read" in capsys.readouterr().out
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["check", str(tmp_path / "empty.jsonl")]) == 2
    assert "found an empty file" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text('{"question": "Q"}\n' * 2)
    assert main(["check", str(tmp_path / "other.jsonl")]) == 2
    assert "line 1: expected columns such as" in capsys.readouterr().err


def test_the_page_shows_what_the_command_prints(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "text_data.md").read_text()
    lines = page.split('write_text("""\\\n')[1].split('"""')[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    Path("pairs.jsonl").write_text(lines)
    assert main(["check", "pairs.jsonl"]) == 1
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines())
    assert f"```\n{printed}\n```" in page
    report = tokenize(read_text_data("pairs.jsonl"), ByteChat(), 64, 32).report
    assert "```\n" + "\n".join(report.sentences()) + "\n```" in page


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("dpo_en_demo/dpo_en_demo.jsonl.gz", {"duplicates", "control-characters", "length-bias"}),
        ("hh_rlhf_harmless/test.jsonl.gz", {"empty-completion", "role-order", "left-out", "length-bias"}),
        ("reward_subsets/llmbar-natural.jsonl.gz", set()),
        ("alpaca_eval_prefs_nc/prompts.jsonl.gz", set()),
    ],
)
def test_real_sets(shared_data, path, expected):
    found = {f.code for f in diagnose_text(read_text_data(shared_data / path), ByteChat()).findings}
    assert expected <= found
    assert found - expected <= {"repeated-prompts", "length-bias", "empty-completion"}
