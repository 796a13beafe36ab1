"""Binding information: which features belong together, in bits (arXiv 2606.03976).

Read task, settings, base, probes, information, tables, examples, figures.
May import: activation, backbones, controls, datasets.scene, datasets.codes, datasets.splits, files, machine, metrics,
options, patches, probes, forms, runs, show, store, tasks, trainer
"""
