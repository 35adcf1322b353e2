"""The lists beside worlds' videos: what to extract, what is in each scene, what to ask.

    OUT/manifest.jsonl  a corpus for `p4dprep extract`; its uris are relative, so the folder may be moved
    OUT/scenes.jsonl    facts of each scene: camera, bodies, boxes, speeds at every frame
    OUT/qa.json         training conversations as LLaVA has them, with the boxes of the regions they speak of
    OUT/test.json       the same questions in the layout of R4D-Bench
    OUT/timebench.json  how long is the video
    OUT/grounding.json  of plain worlds: what is where in the pictures, for students made from nothing;
                        grounding-first.json has what can be asked about the first frame alone
    OUT/images/*.png    Set-of-Mark pictures of the questions' regions: SCENE_1-3.png has mark 1 on body 1, mark 2 on 3
    OUT/summary.json    counts; written last, so that it says that the lists are whole

Each file is replaced whole. Clips pass through in blocks, so that memory does not grow with their number.
"""

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise, repeat
from typing import TextIO

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from p4dprep import worlds
from p4dprep.errors import StorageError
from p4dprep.storage import Store
from p4dprep.worlds.grounding import Pair, describe_pictures, is_of_first_frame, to_grounding
from p4dprep.worlds.marks import draw_marks
from p4dprep.worlds.questions import (
    CATEGORIES,
    Category,
    FrameBox,
    Query,
    Question,
    R4DRecord,
    balance,
    to_lessons,
    to_llava,
    to_r4d,
    to_timebench,
)
from p4dprep.worlds.scene import Scene
from p4dprep.worlds.templates import ask
from p4dprep.worlds.tracks import ObjectFacts, object_facts
from p4dprep.worlds.write import (
    Progress,
    Recipe,
    frame_key,
    mask_key,
    png_bytes,
    presentation_seconds,
    video_key,
)

BLOCK_CLIPS = 2000
"""Most clips whose questions are balanced together. More would take memory in proportion; fewer would lose questions,
since the wrong options of one are the right ones of others."""

_SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the lists hold: clips, and questions per category."""

    num_clips: int
    num_questions: dict[Category, int]


@dataclass(frozen=True, kw_only=True)
class _Described:
    """One clip's part of the lists, as made by a process of the pool."""

    scene_id: str
    duration_seconds: float
    manifest_line: str
    scene_line: str
    timebench: list[R4DRecord]
    queries: tuple[Query, ...]
    pictures: tuple[Pair, ...]
    boxes: dict[int, FrameBox]


def read_summary(store: Store) -> Summary | None:
    """Counts of the lists, None if they are not whole."""
    try:
        return Summary(**json.loads(store.get(_SUMMARY)))
    except FileNotFoundError:
        return None


def write_lists(store: Store, recipe: Recipe, num_clips: int, pool: ProcessPoolExecutor, progress: Progress) -> Summary:
    """Write all lists of the clips 0 to `num_clips` - 1, whose videos must be there.

    Raises:
        StorageError: the disk refused; the lists that stood there before may be of another number of clips.
    """
    store.delete(_SUMMARY)
    counts: Counter[Category] = Counter()
    try:
        with contextlib.ExitStack() as files:
            lists = _Lists(store, recipe.is_plain, files)
            for block in _blocks(num_clips):
                described = list(pool.map(_describe, repeat(store.root), repeat(recipe), block, chunksize=4))
                questions = balance((query for clip in described for query in clip.queries), recipe.seed)
                # In plain worlds things go by their colours, and nothing is marked.
                images = {} if recipe.is_plain else _draw_images(store, questions)
                lists.add(described, questions, images)
                counts.update(question.category for question in questions)
                progress(block.stop, num_clips)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno, f"the lists of {store.url} cannot be written: {error}") from None
    summary = Summary(num_clips=num_clips, num_questions={category: counts[category] for category in CATEGORIES})
    store.put_if_absent(_SUMMARY, json.dumps(asdict(summary)).encode())
    return summary


def _blocks(num_clips: int) -> list[range]:
    """The clips in as few blocks as may be, of nearly one size."""
    ends = np.linspace(0, num_clips, -(-num_clips // BLOCK_CLIPS) + 1).round().astype(int).tolist()
    return [range(start, stop) for start, stop in pairwise(ends)]


def _describe(root: str, recipe: Recipe, index: int) -> _Described:
    store, scene = Store(root), recipe.scene(index)
    seconds, mask_hw = presentation_seconds(scene), _picture(store, mask_key(scene.id))
    facts = object_facts(scene, seconds, mask_hw)
    size_bytes = os.path.getsize(store.path(video_key(scene.id)))
    return _Described(
        scene_id=scene.id,
        duration_seconds=scene.duration_seconds,
        manifest_line=_manifest_line(scene, size_bytes),
        scene_line=_scene_line(scene, recipe.video_size(scene), facts),
        timebench=to_timebench([scene], videos={scene.id: video_key(scene.id)}),
        queries=ask(scene, facts),
        pictures=describe_pictures(scene, seconds) if recipe.is_plain else (),
        boxes=dict(_frame_boxes(facts, mask_hw.shape)),
    )


def _frame_boxes(facts: Sequence[ObjectFacts], shape_hw: tuple[int, ...]) -> Iterator[tuple[int, FrameBox]]:
    """The bodies that the first frame shows, each with its box in fractions of the frame."""
    height, width = shape_hw
    for body in facts:
        if body.first_frame_box is not None:
            left, top, right, bottom = body.first_frame_box
            yield body.body, (left / width, top / height, right / width, bottom / height)


def _picture(store: Store, key: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(store.get(key))) as image:
        return np.asarray(image)


def _manifest_line(scene: Scene, size_bytes: int) -> str:
    row = {"id": scene.id, "uri": video_key(scene.id), "size_bytes": size_bytes, "split": scene.split}
    return json.dumps(row | {"setting": scene.setting, "camera": scene.camera.kind, "num_bodies": len(scene.bodies)})


def _scene_line(scene: Scene, video_size: tuple[int, int], facts: Sequence[ObjectFacts]) -> str:
    """All that is known of a scene, in metres, seconds, radians and pixels; per-frame lists follow `frame_seconds`."""
    (height, width), seconds, camera = video_size, presentation_seconds(scene), scene.camera
    record = {
        "id": scene.id,
        "version": worlds.VERSION,
        "split": scene.split,
        "setting": scene.setting,
        "layout": scene.layout,
        "video": video_key(scene.id),
        "height": height,
        "width": width,
        "duration_seconds": scene.duration_seconds,
        "frame_seconds": seconds.tolist(),
        "camera": {
            "kind": camera.kind,
            "fov_x": camera.fov_x,
            "intrinsics": _rounded(camera.intrinsics(height, width)),
            "world_to_camera": _rounded(camera.world_to_camera(seconds)),
        },
        "effects": asdict(scene.effects),
        "lights": [asdict(light) for light in scene.lights],
        "bodies": [_body_record(body) for body in facts],
    }
    return json.dumps(record)


def _body_record(facts: ObjectFacts) -> dict[str, object]:
    per_frame: dict[str, ArrayLike] = {
        "centre_world": [box.centre for box in facts.boxes_world],
        "yaw_world": [box.yaw for box in facts.boxes_world],
        "centre_camera0": [box.centre for box in facts.boxes_camera0],
        "yaw_camera0": [box.yaw for box in facts.boxes_camera0],
        "speed": facts.speeds,
        "acceleration": facts.accelerations,
    }
    return {
        "body": facts.body,
        "name": facts.name,
        "motion": facts.motion,
        "length_width_height": facts.boxes_world[0].size,
        "mean_speed": facts.mean_speed,
        "mean_acceleration": facts.mean_acceleration,
        "displacement_metres": facts.displacement_metres,
        "path_length_metres": facts.path_length_metres,
        "num_frames_in_view": facts.num_frames_in_view,
        "first_frame_box": facts.first_frame_box,
        "first_frame_fraction": facts.first_frame_fraction,
    } | {name: _rounded(values) for name, values in per_frame.items()}


def _rounded(values: ArrayLike) -> object:
    """To a micrometre or microradian: a list of frames stays readable, and half as long."""
    return np.round(np.asarray(values, float), 6).tolist()


def _draw_images(store: Store, questions: Sequence[Question]) -> dict[str, str]:
    """Question id to its Set-of-Mark image, drawn unless it is there; questions on the same regions share one."""
    keys = {question.id: _image_key(question) for question in questions if question.regions}
    drawn = set()
    for question in questions:
        key = keys.get(question.id)
        if key is not None and not store.exists(key):
            frame_hwc, mask_hw = (_picture(store, name(question.scene_id)) for name in (frame_key, mask_key))
            image = draw_marks(frame_hwc, mask_hw, [body + 1 for body in question.regions])
            store.put_if_absent(key, png_bytes(image), durable=False)
            drawn.add(key)
    store.sync(drawn)
    return keys


def _image_key(question: Question) -> str:
    return f"images/{question.scene_id}_{'-'.join(str(body + 1) for body in question.regions)}.png"


class _Lists:
    """The five lists while they are written, to be replaced when `files` closes without an error."""

    def __init__(self, store: Store, is_plain: bool, files: contextlib.ExitStack) -> None:
        def enter(name: str) -> TextIO:
            return files.enter_context(_replacing(store.path(name)))

        self._manifest, self._scenes = enter("manifest.jsonl"), enter("scenes.jsonl")
        self._qa, self._test, self._timebench = (
            files.enter_context(_array(enter(name))) for name in ("qa.json", "test.json", "timebench.json")
        )
        self._is_plain = is_plain
        if is_plain:
            self._grounding, self._first_grounding = (
                files.enter_context(_array(enter(name))) for name in ("grounding.json", "grounding-first.json")
            )

    def add(self, clips: Sequence[_Described], questions: Sequence[Question], som_images: dict[str, str]) -> None:
        """One block of clips, with their questions."""
        videos = {clip.scene_id: video_key(clip.scene_id) for clip in clips}
        self._manifest.writelines(f"{clip.manifest_line}\n" for clip in clips)
        self._scenes.writelines(f"{clip.scene_line}\n" for clip in clips)
        if self._is_plain:
            seconds = {clip.scene_id: clip.duration_seconds for clip in clips}
            self._qa.extend(to_lessons(questions, videos=videos, durations_seconds=seconds))
            asked = {scene_id: list(same) for scene_id, same in groupby(questions, lambda each: each.scene_id)}
            for clip in clips:
                found = to_grounding(clip.scene_id, videos[clip.scene_id], clip.pictures, asked.get(clip.scene_id, []))
                self._grounding.extend(found)
                self._first_grounding.extend(record for record in found if is_of_first_frame(record))
            questions = [question.named() for question in questions]
        else:
            self._qa.extend(to_llava(questions, videos=videos, boxes={clip.scene_id: clip.boxes for clip in clips}))
        self._test.extend(to_r4d(questions, videos=videos, som_images=som_images))
        self._timebench.extend(record for clip in clips for record in clip.timebench)


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[TextIO]:
    """A text file that takes its place when it is whole, and never otherwise."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


class _Array:
    """A JSON array written record by record."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.num_records = 0

    def extend(self, records: Iterable[object]) -> None:
        for record in records:
            self._file.write(",\n" if self.num_records else "\n")
            self._file.write(json.dumps(record, ensure_ascii=False))
            self.num_records += 1


@contextlib.contextmanager
def _array(file: TextIO) -> Iterator[_Array]:
    file.write("[")
    yield _Array(file)
    file.write("\n]\n")
