"""What a reader sees: records, tables, text, and one style for all figures.

Read records, choice, tables, text, style; look is mode=show.
May import: runs, metrics, tasks, patches, activation, files, backbones.load, datasets.scene, store.labelled
"""
