"""The original's step on a UNet, from its description: what guidance.py compares with."""

import torch
import torch.nn.functional as F
from flow_reference import backward
from torch import nn

SCALE, STRENGTH, RANK = 1000.0, 0.5, 4


class Attention(nn.Module):
    """An attention as the original's ``LoRAAttnProcessor`` computes it, or with torch's kernel.

    ``now["strength"]`` is the LoRA's in the call that is made; without ``lora`` there is none.
    """

    def __init__(self, attn, now: dict, lora: bool, sdpa: bool):
        super().__init__()
        self.now, self.sdpa, self.lora = now, sdpa, nn.ModuleDict()
        for name in ("q", "k", "v", "out") if lora else ():
            layer = attn.to_out[0] if name == "out" else getattr(attn, f"to_{name}")
            wide = {"bias": False, "device": layer.weight.device}
            self.lora[name] = nn.Sequential(
                nn.Linear(layer.in_features, RANK, **wide),
                nn.Linear(RANK, layer.out_features, **wide),
            )

    def project(self, name: str, layer, x):
        y = layer(x)
        if not self.lora:
            return y
        return y + self.now["strength"] * self.lora[name](x.float()).to(y.dtype)

    def forward(self, attn, hidden_states, encoder_hidden_states=None, **_):
        x = hidden_states
        y = x if encoder_hidden_states is None else encoder_hidden_states
        q = self.project("q", attn.to_q, x)
        k = self.project("k", attn.to_k, y)
        v = self.project("v", attn.to_v, y)
        if self.sdpa:
            q, k, v = (u.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for u in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            q, k, v = (attn.head_to_batch_dim(u) for u in (q, k, v))
            scores = q.new_empty(len(q), q.shape[1], k.shape[1])
            scores = torch.baddbmm(scores, q, k.mT, beta=0, alpha=attn.scale)
            out = attn.batch_to_head_dim(torch.bmm(scores.softmax(-1), v))
        return self.project("out", attn.to_out[0], out)


class Reference:
    """The original's step, from its description. ``pair``: prompt and learnt rows in one call."""

    def __init__(self, ours, unet, vae, sdpa: bool, pair: bool):
        self.unet, self.vae, self.pair, self.now = unet, vae, pair, {"strength": 0.0}
        self.schedule = ours.model.schedule
        self.steps = (ours.min_step, ours.max_step + 1)
        self.dtype = unet.dtype
        lora = hasattr(ours, "lora")
        unet.set_attn_processor(
            {
                f"{name}.processor": Attention(module, self.now, lora, sdpa)
                for name, module in unet.named_modules()
                if hasattr(module, "set_processor")
            }
        )
        self.embedding = None if lora else nn.Parameter(ours.learnable_embedding.detach().clone())
        self.learnt = {"learnable_embedding": self.embedding}
        if lora:
            self.learnt = {}
            for name, module in unet.named_modules():
                if isinstance(module, Attention):
                    for part, pair_of in module.lora.items():
                        part = "to_out.0" if part == "out" else f"to_{part}"
                        stem = f"{name.removesuffix('.processor')}.{part}.lora_"
                        self.learnt[f"{stem}A.weight"] = pair_of[0].weight
                        self.learnt[f"{stem}B.weight"] = pair_of[1].weight
            with torch.no_grad():
                for name, value in ours.lora.named_parameters():
                    self.learnt[name].copy_(value)

    def predict(self, x, t, text, strength: float):
        self.now["strength"] = strength
        x, text = x.to(self.dtype), text.to(self.dtype)
        return self.unet(x, t, encoder_hidden_states=text).sample.float()

    def noised(self, z, low: int, high: int):
        t = torch.randint(low, high, z.shape[:1], device=z.device)
        eps = torch.randn_like(z, memory_format=torch.contiguous_format)
        alpha, sigma = (each.view(-1, 1, 1, 1) for each in self.schedule.alpha_sigma(t))
        return alpha * z + sigma * eps, t, eps

    def step(self, rgb, prompt):
        images = (rgb.permute(0, 3, 1, 2) * 2 - 1).to(self.dtype)
        z = self.vae.encode(images).latent_dist.sample().float() * self.vae.config.scaling_factor
        y, null = prompt.get_text_embeddings(z).chunk(2)
        learnt = null if self.embedding is None else self.embedding.expand(len(z), -1, -1)
        x, t, eps = self.noised(z.detach(), 0, self.schedule.steps)
        prior = F.mse_loss(self.predict(x, t, learnt, STRENGTH), eps)
        with torch.no_grad():
            x, t, eps = self.noised(z, *self.steps)
            if self.pair:
                x, twice, text = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, learnt])
                eps_c, eps_u = self.predict(x, twice, text, 0.0).chunk(2)
            else:
                eps_c = self.predict(x, t, y, 0.0)
                eps_u = self.predict(x, t, learnt, STRENGTH)
            w = self.schedule.weight(t).view(-1, 1, 1, 1)
            grad = (w * (eps_c - eps / SCALE + (1 - SCALE) / SCALE * eps_u)).nan_to_num()
        return backward(z, grad, prior, self.dtype, self.learnt)
