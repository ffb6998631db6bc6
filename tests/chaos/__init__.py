"""Faults on purpose: real processes, a network that misbehaves, and a checker of what came of it.

`python -m tests.chaos` runs it:

- `proxy`: a TCP proxy whose faults are switched on and off while it runs.
- `zygote`: starts processes in milliseconds; `processes` are what it started.
- `learner`, `actor`: the programs, which write a `history` of what they are about to do, and of
  what came of it.
- `harness`: a run of them; `faults`: what is done to it, at moments that a seed chooses.
- `checker`: a model of what must hold, and the comparison of a history with it.
- `breaks`: ways to break the library on purpose, by which the checker is tested.
- `stage`: what that has in common with other plays.

Another play is a robot's control loop: a `device` takes actions, and a `driver` sends them, who is
a policy (whose server is a `thinker`), a script or a human. They run on `machines` whose clocks
differ, and a `witness` in each says how long it was kept waiting. `control` is a run of them,
`control_faults` is what is done to it, `control_checker` knows what must hold, with `hands` for
whose turn it is, and `control_breaks` tests that.

A third play are replicas in Ray, a `replica` each, which `caller`s call while they are killed,
replaced and scaled: `replicas` is a run, `replicas_checker` knows what must hold, and
`replicas_breaks` tests that.
"""
