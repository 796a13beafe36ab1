"""Patches: where they lie in an image, what each one is called, which are kept. One file per section of `protocol:`.

Read geometry, windows, labels, selection, anchor.
May import: options
"""
