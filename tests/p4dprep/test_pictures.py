"""Pictures: what colours say, checked on pixels, and a page that no file name can break out of."""

import io
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from p4dprep import pictures
from p4dprep.pictures import RGB, Card, Row, Table
from p4dprep.targets import Quantity, TargetSpec

TIMES = np.arange(6) / 2


def warmth(rgb: RGB) -> int:
    return int(rgb[..., 0]) - int(rgb[..., 2])


def is_grey(rgb: RGB) -> bool:
    return bool((np.ptp(rgb.astype(int), axis=-1) == 0).all())


def hue(rgb: RGB) -> float:
    red, green, blue = (rgb.astype(float) / 255).tolist()
    return float(np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)))


def ramp(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 64, dtype=np.float32).reshape(1, 8, 8)


def spec(quantity: Quantity, shape: tuple[int, ...], dims: tuple[str, ...], units: str = "1") -> TargetSpec:
    return TargetSpec(name="thing", dims=dims, shape=shape, dtype="float32", units=units, quantity=quantity)


@pytest.mark.parametrize("quantity", ["metric depth", "relative depth"])
def test_near_is_warm_and_far_is_cold_in_depth(quantity: Quantity) -> None:
    rgb, far, near = pictures.depth_rgb(ramp(0.5, 9), quantity=quantity)
    assert warmth(rgb[0, 0, 0]) > 100
    assert warmth(rgb[0, -1, -1]) < -80
    assert near < 1 < 8 < far


def test_near_is_warm_and_far_is_cold_in_disparity() -> None:
    rgb, far, near = pictures.depth_rgb(ramp(0.1, 2), quantity="relative disparity")
    assert warmth(rgb[0, -1, -1]) > 100
    assert warmth(rgb[0, 0, 0]) < -80
    assert far < 0.2 < 1.9 < near


def test_depth_and_its_reciprocal_as_disparity_have_the_same_colours() -> None:
    depth = ramp(0.5, 9)
    ours = pictures.depth_rgb(depth, quantity="metric depth")[0]
    assert np.array_equal(ours, pictures.depth_rgb(1 / depth, quantity="relative disparity")[0])


def test_a_distance_keeps_its_colour_over_the_whole_clip() -> None:
    depth = np.concatenate([ramp(1, 4), ramp(2, 8)])
    depth[:, 3, 3] = 3
    rgb = pictures.depth_rgb(depth, quantity="metric depth")[0]
    assert np.array_equal(rgb[0, 3, 3], rgb[1, 3, 3])


def test_one_wild_pixel_does_not_flatten_the_others() -> None:
    depth = ramp(1, 4)
    depth[0, 4, 4] = 1e-4
    rgb = pictures.depth_rgb(depth, quantity="metric depth")[0]
    assert warmth(rgb[0, 0, 0]) - warmth(rgb[0, -1, -1]) > 200


def test_what_has_no_value_is_grey_in_every_kind_of_picture() -> None:
    depth, flow = ramp(1, 4), np.ones((1, 8, 8, 2), np.float32)
    rng = np.random.default_rng(0)
    motion, rays, latents = np.full((1, 8, 8), 4.0), rng.random((1, 8, 8, 6)), rng.random((1, 8, 8, 5))
    for array in (depth, flow, motion, rays, latents):
        array[0, :4] = np.nan
    shown = [
        pictures.depth_rgb(depth, quantity="metric depth")[0],
        pictures.flow_rgb(flow)[0],
        pictures.motion_rgb(motion, quantity="motion logit"),
        *pictures.rays_rgb(rays)[:2],
        pictures.latents_rgb(latents),
    ]
    assert [(is_grey(rgb[0, :4]), is_grey(rgb[0, 4:])) for rgb in shown] == [(True, False)] * len(shown)


def test_clips_without_any_value_are_grey_throughout() -> None:
    assert is_grey(pictures.depth_rgb(np.full((2, 8, 8), np.nan), quantity="metric depth")[0])
    assert is_grey(pictures.flow_rgb(np.full((2, 8, 8, 2), np.nan))[0])
    assert is_grey(pictures.latents_rgb(np.full((2, 8, 8, 4), np.nan)))


def test_opposite_flows_have_opposite_hues_and_rest_is_white() -> None:
    flow = np.zeros((1, 1, 5, 2), np.float32)
    flow[0, 0, :4] = [[7, 0], [-7, 0], [0, 7], [0, -7]]
    rgb, full, longest = pictures.flow_rgb(flow)
    right, left, down, up, rest = (rgb[0, 0, column] for column in range(5))
    assert (full, longest) == pytest.approx((7, 7))
    assert rest.tolist() == [255, 255, 255]
    # The wheel of the Middlebury paper, on screen: right red, down yellow, left cyan to blue, up violet.
    assert hue(right) == pytest.approx(0, abs=15)
    assert hue(down) == pytest.approx(60, abs=15)
    for one, other in ((right, left), (down, up)):
        assert abs((hue(one) - hue(other) + 180) % 360 - 180) > 120


def test_longer_flow_is_stronger_and_one_wild_vector_does_not_bleach_the_rest() -> None:
    flow = np.zeros((1, 20, 20, 2), np.float32)
    flow[0, :10, :, 0], flow[0, 10:, :, 0], flow[0, 0, 0, 0] = 2, 4, 4000
    rgb, full, longest = pictures.flow_rgb(flow)
    assert (full, longest) == pytest.approx((4, 4000))
    slow, fast = rgb[0, 5, 5].astype(int), rgb[0, 15, 5].astype(int)
    assert np.ptp(fast) > 1.8 * np.ptp(slow) > 200


@pytest.mark.parametrize(("quantity", "rest", "moves"), [("motion logit", -9, 9), ("motion mask", 0, 1)])
def test_what_moves_is_pink_over_the_greyed_frame(quantity: Quantity, rest: float, moves: float) -> None:
    motion = np.full((1, 8, 8), rest, np.float32)
    motion[0, :4] = moves
    frames = np.full((1, 16, 16, 3), (0, 90, 240), np.uint8)
    rgb = pictures.motion_rgb(motion, quantity=quantity, frames_thwc=frames)
    assert rgb.shape == (1, 8, 8, 3)
    assert int(rgb[0, 0, 0, 0]) - int(rgb[0, 0, 0, 1]) > 120
    assert np.abs(rgb[0, 7, 7].astype(int) - 88).max() < 3


def test_a_camera_at_the_origin_has_grey_moments_and_a_travelling_one_gains_colour() -> None:
    rays = np.zeros((2, 4, 4, 6), np.float32)
    rays[..., 2] = 2
    rays[1, ..., 3] = 0.5
    direction, moment, longest = pictures.rays_rgb(rays)
    assert direction[0, 0, 0].tolist() == [128, 128, 255]
    assert is_grey(moment[0])
    assert moment[1, 0, 0].tolist() == [255, 128, 128]
    assert longest == pytest.approx(0.5)


def test_pca_colours_are_the_same_on_every_call_and_for_identical_tokens() -> None:
    rng = np.random.default_rng(3)
    latents = rng.standard_normal((3, 8, 8, 40)).astype(np.float32)
    latents[2] = latents[0]
    once, again = pictures.latents_rgb(latents), pictures.latents_rgb(latents.copy())
    assert np.array_equal(once, again)
    assert np.array_equal(once[2], once[0])
    assert np.ptp(once) == 255


def test_pca_colours_separate_kinds_of_tokens_despite_noise_and_outliers() -> None:
    rng = np.random.default_rng(4)
    kinds = rng.standard_normal((2, 64)).astype(np.float32)
    which: np.ndarray = np.indices((2, 8, 8)).sum(axis=0) % 2
    latents = kinds[which] + 0.5 * rng.standard_normal((2, 8, 8, 64)).astype(np.float32)
    latents[0, 0, :4] = 1000 * rng.standard_normal((4, 64))
    which[0, 0, :4] = -1
    rgb = pictures.latents_rgb(latents).astype(int)
    first, second = rgb[which == 0], rgb[which == 1]
    assert np.abs(first.mean(axis=0) - second.mean(axis=0)).max() > 180


def test_a_clip_drawn_like_another_takes_the_colours_of_that_one() -> None:
    rng = np.random.default_rng(8)
    depth, flow, rays, latents = (rng.random(shape) + 0.5 for shape in ((8, 8), (8, 8, 2), (4, 4, 6), (4, 4, 9)))
    painters = [
        (lambda values, like: pictures.depth_rgb(values, quantity="metric depth", like=like)[0], depth),
        (lambda values, like: pictures.flow_rgb(values, like=like)[0], flow),
        (lambda values, like: pictures.rays_rgb(values, like=like)[1], rays),
        (lambda values, like: pictures.latents_rgb(values, like=like), latents),
    ]
    for paint, values in painters:
        whole = np.stack([values, 7 * values**2])
        assert np.array_equal(paint(whole[:1], whole[:1]), paint(whole[:1], None))
        assert np.array_equal(paint(whole, whole[:1])[:1], paint(whole[:1], None))
        assert not np.array_equal(paint(whole, None)[:1], paint(whole[:1], None))


def test_a_clip_drawn_like_one_without_values_is_drawn_all_the_same() -> None:
    nothing, flow = np.full((1, 8, 8, 2), np.nan), np.ones((1, 8, 8, 2))
    assert np.array_equal(pictures.flow_rgb(flow, like=nothing)[0], pictures.flow_rgb(flow)[0])
    assert is_grey(pictures.latents_rgb(flow, like=nothing)[0])
    assert np.isnan(pictures.depth_rgb(flow[..., 0], quantity="metric depth", like=nothing[..., 0])[1:]).all()


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_latents_that_are_all_alike_or_have_few_channels_can_be_drawn(channels: int) -> None:
    assert is_grey(pictures.latents_rgb(np.full((1, 4, 4, channels), 0.3))[0])
    assert pictures.latents_rgb(np.random.default_rng(0).random((2, 4, 4, channels))).shape == (2, 4, 4, 3)


def test_each_quantity_becomes_rows_with_its_range_and_units() -> None:
    depth = spec("metric depth", (1, 8, 8), ("t", "y", "x"), "m")
    flow = spec("backward flow", (1, 8, 8, 2), ("t", "y", "x", "uv"), "px")
    rays = spec("plücker rays", (1, 4, 4, 6), ("t", "ray_y", "ray_x", "pluecker"))
    latents = spec("latents", (3, 2, 4, 4, 5), ("tap", "tube", "token_y", "token_x", "channel"))
    rng = np.random.default_rng(0)
    (depth_row,) = pictures.target_rows("a", depth, ramp(1, 4))
    (flow_row,) = pictures.target_rows("b", flow, np.ones((1, 8, 8, 2), np.float32) * 3)
    assert (depth_row.title, depth_row.caption) == ("a/thing", "metric depth\nnear 1.06 m, far 3.94 m")
    assert flow_row.caption == "backward flow\nfull at 4.24 px, max 4.24 px"
    assert len(pictures.target_rows("c", rays, rng.random(rays.shape))) == 2
    titles = [row.title for row in pictures.target_rows("d", latents, rng.random(latents.shape))]
    assert titles == ["d/thing tap 1/3", "d/thing tap 2/3", "d/thing tap 3/3"]
    flat = spec("latents", (32, 5), ("token", "channel"))
    assert pictures.target_rows("e", flat, rng.random(flat.shape)) == ()


def solid(colour: tuple[int, int, int], steps: int = 6, title: str = "row") -> Row:
    return Row(title=title, caption="", rgb_thwc=np.full((steps, 20, 20, 3), colour, np.uint8))


def test_a_strip_is_a_png_with_a_row_each_and_the_step_that_covers_each_time() -> None:
    steps = np.zeros((3, 20, 20, 3), np.uint8)
    steps[:] = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)[:, None, None]
    rows = [solid((9, 200, 90)), Row(title="latents", caption="PCA", rgb_thwc=steps)]
    buffer = io.BytesIO()
    pictures.strip(rows, TIMES, title="clip").save(buffer, "PNG")
    image = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")).astype(int)
    is_first_row = (np.abs(image - (9, 200, 90)).max(axis=-1) < 8).any(axis=1)
    is_second_row = (np.abs(image - (0, 0, 200)).max(axis=-1) < 8).any(axis=1)
    assert is_first_row.sum() >= 108
    assert is_second_row.sum() == is_first_row.sum()
    second = image[int(np.flatnonzero(is_second_row).mean())]
    colours = [colour for colour in second.tolist() if max(colour) > 190]
    assert [colour.index(max(colour)) for colour in colours[:: len(colours) // 6 + 1]] == [0, 0, 1, 1, 2, 2]


def test_a_long_clip_is_cut_to_eight_columns_and_nothing_to_draw_is_refused() -> None:
    long = pictures.strip([solid((255, 255, 0), steps=50)], np.arange(50.0))
    eight = pictures.strip([solid((255, 255, 0), steps=8)], np.arange(8.0))
    assert long.size == eight.size
    with pytest.raises(ValueError, match="at least one row"):
        pictures.strip([], TIMES)
    with pytest.raises(ValueError, match=r"row x: \(4, 4, 3\) uint8 is not uint8 \(t, h, w, 3\)"):
        Row(title="x", caption="", rgb_thwc=np.zeros((4, 4, 3), np.uint8))


def test_columns_can_be_fewer_and_narrower_and_groups_stand_apart() -> None:
    rows = [solid((255, 255, 0)), solid((255, 255, 0))]
    wide, narrow = pictures.strip(rows, TIMES), pictures.strip(rows, TIMES, max_columns=4, cell_width=110)
    assert wide.width - narrow.width == 6 * 154 - 4 * 114
    apart = pictures.strip([rows[0], replace(rows[1], starts_group=True)], TIMES)
    assert wide.height < apart.height < wide.height + 30


def test_an_animation_shows_every_frame_and_loops() -> None:
    frames = np.zeros((6, 20, 20, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(6)[:, None, None] * 40
    rows = [Row(title="frame", caption="", rgb_thwc=frames), solid((0, 0, 255), steps=3)]
    with Image.open(io.BytesIO(pictures.animation(rows, 6))) as image:
        assert (getattr(image, "n_frames", 0), image.info["loop"]) == (6, 0)
        image.seek(5)
        assert image.convert("RGB").getpixel((40, 40))[0] == pytest.approx(200, abs=12)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "\"><script>alert(1)</script><img src=http://evil.example/x onerror='x'>.mp4"


def test_a_page_escapes_hostile_names_holds_no_script_and_no_outside_address() -> None:
    card = Card(
        clip_id=HOSTILE,
        uri=f"s3://user:hunter2@bucket/{HOSTILE}?token=hunter3",
        facts=(HOSTILE,),
        rows=(solid((1, 2, 3), title=HOSTILE),),
        time_seconds_t=TIMES,
        note=HOSTILE,
    )
    table = Table(title=HOSTILE, columns=("a",), rows=((HOSTILE,),))
    html = pictures.gallery_html(title=HOSTILE, facts=[("source", HOSTILE)], tables=[table], cards=[card])
    page = Page()
    page.feed(html)
    assert page.tags.count("img") == 2
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "style")]
    assert all(value.startswith("data:image/webp;base64,") for value in addresses)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    assert HOSTILE in page.text
    assert "hunter" not in html


def test_a_clip_without_pictures_keeps_its_place_and_its_reason() -> None:
    card = Card(clip_id="a", uri="a.mp4", facts=(), rows=(), time_seconds_t=TIMES, note="failed: too short")
    empty = Table(title="Failures", columns=("reason",), rows=())
    page = Page()
    page.feed(pictures.gallery_html(title="c", facts=(), tables=[empty], cards=[card]))
    assert "failed: too short" in page.text
    assert not {"img", "table"} & set(page.tags)
