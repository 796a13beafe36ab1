"""A stranger's model and images in memory: is there more in its patch tokens than position and pixels?

python docs/examples/own_module.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # this clone; a notebook that is opened in the clone needs no such line

import timm

import vit_probing as vp
from datasets.procedural import Scenes

# Forty pictures with identity maps: 0 background, 1, 2, … the objects of a picture. Yours are lists of arrays as well.
scenes = Scenes("train", n_train=40, n_val=1, n_test=1)
images = [scenes[i].image.permute(1, 2, 0).numpy() for i in range(40)]  # [H, W, 3] uint8
identity_maps = [scenes[i].labels["identity"].numpy() for i in range(40)]  # [H, W]

# Any torch module, or a function around one. This one returns its class token first, so it is cut off.
vit = timm.create_model("vit_tiny_patch16_224", img_size=96, patch_size=8, embed_dim=48, depth=2, num_heads=2)
patch_tokens = lambda x: vit.forward_features(x)[:, 1:]

size = {"patch_size": 8, "image_size": 96, "mean": 0.5, "std": 0.5}
result = vp.probe(patch_tokens, images, identity_maps, "trainer.epochs=2", "controls=[position,pixels]", **size)
print(result.table)
result.curve().savefig(result.dir / "my_curve.png")
images_with_pairs = [row for row in result.image_scores if row["subset"] == "all" and row["auroc"] is not None]
worst = min(images_with_pairs, key=lambda row: row["auroc"])
print(f"hardest image: {worst['image']}, AUROC {worst['auroc']:.3f}; the form has shape {list(result.form(0).form.shape)}")

# A forgotten class token does not give a wrong number: the proof of one bright patch names it.
try:
    vp.probe(lambda x: vit.forward_features(x), images, identity_maps, **size)
except vp.UserError as error:
    print(f"refused: {error}")
