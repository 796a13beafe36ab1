"""Frozen backbones: every model becomes tokens of a checked grid; nothing else asks which family it is from.

Read contract, load, timm_vit, architecture, pixels, build, weights, positions, transformers_layout, speed, attention; of
models of the user's own module, statement, answers, proof.
May import: machine, files
"""
