"""`p4dprep report` through the real entry point: the page's path on stdout, refusals in one line."""

from pathlib import Path

import pytest

from cli.app import main
from tests.student.test_page import Page, line, run_folder


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["p4dprep", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_page_goes_into_the_run_or_where_it_is_asked_for_and_its_path_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run_folder(tmp_path / "run", [line(10)])
    for options, page in (
        ([], made / "report.html"),
        (["--out", str(tmp_path / "new" / "p.html")], tmp_path / "new/p.html"),
    ):
        assert run(["report", str(made), *options], monkeypatch) == 0
        assert capsys.readouterr().out == f"{page}\n"
        assert "Coverage" in Page(page).text
    assert not (made / "index.html").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--answers", "nowhere"], "p4dprep: nowhere has no result of p4dprep eval answers"),
        (["--against", "nowhere"], "nowhere"),
        (["--out", "run/log.jsonl/page.html"], "p4dprep: cannot write run/log.jsonl/page.html"),
        (["--cache", "nowhere"], "nowhere"),
        (["--data", "nowhere"], "p4dprep: --data nowhere needs --answers"),
        (["--limit", "3"], "p4dprep: --limit needs --against"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_exit_code_2(
    options: list[str],
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(Path("run"), [line(10)])
    assert run(["report", "run", *options], monkeypatch) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert fault in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not Path("run/report.html").exists()


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(tmp_path)], monkeypatch) == 2
    assert "is no run of p4dprep train" in capsys.readouterr().err
