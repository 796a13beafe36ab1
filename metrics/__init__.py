"""Exact scores with the influence of every image, and intervals over images.

Read bootstrap, segmentation.
May import: nothing
"""
