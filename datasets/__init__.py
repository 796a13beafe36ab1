"""What is in an image: data sets that yield `Scene` items and know nothing of models.

Read in this order: scene (the item, the contract, the door) · procedural, painting (the data set without files) ·
pictures, listings, metadata (files) · folder, ade20k, ade20k_files · published (benchmarks), voc, ade20k_challenge,
cityscapes, coco, coco_masks · codes, priors, splits, sampling (codes of whole images) · color_shape,
balanced_color_shape, clevr, occlusion_clevr, occlusion_cache, visual_genome, arrangements ·
check (mode=check_data), export (mode=export_data).
May import: files, metrics.sample_size, runs.progress
"""
