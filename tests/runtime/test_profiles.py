"""What profiles and options set in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from regrow_runtime import PROFILES, Bundle, Manifest, Profile, UsageError
from regrow_runtime.sessions import open_session, run_options

MEMORY = PROFILES["memory"]


def _session(folder, entries, own=None):
    """As `Bundle.open` opens it for the profile "memory"."""
    return open_session(
        folder, Manifest.load(folder), MEMORY, None, ["CPUExecutionProvider"], entries, own
    )


def test_options_reach_the_session(bundle_folder, pixels, reference):
    key = "session.intra_op.allow_spinning"
    options = _session(bundle_folder, {key: "0"}).get_session_options()
    assert options.get_session_config_entry(key) == "0"
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    bundle = Bundle.open(bundle_folder, profile="memory", options={key: "0"})
    found = bundle.run({"pixel_values": pixels})["logits"]
    np.testing.assert_allclose(found, reference(pixels), rtol=1e-5, atol=1e-5)


def test_an_option_goes_before_the_profile(bundle_folder):
    key = "session.disable_prepacking"
    options = _session(bundle_folder, {key: "0"}).get_session_options()
    assert options.get_session_config_entry(key) == "0"


@pytest.mark.parametrize("options", [{"session.disable_prepacking": 1}, {"": "1"}, {1: "1"}])
def test_options_are_strings(bundle_folder, options):
    with pytest.raises(UsageError, match="options must be strings by name, got"):
        Bundle.open(bundle_folder, options=options)


def test_an_arena_is_given_back_where_there_is_one(bundle_folder, pixels, reference):
    """ONNX Runtime refuses to shrink an arena that is not there."""
    own = ort.SessionOptions()
    own.log_severity_level = 4
    own.enable_cpu_mem_arena = False
    for options, shrinks in ((None, "cpu:0"), (own, None)):
        run = run_options(MEMORY, _session(bundle_folder, {}, options))
        key = "memory.enable_memory_arena_shrinkage"
        assert (run and run.get_run_config_entry(key)) == shrinks
        bundle = Bundle.open(bundle_folder, profile="memory", session_options=options)
        found = bundle.run({"pixel_values": pixels})["logits"]
        np.testing.assert_allclose(found, reference(pixels), rtol=1e-5, atol=1e-5)
    assert run_options(Profile(0, False, True), _session(bundle_folder, {})) is None


class Counting:
    """A session that notes how many samples a run has."""

    def __init__(self, session):
        self.session, self.sizes = session, []

    def run(self, names, feeds, options):
        self.sizes.append(len(feeds["pixel_values"]))
        return self.session.run(names, feeds, options)

    def get_session_options(self):
        return self.session.get_session_options()


def test_memory_runs_few_samples_at_once(bundle_folder, pixels, reference):
    many = np.concatenate([pixels] * 5)[:10]
    session = Counting(_session(bundle_folder, {}))
    bundle = Bundle(bundle_folder, Manifest.load(bundle_folder), session, MEMORY)
    found = bundle.run_all({"pixel_values": many})["logits"]
    assert max(session.sizes) == 4
    np.testing.assert_allclose(found, reference(many), rtol=1e-5, atol=1e-5)
    bundle.run_all({"pixel_values": many}, batch=10)
    assert session.sizes[-1] == len(many)


def test_reading_a_file_allocates_no_more_than_it_has(python, tmp_path):
    """`read(limit)` allocates `limit` bytes first, which a device may not have."""
    path = tmp_path / "small"
    path.write_bytes(b"x" * 1000)
    code = """
import resource, sys
from pathlib import Path
from regrow_format.files import read_bytes
resource.setrlimit(resource.RLIMIT_DATA, (512 << 20, 512 << 20))
print(len(read_bytes(Path(sys.argv[1]), limit=1 << 30, what="a file")))
"""
    found = python(code, str(path))
    assert found.stdout.strip() == "1000", found.stderr
