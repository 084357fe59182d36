"""Wavefront OBJ and MTL files as text (format: Wavefront's OBJ specification, appendix B1)."""

import numpy as np

from threestudio.utils.typing import *


def _lines(keyword: str, rows: np.ndarray) -> List[str]:
    return [f"{keyword} " + " ".join(f"{value:.9g}" for value in row) for row in rows.tolist()]


def obj_text(
    v_pos: Float[np.ndarray, "Nv 3"],
    t_pos_idx: Integer[np.ndarray, "Nf 3"],
    v_nrm: Optional[Float[np.ndarray, "Nv 3"]] = None,
    v_tex: Optional[Float[np.ndarray, "Nt 2"]] = None,
    t_tex_idx: Optional[Integer[np.ndarray, "Nf 3"]] = None,
    v_rgb: Optional[Float[np.ndarray, "Nv 3"]] = None,
    mtllib: Optional[str] = None,
) -> str:
    """A triangle mesh. Normals share the vertices' indices; ``v`` of the texture coordinates
    points down in threestudio and up in OBJ, so it is flipped; colours (0..1) follow the vertex
    position, as most readers accept; ``mtllib`` names the material file."""
    lines = []
    if mtllib is not None:
        lines += [f"mtllib {mtllib}", "g object", "usemtl default"]
    lines += _lines("v", v_pos if v_rgb is None else np.concatenate([v_pos, v_rgb], axis=1))
    corners = [t_pos_idx + 1]
    pattern = "{0}"
    if v_tex is not None:
        lines += _lines("vt", v_tex * [1, -1] + [0, 1])
        corners.append(t_tex_idx + 1)
        pattern += "/{1}"
    if v_nrm is not None:
        lines += _lines("vn", v_nrm)
        pattern += ("/" if v_tex is not None else "//") + "{0}"
    for face in np.stack(corners, axis=-1).tolist():
        lines.append("f " + " ".join(pattern.format(*corner) for corner in face))
    return "\n".join(lines) + "\n"


def mtl_text(maps: Dict[str, str]) -> str:
    """One white material ``default`` with texture maps ``{"map_Kd": file name, ...}``. Without
    maps of them it is not metal (Pm) and fully rough (Pr, of the format's extension for PBR)."""
    lines = ["newmtl default", "Ka 1 1 1", "Kd 1 1 1", "Ks 0 0 0"]
    lines += [line for line in ("Pm 0", "Pr 1") if f"map_{line[:2]}" not in maps]
    lines += [f"{key} {name}" for key, name in maps.items()]
    return "\n".join(lines) + "\n"
