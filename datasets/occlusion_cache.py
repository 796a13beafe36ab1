"""Scenes rendered by Blender once and kept: what lies on disk, what is missing, and the processes that render it.

    <directory>/spec.jsonl                 a line per scene: file name, index, split, seed, objects
    <directory>/images/<file name>.png     and .png.json, the digest of the line and the settings it was rendered with
    <directory>/meta.json                  settings, number asked for, scenes dropped for good

The directory's published name leaves out half of what decides an image, so settings and digests are kept beside the
images and compared: an image of another line or other settings is rendered anew, never used. A complete cache needs no
Blender. A cache of the published program (spec.jsonl and images, its pickled meta.pt is not read) is adopted as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets.listings import inside
from datasets.metadata import Entry
from datasets.scene import check_choice, check_whole
from errors import UserError
from files import lock, write_atomically
from runs.progress import Step, count

FORMAT = 1
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "generate_occlusion_clevr.py"
PROGRESS = "__CLEVRGEN_PROGRESS__"  # begins the script's lines "... done total"
LOCK_SECONDS = 600.0  # without a sign of life after which another process that renders into the cache is given up
UNPLACED = 3  # the script's exit status when some scenes could not be placed: worth another pass
PNG_END = bytes.fromhex("0000000049454e44ae426082")


class RenderCache:
    """The rendering half of a data set: options of pixels and processes, the images on disk.

    A subclass sets `split`, `requested` and `directory`, offers `_sample`, and calls `_prepare`.

    Args:
        image_size, render_size: pixels of the square yielded and rendered.
        render_num_samples, min_dist, margin, max_retries, *_jitter, camera_elevation, camera_pitch_deg, use_gpu,
            gpu_backend, gpu_device_index, gpu_device_name: of the script, see there.
        gpu_device_indices: several processes, each on one GPU of its own.
        render_workers: processes; None for one per entry of `gpu_device_indices`.
        default_size, default_material: of every object.
        clevr_gen_dir: checkout of clevr-dataset-gen; else CLEVR_GEN_DIR.
        blender_path: the executable; else BLENDER_PATH, else `blender` on the path.
        use_cache_only: never call Blender.
        render_missing_only: keep the images that are there and valid; false renders all of an unfinished cache.
        repair_missing, repair_missing_passes: try images that are missing after the first pass again, so often.
        missing_policy: what is done about images still missing: "raise", or "drop" ("filter") to go on without them;
            the number asked for and the dropped scenes are recorded, later runs do not render those again.
        show_tqdm: progress of rendering.
    """

    split: str
    requested: int
    directory: Path
    spec: list[dict[str, Any]]

    def __init__(
        self,
        *,
        image_size: int = 336,
        render_size: int | None = 336,
        render_num_samples: int = 64,
        use_gpu: int = 1,
        gpu_backend: str = "CUDA",
        gpu_device_index: int | None = None,
        gpu_device_name: str | None = None,
        gpu_device_indices: Sequence[int] | None = None,
        render_workers: int | None = None,
        min_dist: float = 0.25,
        margin: float = 0.4,
        max_retries: int = 50,
        key_light_jitter: float = 1.0,
        fill_light_jitter: float = 1.0,
        back_light_jitter: float = 1.0,
        camera_jitter: float = 0.5,
        camera_elevation: float | None = 3.2,
        camera_pitch_deg: float | None = 32,
        default_size: str = "small",
        default_material: str = "rubber",
        clevr_gen_dir: str | None = None,
        blender_path: str | None = None,
        use_cache_only: bool = False,
        render_missing_only: bool = True,
        repair_missing: bool = True,
        repair_missing_passes: int = 5,
        missing_policy: str = "raise",
        show_tqdm: bool = True,
    ) -> None:
        check_choice("missing_policy", missing_policy, ("raise", "drop", "filter"))
        check_choice("gpu_backend", gpu_backend, ("CUDA",))
        check_choice("default_size", default_size, ("small", "large"))
        check_choice("default_material", default_material, ("rubber", "metal"))
        self.image_size = check_whole("image_size", image_size, 8)
        self.render_size = self.image_size if render_size is None else check_whole("render_size", render_size, 8)
        self.object_kind = {"size": default_size, "material": default_material}
        self.settings = {  # of the pixels; compared with those a cache was rendered with
            "render_size": self.render_size,
            "render_num_samples": check_whole("render_num_samples", render_num_samples, 1),
            "min_dist": float(min_dist),
            "margin": float(margin),
            "max_retries": check_whole("max_retries", max_retries, 1),
            "key_light_jitter": float(key_light_jitter),
            "fill_light_jitter": float(fill_light_jitter),
            "back_light_jitter": float(back_light_jitter),
            "camera_jitter": float(camera_jitter),
            "camera_elevation": camera_elevation,
            "camera_pitch_deg": camera_pitch_deg,
        }
        self.machine = {  # of the process; no matter for the pixels
            "use_gpu": int(use_gpu),
            "gpu_backend": gpu_backend,
            "gpu_device_index": gpu_device_index,
            "gpu_device_name": gpu_device_name,
        }
        self.gpus = [] if gpu_device_indices is None else [int(gpu) for gpu in gpu_device_indices]
        self.workers = check_whole("render_workers", render_workers or max(1, len(self.gpus)), 1)
        self.clevr_gen_dir = clevr_gen_dir or os.environ.get("CLEVR_GEN_DIR")
        self.blender_path = blender_path or os.environ.get("BLENDER_PATH") or shutil.which("blender")
        self.cache_only, self.missing_only = bool(use_cache_only), bool(render_missing_only)
        self.repairs = check_whole("repair_missing_passes", repair_missing_passes, 0) if repair_missing else 0
        self.policy, self.show_tqdm = "raise" if missing_policy == "raise" else "drop", bool(show_tqdm)

    def _sample(self) -> list[dict[str, Any]]:
        """The list of scenes of this configuration."""
        raise NotImplementedError

    def _read_spec(self) -> list[dict[str, Any]] | None:
        """The list on disk; None where there is none, or one that was only begun."""
        path = self.directory / "spec.jsonl"
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        spec, damage = [], f"{len(lines)} lines" if len(lines) != self.requested else None
        for number, line in enumerate(lines):
            try:
                spec.append(json.loads(line))
            except ValueError:
                damage = f"line {number + 1} is not JSON"
                break
        if damage is None:
            for number, line in enumerate(spec):
                name = Entry(line, None, f"{path}: line {number + 1}").key("image_filename")
                inside(self.directory / "images", name.text(), name.place)
            return spec
        begun = [line_of(line) for line in self._sample()]
        if begun[: len(spec)] == [line_of(line) for line in spec] and not self.cache_only:
            return None  # the beginning of what would be written
        raise UserError(
            f"{path} is damaged ({damage}, expected {self.requested} scenes) and not of this configuration; fix it, or delete "
            f"{self.directory} to render it anew"
        )

    def line(self, number: int) -> Entry:
        """A line of the list, to be checked while it is read; lines are numbered from 0, as images are."""
        return Entry(self.spec[number], None, f"{self.directory / 'spec.jsonl'}: line {number + 1}")

    def _image(self, number: int) -> Path:
        return self.directory / "images" / self.spec[number]["image_filename"]

    def _digest(self, number: int) -> str:
        """What identifies the pixels of a scene: its line and the settings."""
        return hashlib.sha256(f"{line_of(self.spec[number])}|{line_of(self.settings)}".encode()).hexdigest()

    def _valid(self, number: int, adopted: bool) -> bool:
        """Whether the image is there, whole and rendered for this line; adopted caches have no record of the last."""
        path = self._image(number)
        try:
            with open(path, "rb") as file:
                file.seek(-len(PNG_END), os.SEEK_END)
                complete = file.read() == PNG_END
        except OSError:
            return False
        try:
            record = json.loads(path.with_name(f"{path.name}.json").read_text())
            return complete and record.get("digest") == self._digest(number)
        except FileNotFoundError:
            return complete and adopted
        except (OSError, ValueError, AttributeError):
            return False

    def _prepare(self) -> list[int]:
        """See that the images are there; returns the numbers of the scenes that have one. Sets `spec`."""
        if self.cache_only:
            spec, meta = self._read_spec(), self._read_meta()
            if spec is None:
                raise UserError(
                    f"{self.directory}/spec.jsonl is missing and dataset.use_cache_only=true; put the generated cache there, "
                    "or set use_cache_only=false to render it with Blender"
                )
            self.spec = spec
            return self._settle(self._valid_images(meta is None or meta["adopted"]), meta)
        if (there := self._complete()) is not None:
            return there
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with lock(self.directory / ".lock", LOCK_SECONDS, _report, job="rendering") as beat:
                there = self._complete()  # another process may just have finished
                return self._generate(beat) if there is None else there
        except OSError as error:
            raise UserError(f"cannot write to {self.directory}: {error.strerror}; set dataset.root=…") from error

    def _complete(self) -> list[int] | None:
        """The numbers of the scenes of a cache that was finished earlier, by the names of its files; None to look closer."""
        spec, meta = self._read_spec(), self._read_meta()
        if spec is None or meta is None or not meta["complete"]:
            return None
        self.spec = spec
        names = set(os.listdir(self.directory / "images"))
        there = [i for i, line in enumerate(spec) if line.get("image_filename") in names]
        return there if there and set(range(self.requested)) == {*there, *self._dropped_before(meta)} else None

    def _generate(self, beat: Callable[[], None]) -> list[int]:
        """Write the list, render what is missing, repair, record; as `_prepare`."""
        images = self.directory / "images"
        images.mkdir(exist_ok=True)
        for torn in images.glob(".*.part*"):
            torn.unlink()
        meta, spec = self._read_meta(), self._read_spec()
        adopted = meta["adopted"] if meta else spec is not None and self._foreign()
        if spec is None:
            spec = self._sample()
            write_atomically(self.directory / "spec.jsonl", "".join(f"{line_of(line)}\n" for line in spec))
        self.spec = spec
        if meta is None:  # before the first image: what lies in the folder from now on has our records
            self._write_meta(adopted=adopted, dropped=[], complete=False)
        begun = meta is None or not meta["complete"]
        there, dropped = self._valid_images(adopted), self._dropped_before(meta)
        kept = [] if begun and not self.missing_only else there
        to_draw = sorted(set(range(self.requested)) - {*kept, *dropped})
        for attempt in range(self.repairs + begun):
            if not to_draw:
                break
            name = "spec.to_render.jsonl" if attempt == 0 else f"spec.missing.pass{attempt}.jsonl"
            self._render(to_draw, name, attempt, beat)
            there = self._valid_images(adopted)
            to_draw = sorted(set(range(self.requested)) - {*there, *dropped})
        return self._settle(there, self._read_meta())

    def _foreign(self) -> bool:
        """Whether the cache on disk was rendered by the published program: images without any record of ours."""
        files = os.listdir(self.directory / "images")
        return any(name.endswith(".png") for name in files) and not any(name.endswith(".png.json") for name in files)

    def _valid_images(self, adopted: bool) -> list[int]:
        return [i for i in range(self.requested) if self._valid(i, adopted)]

    def _dropped_before(self, meta: dict | None) -> list[int]:
        """Scenes an earlier run went on without; one that may not drop tries them again."""
        return meta["dropped"] if meta and self.policy == "drop" else []

    def _settle(self, there: list[int], meta: dict | None) -> list[int]:
        """Apply the policy on missing images and record the outcome."""
        missing = sorted(set(range(self.requested)) - set(there))
        if missing and (self.policy == "raise" or not there):
            names = ", ".join(self.spec[i]["image_filename"] for i in missing[:3]) + (", …" if len(missing) > 3 else "")
            advice = ["set dataset.missing_policy=drop to go on without them"] if there else []
            advice += ["set dataset.use_cache_only=false to render them"] if self.cache_only else []
            raise UserError(
                f"{self.directory}: {len(missing)} of {self.requested} images are missing or damaged ({names}); "
                + (" or ".join(advice) or "the scenes could not be placed, lower dataset.margin, min_dist or max_objects")
            )
        if not self.cache_only:
            self._write_meta(adopted=meta["adopted"], dropped=missing, complete=True)
            for name in ("spec.to_render.jsonl", *(f"spec.missing.pass{i + 1}.jsonl" for i in range(self.repairs))):
                (self.directory / name).unlink(missing_ok=True)
            shutil.rmtree(self.directory / "spec_parts", ignore_errors=True)
        return there

    def _read_meta(self) -> dict[str, Any] | None:
        path = self.directory / "meta.json"
        try:
            meta = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it, the images are kept") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise UserError(f"{path}: unknown format, expected {FORMAT}; delete it, the images are kept")
        for option, value in meta["settings"].items():
            if value != self.settings.get(option):
                raise UserError(
                    f"{self.directory} was rendered with dataset.{option}={value}, got {self.settings.get(option)}; set it "
                    "back, or choose another dataset.root"
                )
        return meta

    def _write_meta(self, *, adopted: bool, dropped: list[int], complete: bool) -> None:
        """Record the state of the cache; nobody knows the settings of an adopted one."""
        meta = {"format": FORMAT, "requested": self.requested, "settings": {} if adopted else self.settings}
        meta |= {"adopted": adopted, "dropped": dropped, "complete": complete}
        write_atomically(self.directory / "meta.json", json.dumps(meta, indent=1) + "\n")

    def _render(self, numbers: Sequence[int], name: str, attempt: int, beat: Callable[[], None]) -> None:
        """Render scenes in one or several Blender processes, each with a contiguous share of the list."""
        lacking = []
        if not self.blender_path or not (Path(self.blender_path).is_file() or shutil.which(self.blender_path)):
            lacking.append(f"Blender (BLENDER_PATH or dataset.blender_path, got {self.blender_path})")
        if not self.clevr_gen_dir or not Path(self.clevr_gen_dir).is_dir():
            lacking.append(
                f"a checkout of clevr-dataset-gen (CLEVR_GEN_DIR or dataset.clevr_gen_dir, got {self.clevr_gen_dir})"
            )
        if lacking:
            without = "; dataset.use_cache_only=true dataset.missing_policy=drop goes on without them"
            raise UserError(
                f"{self.directory}: {len(numbers)} of {self.requested} images are missing and to render them needs "
                f"{' and '.join(lacking)}{without if len(numbers) < self.requested else ''}"
            )
        lines = [line_of({**self.spec[i], "digest": self._digest(i), "attempt": attempt}) for i in numbers]
        shares = [self.directory / name]
        write_atomically(shares[0], "".join(f"{line}\n" for line in lines))
        workers = min(self.workers, len(lines))
        if workers > 1:
            (self.directory / "spec_parts").mkdir(exist_ok=True)
            shares = [self.directory / "spec_parts" / f"spec.part{w}.jsonl" for w in range(workers)]
            for w, share in enumerate(shares):
                part = lines[len(lines) * w // workers : len(lines) * (w + 1) // workers]
                write_atomically(share, "".join(f"{line}\n" for line in part))
        jobs = [(self._command(share), self._environment(w)) for w, share in enumerate(shares)]
        _run_all(jobs, len(lines), self.show_tqdm, beat)

    def _command(self, share: Path) -> list[str]:
        options = {
            "clevr_gen_dir": self.clevr_gen_dir,
            "spec_jsonl": share,
            "output_image_dir": self.directory / "images",
            "width": self.render_size,
            "height": self.render_size,
            **{option: value for option, value in self.settings.items() if option != "render_size"},
            **self.machine,
        }
        if self.gpus:
            options["gpu_device_index"] = 0  # the only one the process sees
        pairs = [part for option, value in options.items() if value is not None for part in (f"--{option}", str(value))]
        return [str(self.blender_path), "--background", "--python-exit-code", "1", "--python", str(SCRIPT), "--", *pairs]

    def _environment(self, worker: int) -> dict[str, str]:
        """The environment of a process: one GPU of its own, numbered as on the bus."""
        if not self.gpus:
            return dict(os.environ)
        gpu = str(self.gpus[worker % len(self.gpus)])
        return {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpu}


def _run_all(jobs: Sequence[tuple[list[str], dict[str, str]]], total: int, show: bool, beat: Callable[[], None]) -> None:
    """Run the processes side by side, show their progress, stop all when one fails or the user does.

    Raises:
        UserError: a process cannot be started, or ends with another status than 0 or "some scenes could not be placed".
    """
    running: list[subprocess.Popen] = []
    tails: list[list[str]] = [[] for _ in jobs]
    counted = contextlib.ExitStack()
    bar = counted.enter_context(count("blender", total, "image") if show else contextlib.nullcontext(Step("", total, "")))

    def follow(process: subprocess.Popen, tail: list[str]) -> None:
        done = 0
        for text in process.stdout:
            if text.startswith(PROGRESS):
                with contextlib.suppress(ValueError, IndexError):
                    now = int(text.split()[1])
                    bar.update(now - done)
                    done = now
            elif text.strip():
                tail.append(text.strip())
                del tail[:-20]

    try:
        for command, environment in jobs:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            running.append(subprocess.Popen(command, env=environment, text=True, errors="replace", **pipes))
        threads = [threading.Thread(target=follow, args=pair, daemon=True) for pair in zip(running, tails, strict=True)]
        for thread in threads:
            thread.start()
        while True:
            states = [process.poll() for process in running]
            failed = next((i for i, state in enumerate(states) if state not in (None, 0, UNPLACED)), None)
            if failed is not None:
                threads[failed].join(5)
                tail = tails[failed]
                message = next((text for text in reversed(tail) if "error" in text.lower()), tail[-1] if tail else "no output")
                raise UserError(
                    f"Blender ended with status {states[failed]}: {message}; images rendered so far are kept, the same command "
                    "renders the rest"
                )
            if None not in states:
                break
            beat()  # the lock's sign of life
            time.sleep(0.05)
        for thread in threads:
            thread.join()
    except OSError as error:
        raise UserError(f"Blender cannot be started: {error}; set BLENDER_PATH to the executable") from error
    finally:
        counted.close()
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            process.wait()
            process.stdout.close()


def line_of(content: dict[str, Any]) -> str:
    """A line of spec.jsonl; equal content gives equal lines."""
    return json.dumps(content, sort_keys=True)


def _report(text: str) -> None:
    print(text, file=sys.stderr)
