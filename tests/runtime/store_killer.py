"""Kills a process that changes a store, many times, and looks each time what is left.

    python store_killer.py STORE ADAPTERS KILLS SEED OTHERS

ADAPTERS is a folder of adapter files. A worker tells of every change before and after it makes it;
half of the workers are killed at a random time, half at a random line of the store's code. Then the
store is what was reported, with or without the change that was under way, and nothing else. OTHERS
processes, which nobody kills, work in the store meanwhile. Prints how many kills came between.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from regrow_runtime import UsageError
from regrow_runtime.store import Store

STORE, ADAPTERS, KILLS, SEED, OTHERS = (
    Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir()), *map(int, sys.argv[3:]),
)  # fmt: skip
USERS = ("ana", "béla", "楚")
WATCHED = ("store.py", "index.py", "files.py")


def change(store: Store, op: list) -> None:
    kind, user, what, flag = op
    if kind == "add":
        store.add(user, ADAPTERS[what], activate=flag)
    elif kind == "activate":
        store.activate(user, what)
    elif kind == "back":
        store.roll_back(user)
    else:
        store.remove(user, what)


def draw(store: Store, rng: random.Random) -> list:
    user = rng.choice(USERS)
    entries = store.list(user)
    kind = rng.choice(["add", "add", "add", "activate", "back", "remove", "remove", "clear"])
    if kind == "add" or not entries:
        return ["add", user, rng.randrange(len(ADAPTERS)), rng.random() < 0.5]
    version = rng.choice(entries).version
    return [kind, user, version if kind in ("activate", "remove") else None, None]


def expect(state: dict, op: list) -> dict:
    """`state` after `op`: by user, newest version, hashes by version, activations."""
    state, (kind, user, what, flag) = copy.deepcopy(state), op
    if kind == "clear":
        state.pop(user)
        return state
    newest, files, turns = state.setdefault(user, [0, {}, []])
    if kind == "add":
        digest = hashlib.sha256(ADAPTERS[what].read_bytes()).hexdigest()
        what = newest if files.get(newest) == digest else newest + 1
        files[what], state[user][0] = digest, what
    if kind == "back":
        turns.pop()
    if what in turns and (kind != "add" or flag):
        turns.remove(what)
    if kind == "remove":
        del files[what]
        if not files:
            del state[user]
    if kind == "activate" or flag:
        turns.append(what)
    return state


def seen(state: dict) -> dict:
    return {
        user: (files, turns[-1] if turns else None) for user, (_, files, turns) in state.items()
    }


def found(store: Store) -> dict:
    view: dict = {}
    for entry in store.list():
        if entry.user in USERS:
            files, active = view.get(entry.user, ({}, None))
            files[entry.version] = entry.digest
            view[entry.user] = (files, entry.version if entry.active else active)
    return view


def work(pipe: int, rng: random.Random, line: int) -> None:
    """Change the store until killed: at the `line`th line of its code, if not 0."""
    left = line

    def trace(frame, event, _):
        nonlocal left
        if os.path.basename(frame.f_code.co_filename) not in WATCHED:
            return None
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    if line:
        sys.settrace(trace)
    store = Store(STORE)
    while True:
        op = draw(store, rng)
        os.write(pipe, json.dumps(["?", op]).encode() + b"\n")
        try:
            change(store, op)
        except UsageError:  # nothing to roll back to, or a version that is active
            os.write(pipe, json.dumps(["no", op]).encode() + b"\n")
        else:
            os.write(pipe, json.dumps(["yes", op]).encode() + b"\n")


def killed(rng: random.Random, by_line: bool) -> list:
    """Start a worker, kill it, and return what it told."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work(writing, rng, rng.randrange(1, 1500) if by_line else 0)
        finally:
            os._exit(1)
    os.close(writing)
    if not by_line:
        time.sleep(rng.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        told = [json.loads(line) for line in pipe if line.endswith("\n")]
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the worker must not fail by itself"
    return told


def judge(state: dict, told: list, view: dict) -> tuple[dict, str]:
    """What the store must hold now, and what came of the change that was under way."""
    for tag, op in told:
        state = expect(state, op) if tag == "yes" else state
    if not told or told[-1][0] != "?":
        assert view == seen(state), (view, seen(state))
        return state, "none"
    with contextlib.suppress(KeyError, IndexError):  # the change made no sense and was refused
        after = expect(state, told[-1][1])
        if view == seen(after) != seen(state):
            return after, "after"
    assert view == seen(state), (view, seen(state), told[-1])
    return state, "before"


def look(strict: bool) -> dict:
    """Open, check every file; with `strict` nothing but what is installed is there."""
    with Store(STORE) as store:
        if strict:
            digests = {f"{entry.digest}.safetensors" for entry in store.list()}
            assert set(os.listdir(STORE / "objects")) == digests
            assert os.listdir(STORE / "pending") == []
        assert store.verify() == ()
        return found(store)


def other(name: str) -> None:
    """Works beside the workers, on a user of its own, and must never see anything odd."""
    rng = random.Random(name)
    with Store(STORE) as store:
        while not (STORE.parent / "stop").exists():
            path = rng.choice(ADAPTERS)
            entry = store.add(name, path, activate=True)
            assert store.path(name).read_bytes() == path.read_bytes()
            assert store.active(name) == entry
            if rng.random() < 0.3:
                store.remove(name)
            time.sleep(0.01)


def main() -> None:
    others = []
    for index in range(OTHERS):
        others.append(os.fork())
        if others[-1] == 0:
            try:
                other(f"other {index}")
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
            os._exit(1)
    state: dict = {}
    counts = {"none": 0, "before": 0, "after": 0, "reported": 0}
    for index in range(KILLS):
        told = killed(random.Random(SEED + index), by_line=index % 2 == 0)
        state, came = judge(state, told, look(strict=not OTHERS))
        counts[came] += 1
        counts["reported"] += sum(tag == "yes" for tag, _ in told)
    (STORE.parent / "stop").touch()
    assert [os.waitpid(pid, 0)[1] for pid in others] == [0] * OTHERS
    look(strict=True)
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()
