"""The page of a run: its numbers are the log's, its pictures the run's, and nothing in a run can break out of it."""

import base64
import itertools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from p4dprep.errors import CorruptDataError, RequestError
from student.page import write_page

HOSTILE = "\"><script>alert(1)</script><img src=http://evil.example/x onerror='x'></svg><b>"
SETTINGS = {"cache": "s3://bucket/cache", "student": "ORG/NAME", "max_steps": 40, "latent_weight": 0.5}
STEPS = (10, 20, 30, 40)
CELLS = ("th", "td", "dt", "dd")


def line(step: int, **terms: float) -> dict[str, float]:
    return {"loss": 400 / step, "step": step, "epoch": step / 20, **terms}


def run_folder(
    folder: Path, records: list[dict[str, Any]], settings: dict[str, Any] | None = None, pictures: tuple[int, ...] = ()
) -> Path:
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS if settings is None else settings, sort_keys=False))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step in pictures:
        (folder / "pictures" / f"step-{step:08d}.webp").write_bytes(f"picture {step}".encode())
    return folder


class Page(HTMLParser):
    """A page's tags, attributes, texts, and texts of its table cells and definitions."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[str] = []
        self.is_in_cell = False
        self.text = ""
        self.curves: dict[str, str] = {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "path" and self.tags[-1] == "g" and self.attributes[-1][1].startswith("curve-"):
            self.curves[self.attributes[-1][1]] = found["d"]
        self.tags.append(tag)
        self.attributes += found.items() or [("", "")]
        if tag in CELLS:
            self.cells.append("")
            self.is_in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.is_in_cell = self.is_in_cell and tag not in CELLS

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.is_in_cell:
            self.cells[-1] += data

    def after(self, label: str, count: int = 1) -> list[str]:
        """The cells behind the one with this text."""
        place = self.cells.index(label) + 1
        return self.cells[place : place + count]

    def points(self, curve: str) -> list[tuple[float, float]]:
        numbers = [float(number) for number in re.findall(r"[\d.]+", self.curves[curve])]
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    @property
    def pictures(self) -> list[str]:
        """What the images hold."""
        sources = [value for name, value in self.attributes if name == "src"]
        return [base64.b64decode(source.removeprefix("data:image/webp;base64,")).decode() for source in sources]


def test_nothing_in_a_run_can_break_out_of_its_page(tmp_path: Path) -> None:
    settings = {"cache": HOSTILE, HOSTILE: HOSTILE, "trainer": {HOSTILE: [HOSTILE]}, "tune": "half \udc80 a character"}
    records = [line(step, **{f"ed/{HOSTILE}": 2.0 * step, HOSTILE: 1.0}) for step in STEPS]
    run = run_folder(tmp_path / HOSTILE.replace("/", "|"), records, settings, (1,))
    for name in (f"step-1{HOSTILE}.webp", f"step-00000002.webp{HOSTILE}"):
        (run / "pictures" / name.replace("/", "|")).write_bytes(b"hostile")
    page = Page(write_page(run))
    assert page.tags.count("img") == 1
    assert page.tags.count("svg") == 2
    assert not {"script", "link", "iframe", "object", "a", "use", "image", "foreignobject"} & set(page.tags)
    assert page.tags.count("b") == page.tags.count("figcaption") - 1
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "xlink:href")]
    assert all(value.startswith("data:image/webp;base64,") for value in addresses)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not any("url(" in value for name, value in page.attributes if name == "style")
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    assert page.text.count(HOSTILE) > 5
    assert page.pictures == ["picture 1"]


def test_storage_options_and_credentials_stay_out(tmp_path: Path) -> None:
    settings = {
        "cache": "s3://me:hunter2@bucket/cache?token=hunter2",
        "trainer": {"hub_token": "hunter2"},
        "my_password": "hunter2",
        "storage_options": {"key": "hunter2"},
    }
    text = write_page(run_folder(tmp_path / "run", [line(1)], settings)).read_text()
    assert "hunter2" not in text
    assert "storage_options" not in text
    assert "s3://***@bucket/cache" in text


def test_every_term_has_a_curve_with_a_point_for_each_line_at_the_height_of_its_value(tmp_path: Path) -> None:
    records = [
        line(step, sft=step * 0.01, ld=1 + step, **{"ld/tap0": step, "ld/tap1": 2 + step, "ed/l4p_depth": 60.0 - step})
        for step in STEPS
    ]
    page = Page(write_page(run_folder(tmp_path / "run", records)))
    assert sorted(page.curves) == [f"curve-{name}" for name in ("0-0", "1-0", "2-0", "2-1", "2-2", "3-0")]
    for name in page.curves:
        places = page.points(name)
        assert len(places) == len(STEPS)
        gaps = {round(after[0] - before[0], 2) for before, after in itertools.pairwise(places)}
        assert len(gaps) == 1
    falling, rising = page.points("curve-3-0"), page.points("curve-1-0")
    assert [y for _, y in falling] == sorted(y for _, y in falling)
    assert [y for _, y in rising] == sorted((y for _, y in rising), reverse=True)
    for title in ("Total", "SFT", "LD", "ED l4p_depth", "tap1", "50 → 20"):
        assert title in page.text


def test_all_curves_share_the_axis_of_steps_even_if_a_term_starts_late(tmp_path: Path) -> None:
    records = [line(step, **({"ed/l4p_flow": 5.0 + step} if step > 20 else {})) for step in STEPS]
    page = Page(write_page(run_folder(tmp_path / "run", records)))
    total, flow = page.points("curve-0-0"), page.points("curve-3-0")
    assert len(flow) == 2
    assert [x for x, _ in flow] == [x for x, _ in total[2:]]


def test_a_loss_that_falls_far_is_drawn_on_a_log_scale(tmp_path: Path) -> None:
    def heights(values: list[float]) -> list[float]:
        records = [line(step) | {"loss": value} for step, value in zip(STEPS, values, strict=True)]
        folder = tmp_path / str(values)
        return [y for _, y in Page(write_page(run_folder(folder, records))).points("curve-0-0")]

    far, near = heights([1000, 100, 10, 1]), heights([4, 3, 2, 1])
    for places in (far, near):
        first, second, third, last = places
        assert second - first == pytest.approx(third - second, abs=1e-3)
        assert last - third == pytest.approx(third - second, abs=1e-3)


def test_what_is_0_throughout_has_no_curve_and_what_is_no_number_is_counted(tmp_path: Path) -> None:
    records = [line(step, sft=0.0) for step in STEPS]
    records[2]["loss"] = float("nan")
    records[3]["loss"] = float("inf")
    page = Page(write_page(run_folder(tmp_path / "run", records)))
    assert list(page.curves) == ["curve-0-0"]
    assert len(page.points("curve-0-0")) == 2
    assert "2 values are not finite and not drawn" in page.text
    assert page.after("loss", 3) == ["40", "inf", "–"]


def test_the_table_holds_first_last_and_change_of_every_number(tmp_path: Path) -> None:
    records = [line(step, grad_norm=0.001 * step, learning_rate=0.0, sft=12345.0) for step in STEPS]
    page = Page(write_page(run_folder(tmp_path / "run", records)))
    assert page.after("loss", 3) == ["40", "10", "−75%"]
    assert page.after("grad_norm", 3) == ["0.01", "0.04", "+300%"]
    assert page.after("learning_rate", 3) == ["0", "0", "–"]
    assert page.after("sft", 3) == ["12,345", "12,345", "+0%"]


def test_speed_is_that_of_the_whole_run_not_the_mean_of_its_lines(tmp_path: Path) -> None:
    slow, fast = {"samples_per_second": 1.0, "data_wait_fraction": 0.5}, {"samples_per_second": 4.0}
    records = [line(2, **slow), line(3, **fast, data_wait_fraction=0.0), line(4)]
    page = Page(write_page(run_folder(tmp_path / "run", records)))
    assert page.after("speed") == ["1.33 samples/s"]
    assert page.after("waiting for data") == ["44.4% of the time"]


def test_first_and_last_pictures_stand_side_by_side_and_some_between_are_kept_folded(tmp_path: Path) -> None:
    steps = (*range(0, 1000, 20), 99999999, 100000000)
    page = Page(write_page(run_folder(tmp_path / "run", [line(1)], pictures=steps)))
    assert page.pictures[:2] == ["picture 0", "picture 100000000"]
    between = [int(picture.removeprefix("picture ")) for picture in page.pictures[2:]]
    assert len(between) == 10
    assert between == sorted(set(between) - {0, 100000000})
    assert (between[0], between[-1]) == (20, 99999999)
    assert page.tags.index("details") > page.tags.index("img")
    assert "10 of 50 pictures in between" in page.text


def test_a_run_that_has_just_begun_or_is_still_going_has_its_page(tmp_path: Path) -> None:
    begun = Page(write_page(run_folder(tmp_path / "begun", [])))
    assert begun.after("step") == ["none logged yet"]
    assert "svg" not in begun.tags
    one = run_folder(tmp_path / "one", [line(10)], pictures=(1,))
    with open(one / "log.jsonl", "a") as file:
        file.write('{"loss": 3, "st')
    page = Page(write_page(one))
    assert page.after("step") == ["10 of 40"]
    assert len(page.points("curve-0-0")) == 1
    assert page.pictures == ["picture 1"]
    assert "details" not in page.tags


def test_after_a_resume_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    records = [line(10), line(20) | {"loss": 999.0}, line(30) | {"loss": 998.0}, line(15), line(20), line(30)]
    page = Page(write_page(run_folder(tmp_path / "run", records)))
    places = page.points("curve-0-0")
    assert len(places) == 4
    assert places == sorted(places)
    assert page.after("loss", 2) == ["40", "13.3"]


def test_the_same_run_gives_the_same_page_and_a_long_one_stays_small(tmp_path: Path) -> None:
    records = [line(step, sft=2 + (step * 7919 % 101) / 100) for step in range(1, 20001)]
    run = run_folder(tmp_path / "run", records, pictures=(1, 2, 3))
    once = write_page(run).read_bytes()
    assert write_page(run).read_bytes() == once
    assert len(once) < 400_000
    assert not [name for name in os.listdir(run) if "partial" in name]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"step": 1, "loss": "much"}, r"log\.jsonl, line 2: 'loss' is 'much', not a number"),
        ({"loss": 1.0}, r"log\.jsonl, line 2 has no step"),
    ],
)
def test_a_damaged_log_is_named_with_its_line(tmp_path: Path, record: Any, fault: str) -> None:
    run = run_folder(tmp_path / "run", [line(1), record, line(3)])
    with pytest.raises(CorruptDataError, match=fault):
        write_page(run)


def test_a_folder_without_a_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no run of p4dprep train"):
        write_page(tmp_path)
