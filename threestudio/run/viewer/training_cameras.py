"""The cameras of the last training batch as frustums in the scene, each with what it saw."""

from typing import Any

import numpy as np
import torch

from threestudio.run.viewer.frames import quaternion, to_bytes

MOST = 16  # frustums
PIXELS = 96  # of a side of a picture


class TrainingCameras:
    """Keeps references to the last batch and to the picture that was rendered of it, while
    ``wanted``; the pictures are copied when they are shown."""

    def __init__(self, renderer: Any, is_drawing: Any) -> None:
        self._renderer, self._is_drawing = renderer, is_drawing
        self._hook: Any = None
        self._seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._shown: list[Any] = []

    def want(self, wanted: bool) -> None:
        """Begin or end to look at what is trained with."""
        if wanted and self._hook is None and isinstance(self._renderer, torch.nn.Module):
            self._hook = self._renderer.register_forward_hook(self._look, with_kwargs=True)
        elif not wanted and self._hook is not None:
            self._hook.remove()
            self._hook = self._seen = None

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        found = kwargs.get("c2w"), kwargs.get("fovy"), out.get("comp_rgb")
        if self._is_drawing() or not all(isinstance(each, torch.Tensor) for each in found):
            return
        self._seen = tuple(each.detach() for each in found)  # type: ignore[assignment]

    def show(self, scene: Any, scale: float) -> bool:
        """Put the last batch into viser's scene, in the place of the one before; whether there was
        one."""
        if self._seen is None:
            return False
        c2w, fovy, rgb = (each[:MOST] for each in self._seen)
        step = max(1, max(rgb.shape[1:3]) // PIXELS)
        fovy = fovy.flatten().expand(len(c2w))
        for i, (matrix, fov, image) in enumerate(zip(c2w.float().cpu().numpy(), fovy, rgb)):
            picture = to_bytes(image[::step, ::step])
            wxyz = quaternion(matrix[:3, :3] * np.array([1.0, -1.0, -1.0]))
            aspect = image.shape[1] / image.shape[0]
            where = {"wxyz": wxyz, "position": matrix[:3, 3]}
            self._put(scene, i, float(fov), aspect, scale, picture, where)
        while len(self._shown) > len(c2w):
            self._shown.pop().remove()
        return True

    def _put(self, scene, i, fov, aspect, scale, picture, where) -> None:
        if i < len(self._shown):
            handle = self._shown[i]
            handle.wxyz, handle.position = where["wxyz"], where["position"]
            handle.fov, handle.aspect, handle.image = fov, aspect, picture
            return
        self._shown.append(
            scene.add_camera_frustum(
                f"/training/{i}",
                fov=fov,
                aspect=aspect,
                scale=scale,
                color=(230, 126, 34),
                thickness=1.5,
                thickness_units="screen",
                image=picture,
                format="jpeg",
                jpeg_quality=70,
                cast_shadow=False,
                receive_shadow=False,
                **where,
            )
        )

    def hide(self) -> None:
        """Take them out of the scene."""
        while self._shown:
            self._shown.pop().remove()
