"""Small images and videos for tests. Each frame shows its number as a binary code of black and white blocks."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 8


def numbered_frame(number: int, width: int = 128, height: int = 64) -> np.ndarray:
    """(H, W, 3) uint8: two rows of four blocks in the middle; a block is white if its bit of `number` is set."""
    pixels = np.full((height, width, 3), 96, np.uint8)
    block = height // 4
    for bit in range(BITS):
        row, column = divmod(bit, 4)
        top, left = height // 2 - block + row * block, width // 2 - 2 * block + column * block
        pixels[top : top + block, left : left + block] = 255 if number >> bit & 1 else 0
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number that a frame shows; the frame may have been resized."""
    height, width = pixels.shape[:2]
    block = height / 4
    number = 0
    for bit in range(BITS):
        row, column = divmod(bit, 4)
        y, x = height / 2 - block / 2 + row * block, width / 2 - 1.5 * block + column * block
        number |= int(pixels[int(y), int(x)].mean() > 128) << bit
    return number


def write_video(
    path: Path,
    frames: int = 40,
    fps: float | Fraction = 24,
    size: tuple[int, int] = (128, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: list[float] | None = None,
    options: dict[str, str] | None = None,
    audio: bool = False,
) -> Path:
    """A video of numbered frames; `times` in seconds make the frame rate variable."""
    rate = Fraction(fps).limit_denominator(100_000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=44100) if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number % 256, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            silence.rate, silence.pts = 44100, 0
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def remux(source: Path, target: Path, later: float = 0, skipped_packets: int = 0) -> Path:
    """Copies the packets of a video, all times `later` seconds later, without the first ones.

    What comes to stand before 0 is hidden by an edit list in mp4 and mov.
    """
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        for packet in packets[skipped_packets:]:
            shift = round(later / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
            new.mux(packet)
    return target


def turn_video(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Sets (a, b, c, d) of the display matrix of an mp4 (ISO 14496-12, `tkhd`); (0, 1, -1, 0) is 90° clockwise."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version, flags, times, track, duration, reserved, layer, group, volume
    for offset, value in zip((0, 4, 12, 16), matrix, strict=True):
        struct.pack_into(">i", data, start + offset, value * 65536)
    path.write_bytes(data)


def write_image(path: Path, size: tuple[int, int] = (100, 80), colour: tuple[int, int, int] = (200, 40, 40)) -> Path:
    """A plain image with a gradient, in the format of the file's extension."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8) + np.array(colour, np.uint8)
    pixels[:, :, 2] = np.linspace(0, 255, size[0]).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_caption(media: Path, text: str = "a caption") -> None:
    media.with_suffix(".txt").write_text(text, encoding="utf-8")
