"""Questions about patches of one image: IsSameObject, class and identity read-outs.

Read task, scores, losses, layer_curve, score_maps.
May import: activation, backbones, controls, datasets.scene, files, machine, metrics,
options, patches, probes, forms, runs, show, store, tasks, trainer
"""
