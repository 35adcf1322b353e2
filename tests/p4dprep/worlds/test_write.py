"""Worlds as files: videos that decode to what was rendered, when it was; lists that others read; marks in place."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from p4dprep import corpus, worlds
from p4dprep.corpus import Sampling
from p4dprep.errors import P4DError, RequestError, StorageError
from p4dprep.storage import Store
from p4dprep.video import Decoder
from p4dprep.worlds import lists
from p4dprep.worlds.lists import read_summary, write_lists
from p4dprep.worlds.marks import COLOURS, draw_marks
from p4dprep.worlds.questions import TASK_NAMES
from p4dprep.worlds.render import render, trace
from p4dprep.worlds.write import (
    TIME_BASE,
    Recipe,
    encode_mp4,
    missing_clips,
    open_folder,
    presentation_seconds,
    process_pool,
    render_clips,
    write_clip,
)

RECIPE = Recipe(split="test", seed=33, size=(64, 96))
NUM_CLIPS = 4


def is_steady(index: int) -> bool:
    """Whether the times between frames are one, up to a millisecond."""
    return bool(np.ptp(np.diff(RECIPE.scene(index).frame_seconds)) < 2e-3)


QUICK = [index for index in range(24) if not RECIPE.scene(index).effects.shutter_seconds]
STEADY = next(index for index in QUICK if is_steady(index))
CHANGING = next(index for index in QUICK if not is_steady(index))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips and their lists, made by two processes."""
    out = tmp_path_factory.mktemp("out") / "worlds"
    store = open_folder(out, RECIPE)
    with process_pool(2) as pool:
        render_clips(store, RECIPE, range(NUM_CLIPS), pool, lambda *_: None)
        write_lists(store, RECIPE, NUM_CLIPS, pool, lambda *_: None)
    return out


def read_json(path: Path) -> list[dict[str, object]]:
    found = json.loads(path.read_text())
    assert isinstance(found, list)
    return found


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Videos


@pytest.mark.parametrize("index", [STEADY, CHANGING], ids=["constant rate", "variable rate"])
def test_a_video_decodes_to_the_rendered_frames_at_their_own_times(index: int, tmp_path: Path) -> None:
    store = open_folder(tmp_path, RECIPE)
    write_clip(store, RECIPE, index)
    scene = RECIPE.scene(index)
    seconds = presentation_seconds(scene)
    video = tmp_path / "videos" / f"{scene.id}.mp4"
    with Decoder() as decoder:
        clip = decoder.read(video, Sampling(num_frames=len(seconds), height=64, width=96))
        probe = decoder.probe(video)
    assert (probe.codec, probe.height, probe.width) == ("h264", 64, 96)
    np.testing.assert_array_equal(clip.time_seconds_t, seconds)
    np.testing.assert_allclose(seconds, scene.frame_seconds, atol=float(TIME_BASE))
    rendered = render(scene, seconds, 64, 96)
    mean_square = np.square(clip.frames_thwc.astype(float) - rendered).mean(axis=(1, 2, 3))
    psnr = 10 * np.log10(255**2 / mean_square)
    others = np.square(clip.frames_thwc[1:].astype(float) - rendered[:-1]).mean(axis=(1, 2, 3))
    assert psnr.min() > 25
    assert (mean_square[1:] <= others).mean() > 0.9  # each is its own frame, not its neighbour


def test_the_first_frame_and_its_mask_are_those_of_the_video(folder: Path) -> None:
    scene = RECIPE.scene(0)
    seconds = presentation_seconds(scene)[:1]
    frame_hwc = np.asarray(Image.open(folder / "frames" / f"{scene.id}.png"))
    mask_hw = np.asarray(Image.open(folder / "masks" / f"{scene.id}.png"))
    np.testing.assert_array_equal(frame_hwc, render(scene, seconds, 64, 96)[0])
    np.testing.assert_array_equal(mask_hw, trace(scene, seconds, 64, 96).instances_thw[0])


def test_coding_the_same_frames_gives_the_same_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), np.uint8)
    ticks = np.cumsum(np.arange(12) * 900)
    coded = []
    for padding in (0, 7, 1 << 16):  # what else lies in memory must not matter
        kept = bytearray(padding)
        coded.append(encode_mp4(iter(noise), ticks))
        del kept
    assert coded[0] == coded[1] == coded[2]
    with pytest.raises(ValueError, match="zip"):
        encode_mp4(iter(noise), ticks[:-1])


def test_the_same_clip_is_the_same_bytes_in_every_process(folder: Path, tmp_path: Path) -> None:
    write_clip(open_folder(tmp_path, RECIPE), RECIPE, 1)
    for name in ("videos/test-33-1.mp4", "frames/test-33-1.png", "masks/test-33-1.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_only_missing_clips_are_left_to_do(folder: Path) -> None:
    store = open_folder(folder, RECIPE)
    assert missing_clips(store, RECIPE, NUM_CLIPS) == []
    assert missing_clips(store, RECIPE, NUM_CLIPS + 2) == [NUM_CLIPS, NUM_CLIPS + 1]


@pytest.mark.parametrize("name", ["videos/test-33-2.mp4", "frames/test-33-2.png", "masks/test-33-2.png"])
def test_a_clip_that_lost_one_of_its_files_is_done_again(folder: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).unlink()
    assert missing_clips(open_folder(copy, RECIPE), RECIPE, NUM_CLIPS) == [2]


def test_a_process_that_is_killed_is_an_error_with_a_way_out() -> None:
    with pytest.raises(P4DError, match=r"a rendering process was killed.*fewer --workers"), process_pool(1) as pool:
        pool.submit(os._exit, 1).result()


def test_rendering_processes_use_one_thread_each_and_leave_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    with process_pool(1) as pool:
        assert pool.submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == "1"
    assert dict(os.environ) == before


# The folder


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(split="val", seed=33, size=(64, 96)), "holds worlds of split test, not val; name another folder"),
        (Recipe(split="test", seed=6, size=(64, 96)), "worlds of seed 33, not 6"),
        (Recipe(split="test", seed=33), r"worlds of size \[64, 96\], not None"),
    ],
)
def test_other_worlds_are_not_mixed_in(folder: Path, recipe: Recipe, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        open_folder(folder, recipe)


def test_worlds_of_another_version_are_not_mixed_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = worlds.VERSION
    monkeypatch.setattr(worlds, "VERSION", "another")
    with pytest.raises(RequestError, match=f"worlds of version {version}, not another"):
        open_folder(folder, RECIPE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("holiday.mp4", b"", r"holds other files than worlds \(holiday.mp4\)"),
        ("worlds.json", b"[1]", "is not what p4dprep worlds writes"),
        ("worlds.json", b"", "is not what p4dprep worlds writes"),
    ],
)
def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        open_folder(tmp_path, RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_bucket_is_no_folder() -> None:
    with pytest.raises(RequestError, match="s3://bucket/worlds is no folder of this machine"):
        open_folder("s3://bucket/worlds", RECIPE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "trial"}, "split is 'trial'; it must be one of train, val, test, hard"),
        ({"split": "test", "seed": -1}, "seed is -1"),
        ({"split": "test", "size": (64, 95)}, "size is 64x95; both sides must be even"),
        ({"split": "test", "size": (16, 64)}, "from 32 to 4096"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Recipe(**fields)  # type: ignore[arg-type]


# Lists


def test_the_manifest_is_a_corpus_that_may_be_moved(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    table = corpus.discover(str(moved / "manifest.jsonl"))
    assert table["id"].to_pylist() == [f"test-33-{index}" for index in range(NUM_CLIPS)]
    assert [os.path.getsize(uri) for uri in table["uri"].to_pylist()] == table["size_bytes"].to_pylist()
    assert all(uri.startswith(str(moved)) for uri in table["uri"].to_pylist())
    scene = RECIPE.scene(2)
    row = {name: table[name][2].as_py() for name in ("split", "setting", "camera", "num_bodies")}
    assert row == {
        "split": "test",
        "setting": scene.setting,
        "camera": scene.camera.kind,
        "num_bodies": len(scene.bodies),
    }


def test_scenes_tell_where_everything_is(folder: Path) -> None:
    for index, record in enumerate(read_lines(folder / "scenes.jsonl")):
        scene, camera = RECIPE.scene(index), record["camera"]
        assert isinstance(camera, dict)
        seconds = presentation_seconds(scene)
        assert (record["id"], record["height"], record["width"]) == (scene.id, 64, 96)
        assert record["frame_seconds"] == seconds.tolist()
        np.testing.assert_allclose(camera["world_to_camera"], scene.camera.world_to_camera(seconds), atol=1e-6)
        mask_hw = np.asarray(Image.open(folder / "masks" / f"{scene.id}.png"))
        bodies = record["bodies"]
        assert isinstance(bodies, list)
        for body, facts in zip(scene.bodies, bodies, strict=True):
            assert facts["name"] == body.name
            np.testing.assert_allclose(facts["centre_world"], body.trajectory.position(seconds), atol=1e-6)
            seen = mask_hw == facts["body"] + 1
            assert facts["first_frame_fraction"] == pytest.approx(seen.mean())
            if facts["first_frame_box"] is not None:
                left, top, right, bottom = facts["first_frame_box"]
                assert seen[top:bottom, left:right].sum() == seen.sum() > 0


def test_questions_are_in_the_layout_of_the_benchmark_with_marks_that_exist(folder: Path) -> None:
    records = read_json(folder / "test.json")
    assert records
    for record in records:
        assert set(record) == {
            *("id", "benchmark", "task", "video", "source", "som_image"),
            *("question", "question_raw", "options", "answer"),
        }
        assert record["task"] in TASK_NAMES.values()
        assert record["answer"] in record["options"]  # type: ignore[operator]
        assert (folder / str(record["video"])).is_file()
        num_regions = len({number for number in range(1, 7) if f"<obj_{number}>" in json.dumps(record)})
        assert bool(record["som_image"]) == bool(num_regions)
        if num_regions:
            path = folder / str(record["som_image"])
            assert path.is_file()
            assert len(path.stem.split("_")[1].split("-")) == num_regions
    summary = read_summary(Store(str(folder)))
    assert summary is not None
    assert sum(summary.num_questions.values()) == len(records) == len(read_json(folder / "qa.json"))


def test_conversations_are_as_llava_has_them(folder: Path) -> None:
    for record in read_json(folder / "qa.json"):
        assert set(record) - {"regions"} == {"id", "conversations", "video"}
        turns = record["conversations"]
        assert isinstance(turns, list)
        assert [turn["from"] for turn in turns] == ["human", "gpt"]
        assert turns[0]["value"].startswith("<video>\n")
        assert (folder / str(record["video"])).is_file()
    assert len(read_json(folder / "timebench.json")) == NUM_CLIPS


def test_regions_of_a_conversation_are_the_marked_bodies_in_the_first_frame(folder: Path) -> None:
    marked = {record["id"]: str(record["som_image"]) for record in read_json(folder / "test.json")}
    num_regions = 0
    for record in read_json(folder / "qa.json"):
        mask_hw = np.asarray(Image.open(folder / "masks" / f"{Path(str(record['video'])).stem}.png"))
        height, width = mask_hw.shape
        regions = record.get("regions", [])
        assert isinstance(regions, list)
        assert bool(regions) == bool(marked[record["id"]])
        instances = [int(number) for number in Path(marked[record["id"]]).stem.split("_")[-1].split("-") if regions]
        for instance, region in zip(instances, regions, strict=True):
            rows, columns = (mask_hw == instance).nonzero()
            corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert region == pytest.approx([c / size for c, size in zip(corners, (width, height) * 2, strict=True)])
            num_regions += 1
    assert num_regions > 5


def test_lists_written_again_are_the_same_and_lists_of_no_question_are_valid(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    store = open_folder(copy, RECIPE)
    with process_pool(1) as pool:
        write_lists(store, RECIPE, NUM_CLIPS, pool, lambda *_: None)
        names = ("manifest.jsonl", "scenes.jsonl", "qa.json", "test.json", "timebench.json", "summary.json")
        assert {name: (copy / name).read_bytes() for name in names} == {
            name: (folder / name).read_bytes() for name in names
        }
        few = write_lists(store, RECIPE, 1, pool, lambda *_: None)
    assert few.num_clips == len(read_lines(copy / "manifest.jsonl")) == 1
    assert len(read_json(copy / "qa.json")) == sum(few.num_questions.values())


def test_lists_that_fail_leave_those_that_were_there(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "masks" / "test-33-3.png").unlink()
    with (
        pytest.raises(StorageError, match=r"lists of .* cannot be written: .*masks/test-33-3\.png"),
        process_pool(1) as pool,
    ):
        write_lists(open_folder(copy, RECIPE), RECIPE, NUM_CLIPS, pool, lambda *_: None)
    assert (copy / "qa.json").read_bytes() == (folder / "qa.json").read_bytes()
    assert not list(copy.glob("*.partial"))
    assert read_summary(Store(str(copy))) is None  # so that they are made again


def test_blocks_are_few_whole_and_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "BLOCK_CLIPS", 10)
    for num_clips in (1, 10, 11, 95, 100):
        blocks = lists._blocks(num_clips)
        assert [blocks[0].start, blocks[-1].stop] == [0, num_clips]
        assert all(one.stop == other.start for one, other in pairwise(blocks))
        assert len(blocks) == -(-num_clips // 10)
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


# Marks


def squares(*places: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A mask of squares (left, top, side), instance 1, 2, ..."""
    mask_hw = np.zeros((120, 160), np.uint8)
    for instance, (left, top, side) in enumerate(places, start=1):
        mask_hw[top : top + side, left : left + side] = instance
    return mask_hw


def pixels(image: Image.Image, colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (np.asarray(image) == colour).all(axis=-1)
    return found


def test_a_mark_outlines_its_object_and_leaves_it_as_it_is() -> None:
    mask_hw = squares((30, 40, 12), (100, 50, 14), (60, 90, 10))
    picture = np.full((120, 160, 3), 77, np.uint8)
    image = draw_marks(picture, mask_hw, [3, 1])
    for instance, colour in ((3, COLOURS[0]), (1, COLOURS[1])):
        rows, columns = np.nonzero(mask_hw == instance)
        ring = pixels(image, colour)[rows.min() - 1 : rows.max() + 2, columns.min() - 1 : columns.max() + 2]
        assert ring[0].all()
        assert ring[:, 0].all()
    assert (np.asarray(image)[mask_hw > 0] == 77).all()  # the tags stand beside small objects
    assert (picture == 77).all()


def test_tags_stand_in_large_objects_beside_small_ones_and_never_on_each_other() -> None:
    mask_hw = squares((2, 2, 70), (100, 0, 8), (109, 0, 8))
    image = draw_marks(np.zeros((120, 160, 3), np.uint8), mask_hw, [1, 2, 3])
    places = []
    for number in range(3):
        rows, columns = np.nonzero(pixels(image, COLOURS[number]) & ~_rim(mask_hw, number + 1))
        places.append((rows.min(), columns.min(), rows.max(), columns.max()))
    top, left, bottom, right = places[0]
    assert (mask_hw[top:bottom, left:right] == 1).all()
    for top, left, bottom, right in places[1:]:
        assert not mask_hw[top:bottom, left:right].any()
    (_, _, _, right), (_, left, _, _) = sorted(places[1:], key=lambda place: place[1])
    assert right < left or places[1][2] < places[2][0] or places[2][2] < places[1][0]


def _rim(mask_hw: NDArray[np.uint8], instance: int) -> NDArray[np.bool_]:
    rows, columns = np.nonzero(mask_hw == instance)
    around = np.zeros(mask_hw.shape, bool)
    around[max(0, rows.min() - 1) : rows.max() + 2, max(0, columns.min() - 1) : columns.max() + 2] = True
    return around & (mask_hw != instance)


def test_marks_of_real_questions_lie_on_the_bodies_that_they_name(folder: Path) -> None:
    path = sorted((folder / "images").glob("*_*.png"))[0]
    scene_id, marks = path.stem.split("_")
    mask_hw = np.asarray(Image.open(folder / "masks" / f"{scene_id}.png"))
    plain = np.asarray(Image.open(folder / "frames" / f"{scene_id}.png"))
    image = Image.open(path)
    changed = (np.asarray(image) != plain).any(axis=-1)
    for number, instance in enumerate(map(int, marks.split("-"))):
        outline = pixels(image, COLOURS[number]) & changed
        rows, columns = np.nonzero(mask_hw == instance)
        near = outline[max(0, rows.min() - 1) : rows.max() + 2, max(0, columns.min() - 1) : columns.max() + 2]
        assert near.sum() >= 4


def test_a_mark_on_what_is_not_seen_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="instance 2 is not in the picture"):
        draw_marks(np.zeros((120, 160, 3), np.uint8), squares((9, 9, 9)), [2])
