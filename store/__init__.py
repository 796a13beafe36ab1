"""The activation cache on disk: labels and selection first, then one forward pass, then shards that are only read.

Read index, extract, shards.
May import: datasets.scene, patches, backbones, files, machine
"""
