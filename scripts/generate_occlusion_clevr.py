"""Render CLEVR-like scenes from a list of objects. Runs inside Blender 2.80 or later, on Python's standard library alone:

    blender --background --python-exit-code 1 --python scripts/generate_occlusion_clevr.py -- \
        --clevr_gen_dir ~/clevr-dataset-gen --spec_jsonl spec.jsonl --output_image_dir images

The data set `occlusionclevr` calls it; assets (base scene, shapes, materials, properties.json) are those of
https://github.com/facebookresearch/clevr-dataset-gen.

A line of the list: image_filename, image_index, split, seed, objects [{color, shape, size, material}]; optional `attempt`
(0, 1 ...: another random stream for a scene that failed before) and `digest` (kept beside the image, see below).

Per scene: camera and lamps return to their base pose and are jittered; objects are placed at random, apart from each
other but free to hide each other: occlusion is what the data set is about, so nobody checks visibility. An image
appears under its name only when it is complete; then `<image>.json` records the digest of what was drawn.

Exit status: 0 all scenes drawn; 3 some could not be placed, the others are there; 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROGRESS = "__CLEVRGEN_PROGRESS__"
UNPLACED = 3  # exit status: some scenes could not be placed
RESTARTS = 100  # times a scene is begun anew before it is given up
LAMPS = ("Lamp_Key", "Lamp_Fill", "Lamp_Back")
Vector = tuple[float, float, float]


class PlacementError(Exception):
    """No free place for an object within the allowed tries and restarts."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options after `--`."""
    parser = argparse.ArgumentParser(prog="generate_occlusion_clevr.py", allow_abbrev=False)
    parser.add_argument("--clevr_gen_dir", required=True, help="checkout of clevr-dataset-gen")
    parser.add_argument("--spec_jsonl", required=True, help="scenes to draw, one JSON object per line")
    parser.add_argument("--output_image_dir", required=True)
    parser.add_argument("--output_scene_dir", help="also write scene files: 3-D and pixel coordinates, directions")
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--height", type=int, default=224)
    parser.add_argument("--render_num_samples", type=int, default=64)
    parser.add_argument("--use_gpu", type=int, default=0)
    parser.add_argument("--gpu_backend", default="CUDA")
    parser.add_argument("--gpu_device_index", type=int)
    parser.add_argument("--gpu_device_name", help="part of a device's name; wins over the index")
    parser.add_argument("--min_dist", type=float, default=0.25, help="smallest gap between two objects")
    parser.add_argument("--margin", type=float, default=0.4, help="smallest offset along left, right, front, behind")
    parser.add_argument("--max_retries", type=int, default=50, help="positions tried per object before a restart")
    parser.add_argument("--key_light_jitter", type=float, default=1.0)
    parser.add_argument("--fill_light_jitter", type=float, default=1.0)
    parser.add_argument("--back_light_jitter", type=float, default=1.0)
    parser.add_argument("--camera_jitter", type=float, default=0.5)
    parser.add_argument("--camera_elevation", type=float, help="height of the camera; default: that of the base scene")
    parser.add_argument("--camera_pitch_deg", type=float, help="rotation about x; default: that of the base scene")
    return parser.parse_args(argv)


def asset_folder(clevr_gen_dir: str) -> Path:
    """The folder of base_scene.blend, shapes, materials and properties.json within a checkout."""
    places = [Path(clevr_gen_dir) / "image_generation" / "data", Path(clevr_gen_dir) / "data", Path(clevr_gen_dir)]
    found = next((place for place in places if (place / "base_scene.blend").exists()), None)
    if found is None:
        raise FileNotFoundError(f"{places[0]}/base_scene.blend is missing: no checkout of clevr-dataset-gen")
    return found


def read_spec(path: str) -> list[dict[str, Any]]:
    """Scenes of a list, one JSON object per line."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def stream(seed: int, attempt: int) -> random.Random:
    """Random numbers of a scene; a further attempt is another stream, for the first would fail again."""
    return random.Random(seed) if attempt == 0 else random.Random(f"{seed}/{attempt}")


def place(
    radii: Sequence[float],
    directions: dict[str, Vector],
    rng: random.Random,
    *,
    min_dist: float,
    margin: float,
    max_retries: int,
    restarts: int = RESTARTS,
) -> list[tuple[float, float, float]]:
    """Ground position and rotation (x, y, angle) of every object, in order.

    Positions are uniform on (-3, 3)^2. One is refused where the gap to an earlier object is below `min_dist`, or the offset
    along left, right, front or behind is positive but below `margin` (which object is further left would be unclear).
    After `max_retries` refusals all objects are taken back; after `restarts` of those the scene is given up.

    Raises:
        PlacementError: given up.
    """
    for _ in range(restarts):
        placed: list[tuple[float, float, float]] = []
        for k, radius in enumerate(radii):
            for _ in range(max_retries):
                x, y = rng.uniform(-3, 3), rng.uniform(-3, 3)
                if all(
                    _apart((x - a, y - b), radius + radii[i], directions, min_dist, margin)
                    for i, (a, b, _) in enumerate(placed)
                ):
                    placed.append((x, y, rng.uniform(0, 2 * math.pi)))
                    break
            if len(placed) <= k:
                break
        else:
            return placed
    raise PlacementError(f"{len(radii)} objects found no places in {restarts} x {max_retries} tries")


def _apart(offset: tuple[float, float], reach: float, directions: dict[str, Vector], min_dist: float, margin: float) -> bool:
    if math.hypot(*offset) - reach < min_dist:
        return False
    along = (offset[0] * directions[name][0] + offset[1] * directions[name][1] for name in ("left", "right", "front", "behind"))
    return not any(0 < step < margin for step in along)


def ground_directions(right: Vector, back: Vector) -> dict[str, Vector]:
    """The six directions of a scene from the camera's x axis and z axis (which points backwards), in world coordinates."""

    def flat(axis: Vector, sign: float) -> Vector:
        length = math.hypot(axis[0], axis[1])
        return (sign * axis[0] / length, sign * axis[1] / length, 0.0)

    return {
        "behind": flat(back, -1),
        "front": flat(back, 1),
        "left": flat(right, -1),
        "right": flat(right, 1),
        "above": (0.0, 0.0, 1.0),
        "below": (0.0, 0.0, -1.0),
    }


def draw_scene(stage: Any, scene: dict[str, Any], properties: dict[str, Any], args: argparse.Namespace) -> None:
    """Set up, render and clear one scene; the image and its record appear whole or not at all."""
    rng = stream(int(scene["seed"]), int(scene.get("attempt", 0)))
    jitters = {"camera": args.camera_jitter, "key": args.key_light_jitter}
    jitters |= {"fill": args.fill_light_jitter, "back": args.back_light_jitter}
    directions = stage.reset(rng, jitters, args.camera_elevation, args.camera_pitch_deg)
    things = scene["objects"]
    radii = [float(properties["sizes"][thing["size"]]) for thing in things]
    knobs = {"min_dist": args.min_dist, "margin": args.margin, "max_retries": args.max_retries}
    poses = place(radii, directions, rng, **knobs)
    image = Path(args.output_image_dir) / scene["image_filename"]
    temporary = image.with_name(f".{image.stem}.{os.getpid()}.part.png")
    try:
        drawn = []
        for thing, radius, (x, y, angle) in zip(things, radii, poses, strict=True):
            color = tuple(value / 255 for value in properties["colors"][thing["color"]]) + (1.0,)
            shape, material = properties["shapes"][thing["shape"]], properties["materials"][thing["material"]]
            pixel = stage.add(shape, material, color, radius, (x, y, radius), angle)
            place3d = {"3d_coords": [x, y, radius], "rotation": math.degrees(angle), "pixel_coords": list(pixel)}
            drawn.append({**{key: thing[key] for key in ("shape", "size", "material", "color")}, **place3d})
        stage.render(temporary)
        os.replace(temporary, image)
    finally:
        stage.clear()
        if temporary.exists():
            temporary.unlink()
    if args.output_scene_dir:
        head = {key: scene[key] for key in ("split", "image_index", "image_filename")}
        write_json(Path(args.output_scene_dir) / f"{image.stem}.json", {**head, "objects": drawn, "directions": directions})
    if "digest" in scene:
        write_json(image.with_name(f"{image.name}.json"), {"digest": scene["digest"]})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write aside, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, sort_keys=True))
    os.replace(temporary, path)


class Stage:
    """Blender's scene: the base scene opened once, camera and lamps put back and objects removed after every image."""

    def __init__(self, args: argparse.Namespace) -> None:
        import bpy

        self.bpy, self.assets = bpy, asset_folder(args.clevr_gen_dir)
        bpy.ops.wm.open_mainfile(filepath=str(self.assets / "base_scene.blend"))
        scene = bpy.context.scene
        scene.render.engine = "CYCLES"
        scene.render.resolution_x, scene.render.resolution_y = args.width, args.height
        scene.render.resolution_percentage = 100
        scene.render.image_settings.file_format = "PNG"
        scene.cycles.samples = args.render_num_samples
        scene.cycles.device = "GPU" if args.use_gpu and self._use_gpu(args) else "CPU"
        self.camera = bpy.data.objects["Camera"]
        self.lamps = [bpy.data.objects[name] for name in LAMPS]
        self.camera.data.clip_start = min(self.camera.data.clip_start, 0.01)
        self.camera.data.clip_end = max(self.camera.data.clip_end, 500)
        self.base = [(thing, thing.location.copy(), thing.rotation_euler.copy()) for thing in (self.camera, *self.lamps)]
        for path in sorted((self.assets / "materials").glob("*.blend")):
            with bpy.data.libraries.load(str(path)) as (available, wanted):
                wanted.node_groups = [name for name in available.node_groups if name == path.stem]
        self.created: list[Any] = []  # what this scene added, and nothing else, is removed after it
        self.painted: dict[tuple, Any] = {}  # materials by (name, colour)

    def reset(self, rng: random.Random, jitter: dict[str, float], elevation: float | None, pitch: float | None) -> dict:
        """Base pose, overrides, jitter; returns the directions on the ground as this camera sees them."""
        for thing, location, rotation in self.base:
            thing.location, thing.rotation_euler = location.copy(), rotation.copy()
        if elevation is not None:
            self.camera.location.z = elevation
        if pitch is not None:
            self.camera.rotation_euler.x = math.radians(pitch)
        for axis in range(3 if elevation is None else 2):
            self.camera.location[axis] += rng.uniform(-jitter["camera"], jitter["camera"])
        for lamp, name in zip(self.lamps, ("key", "fill", "back"), strict=True):
            for axis in range(3):
                lamp.location[axis] += rng.uniform(-jitter[name], jitter[name])
        self.bpy.context.view_layer.update()
        turn = self.camera.matrix_world.to_3x3().normalized()
        return ground_directions(tuple(turn.col[0]), tuple(turn.col[2]))

    def add(
        self, shape: str, material: str, color: Sequence[float], scale: float, location: Vector, angle: float
    ) -> tuple[int, int, float]:
        """Put an object on the ground; returns its pixel (x, y) and depth."""
        bpy = self.bpy
        path = self.assets / "shapes" / f"{shape}.blend"
        with bpy.data.libraries.load(str(path)) as (available, wanted):
            wanted.objects = [name for name in available.objects if name == shape]
        thing = wanted.objects[0]
        bpy.context.scene.collection.objects.link(thing)
        self.created.append(thing)
        thing.scale, thing.location = (scale,) * 3, location
        thing.rotation_euler = (0.0, 0.0, angle)
        thing.data.materials.clear()
        thing.data.materials.append(self._material(material, tuple(color)))
        return self._pixel(location)

    def render(self, path: Path) -> None:
        """Render to a file."""
        self.bpy.context.scene.render.filepath = str(path)
        self.bpy.ops.render.render(write_still=True)
        if not path.exists():
            raise RuntimeError(f"Blender wrote no {path}")

    def clear(self) -> None:
        """Remove the objects of this scene."""
        for thing in self.created:
            mesh = thing.data
            self.bpy.data.objects.remove(thing, do_unlink=True)
            if mesh.users == 0:
                self.bpy.data.meshes.remove(mesh)
        self.created = []

    def _material(self, name: str, color: tuple) -> Any:
        if (name, color) not in self.painted:
            material = self.bpy.data.materials.new(f"{name}_{len(self.painted)}")
            if material.node_tree is None:  # before Blender 5
                material.use_nodes = True
            nodes = material.node_tree.nodes
            nodes.clear()
            output, group = nodes.new("ShaderNodeOutputMaterial"), nodes.new("ShaderNodeGroup")
            group.node_tree = self.bpy.data.node_groups[name]
            group.inputs["Color"].default_value = color
            material.node_tree.links.new(group.outputs["Shader"], output.inputs["Surface"])
            self.painted[name, color] = material
        return self.painted[name, color]

    def _pixel(self, location: Vector) -> tuple[int, int, float]:
        from bpy_extras.object_utils import world_to_camera_view
        from mathutils import Vector as BlenderVector

        scene = self.bpy.context.scene
        x, y, depth = world_to_camera_view(scene, self.camera, BlenderVector(location))
        return round(x * scene.render.resolution_x), round((1 - y) * scene.render.resolution_y), depth

    def _use_gpu(self, args: argparse.Namespace) -> bool:
        """Enable exactly one device; False (and a warning) where that fails."""
        try:
            preferences = self.bpy.context.preferences.addons["cycles"].preferences
            preferences.compute_device_type = args.gpu_backend
            getattr(preferences, "refresh_devices", preferences.get_devices)()
            devices = [device for device in preferences.devices if device.type == args.gpu_backend]
            if args.gpu_device_name:
                chosen = next(device for device in devices if args.gpu_device_name in device.name)
            else:
                chosen = devices[args.gpu_device_index or 0]
            for device in preferences.devices:
                device.use = device == chosen
            return True
        except (KeyError, TypeError, IndexError, StopIteration, AttributeError) as error:
            print(f"warning: no {args.gpu_backend} device could be enabled ({error!r}), rendering on the CPU", flush=True)
            return False


def main(argv: Sequence[str], make_stage: Callable[[argparse.Namespace], Any] = Stage) -> int:
    """Draw every scene of the list; returns the exit status."""
    args = parse_arguments(argv)
    scenes = read_spec(args.spec_jsonl)
    properties = read_properties(asset_folder(args.clevr_gen_dir) / "properties.json")
    for folder in (args.output_image_dir, args.output_scene_dir):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    stage, unplaced = make_stage(args), 0
    for done, scene in enumerate(scenes, 1):
        try:
            draw_scene(stage, scene, properties, args)
        except PlacementError as error:
            unplaced += 1
            print(f"{scene['image_filename']}: {error}", flush=True)
        print(f"{PROGRESS} {done} {len(scenes)}", flush=True)
    return UNPLACED if unplaced else 0


def read_properties(path: Path) -> dict[str, Any]:
    """Names of assets, colours (0-255) and sizes by the names of the list."""
    properties = json.loads(path.read_text())
    for table in ("shapes", "colors", "materials", "sizes"):
        if table not in properties:
            raise KeyError(f"{path}: {table} missing")
    return properties


if __name__ == "__main__":
    try:
        status = main(sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else sys.argv[1:])
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.exit(status)
