"""What a fitted IsSameObject probe reads, and what happens when it is taken away (arXiv 2510.24709, section 5).

Read factors, subspaces, objects, grouping, interventions, then causing, figures and report (mode=analyze).
May import: activation, backbones, controls, datasets.scene, files, metrics, options, pairs, patches, probes, forms, runs,
show, store, tasks, trainer
"""
