"""What a reader sees: records, tables, text, and one style for all figures.

Read records, choice, per_image, tables, text, style; look is mode=show.
May import: runs, metrics, tasks, patches, activation, probes, files, backbones.load, datasets.scene, store.labelled
"""
