"""What a reader sees: records, tables, text, and one style for all figures.

Read records, choice (which layer), claims, tables, per_image (the numbers of every image), text, style; look is mode=show,
preview mode=check_data. Read comparison (what may share a column), dense_rows, board (text), page (HTML), across_figures,
across_runs: mode=report; sweep is the report at the end of a sweep.
May import: runs, metrics, tasks, patches, activation, files, machine, probes, backbones.load, datasets.scene, datasets.check,
datasets.codes, store
"""
