"""Watch a model while it trains: a score of its patch tokens every few steps, at most a twentieth of the time.

python docs/examples/watch_training.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import vit_probing as vp
from datasets.procedural import Scenes

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
held_out, scenes = Scenes("val", n_val=24), Scenes("train", n_train=64)
batch = torch.stack([scenes[i].image for i in range(64)]).float().div(255).sub(0.5).div(0.25)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 8, 8), torch.nn.GELU(), torch.nn.Conv2d(32, 32, 3, padding=1))
decoder = torch.nn.ConvTranspose2d(32, 3, 8, 8)
optimizer = torch.optim.AdamW([*model.parameters(), *decoder.parameters()], lr=3e-3)
monitor = vp.Monitor(
    model,
    [held_out[i].image for i in range(24)],
    [held_out[i].labels["identity"] for i in range(24)],
    [held_out[i].labels["class"] for i in range(24)],
    every=20,
    patch_size=8,
    image_size=96,
    mean=0.5,
    std=0.25,
)
for step in range(STEPS):
    hidden = batch * (torch.rand(len(batch), 1, 12, 12) < 0.5).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    loss = (decoder(model(hidden)) - batch).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    monitor(step)
print(f"{len(monitor.scores)} scores took {monitor.share:.1%} of the time")
