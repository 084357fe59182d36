"""``SaverMixin``: everything that a system writes into its output folder."""

import functools
import json
import os
import re
import shutil
import struct
import zlib

import numpy as np
import torch
from PIL import Image

import threestudio
from threestudio.utils import images, saving_mesh, saving_obj
from threestudio.utils.errors import UserError
from threestudio.utils.files import (
    NO_FOLDER,
    disk_advice,
    disk_error,
    require_space,
    whole_file,
)
from threestudio.utils.typing import *


def _writes(method: Callable) -> Callable:
    """While a system trains, a file that cannot be written costs the file and not the training:
    there is one warning, and the file's path is returned all the same. So it is on a process that
    leaves the file to the first one."""

    @functools.wraps(method)
    def wrapper(self, filename: str, *args, **kwargs) -> str:
        if self._left_to_first(filename):
            return os.path.join(self.get_save_dir(), filename)
        try:
            return method(self, filename, *args, **kwargs)
        except OSError as error:
            trainer = getattr(self, "_trainer", None)
            of_disk = disk_error(error) is not None or error.errno in NO_FOLDER
            if trainer is None or trainer.state.fn != "fit" or not of_disk:
                raise
            if not self._write_failed:
                threestudio.warn(
                    f"a file is left out, and may not be the last: {disk_advice(error)}"
                )
            self._write_failed = True
            return os.path.join(self.get_save_dir(), filename)
        finally:
            if self._turn is not None:
                self._turn.note(filename)

    return wrapper


class SaverMixin:
    """Methods ``save_*(filename, ...)``: ``filename`` is relative to the save folder, folders
    above it are made, and the path (for ``save_obj`` a list of paths) is returned.

    A file is whole or absent: it is written beside its place and moved there (see ``whole_file``).
    Images are numpy arrays or tensors of any device, floats within ``data_range`` or uint8.
    ``name`` and ``step`` send the result to Weights & Biases too, where that logger is enabled.

    Of several processes all write in the steps of validation, test and export, whose views are
    divided among them. Everywhere else the first one writes, and the others return the same paths;
    in the hooks at the ends of these stages they wait until the file is there.
    """

    _save_dir: Optional[str] = None
    _wandb_logger: Any = None
    _write_failed = False
    _turn: Any = None  # of several processes, see threestudio.systems.several_processes

    DEFAULT_RGB_KWARGS = {"data_format": "HWC", "data_range": (0, 1)}
    DEFAULT_UV_KWARGS = {"data_format": "HWC", "data_range": (0, 1), "cmap": "checkerboard"}
    DEFAULT_GRAYSCALE_KWARGS = {"data_range": None, "cmap": "jet"}
    DEFAULT_GRID_KWARGS = {"align": "max"}

    # -- where ---------------------------------------------------------------------------------

    def set_save_dir(self, save_dir: str) -> None:
        self._save_dir = save_dir

    def get_save_dir(self) -> str:
        if self._save_dir is None:
            raise ValueError("the save folder is not set: call set_save_dir first")
        return self._save_dir

    def get_save_path(self, filename: str) -> str:
        """The path of ``filename`` in the save folder, its parent folders made. A name that leads
        out of the save folder (absolute, ``..``, a link) is refused with a UserError."""
        folder = self.get_save_dir()
        path = os.path.join(folder, filename)
        root = os.path.realpath(folder)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise UserError(
                f"{filename!r} is outside the save folder {folder}: choose another name"
            )
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def _left_to_first(self, filename: str) -> bool:
        """Whether the first process writes this file and this one does not."""
        if self._turn is not None:
            if not self._turn.first:
                self._turn.wait(filename)
            return not self._turn.first
        trainer = getattr(self, "_trainer", None)
        return trainer is not None and trainer.training and trainer.global_rank != 0

    # -- what ----------------------------------------------------------------------------------

    def convert_data(self, data: Any) -> Any:
        """Tensors to numpy, also inside lists and dicts; None and numpy arrays as they are."""
        if data is None or isinstance(data, np.ndarray):
            return data
        if isinstance(data, torch.Tensor):
            data = data.detach().cpu()
            return (data.float() if data.dtype == torch.bfloat16 else data).numpy()
        if isinstance(data, list):
            return [self.convert_data(d) for d in data]
        if isinstance(data, dict):
            return {k: self.convert_data(v) for k, v in data.items()}
        raise TypeError(f"a {type(data).__name__} cannot be saved: pass an array, list or dict")

    # -- loggers -------------------------------------------------------------------------------

    def create_loggers(self, cfg_loggers: Any) -> None:
        """``{"wandb": {"enable": true, "project": ..., "name": ...}}``."""
        wandb = cfg_loggers.get("wandb")
        if not wandb or not wandb.get("enable", False):
            return
        try:
            import wandb as _  # noqa: F401
            from pytorch_lightning.loggers import WandbLogger
        except ImportError:
            raise UserError(
                "system.loggers.wandb.enable is true but wandb is not installed: "
                "'pip install wandb', or set it to false"
            ) from None
        self._wandb_logger = WandbLogger(
            project=wandb.get("project"), name=wandb.get("name"), save_dir=self._save_dir or "."
        )

    def get_loggers(self) -> List[Any]:
        return [] if self._wandb_logger is None else [self._wandb_logger]

    def _log_media(self, kind: str, path: str, name: Optional[str], step: Optional[int]) -> None:
        if self._wandb_logger is None or name is None or not os.path.exists(path):
            return
        import wandb

        media = wandb.Image(path) if kind == "image" else wandb.Video(path)
        self._wandb_logger.experiment.log({name: media, "trainer/global_step": step})

    # -- images --------------------------------------------------------------------------------

    @_writes
    def save_image(self, filename: str, img: Any) -> str:
        """(H, W), (H, W, 3) or (H, W, 4) of uint8, or of uint16 (PNG only), unchanged."""
        img = self.convert_data(img)
        if img.dtype not in (np.uint8, np.uint16):
            raise UserError(f"save_image takes uint8 or uint16, not {img.dtype}")
        path = self.get_save_path(filename)
        with whole_file(path, keep_suffix=True) as tmp:
            if img.dtype == np.uint16:
                _write_png16(str(tmp), img)
            else:
                options = {"quality": 95} if path.lower().endswith((".jpg", ".jpeg")) else {}
                Image.fromarray(img).save(tmp, **options)
        return path

    def save_rgb_image(
        self,
        filename: str,
        img: Any,
        data_format: str = DEFAULT_RGB_KWARGS["data_format"],
        data_range: Tuple[float, float] = DEFAULT_RGB_KWARGS["data_range"],
        name: Optional[str] = None,
        step: Optional[int] = None,
    ) -> str:
        """(H, W, C) or (C, H, W); more than 3 channels stand side by side in groups of 3."""
        path = self.save_image(
            filename, images.rgb_image(self.convert_data(img), data_format, data_range)
        )
        self._log_media("image", path, name, step)
        return path

    def save_uv_image(
        self,
        filename: str,
        img: Any,
        data_format: str = DEFAULT_UV_KWARGS["data_format"],
        data_range: Tuple[float, float] = DEFAULT_UV_KWARGS["data_range"],
        cmap: str = DEFAULT_UV_KWARGS["cmap"],
    ) -> str:
        """(H, W, 2) or (2, H, W); ``cmap`` "checkerboard" or "color"."""
        return self.save_image(
            filename, images.uv_image(self.convert_data(img), data_format, data_range, cmap)
        )

    def save_grayscale_image(
        self,
        filename: str,
        img: Any,
        data_range: Optional[Tuple[float, float]] = DEFAULT_GRAYSCALE_KWARGS["data_range"],
        cmap: Optional[str] = DEFAULT_GRAYSCALE_KWARGS["cmap"],
        name: Optional[str] = None,
        step: Optional[int] = None,
    ) -> str:
        """(H, W); ``data_range`` None: minimum to maximum; ``cmap`` None, jet, magma, spectral."""
        path = self.save_image(
            filename, images.grayscale_image(self.convert_data(img), data_range, cmap)
        )
        self._log_media("image", path, name, step)
        return path

    def save_image_grid(
        self,
        filename: str,
        imgs: Union[List[dict], List[List[dict]]],
        align: Union[str, int, Tuple[int, int]] = DEFAULT_GRID_KWARGS["align"],
        name: Optional[str] = None,
        step: Optional[int] = None,
        texts: Optional[List[Any]] = None,
    ) -> str:
        """One row (list) or several (list of lists) of ``{"type": "rgb" | "uv" | "grayscale",
        "img": array, "kwargs": arguments of the function above}``; see ``images.image_grid``."""
        rows = imgs if imgs and isinstance(imgs[0], list) else [imgs]
        if not all(rows):
            raise UserError(f"the image grid {filename!r} has no images")
        grid = images.image_grid([[self._cell(c) for c in row] for row in rows], align, texts)
        path = self.save_image(filename, grid)
        self._log_media("image", path, name, step)
        return path

    def _cell(self, cell: dict) -> np.ndarray:
        kinds = {
            "rgb": (images.rgb_image, self.DEFAULT_RGB_KWARGS),
            "uv": (images.uv_image, self.DEFAULT_UV_KWARGS),
            "grayscale": (images.grayscale_image, self.DEFAULT_GRAYSCALE_KWARGS),
        }
        if cell.get("type") not in kinds:
            raise UserError(f"unknown image type {cell.get('type')!r}: choose {', '.join(kinds)}")
        draw, defaults = kinds[cell["type"]]
        return draw(self.convert_data(cell["img"]), **{**defaults, **cell.get("kwargs", {})})

    def save_cubemap(
        self,
        filename: str,
        img: Any,
        data_range: Tuple[float, float] = (0, 1),
        rgba: bool = False,
    ) -> str:
        """(6, S, S, C), faces +x, -x, +y, -y, +z, -z, as a cross."""
        return self.save_image(
            filename, images.cubemap_image(self.convert_data(img), data_range, rgba)
        )

    def save_img_sequence(
        self,
        filename: str,
        img_dir: str,
        matcher: str,
        save_format: str = "mp4",
        fps: int = 30,
        name: Optional[str] = None,
        step: Optional[int] = None,
    ) -> str:
        """A video (mp4: H.264, yuv420p) or animated gif of the files in ``img_dir`` (relative to
        the save folder) whose names match the regular expression ``matcher``, in the order of
        the number that is its first group. The suffix is added when it lacks."""
        if save_format not in ("mp4", "gif"):
            raise UserError(f"save_format must be 'mp4' or 'gif', not {save_format!r}")
        if not filename.endswith(f".{save_format}"):
            filename += f".{save_format}"
        path = self._save_video(filename, img_dir, matcher, save_format, fps)
        self._log_media("video", path, name, step)
        return path

    @_writes
    def _save_video(
        self, filename: str, img_dir: str, matcher: str, save_format: str, fps: int
    ) -> str:
        folder = os.path.join(self.get_save_dir(), img_dir)
        names = os.listdir(folder) if os.path.isdir(folder) else []
        names = [name for name in names if not name.startswith(".")]  # of a write in progress
        found = [(int(m.groups()[0]), n) for n in names if (m := re.search(matcher, n))]
        if not found:
            raise UserError(f"no frames for {filename!r}: nothing in {folder} matches {matcher!r}")
        path = self.get_save_path(filename)
        frames = [os.path.join(folder, n) for _, n in sorted(found)]
        with whole_file(path, keep_suffix=True) as tmp:
            _write_video(str(tmp), frames, save_format, fps)
        return path

    # -- data and geometry ---------------------------------------------------------------------

    def save_data(self, filename: str, data: Any) -> str:
        """A dict as ``.npz``, anything else as ``.npy``; the suffix is added when it lacks."""
        data = self.convert_data(data)
        suffix = ".npz" if isinstance(data, dict) else ".npy"
        if not filename.endswith(suffix):
            filename += suffix
        return self._save_arrays(filename, data)

    @_writes
    def _save_arrays(self, filename: str, data: Any) -> str:
        path = self.get_save_path(filename)
        with whole_file(path, keep_suffix=True) as tmp:
            if isinstance(data, dict):
                np.savez(tmp, **data)
            else:
                np.save(tmp, data)
        return path

    @_writes
    def save_state_dict(self, filename: str, data: Any) -> str:
        path = self.get_save_path(filename)
        with whole_file(path) as tmp, open(tmp, "wb") as file:
            torch.save(data, file)
        return path

    @_writes
    def save_mesh(
        self,
        filename: str,
        v_pos: Any,
        t_pos_idx: Any,
        v_tex: Any = None,
        t_tex_idx: Any = None,
        v_nrm: Any = None,
        v_rgb: Any = None,
        texture: Any = None,
    ) -> str:
        """Vertices (Nv, 3), triangles (Nf, 3) and, if given, vertex normals (Nv, 3) and vertex
        colours (Nv, 3), 0..1 as they are shown, in the format of the suffix, axes as they are.
        Texture coordinates are written into a ``.glb`` with a ``texture`` (H, W, 3) of shown
        colours, which then takes the place of vertex colours; use ``save_obj`` for them elsewhere.

        A ``.glb`` always has normals, a matt material, and colours as glTF wants them, in linear
        light at vertices and as they are shown in a texture: under the same light from everywhere
        viewers show the colours that were given."""
        path = self.get_save_path(filename)
        given = (v_pos, t_pos_idx, v_nrm, v_rgb, v_tex, t_tex_idx, texture)
        arrays = [self.convert_data(a) for a in given]
        with whole_file(path, keep_suffix=True) as tmp:
            saving_mesh.write(tmp, *arrays)
        return path

    def save_obj(
        self,
        filename: str,
        mesh: Any,
        save_mat: bool = False,
        save_normal: bool = False,
        save_uv: bool = False,
        save_vertex_color: bool = False,
        map_Kd: Any = None,
        map_Ks: Any = None,
        map_Bump: Any = None,
        map_Pm: Any = None,
        map_Pr: Any = None,
        map_format: str = "jpg",
    ) -> List[str]:
        """Wavefront ``.obj`` of a mesh with ``v_pos``, ``t_pos_idx`` and, where asked for,
        ``v_nrm``, ``v_tex``, ``t_tex_idx``, ``v_rgb``. With ``save_mat`` also the ``.mtl`` and
        the given maps (colour and specular (H, W, 3), bump (H, W, 3), metallic and roughness
        (H, W, 1), 0..1) as ``texture_{kd,ks,nrm,metallic,roughness}.<map_format>`` beside it."""
        stem = filename[: -len(".obj")] if filename.endswith(".obj") else filename
        folder, paths, material = os.path.dirname(filename), [], None
        if save_mat:
            maps = {
                "map_Kd": ("texture_kd", map_Kd),
                "map_Ks": ("texture_ks", map_Ks),
                "map_Bump": ("texture_nrm", map_Bump),
                "map_Pm": ("texture_metallic", map_Pm),
                "map_Pr": ("texture_roughness", map_Pr),
            }
            entries = {}
            for key, (texture, value) in maps.items():
                if value is not None:
                    entries[key] = f"{texture}.{map_format}"
                    paths.append(self.save_rgb_image(os.path.join(folder, entries[key]), value))
            material = os.path.basename(stem) + ".mtl"
            paths.append(self._save_text(stem + ".mtl", saving_obj.mtl_text(entries)))
        text = saving_obj.obj_text(
            v_pos=self.convert_data(mesh.v_pos),
            t_pos_idx=self.convert_data(mesh.t_pos_idx),
            v_nrm=self.convert_data(mesh.v_nrm) if save_normal else None,
            v_tex=self.convert_data(mesh.v_tex) if save_uv else None,
            t_tex_idx=self.convert_data(mesh.t_tex_idx) if save_uv else None,
            v_rgb=self.convert_data(mesh.v_rgb) if save_vertex_color else None,
            mtllib=material,
        )
        return [self._save_text(stem + ".obj", text), *paths]

    # -- files ---------------------------------------------------------------------------------

    @_writes
    def _save_text(self, filename: str, text: str) -> str:
        path = self.get_save_path(filename)
        with whole_file(path) as tmp:
            tmp.write_text(text, encoding="utf-8")
        return path

    @_writes
    def save_file(self, filename: str, src: str) -> str:
        """A copy of the file ``src``."""
        path = self.get_save_path(filename)
        with whole_file(path) as tmp:
            shutil.copyfile(src, tmp)
        return path

    def save_json(self, filename: str, payload: Any) -> str:
        return self._save_text(filename, json.dumps(payload))


def _write_png16(path: str, img: np.ndarray) -> None:
    """A 16-bit PNG, which pillow cannot write in colour (PNG specification, W3C)."""
    channels = 1 if img.ndim == 2 else img.shape[2]
    if not path.lower().endswith(".png") or channels not in (1, 3, 4):
        raise UserError("a uint16 image must be (H, W), (H, W, 3) or (H, W, 4), in a .png file")
    height, width = img.shape[:2]
    rows = img.reshape(height, -1).astype(">u2").view(np.uint8)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # filter type: none

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    color_type = {1: 0, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header))
        file.write(chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b""))


def _write_video(path: str, frames: List[str], save_format: str, fps: int) -> None:
    """Frames are read one at a time. Those of another size are resized to the first one's; odd
    sizes are extended by a repeated row or column, because yuv420p halves both."""
    import imageio.v2 as imageio

    if save_format == "mp4":
        options = {"format": "FFMPEG", "codec": "libx264", "pixelformat": "yuv420p", "quality": 8}
        options |= {"fps": fps, "macro_block_size": 1}
        options |= {"output_params": ["-movflags", "+faststart"], "ffmpeg_log_level": "quiet"}
    else:
        options = {"format": "GIF", "duration": 1000 / fps, "loop": 0}
    size = None
    try:
        with imageio.get_writer(path, mode="I", **options) as writer:
            for frame in frames:
                with Image.open(frame) as file:
                    pixels = np.asarray(file.convert("RGB"))
                size = size or pixels.shape[:2]
                pixels = images.resize(pixels, *size)
                if save_format == "mp4":
                    pad = ((0, size[0] % 2), (0, size[1] % 2), (0, 0))
                    pixels = np.pad(pixels, pad, mode="edge")
                writer.append_data(pixels)
        complete = save_format != "mp4" or _count_frames(path) == len(frames)
    except (RuntimeError, BrokenPipeError):  # of ffmpeg's writer and reader
        complete = False
    if not complete:
        require_space(os.path.dirname(path))  # ffmpeg does not say why, and may not even fail
        raise UserError("ffmpeg could not write the video (pip install imageio-ffmpeg brings one)")


def _count_frames(path: str) -> int:
    import imageio_ffmpeg

    return imageio_ffmpeg.count_frames_and_secs(path)[0]
