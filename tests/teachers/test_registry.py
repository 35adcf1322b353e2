"""How teachers are named and found, a stranger's package included, and `p4dprep teachers`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.teachers import app
from p4dprep.errors import RequestError, TeacherError
from p4dprep.registry import RESERVED_NAMES, TeacherSpec, available, build, load, package_of, parse_teacher
from p4dprep.targets import Teacher

ROOT = Path(__file__).parents[2]
OURS = {"depth-anything", "l4p", "opencv-dis", "ptlflow", "student", "truth", "videomae", "vjepa2"}


@pytest.mark.parametrize(
    ("text", "name", "kind", "argument", "options"),
    [
        ("opencv-dis", "opencv_dis", "opencv-dis", "", {}),
        ("opencv-dis?preset=fast", "opencv_dis", "opencv-dis", "", {"preset": "fast"}),
        ("depth-anything:ORG/N.a-me@v1", "depth_anything", "depth-anything", "ORG/N.a-me@v1", {}),
        ("near=depth-anything:/a/b=c:d", "near", "depth-anything", "/a/b=c:d", {}),
        ("x:a=b", "x", "x", "a=b", {}),
        ("l=videomae:D?layers=3,6&x=y=z", "l", "videomae", "D", {"layers": "3,6", "x": "y=z"}),
    ],
)
def test_a_teacher_is_written_in_one_word(
    text: str, name: str, kind: str, argument: str, options: dict[str, str]
) -> None:
    spec = parse_teacher(text)
    assert spec == TeacherSpec(name=name, kind=kind, argument=argument, options=options)
    assert str(spec) == text


@settings(deadline=None)  # the first example pays for imports
@given(
    name=st.from_regex(r"[a-z_][a-z0-9_]{0,39}", fullmatch=True).filter(lambda name: name not in RESERVED_NAMES),
    kind=st.from_regex(r"[a-z][a-z0-9_-]{0,20}", fullmatch=True),
    argument=st.text(st.characters(exclude_characters="?", exclude_categories=["Cs"])),
    options=st.dictionaries(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True),
        st.text(st.characters(exclude_characters="&", exclude_categories=["Cs"]), min_size=1),
    ),
)
def test_every_spec_reads_back_from_its_text(name: str, kind: str, argument: str, options: dict[str, str]) -> None:
    spec = TeacherSpec(name=name, kind=kind, argument=argument, options=options)
    assert parse_teacher(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "kind '' is not"),
        ("Depth:x", "kind 'Depth' is not"),
        ("x:", "nothing after the colon"),
        ("Near=x", "name 'Near' must be a lower-case identifier"),
        ("a" * 41 + "=x", "at most 40 characters"),
        ("ledger=x", "is the cache's own; choose another, such as my_ledger=x"),
        ("heads", "is the cache's own"),
        ("x?", "option '' is not key=value"),
        ("x?a", "option 'a' is not key=value"),
        ("x?a=1&a=2", "option 'a' twice"),
        ("x?a-b=1", "must be an identifier"),
    ],
)
def test_a_malformed_teacher_is_refused_with_the_rule(text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        parse_teacher(text)


def test_ours_are_found_the_way_a_strangers_are() -> None:
    points = available()
    assert points.keys() >= OURS
    assert {package_of(points[kind]) for kind in OURS} == {"p4dprep"}
    assert all(issubclass(load(kind), Teacher) for kind in OURS)


def test_a_misspelt_kind_names_the_nearest_and_all_others() -> None:
    with pytest.raises(RequestError, match=r"did you mean 'depth-anything'\? \(installed: .*depth-anything, .*l4p, "):
        load("depth-anythin")


GOOD = """
import numpy as np
from p4dprep.targets import Predictions, TargetSpec, Teacher, TeacherInfo

class Brightness(Teacher):
    info = TeacherInfo(summary="Mean brightness", licence="MIT", argument="", downloads="nothing")
    @classmethod
    def from_spec(cls, argument, options):
        return cls()
    def resolved_spec(self):
        return "", {}
    def targets(self, frames):
        shape, kind = (frames.num_frames, 1), "latents"
        return (TargetSpec(name="mean", dims=("t", "one"), shape=shape, dtype="float32", units="1", quantity=kind),)
    def fingerprint(self):
        return {"code": "1"}
    def setup(self, device):
        pass
    def predict(self, batch):
        mean = batch.frames_bthwc.mean((2, 3, 4), dtype=np.float32)[..., None]
        return Predictions(clip_ids=batch.clip_ids, arrays={"mean": mean})
"""


@pytest.fixture(scope="module")
def strangers_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody else's project, built and installed by uv into a folder of its own, without a network."""
    project, target = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    (project / "bright_teachers").mkdir()
    (project / "bright_teachers" / "__init__.py").write_text(GOOD)
    (project / "bright_teachers" / "broken.py").write_text("raise ImportError('needs a library that is not here')\n")
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "bright-teachers"\nversion = "1"\n'
        '[project.entry-points."p4dprep.teachers"]\nbright = "bright_teachers:Brightness"\n'
        'broken = "bright_teachers.broken:Missing"\nnot-a-teacher = "bright_teachers:np"\n'
    )
    command = [
        "-m", "uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--no-build-isolation",
        "--python", sys.executable, "--target", str(target), str(project),
    ]  # fmt: skip
    subprocess.run([sys.executable, *command], check=True)
    return target


def test_a_strangers_teacher_is_listed_by_the_command_line(strangers_package: Path) -> None:
    command = [sys.executable, "-c", "from cli.teachers import app; app()", "list", "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(strangers_package), str(ROOT)))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = {row["kind"]: row for row in json.loads(done.stdout)}
    assert rows.keys() >= OURS | {"bright", "broken", "not-a-teacher"}
    assert (rows["bright"]["package"], rows["bright"]["licence"]) == ("bright-teachers", "MIT")
    assert "needs a library that is not here" in rows["broken"]["problem"]
    assert rows["l4p"]["problem"] == ""


def test_a_strangers_teacher_is_built_by_name(strangers_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(strangers_package)
    assert type(build(parse_teacher("bright"))).__name__ == "Brightness"
    with pytest.raises(TeacherError, match=r"'broken' of package bright-teachers .* ImportError: needs a library"):
        load("broken")
    with pytest.raises(TeacherError, match=r"'not-a-teacher' of package bright-teachers .* is not a subclass"):
        load("not-a-teacher")


def test_listing_loads_no_heavy_library() -> None:
    kinds = sorted(OURS)
    code = (
        f"import sys; from p4dprep.registry import load; [load(kind).info for kind in {kinds}]\n"
        "heavy = {'torch', 'transformers', 'ptlflow', 'lightning', 'ray'} & sys.modules.keys(); assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_table_shows_every_kind_with_licence_and_downloads() -> None:
    result = typer.testing.CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    assert all(kind in result.stdout for kind in OURS)
    assert "[@REV]" in result.stdout  # not eaten as markup
    assert result.stdout.count("licence:") == result.stdout.count("downloads:") >= len(OURS)


@pytest.mark.parametrize("taps", ["1,2,3", "1,2,3,x", "4,3,2,1", "1,1,2,3", "-1,2,3,4"])
def test_import_l4p_refuses_taps_that_are_not_four_ascending_layers(taps: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "l4p.ckpt"
    checkpoint.write_bytes(b"")
    arguments = ["import-l4p", str(checkpoint), str(tmp_path / "out"), f"--taps={taps}"]
    result = typer.testing.CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, RequestError)
    assert "--taps" in str(result.exception)


def test_import_l4p_refuses_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    result = typer.testing.CliRunner().invoke(app, ["import-l4p", str(tmp_path / "no.ckpt"), str(tmp_path / "out")])
    assert isinstance(result.exception, RequestError)
    assert "there is no checkpoint file" in str(result.exception)
