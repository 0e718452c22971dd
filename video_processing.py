"""Videos to tiles: any video -> `pixel_values_videos` float32 `(num_frames, 3, image_size, image_size)`.

A frame is one tile: resized directly to the side of a tile, whatever its proportions, without a thumbnail. The 8B V1
gets 8-bit bicubic frames in 0..1, not doubled as its images are; the 12B V2 gets what its image recipe makes of one
tile. A film is decoded as a stream by PyAV (extra `video`): only the wanted frames are kept, each at its final size.
"""

import base64
import bisect
import contextlib
import inspect
import io
import math
import mimetypes
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.utils import logging

from .image_processing import NemotronVLImageProcessor, Tiling, cut_tiles, recipe_of
from .pictures import RGBImage, load_image

logger = logging.get_logger(__name__)

MAX_KEPT_FRAMES = 1024  # of one video, unless max_frames says otherwise: 262,144 tokens, twice the context of the V2
DEFAULT_MAX_FRAMES = 128  # of a video sampled at a rate, as in NVIDIA's recipes
FRAMES_WITHOUT_RATE = 8  # NVIDIA's number where the rate of the source is unknown
SEEK_DISTANCE = 64  # frames: a keyframe that is further ahead is jumped to
RATE_TOLERANCE = 0.1  # of a frame: intervals that differ more make a variable rate
IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"II*\0", b"MM\0*")


# ---------------------------------------------------------------------------------------------------------------------
# Which frames: pure functions of numbers
# ---------------------------------------------------------------------------------------------------------------------


def _round_and_unique(total: int, count: int) -> list[int]:
    return np.unique(np.round(np.linspace(0, total - 1, count))).astype(np.int64).tolist()


def _cut(total: int, count: int) -> list[int]:
    return np.linspace(0, total - 1, count).astype(np.int64).tolist()


def _starts_of_parts(total: int, count: int) -> list[int]:
    return [(part * total) // count for part in range(count)]


FRAME_RULES = {"round": _round_and_unique, "cut": _cut, "start": _starts_of_parts}


def sample_indices(total: int, count: int, rule: str = "round") -> list[int]:
    """Choose `count` frames, spread evenly over a video of `total` frames.

    Args:
        total: frames of the video.
        count: frames wanted; all are taken if there are not more.
        rule: "round" and "cut" take the first and the last frame, and in between what rounds to a whole number, half
            to even (NVIDIA's helper for the 12B V2), or what is cut to one (Megatron-LM for the 8B V1, vLLM, SGLang).
            "start" takes the first frame of each of `count` equal parts (transformers).

    Raises:
        ValueError: if there is nothing to choose, or for an unknown rule.
    """
    if rule not in FRAME_RULES:
        raise ValueError(f"frame_rule must be one of {', '.join(FRAME_RULES)}, got {rule!r}.")
    total, count = operator.index(total), operator.index(count)
    if total < 1 or count < 1:
        raise ValueError(f"A video needs at least one frame to choose from and one to take, got {total} and {count}.")
    if count >= total:
        return list(range(total))
    return [0] if count == 1 else FRAME_RULES[rule](total, count)


@dataclass(frozen=True)
class Sampling:
    """How many frames are taken, and which.

    Args:
        num_frames: this many, or all if the video has fewer.
        fps: this many a second, at least one and at most `max_frames`, by default 128.
        max_frames: an upper limit. Without `fps`, a video that has more raises an error; the limit is 1,024 then.
        rule: see `sample_indices`.

    Without `num_frames` and `fps`, all frames are taken.

    Raises:
        TypeError, ValueError: for impossible numbers, and for `num_frames` together with `fps`.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    rule: str = "round"

    def __post_init__(self):
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None:
                if isinstance(value, bool) or not hasattr(value, "__index__"):
                    raise TypeError(f"{name} must be a whole number, got {value!r}.")
                if operator.index(value) < 1:
                    raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.fps is not None:
            if isinstance(self.fps, bool) or not isinstance(self.fps, (int, float, np.number)):
                raise TypeError(f"fps must be a number of frames a second, got {self.fps!r}.")
            if not (math.isfinite(self.fps) and self.fps > 0):
                raise ValueError(f"fps must be a finite number above 0, got {self.fps}.")
        if self.num_frames is not None and self.fps is not None:
            raise ValueError(f"Give num_frames or fps, not both; got {self.num_frames} and {self.fps}.")
        if self.rule not in FRAME_RULES:
            raise ValueError(f"frame_rule must be one of {', '.join(FRAME_RULES)}, got {self.rule!r}.")

    def count(self, total: int, source_fps: float | None = None) -> int:
        """Return how many frames are taken of a video of `total` frames at `source_fps` a second.

        Raises:
            ValueError: if the video has no frame, more than the limit, or no rate that `fps` needs.
        """
        if total < 1:
            raise ValueError("The video has no frames.")
        if self.fps is not None:
            if source_fps is None:
                raise ValueError(
                    f"fps={self.fps:g} needs to know how many frames a second the video has. Give it, as "
                    "video_metadata={'fps': ...}, or ask for num_frames."
                )
            rated = total / source_fps * self.fps  # in this order, as NVIDIA's helper
            return max(1, min(int(min(rated, total)), total, self.max_frames or DEFAULT_MAX_FRAMES))
        count = total if self.num_frames is None else min(operator.index(self.num_frames), total)
        limit = self.max_frames or MAX_KEPT_FRAMES
        if count > limit:
            raise ValueError(
                f"{count} frames would be taken of a video of {total}, more than max_frames={limit}. Ask for fewer "
                "with num_frames or fps, or raise max_frames."
            )
        return count

    def indices(self, total: int, source_fps: float | None = None) -> list[int]:
        """Return the frames that are taken of a video of `total` frames; see `count`."""
        return sample_indices(total, self.count(total, source_fps), self.rule)


def valid_rate(fps: Any) -> float | None:
    """Return a frame rate as a float, or None for one that cannot be (0, negative, NaN, infinite, absent)."""
    try:
        fps = float(fps)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return fps if fps > 0 and math.isfinite(fps) and math.isfinite(1000 / fps) else None


@dataclass
class VideoInfo:
    """What is known about a video and the frames taken of it.

    Attributes:
        total_num_frames: frames of the source.
        fps: frames a second of the source; None if unknown.
        frames_indices: the source's index of each frame taken.
        timestamps: seconds of each frame taken, from the start of the video, where the source says so itself because
            its rate varies; None leaves it to `times`.
        duration: seconds of the source; None if unknown.
        height, width: of the source in pixels, upright; None if unknown.
    """

    total_num_frames: int
    fps: float | None
    frames_indices: list[int]
    timestamps: list[float] | None = None
    duration: float | None = None
    height: int | None = None
    width: int | None = None

    @property
    def times(self) -> list[float] | None:
        """Seconds of each frame taken; None without a rate.

        At a constant rate a frame lasts a whole number of milliseconds, `int(1000 / fps)`, as in all runtimes of the
        12B V2. So times drift: frame 30 of a film of 29.97 frames a second is at 0.99.
        """
        if self.timestamps is not None or self.fps is None:
            return self.timestamps
        milliseconds = int(1000 / self.fps)
        if milliseconds == 0:  # more than 1,000 frames a second
            return [index / self.fps for index in self.frames_indices]
        return [index * milliseconds / 1000 for index in self.frames_indices]

    def of(self, places: Sequence[int]) -> "VideoInfo":
        """Return the same for some of the frames taken, given by their places among these."""
        timestamps = None if self.timestamps is None else [self.timestamps[place] for place in places]
        return replace(self, frames_indices=[self.frames_indices[place] for place in places], timestamps=timestamps)


def read_metadata(given: Any, num_frames: int) -> VideoInfo:
    """Read what a caller says about frames that were taken from a video earlier.

    Args:
        given: a dict, or an object with these attributes (transformers' `VideoMetadata`, a `VideoInfo`): `fps`,
            `total_num_frames`, `frames_indices`, `duration`, `timestamps`; all may be absent. Without
            `frames_indices` the frames follow each other at `fps`.
        num_frames: frames that are there.

    Raises:
        ValueError: if the indices do not fit the frames, or a number is negative.
        TypeError: for metadata of another kind.
    """
    if isinstance(given, (str, bytes, int, float, list, tuple)):
        raise TypeError(f"video_metadata must be a dict or VideoMetadata for each video, got {given!r:.80}.")

    def read(name: str) -> Any:
        return given.get(name) if isinstance(given, dict) else vars(given).get(name)  # some derive attributes

    given = {} if given is None else given
    indices = read("frames_indices")
    indices = list(range(num_frames)) if indices is None else [operator.index(index) for index in list(indices)]
    timestamps = read("timestamps")
    timestamps = None if timestamps is None else [float(time) for time in timestamps]
    for name, values in (("frames_indices", indices), ("timestamps", timestamps)):
        if values is not None and len(values) != num_frames:
            raise ValueError(
                f"video_metadata has {len(values)} {name} for {num_frames} frames. Give one for each frame, or leave "
                f"{name} out."
            )
        if values and not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(f"video_metadata's {name} must be finite and at least 0, got {values!r:.80}.")
    total = read("total_num_frames")
    total = max(num_frames, max(indices, default=-1) + 1) if total is None else operator.index(total)
    if total < 0:
        raise ValueError(f"video_metadata's total_num_frames must be at least 0, got {total}.")
    return VideoInfo(total, valid_rate(read("fps")), indices, timestamps, valid_rate(read("duration")))


# ---------------------------------------------------------------------------------------------------------------------
# What counts as a video
# ---------------------------------------------------------------------------------------------------------------------


def _is_array(value: Any, *num_dimensions: int) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in num_dimensions


def _names_image(value: Any) -> bool:
    """Whether a path, URL or file content is that of a still image, and so one frame."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        start = bytes(value[:12])
        return start.startswith(IMAGE_SIGNATURES) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")
    text = os.fspath(value)
    if isinstance(text, str) and text.startswith("data:"):
        kind = text[5:].partition(";")[0].partition(",")[0]
    else:
        kind = mimetypes.guess_type(os.fsdecode(text))[0] or ""
    return kind.startswith("image/") and kind != "image/gif"


def _is_file(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(value, "read")


def _is_frame(value: Any) -> bool:
    if isinstance(value, Image.Image) or _is_array(value, 2, 3):
        return True
    return _is_file(value) and not hasattr(value, "read") and _names_image(value)


def _is_video(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_frame, value))
    return _is_array(value, 4) or (_is_file(value) and not isinstance(value, Image.Image))


def group_videos(videos: Any) -> tuple[list[Any], list[int] | None]:
    """Flatten one video, a list of videos, or one list of videos for each text.

    A list of frames (PIL images, arrays of one image, paths or bytes of image files) is one video. A path alone, a
    4-dimensional array and the bytes of a film are videos; a 5-dimensional array is a list of them.

    Returns:
        the videos in order, and how many belong to each text (None for one video or a flat list).

    Raises:
        TypeError: for something else.
    """
    if videos is None:
        return [], None
    if _is_video(videos):
        return [videos], None
    if _is_array(videos, 5):
        return list(videos), None
    if not isinstance(videos, (list, tuple)):
        raise TypeError(
            "A video is a path, a file: or data: URL, bytes, a file opened in binary mode, an array (frames, height, "
            f"width, channels), or a list of frames; got {type(videos).__name__}{_shape_of(videos)}."
        )
    if all(map(_is_video, videos)):
        return list(videos), None
    groups: list[list[Any]] = []
    for group in videos:
        if group is None:
            groups.append([])
        elif _is_video(group):
            groups.append([group])
        elif isinstance(group, (list, tuple)) and all(map(_is_video, group)):
            groups.append(list(group))
        else:
            raise TypeError(
                "A list of videos holds videos, or for each text a list of videos; a list of frames holds images "
                f"alone. Got an element of type {type(group).__name__}{_shape_of(group)}."
            )
    return [video for group in groups for video in group], [len(group) for group in groups]


def _shape_of(value: Any) -> str:
    return f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""


def _described(video: Any) -> str:
    """Name a video in an error or a warning."""
    if isinstance(video, (str, os.PathLike)):
        text = os.fsdecode(video)
        return f"video {text[:80]!r}{'...' if len(text) > 80 else ''}"
    if isinstance(video, (bytes, bytearray, memoryview)):
        return f"video of {len(video)} bytes"
    return f"video {getattr(video, 'name', '') or type(video).__name__!s:.80}"


def _unreadable(video: Any, why: Any) -> ValueError:
    return ValueError(
        f"The {_described(video)} cannot be used: {why}. Give a complete file with a video stream (MP4, WebM, MKV, "
        "MOV, AVI, GIF, ...), or the frames as images."
    )


def _as_frames_or_file(video: Any) -> list[Any] | Any:
    """Return the frames of a video that comes as frames, or else its path, bytes or file."""
    if isinstance(video, (list, tuple)) or _is_array(video, 4):
        return list(video)
    if not isinstance(video, str):
        return video
    if video.startswith(("http://", "https://")):
        raise _unreadable(video, "it is not fetched from the network; download it and pass the path or the bytes")
    if video.startswith("file://"):
        return url2pathname(urlsplit(video).path)
    if not video.startswith("data:") and (len(video) < 256 or os.path.isfile(video)):
        return video
    header, _, encoded = video.partition(",") if video.startswith("data:") else ("", "", video)
    try:
        # As vLLM's clients send frames: data:video/jpeg;base64,FRAME,FRAME,...
        contents = [base64.b64decode("".join(part.split()), validate=True) for part in encoded.split(",")]
    except ValueError as error:
        raise _unreadable(video, "it is neither an existing file nor base64 text") from error
    return contents if header.startswith(("data:video/jpeg", "data:video/png", "data:image/")) else contents[0]


# ---------------------------------------------------------------------------------------------------------------------
# From a film to its wanted frames, as a stream
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoLimits:
    """What a film may cost; a film beyond a limit raises a ValueError.

    Args:
        max_frame_pixels: height times width of a frame; twice 8K by default.
        max_source_frames: frames of the film; 18 hours at 30 frames a second by default.
        max_file_bytes: size of the file.
    """

    max_frame_pixels: int = 1 << 26
    max_source_frames: int = 2_000_000
    max_file_bytes: int = 1 << 34


@dataclass
class _FilmIndex:
    """The packets of a film, in the order in which their frames are shown.

    Attributes:
        num_frames: frames that the packets hold.
        claimed: frames that the container claims; 0 if it does not say.
        starts: presentation time of each frame, in units of the time base; None if packets have none.
        keyframes: which frames can be decoded by themselves.
        fps: frames a second; None if unknown.
        time_base: seconds of a unit.
        problem: what ended the reading of the packets, if not the end of the film.
    """

    num_frames: int
    claimed: int
    starts: list[int] | None
    keyframes: list[int]
    fps: float | None
    time_base: float
    problem: str = ""

    @property
    def duration(self) -> float | None:
        if self.fps is None or self.num_frames == 0:
            return None
        return self.num_frames / self.fps if self.starts is None else self.seconds(-1) + 1 / self.fps

    @property
    def is_variable(self) -> bool:
        """Whether the frames are shown for different times, beyond the rounding of the time base."""
        if self.starts is None or len(self.starts) < 3:
            return False
        intervals = np.diff(np.array(self.starts, np.int64))
        tolerance = max(2.0, RATE_TOLERANCE * float(intervals.mean()))
        return bool(intervals.max() - intervals.min() > tolerance)

    def seconds(self, frame: int) -> float:
        return (self.starts[frame] - self.starts[0]) * self.time_base


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            'Reading a film needs PyAV: pip install av (or pip install "nemotron-vl[video]"). Without it, give the '
            "frames as a list of images or as an array."
        ) from error
    return av


def _open(video: Any) -> contextlib.AbstractContextManager[Any]:
    """Open a path or bytes; a file stays open, and its position is as it was afterwards.

    FFmpeg gets files and never names, so that it cannot take a name for one of its many protocols.
    """
    if isinstance(video, (str, os.PathLike)):
        if not os.path.isfile(video):  # a pipe or device would never end
            raise _unreadable(video, "it is a directory" if os.path.isdir(video) else "there is no such file")
        return open(video, "rb")
    if not hasattr(video, "read"):
        return io.BytesIO(video)
    if not isinstance(video.read(0), bytes):
        raise _unreadable(video, "the file is open in text mode; open it in binary mode, 'rb'")
    if not video.seekable():
        raise _unreadable(video, "the file is a stream that cannot be read twice; pass what it held: file.read()")
    return _kept_position(video)


@contextlib.contextmanager
def _kept_position(file: Any) -> Iterator[Any]:
    position = file.tell()
    try:
        yield file
    finally:
        file.seek(position)


@contextlib.contextmanager
def _opened_file(video: Any, limits: VideoLimits) -> Iterator[Any]:
    """Open a film, and check its size."""
    with _open(video) as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise _unreadable(video, "it is empty")
        if size > limits.max_file_bytes:
            raise _unreadable(video, f"it has {size} bytes, more than max_file_bytes={limits.max_file_bytes}")
        yield file


@contextlib.contextmanager
def _opened_stream(av: Any, file: Any, video: Any) -> Iterator[tuple[Any, Any]]:
    """Open a film from its start, and its first stream of pictures."""
    file.seek(0)
    # FFmpeg may read what it is given and nothing else: no playlist names another file or a server.
    with av.open(file, mode="r", options={"protocol_whitelist": "none"}) as container:
        streams = [stream for stream in container.streams.video if stream.codec_context is not None]
        if not streams:
            raise _unreadable(video, "it has no video stream" + (", only sound" if container.streams.audio else ""))
        yield container, streams[0]


def _check_frame_size(video: Any, height: int, width: int, limits: VideoLimits) -> None:
    if height * width > limits.max_frame_pixels:
        raise _unreadable(
            video, f"its frames have {width}x{height} pixels, more than max_frame_pixels={limits.max_frame_pixels}"
        )


def _read_index(av: Any, file: Any, video: Any, limits: VideoLimits) -> _FilmIndex:
    """Read the packets of a film without decoding them. What the container says about their number is only a hint."""
    starts: list[int | None] = []
    keyframes: list[bool] = []
    num_packets, problem = 0, ""
    with _opened_stream(av, file, video) as (container, stream):
        _check_frame_size(video, stream.codec_context.height, stream.codec_context.width, limits)
        claimed, fps, time_base = stream.frames, valid_rate(stream.average_rate), float(stream.time_base or 0)
        try:
            for packet in container.demux(stream):
                if packet.size == 0:  # the last one, which only tells the decoder that this is the end
                    continue
                num_packets += 1
                if num_packets > limits.max_source_frames:
                    raise _unreadable(video, f"it has more frames than max_source_frames={limits.max_source_frames}")
                if not packet.is_discard:  # before the point where an edit list starts the film
                    starts.append(packet.pts)
                    keyframes.append(packet.is_keyframe)
        except (av.error.FFmpegError, OSError, EOFError) as error:
            problem = str(error) or type(error).__name__
    if not problem and num_packets < claimed:
        problem = "the file ends early"
    is_timed = time_base > 0 and all(start is not None for start in starts) and len(set(starts)) == len(starts)
    order = sorted(range(len(starts)), key=starts.__getitem__) if is_timed else range(len(starts))
    index = _FilmIndex(
        len(starts),
        max(claimed, num_packets),
        [starts[place] for place in order] if is_timed else None,
        [frame for frame, place in enumerate(order) if keyframes[place]],
        fps,
        time_base,
        problem,
    )
    if is_timed and fps is None and len(starts) > 1:
        index.fps = valid_rate((len(starts) - 1) / index.seconds(-1))
    return index


def _numbered(container: Any, stream: Any, index: _FilmIndex, first: int) -> Iterator[tuple[int, Any]]:
    """Decode from where the container stands: `(number of the frame, frame)`; `first` is the number of the next one."""
    for number, frame in enumerate(container.decode(stream), first):
        if index.starts is not None and frame.pts is not None:
            number = bisect.bisect_right(index.starts, frame.pts) - 1
        yield number, frame


def _decode(container: Any, stream: Any, index: _FilmIndex, wanted: Sequence[int]) -> Iterator[Any]:
    """Yield the wanted frames of a film; long stretches without one are jumped over, where frames have times."""
    end = index.num_frames, None
    frames, number = _numbered(container, stream, index, 0), -1
    may_seek = index.starts is not None and index.keyframes[:1] == [0]
    for target in wanted:
        keyframe = index.keyframes[bisect.bisect_right(index.keyframes, target) - 1] if may_seek else 0
        if keyframe - number > SEEK_DISTANCE:
            container.seek(index.starts[keyframe], stream=stream)
            frames = _numbered(container, stream, index, keyframe)
            number, frame = next(frames, end)
            if number > target:  # the film's own index is wrong: decode it all
                container.seek(index.starts[0], stream=stream)
                frames, number, may_seek = _numbered(container, stream, index, 0), -1, False
        while number < target:
            number, frame = next(frames, end)
        if frame is None:
            return
        yield frame


def _film_frames(
    av: Any, file: Any, video: Any, index: _FilmIndex, wanted: Sequence[int], limits: VideoLimits
) -> Iterator[np.ndarray]:
    """Yield the wanted frames as uint8 RGB arrays `(height, width, 3)`, upright, until the end or the first error."""
    problem = index.problem
    num_read = 0
    with _opened_stream(av, file, video) as (container, stream):
        frames = _decode(container, stream, index, wanted)
        while True:
            try:
                frame = next(frames)
                _check_frame_size(video, frame.height, frame.width, limits)
                pixels = frame.to_ndarray(format="rgb24")
            except StopIteration:
                break
            except (av.error.FFmpegError, OSError, EOFError) as error:
                problem = str(error) or type(error).__name__
                break
            yield np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation % 360 else pixels
            num_read += 1
    if num_read == 0:
        raise _unreadable(video, f"none of its frames can be decoded ({problem or 'it holds none'})")
    if num_read < len(wanted) or problem:
        logger.warning(
            f"The {_described(video)} cannot be read to its end ({problem or 'it ends early'}): it claims "
            f"{index.claimed} frames, {index.num_frames} were found, and {num_read} of the {len(wanted)} wanted ones "
            "are used."
        )


def _read_film(
    video: Any, sample: Callable[[int, float | None], list[int]], limits: VideoLimits
) -> tuple[Iterator[np.ndarray], VideoInfo]:
    """Return the wanted frames of a film, decoded while they are iterated over, and what is known about the film.

    Args:
        video: a path, bytes, or an open file.
        sample: from the number of frames and their rate to the indices of the wanted ones.
        limits: see `VideoLimits`.
    """
    av = _import_av()
    with _opened_file(video, limits) as file, _explained(av, video):
        index = _read_index(av, file, video, limits)
    if index.num_frames == 0:
        raise _unreadable(video, f"it holds no frame{f' ({index.problem})' if index.problem else ''}")
    wanted = sample(index.num_frames, index.fps)
    timestamps = [index.seconds(frame) for frame in wanted] if index.is_variable else None
    info = VideoInfo(index.num_frames, index.fps, wanted, timestamps, index.duration)

    def frames() -> Iterator[np.ndarray]:
        with _opened_file(video, limits) as file, _explained(av, video):
            yield from _film_frames(av, file, video, index, wanted, limits)

    return frames(), info


@contextlib.contextmanager
def _explained(av: Any, video: Any) -> Iterator[None]:
    """Turn what FFmpeg and the file system say into an error that names the video."""
    try:
        yield
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise _unreadable(video, str(error) or type(error).__name__) from error


def read_video(
    video: Any,
    sampling: Sampling,
    *,
    do_sample_frames: bool | None = None,
    metadata: Any = None,
    limits: VideoLimits = VideoLimits(),
    **image_options: Any,
) -> tuple[Iterator[RGBImage], VideoInfo]:
    """Read the wanted frames of a video.

    Args:
        video: a path, a `file:` or `data:` URL, the bytes of a film, a file opened in binary mode, or frames: a list
            of images of any kind (see `NemotronVLImageProcessor`) or an array `(num_frames, ...)` of images.
        sampling: which frames are wanted.
        do_sample_frames: False takes all frames. None samples a film, and leaves frames as they are.
        metadata: of frames; see `read_metadata`. A film says it itself.
        limits: see `VideoLimits`.
        image_options: options of `load_image`, for frames.

    Returns:
        the frames, read while they are iterated over, and what is known about the video. The end of a damaged film may
        be missing: then there are fewer frames than `frames_indices`, and a warning says so.

    Raises:
        ValueError, TypeError: for a video that cannot be used, or metadata that do not fit; the message says why.
        ImportError: for a film, if PyAV is not installed.
    """
    source = _as_frames_or_file(video)
    if not isinstance(source, list):
        if metadata is not None:
            raise ValueError("video_metadata describes frames; a film says it itself. Leave it out.")
        chosen = replace(sampling, num_frames=None, fps=None) if do_sample_frames is False else sampling
        return _read_film(source, chosen.indices, limits)
    if not source:
        raise ValueError("A video has no frames. Give at least one.")
    info = read_metadata(metadata, len(source))
    if do_sample_frames:
        places = sampling.indices(len(source), _rate_of(info))
        source, info = [source[place] for place in places], info.of(places)
    else:
        Sampling(max_frames=sampling.max_frames).count(len(source))

    def frames() -> Iterator[RGBImage]:
        for frame in source:
            yield load_image(frame, **image_options)

    return frames(), info


def _rate_of(info: VideoInfo) -> float | None:
    """Return how many of the given frames there are in a second; fewer than `fps` if some were left out before."""
    if info.fps is None or len(info.frames_indices) < 2:
        return info.fps
    span = info.frames_indices[-1] - info.frames_indices[0]
    return valid_rate((len(info.frames_indices) - 1) / span * info.fps) if span > 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# Frames -> tiles
# ---------------------------------------------------------------------------------------------------------------------


def frame_to_tile(frame: RGBImage, tiling: Tiling) -> torch.Tensor:
    """Resize a frame to one tile.

    Args:
        frame: PIL image of mode RGB or uint8 array `(height, width, 3)`.
        tiling: the recipe of the model's images. With bicubic interpolation (12B V2) or the doubling (8B V1) a frame
            is what that recipe makes of an image of one tile. Without the doubling, a bilinear recipe (8B V1) gives
            way to Pillow's bicubic filter on 8 bits, as in NVIDIA's training and in vLLM.

    Returns:
        `(3, image_size, image_size)`, uint8, or float32 in about 0..255 for the 12B V2.
    """
    if tiling.interpolation == "bicubic" or tiling.upscale > 1:
        return cut_tiles(frame, tiling, max_num_tiles=1)[0]
    image = frame if isinstance(frame, Image.Image) else Image.fromarray(np.ascontiguousarray(frame))
    resized = image.resize((tiling.image_size, tiling.image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The processor
# ---------------------------------------------------------------------------------------------------------------------

V1_SAMPLING = Sampling(num_frames=16, rule="cut")  # of the model card, and of Megatron-LM
V2_SAMPLING = Sampling(fps=2, max_frames=DEFAULT_MAX_FRAMES)  # of NVIDIA's recipes and its helper


class NemotronVLVideoProcessor(NemotronVLImageProcessor):
    """Turns videos into the tiles of a Nemotron Nano VL model, one for each frame. `read_video` says what a video is.

    It has the options of the image processor, so that both read the same preprocessor_config.json. A frame is not cut:
    `max_num_tiles`, `use_thumbnail` and `grid_rule` change nothing. Every option can be given here and per call.

    Args:
        num_frames, fps, max_frames, frame_rule: see `Sampling`. By default a film gives the 8B V1 16 frames (rule
            "cut"), and the 12B V2 two frames a second, at most 128 (rule "round"), or 8 if its rate is unknown.
        max_frame_pixels, max_source_frames, max_file_bytes: see `VideoLimits`.
        kwargs: of `NemotronVLImageProcessor`.
    """

    model_input_names = ["pixel_values_videos", "num_video_frames"]

    def __init__(
        self,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        frame_rule: str | None = None,
        max_frame_pixels: int | None = None,
        max_source_frames: int | None = None,
        max_file_bytes: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_frames, self.fps, self.max_frames, self.frame_rule = num_frames, fps, max_frames, frame_rule
        self.max_frame_pixels, self.max_source_frames = max_frame_pixels, max_source_frames
        self.max_file_bytes = max_file_bytes
        self._sampling({})  # checks them

    @classmethod
    def of_config(cls, config: Any) -> "NemotronVLVideoProcessor":
        """Return the video processor for the model that a config describes."""
        return cls(**recipe_of(config))

    @classmethod
    def of_images(cls, image_processor: NemotronVLImageProcessor) -> "NemotronVLVideoProcessor":
        """Return the video processor with the options of an image processor."""
        return cls.from_dict(image_processor.to_dict())

    def preprocess(
        self,
        videos: Any,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: Any = None,
        return_metadata: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn the frames of videos into tiles.

        Args:
            videos: a video, a list of videos, or one list for each text; see `group_videos`. None and an empty list
                give an empty result.
            return_tensors: None, "pt" or "np".
            input_data_format: "channels_first" or "channels_last", for arrays.
            do_sample_frames: False takes all frames of a film. Frames given as a list or array are sampled only if
                this is True, or `num_frames` or `fps` is given.
            video_metadata: for videos given as frames, see `read_metadata`; for several videos a list.
            return_metadata: also return `video_metadata`, a `VideoInfo` for each video.
            kwargs: options of this call. `upscale=2` doubles frames for the 8B V1 as its images are.

        Returns:
            `pixel_values_videos`: `(num_frames, 3, image_size, image_size)`, the frames of all videos one after the
            other. `num_video_frames`: frames of each video.

        Raises:
            ValueError, TypeError: for unreadable videos (see `read_video`) and wrong options.
        """
        own = {name: kwargs.pop(name) for name in OWN_OPTIONS if name in kwargs}
        upscale = kwargs.pop("upscale", None) or 1  # frames are doubled only on request
        options = self.with_options({**kwargs, "upscale": upscale})
        limits, sampling = self._limits(own), self._sampling(own)
        if do_sample_frames is None and (own.get("num_frames") is not None or own.get("fps") is not None):
            do_sample_frames = True
        flat, _ = group_videos(videos)
        tiles, infos = [], []
        for video, metadata in zip(flat, _metadata_of_each(video_metadata, len(flat)), strict=True):
            frames, info = read_video(
                video,
                sampling,
                do_sample_frames=do_sample_frames,
                metadata=metadata,
                limits=limits,
                do_convert_rgb=options.do_convert_rgb,
                input_data_format=input_data_format,
            )
            tiles.append(options._frames_to_tiles(frames, len(info.frames_indices)))
            infos.append(info.of(range(len(tiles[-1]))))
        return_tensors = getattr(return_tensors, "value", return_tensors)
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be None, 'pt' or 'np', got {return_tensors!r}.")
        pixel_values = tiles[0] if len(tiles) == 1 else torch.cat(tiles) if tiles else options._allocate(0)
        num_frames: Any = [len(own_tiles) for own_tiles in tiles]
        if return_tensors == "np":
            pixel_values, num_frames = pixel_values.cpu().numpy(), np.array(num_frames, np.int64)
        elif return_tensors == "pt":
            num_frames = torch.tensor(num_frames, dtype=torch.int64)
        batch = BatchFeature({"pixel_values_videos": pixel_values, "num_video_frames": num_frames})
        if return_metadata:
            batch["video_metadata"] = infos
        return batch

    def _frames_to_tiles(self, frames: Iterator[RGBImage], num_frames: int) -> torch.Tensor:
        """Read frames, at most `num_frames`, into their tiles. Besides these it holds one frame at a time."""
        pixel_values, tiling, number = self._allocate(num_frames), self.tiling, 0
        with contextlib.closing(frames):
            for number, frame in enumerate(frames, 1):
                self._fill(pixel_values[number - 1 : number], [frame_to_tile(frame, tiling)])
        return pixel_values[:number]

    def _sampling(self, given: dict[str, Any]) -> "Sampling":
        """Return which frames are wanted, under the options of a call."""
        own = {name: getattr(self, name) for name in ("num_frames", "fps", "max_frames", "frame_rule")}
        given = {name: given.get(name) for name in own}
        if given["num_frames"] is not None or given["fps"] is not None:
            own |= {"num_frames": None, "fps": None}  # a call's wish replaces the processor's
        stated = {name: given[name] if given[name] is not None else own[name] for name in own}
        default = V2_SAMPLING if self.interpolation == "bicubic" else V1_SAMPLING
        rule = stated.pop("frame_rule") or default.rule
        if stated["num_frames"] is None and stated["fps"] is None:
            stated |= {"num_frames": default.num_frames, "fps": default.fps}
            return DefaultSampling(**stated, rule=rule)
        return Sampling(**stated, rule=rule)

    def _limits(self, given: dict[str, Any]) -> VideoLimits:
        limits = {}
        for limit in fields(VideoLimits):
            value = given.get(limit.name)
            value = getattr(self, limit.name) if value is None else value
            if value is not None and (isinstance(value, bool) or operator.index(value) < 1):
                raise ValueError(f"{limit.name} must be a whole number above 0, got {value!r}.")
            limits[limit.name] = limit.default if value is None else operator.index(value)
        return VideoLimits(**limits)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a processor from a configuration and overriding options; see `NemotronVLImageProcessor.from_dict`."""
        given = {name: kwargs.pop(name) for name in OWN_OPTIONS if name in kwargs}
        return super().from_dict({**image_processor_dict, **given}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration to save: that of the image processor, and the options of videos that are set."""
        saved = super().to_dict()
        saved["auto_map"]["AutoVideoProcessor"] = "video_processing.NemotronVLVideoProcessor"
        return {name: value for name, value in saved.items() if value is not None or name not in OWN_OPTIONS}


# Options that the processor has besides those of the image processor, and those that a call has besides.
OWN_OPTIONS = tuple(inspect.signature(NemotronVLVideoProcessor).parameters)[:-1]  # all but **kwargs
VIDEO_OPTIONS = (*OWN_OPTIONS, "do_sample_frames", "video_metadata", "return_metadata")


@dataclass(frozen=True)
class DefaultSampling(Sampling):
    """What nobody asked for: it also has an answer where the rate of a video is unknown."""

    def count(self, total: int, source_fps: float | None = None) -> int:
        if self.fps is not None and source_fps is None:
            return replace(self, fps=None, num_frames=FRAMES_WITHOUT_RATE).count(total)
        if self.num_frames is not None and self.max_frames is not None:
            return min(self.num_frames, self.max_frames, total)
        return super().count(total, source_fps)


def _metadata_of_each(given: Any, num_videos: int) -> list[Any]:
    """Return the metadata of each video; None where there are none.

    Raises:
        ValueError: if there are metadata for another number of videos.
    """
    if given is None:
        return [None] * num_videos
    flat = list(given) if isinstance(given, (list, tuple)) else [given]
    if any(isinstance(part, (list, tuple)) for part in flat):  # one list for each text
        flat = [one for part in flat for one in (part if isinstance(part, (list, tuple)) else [part])]
    if len(flat) != num_videos:
        raise ValueError(
            f"video_metadata describes {len(flat)} videos, but {num_videos} were given. Give one for each."
        )
    return flat


NemotronVLVideoProcessor.register_for_auto_class("AutoVideoProcessor")
