"""Exact scores with the influence of every image, and intervals over images.

Read bootstrap, sample_size, segmentation.
May import: nothing
"""
