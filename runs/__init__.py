"""Runs: a directory, its records, where its numbers come from, its mirror on W&B.

Read run, records, provenance, mirror, states.
May import: files, machine
"""
