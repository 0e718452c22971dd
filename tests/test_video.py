"""Videos: which frames are taken, what becomes of them, and how they stand in a prompt; golden values and own ones.

The golden set `video` holds outputs of vLLM's own functions; tests/golden/README.md says which.
"""

import base64
import io
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nemotron_vl.image_processing import V2_RECIPE, NemotronVLImageProcessor
from nemotron_vl.prompts import V2_LAYOUTS, encode_prompt, video_run
from nemotron_vl.video_processing import (
    NemotronVLVideoProcessor,
    Sampling,
    VideoInfo,
    VideoLimits,
    group_videos,
    read_metadata,
    read_video,
    sample_indices,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tests.conftest import GOLDEN, golden_parameters
from tools import ROOT

FOLDER = GOLDEN / "video"
FILMS = Path(__file__).with_name("golden") / "video" / "mp4"
av = pytest.importorskip("av", reason="films need PyAV: pip install av")


def stored(name: str) -> list:
    """The records of a file of the golden set, to parametrise a test by their numbers."""
    records = golden_parameters("video", lambda folder: range(len(read(name))) if (folder / name).exists() else ())
    return records


def read(name: str):
    return json.loads((FOLDER / name).read_text())


def draw_frames(pattern: int, num_frames: int, height: int, width: int) -> np.ndarray:
    """The patterns of the golden pixels, uint8 `(num_frames, height, width, 3)`, of integers alone."""
    t, y, x, c = np.ogrid[:num_frames, :height, :width, :3]
    if pattern == 0:
        frames = (7 * x + 13 * y + 29 * t + 53 * c + (x * y) // 11) % 256
    elif pattern == 1:
        colours = (x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), 40 * t % 256)
        frames = np.concatenate(np.broadcast_arrays(*colours), -1)
    else:
        frames = 255 * ((x // 5 + y // 3 + t) % 2)
    return np.broadcast_to(frames, (num_frames, height, width, 3)).astype(np.uint8)


def taken(video, sampling: Sampling | None = None, **options) -> tuple[list, VideoInfo]:
    """The frames that `read_video` takes, by default all, and what it says about the video."""
    frames, info = read_video(video, sampling or Sampling(), **options)
    return list(frames), info


# --- which frames -----------------------------------------------------------------------------------------------------


def sampling_of(name: str) -> Sampling:
    """What one of the golden samplers is called with, in our words."""
    kind, _, rest = name.partition(" ")
    if kind == "vllm":
        given = {key: float(value) for key, value in (pair.split("=") for pair in rest.split())}
        limit = int(given["num_frames"]) if given["num_frames"] > 0 else 10**6
        if given["fps"] > 0:
            return Sampling(fps=given["fps"], max_frames=limit, rule="cut")
        return Sampling(num_frames=limit, rule="cut")
    given = json.loads(rest)
    if kind == "transformers":
        return Sampling(**given, max_frames=10**6, rule="start")
    if given["fps"]:
        return Sampling(fps=given["fps"], max_frames=given.get("nframe_max", 10**6), rule="round")
    return Sampling(num_frames=given.get("nframe", 8), rule="round")


@pytest.mark.parametrize("number", stored("frames.json"))
def test_golden_samplers_take_the_same_frames(number):
    record = read("frames.json")[number]
    samplers = {name: value for name, value in record.items() if name not in ("total", "fps")}
    assert samplers
    for name, expected in samplers.items():
        found = sampling_of(name).indices(record["total"], record["fps"])
        if expected == "ValueError":  # more frames than there are: we take all
            expected = list(range(record["total"]))
        assert found == (expected or [0]), name  # transformers may take no frame; we take at least one


def test_the_two_rules_differ_by_one_frame_and_take_both_ends():
    for total in (17, 100, 1000, 10**9):
        rounded, cut = sample_indices(total, 16, "round"), sample_indices(total, 16, "cut")
        assert rounded[0] == cut[0] == 0 and rounded[-1] == cut[-1] == total - 1
        assert max(abs(a - b) for a, b in zip(rounded, cut, strict=True)) <= 1


def test_more_frames_than_there_are_means_all_of_them():
    assert Sampling(num_frames=99).indices(5) == [0, 1, 2, 3, 4]
    assert Sampling(fps=1000).indices(5, 10.0) == [0, 1, 2, 3, 4]
    assert Sampling(fps=0.001).indices(5, 10.0) == [0]


def test_a_rate_takes_at_most_128_frames_and_a_count_at_most_1024_unless_a_limit_is_given():
    assert len(Sampling(fps=2).indices(30_000, 30.0)) == 128
    assert len(Sampling(fps=2, max_frames=500).indices(30_000, 30.0)) == 500
    assert len(Sampling(num_frames=1024).indices(30_000)) == 1024
    with pytest.raises(ValueError, match="1025 frames would be taken of a video of 30000, more than max_frames=1024"):
        Sampling(num_frames=1025).indices(30_000)
    assert len(Sampling(num_frames=1025, max_frames=2000).indices(30_000)) == 1025


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"num_frames": -3}, "num_frames must be at least 1"),
        ({"num_frames": 2.5}, "num_frames must be a whole number"),
        ({"num_frames": True}, "num_frames must be a whole number"),
        ({"fps": 0}, "fps must be a finite number above 0"),
        ({"fps": math.nan}, "fps must be a finite number above 0"),
        ({"fps": math.inf}, "fps must be a finite number above 0"),
        ({"fps": "2"}, "fps must be a number"),
        ({"num_frames": 4, "fps": 2}, "num_frames or fps, not both"),
        ({"rule": "middle"}, "frame_rule must be one of round, cut, start"),
        ({"max_frames": 0}, "max_frames must be at least 1"),
    ],
)
def test_impossible_samplings_are_named(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        Sampling(**wrong)


def test_a_rate_needs_the_rate_of_the_source():
    with pytest.raises(ValueError, match="video_metadata={'fps'"):
        Sampling(fps=2).indices(100, None)


# --- metadata and times -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", stored("prompts.json"))
def test_golden_times_are_whole_milliseconds_a_frame(number):
    record = read("prompts.json")[number]
    info = VideoInfo(max(record["frames_indices"]) + 1, record["fps"], record["frames_indices"])
    assert info.times == record["timestamps"]


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf, None, "unknown", 1e-320])
def test_an_impossible_rate_gives_frames_without_times(fps):
    assert read_metadata({"fps": fps, "total_num_frames": 4}, 4).times is None


def test_a_rate_above_1000_still_gives_times():
    assert VideoInfo(3, 2000.0, [0, 1, 2]).times == [0, 0.0005, 0.001]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"frames_indices": [0, 1, 2]}, "3 frames_indices for 2 frames"),
        ({"frames_indices": [0, -1]}, "must be finite and at least 0"),
        ({"timestamps": [0.0, math.nan]}, "must be finite"),
        ({"total_num_frames": -5}, "total_num_frames must be at least 0"),
        ("fast", "must be a dict or VideoMetadata"),
    ],
)
def test_metadata_that_do_not_fit_are_named(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        read_metadata(wrong, 2)


def test_metadata_without_indices_mean_frames_in_a_row():
    assert read_metadata({"fps": 2.0}, 3).times == [0, 0.5, 1.0]


# --- what counts as a video -------------------------------------------------------------------------------------------


def test_videos_are_grouped_as_clients_give_them():
    image, array = Image.new("RGB", (4, 4)), np.zeros((3, 4, 4, 3), np.uint8)
    assert group_videos(None) == ([], None) and group_videos([]) == ([], None)
    assert group_videos("a.mp4") == (["a.mp4"], None)
    assert group_videos(["a.mp4", Path("b.webm")]) == (["a.mp4", Path("b.webm")], None)
    assert group_videos([["a.mp4"], [], ["b.mp4", "c.mp4"]]) == (["a.mp4", "b.mp4", "c.mp4"], [1, 0, 2])
    assert group_videos([["a.mp4"], None]) == (["a.mp4"], [1, 0])
    frames = [image, image]
    assert group_videos(frames) == ([frames], None)
    assert group_videos([frames, frames]) == ([frames, frames], None)
    assert group_videos([[frames]]) == ([frames], [1])
    assert group_videos(["1.png", "2.jpg"]) == ([["1.png", "2.jpg"]], None)
    assert group_videos([["1.png", "2.jpg"]]) == ([["1.png", "2.jpg"]], None)
    assert len(group_videos(np.stack([array, array]))[0]) == 2
    (one,), groups = group_videos(array)
    assert one is array and groups is None
    assert group_videos([torch.zeros(2, 3, 4, 4)])[1] is None
    assert group_videos(b"film") == ([b"film"], None)
    for wrong in (7, image, np.zeros((4, 4, 3), np.uint8), [7], [["a.mp4", 7]]):
        with pytest.raises(TypeError, match="video"):
            group_videos(wrong)


# --- films ------------------------------------------------------------------------------------------------------------


def golden_films() -> list:
    return golden_parameters(
        "video", lambda folder: sorted(read("mp4.json")) if (folder / "mp4.json").exists() else ()
    )


@pytest.mark.parametrize("name", golden_films())
def test_golden_films_give_the_frames_and_times_that_other_decoders_find(name, caplog):
    record = read("mp4.json")[name]
    path = FOLDER / "mp4" / name
    if "error" in record:
        with pytest.raises(ValueError, match="cannot be used"):
            taken(path)
        return
    frames, info = taken(path)
    by_pyav = record["pyav"]
    if "error" in by_pyav:  # it ends early: what was read before is used, and one warning says so
        assert 0 < len(frames) < 60
        assert len([line for line in caplog.records if line.levelno == logging.WARNING]) == 1
    else:
        assert len(frames) == info.total_num_frames == by_pyav["decoded"]
        assert info.fps == pytest.approx(by_pyav["average_rate"])
        milliseconds = int(1000 / info.fps) / 1000
        expected = [frame * milliseconds for frame in range(len(frames))]
        if name == "variable.mp4":
            expected = by_pyav["times"]
            assert expected == sorted(expected)
        assert info.times == pytest.approx(expected, abs=1e-4)
        assert not caplog.records
    for index, mean in zip(record["frames_indices"], record["mean_rgb"], strict=True):
        if index < len(frames) and name != "variable.mp4":  # vLLM takes other frames there
            assert frames[index].shape == tuple(record["shape"][1:])
            assert frames[index].mean((0, 1)) == pytest.approx(mean, abs=3)


def pixels_of(name: str, num_frames: int = 4) -> np.ndarray:
    frames, _ = taken(FILMS / name, Sampling(num_frames=num_frames))
    return np.stack(frames).astype(np.int16)


@pytest.mark.parametrize(("name", "turns"), [("rotated90.mp4", 1), ("rotated180.mp4", 2), ("rotated270.mp4", 3)])
def test_films_are_turned_upright(name, turns):
    # `frame.rotation` counts counter-clockwise, which OpenCV confirms; see tests/golden/README.md.
    with av.open(str(FILMS / name)) as container:
        rotation = next(container.decode(video=0)).rotation
    upright = np.rot90(pixels_of("constant.mp4"), rotation // 90, axes=(1, 2))
    assert np.abs(upright - pixels_of(name)).max() == 0
    assert rotation % 360 == {1: 270, 2: 180, 3: 90}[turns]


def test_a_path_a_url_bytes_and_a_file_give_the_same_frames():
    path = FILMS / "ntsc.mp4"
    content = path.read_bytes()
    url = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    expected = pixels_of("ntsc.mp4")
    with open(path, "rb") as file:
        file.seek(7)
        for video in (str(path), path, path.as_uri(), content, url, url.partition(",")[2], io.BytesIO(content), file):
            frames, info = taken(video, Sampling(num_frames=4))
            assert np.array_equal(frames, expected) and info.total_num_frames == 45
        assert file.tell() == 7


def film(
    path, frames: int, height: int = 48, width: int = 64, fps: int = 30, group: int = 12, codec="libx264"
) -> Path:
    """Write a film whose frame number is its brightness."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(group), "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            pixels = np.full((height, width, 3), 16 + number % 200, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_far_frames_are_found_by_a_jump_as_by_decoding_all(tmp_path, suffix):
    path = film(tmp_path / f"long{suffix}", 180)
    everything, info = taken(path)
    assert info.total_num_frames == 180
    few, info = taken(path, Sampling(num_frames=3, rule="cut"))
    assert info.frames_indices == [0, 89, 179]
    assert all(np.array_equal(few[place], everything[index]) for place, index in enumerate(info.frames_indices))


def test_a_damaged_film_is_used_up_to_the_damage_and_says_so_once(caplog):
    frames, info = taken(FILMS / "damaged.mp4", Sampling(num_frames=4))
    assert len(frames) == 2 and len(info.frames_indices) == 4
    (warning,) = caplog.records
    assert "2 of the 4 wanted" in warning.message and "60 frames" in warning.message
    batch = NemotronVLVideoProcessor(num_frames=4, image_size=32)(FILMS / "damaged.mp4", return_metadata=True)
    assert batch["num_video_frames"] == [2] and len(batch["video_metadata"][0].frames_indices) == 2


@pytest.mark.parametrize("wanted", [[25], [10, 59]])
def test_a_film_without_a_readable_wanted_frame_is_an_error(tmp_path, wanted):
    content = bytearray((FILMS / "constant.mp4").read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 3000] = bytes(3000)
    with pytest.raises(ValueError, match="none of its frames can be decoded"):
        taken(bytes(content), Sampling(num_frames=4))


def test_the_number_of_frames_that_a_container_claims_is_only_a_hint(tmp_path, caplog):
    content = bytearray(film(tmp_path / "film.avi", 20).read_bytes())
    for chunk, offset in ((b"avih", 24), (b"strh", 40)):  # dwTotalFrames and dwLength
        place = content.index(chunk) + offset
        assert int.from_bytes(content[place : place + 4], "little") == 20
        content[place : place + 4] = (10**9).to_bytes(4, "little")
    frames, info = taken(bytes(content), Sampling(num_frames=4))
    assert len(frames) == 4 and info.total_num_frames == 20
    (warning,) = caplog.records
    assert "claims 1000000000 frames, 20 were found, and 4 of the 4" in warning.message
    table = bytearray((FILMS / "constant.mp4").read_bytes())  # here the number is that of a table, which is too short
    place = table.index(b"stsz") + 12
    table[place : place + 4] = (10**9).to_bytes(4, "big")
    with pytest.raises(ValueError, match="cannot be used"):
        taken(bytes(table))


def test_a_film_that_is_cut_while_it_is_read_is_used_up_to_the_cut(caplog):
    class Shrinking(io.BytesIO):
        """Loses its second half once its packets were counted."""

        opened = 0

        def seek(self, offset, whence=0):
            if (offset, whence) == (0, 0):
                self.opened += 1
                if self.opened == 2:
                    self.truncate(5000)
            return super().seek(offset, whence)

    frames, _ = taken(Shrinking((FILMS / "constant.mp4").read_bytes()), Sampling(num_frames=6))
    assert 0 < len(frames) < 6
    assert "of the 6 wanted ones are used" in caplog.text


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_file_bytes": 100}, "more than max_file_bytes=100"),
        ({"max_frame_pixels": 100}, "160x96 pixels, more than max_frame_pixels=100"),
        ({"max_source_frames": 10}, "more frames than max_source_frames=10"),
    ],
)
def test_a_film_beyond_a_limit_is_refused(limits, says):
    with pytest.raises(ValueError, match=says):
        taken(FILMS / "constant.mp4", limits=VideoLimits(**limits))
    with pytest.raises(ValueError, match=says):
        NemotronVLVideoProcessor(image_size=32)(FILMS / "constant.mp4", **limits)


def test_nothing_is_fetched_and_a_playlist_opens_no_other_file(tmp_path):
    with pytest.raises(ValueError, match="not fetched from the network"):
        taken("https://example.com/film.mp4")
    (tmp_path / "secret.mp4").write_bytes((FILMS / "constant.mp4").read_bytes())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    concat = tmp_path / "list.ffconcat"
    concat.write_text(f"ffconcat version 1.0\nfile '{tmp_path}/secret.mp4'\n")
    for video in (tmp_path / "list.m3u8", playlist.encode(), concat, concat.read_bytes()):
        with pytest.raises(ValueError, match="cannot be used"):
            taken(video)


@pytest.mark.parametrize(
    ("video", "says"),
    [
        ("no/such/film.mp4", "there is no such file"),
        (".", "it is a directory"),
        (b"", "it is empty"),
        (b"ID3 is no film" * 20, "cannot be used"),
        ("data:video/mp4;base64,****", "neither an existing file nor base64"),
        (io.StringIO("text"), "text mode"),
        ([], "no frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
    ],
)
def test_what_is_no_video_is_named(video, says):
    with pytest.raises(ValueError, match=says):
        taken(video)


PEAK = """
import json, resource, sys
from tools import ROOT
from nemotron_vl.video_processing import NemotronVLVideoProcessor
batch = NemotronVLVideoProcessor(image_size=128)(sys.argv[1], num_frames=8)
print(json.dumps([batch["num_video_frames"][0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.slow
def test_the_memory_does_not_grow_with_the_length_of_a_film(tmp_path):
    peaks = []
    for seconds in (10, 600):
        path = film(tmp_path / f"{seconds}.mp4", 10 * seconds, 240, 320, fps=10, group=250)
        run = subprocess.run([sys.executable, "-c", PEAK, path], cwd=ROOT, capture_output=True, text=True, check=True)
        num_frames, kilobytes = json.loads(run.stdout)
        assert num_frames == 8
        peaks.append(kilobytes / 1024)
    assert abs(peaks[1] - peaks[0]) < 20, peaks


@pytest.mark.parametrize(("height", "width"), [(2, 2), (1, 1), (4320, 7680)])
def test_frames_of_one_pixel_and_of_8k_become_tiles(height, width):
    frames = [Image.new("RGB", (width, height), (200, 100, 0))]
    for recipe in ({}, V2_RECIPE):
        tiles = NemotronVLVideoProcessor(image_size=32, do_rescale=True, **recipe)(frames)["pixel_values_videos"]
        assert tiles.shape == (1, 3, 32, 32) and torch.isfinite(tiles).all()


def test_without_pyav_the_error_names_the_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        taken(FILMS / "constant.mp4")
    assert len(taken([Image.new("RGB", (4, 4))])[0]) == 1


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", stored("pixels.json"))
@pytest.mark.parametrize(("recipe", "key", "tolerance"), [({}, "v1_undoubled", 1e-6), (V2_RECIPE, "v2", 2e-6)])
def test_golden_pixels_of_frames_are_equal(number, recipe, key, tolerance):
    record = read("pixels.json")[number]
    frames = draw_frames(record["pattern"], record["frames"], record["height"], record["width"])
    tiles = NemotronVLVideoProcessor(image_size=record["side"], **recipe)(frames)["pixel_values_videos"]
    if not record["full"]:
        tiles = tiles[:, :, 3::16, 5::16]
    expected = load_file(FOLDER / "pixels.safetensors")[f"{record['name']}.{key}"]
    torch.testing.assert_close(tiles, expected, rtol=0, atol=tolerance)


def test_a_frame_of_the_v2_is_an_image_of_one_tile():
    frames = draw_frames(0, 3, 90, 160)
    one_tile = NemotronVLImageProcessor(image_size=64, max_num_tiles=1, **V2_RECIPE)(list(frames))["pixel_values"]
    tiles = NemotronVLVideoProcessor(image_size=64, **V2_RECIPE)(frames)["pixel_values_videos"]
    torch.testing.assert_close(tiles, one_tile, rtol=0, atol=2e-6)


def test_frames_of_the_v1_are_doubled_only_on_request():
    frames = draw_frames(0, 2, 90, 160)
    processor = NemotronVLVideoProcessor(image_size=64)  # its images are doubled
    doubled = NemotronVLImageProcessor(image_size=64, max_num_tiles=1)(list(frames))["pixel_values"]
    assert torch.equal(processor(frames, upscale=2)["pixel_values_videos"], doubled)
    plain = processor(frames)["pixel_values_videos"]
    assert not torch.equal(plain, doubled) and plain.min() >= 0 and plain.max() <= 1


@pytest.mark.parametrize("kind", ["images", "channels first", "tensor", "float", "paths", "nested bytes"])
def test_frames_of_every_kind_give_the_same_tiles(kind, tmp_path):
    frames = draw_frames(1, 3, 40, 64)
    processor = NemotronVLVideoProcessor(image_size=32)
    images = [Image.fromarray(frame) for frame in frames]
    if kind in ("paths", "nested bytes"):
        for number, image in enumerate(images):
            image.save(tmp_path / f"{number}.png")
        paths = sorted(tmp_path.glob("*.png"))
        video = paths if kind == "paths" else [[path.read_bytes() for path in paths]]
    else:
        video = {
            "images": images,
            "channels first": frames.transpose(0, 3, 1, 2),
            "tensor": torch.from_numpy(frames),
            "float": frames.astype(np.float32) / 255,
        }[kind]
    batch, expected = processor(video), processor(frames)
    assert torch.equal(batch["pixel_values_videos"], expected["pixel_values_videos"])
    assert batch["num_video_frames"] == [3]


def test_a_list_of_frames_is_sampled_only_on_request():
    frames = draw_frames(0, 40, 8, 8)
    processor = NemotronVLVideoProcessor(image_size=32)
    assert processor(frames)["num_video_frames"] == [40]
    assert processor(frames, do_sample_frames=True)["num_video_frames"] == [16]
    assert processor(frames, num_frames=5)["num_video_frames"] == [5]
    metadata = {"fps": 10.0, "frames_indices": list(range(0, 400, 10)), "total_num_frames": 400}  # one a second
    batch = processor(frames, fps=0.5, video_metadata=metadata, return_metadata=True)
    assert batch["num_video_frames"] == [20]
    assert batch["video_metadata"][0].frames_indices[-1] == 390
    with pytest.raises(ValueError, match="video_metadata={'fps'"):
        processor(frames, fps=2)
    with pytest.raises(ValueError, match="describes 2 videos, but 1"):
        processor(frames, video_metadata=[metadata, metadata])


def test_a_film_gives_16_frames_to_the_v1_and_two_a_second_to_the_v2(tmp_path):
    path = film(tmp_path / "film.mp4", 200, fps=20)
    v1 = NemotronVLVideoProcessor(image_size=32)(path, return_metadata=True)
    assert v1["video_metadata"][0].frames_indices == sample_indices(200, 16, "cut")
    v2 = NemotronVLVideoProcessor(image_size=32, **V2_RECIPE)(path, return_metadata=True)
    assert v2["video_metadata"][0].frames_indices == sample_indices(200, 20, "round")
    assert NemotronVLVideoProcessor(image_size=32)(path, do_sample_frames=False)["num_video_frames"] == [200]


def test_options_can_be_set_once_and_are_saved(tmp_path):
    processor = NemotronVLVideoProcessor(image_size=32, num_frames=3, max_frame_pixels=10**6)
    processor.save_pretrained(tmp_path)
    again = NemotronVLVideoProcessor.from_pretrained(tmp_path)
    assert (again.num_frames, again.max_frame_pixels, again.fps) == (3, 10**6, None)
    assert again(FILMS / "constant.mp4")["num_video_frames"] == [3]
    assert again(FILMS / "constant.mp4", fps=2)["num_video_frames"] == [4]  # a call's wish replaces it
    assert NemotronVLVideoProcessor.from_pretrained(tmp_path, num_frames=5).num_frames == 5


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", stored("prompts.json"))
def test_golden_prompts_have_the_same_text_and_ids(number):
    file = GOLDEN / "12b-v2" / "checkpoint" / "tokenizer.json"
    if not file.exists():
        pytest.skip("the golden set 12b-v2 has the tokenizer")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    record = read("prompts.json")[number]
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    layout = V2_LAYOUTS["frames"]._replace(header="")  # vLLM writes none
    full = [record["tokens_per_frame"]] * record["frames"]
    reserved = [record["kept"]] + [0] * (record["frames"] - 1)
    states = {"without_evs": full, "reserved_for_evs": reserved, "after_evs": record["per_frame_after_evs"]}
    for state, counts in states.items():
        for filler in ("<image>", "<video>"):
            run = video_run(counts, record["timestamps"], layout, filler)
            ids = encode_prompt(tokenizer, "<video>", {"<video>": [run]}, image_token_id).input_ids
            video_token_id = tokenizer.convert_tokens_to_ids(filler)
            expected = [video_token_id if token == image_token_id else token for token in record["ids"][state]]
            assert ids == expected, state
            text = "".join(piece if isinstance(piece, str) else "<image>" * piece.count for piece in run)
            assert text == record["texts"][state]
    run = video_run(full, None, layout, "<image>")
    text = "".join(piece if isinstance(piece, str) else "<image>" * piece.count for piece in run)
    assert text == record["text_without_metadata"]
