"""What opens no socket, starts no thread and leaves no file: importing, and using, the runtime."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from regrow_runtime.store import Store

USE = """
import sys
from regrow_runtime import Bundle
from regrow_runtime.store import Store

bundle = Bundle.open(sys.argv[1])
bundle.swap(sys.argv[2])
pixels = [[[[0.5] * 4] * 4]]
bundle.run({'pixel_values': pixels})
with Store(sys.argv[3]) as store:
    store.add('ana', sys.argv[2], activate=True, bundle=bundle)
    store.swap(bundle, 'ana')
    name = store.load(bundle, 'ana')
print(bundle.run({'pixel_values': pixels}, [name])['logits'].shape)
"""

AUDIT = """
import sys
def refuse(event, args):
    if event.startswith(('socket.', 'urllib.', 'ftplib.', 'http.', 'smtplib.', 'subprocess.')):
        raise SystemExit(f'{event} {args}')
sys.addaudithook(refuse)
"""

# The kernel kills the process at socket(2), whoever calls it: what ONNX Runtime's own code does is
# not seen by Python.
FILTER = """
import ctypes, os, struct
number = {'x86_64': 41, 'aarch64': 198}[os.uname().machine]
def step(code, yes, no, value): return struct.pack('HBBI', code, yes, no, value)
program = (step(0x20, 0, 0, 0) + step(0x15, 0, 1, number) + step(0x06, 0, 0, 0x80000000)
           + step(0x06, 0, 0, 0x7fff0000))
steps = ctypes.create_string_buffer(program, len(program))
class Program(ctypes.Structure):
    _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(
        22, 2, ctypes.byref(Program(4, ctypes.addressof(steps))), 0, 0):
    raise SystemExit('no filter')
"""


@pytest.fixture
def arguments(bundle_folder, make_adapter, tmp_path):
    make_adapter().save(tmp_path / "a.safetensors")
    return [str(bundle_folder), str(tmp_path / "a.safetensors"), str(tmp_path / "store")]


def test_no_socket_from_python(python, arguments):
    found = python(AUDIT + USE, *arguments)
    assert found.stdout.strip() == "(1, 3)", found.stderr
    assert python(AUDIT + "import socket\nsocket.socket()").stderr.startswith("socket.__new__")


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="filters of system calls are Linux's, and calls are numbered by machine",
)
def test_no_socket_from_native_code(python, arguments):
    found = python(FILTER + USE, *arguments)
    if "no filter" in found.stderr:
        pytest.skip("this kernel takes no filter")
    assert (found.returncode, found.stdout.strip()) == (0, "(1, 3)"), found.stderr
    assert python(FILTER + "import socket\nsocket.socket()").returncode < 0  # the filter works


def test_nothing_is_left_at_home(environment, arguments, tmp_path):
    """ONNX Runtime's telemetry would leave the device's id and a database there."""
    home = tmp_path / "home"
    home.mkdir()
    suppressing = ("CI", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    env = {name: value for name, value in environment.items() if name not in suppressing}
    found = subprocess.run(
        [sys.executable, "-B", "-c", USE, *arguments],
        capture_output=True, text=True, env={**env, "HOME": str(home)}, timeout=60, check=False,
    )  # fmt: skip
    assert found.stdout.strip() == "(1, 3)", found.stderr
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize(("variable", "calls"), [(None, 1), ("1", 1), ("0", 0)])
def test_telemetry_where_onnxruntime_was_imported_before(python, variable, calls):
    found = python(
        f"import os, onnxruntime\nvariable, calls = {variable!r}, []\n"
        "if variable: os.environ['ORT_DISABLE_TELEMETRY'] = variable\n"
        "onnxruntime.disable_telemetry_events = lambda: calls.append(1)\n"
        "import regrow_runtime; print(len(calls))"
    )
    assert found.stdout.strip() == str(calls), found.stderr


def test_importing_opens_modules_and_nothing_else(python):
    """Above numpy, onnxruntime and safetensors, which do as they like."""
    found = python(
        "import os, sys, threading\n"
        "os.environ['ORT_DISABLE_TELEMETRY'] = '1'\n"
        "import numpy, onnxruntime, safetensors.numpy\n"
        "folder = '/proc/self/task'\n"
        "tasks = lambda: os.listdir(folder) if os.path.isdir(folder) else []\n"
        "seen, before = [], (threading.active_count(), len(tasks()), dict(os.environ))\n"
        "sys.addaudithook(lambda event, args: seen.append((event, str(args[:1])[:200])))\n"
        "import regrow_runtime\n"
        "after = (threading.active_count(), len(tasks()), dict(os.environ))\n"
        "assert before == after, (before, after)\n"
        "quiet = ('import', 'compile', 'exec', 'marshal.', 'open', 'os.listdir', 'os.scandir',\n"
        "         'object.__', 'sys._', 'code.__new__', 'os.mkdir', 'os.rename')\n"
        "odd = [s for s in seen if not s[0].startswith(quiet)]\n"
        "odd += [s for s in seen if s[0] == 'open' and '.py' not in s[1]]\n"
        "odd += [s for s in seen if s[0] in ('os.mkdir', 'os.rename') and 'pycache' not in s[1]]\n"
        "print(odd, 'sqlite3' in sys.modules, 'click' in sys.modules, len(seen) > 50)"
    )
    assert found.stdout.strip() == "[] False False True", found.stderr


def test_the_store_brings_what_python_has(python):
    found = python(
        "import sys, regrow_runtime\nbefore = {n.partition('.')[0] for n in sys.modules}\n"
        "import regrow_runtime.store\n"
        "new = {n.partition('.')[0] for n in sys.modules} - before\n"
        "print(sorted(new - set(sys.stdlib_module_names)), 'sqlite3' in new)"
    )
    assert found.stdout.strip() == "[] True", found.stderr


def test_a_store_of_another_interpreter(python, arguments, tmp_path):
    """What one process installed another one reads."""
    assert python(USE, *arguments).returncode == 0
    with Store(tmp_path / "store") as store:
        assert store.active("ana").version == 1
