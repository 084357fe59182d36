"""Meshes to the formats of ``trimesh``, with the colours that viewers then show."""

from pathlib import Path

import numpy as np

from threestudio.utils import images
from threestudio.utils.typing import *


def write(
    path: Path,
    v_pos: Float[np.ndarray, "Nv 3"],
    t_pos_idx: Integer[np.ndarray, "Nf 3"],
    v_nrm: Optional[Float[np.ndarray, "Nv 3"]] = None,
    v_rgb: Optional[Float[np.ndarray, "Nv 3"]] = None,
) -> None:
    """Write a mesh in the format of the suffix; ``v_rgb`` is 0..1 as it is shown (sRGB).

    A glb's COLOR_0 is linear and in floats (glTF 2.0, 3.9.2; bytes would leave steps of up to 13
    among dark shown ones), and it has normals and a material that is not metal, fully rough and
    without highlights: under the same light from everywhere it shows the colours themselves.
    Other formats have bytes, as they are shown.
    """
    import trimesh

    options: Dict[str, Any] = {"vertex_normals": v_nrm, "process": False}
    written: Dict[str, Any] = {}
    if path.suffix.lower() == ".glb":
        material = trimesh.visual.material.PBRMaterial(metallicFactor=0.0, roughnessFactor=1.0)
        options["visual"] = trimesh.visual.TextureVisuals(material=material)
        if v_rgb is not None:
            light = images.srgb_to_linear(np.asarray(v_rgb, np.float64)).astype(np.float32)
            options["vertex_attributes"] = {"COLOR": light}
        written = {"include_normals": True, "tree_postprocessor": _finish}
    elif v_rgb is not None:
        options["vertex_colors"] = images.to_uint8(v_rgb)
    trimesh.Trimesh(v_pos, t_pos_idx, **options).export(path, **written)


def _finish(tree: Dict[str, Any]) -> None:
    """As COLOR_0 trimesh writes bytes only, attributes of other names get an underscore, and
    extensions of materials are left out."""
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            attributes = primitive["attributes"]
            if "_COLOR" in attributes:
                attributes["COLOR_0"] = attributes.pop("_COLOR")
    for material in tree["materials"]:
        material["extensions"] = {"KHR_materials_specular": {"specularFactor": 0.0}}
    tree["extensionsUsed"] = ["KHR_materials_specular"]
