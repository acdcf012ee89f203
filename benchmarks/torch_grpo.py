"""One iteration of DanceGRPO in PyTorch, on diffusers' modules: the other side of against_torch.py.

Written from the equations, independently of dancegrpo_jax, of which it imports nothing. `batch` is the only difference
between the published scripts' way, one sample and one (sample, timestep) pair at a time, and a batched loop.
Shapes: B samples, T steps, K trained steps; latents [B, C, h, w], fp32.
"""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FluxPipeline, FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from transformers import CLIPTextModel


class TorchGRPO:
    """A base model with its sampler, objective and optimizer.

    Args:
      folder: a pipeline in the diffusers layout with one CLIP text encoder; a `transformer` makes it FLUX with the
        kernel g = eta sqrt(sigma / (1 - sigma)), a `unet` Stable Diffusion with DDIM(eta).
      steps, shift, eta, window: of the sampler; noise only in the first `window` steps (0: all that draw noise).
      lora: None to train all weights, or {"rank", "alpha", "targets"}, targets being regexes of module names.
      optim: keyword arguments of torch.optim.AdamW. grad_clip: limit of the global norm, 0 = off.
      ema_decay: of the trained weights' moving average; 0 = off.
    """

    def __init__(self, folder, *, steps: int, shift: float, eta: float, window: int = 0, lora: dict | None = None,
                 optim: dict, grad_clip: float = 1.0, clip_range: float = 1e-4, ema_decay: float = 0.0):
        folder = Path(folder)
        self.eta, self.clip_range, self.grad_clip, self.ema_decay = eta, clip_range, grad_clip, ema_decay
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval().requires_grad_(False)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
        self.flow = (folder / "transformer").is_dir()
        noisy = torch.arange(steps) < (window or steps)
        if self.flow:
            self.model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
            s = torch.linspace(1, 0, steps + 1)
            self.level = shift * s / (1 + (shift - 1) * s)  # sigma
            self.times = 1000 * self.level[:-1]
            noisy[-1] = False  # the last step lands on the predicted x0
        else:
            self.model = UNet2DConditionModel.from_pretrained(folder / "unet")
            scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
            scheduler.set_timesteps(steps)
            self.times, before = scheduler.timesteps, scheduler.timesteps - 1000 // steps
            last = torch.where(before >= 0, scheduler.alphas_cumprod[before.clamp(0)], scheduler.final_alpha_cumprod)
            self.level = torch.cat([scheduler.alphas_cumprod[self.times[:1]], last])  # alphas_cumprod
        self.noisy = noisy
        self.model.eval()  # no dropout; gradients flow all the same
        if lora:
            targets = "|".join(f"({target})" for target in lora["targets"])
            inject_adapter_in_model(LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=targets), self.model)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = [p.detach().clone() for p in self.trained.values()] if ema_decay else []
        self.optimizer = torch.optim.AdamW(self.trained.values(), **optim, fused=True)

    @torch.no_grad()
    def encode(self, tokens):
        """Token ids [P, L] to (hidden [P, L, D], pooled [P, D])."""
        output = self.text(tokens)
        return output.last_hidden_state, output.pooler_output

    def predict(self, z, time, cond):
        """The network's output for latents z [B, C, h, w] at times [B]: velocity or epsilon."""
        hidden, pooled = cond
        if not self.flow:
            return self.model(z, time, hidden, return_dict=False)[0]
        b, c, h, w = z.shape
        tokens = self.model(
            hidden_states=FluxPipeline._pack_latents(z, b, c, h, w), encoder_hidden_states=hidden, pooled_projections=pooled,
            timestep=time / 1000, txt_ids=torch.zeros(hidden.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, z.device, z.dtype), return_dict=False)[0]
        return tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)

    def transition(self, output, z, step):
        """Mean and std of p(z_next | z) at steps [B]."""
        level, after, noisy = (x[:, None, None, None] for x in (self.level[step], self.level[step + 1], self.noisy[step]))
        if self.flow:
            dt = after - level
            score = -(z + (1 - level) * output) / level
            g2 = noisy * self.eta**2 * level / (1 - torch.where(level == 1, after, level))
            return z + output * dt - g2 / 2 * score * dt, torch.sqrt(-g2 * dt)
        std = noisy * self.eta * torch.sqrt((1 - after) / (1 - level) * (1 - level / after))
        x0 = (z - torch.sqrt(1 - level) * output) / torch.sqrt(level)
        return torch.sqrt(after) * x0 + torch.sqrt(1 - after - std**2) * output, std

    @staticmethod
    def log_prob(z_next, mean, std):
        """Gaussian log-density, averaged over the latent's dimensions: [B]; 0 without noise."""
        density = -(z_next - mean)**2 / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
        return torch.where(std > 0, density, 0).mean((1, 2, 3))

    @torch.no_grad()
    def rollout(self, cond, z, noise, batch: int):
        """Samples `batch` latents at a time. cond: of B samples; z [B, C, h, w]; noise [T, B, C, h, w].

        Returns: (latents [T+1, B, C, h, w], log-probabilities [T, B]).
        """
        latents, log_probs = torch.empty(len(noise) + 1, *z.shape), torch.empty(len(noise), len(z))
        latents[0] = z
        for start in range(0, len(z), batch):
            rows = slice(start, start + batch)
            z_part, cond_part = z[rows], [c[rows] for c in cond]
            for i, time in enumerate(self.times):
                step = torch.full((len(z_part),), i)
                mean, std = self.transition(self.predict(z_part, time.expand(len(z_part)), cond_part), z_part, step)
                z_part = mean + std * noise[i, rows]
                latents[i + 1, rows], log_probs[i, rows] = z_part, self.log_prob(z_part, mean, std)
        return latents, log_probs

    @torch.no_grad()
    def decode(self, latents, batch: int):
        """Final latents to images [B, H, W, 3] in [0, 1]."""
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0)
        images = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in latents.split(batch)])
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    @staticmethod
    def advantages(rewards, weights, limit: float = 5.0):
        """Normalised within the groups of each reward [P, G], then summed with weights."""
        total = 0
        for reward, weight in zip(rewards, weights, strict=True):
            normal = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-8)
            total = total + weight * torch.where((reward == reward[:, :1]).all(1, keepdim=True), 0, normal)
        return total.clamp(-limit, limit)

    def accumulate(self, cond, latents, log_probs, advantage, steps, batch: int):
        """Gradients of the clipped objective, `batch` (sample, timestep) pairs at a time.

        Args: cond, latents, log_probs: of a rollout of B samples; advantage [B]; steps: int [B, K], trained ones.
        Returns: the loss.
        """
        rows, steps = torch.arange(len(steps)).repeat_interleave(steps.shape[1]), steps.flatten()
        total = 0.0
        for row, step in zip(rows.split(batch), steps.split(batch), strict=True):
            z = latents[step, row]
            mean, std = self.transition(self.predict(z, self.times[step], [c[row] for c in cond]), z, step)
            ratio = torch.exp(self.log_prob(latents[step + 1, row], mean, std) - log_probs[step, row])
            clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            loss = torch.maximum(-advantage[row] * ratio, -advantage[row] * clipped).sum() / len(rows)
            loss.backward()
            total += loss.item()
        return total

    def apply(self):
        """Clips the gradients, takes one optimizer step, moves the average."""
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.trained.values()], 1 - self.ema_decay)
