"""Questions about patches of one image: IsSameObject, class and identity read-outs.

Read task, scores, losses, layer_curve; to look at fitted probes pair_form, encode, maps, map_figures, score_maps, explorer;
to use them from Python finished, monitor; before any work pilot, plan; mode=calibrate: worlds, calibrate, calibrate_summary,
calibrate_figure; the same question in bits: in_bits, bits, code_length, usable_information.
May import: activation, backbones, controls, datasets.in_memory, datasets.pictures, datasets.scene, files, machine, metrics,
options, patches, probes, forms, runs, show, store, tasks, trainer
"""
