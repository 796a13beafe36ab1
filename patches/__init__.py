"""Patches: where they lie in an image, their labels, which are kept. One file per section of `protocol:`.

Read geometry, windows, labels, selection, anchor.
May import: options
"""
