"""Ray casting: what each pixel sees, exactly, and what that looks like.

Shape suffixes: `t` frames, `h w` pixels, `n` rays or points; vectors have their axis first, (3, n), so that each
component lies contiguous. A ray's direction has length 1 along the optical axis: its parameter is the depth.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p4dprep.worlds import textures
from p4dprep.worlds.scene import Body, Floats, Light, Part, Scene, turn_about_z

Array = NDArray[np.float32]

SKY = -1
"""Part number of what is no surface."""
_NEAR_METRES = 1e-3
_SHUTTER_SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A part where it is at each of some times.

    Attributes:
        part: the shape.
        instance: 0 for scenery, i + 1 for body i.
        centre_t3: its centre in the world, metres.
        rotation_t33: part to world.
    """

    part: Part
    instance: int
    centre_t3: Floats
    rotation_t33: Floats

    def to_local(self, time: int, points_3n: NDArray[np.floating]) -> Array:
        """World points (3, n) in the part's coordinates at one of the times."""
        moved: Array = (self.rotation_t33[time].T @ (points_3n - self.centre_t3[time][:, None])).astype(np.float32)
        return moved


@dataclass(frozen=True, kw_only=True)
class Surfaces:
    """What every pixel sees.

    Attributes:
        depth_thw: metres along the optical axis, NaN where there is sky.
        part_thw: index into `parts`, `SKY` for none.
        instances_thw: 0 for scenery and sky, i + 1 for body i.
        parts: all parts of the scene, placed at the times.
        pose_t44: world to camera.
        intrinsics_33: K of the picture.
        seconds: the times.
    """

    depth_thw: Array
    part_thw: NDArray[np.int16]
    instances_thw: NDArray[np.uint8]
    parts: tuple[Placed, ...]
    pose_t44: Floats
    intrinsics_33: Floats
    seconds: Floats

    def points(self, time: int) -> Floats:
        """World points (3, h * w) at a time; for sky the direction of the pixel instead, of length 1 along z."""
        depth = np.nan_to_num(self.depth_thw[time].reshape(-1).astype(float), nan=1.0)
        centre = camera_centre(self.pose_t44[time])
        sky = (self.part_thw[time] == SKY).reshape(-1)
        directions = ray_directions(self.pose_t44[time], self.intrinsics_33, *self.depth_thw.shape[1:])
        points: Floats = directions.reshape(3, -1) * depth + np.where(sky, 0.0, centre[:, None])
        return points


def camera_centre(pose_44: Floats) -> Floats:
    """Where the camera of a world-to-camera pose is (3,)."""
    centre: Floats = -pose_44[:3, :3].T @ pose_44[:3, 3]
    return centre


def ray_directions(pose_44: Floats, intrinsics_33: Floats, height: int, width: int) -> Floats:
    """World directions (3, h, w) through the pixels' centres, of length 1 along the optical axis."""
    x = (np.arange(width) + 0.5 - intrinsics_33[0, 2]) / intrinsics_33[0, 0]
    y = (np.arange(height) + 0.5 - intrinsics_33[1, 2]) / intrinsics_33[1, 1]
    rotation = pose_44[:3, :3]
    across, down, forward = (rotation[axis][:, None, None] for axis in range(3))
    directions: Floats = across * x[None, None, :] + down * y[None, :, None] + forward
    return directions


def place(bodies: tuple[Body, ...], scenery: tuple[Body, ...], seconds: Floats) -> tuple[Placed, ...]:
    """All parts of a scene at some times."""
    return tuple(
        placed
        for instance, body in [*((0, thing) for thing in scenery), *enumerate(bodies, start=1)]
        for placed in _place_body(body, instance, seconds)
    )


def _place_body(body: Body, instance: int, seconds: Floats) -> Iterator[Placed]:
    position, yaw = body.trajectory.position(seconds), body.trajectory.yaw(seconds)
    for part in body.parts:
        offset = turn_about_z(np.tile(part.centre, (len(yaw), 1)), yaw)
        columns = [turn_about_z(np.tile(column, (len(yaw), 1)), yaw) for column in part.rotation().T]
        yield Placed(part=part, instance=instance, centre_t3=position + offset, rotation_t33=np.stack(columns, axis=-1))


def trace(scene: Scene, seconds: Floats, height: int, width: int) -> Surfaces:
    """What each pixel of a picture of height x width sees at each time (t,), in seconds."""
    seconds = np.asarray(seconds, float)
    parts = place(scene.bodies, scene.scenery, seconds)
    pose, intrinsics = scene.camera.world_to_camera(seconds), scene.camera.intrinsics(height, width)
    depth = np.full((len(seconds), height, width), scene.far_metres, np.float32)
    part_number = np.full(depth.shape, SKY, np.int16)
    for time in range(len(seconds)):
        directions = ray_directions(pose[time], intrinsics, height, width).astype(np.float32)
        for number, placed in enumerate(parts):
            window = _window(placed, time, pose[time], intrinsics, height, width)
            if window is None:
                continue
            rows, columns = window
            found = _hit(placed, time, camera_centre(pose[time])[:, None, None], directions[:, rows, columns])
            closer = found < depth[time, rows, columns]
            np.copyto(depth[time, rows, columns], found, where=closer)
            np.copyto(part_number[time, rows, columns], np.int16(number), where=closer)
    depth[part_number == SKY] = np.nan
    instance_of = np.array([placed.instance for placed in parts] + [0], np.uint8)
    return Surfaces(
        depth_thw=depth,
        part_thw=part_number,
        instances_thw=instance_of[part_number],
        parts=parts,
        pose_t44=pose,
        intrinsics_33=intrinsics,
        seconds=seconds,
    )


def _window(
    placed: Placed, time: int, pose_44: Floats, intrinsics_33: Floats, height: int, width: int
) -> tuple[slice, slice] | None:
    """Rows and columns that a part can touch; None if it is out of the picture."""
    if placed.part.shape in ("room", "ground"):
        return slice(None), slice(None)
    radius = placed.part.radius
    x, y, z = pose_44[:3, :3] @ placed.centre_t3[time] + pose_44[:3, 3]
    if z + radius < _NEAR_METRES:
        return None
    if z - radius < _NEAR_METRES:
        return slice(None), slice(None)
    depths = np.array([z - radius, z + radius])
    sides = []
    for middle, row, size in ((y, 1, height), (x, 0, width)):
        low = intrinsics_33[row, 0 if row == 0 else 1] * ((middle - radius) / depths).min() + intrinsics_33[row, 2]
        high = intrinsics_33[row, 0 if row == 0 else 1] * ((middle + radius) / depths).max() + intrinsics_33[row, 2]
        sides.append(slice(max(0, int(low)), min(size, int(high) + 1)))
    rows, columns = sides
    return None if rows.start >= rows.stop or columns.start >= columns.stop else (rows, columns)


def _hit(placed: Placed, time: int, origins: NDArray[np.floating], directions: NDArray[np.floating]) -> Array:
    """Parameter of the first hit in front of rays (3, ...), whose origins may be broadcast; infinite for none."""
    to_local = placed.rotation_t33[time].T
    centre = placed.centre_t3[time].reshape(3, *[1] * (origins.ndim - 1))
    origin = np.tensordot(to_local, origins - centre, 1).astype(np.float32)
    return hit_shape(placed.part, origin, np.tensordot(to_local.astype(np.float32), directions, 1))


def hit_shape(part: Part, origin: Array, direction: Array) -> Array:
    """Parameter of the first hit of rays in the part's own coordinates; infinite where there is none.

    Args:
        part: the shape.
        origin: (3, ...) metres, broadcastable to the directions.
        direction: (3, ...), of any length.
    """
    half = np.asarray(part.half_size, np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        match part.shape:
            case "ground":
                return _first(-origin[2] / direction[2])
            case "room":
                return _first(_slabs(half, origin, direction)[1])
            case "box":
                return _enter(*_slabs(half, origin, direction))
            case "sphere":
                return _enter(*_ball(half[0], origin, direction))
            case "cylinder":
                return _enter(*_pillar(half[0], half[2], origin, direction))
            case "capsule":
                return _hit_capsule(half, origin, direction)


def _hit_capsule(half: Array, origin: Array, direction: Array) -> Array:
    reach = max(float(half[2] - half[0]), 1e-6)
    caps = []
    for end in (-reach, reach):
        x, y, z = origin
        caps.append(_enter(*_ball(half[0], (x, y, z - np.float32(end)), direction)))
    trunk = _enter(*_pillar(half[0], np.float32(reach), origin, direction))
    return np.minimum(np.minimum(*caps), trunk)


def _first(parameter: Array) -> Array:
    return np.where(parameter > _NEAR_METRES, parameter, np.float32(np.inf))


def _enter(near: Array, far: Array) -> Array:
    """Where a ray enters; a ray that starts inside sees nothing of the shape."""
    return np.where((near <= far) & (near > _NEAR_METRES), near, np.float32(np.inf))


def _slab(half: np.float32, origin: Array, direction: Array) -> tuple[Array, Array]:
    inverse = 1 / direction
    one, other = (-half - origin) * inverse, (half - origin) * inverse
    return np.minimum(one, other), np.maximum(one, other)


def _slabs(half: Array, origin: Array, direction: Array) -> tuple[Array, Array]:
    nears, fars = zip(*(_slab(half[axis], origin[axis], direction[axis]) for axis in range(3)), strict=True)
    return np.maximum(np.maximum(nears[0], nears[1]), nears[2]), np.minimum(np.minimum(fars[0], fars[1]), fars[2])


def _roots(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """Both solutions of a x^2 + 2 b x + c = 0, NaN where there is none."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _ball(radius: np.float32, origin: tuple[Array, Array, Array] | Array, direction: Array) -> tuple[Array, Array]:
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    square = dx * dx + dy * dy + dz * dz
    return _roots(square, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - radius * radius)


def _pillar(radius: np.float32, half: np.float32, origin: Array, direction: Array) -> tuple[Array, Array]:
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    side = _roots(dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy - radius * radius)
    ends = _slab(half, oz, dz)
    return np.maximum(side[0], ends[0]), np.minimum(side[1], ends[1])


def normals(part: Part, points_3n: Array) -> Array:
    """Outward unit normals (3, n) at surface points of a part, in its own coordinates (a room's point inward)."""
    half = np.asarray(part.half_size, np.float32)[:, None]
    if part.shape == "ground":
        return np.broadcast_to(np.array([[0], [0], [1]], np.float32), points_3n.shape)
    if part.shape == "sphere":
        round_: Array = points_3n / half[0]
        return round_
    if part.shape in ("box", "room"):
        relative = points_3n / half
        axis = np.abs(relative).argmax(axis=0)
        chosen = np.arange(3)[:, None] == axis
        outward: Array = np.where(chosen, np.sign(relative), 0).astype(np.float32)
        return -outward if part.shape == "room" else outward
    upright: Array = points_3n.copy()
    if part.shape == "capsule":
        reach = max(float(half[2, 0] - half[0, 0]), 1e-6)
        upright[2] -= np.clip(upright[2], -reach, reach)
        upright /= half[0, 0]
        return upright
    upright[2] = 0
    on_end = np.abs(points_3n[2]) / half[2, 0] > np.hypot(points_3n[0], points_3n[1]) / half[0, 0]
    end = np.stack([np.zeros_like(points_3n[2]), np.zeros_like(points_3n[2]), np.sign(points_3n[2])])
    return np.where(on_end, end, upright / half[0, 0])


def shade(scene: Scene, surfaces: Surfaces, time: int) -> Array:
    """RGB (h, w, 3) in 0-1, before exposure and noise, of one of the surfaces' times."""
    height, width = surfaces.depth_thw.shape[1:]
    number_n = surfaces.part_thw[time].reshape(-1)
    points_3n = surfaces.points(time)
    picture_3n = np.empty((3, height * width), np.float32)
    normal_3n = np.zeros((3, height * width), np.float32)
    is_sky = number_n == SKY
    picture_3n[:, is_sky] = _sky(scene, points_3n[:, is_sky])
    order = np.argsort(number_n, kind="stable")
    starts = np.searchsorted(number_n[order], np.arange(len(surfaces.parts) + 1))
    pixel = 1 / surfaces.intrinsics_33[0, 0]
    centre = camera_centre(surfaces.pose_t44[time])[:, None]
    for index, placed in enumerate(surfaces.parts):
        mine = order[starts[index] : starts[index + 1]]
        if not len(mine):
            continue
        local = placed.to_local(time, points_3n[:, mine])
        normal = placed.rotation_t33[time].astype(np.float32) @ normals(placed.part, local)
        view = (points_3n[:, mine] - centre).astype(np.float32)
        distance = np.sqrt(_dot(view, view))
        slant = np.maximum(np.abs(_dot(view, normal)) / distance, np.float32(0.05))
        footprint = (distance / slant * pixel).astype(np.float32)
        picture_3n[:, mine] = textures.colours(placed.part.texture, local, footprint)
        normal_3n[:, mine] = normal
    lit = np.flatnonzero(~is_sky)
    bright = np.full(len(lit), np.float32(scene.ambient))
    for light in scene.lights:
        bright += _light(surfaces, time, light, points_3n[:, lit], normal_3n[:, lit])
    picture_3n[:, lit] *= bright
    return np.clip(picture_3n, 0, 1).T.reshape(height, width, 3)


def _sky(scene: Scene, directions_3n: Floats) -> Array:
    zenith, horizon = (np.asarray(colour, np.float32)[:, None] for colour in scene.sky)
    up = directions_3n[2] / np.linalg.norm(directions_3n, axis=0)
    share = np.clip(up * 2, 0, 1).astype(np.float32)
    cloud = 0.06 * np.sin(9 * directions_3n[0] + 3 * directions_3n[2]) * np.sin(7 * directions_3n[1])
    colour: Array = horizon + (zenith - horizon) * share + cloud.astype(np.float32)
    return colour


def _light(surfaces: Surfaces, time: int, light: Light, points_3n: Floats, normal_3n: Array) -> Array:
    """Brightness (n,) that a light adds, shadows cast."""
    towards: Array
    if light.direction is not None:
        towards = np.broadcast_to(np.asarray(light.direction, np.float32)[:, None], points_3n.shape)
        strength = np.full(points_3n.shape[1], light.strength, np.float32)
    else:
        towards = (np.asarray(light.position)[:, None] - points_3n).astype(np.float32)
        strength = (light.strength * 10 / (1 + _dot(towards, towards))).astype(np.float32)
    facing: Array = np.clip(_dot(towards, normal_3n) / np.sqrt(_dot(towards, towards)), 0, 1)
    bright = facing * np.minimum(strength, np.float32(1))
    reached = np.flatnonzero(bright > 0)
    starts = points_3n[:, reached] + 2e-3 * normal_3n[:, reached]
    bright[reached] *= ~occluded(surfaces.parts, time, starts, towards[:, reached], light.direction is None)
    return bright


def occluded(
    parts: tuple[Placed, ...],
    time: int,
    starts_3n: NDArray[np.floating],
    towards_3n: NDArray[np.floating],
    ends_at_target: bool,
) -> NDArray[np.bool_]:
    """Whether a part lies on the way from starts along `towards`; only before its end if that is a target."""
    solid = [placed for placed in parts if placed.part.shape not in ("room", "ground")]
    hidden = np.zeros(starts_3n.shape[1], bool)
    if not solid:
        return hidden
    limit = np.float32(1 if ends_at_target else np.inf)
    for placed, near in zip(solid, _near_rays(solid, time, starts_3n, towards_3n, limit), strict=True):
        mine = np.flatnonzero(near & ~hidden)
        if len(mine):
            hidden[mine] = _hit(placed, time, starts_3n[:, mine], towards_3n[:, mine]) < limit
    return hidden


def _near_rays(
    parts: list[Placed],
    time: int,
    starts_3n: NDArray[np.floating],
    towards_3n: NDArray[np.floating],
    limit: np.float32,
) -> Iterator[NDArray[np.bool_]]:
    """Per part, which rays pass through the sphere around it; all parts at once, as products of matrices."""
    centres = np.stack([placed.centre_t3[time] for placed in parts]).astype(np.float32)
    starts, towards = starts_3n.astype(np.float32), towards_3n.astype(np.float32)
    square = np.maximum(_dot(towards, towards), np.float32(1e-12))
    along = (centres @ towards - _dot(starts, towards)) / square
    distance = (centres**2).sum(axis=1)[:, None] - 2 * (centres @ starts) + _dot(starts, starts) - along**2 * square
    for placed, along_n, distance_n in zip(parts, along, distance, strict=True):
        radius = np.float32(1.01 * placed.part.radius + 0.02)  # float32 is short of digits here
        reach = radius / np.sqrt(square)
        yield (distance_n < radius * radius) & (along_n > -reach) & (along_n < limit + reach)


def _dot(one_3n: Array, other_3n: Array) -> Array:
    """Products (n,) of matching columns; far faster than a sum over so short an axis."""
    products: Array = one_3n[0] * other_3n[0] + one_3n[1] * other_3n[1] + one_3n[2] * other_3n[2]
    return products


def render(scene: Scene, seconds: Floats, height: int, width: int) -> NDArray[np.uint8]:
    """Film a scene: uint8 RGB (t, h, w, 3), with the camera's effects."""
    return expose(scene, trace(scene, seconds, height, width))


def expose(scene: Scene, surfaces: Surfaces) -> NDArray[np.uint8]:
    """The pictures (t, h, w, 3) of surfaces that were traced: shading, motion blur, exposure, noise."""
    height, width = surfaces.depth_thw.shape[1:]
    seconds, shutter = surfaces.seconds, scene.effects.shutter_seconds
    pictures = np.stack([shade(scene, surfaces, time) for time in range(len(seconds))])
    if shutter:
        for share in np.linspace(-0.5, 0.5, _SHUTTER_SAMPLES):
            if share:
                moved = trace(scene, seconds + share * shutter, height, width)
                pictures += np.stack([shade(scene, moved, time) for time in range(len(seconds))])
        pictures /= _SHUTTER_SAMPLES
    first, last = scene.effects.exposure
    gain = first + (last - first) * seconds / max(scene.duration_seconds, 1e-9)
    pictures *= 255 * gain.astype(np.float32)[:, None, None, None]
    if scene.effects.noise:
        for picture, time in zip(pictures, seconds, strict=True):
            rng = np.random.default_rng([scene.noise_seed, round(time * 1e6)])
            picture += np.float32(scene.effects.noise) * rng.standard_normal(picture.shape, np.float32)
    return np.clip(np.rint(pictures), 0, 255).astype(np.uint8)
