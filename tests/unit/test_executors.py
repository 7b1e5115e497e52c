"""What a starter may do to a child that runs, and to the child's own children."""

from __future__ import annotations

import os
import subprocess
import sys

from loop.executors import ChildControl

PARKED = """
import signal, subprocess, sys
compiler = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=-1, stdout=-1)
compiler.stdout.readline()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print("up", flush=True)
signal.sigwait({signal.SIGUSR1})
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
    ChildControl(trainer.pid).park()
    assert trainer.communicate(timeout=60)[0] == "parked, and its compiler ended with 0\n"
    ChildControl(trainer.pid).park()  # it has ended: nothing happens
