"""Meshes to the formats of ``trimesh``, with the colours that viewers then show."""

from pathlib import Path

import numpy as np
from PIL import Image

from threestudio.utils import images
from threestudio.utils.typing import *


def write(
    path: Path,
    v_pos: Float[np.ndarray, "Nv 3"],
    t_pos_idx: Integer[np.ndarray, "Nf 3"],
    v_nrm: Optional[Float[np.ndarray, "Nv 3"]] = None,
    v_rgb: Optional[Float[np.ndarray, "Nv 3"]] = None,
    v_tex: Optional[Float[np.ndarray, "Nt 2"]] = None,
    t_tex_idx: Optional[Integer[np.ndarray, "Nf 3"]] = None,
    texture: Optional[Float[np.ndarray, "H W 3"]] = None,
) -> None:
    """Write a mesh in the format of the suffix; ``v_rgb`` and ``texture``, which is for a glb only,
    are 0..1 as they are shown (sRGB), and v of ``v_tex`` points down.

    A glb's COLOR_0 is linear and in floats (glTF 2.0, 3.9.2; bytes would leave steps of up to 13
    among dark shown ones), its texture a PNG with the shown colours, and it has normals and a
    material that is not metal, fully rough and without highlights: under the same light from
    everywhere it shows the colours themselves. Other formats have bytes, as they are shown.
    """
    import trimesh

    options: Dict[str, Any] = {"vertex_normals": v_nrm, "process": False}
    written: Dict[str, Any] = {}
    if path.suffix.lower() == ".glb":
        look: Dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
        visual: Dict[str, Any] = {}
        if texture is not None and v_tex is not None and t_tex_idx is not None:
            # a vertex for each pair of a place and a place in the texture
            pairs = np.stack([t_pos_idx.reshape(-1), t_tex_idx.reshape(-1)], axis=1)
            pairs, corners = np.unique(pairs, axis=0, return_inverse=True)
            v_pos, t_pos_idx = v_pos[pairs[:, 0]], corners.reshape(-1, 3)
            options["vertex_normals"] = None if v_nrm is None else v_nrm[pairs[:, 0]]
            visual["uv"] = v_tex[pairs[:, 1]].astype(np.float64) * [1, -1] + [0, 1]
            look["baseColorTexture"] = Image.fromarray(images.to_uint8(texture))
        elif v_rgb is not None:
            light = images.srgb_to_linear(np.asarray(v_rgb, np.float64)).astype(np.float32)
            options["vertex_attributes"] = {"COLOR": light}
        material = trimesh.visual.material.PBRMaterial(**look)
        options["visual"] = trimesh.visual.TextureVisuals(material=material, **visual)
        written = {"include_normals": True, "tree_postprocessor": _finish}
    elif v_rgb is not None:
        options["vertex_colors"] = images.to_uint8(v_rgb)
    trimesh.Trimesh(v_pos, t_pos_idx, **options).export(path, **written)


def _finish(tree: Dict[str, Any]) -> None:
    """As COLOR_0 trimesh writes bytes only, attributes of other names get an underscore, extensions
    of materials are left out, and textures repeat, so that filters mix opposite edges."""
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            attributes = primitive["attributes"]
            if "_COLOR" in attributes:
                attributes["COLOR_0"] = attributes.pop("_COLOR")
    for material in tree["materials"]:
        material["extensions"] = {"KHR_materials_specular": {"specularFactor": 0.0}}
    tree["extensionsUsed"] = ["KHR_materials_specular"]
    for texture in tree.get("textures", []):
        # LINEAR, LINEAR_MIPMAP_LINEAR, CLAMP_TO_EDGE
        tree["samplers"] = [{"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}]
        texture["sampler"] = 0
