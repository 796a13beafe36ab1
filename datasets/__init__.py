"""What is in an image: data sets that yield `Scene` items and know nothing of models.

Read scene, then any data set.
May import: files
"""
