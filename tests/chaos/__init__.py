"""Faults on purpose: real processes, a network that misbehaves, and a checker of what came of it.

`python -m tests.chaos` runs it:

- `proxy`: a TCP proxy whose faults are switched on and off while it runs.
- `zygote`: starts processes in milliseconds; `processes` are what it started.
- `learner`, `actor`: the programs, which write a `history` of what they are about to do, and of
  what came of it.
- `harness`: a run of them; `faults`: what is done to it, at moments that a seed chooses.
- `checker`: a model of what must hold, and the comparison of a history with it.
- `breaks`: ways to break the library on purpose, by which the checker is tested.
"""
