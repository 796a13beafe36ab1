"""NeCo (arXiv 2408.11054): post-training a ViT so that student and teacher agree on the order of patch similarities.

Read networks, sorting, patch_ordering, crops, student_teacher.
May import: nothing
"""
