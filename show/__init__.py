"""What a reader sees: records, tables, text, and one style for all figures.

Read records, tables, text, style.
May import: runs, metrics, tasks, patches, activation, files
"""
