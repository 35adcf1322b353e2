"""`p4dprep student new` through the real command: from questions to a student that loads, always the same bytes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from cli.app import app, main
from student.backbones import load

QUESTIONS = ("How far is the zebra crossing?", "Which quokka overtakes the wombat?")
ANSWERS = ("It is 2.5 metres away.", "the left one")


def write_qa(path: Path, question: str, answer: str, **more: object) -> Path:
    turns = [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": answer}]
    path.write_text(json.dumps([{"id": "1", "video": "a.mp4", "conversations": turns}]))
    return path


@pytest.fixture
def qa(tmp_path: Path) -> list[Path]:
    pairs = zip(QUESTIONS, ANSWERS, strict=True)
    return [write_qa(tmp_path / f"{number}.json", *pair) for number, pair in enumerate(pairs)]


def make(out: Path, qa: Sequence[Path] = (), *options: object) -> Result:
    asked = [text for path in qa for text in ("--qa", str(path))]
    result = CliRunner().invoke(app, ["student", "new", str(out), *asked, *map(str, options)])
    assert result.exit_code == 0, result.output
    return result


def test_it_writes_the_given_conversations_in_few_tokens_and_says_how_large_it_is(
    qa: list[Path], tmp_path: Path
) -> None:
    said = make(tmp_path / "out", qa).stderr
    student = load(tmp_path / "out")
    tokenizer = student.processor.tokenizer
    for text in (*QUESTIONS, *ANSWERS):
        assert len(tokenizer(text)["input_ids"]) <= 2 * len(text.split())
    assert f"{sum(each.numel() for each in student.model.parameters()):,} parameters" in said
    assert f"{len(tokenizer):,} tokens" in said


def test_the_command_it_suggests_is_one_that_train_takes(qa: list[Path], tmp_path: Path) -> None:
    found = re.search(r"train it: p4dprep (train) (.*)", make(tmp_path / "out", qa).stderr)
    assert found is not None
    group = typer.main.get_command(app)
    context = group.commands["train"].make_context("train", found[2].split())  # type: ignore[attr-defined]
    assert context.params["student"] == str(tmp_path / "out")
    assert [Path(path) for path in context.params["qa"]] == qa


def test_the_same_inputs_give_the_same_bytes_and_another_seed_other_weights(qa: list[Path], tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    make(first, qa, "--seed", 3)
    make(again, qa[::-1], "--seed", 3)
    make(other, qa, "--seed", 4)
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (first, again, other)]
    assert contents[0] == contents[1]
    assert {name for name, content in contents[0].items() if content != contents[2][name]} == {"model.safetensors"}


def test_without_conversations_it_speaks_of_worlds(tmp_path: Path) -> None:
    make(tmp_path / "out")
    tokenizer = load(tmp_path / "out").processor.tokenizer
    for text in ("How does the speed of the yellow robot change over the video?", "to the left of the red cup"):
        assert len(tokenizer(text)["input_ids"]) <= len(text.split()) + 2


def test_what_cannot_be_made_is_one_line(
    qa: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    broken = tmp_path / "broken.json"
    broken.write_text('{"no": "list"}')
    for out, path, reason in (
        ("used", qa[0], "used exists and is not an empty folder; name a new one"),
        ("out", tmp_path / "nowhere.json", "nowhere.json cannot be read"),
        ("out", broken, "broken.json"),
    ):
        monkeypatch.setattr("sys.argv", ["p4dprep", "student", "new", str(tmp_path / out), "--qa", str(path)])
        with pytest.raises(SystemExit, match=r"^2$"):
            main()
        said = capsys.readouterr().err
        assert reason in said
        assert said.startswith("p4dprep: ")
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
