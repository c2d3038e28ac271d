"""The measurements on a GPU, one command for a bare machine: `python3 -m bench.gpu`.

`harness.py` has the clock, `problems.py` the inputs, `cases.py` what is measured, `__main__.py` the command line and
the report. `--rehearse` runs every case at toy sizes on the CPU: the first run on a GPU must not fail on a typo.
"""
