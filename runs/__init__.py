"""Runs: a directory, its records, where its numbers come from, its mirror on W&B.

Read run, finished, adopt, records, states, signals, provenance, validity, equal_fits, mirror, conclusion,
side_by_side, fit_ahead, progress.
May import: files, machine, options
"""
