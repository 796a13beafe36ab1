"""Dense evaluations: what the patch tokens of a frozen ViT know about the semantics of a scene.

Reading order: contract (grids, label maps, results), overcluster, retrieval, linear_seg, logistic, cbfe_cd, references
(ceiling, majority), then features (where tokens and labels come from) and suite (one table of all, mode=dense_suite).

May import: activation, backbones, controls, files, forms, machine, metrics, patches, probes, runs, show
"""
