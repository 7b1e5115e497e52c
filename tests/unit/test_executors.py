"""What a starter may do to a child that runs, and to the child's own children."""

from __future__ import annotations

import os
import subprocess
import sys

from loop.executors import ChildControl

PARKED = """
import signal, subprocess, sys, threading
compiler = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=-1, stdout=-1)
compiler.stdout.readline()
told = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: told.set())
print("up", flush=True)
told.wait()
compiler.communicate(b"go on\\n")
print("parked, and its compiler ended with", compiler.returncode, flush=True)
"""


def test_parking_is_told_to_the_trainer_alone() -> None:
    """What it has started knows no such signal, and would die of it."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", PARKED], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "up\n"
    assert os.getpgid(trainer.pid) == trainer.pid
    assert ChildControl(trainer.pid).park()
    assert trainer.communicate(timeout=60)[0] == "parked, and its compiler ended with 0\n"
    assert not ChildControl(trainer.pid).park()  # it has ended: nothing happens


def test_a_trainer_that_does_not_listen_yet_is_not_killed_by_parking() -> None:
    """The signal's default is to end a process, which would make the night fail."""
    started = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=-1, stdout=-1)
    assert started.stdout is not None
    started.stdout.readline()
    assert not ChildControl(started.pid).park()
    started.communicate(b"go on\n", timeout=60)
    assert started.returncode == 0
