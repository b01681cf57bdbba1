"""Audio from disk: every kind of PCM and floats, headers that lie, other rates."""

from __future__ import annotations

import struct
import tracemalloc
import wave
from math import gcd

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regrow_inputs import read_wav, resample
from regrow_runtime import FormatError, UsageError


def _pcm(values: np.ndarray, width: int) -> bytes:
    """Little-endian PCM of floats from -1 to 1 (exclusive)."""
    numbers = np.round(values * 2 ** (8 * width - 1)).astype(np.int64)
    if width == 1:
        return (numbers + 128).astype(np.uint8).tobytes()
    return b"".join(int(n).to_bytes(width, "little", signed=True) for n in numbers.ravel())


def _riff(chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def _fmt(kind=1, channels=1, rate=8000, width=2, bits=None) -> bytes:
    block = channels * width
    fields = struct.pack(
        "<HHIIHH", kind, channels, rate, rate * block % 2**32, block, bits or 8 * width
    )
    return b"fmt " + struct.pack("<I", 16) + fields


def _extensible(kind: int, width: int) -> bytes:
    plain = bytearray(_fmt(0xFFFE, 1, 8000, width))
    plain[4:8] = struct.pack("<I", 40)
    tail = b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
    return bytes(plain) + struct.pack("<HHIH", 22, 8 * width, 4, kind) + tail


def _data(content: bytes, size: int | None = None) -> bytes:
    return b"data" + struct.pack("<I", len(content) if size is None else size) + content


@pytest.fixture
def write(tmp_path):
    """write(content): the path of a .wav with it."""

    def call(content: bytes):
        (tmp_path / "a.wav").write_bytes(content)
        return tmp_path / "a.wav"

    return call


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pcm(tmp_path, width, channels):
    """As the standard library writes it."""
    values = np.clip(np.random.default_rng(0).normal(0, 0.4, (50, channels)), -1, 0.99)
    values[0] = -1
    with wave.open(str(tmp_path / "a.wav"), "wb") as stream:
        stream.setnchannels(channels)
        stream.setsampwidth(width)
        stream.setframerate(8000)
        stream.writeframes(_pcm(values, width))
    clip, rate = read_wav(tmp_path / "a.wav")
    assert (rate, clip.dtype, clip.shape) == (8000, np.float32, (50,))
    assert clip[0] == -1
    np.testing.assert_allclose(clip, values.mean(axis=1), atol=2.0 ** (1 - 8 * width) + 1e-7)


@pytest.mark.parametrize("width", [4, 8])
def test_floats(write, width):
    values = np.array([0.0, 0.25, -1.0, 1.5]).astype(f"<f{width}")
    for head in (_fmt(3, width=width), _extensible(3, width)):
        clip, _ = read_wav(write(_riff(head + _data(values.tobytes()))))
        assert clip.tolist() == values.tolist()


def test_an_extensible_header_and_chunks_of_others(write):
    samples = np.array([1, -2, 3], "<i2")
    other = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # odd chunks are filled up
    content = _riff(other + _extensible(1, 2) + other + _data(samples.tobytes()) + other)
    clip, _ = read_wav(write(content))
    np.testing.assert_array_equal(clip * 32768, samples)


def test_what_is_beyond_30_seconds_is_not_read(write):
    path = write(_riff(_fmt(rate=1000) + _data(np.arange(31_000, dtype="<i2").tobytes())))
    assert len(read_wav(path)[0]) == 30_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must be a whole .wav"),
        (b"RIFF", "must be a whole .wav"),
        (b"ID3\x03 an mp3, longer", "must be a .wav of PCM or floats, got another file"),
        (_riff(_fmt()), "must be a whole .wav"),
        (_riff(_data(b"1234")), "must be a whole .wav"),
        (_riff(_fmt(2) + _data(b"1234")), "must be PCM of 8 to 32 bits .*got format 2 of 16"),
        (_riff(_fmt(3) + _data(b"1234")), "floats of 32 or 64, got format 3 of 16 bits"),
        (_riff(_fmt(channels=0) + _data(b"1234")), "must be PCM"),
        (_riff(_fmt(width=0) + _data(b"1234")), "must be PCM"),
        (_riff(_fmt(width=8) + _data(b"12345678")), "got format 1 of 64 bits"),
        (_riff(_fmt(width=2, bits=24) + _data(b"1234")), "got format 1 of 24 bits"),
        (_riff(_fmt(channels=65) + _data(bytes(130))), "at most 64 channels .*got 65"),
        (_riff(_fmt(rate=0) + _data(b"1234")), "at 1000 to 384000 Hz, got 1 at 0 Hz"),
        (_riff(_fmt(rate=2**32 - 1) + _data(b"1234")), "at 4294967295 Hz"),
        (_riff(_fmt() + _data(b"")), "samples that its header promises, got none"),
        (_riff(_fmt() + _data(b"1")), "samples that its header promises, got none"),
        (_riff(_fmt() + _data(b"1234", 2**31)), "header promises, got 2 of 1073741824"),
        (_riff(_fmt(3, width=4) + _data(struct.pack("<f", np.nan))), "must hold finite samples"),
    ],
)
def test_files_that_are_no_sound(write, content, words):
    path = write(content)
    with pytest.raises(FormatError, match=words) as error:
        read_wav(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_such_sound(tmp_path):
    with pytest.raises(UsageError, match=r"must be a \.wav file, got .*x\.wav: no such file"):
        read_wav(tmp_path / "x.wav")
    with pytest.raises(UsageError, match="it is a folder"):
        read_wav(tmp_path)


def test_a_header_of_ten_gigabytes_costs_nothing(write):
    """Chunks that claim gigabytes, in a file of a hundred bytes."""
    for content in (
        _riff(_fmt() + _data(b"1234", 2**32 - 2)),
        _riff(b"LIST" + struct.pack("<I", 2**32 - 1) + _fmt() + _data(b"1234")),
        _riff(b"fmt " + struct.pack("<I", 2**32 - 1) + b"1234"),
        _riff(b"junk\0\0\0\0" * 2000 + _fmt() + _data(b"1234")),
    ):
        path = write(content)
        tracemalloc.start()
        with pytest.raises(FormatError):
            read_wav(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_sounds_are_bounded(write, monkeypatch):
    monkeypatch.setattr("regrow_inputs.wav._MAX_BYTES", 100)
    with pytest.raises(FormatError, match="at most 100 bytes in 30 s, got 200"):
        read_wav(write(_riff(_fmt() + _data(bytes(200)))))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_file_is_a_traceback(tmp_path, data):
    whole = bytearray(_riff(_extensible(data.draw(st.sampled_from([1, 3])), 4) + _data(bytes(16))))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.wav").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        clip, rate = read_wav(tmp_path / "a.wav")
    except FormatError:
        return
    assert np.isfinite(clip).all()
    assert 1000 <= rate <= 384_000


# -- rates -----------------------------------------------------------------------------------------

RATES = [(8000, 16000), (44100, 16000), (48000, 16000), (16000, 8000), (11025, 16000),
         (16001, 16000), (1000, 384_000), (384_000, 1000), (96_000, 44_100)]  # fmt: skip


@pytest.mark.parametrize(("rate", "wanted"), RATES)
@pytest.mark.parametrize("length", [1, 7, 1000])
def test_resampling_is_scipys(rate, wanted, length):
    signal = pytest.importorskip("scipy.signal")
    clip = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    common = gcd(rate, wanted)
    expected = signal.resample_poly(clip.astype(np.float64), wanted // common, rate // common)
    found = resample(clip, rate, wanted)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("rate", "wanted"), RATES[:5])
def test_resampling_keeps_the_tone(rate, wanted):
    clip = np.sin(2 * np.pi * 300 * np.arange(rate) / rate).astype(np.float32)
    found = resample(clip, rate, wanted)
    assert len(found) == wanted
    expected = np.sin(2 * np.pi * 300 * np.arange(wanted) / wanted)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=0.01)


def test_the_same_rate_is_the_same_sound():
    clip = np.ones(5, np.float32)
    assert resample(clip, 16000, 16000) is clip
