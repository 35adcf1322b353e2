"""Makes videos for tests: good ones with known content, and bad ones of many kinds. Nothing is read from outside."""

import io
import os
import random
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

UPRIGHT_ROTATION_MATRICES = {
    0: (1, 0, 0, 1),
    90: (0, -1, 1, 0),
    180: (-1, 0, 0, -1),
    270: (0, 1, -1, 0),
}
"""tkhd matrix entries (a, b, c, d) that ask a player to turn the picture counter-clockwise by so many degrees."""


def scene(index: int, width: int, height: int) -> NDArray[np.uint8]:
    """Frame `index` of a moving scene, uint8 RGB (height, width, 3).

    The upper left quarter is red, so that the way up shows; grey rises by 4 a frame elsewhere, so that a frame tells
    its index; a white bar moves.
    """
    frame = np.full((height, width, 3), 20 + 4 * index % 200, np.uint8)
    frame[: height // 2, : width // 2] = (200, 30, 30)
    left = width // 2 + index % max(1, width // 2)
    frame[height // 4 : height // 2, left : left + max(1, width // 16)] = 255
    return frame


def write_video(
    path: Path | str,
    *,
    num_frames: int = 24,
    width: int = 128,
    height: int = 96,
    fps: int = 24,
    codec: str = "libx264",
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    gop_size: int = 12,
    rotation_degrees: int = 0,
    num_video_streams: int = 1,
    has_audio: bool = False,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    seed: int | None = None,
) -> Path:
    """Write a video; the container follows the suffix.

    Args:
        path: where.
        pts: presentation times in ticks of `time_base`, for variable rates and late starts; else 0, 1, 2, ... at `fps`.
        rotation_degrees: counter-clockwise turn asked of the player (mp4 and mov only).
        num_video_streams: the later ones are half as large and black.
        seed: noise of this seed is laid over the scene, to make a file unlike others.
    """
    path = Path(path)
    ticks = list(range(num_frames)) if pts is None else list(pts)
    base = time_base or Fraction(1, fps)
    noise = None if seed is None else np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        streams = []
        for number in range(num_video_streams):
            stream: Any = container.add_stream(codec, rate=fps, options={"threads": "1"} | (options or {}))
            stream.width, stream.height = (width, height) if number == 0 else (width // 4 * 2, height // 4 * 2)
            stream.pix_fmt, stream.codec_context.gop_size = pix_fmt, gop_size
            stream.codec_context.time_base = base
            stream.codec_context.max_b_frames = 2 if codec == "libx264" else 0
            streams.append(stream)
        audio = container.add_stream("aac", rate=8000) if has_audio else None
        for index, tick in enumerate(ticks):
            for number, stream in enumerate(streams):
                image = scene(index, stream.width, stream.height) if number == 0 else black(stream.width, stream.height)
                if noise is not None:
                    image = np.clip(image + noise.integers(-15, 16, image.shape), 0, 255).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = tick, base
                container.mux(stream.encode(frame))
        if audio is not None:
            container.mux(_tone(audio, len(ticks) / fps))
        for stream in [*streams, *([audio] if audio is not None else [])]:
            container.mux(stream.encode(None))
    if rotation_degrees:
        path.write_bytes(with_rotation(path.read_bytes(), rotation_degrees))
    return path


def black(width: int, height: int) -> NDArray[np.uint8]:
    """A black picture."""
    return np.zeros((height, width, 3), np.uint8)


def _tone(stream: Any, seconds: float) -> list[Any]:
    packets = []
    for start in range(0, max(1024, int(seconds * 8000)), 1024):
        wave = np.sin(np.arange(start, start + 1024) / 8).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, start
        packets += stream.encode(frame)
    return packets


def write_audio(path: Path | str, seconds: float = 1.0) -> Path:
    """Write a container that holds sound only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        container.mux(_tone(stream, seconds))
        container.mux(stream.encode(None))
    return Path(path)


def with_rotation(data: bytes, degrees: int) -> bytes:
    """The same mp4 with the display matrix of its first track replaced."""
    at = data.index(b"tkhd") + 4
    is_long = data[at] == 1
    at += 52 if is_long else 40
    a, b, c, d = UPRIGHT_ROTATION_MATRICES[degrees]
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return data[:at] + matrix + data[at + 36 :]


def decoded_times(path: Path | str, stream: int = 0) -> list[float]:
    """Presentation times of all frames, by a plain PyAV loop: the reference for ours."""
    with av.open(str(path)) as container:
        return [float(frame.pts * frame.time_base) for frame in container.decode(video=stream)]


def video_bytes(suffix: str = ".mp4", **arguments: Any) -> bytes:
    """A video in memory."""
    formats = {".mp4": "mp4", ".mkv": "matroska", ".ts": "mpegts", ".avi": "avi"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=formats[suffix]) as container:
        stream: Any = container.add_stream(arguments.get("codec", "libx264"), rate=24, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.gop_size = arguments.get("gop_size", 12)
        for index in range(arguments.get("num_frames", 24)):
            frame = av.VideoFrame.from_ndarray(scene(index, 128, 96), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def box_offset(data: bytes, *names: bytes) -> int:
    """Where the first box of that name starts, searched inside the ones before it."""
    at = 0
    for name in names:
        at = data.index(name, at)
    return at - 4


def _wiped(data: bytes, name: bytes) -> bytes:
    """The mp4 with the payload of a box overwritten by zeros."""
    at = box_offset(data, b"moov", name)
    size = struct.unpack(">I", data[at : at + 4])[0]
    return data[: at + 8] + bytes(size - 8) + data[at + size :]


def _noisy(data: bytes, start: int, seed: int) -> bytes:
    return data[:start] + random.Random(seed).randbytes(len(data) - start)


def _playlists() -> dict[str, bytes]:
    loopback = "http://127.0.0.1:9/canary.ts"
    return {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{loopback}\n#EXT-X-ENDLIST\n".encode(),
        "hls_file.mp4": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "hls_bom.mkv": b"\xef\xbb\xbf#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        "hls_blank.mov": b"\n\n  #EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        "concat.mp4": b"ffconcat version 1.0\nfile '/etc/hostname'\n",
        "dash.mp4": f'<?xml version="1.0"?><MPD><BaseURL>{loopback}</BaseURL></MPD>'.encode(),
        "dash_bare.webm": f"<MPD><BaseURL>{loopback}</BaseURL></MPD>".encode(),
        "smooth.mp4": b"<SmoothStreamingMedia></SmoothStreamingMedia>",
        "pls.avi": f"[playlist]\nFile1={loopback}\n".encode(),
        "sdp.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        "link.mp4": loopback.encode(),
        "rtsp.mkv": b"rtsp://127.0.0.1:9/x\n",
    }


def _no_videos() -> dict[str, bytes]:
    png = b"\x89PNG\r\n\x1a\n" + bytes(100)
    wave = b"RIFF" + struct.pack("<I", 2036) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    return {
        "empty.mp4": b"",
        "empty.avi": b"",
        "zeros.mp4": bytes(100_000),
        "ones.mkv": b"\xff" * 50_000,
        "text.mp4": b"this is not a video\n" * 200,
        "html.mp4": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "script.mp4": b"#!/bin/sh\ntouch /tmp/canary\n",
        "pickle.mp4": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "image.mp4": png,
        "sound.mp4": wave + b"data" + struct.pack("<I", 2000) + bytes(2000),
        "elf.mp4": b"\x7fELF" + bytes(500),
        "noise1.mp4": random.Random(1).randbytes(60_000),
        "noise2.avi": random.Random(2).randbytes(60_000),
        "noise3.ts": random.Random(3).randbytes(60_000),
        "subtitles.mp4": b"1\n00:00:00,000 --> 00:00:01,000\nhello\n",
        "only_ftyp.mp4": struct.pack(">I", 24) + b"ftypisom" + bytes(12),
    }


def _damaged() -> dict[str, bytes]:
    """Files that were videos once, of which nothing can be shown."""
    mp4, mkv, avi = video_bytes(".mp4"), video_bytes(".mkv"), video_bytes(".avi", codec="mpeg4")
    mdat, moov = box_offset(mp4, b"mdat"), box_offset(mp4, b"moov")
    boxes = (b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"stsz", b"stsc", b"stco")
    files = {f"no_{name.decode()}.mp4": _wiped(mp4, name) for name in boxes}
    files |= {f"cut_{share}.mp4": mp4[: moov * share // 100] for share in (1, 10, 30, 60, 90, 99)}
    files |= {
        "cut_head.mp4": mp4[64:],
        "moov_renamed.mp4": mp4.replace(b"moov", b"xxxx"),
        "mdat_noise.mp4": mp4[: mdat + 8] + random.Random(4).randbytes(moov - mdat - 8) + mp4[moov:],
        "mdat_zero.mp4": mp4[: mdat + 8] + bytes(moov - mdat - 8) + mp4[moov:],
        "moov_noise.mp4": _noisy(mp4, moov + 8, 5),
        "cut_head.mkv": mkv[:40],
        "noise.mkv": _noisy(mkv, 60, 6),
        "cut_head.avi": avi[:80],
        "noise.avi": _noisy(avi, 40, 7),
        "offsets_beyond.mp4": _with_offsets(mp4, 1 << 30),
    }
    return files


def _with_offsets(mp4: bytes, offset: int) -> bytes:
    at = box_offset(mp4, b"moov", b"stco")
    count = struct.unpack(">I", mp4[at + 12 : at + 16])[0]
    return mp4[: at + 16] + struct.pack(">I", offset) * count + mp4[at + 16 + 4 * count :]


def _special(folder: Path) -> list[Path]:
    """Things that are no files, and valid files that hold nothing to see or too much of it."""
    paths = [folder / name for name in ("fifo.mp4", "folder.mp4", "loop.mp4", "dangling.mp4", "device.mp4")]
    os.mkfifo(paths[0])
    paths[1].mkdir()
    paths[2].symlink_to(paths[2])
    paths[3].symlink_to(folder / "nowhere.mp4")
    paths[4].symlink_to("/dev/zero")
    paths.append(write_audio(folder / "audio_only.mp4"))
    paths.append(write_audio(folder / "audio_only.mkv"))
    return [*paths, write_huge_frames(folder / "16k.avi")]


def write_huge_frames(path: Path, size: int = 16384) -> Path:
    """A small motion-JPEG file in whose container and pictures stands that they are `size` x `size`."""
    path = write_video(path.with_suffix(".avi"), codec="mjpeg", num_frames=3, pix_fmt="yuvj420p")
    data = bytearray(path.read_bytes())
    at = data.index(b"strf") + 12
    data[at : at + 8] = struct.pack("<ii", size, size)
    at = data.find(b"\xff\xc0")
    while at >= 0:
        data[at + 5 : at + 9] = struct.pack(">HH", size, size)
        at = data.find(b"\xff\xc0", at + 9)
    path.write_bytes(data)
    return path


BAD_COUNT = 60


def write_bad_videos(folder: Path) -> list[Path]:
    """Exactly 60 files of which every one must fail, none can give a frame.

    Returns:
        Their paths, sorted. One is a named pipe, one a folder, some are links that lead nowhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = _special(folder)
    for name, data in (_playlists() | _no_videos() | _damaged()).items():
        (folder / name).write_bytes(data)
        paths.append(folder / name)
    paths = sorted(paths)
    if len(paths) != BAD_COUNT:
        raise AssertionError(f"{len(paths)} bad videos, not {BAD_COUNT}")
    return paths


def mutants(data: bytes, count: int, seed: int) -> list[bytes]:
    """Seeded mutations of a video that may or may not still show something: cuts, flips, noise, box sizes."""
    source = random.Random(seed)
    kinds: list[Callable[[bytearray], bytes]] = [
        lambda work: bytes(work[: source.randrange(len(work))]),
        lambda work: _flip(work, source, 1),
        lambda work: _flip(work, source, 50),
        lambda work: _splash(work, source),
        lambda work: _resize_box(work, source),
        lambda work: bytes(work[: (at := source.randrange(len(work)))] + work[at + source.randrange(1, 400) :]),
    ]
    return [kinds[index % len(kinds)](bytearray(data)) for index in range(count)]


def _flip(work: bytearray, source: random.Random, count: int) -> bytes:
    for _ in range(count):
        work[source.randrange(len(work))] ^= 1 << source.randrange(8)
    return bytes(work)


def _splash(work: bytearray, source: random.Random) -> bytes:
    at, length = source.randrange(len(work)), source.randrange(1, 500)
    work[at : at + length] = source.randbytes(len(work[at : at + length]))
    return bytes(work)


def _resize_box(work: bytearray, source: random.Random) -> bytes:
    names = [b"moov", b"trak", b"stsz", b"stts", b"ctts", b"stsc", b"stco", b"mdat", b"elst", b"avcC", b"mvhd", b"mdhd"]
    at = work.find(source.choice(names))
    if at >= 4:
        at += source.choice((-4, 8, 12, 16, 20))
        work[at : at + 4] = source.choice((bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", source.randbytes(4)))
    return bytes(work)
