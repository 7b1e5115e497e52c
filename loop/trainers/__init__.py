"""Trainers: each runs in a process of its own, and only here are torch and its relatives imported.

The parent writes a spec (`spec.py`), starts `python -m loop.trainers.peft SPEC` (or `.unsloth`, `.axolotl`) through
`loop.executors`, reads progress lines from its stdout and finds `adapter/` and, last, `result.json` in `out_dir`.
"""
