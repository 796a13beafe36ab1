"""NeCo (arXiv 2408.11054): post-training a ViT so that student and teacher agree on the order of patch similarities.

Reading order: sorting (the differentiable sort), patch_ordering (crops aligned, references, the loss), crops (where they
lie, how they look), student_teacher (the two networks, EMA, reference queue, schedules, parameter groups), then the loop.

May import:
"""
