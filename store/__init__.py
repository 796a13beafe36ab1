"""The activation cache on disk: labels and selection first, then one forward pass, then shards that are only read.

Read plan, labelled and index (labels), chunks, writing and extract (tokens), shards (files), reading (data
sets); listing (mode=cache).
May import: datasets.scene, patches, backbones, files, machine, runs.progress
"""
