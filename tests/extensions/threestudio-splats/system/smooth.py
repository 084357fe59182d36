import threestudio
from threestudio.utils.loss import tv_loss


@threestudio.register("smooth-picture")
class SmoothPicture:
    """Mix into a system: total variation of pictures."""

    def extra_loss(self, out):
        return self.C(self.cfg.loss.lambda_tv) * tv_loss(out["comp_rgb"].permute(0, 3, 1, 2))


@threestudio.register("smooth-depth")
class SmoothDepth:
    def extra_loss(self, out):
        depth = self.C(self.cfg.loss.lambda_depth_tv) * tv_loss(out["depth"].permute(0, 3, 1, 2))
        return super().extra_loss(out) + depth
