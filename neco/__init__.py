"""NeCo (arXiv 2408.11054): post-training a ViT so that student and teacher agree on the order of patch similarities.

Read networks, sorting, patch_ordering, crops, student_teacher, recipe, images, training, evaluation, figures, post_training.
May import: backbones, datasets.scene, datasets.listings, datasets.pictures, dense, files, machine, metrics, runs, show
"""
