"""Exact scores with the influence of every image, and intervals over images.

Read bootstrap, sample_size, code_length, segmentation.
May import: nothing
"""
